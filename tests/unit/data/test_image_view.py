"""ImageView: repeatable randomness, all kinds of pictures, broken ones, workers."""

import copy
import hashlib
import io
import os
import pickle
import random
import warnings

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as HFImage
from PIL import Image
from torch.utils.data import DataLoader, Subset

from kd_plugins.data import ImageView, noisy_view


def to_tensor(picture):
    return torch.from_numpy(np.array(picture))


def jitter(picture):
    """Draws from all three generators, as transforms of torchvision and timm do."""
    noise = (
        torch.rand(4),
        torch.tensor([random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]),
    )
    return torch.cat([to_tensor(picture).float().mean((0, 1)), *noise])


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_picture(seed, size=16):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def pictures(n, replace=None, **columns):
    """A data set of n distinct pictures of 3 classes; `replace` has other bytes for some rows."""
    values = [
        {"bytes": (replace or {}).get(i, encoded(noise_picture(i))), "path": None} for i in range(n)
    ]
    features = Features(image=HFImage(), label=ClassLabel(names=["a", "b", "c"]))
    data = Dataset.from_dict(
        {"image": values, "label": [i % 3 for i in range(n)]}, features=features
    )
    for name, column in columns.items():
        data = data.add_column(name, np.array(column))
    return data


def test_items():
    view = ImageView(pictures(4, true=[2, 1, -1, 0]), to_tensor, clean="true")
    for i in range(4):
        item = view[i]
        assert {k: v for k, v in item.items() if k != "pixel_values"} == {
            "labels": i % 3,
            "index": i,
            "clean_labels": [2, 1, -1, 0][i],
        }
        np.testing.assert_array_equal(item["pixel_values"], np.asarray(noise_picture(i)))
    assert view.num_classes == 3 and view.class_names == ["a", "b", "c"] and len(view) == 4
    assert view.labels.tolist() == [0, 1, 2, 0] and view.clean_labels.tolist() == [2, 1, -1, 0]
    assert len(list(view)) == 4 and ImageView(pictures(1), to_tensor).clean_labels is None
    with pytest.raises(IndexError, match="row 4 of 4"):
        view[4]


def test_indices_mapping_and_noise_are_followed():
    data = noisy_view(pictures(9), (np.arange(9) + 1) % 3).shuffle(seed=0).select([5, 0, 7])
    view = ImageView(data, to_tensor, label="noisy_label", clean="label")
    for i, row in enumerate(data):
        np.testing.assert_array_equal(view[i]["pixel_values"], np.asarray(row["image"]))
        assert (view[i]["labels"], view[i]["clean_labels"]) == (row["noisy_label"], row["label"])


