"""WebVision's layout: a small tree written by hand, every kind of bad list, full size."""

import numpy as np
import pytest
from PIL import Image

from kd_plugins.data import load_webvision, write_webvision

SYNSETS = [
    "n01440764 tench, Tinca tinca",
    "n01443537 goldfish, Carassius auratus",
    "n02012849 crane",
    "n03126707 crane",
]
GOOGLE = [
    "google/q0001/-vT4-W8g9.jpg 0",
    "google/q0003/_q-x.jpg 2",
    "google/q0004/a'\"b.jpg 3",
    "google/q0002/b.jpg 1",
]
FLICKR = ["flickr/q0001/c.jpg 0", "flickr/q0004/d.jpg 3"]


@pytest.fixture
def root(tmp_path):
    lists = {"synsets": SYNSETS, "train_filelist_google": GOOGLE, "train_filelist_flickr": FLICKR}
    lists["val_filelist"] = ["val000001.jpg 2", "val000002.jpg 0"]
    (tmp_path / "val_images").mkdir()
    (tmp_path / "info").mkdir()
    for name, lines in lists.items():
        write(tmp_path, name, lines)
    return tmp_path


def write(root, name, lines):
    (root / "info" / f"{name}.txt").write_text(
        "".join(line + "\n" for line in lines), encoding="utf-8"
    )


def rows(dataset, root):
    return [
        (path.removeprefix(f"{root}/"), label)
        for path, label in zip(dataset["image"], dataset["label"], strict=True)
    ]


def test_train(root):
    data = load_webvision(root, classes=None)
    assert rows(data, root) == [(line.split()[0], int(line.split()[1])) for line in GOOGLE]
    assert data["image"][0] == str(root / "google" / "q0001" / "-vT4-W8g9.jpg")
    assert (
        data.features["label"].names == SYNSETS
    )  # "crane" twice: only with the wnid are names distinct
    assert str(data.split) == "train" and data.column_names == ["image", "label"]
    both = load_webvision(root, classes=None, sources=("google", "flickr"))
    assert (
        both["image"][:]
        == data["image"][:] + load_webvision(root, classes=None, sources="flickr")["image"][:]
    )
    assert load_webvision(root, classes=None)._fingerprint == data._fingerprint != both._fingerprint


def test_classes(root):
    mini = load_webvision(root, classes=2, sources=("google", "flickr"))
    assert mini.features["label"].names == SYNSETS[:2]
    assert rows(mini, root) == [
        ("google/q0001/-vT4-W8g9.jpg", 0),
        ("google/q0002/b.jpg", 1),
        ("flickr/q0001/c.jpg", 0),
    ]
    chosen = load_webvision(root, classes=[3, 0])
    assert chosen.features["label"].names == [SYNSETS[3], SYNSETS[0]]
    assert rows(chosen, root) == [("google/q0001/-vT4-W8g9.jpg", 1), ("google/q0004/a'\"b.jpg", 0)]


def test_val_prefers_the_256_pixel_pictures(root):
    assert rows(load_webvision(root, "val", classes=3), root) == [
        ("val_images/val000001.jpg", 2),
        ("val_images/val000002.jpg", 0),
    ]
    (root / "val_images_256").mkdir()
    data = load_webvision(root, "val", classes=1)
    assert (
        rows(data, root) == [("val_images_256/val000002.jpg", 0)]
        and str(data.split) == "validation"
    )


@pytest.mark.parametrize("folders", [("n01440764", "n03126707"), ("0", "0003")])
def test_imagenet(root, folders):
    for folder, name in zip(
        (folders[0], folders[1], folders[1]), ("b.JPEG", "c.JPEG", "a.JPEG"), strict=True
    ):
        (root / "ilsvrc" / "val" / folder).mkdir(parents=True, exist_ok=True)
        (root / "ilsvrc" / "val" / folder / name).touch()
    (root / "ilsvrc" / "val" / folders[0] / "notes.txt").touch()
    synsets = root / "info" / "synsets.txt"
    expected = [
        (f"val/{folders[0]}/b.JPEG", 0),
        (f"val/{folders[1]}/a.JPEG", 3),
        (f"val/{folders[1]}/c.JPEG", 3),
    ]
    for where in (root / "ilsvrc", root / "ilsvrc" / "val"):
        data = load_webvision(where, "imagenet", classes=None, synsets=synsets)
        assert rows(data, root / "ilsvrc") == expected and data.features["label"].names == SYNSETS
    assert (
        rows(load_webvision(where, "imagenet", classes=1, synsets=synsets), root / "ilsvrc")
        == expected[:1]
    )
    with pytest.raises(
        ValueError, match=r"2 class folders in .*val: fewer than 1,000 need synsets"
    ):
        load_webvision(root / "ilsvrc", "imagenet")
    (root / "ilsvrc" / "val" / "n99999999").mkdir()
    if folders[0] == "n01440764":
        with pytest.raises(ValueError, match=r"n99999999 .* none of the 4 classes"):
            load_webvision(root / "ilsvrc", "imagenet", synsets=synsets)


