"""Image data sets from the hub or from a folder, noise by name, and the transform of a network."""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import numpy as np
import timm
from torch import nn
from torchvision import transforms as T

from .labels import column_array, same_classes
from .noise import circular, pair_flip, symmetric

NOISE = ("symmetric", "pair_flip", "asymmetric", "circular", "none")


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
    data = datasets.load_dataset(name)
    test = next((split for split in ("test", "validation") if split in data), None)
    if "train" not in data or test is None:
        raise ValueError(
            f"{name}: expected the splits train and test (or validation), got {', '.join(data)}"
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


def find_column(data: datasets.Dataset, kind: str, name: str | None = None) -> str:
    """The column ``name``, checked to be of a kind: ``"image"`` or ``"label"`` (a ClassLabel).

    Without a name it is the only column of that kind, or else the one that is called as the kind.
    """
    feature = {"image": datasets.Image, "label": datasets.ClassLabel}[kind]
    fitting = [key for key, value in data.features.items() if isinstance(value, feature)]
    found = name or (fitting[0] if len(fitting) == 1 else kind)
    if found in fitting:
        return found
    others = [f"{k} ({v.dtype})" for k, v in data.features.items() if k not in fitting]
    raise ValueError(
        f"{kind} {name}: expected the name of one {feature.__name__} column, here "
        f"{' or '.join(fitting) or 'none'}; {', '.join(others)} can be made one: "
        f"dataset.cast_column(NAME, {feature.__name__}(...))"
    )


def noise_by_name(
    data: datasets.Dataset, name: str, rate: float, label: str = "label"
) -> np.ndarray | str:
    """What :func:`noisy_view` takes: a transition matrix [C, C], or a column with given labels.

    Args:
        data: the clean data; ``"circular"`` reads its column ``coarse_label``.
        name: ``"symmetric"``, ``"pair_flip"``, ``"asymmetric"`` (to the next class), ``"circular"``
            (within the superclasses), ``"none"``, or the name of a column.
        rate: share of wrong labels.
        label: column of the clean labels.
    """
    classes = data.features[label].num_classes
    if name == "circular":
        above = dict(zip(data[label], data["coarse_label"], strict=True))
        return circular([above[k] for k in range(classes)], rate)
    if name in ("symmetric", "none"):
        return symmetric(classes, rate if name == "symmetric" else 0.0)
    if name in ("pair_flip", "asymmetric"):
        return pair_flip(classes, rate)
    if name not in data.column_names:
        raise ValueError(
            f"noise {name}: expected {', '.join(NOISE)} or one of the columns {data.column_names}"
        )
    return name


def picture_transform(model: nn.Module, size: int, augment: bool = False) -> Any:
    """PIL picture -> normalised tensor for ``model``, with the augmentation of the papers if asked.

    Up to 64 px: resized to ``size``, padded by 4 px, cropped and flipped at random. Larger pictures
    go through timm's transform for the model.
    """
    cfg = timm.data.resolve_data_config(model=model)
    if size > 64:
        return timm.data.create_transform(**cfg, is_training=augment)
    crops = [T.RandomCrop(size, padding=4), T.RandomHorizontalFlip()] if augment else []
    last = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])]
    return T.Compose([T.Resize((size, size)), *crops, *last])


def _rows(data: datasets.Dataset, keep: Any) -> datasets.Dataset:
    return data.select(np.flatnonzero(np.asarray(keep)))
