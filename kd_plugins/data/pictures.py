"""Image data sets from the hub or from a folder, noise by name, and the transform of a network."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import timm
from torch import nn
from torchvision import transforms as T

from .image_view import ImageView
from .labels import column_array, same_classes
from .noise import asymmetric, circular, pair_flip, symmetric

NOISE = ("symmetric", "pair_flip", "asymmetric", "circular", "cifar10", "none")
SMALL = 64  # px: pictures up to this side keep it
LOOKALIKES = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}


class Pictures(NamedTuple):
    """Training and test data, and the names of their columns."""

    train: datasets.Dataset
    test: datasets.Dataset
    image: str
    label: str


def load_pictures(
    name: str,
    image: str | None = None,
    label: str | None = None,
    *,
    classes: int = 0,
    where: str | None = None,
) -> Pictures:
    """The splits ``train`` and ``test`` (or ``validation``) of an image data set.

    Args:
        name: hub id or folder, as ``datasets.load_dataset`` takes it.
        image: column of pictures; see :func:`find_column`.
        label: column of classes.
        classes: if not 0, keep the rows of the first classes only, and no other class names.
        where: if given, train only on the rows where this column is true, and test only on the
            classes that they have.
    """
    data = load_data(name)
    test = next((split for split in ("test", "validation") if split in data), None)
    if "train" not in data or test is None:
        raise ValueError(
            f"{name}: expected the splits train and test (or validation), got {', '.join(data)}: "
            "nothing would tell how well the network does. A folder has them as train/CLASS/ and "
            "test/CLASS/; move some pictures of each class to the second, with labels you trust"
        )
    image = find_column(data["train"], "image", image)
    label = find_column(data["train"], "label", label)
    parts = [data["train"], data[test]]
    names = parts[0].features[label].names
    same_classes(list(parts[1].features[label].names), list(names), "the test data")
    if classes:
        if not 1 < classes <= len(names):
            raise ValueError(f"classes={classes}: expected 2 to {len(names)}, as many as there are")
        kind = datasets.ClassLabel(names=names[:classes])
        parts = [_rows(part, column_array(part, label) < classes) for part in parts]
        parts = [part.cast_column(label, kind) for part in parts]
    if where:
        parts[0] = _rows(parts[0], parts[0][where])
        labels, known = (column_array(part, label) for part in reversed(parts))
        parts[1] = _rows(parts[1], np.isin(labels, known))
    return Pictures(parts[0], parts[1], image, label)


def load_data(name: str) -> datasets.DatasetDict:
    """All splits of a data set: a hub id, a folder for ``datasets.load_dataset``, or a file.

    In a CSV file (with commas, semicolons or tabs), a column of paths becomes pictures, and a
    column ``label`` with names becomes classes. Paths are relative to the file.

    Raises:
        ValueError: it cannot be loaded. The error of ``datasets`` is its cause.
    """
    path = Path(name)
    kind = {".jsonl": "json", ".tsv": "csv"}.get(path.suffix, path.suffix.removeprefix("."))
    if kind in ("csv", "json", "parquet") and not path.exists():  # no hub id: it takes no requests
        raise ValueError(f"data {name!r}: there is no such file{_nearest(path)}")
    try:
        if path.is_file():
            how = {"sep": separator(path)} if kind == "csv" else {}
            splits = datasets.load_dataset(kind, data_files=name, **how)
            return _with_pictures(splits, path.parent) if kind == "csv" else splits
        return datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        # also no network, no such data set
        here = "" if path.exists() else f". Nothing here has this name{_nearest(path)}"
        raise ValueError(
            f"data {name!r}: expected a hub id, a folder (one folder per class, or Parquet), or a "
            f"Parquet or CSV file{here}; datasets says: {error}"
        ) from error


def separator(path: str | Path) -> str:
    """What separates the columns of a CSV file: the most frequent of , ; and tab in its head."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return max(",;\t", key=file.readline().count)