def test_imagenet_of_1000_folders_names_itself(tmp_path):
    wnids = [f"n{k:08d}" for k in range(1000)]
    for wnid in reversed(wnids):
        (tmp_path / "val" / wnid).mkdir(parents=True)
    (tmp_path / "val" / wnids[7] / "x.JPEG").touch()
    data = load_webvision(tmp_path, "imagenet", classes=50)
    assert data.features["label"].names == wnids[:50] and data["label"][:] == [7]


def test_missing_files_are_named(root):
    (root / "info" / "train_filelist_google.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train_filelist_google\.txt\. Expected WebVision's layout"
    ):
        load_webvision(root)
    (root / "val_images").rmdir()
    with pytest.raises(FileNotFoundError, match="No folder val_images_256 or val_images"):
        load_webvision(root, "val")
    (root / "info" / "synsets.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"No class list .*synsets\.txt"):
        load_webvision(root)
    with pytest.raises(FileNotFoundError, match="No class folders"):
        load_webvision(root / "nowhere", "imagenet")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("google/q0001/x.jpg", "line 3: 'google/q0001/x.jpg', expected `<path> <label>`"),
        ("google/q0001/x.jpg 1 2", "line 3: 'google/q0001/x.jpg 1 2', expected"),
        ("google/q0001/x.jpg one", "line 3: 'google/q0001/x.jpg one', expected"),
        ("google/q0001/x.jpg -", "line 3: 'google/q0001/x.jpg -', expected"),
        (" 1", "line 3: '1', expected"),
        ("google/q0001/x.jpg 4", "line 3: label 4; 4 classes go from 0"),
        ("google/q0001/x.jpg -1", "line 3: label -1; 4 classes"),
    ],
)
def test_bad_lines_are_named(root, line, text):
    write(root, "train_filelist_google", [GOOGLE[0], "", line, GOOGLE[1]])
    with pytest.raises(ValueError, match=f"train_filelist_google.txt, {text}"):
        load_webvision(root)


def test_bad_arguments(root):
    for keywords, text in (
        ({"split": "test"}, "split 'test': expected 'train', 'val' or 'imagenet'"),
        ({"sources": ("bing",)}, "'bing'"),
        ({"sources": ()}, "expected distinct ones"),
        ({"classes": 5}, "classes=5: .* there are 4 classes"),
        ({"classes": [1, 1]}, "distinct class indices"),
        ({"classes": []}, "distinct class indices"),
        ({"classes": [1], "sources": "flickr"}, "No picture of split 'train'"),
    ):
        with pytest.raises(ValueError, match=text):
            load_webvision(root, **({"classes": None} | keywords))
    write(root, "train_filelist_google", [])
    with pytest.raises(ValueError, match="no line in it"):
        load_webvision(root, classes=None)


def test_write_and_read_back(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    given, clean = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 2, 1, 0])
    val = ([Image.new("RGB", (8, 8), "red"), pictures[0]], [2, 1])
    assert (
        write_webvision(tmp_path / "w", (pictures, given, clean), val, ["zero", "one", "two"])
        == tmp_path / "w"
    )
    train = load_webvision(tmp_path / "w", classes=None)
    assert train["label"][:] == given.tolist() and train["clean_label"][:] == clean.tolist()
    assert train.features["clean_label"] == train.features["label"]
    assert [name.split()[1] for name in train.features["label"].names] == ["zero", "one", "two"]
    for path, picture in zip(train["image"], pictures, strict=True):
        with Image.open(path) as read:
            assert (
                read.size == (8, 8)
                and np.abs(np.asarray(read.convert("L")) - picture.astype(int)).mean() < 5
            )
    test = load_webvision(tmp_path / "w", "val", classes=3)
    assert test["label"][:] == [2, 1] and test.column_names == ["image", "label"]
    with Image.open(test["image"][0]) as read:
        assert read.convert("RGB").getpixel((4, 4))[0] > 240
    two = load_webvision(tmp_path / "w", classes=2)
    assert two["label"][:] == [0, 1, 0, 1] and two["clean_label"][:] == [
        0,
        1,
        -1,
        1,
    ]  # its true class is left out
    (tmp_path / "w" / "info" / "train_cleanlist_google.txt").write_text(
        "google/q0001/other.jpg 0\n"
    )
    with pytest.raises(
        ValueError,
        match=r"train_cleanlist_google.txt does not list the pictures of train_filelist_google.txt",
    ):
        load_webvision(tmp_path / "w", classes=None)
    with pytest.raises(ValueError, match="train: label 3 at position 5, but there are 3 names"):
        write_webvision(tmp_path / "v", (pictures, [*given[:5], 3]), val, ["zero", "one", "two"])
    with pytest.raises(ValueError, match="val: 1 images, but 2 labels"):
        write_webvision(
            tmp_path / "v", (pictures, given), (val[0][:1], [0, 1]), ["zero", "one", "two"]
        )


def test_a_list_of_many_rows(tmp_path):
    (tmp_path / "info").mkdir()
    write(tmp_path, "synsets", [f"n{k:08d} name {k}" for k in range(1000)])
    block = "".join(
        f"google/q{k % 1000 + 1:04d}/-x{k:011d}.jpg {k % 1000}\n" for k in range(100_000)
    )
    (tmp_path / "info" / "train_filelist_google.txt").write_text(block * 2, encoding="utf-8")
    data = load_webvision(tmp_path, classes=None)
    assert len(data) == 200_000 and data[-1]["label"] == 999
