"""Class probabilities from the names of the classes, by tiny CLIP-like models."""

import datasets
import numpy as np
import pytest
import torch
from helpers.clip import PICTURES, model_in
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from kd_plugins import cli, estimate_label_noise
from kd_plugins.audit import noise_of_pictures, zero_shot_probs
from kd_plugins.data.cache_files import CacheFiles

NAMES = ["cat", "sea_owl", "dog"]


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request, tmp_path_factory):
    return model_in(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("model"), "clip")


def pictures(count=10):
    rng = np.random.default_rng(0)
    return [Image.fromarray(p) for p in rng.integers(0, 256, (count, 20, 24, 3), np.uint8)]


def rows(names=NAMES, images=None):
    images = pictures() if images is None else images
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    table = {"image": images, "label": [k % 3 for k in range(len(images))]}
    return datasets.Dataset.from_dict(table, features=features)


def by_model(folder, texts):
    """Probabilities as the model itself computes them, from pictures and sentences at once."""
    network, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=texts, images=pictures(), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        return network.eval()(**inputs).logits_per_image.softmax(-1).numpy()


def test_equals_the_models_own_probabilities(model, tmp_path):
    probs, view = zero_shot_probs(rows(), model, tmp_path, batch_size=4)
    expected = by_model(model, [f"a photo of a {x}." for x in ("cat", "sea owl", "dog")])
    assert probs.dtype == np.float32 and np.ptp(expected, axis=0).max() > 0.05
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    assert view.labels.tolist() == [k % 3 for k in range(10)] and view.class_names == NAMES
    np.testing.assert_allclose(np.linalg.norm(view.features, axis=1), 1, atol=1e-5)


def test_templates_are_averaged_as_directions(clip, tmp_path):
    templates = ["a {}.", "the {} of a {}"]
    probs, view = zero_shot_probs(rows(), clip, tmp_path, templates=templates)
    network, processor = AutoModel.from_pretrained(clip), AutoProcessor.from_pretrained(clip)
    logits = []
    for name in ("cat", "sea owl", "dog"):
        texts = [t.replace("{}", name) for t in templates]
        with torch.no_grad():
            tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
            t = network.get_text_features(**tokens).pooler_output
        t = (t / t.norm(dim=1, keepdim=True)).sum(0)
        logits.append(view.features @ (t / t.norm()).numpy() * np.exp(2.5))
    expected = np.exp(np.stack(logits, 1))
    np.testing.assert_allclose(probs, expected / expected.sum(1, keepdims=True), atol=1e-5)


def test_other_names_need_no_pictures(clip, tmp_path, monkeypatch):
    zero_shot_probs(rows(), clip, tmp_path)
    monkeypatch.setattr(CacheFiles, "write", None)
    names = ["rock", "tree", "sky"]
    probs, _ = zero_shot_probs(rows(names=None), clip, tmp_path, class_names=names)
    texts = [f"a photo of a {name}." for name in names]
    np.testing.assert_allclose(probs, by_model(clip, texts), atol=1e-5)


def test_goes_on_after_a_kill(clip, tmp_path, monkeypatch):
    write, starts = CacheFiles.write, []

    def dies(self, start, *values):
        if len(starts) == 2:
            starts.append(None)
            raise KeyboardInterrupt
        starts.append(start)
        write(self, start, *values)

    monkeypatch.setattr(CacheFiles, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        zero_shot_probs(rows(), clip, tmp_path / "a", batch_size=3)
    probs, _ = zero_shot_probs(rows(), clip, tmp_path / "a", batch_size=3)
    assert starts == [0, 3, None, 6, 9]
    whole = zero_shot_probs(rows(), clip, tmp_path / "b")[0]
    np.testing.assert_allclose(probs, whole, rtol=1e-5)  # batches of other sizes round differently


def test_autocast_and_half_weights(clip, tmp_path):
    """bfloat16 moves the probabilities a little; weights that are kept in 16 bits are float32."""
    exact, _ = zero_shot_probs(rows(), clip, tmp_path / "a")
    rounded, _ = zero_shot_probs(rows(), clip, tmp_path / "b", dtype=torch.bfloat16)
    assert 0 < np.abs(rounded - exact).max() < 0.05
    AutoModel.from_pretrained(clip).half().save_pretrained(tmp_path / "half")
    AutoProcessor.from_pretrained(clip).save_pretrained(tmp_path / "half")
    half, view = zero_shot_probs(rows(), tmp_path / "half", tmp_path / "c")
    assert view.features.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=5e-3)


