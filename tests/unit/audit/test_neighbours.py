"""Neighbours: their search by hand, planted copies, and planted pictures of no class."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from kd_plugins import estimate_label_noise, find_suspects
from kd_plugins.audit import farthest, near_duplicates, write_oddities
from kd_plugins.audit.neighbours import find_neighbours


def estimated(features, labels, **options):
    classes = int(labels.max()) + 1
    q = np.random.default_rng(0).dirichlet(np.full(classes, 0.3), len(labels)).astype(np.float32)
    return estimate_label_noise(labels, q, features, draws=0, **options)


def test_search_by_hand(monkeypatch):
    """As by sorting all cosines, over several parts of rows; row 4 is left out."""
    monkeypatch.setattr("kd_plugins.audit.neighbours.ROWS", 7)
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    rows = np.random.default_rng(1).permutation(np.delete(np.arange(40), 4))
    near = find_neighbours(features, rows, 5, 100, 0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    cosine[:, 4] = -2
    assert (near[4] == -1).all()
    np.testing.assert_array_equal(near[rows], np.argsort(-cosine, 1)[rows, :5])
    few = find_neighbours(features, rows, 5, 12, 0)
    bank = np.unique(few[rows])
    assert 4 not in bank and len(bank) == 12
    cosine[:, np.setdiff1d(np.arange(40), bank)] = -2
    np.testing.assert_array_equal(few[rows], np.argsort(-cosine, 1)[rows, :5])


def pictures(count, seed=0):
    """Different pictures of 48 px, coarse and smooth."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(p).resize((48, 48), Image.Resampling.BICUBIC) for p in coarse]


def compressed(picture):
    picture.save(buffer := BytesIO(), "jpeg", quality=75)
    return Image.open(buffer)


def shifted(picture):
    pixels = np.asarray(picture)
    return Image.fromarray(np.concatenate([pixels[:, :1], pixels[:, :-1]], axis=1))


@pytest.mark.parametrize("bank", [1000, 60])
def test_planted_copies(bank):
    """Compressed and shifted copies with another label are found, and nothing else, with a bank of
    a third of the pictures too. The network is untrained, so that mirroring changes its features
    and other pictures are rather similar."""
    originals = pictures(160)
    copies = [(compressed, shifted)[k % 2](originals[k]) for k in range(20)]
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=0).eval()
    with torch.no_grad():
        features = network(torch.stack([to_tensor(p) for p in [*originals, *copies]])).numpy()
    labels = np.arange(len(features)) % 2
    labels[160:] = 1 - labels[:20]
    labels[160] = labels[0]  # a copy with the same label is no contradiction
    noise = estimated(features, labels, bank=bank)
    pairs = near_duplicates(noise, least=0.9, class_names=["cat", "dog"])
    found = set(zip(pairs["index"], pairs["other"], strict=True))
    planted = {(k, 160 + k) for k in range(1, 20)}
    assert found <= planted and len(found) >= 16
    assert (np.diff(pairs["similarity"]) <= 0).all() and min(pairs["similarity"]) >= 0.9
    for row in pairs:
        assert (row["label"], row["other_label"]) == (labels[row["index"]], labels[row["other"]])
        assert row["label_name"] == ["cat", "dog"][row["label"]] != row["other_name"]


def blobs(rng, size=400, classes=4, width=16):
    labels = np.arange(size) % classes
    centres = rng.normal(size=(classes, width)) * 3
    return (centres[labels] + rng.normal(size=(size, width))).astype(np.float32), labels


def test_pictures_of_no_class_rank_highest():
    rng = np.random.default_rng(0)
    features, labels = blobs(rng)
    features[::40] = rng.normal(size=(10, 16)) * 3
    outlier = estimated(features, labels).outlier
    assert sorted(outlier) == pytest.approx(np.arange(400) / 400)
    assert set(np.argsort(-outlier)[:10]) == set(range(0, 400, 40))
    other = estimated(features * 7 + 3, labels).outlier  # scale and origin do not matter
    assert np.abs(outlier - other).max() < 0.01


def test_columns_of_suspects_and_tables(tmp_path):
    """`neighbours` are the nearest whose label is the proposed class, four at most."""
    features, labels = blobs(np.random.default_rng(0))
    labels[:5] = (labels[:5] + 1) % 4
    q = np.full((400, 4), 0.001, np.float32)
    q[np.arange(400), np.arange(400) % 4] = 0.997
    q[9] = np.nan
    noise = estimate_label_noise(labels, q, features, draws=0)
    suspects = find_suspects(noise=noise)
    assert sorted(suspects["index"]) == [0, 1, 2, 3, 4]
    for row in suspects:
        speaking = [k for k in noise.near[row["index"]] if labels[k] == row["proposed"]]
        assert row["neighbours"] == speaking[:4] and len(speaking) >= 4
        assert row["outlier"] == pytest.approx(noise.outlier[row["index"]])
    assert np.isnan(noise.outlier[9]) and (noise.near[9] == -1).all() and 9 not in noise.near
    pairs = near_duplicates(noise, least=1.0, class_names=list("abcd"))
    assert len(pairs) == 0 and "similarity" in pairs.column_names
    paths = write_oddities(pairs, farthest(noise, list("abcd")), tmp_path)
    table = datasets.Dataset.from_csv(str(paths[1]), cache_dir=tmp_path / "cache")
    assert len(table) == 100 and 9 not in table["index"][:]
    assert table["index"][0] == int(np.nanargmax(noise.outlier))
    with pytest.raises(ValueError, match="expected that of features"):
        near_duplicates(estimate_label_noise(labels, q, draws=0))
