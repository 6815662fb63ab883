"""load_pictures, noise by name, the transform of a network."""

import datasets
import numpy as np
import pytest
import timm
from helpers.pictures import hub
from PIL import Image

import kd_plugins.models  # noqa: F401  makes resnet10_cifar known to timm
from kd_plugins.data import (
    find_column,
    hold_out,
    load_data,
    load_pictures,
    load_rows,
    noise_by_name,
    own_side,
    picture_transform,
    plain_view,
    training_view,
)

INTEGERS = datasets.Value("int64")


@pytest.mark.parametrize(
    ("kinds", "asked", "expected"),
    [
        ({"coarse_label": None}, {}, ("img", "fine_label")),  # the only ones
        ({"coarse_label": INTEGERS}, {}, ("img", "fine_label")),
        ({}, {"label": "coarse_label"}, ("img", "coarse_label")),
        (
            {"fine_label": INTEGERS},
            {"label": "fine_label"},
            r"label 'fine_label': .*here coarse_label; .*fine_label \(int64\) can",
        ),
        (
            {"fine_label": INTEGERS, "coarse_label": INTEGERS},
            {},
            r"here none; .*cast_column\(NAME, ClassLabel\(...\)\)",
        ),
        (
            {"img": None},
            {"label": "fine_label"},
            "no image column was named: expected the name of one Image column, here none; fine_",
        ),
        (
            {"splits": ("test",)},
            {},
            r"expected the splits train and test \(or validation\), got test",
        ),
        ({"splits": ("train",)}, {}, "got train: nothing would tell"),
    ],
)
def test_columns_and_splits(kinds, asked, expected, tmp_path):
    folder = str(hub(tmp_path / "data", **kinds))
    if isinstance(expected, tuple):
        found = load_pictures(folder, **asked)
        assert len(found) == 4 and (found.image, found.label) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            load_pictures(folder, **asked)


def test_a_struct_is_named_like_other_columns():
    """pandas writes a column of pictures back as a struct."""
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": ""}], "label": [0]})
    with pytest.raises(ValueError, match=r"image \(a struct\), label \(int64\) can be made one"):
        find_column(rows, "image")


@pytest.mark.parametrize(("separator", "name"), [(",", "a.csv"), (";", "a.csv"), ("\t", "a.tsv")])
def test_tables_of_paths(tmp_path, separator, name):
    """As spreadsheets save them; a column `label` of numbers is found by its name."""
    Image.new("RGB", (8, 8)).save(tmp_path / "one, two.png")
    for labels in (["owl", "cat"], ["1", "0"]):
        lines = ["image", "label"], *(['"one, two.png"', label] for label in labels)
        (tmp_path / name).write_text("\n".join(separator.join(line) for line in lines) + "\n")
        rows, image, label = load_rows(str(tmp_path / name))
        assert (image, label) == ("image", "label") and rows[0]["image"].size == (8, 8)
        assert rows["label"][:] == [1, 0]
        (tmp_path / name).unlink()


def test_label_is_the_column_of_this_name():
    """Where there are several; so are true and noisy labels beside each other told apart."""
    kind = datasets.ClassLabel(names=["a", "b"])
    rows = datasets.Dataset.from_dict(
        {"noisy_label": [0], "label": [1]},
        features=datasets.Features({"noisy_label": kind, "label": kind}),
    )
    assert find_column(rows, "label") == "label"
    assert find_column(rows, "label", "noisy_label") == "noisy_label"


def test_part_of_the_data(tmp_path):
    """The first classes; the rows that a column names, and the test rows of their classes."""
    folder = str(hub(tmp_path / "data"))
    part = load_pictures(folder, label="fine_label", classes=2)
    assert (
        part.train.features["fine_label"].names
        == part.test.features["fine_label"].names
        == ["w", "x"]
    )
    assert part.train["fine_label"] == [0, 1] * 4 and len(part.test) == 8
    with pytest.raises(ValueError, match="classes=5: expected 2 to 4, as many as there are"):
        load_pictures(folder, label="fine_label", classes=5)
    where = load_pictures(folder, label="fine_label", where="coarse_label")  # 1 is true
    assert set(where.train["fine_label"]) == set(where.test["fine_label"]) == {1, 3}


@pytest.mark.parametrize(
    ("name", "first_row"),
    [
        ("symmetric", [0.7, 0.1, 0.1, 0.1]),
        ("pair_flip", [0.7, 0.3, 0, 0]),
        ("asymmetric", [0.7, 0.3, 0, 0]),
        ("circular", [0.7, 0, 0.3, 0]),  # w and y are of one superclass
        ("none", [1, 0, 0, 0]),
    ],
)
def test_noise_by_name(name, first_row, tmp_path):
    rows = load_pictures(str(hub(tmp_path / "data")), label="fine_label").train
    assert noise_by_name(rows, name, 0.3, "fine_label")[0] == pytest.approx(first_row)
    assert noise_by_name(rows, "coarse_label", 0.3, "fine_label") == "coarse_label"
    with pytest.raises(ValueError, match=r"noise salt: expected symmetric, .*none or one of"):
        noise_by_name(rows, "salt", 0.3, "fine_label")


def test_noise_between_the_look_alikes_of_cifar10():
    """Five classes change as in the papers, whatever the order of the classes."""
    pairs = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
    names = [*pairs, "ship", "frog", "automobile", "airplane", "horse"]
    rows = datasets.Dataset.from_dict({"label": [0]})
    rows = rows.cast_column("label", datasets.ClassLabel(names=names))
    matrix = noise_by_name(rows, "cifar10", 0.4)
    changed = zip(*np.nonzero(matrix == 0.4), strict=True)
    assert {names[given]: names[wrong] for given, wrong in changed} == pairs
    assert matrix.sum(1) == pytest.approx(np.ones(10)) and matrix.trace() == pytest.approx(8)
    rows = rows.cast_column("label", datasets.ClassLabel(names=names[1:]))
    with pytest.raises(ValueError, match=r"noise cifar10: expected .*, got no \['truck'\]"):
        noise_by_name(rows, "cifar10", 0.4)


