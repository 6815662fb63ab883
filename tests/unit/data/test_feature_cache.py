"""Cached features: the same as the network's, and a view that trains heads to the same figures."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers.tiny import CLASSES, arguments, rows, to_tensor, view
from torch import nn

from kd_plugins import SMKD, DynamicsCallback, MutualDistillationTrainer, MyLC, find_suspects
from kd_plugins.audit import predict_probs
from kd_plugins.data import FeatureView, ImageView, SubsetView, as_view, cache_features
from kd_plugins.models import feature_head


def backbone(seed=0, classes=10):
    torch.manual_seed(seed)
    return timm.create_model("resnet10_cifar", num_classes=classes)


def test_features_are_what_the_classifier_reads(tmp_path):
    network, data = backbone(), view(20)
    cached = cache_features(data, network, tmp_path, batch_size=6)
    pixels = torch.stack([data[i]["pixel_values"] for i in range(20)])
    network.eval()
    with torch.no_grad():
        seen = network.forward_head(network.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(network.get_classifier()(seen), network(pixels))
    torch.testing.assert_close(torch.from_numpy(np.array(cached.features)), seen)
    assert cached.labels.tolist() == data.labels.tolist()
    assert cached.clean_labels.tolist() == data.clean_labels.tolist()
    assert cached.class_names == data.class_names
    item = cached[7]
    assert item["pixel_values"].dtype == torch.float32
    assert {k: item[k] for k in ("labels", "index", "clean_labels")} == {
        k: data[7][k] for k in ("labels", "index", "clean_labels")
    }
    item["pixel_values"].zero_()  # nobody changes the file through an item
    assert np.abs(cached.features[7]).max() > 0


def test_computed_once_and_other_labels_are_welcome(tmp_path):
    network, calls = backbone(), []
    network.register_forward_pre_hook(lambda *args: calls.append(1))
    body = network.forward_features
    network.forward_features = lambda pixels: calls.append(len(pixels)) or body(pixels)
    cache_features(view(20), network, tmp_path)
    assert sum(calls) == 21  # one more tells the length
    calls.clear()
    again = cache_features(view(20, wrong=0.9), network, tmp_path)
    assert sum(calls) == 1 and again.labels.tolist() != view(20).labels.tolist()


def test_goes_on_after_a_kill(tmp_path):
    network, data, seen = backbone(), view(20), []
    body = network.forward_features

    def dies(pixels):
        if len(seen) == 3:  # the length, and two of four batches
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return body(pixels)

    network.forward_features = dies
    with pytest.raises(KeyboardInterrupt):
        cache_features(data, network, tmp_path, batch_size=5)
    network.forward_features = lambda pixels: seen.append(len(pixels)) or body(pixels)
    seen.clear()
    cached = cache_features(data, network, tmp_path, batch_size=5)
    assert seen == [1, 5, 5]
    whole = cache_features(data, network, tmp_path / "whole", batch_size=5)
    assert np.array_equal(cached.features, whole.features)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (lambda: (view(20), backbone(seed=1)), "features"),
        (lambda: (view(20, seed=1), backbone()), "data"),
        (lambda: (view(20, transform=lambda p: 2 * to_tensor(p)), backbone()), "transform"),
    ],
)
def test_another_cache_is_refused_by_name(tmp_path, other, part):
    cache_features(view(20), backbone(), tmp_path)
    before = (tmp_path / "features.npy").read_bytes()
    with pytest.raises(ValueError, match=rf"feature cache in .* differs in {part}: it was made"):
        cache_features(*other(), tmp_path)
    assert (tmp_path / "features.npy").read_bytes() == before
    assert "feature_cache" not in json.loads((tmp_path / "key.json").read_text())


def test_a_broken_picture_is_the_next_readable_row(tmp_path):
    data = rows(10)
    data[3]["image"] = data[4]["image"] = data[9]["image"] = "missing.png"
    pictures = ImageView(data, to_tensor, clean="clean", max_broken=0.5)
    for _ in range(2):  # computed, and then found
        cached = cache_features(pictures, backbone(), tmp_path, batch_size=4)
        assert cached.index.tolist() == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
        for i in range(10):
            assert {k: v for k, v in cached[i].items() if k != "pixel_values"} == {
                k: v for k, v in pictures[i].items() if k != "pixel_values"
            }
        pictures = ImageView(data, to_tensor, clean="clean", max_broken=0.5)
    assert np.flatnonzero(cached.stand_in).tolist() == [3, 4, 9]
    own, clean = ([row[name] for row in data] for name in ("label", "clean"))
    again = cached.with_labels(own, clean)
    assert (again.labels == cached.labels).all() and (again.stand_in == cached.stand_in).all()
    assert (again.clean_labels == cached.clean_labels).all()
    assert again.with_labels(own).clean_labels.tolist() == cached.clean_labels.tolist()


def test_a_random_transform_is_refused_in_the_words_of_features(tmp_path):
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "label": 0}] * 3
    view = ImageView(rows, lambda picture: to_tensor(picture) + torch.rand(()))
    with pytest.raises(ValueError, match=r"cached features would .* without randomness$") as error:
        cache_features(view, nn.Flatten(), tmp_path)
    assert "logits" not in str(error.value) and "teacher" not in str(error.value)


def test_the_whole_way_from_features_to_suspects(tmp_path):
    """Heads on features reach what the same heads reach behind the backbone."""
    network = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())  # any module from pixels to [B, D]
    data = view(150, wrong=0.2)
    cached = cache_features(data, network, tmp_path / "features")
    heads = [feature_head(48, CLASSES, hidden=32, dropout=0.0) for _ in range(2)]
    trainer = MutualDistillationTrainer(
        heads,
        SMKD(MyLC()),
        arguments(tmp_path / "run", num_train_epochs=10, learning_rate=0.05, logging_steps=500),
        train_dataset=cached,
        eval_dataset=cached,
        callbacks=[DynamicsCallback(tmp_path / "run" / "dynamics")],
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy_ensemble"]
    assert accuracy > 0.8
    whole = [nn.Sequential(network, head) for head in trainer.peers]
    on_features = predict_probs(trainer.peers, cached)
    np.testing.assert_allclose(predict_probs(whole, data), on_features, atol=1e-5)
    assert np.mean(on_features.argmax(1) == cached.clean_labels) == pytest.approx(accuracy)
    suspects = find_suspects(dynamics=tmp_path / "run" / "dynamics")
    wrong = cached.labels != cached.clean_labels
    assert wrong[suspects["index"]].mean() > 1.5 * wrong.mean()


def test_with_labels_and_subsets():
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    data = FeatureView(features, [0, 1, 2, 0, 1, 2], class_names=["a", "b", "c"])
    noisy = data.with_labels([1, 1, 2, 0, 1, 2], clean_labels=data.labels)
    assert noisy[0]["labels"] == 1 and noisy[0]["clean_labels"] == 0 and data[0]["labels"] == 0
    part = as_view(torch.utils.data.Subset(noisy, [0, 5]))
    assert isinstance(part, SubsetView) and part.labels.tolist() == [1, 2]
    assert part.num_classes == 3 and part[1]["index"] == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeatureView(np.zeros((4, 2, 2)), [0] * 4), r"floats \[N, D\], got float64 \[4, 2"),
        (lambda: FeatureView(np.zeros((4, 2), int), [0] * 4), "got int64"),
        (lambda: FeatureView(np.zeros((4, 2)), [0] * 3), r"labels have the shape \(3,\).* 4 rows"),
        (lambda: FeatureView(np.zeros((2, 2)), [0, 3], class_names=["a", "b"]), "Label 3"),
        (lambda: FeatureView(np.zeros((2, 2)), [0.5, 1]), "labels: expected class indices"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