def test_broken_picture_has_no_probabilities(clip, tmp_path):
    images = [*pictures(3), {"bytes": b"broken", "path": None}, *pictures(200)]
    probs, _ = zero_shot_probs(rows(images=images), clip, tmp_path)
    assert np.flatnonzero(np.isnan(probs[:, 0])).tolist() == [3]


def test_pooled_with_other_probabilities(clip, tmp_path):
    """The geometric mean of both; alone, with the neighbours of its own embeddings."""
    labels = np.arange(10) % 3
    text, view = zero_shot_probs(rows(), clip, tmp_path / "zero-shot")
    given = np.random.default_rng(1).dirichlet(np.ones(3), 10).astype(np.float32)
    mean = np.sqrt(given * text)
    for probs, expected in ((given, mean / mean.sum(1, keepdims=True)), (None, np.array(text))):
        found = noise_of_pictures(rows(), None, tmp_path, probs=probs, zero_shot=clip)
        same = estimate_label_noise(labels, expected, view.features)
        np.testing.assert_allclose(found.p_wrong, same.p_wrong, atol=1e-3)
    with pytest.raises(ValueError, match=r"expected \[10, 3\]"):
        noise_of_pictures(rows(), None, tmp_path, probs=given[:9], zero_shot=clip)
    for sources in ({}, {"probs": given, "backbone": "resnet18"}):
        with pytest.raises(ValueError, match="alone or with one of them"):
            noise_of_pictures(rows(), sources.pop("backbone", None), tmp_path, **sources)


def test_refusals(clip, tmp_path):
    with pytest.raises(ValueError, match="classes are numbers, 0, 1, 2"):
        zero_shot_probs(rows(names=None), clip, tmp_path)
    with pytest.raises(ValueError, match="class_names: got 2, and the data have 3"):
        zero_shot_probs(rows(), clip, tmp_path, class_names=["a", "b"])
    for templates in ([], ["a photo"]):
        with pytest.raises(ValueError, match=r"sentences with \{\}"):
            zero_shot_probs(rows(), clip, tmp_path, templates=templates)
    CLIPVisionModel(CLIPVisionConfig(**PICTURES)).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="CLIPVisionModel: expected a tower for pictures, one for"):
        zero_shot_probs(rows(), tmp_path / "half", tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*name a folder"):
        zero_shot_probs(rows(), tmp_path / "none", tmp_path)
    whole = AutoModel.from_pretrained(clip)
    weights = {k: v for k, v in whole.state_dict().items() if "text_model" not in k}
    whole.save_pretrained(tmp_path / "half", state_dict=weights)
    AutoProcessor.from_pretrained(clip).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"lacks \d+ weights, such as text_model"):
        zero_shot_probs(rows(), tmp_path / "half", tmp_path)


def test_command(clip, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows().to_parquet(folder / "train-00000-of-00001.parquet")
    argv = ["suspects", str(folder), "--zero-shot", str(clip), "--output", str(tmp_path / "out")]
    cli.main(argv)
    assert "of 10 labels are suspected" in capsys.readouterr().out
    assert (tmp_path / "out" / "cache" / "zero-shot" / "probs.npy").exists()
    assert not (tmp_path / "out" / "cache" / "features").exists()
    with pytest.raises(SystemExit):
        cli.main([*argv, "--dynamics", "runs/dynamics"])
    assert "--zero-shot goes with the last two" in capsys.readouterr().err