def test_rows_may_be_paths_pil_images_arrays_or_dicts(tmp_path):
    picture, path = noise_picture(0), tmp_path / "-x.png"
    picture.save(path)
    data = encoded(picture)
    rows = [path, str(path), picture, np.asarray(picture), np.asarray(picture).tolist(), data]
    rows += [{"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}]
    view = ImageView(
        [{"image": row, "label": i % 2} for i, row in enumerate(rows)], to_tensor, max_broken=0
    )
    for i in range(len(rows)):
        np.testing.assert_array_equal(view[i]["pixel_values"], np.asarray(picture), err_msg=str(i))
    assert view.num_classes == 2 and view.class_names == ["0", "1"]
    table = Dataset.from_dict({"image": [str(path)], "label": [0]})
    np.testing.assert_array_equal(
        ImageView(table, to_tensor)[0]["pixel_values"], np.asarray(picture)
    )
    with pytest.raises(TypeError, match="column 'image' holds int"):
        ImageView([{"image": 3, "label": 0}], to_tensor)[0]


def test_every_mode_becomes_rgb():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    palette = grey.convert("P")
    values = [
        encoded(grey),
        encoded(deep),
        encoded(palette),
        encoded(palette, transparency=bytes(range(256))),
    ]
    values += [encoded(grey.convert("LA")), encoded(grey.convert("RGBA"))]
    view = ImageView(pictures(6, dict(enumerate(values))), to_tensor, max_broken=0)
    for i in range(6):
        np.testing.assert_array_equal(view[i]["pixel_values"], expected, err_msg=str(i))
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = ImageView(pictures(1, {0: encoded(cmyk, "JPEG")}), to_tensor, max_broken=0)[0][
        "pixel_values"
    ].float()
    assert red.shape == (16, 16, 3) and red[..., 0].min() > 240 and red[..., 1:].max() < 15


def test_randomness_is_a_function_of_seed_epoch_and_index():
    view = ImageView(pictures(6), jitter, seed=1)
    first = [view[i]["pixel_values"] for i in range(6)]
    for i in (3, 0, 5):  # any order, and whatever the generators did before
        torch.rand(3), random.random(), np.random.rand()
        assert torch.equal(view[i]["pixel_values"], first[i])
    draws = torch.stack(first)[:, 3:]
    assert all(len(column.unique()) == 6 for column in draws.T)
    view.set_epoch(1)
    assert (view[2]["pixel_values"][3:] != first[2][3:]).all()
    view.set_epoch(0)
    assert torch.equal(view[2]["pixel_values"], first[2])
    assert (ImageView(pictures(6), jitter, seed=2)[2]["pixel_values"][3:] != first[2][3:]).all()
    again = pickle.loads(pickle.dumps(view))
    assert torch.equal(again[2]["pixel_values"], first[2]) and torch.equal(
        copy.deepcopy(view)[2]["pixel_values"], first[2]
    )


def test_a_second_view_is_another_draw_that_repeats():
    """The first view stays as it is without a second one."""
    data, places = pictures(6), [3, 0, 5]
    one, two = ImageView(data, jitter, seed=3), ImageView(data, jitter, seed=3, views=2)
    for epoch in (0, 1):
        one.set_epoch(epoch), two.set_epoch(epoch)
        batch = two.__getitems__(places)
        for place, item in zip(places, batch, strict=True):
            assert torch.equal(item["pixel_values"], one[place]["pixel_values"])
            assert not torch.equal(item["second_view"], item["pixel_values"])
            assert torch.equal(item["second_view"], two[place]["second_view"])
    assert "second_view" not in one[0] and two.views == 2
    loader = DataLoader(two, 3, num_workers=1)
    expected = torch.stack([two[i]["second_view"] for i in range(3)])
    assert torch.equal(next(iter(loader))["second_view"], expected)
    with pytest.raises(ValueError, match=r"views=3: expected one of \(1, 2\)"):
        ImageView(data, jitter, views=3)


def fail(picture):
    jitter(picture)
    raise KeyError("transform")


def draw():
    return torch.rand(1).item(), random.gauss(0, 1), np.random.randn()


def seeded():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    draw()  # leaves half a pair of Gaussians in numpy and random


def test_global_generators_are_left_alone():
    seeded()
    expected = draw()
    for transform in (jitter, fail):
        seeded()
        try:
            ImageView(pictures(1), transform)[0]
        except KeyError:  # an error of the transform is not a broken picture
            assert transform is fail
        assert draw() == expected


def seeded_by_hand(seed, epoch, index):
    number = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    number = int.from_bytes(number, "little") // 2
    torch.manual_seed(number), random.seed(number), np.random.seed(number % 2**32)


def test_the_numbers_drawn_stay_the_same_from_version_to_version():
    view = ImageView(pictures(3), jitter, seed=7)
    view.set_epoch(2)
    seeded_by_hand(7, 2, 1)
    assert torch.equal(view[1]["pixel_values"], jitter(noise_picture(1)))


def test_a_batch_is_its_rows():
    def same(one, other):
        assert one.keys() == other.keys() and torch.equal(
            one["pixel_values"], other["pixel_values"]
        )
        assert all(one[key] == other[key] for key in one if key != "pixel_values")

    broken = {4: b"", 7: b"x", 8: b"", 19: b""}
    data = pictures(20, broken, true=[i % 3 for i in range(20)])
    rows = [
        {"image": noise_picture(i) if i % 2 else encoded(noise_picture(i)), "label": 0, "true": 0}
        for i in range(20)
    ]
    order = [
        7,
        0,
        8,
        8,
        19,
        3,
        4,
        12,
        11,
        1,
        19,
        7,
        5,
        18,
        2,
        0,
        9,
        10,
    ]  # repeats, and more rows than one chunk
    for source in (data, data.shuffle(seed=1), data.select([*range(5), *range(5, 20)]), rows):
        one, other = (
            ImageView(source, jitter, seed=3, clean="true", max_broken=0.5) for _ in range(2)
        )
        for view in (one, other):
            view.set_epoch(1)
        for i, item in zip(order, one.__getitems__(order), strict=True):
            same(item, other[i])
        assert one.broken() == other.broken() and (source is rows or one.broken())
        same(one.__getitems__(np.array([3]))[0], other[3])
        assert one.__getitems__([]) == []
    with pytest.raises(IndexError, match="row 20 of 20"):
        one.__getitems__([0, 20])
    with pytest.raises(IndexError, match="row -1 of 20"):
        one.__getitems__([-1])


def test_a_batch_leaves_the_generators_alone():
    seeded()
    expected = draw()
    for transform in (jitter, fail):
        seeded()
        batches = iter(DataLoader(ImageView(pictures(20), transform), 20, sampler=range(20)))
        seeded()  # the loader itself draws a number
        try:
            next(batches)
        except KeyError:
            assert transform is fail
        assert draw() == expected
    seeded()
    with pytest.raises(RuntimeError, match="None of the 3"):
        ImageView(pictures(3, dict.fromkeys(range(3), b"")), jitter, max_broken=1).__getitems__(
            [0, 1]
        )
    assert draw() == expected


def test_rows_that_draw_do_not_draw_the_same_in_every_batch():
    class Rows(list):
        def __getitem__(self, row):
            drawn.append(np.random.rand())
            return super().__getitem__(row)

    drawn = []
    view = ImageView(Rows({"image": noise_picture(i), "label": 0} for i in range(20)), jitter)
    view.__getitems__(range(20)), view.__getitems__(range(20))
    assert len(set(drawn)) == 40


def test_a_subclass_or_a_part_keeps_its_own_items():
    class Doubled(ImageView):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"twice": 2 * index}

    (batch,) = DataLoader(Doubled(pictures(4), jitter), 4)
    assert batch["twice"].tolist() == [0, 2, 4, 6]
    (batch,) = DataLoader(Subset(ImageView(pictures(4), jitter), [3, 1]), 4)
    assert batch["index"].tolist() == [3, 1]


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_give_the_same_and_see_the_epoch(context, workers):
    view = ImageView(pictures(9, {4: b""}), jitter, seed=3, max_broken=0.2)
    kept = {"persistent_workers": True, "multiprocessing_context": context}
    loader = DataLoader(view, batch_size=2, num_workers=workers, **kept)
    for epoch in (0, 1):
        view.set_epoch(epoch)
        batches = list(loader)
        assert view.broken() == ["row 4"]  # found by a worker
        view.set_epoch(epoch)
        for one, other in zip(batches, DataLoader(view, batch_size=2), strict=True):
            assert all(
                torch.equal(one[key], other[key]) for key in ("pixel_values", "labels", "index")
            )


def test_broken_pictures_of_each_kind_are_replaced_by_the_next_row(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # to open it would wait for ever
    whole = encoded(noise_picture(0), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = bytearray(encoded(noise_picture(0)))
    png[40:60] = bytes(20)
    bombs = [
        encoded(noise_picture(0, size)) for size in (33, 60)
    ]  # PIL warns at the first and refuses the second
    kinds = [
        b"",
        b"<html>404</html>",
        whole[:200],
        bytes(png),
        *bombs,
        None,
        {"bytes": None, "path": None},
    ]
    names = ("gone.jpg", "empty.jpg", "folder.jpg", "cut.jpg", "pipe.jpg")
    kinds += [str(tmp_path / name) for name in names]
    rows = [{"image": kind, "label": 0} for kind in kinds]
    rows += [{"image": noise_picture(1), "label": 1}]
    view = ImageView(rows, to_tensor, max_broken=0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PIL's warnings (the first bomb) are handled too
        for i in range(len(rows)):
            item = view[i]
            assert (item["index"], item["labels"]) == (len(kinds), 1)
            np.testing.assert_array_equal(item["pixel_values"], np.asarray(noise_picture(1)))
    assert view.broken() == [*(f"row {i}" for i in range(8)), *kinds[8:]]


def test_odd_metadata_is_not_broken():
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00\x1a\x01"
    exif += b"\x05\x00\x01\x00\x00\x00\xff\xff\x00\x00"
    data = encoded(noise_picture(0), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), Image.open(io.BytesIO(data)) as picture:
            picture.getexif().get(0x011A)
            picture.load()
        view = ImageView(pictures(1, {0: data}), to_tensor, max_broken=0)
        assert view[0]["pixel_values"].shape == (16, 16, 3) and view.broken() == []


@pytest.mark.parametrize("orientation", [1, 2, 6, 8, 99])
def test_pictures_are_turned_upright_as_hugging_face_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = noise_picture(0).resize((16, 8))
    data = pictures(1, {0: encoded(picture, "JPEG", exif=exif)})
    theirs = np.asarray(data[0]["image"])
    view = ImageView(data, to_tensor)
    np.testing.assert_array_equal(view[0]["pixel_values"], theirs)
    assert theirs.shape == ((16, 8, 3) if orientation in (6, 8) else (8, 16, 3))


def test_replacement_wraps_around_and_uses_the_asked_index_for_its_randomness():
    view = ImageView(pictures(4, {3: b"", 1: b"x"}), jitter, max_broken=0.5)
    assert [view[i]["index"] for i in range(4)] == [0, 2, 2, 0]
    assert (view[0]["pixel_values"][3:] != view[3]["pixel_values"][3:]).all()


def test_too_many_broken_pictures():
    view = ImageView(pictures(10, {2: b"", 5: b"", 7: b""}), to_tensor, max_broken=0.2)
    assert (
        view[2]["index"] == 3 and view[2]["index"] == 3 and view[5]["index"] == 6
    )  # counted once each
    text = "3 of 10 pictures cannot be read, more than max_broken=20.00%: "
    text += r"row 2, row 5, row 7\. The last one: Unid"
    with pytest.raises(RuntimeError, match=text):
        view[7]
    everything = ImageView(pictures(3, dict.fromkeys(range(3), b"")), to_tensor, max_broken=1)
    with pytest.raises(
        RuntimeError, match="None of the 3 pictures can be read, as row 0, row 1, row 2"
    ):
        everything[1]


@pytest.mark.parametrize(("size", "most"), [(9, 0), (10, 1), (39, 3), (183, 5), (600, 6)])
def test_a_handful_of_few_pictures_may_be_broken(size, most):
    """By default 1%; five if this is less, but no more than a tenth."""
    rows = [{"image": b"", "label": 0}] * (most + 1) + [{"image": np.zeros((4, 4)), "label": 0}]
    view = ImageView(rows + rows[-1:] * (size - len(rows)), to_tensor)
    for row in range(1, most + 1):
        assert view[row]["index"] == row if most < row else view[row]["index"] > row
    with pytest.raises(RuntimeError, match=f"{most + 1} of {size} .*a larger share"):
        view[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ImageView([], to_tensor), "no rows"),
        (
            lambda: ImageView(pictures(2), to_tensor, max_broken=2),
            r"max_broken=2: expected a number in \[0, 1\]",
        ),
        (lambda: ImageView(pictures(2), to_tensor, image="img"), "no column 'img'; there are"),
        (lambda: ImageView(pictures(2), to_tensor, label="fine"), "no column 'fine'; there are"),
        (
            lambda: ImageView([{"image": None, "label": -1}], to_tensor),
            "Label -1 in row 0 of column 'label'",
        ),
        (lambda: ImageView([{"image": None, "label": "cat"}], to_tensor), "expected class indices"),
        (
            lambda: ImageView(pictures(3, true=[0, 3, 0]), to_tensor, clean="true"),
            "Label 3 in row 1 of column 'true'",
        ),
    ],
)
def test_errors_at_construction(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_label_outside_the_class_names():
    features = Features(image=Value("string"), label=ClassLabel(names=["a", "b"]))
    data = Dataset.from_dict({"image": ["x", "y", "z"], "label": [0, -1, 1]}, features=features)
    with pytest.raises(
        ValueError, match="Label -1 in row 1 of column 'label': labels go from 0 to 1"
    ):
        ImageView(data, to_tensor)


def test_real_transforms_repeat_too():
    timm_data = pytest.importorskip("timm.data")
    transform = timm_data.create_transform(
        16, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5, color_jitter=0.4
    )
    one, other = (ImageView(pictures(12), transform, seed=5) for _ in range(2))
    order = [7, 2, 11, 0]
    for i, item in zip(order, [other[i] for i in order], strict=True):
        assert torch.equal(one[i]["pixel_values"], item["pixel_values"])
    one.set_epoch(1)
    assert not all(torch.equal(one[i]["pixel_values"], other[i]["pixel_values"]) for i in order)


GREY = np.linspace(0, 1, 8 * 8).reshape(8, 8)
COLOUR = np.stack([GREY, GREY**2, 1 - GREY], axis=-1)


@pytest.mark.parametrize(
    ("values", "kind"),
    [  # TIFF, in which an Image column keeps floats, has one channel
        *((GREY, kind) for kind in ("list", "array", "column", "Image")),
        *((COLOUR, kind) for kind in ("list", "array", "column")),
    ],
)
def test_floats_from_0_to_1_are_scaled(values, kind):
    values = values.astype(np.float32)
    rows = [{"image": values.tolist() if kind == "list" else values, "label": 0}]
    if kind == "column":
        array = (Array2D if values.ndim == 2 else Array3D)(values.shape, "float32")
        features = Features(image=array, label=Value("int64"))
        rows = Dataset.from_dict({"image": [values], "label": [0]}, features=features)
    elif kind == "Image":
        features = Features(image=HFImage(), label=Value("int64"))
        rows = Dataset.from_dict({"image": [values], "label": [0]}, features=features)
    expected = np.round(values * 255) if values.ndim == 3 else np.round(values * 255)[..., None]
    got = ImageView(rows, to_tensor, max_broken=0)[0]["pixel_values"].numpy()
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (8, 8, 3)))


def test_integers_and_booleans():
    values = np.arange(64).reshape(8, 8) * 4
    features = Features(image=HFImage(), label=Value("int64"))
    table = Dataset.from_dict({"image": [values.astype(np.int32)], "label": [0]}, features=features)
    rows = [{"image": v, "label": 0} for v in (values, values.tolist(), values[..., None])]
    for view in (ImageView(table, to_tensor), ImageView(rows, to_tensor)):
        for item in view:
            np.testing.assert_array_equal(item["pixel_values"][..., 0], values)
    mask = ImageView([{"image": values > 99, "label": 0}], to_tensor)[0]["pixel_values"]
    np.testing.assert_array_equal(mask[..., 2], 255 * (values > 99))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            GREY * 255,
            r"array of float64 from 0.0 to 255.0: expected integers in \[0, 255\] or floats",
        ),
        ((GREY - 0.5).tolist(), "array of float64 from -0.5 to 0.5"),
        (np.where(GREY > 0, GREY, np.nan), "array of float64 from nan"),
        (np.arange(300).reshape(15, 20), "array of int64 from 0 to 299"),
        (np.zeros((3, 8, 8), np.uint8), r"array of shape \[3, 8, 8\]: .*channels last"),
        (np.zeros(8, np.uint8), r"array of shape \[8\]"),
        (Image.fromarray(GREY.astype(np.float32) * 2), "array of float32 from 0.0 to 2.0"),
    ],
)
def test_values_that_would_be_cut_off_are_refused_at_once(value, text):
    rows = [{"image": noise_picture(i, 8), "label": 0} for i in range(3)]
    view = ImageView([*rows, {"image": value, "label": 0}], to_tensor, max_broken=1)
    with pytest.raises(TypeError, match=rf"column 'image' holds an {text}.*\(row 3\)"):
        view[3]
    assert view.broken() == []


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "bool"])
def test_labels_of_every_integer_type(dtype):
    labels = np.array([1, 0, 1]).astype(dtype)
    features = Features(image=HFImage(), label=Value(dtype))
    data = {"image": [noise_picture(i) for i in range(3)], "label": labels}
    rows = [{"image": noise_picture(i), "label": labels[i]} for i in range(3)]
    for source in (Dataset.from_dict(data, features=features), rows):
        view = ImageView(source, to_tensor, clean="label")
        assert view.labels.dtype == np.int64 and view.labels.tolist() == [1, 0, 1]
        assert type(view[0]["labels"]) is int and view[0]["clean_labels"] == 1
        assert view.num_classes == 2