def _nearest(path: Path) -> str:
    """What stands there under a similar name, for an error."""
    folder = path.absolute().parent
    names = [other.name for other in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def _with_pictures(splits: datasets.DatasetDict, folder: Path) -> datasets.DatasetDict:
    """Paths as pictures, names of classes as classes."""
    for split, rows in splits.items():
        for name in rows.column_names:
            values = rows.with_format("arrow")[name].to_pylist() if len(rows) else []
            if not values or not isinstance(values[0], str):
                continue
            if (folder / values[0]).is_file():
                paths = [str(folder / value) for value in values]
                rows = rows.remove_columns(name).add_column(name, paths)
                rows = rows.cast_column(name, datasets.Image())
            elif name == "label":
                rows = rows.class_encode_column(name)
        splits[split] = rows
    return splits


def load_rows(
    data: str | datasets.DatasetDict,
    split: str = "train",
    image: str | None = None,
    label: str | None = None,
    where: str | None = None,
) -> tuple[datasets.Dataset, str, str]:
    """One split of an image data set, and the names of its columns of pictures and of classes.

    Args:
        data: all its splits, or what :func:`load_data` takes.
        split: the name of the split.
        image: column of pictures; see :func:`find_column`.
        label: column of class indices; by default the one with class names, see
            :func:`find_column`.
        where: if given, only the rows where this column is true.
    """
    splits = load_data(data) if isinstance(data, str) else data
    if split not in splits:
        raise ValueError(f"the data have no split {split}, only {', '.join(splits)}")
    rows = splits[split]
    if where is not None and where not in rows.column_names:
        raise ValueError(f"where={where!r}: there is no such column, only {rows.column_names}")
    rows = _rows(rows, rows[where]) if where else rows
    if label is None and getattr(rows.features.get("label"), "dtype", "").startswith("int"):
        label = "label"  # classes without names, or the ClassLabel of this name
    return rows, find_column(rows, "image", image), label or find_column(rows, "label")


def hold_out(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, and a tenth of each class, drawn at random, to evaluate on.

    Of a class with two rows or more, at least one row is on each side; a single row is trained on.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    out = np.arange(len(labels)) % 10 == 0
    _, first, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    out[first[np.add.reduceat(out, first, dtype=int) == 0]] = True
    out[first[sizes == 1]] = False
    return np.sort(by_class[~out]), np.sort(by_class[out])


def find_column(data: datasets.Dataset, kind: str, name: str | None = None) -> str:
    """The column ``name``, checked to be of a kind: ``"image"`` or ``"label"`` (a ClassLabel).

    Without a name it is the only column of that kind, or the one whose name is the kind.
    """
    feature = {"image": datasets.Image, "label": datasets.ClassLabel}[kind]
    fitting = [key for key, value in data.features.items() if isinstance(value, feature)]
    found = name or (fitting[0] if len(fitting) == 1 else kind)
    if found in fitting:
        return found
    if kind == "label" and all(isinstance(v, datasets.Image) for v in data.features.values()):
        raise ValueError(
            "the data have no classes, only pictures: expected a folder per class, at least two, "
            "or a table with a column of classes"
        )
    kinds = {key: getattr(v, "dtype", "a struct") for key, v in data.features.items()}
    others = [f"{key} ({dtype})" for key, dtype in kinds.items() if key not in fitting]
    of_names = ", or dataset.class_encode_column(NAME)" if kind == "label" else ""
    asked = f"no {kind} column was named" if name is None else f"{kind} {name!r}"
    raise ValueError(
        f"{asked}: expected the name of one {feature.__name__} column, here "
        f"{' or '.join(fitting) or 'none'}; {', '.join(others)} can be made one: "
        f"dataset.cast_column(NAME, {feature.__name__}(...)){of_names}"
    )


def noise_by_name(
    data: datasets.Dataset, name: str, rate: float, label: str = "label"
) -> np.ndarray | str:
    """What :func:`noisy_view` takes: a transition matrix [C, C], or a column with given labels.

    Args:
        data: the clean data; ``"circular"`` reads its column ``coarse_label``.
        name: ``"symmetric"``, ``"pair_flip"``, ``"asymmetric"`` (to the next class), ``"circular"``
            (within the superclasses), ``"cifar10"`` (the papers' asymmetric noise on CIFAR-10:
            truck to automobile, bird to airplane, deer to horse, cat and dog to each other),
            ``"none"``, or the name of a column.
        rate: share of wrong labels; for ``"cifar10"`` of those five classes, half as much of all.
        label: column of the clean labels.
    """
    classes = data.features[label].num_classes
    if name == "circular":
        above = dict(zip(data[label], data["coarse_label"], strict=True))
        return circular([above[k] for k in range(classes)], rate)
    if name == "cifar10":
        names = data.features[label].names
        if missing := {*LOOKALIKES, *LOOKALIKES.values()} - {*names}:
            raise ValueError(
                f"noise cifar10: expected classes of CIFAR-10, got no {sorted(missing)}"
            )
        pairs = {names.index(a): names.index(b) for a, b in LOOKALIKES.items()}
        return asymmetric(classes, rate, pairs)
    if name in ("symmetric", "none"):
        return symmetric(classes, rate if name == "symmetric" else 0.0)
    if name in ("pair_flip", "asymmetric"):
        return pair_flip(classes, rate)
    if name not in data.column_names:
        raise ValueError(
            f"noise {name}: expected {', '.join(NOISE)} or one of the columns {data.column_names}"
        )
    return name


def own_side(view: ImageView) -> int:
    """The side of pictures of one size up to 64 px, which is kept; else 0: the network's size.

    Sixteen pictures are looked at, spread over the data.
    """
    rows = np.linspace(0, len(view) - 1, 16).astype(int)
    sides = {min(view.readable(row)[1].size) for row in set(rows.tolist())}
    side = sides.pop()
    return side if side <= SMALL and not sides else 0


def picture_transform(
    model: nn.Module,
    size: int = 0,
    augment: bool = False,
    as_bytes: bool = False,
    flip: bool = True,
) -> Any:
    """PIL picture -> normalised tensor for ``model``, with the augmentation of the papers if asked.

    Up to 64 px: resized to ``size``, padded by an eighth of it (4 of 32 px), cropped and flipped at
    random. Above, and with ``size=0``, timm's transform for the model, to ``size`` or what the
    model expects. With ``flip=False`` none is mirrored, as digits and letters must not be. With
    ``as_bytes`` the tensor is uint8 and not normalised: ``MutualDistillationTrainer`` and
    ``predict_probs`` do that on the device.
    """
    cfg = timm.data.resolve_data_config(model=model)
    if not 0 < size <= SMALL:
        if size:
            cfg["input_size"] = (cfg["input_size"][0], size, size)
        more: dict[str, Any] = {"normalize": not as_bytes, "hflip": 0.5 if flip else 0.0}
        return timm.data.create_transform(**cfg, is_training=augment, **more)
    crops = [T.RandomCrop(size, padding=size // 8)] if augment else []
    crops += [T.RandomHorizontalFlip()] if augment and flip else []
    last = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])]
    last = [T.PILToTensor()] if as_bytes else last
    return T.Compose([T.Resize((size, size)), *crops, *last])


def plain_view(
    rows: datasets.Dataset, model: nn.Module | None, size: int = 0, **arguments: Any
) -> ImageView:
    """A view without augmentation, normalised for ``model`` if there is one.

    Args:
        rows: pictures of one size up to 64 px, or any larger ones.
        model: the network that will see them.
        size: side in px, as :func:`picture_transform` takes it; 0: :func:`own_side`.
        **arguments: ``image``, ``label`` and others of :class:`ImageView`.
    """
    view = ImageView(rows, T.ToTensor(), **arguments)
    if model is not None:
        view.transform = picture_transform(model, size or own_side(view))
    return view


def training_view(
    rows: datasets.Dataset,
    model: nn.Module,
    size: int = 0,
    augment: bool = True,
    flip: bool = True,
    **arguments: Any,
) -> ImageView:
    """A view with the augmentation of the papers, normalised for ``model``.

    Args:
        rows: pictures of one size up to 64 px, or any larger ones.
        model: the network that will see them.
        size: side in px, as :func:`picture_transform` takes it; 0: :func:`own_side`.
        augment: False leaves the augmentation out.
        flip: False leaves the mirroring out, for digits and letters.
        **arguments: ``seed``, ``image``, ``label`` and others of :class:`ImageView`.
    """
    view = plain_view(rows, None, **arguments)
    view.transform = picture_transform(model, size or own_side(view), augment, flip=flip)
    return view


def _rows(data: datasets.Dataset, keep: Any) -> datasets.Dataset:
    return data.select(np.flatnonzero(np.asarray(keep)))