def test_transform_is_that_of_the_network():
    """Up to 64 px the papers' crops, above timm's; mean and std are the network's."""
    model = timm.create_model("resnet10_cifar")
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    plain = picture_transform(model, 32)(grey)
    assert plain.shape == (3, 32, 32)
    assert plain[0, 0, 0].item() == pytest.approx((128 / 255 - 0.5071) / 0.2673, rel=1e-5)
    crops = picture_transform(model, 32, augment=True)
    assert len({crops(grey).mean().item() for _ in range(9)}) > 1  # black edges of the padding
    for size, side in [(0, 160), (96, 96), (224, 224)]:
        for augment in (False, True):
            large = picture_transform(timm.create_model("test_resnet"), size, augment)(grey)
            assert large.shape == (3, side, side)


def test_large_pictures_take_the_size_of_the_network():
    network = timm.create_model("test_resnet")  # expects 160 px
    for own, side in [((64, 99), 64), ((65, 65), 160), ((99, 640), 160)]:
        rows = [{"image": Image.new("RGB", own), "label": 0}]
        assert own_side(plain_view(rows, None)) == (side if side == 64 else 0)
        for view in (plain_view, training_view):
            assert view(rows, network)[0]["pixel_values"].shape == (3, side, side)
            assert view(rows, network, 96)[0]["pixel_values"].shape == (3, 96, 96)


def test_a_tenth_of_each_class_is_held_out():
    labels = np.repeat(np.arange(22), [1, 2, *[5] * 18, 40, 200])
    for seed in range(3):
        kept, out = hold_out(np.random.default_rng(seed).permutation(labels), seed)
        assert sorted([*kept, *out]) == list(range(len(labels)))
    shuffled = np.random.default_rng(0).permutation(labels)
    kept, out = hold_out(shuffled)
    held = np.bincount(shuffled[out], minlength=22)
    assert held[0] == 0 and (held[1:20] == 1).all() and held[20] == 4 and held[21] == 20


def test_one_small_picture_does_not_decide_the_size_of_all():
    rows = [{"image": Image.new("RGB", (40, 40)), "label": 0}]
    rows += [{"image": Image.new("RGB", (100, 100)), "label": 0}] * 30
    network = timm.create_model("test_resnet")
    for some in (rows, rows[::-1], [*rows[1:15], rows[0], *rows[15:]]):
        assert plain_view(some, network)[0]["pixel_values"].shape == (3, 160, 160)
    assert plain_view(rows[:1] * 5, network)[0]["pixel_values"].shape == (3, 40, 40)


@pytest.mark.parametrize("size", [16, 224])
def test_digits_are_not_mirrored(size):
    """A picture whose left half is bright keeps it there, if no flip is asked for."""
    model = timm.create_model("test_resnet")
    half = Image.fromarray(np.repeat([[255, 0]], 8, 1).repeat(16, 0).astype("uint8")).convert("RGB")
    for flip in (True, False):
        crops = picture_transform(model, size, augment=True, flip=flip)
        sides = [crops(half)[0].sum(0).chunk(2) for _ in range(16)]
        assert {bool(a.sum() >= b.sum()) for a, b in sides} == ({True, False} if flip else {True})


def test_classes_of_the_splits_are_compared(monkeypatch):
    def split(names):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        picture = Image.new("RGB", (4, 4))
        return datasets.Dataset.from_dict({"image": [picture], "label": [0]}, features=features)

    data = datasets.DatasetDict(train=split(["cat", "dog"]), test=split(["dog", "cat"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: data)
    with pytest.raises(ValueError, match=r"the test data has .* another order: class 0 is 'dog'"):
        load_pictures("any", classes=2)


def test_a_mistyped_folder_is_named(tmp_path, monkeypatch):
    """It may be a hub id, so the hub is asked; only what must be a file is refused at once."""
    asked = []

    def unreachable(name):
        asked.append(name)
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "birds.csv").touch()
    with pytest.raises(ValueError, match=r"Nothing here.*did you mean pictures\?.*on the Hub"):
        load_data("picturess")
    with pytest.raises(ValueError, match=r"Nothing here has this name; datasets says"):
        load_data("mnist")
    with pytest.raises(ValueError, match=r"'bird.csv': there is no such file; did you mean birds"):
        load_data("bird.csv")
    assert asked == ["picturess", "mnist"]


def test_views_for_a_network(tmp_path):
    """Pictures keep their size or get the one that is asked for; only training augments."""
    rows = load_pictures(str(hub(tmp_path / "data")), label="fine_label").train
    network, columns = timm.create_model("resnet10_cifar"), {"image": "img", "label": "fine_label"}
    side = min(rows[0]["img"].size)
    plain = plain_view(rows, network, **columns)[0]["pixel_values"]
    assert plain.shape == (3, side, side)
    assert plain.equal(picture_transform(network, side)(rows[0]["img"]))
    assert training_view(rows, network, augment=False, **columns)[0]["pixel_values"].equal(plain)
    train = training_view(rows, network, 24, seed=3, **columns)
    first = train[0]["pixel_values"]
    train.set_epoch(1)
    assert first.shape == (3, 24, 24) and not first.equal(train[0]["pixel_values"])