def test_formats_and_transforms_of_the_data_set():
    data = pictures(4)
    for kind in ("torch", "numpy", "pandas"):
        item = ImageView(data.with_format(kind, columns=["label"]), to_tensor)[1]
        np.testing.assert_array_equal(item["pixel_values"], np.asarray(noise_picture(1)))
    own = data.with_transform(lambda batch: {"pixel_values": batch["image"]})
    with pytest.raises(TypeError, match=r"set_transform.*with_format\(None\)"):
        ImageView(own, to_tensor)
    assert ImageView(own.with_format(None), to_tensor)[1]["labels"] == 1
    assert noisy_view(own, [0, 0, 1, 1]).format["type"] == "custom"


def test_what_is_no_data_set_is_refused():
    data = pictures(2)
    with pytest.raises(TypeError, match=r"splits \['test', 'val'\].*ImageView\(data\['test'\]"):
        ImageView(DatasetDict(test=data, val=data), to_tensor)
    with pytest.raises(TypeError, match="got IterableDataset: it reads rows by number"):
        ImageView(data.to_iterable_dataset(), to_tensor)
    with pytest.raises(ValueError, match=r"row 1 has no 'label'; it has \['image'\]"):
        ImageView([{"image": b"", "label": 0}, {"image": b""}], to_tensor)


