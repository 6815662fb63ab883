"""One network alone: in timm and transformers with equal logits, and the names of its classes."""

import json

import pytest
import timm
import torch
from helpers.networks import pixels, spoil, timm_conv, timm_vit, with_cfg
from helpers.tiny import CLASSES, SIZE, Net, difference, state, vit
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from kd_plugins import CE, Mutual, SelectAll
from kd_plugins.models import PeerModule, export, logits_of

NAMES = ["ant", "bee", "cat"]


EXPORTED = {
    "timm conv net": (timm_conv, 32),
    "timm ViT with its own size": (timm_vit, 16),
    "timm ViT whose size timm < 1.0.31 forgets": (
        lambda: timm.create_model("test_vit", num_classes=CLASSES, img_size=64),
        64,
    ),
    "ResNet for small pictures": (
        lambda: timm.create_model("resnet10_cifar", num_classes=CLASSES),
        32,
    ),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_export_timm(kind, tmp_path):
    """Alone, in timm and in transformers, with equal logits and the names of its classes."""
    make, size = EXPORTED[kind]
    model, x = spoil(make()), pixels(3, size)
    expected = model(x)  # before the layout changes, which rounds differently on some CPUs
    model.to(memory_format=torch.channels_last)  # safetensors refuses strided weights
    strides = [p.stride() for p in model.parameters()]
    assert export(model, tmp_path / "new" / "folder", NAMES) == tmp_path / "new" / "folder"
    assert strides == [p.stride() for p in model.parameters()]  # the running model is left as it is

    folder = tmp_path / "new" / "folder"
    alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(alone(x), expected, rtol=1e-5, atol=1e-5)
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(wrapped(x).logits, expected, rtol=1e-5, atol=1e-5)
    assert [wrapped.config.id2label[i] for i in range(CLASSES)] == NAMES
    assert json.loads((folder / "config.json").read_text())["label_names"] == NAMES
    assert tuple(alone.pretrained_cfg["mean"]) == tuple(model.pretrained_cfg["mean"])

    # a peer that comes from transformers is still re-normalised: it tells by its config
    first = with_cfg(Net(), (0.0,) * 3, (1.0,) * 3)
    raw = torch.rand(3, 3, size, size)
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    second = PeerModule([first, wrapped], Mutual(CE(), SelectAll())).eval()(raw)["logits"][:, 1]
    torch.testing.assert_close(second, model((raw - mean) / std), rtol=1e-3, atol=1e-3)


def test_exported_weights_claim_no_origin(tmp_path):
    """They are new: tag, license and papers were those of weights that the user never saw."""
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    assert {"tag", "license", "origin_url"} <= {k for k, v in model.pretrained_cfg.items() if v}
    model.pretrained_cfg |= {"license": "cc-by-nc-4.0", "notes": ("a",), "paper_ids": "arXiv:1"}
    export(model, tmp_path / "a", NAMES)
    alone = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    export(alone, tmp_path / "b", NAMES)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "a")
    wrapped.config.pretrained_cfg |= {"license": "mit"}
    export(wrapped, tmp_path / "c", NAMES)
    for folder in "abc":
        written = json.loads((tmp_path / folder / "config.json").read_text())["pretrained_cfg"]
        origin = ("tag", "license", "origin_url", "paper_ids", "notes", "hf_hub_id", "url")
        assert not [name for name in origin if written.get(name)]
        assert written["crop_pct"] == model.pretrained_cfg["crop_pct"]
        assert tuple(written["mean"]) == tuple(model.pretrained_cfg["mean"])
    assert model.pretrained_cfg["license"] == "cc-by-nc-4.0"  # the network is left as it was


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_export_transformers(kind, tmp_path):
    if kind == "vit":
        model, size = vit(), SIZE
    else:
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1]}
        model, size = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES)), 32
    x = pixels(3, size)
    expected = spoil(model)(x).logits
    export(model.to(memory_format=torch.channels_last), tmp_path, NAMES)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(x).logits, expected, rtol=1e-5, atol=1e-5)
    assert [again.config.id2label[i] for i in range(CLASSES)] == NAMES
    assert again.config.label2id == {name: i for i, name in enumerate(NAMES)}


def test_export_of_any_other_module(tmp_path):
    model = spoil(Net(bn=True)).to(memory_format=torch.channels_last)
    export(model, tmp_path, NAMES)
    again = Net(seed=9, bn=True).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert difference(state(model), state(again)) == 0


def test_a_network_that_does_not_come_back_is_refused(tmp_path):
    """timm rebuilds it without the change, and the logits of every picture are others."""
    model = spoil(timm_conv())
    model.act1 = torch.nn.Tanh()  # has no weights: nothing else would show it
    with pytest.raises(ValueError, match=r"ResNet does not come back.*its logits differ"):
        export(model, tmp_path, NAMES)
    model.fc = torch.nn.Linear(8, CLASSES + 4)  # num_classes still names the first number
    with pytest.raises(ValueError, match=r"(?s)does not come back.*size mismatch"):
        export(model, tmp_path, NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("channels", [1, 4])
def test_export_for_other_channels(channels, tmp_path):
    model = spoil(timm.create_model("test_vit", num_classes=CLASSES, in_chans=channels))
    export(model, tmp_path, NAMES)
    x = torch.randn(2, channels, 160, 160)
    for again in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        AutoModelForImageClassification.from_pretrained(tmp_path),
    ):
        torch.testing.assert_close(logits_of(again.eval()(x)), model(x), rtol=1e-5, atol=1e-5)


def test_export_draws_no_random_numbers(tmp_path):
    """It may happen in the middle of a training, which must then go on as it would have."""
    model, before = timm_conv(), torch.get_rng_state()
    export(model, tmp_path)
    assert torch.equal(before, torch.get_rng_state()) and model.training