def test_what_is_no_transform_is_refused():
    with pytest.raises(TypeError, match="transform=None: expected a function from a PIL picture"):
        ImageView(pictures(3), None)


def test_an_error_of_the_transform_names_the_row():
    def crop(picture):
        if picture.width < 16:
            raise ValueError("the crop is larger than the picture")
        return to_tensor(picture)

    rows = [{"image": noise_picture(i, 12 if i == 2 else 16), "label": 0} for i in range(3)]
    loader = DataLoader(ImageView(rows, crop), 3)
    with pytest.raises(ValueError, match="larger than the picture") as caught:
        next(iter(loader))
    assert caught.value.__notes__ == ["ImageView: row 2, a picture of 12 x 12 pixels"]


def test_its_name_is_the_source_and_the_split(tmp_path, monkeypatch):
    """Model cards then say which data it was."""
    folder = tmp_path / "birds"
    for name in ("crow", "finch"):
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "train" / name / "0.png")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.load_dataset(str(folder), split="train")
    assert ImageView(rows, to_tensor).name == "birds, the split train"
    cached = [{"filename": str(tmp_path / "me___birds/default/0.0.0/a1/birds-train.arrow")}]
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "cache_files", cached)
        assert ImageView(rows, to_tensor).name == "me/birds, the split train"
    assert ImageView([{"image": rows[0]["image"], "label": 0}], to_tensor).name is None
