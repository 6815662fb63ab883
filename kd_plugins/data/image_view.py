"""An HF Dataset as a torch Dataset of pictures: augmentation repeats exactly, broken pictures are replaced."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image

from .input_config import input_config
from .noise import column_array
from .randomness import generators_kept, seed_generators


class ImageView(torch.utils.data.Dataset):
    """Item i is {"pixel_values": transform(picture), "labels": int, "index": int[, "clean_labels": int]}.

    All randomness of `transform` that comes from torch, `random` or `numpy.random` is a pure function of
    (seed, epoch, i): the same for any number of workers, any order, and after a resume. The generators themselves are
    left as they were. `set_epoch` reaches persistent workers too (the epoch lives in shared memory).

    A picture that cannot be read (missing, empty, truncated, no picture, a decompression bomb) is replaced by the next
    readable row: its picture, its labels and its index. `broken()` names them; a share above `max_broken` raises.

    Args:
        dataset: a `datasets.Dataset`, or a sequence of dict rows.
        transform: PIL image in RGB -> tensor; torchvision's or `timm.data.create_transform(...)`. Bytes (`normalize=False`
            there, `PILToTensor` for `ToTensor` and `Normalize`) are cheaper: `MutualDistillationTrainer` normalises them.
        seed: of the augmentation.
        image: column of pictures: HF `Image`, path, PIL image or array [H, W] or [H, W, 3] of uint8. They are converted
            to RGB, whatever their mode; EXIF orientation is ignored, as torchvision's ImageFolder does.
        label: column of class indices to train on (with label noise: `"noisy_label"`).
        clean: column of true labels, if there are any; -1 is allowed there and means none of the classes.
        max_broken: largest share of broken rows in [0, 1] of the whole data set.

    Raises:
        ValueError: a label outside the classes. RuntimeError (when reading): more broken pictures than `max_broken`.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[dict],
        transform: Callable[[Image.Image], Any],
        *,
        seed: int = 0,
        image: str = "image",
        label: str = "label",
        clean: str | None = None,
        max_broken: float = 0.01,
    ):
        if not len(dataset):
            raise ValueError("The data set has no rows: there is nothing to view.")
        if not 0 <= max_broken <= 1:
            raise ValueError(
                f"max_broken={max_broken} is outside [0, 1]: it is a share of the rows (1% is 0.01)."
            )
        self.transform, self.seed, self.image, self.max_broken = transform, seed, image, max_broken
        self.name = (
            dataset.info.dataset_name if isinstance(dataset, Dataset) else None
        )  # for the model card
        self.labels = _column(dataset, label)
        self.clean_labels = None if clean is None else _column(dataset, clean)
        feature = dataset.features[label] if isinstance(dataset, Dataset) else None
        if isinstance(feature, ClassLabel):
            self.class_names = list(feature.names)
        else:
            self.class_names = [str(k) for k in range(self.labels.max() + 1)]
        self.num_classes = len(self.class_names)
        _check_labels(self.labels, label, 0, self.num_classes)
        if self.clean_labels is not None:
            _check_labels(self.clean_labels, str(clean), -1, self.num_classes)
        if isinstance(dataset, Dataset):
            if image not in dataset.column_names:
                raise ValueError(f"No column {image!r}; there are {dataset.column_names}.")
            # Arrow hands out the undecoded {bytes, path}, follows the indices mapping and rewrites nothing.
            dataset = dataset.with_format("arrow", columns=[image])
        self._rows = dataset
        # In shared memory: persistent workers see the epoch, the main process sees what workers found broken.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._broken = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_samples(self) -> int:
        """The number of rows that an item's `index` can name."""
        return len(self)

    def set_epoch(self, epoch: int) -> None:
        """Augment as of this epoch from the next fetched item on, in all workers."""
        self._epoch.fill_(int(epoch))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The items of a batch, as `[self[i] for i in indices]` at less cost; torch's DataLoader asks for them so."""
        if type(self).__getitem__ is not ImageView.__getitem__:  # a subclass has items of its own
            return [self[index] for index in indices]
        indices = list(
            indices
        )  # a few at a time: they are in memory together, and some pictures are large
        return [item for k in range(0, len(indices), 8) for item in self._items(indices[k : k + 8])]

    def broken(self) -> list[str]:
        """The rows found broken so far (by this process and its workers), by path where there is one, else `row 12`."""
        return [self._name(row) for row in self._broken.nonzero().flatten().tolist()]

    def input_config(self) -> dict[str, Any] | None:
        """What the transform does to a picture, in the terms of a timm `pretrained_cfg`.

        It is found by running the transform on test pictures of the size of the first readable one.
        Global generators and the view stay as they were.

        Returns:
            `input_size` (C, H, W), `mean`, `std` (per channel, absent if the output is uint8),
            `crop_pct`, `crop_mode`, `interpolation` ("bicubic" if it cannot be read off). None if
            the transform is random or these terms cannot describe it.
        """
        with generators_kept():
            for row in range(len(self)):
                try:
                    picture = _decode(self._values([row])[0])
                except Exception:  # a broken picture, as in _readable
                    continue
                return input_config(self.transform, picture.size)
        return None

    def _items(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
        indices = [int(index) for index in indices]
        values = dict(zip(indices, self._values(indices), strict=True))
        items = []
        with generators_kept():
            for index in indices:
                row, picture = self._readable(index, values)
                seed_generators(self.seed, int(self._epoch), index)
                item = {
                    "pixel_values": self.transform(picture),
                    "labels": int(self.labels[row]),
                    "index": row,
                }
                if self.clean_labels is not None:
                    item["clean_labels"] = int(self.clean_labels[row])
                items.append(item)
        return items

    def _readable(
        self, index: int, values: Mapping[int, Any] | None = None
    ) -> tuple[int, Image.Image]:
        """The first readable row from `index` on, cyclically, and its picture in RGB; `values` are those read already."""
        for step in range(len(self)):
            row = (index + step) % len(self)
            value = values[row] if values and row in values else self._values([row])[0]
            if not isinstance(value, _KINDS):
                raise TypeError(
                    f"Column {self.image!r} holds {type(value).__name__}: expected picture, path or array."
                )
            try:
                return row, _decode(value)
            except Exception as error:  # PIL's plugins raise nearly anything on broken files
                self._mark(row, error)
        raise RuntimeError(
            f"None of the {len(self)} pictures can be read, as {', '.join(self.broken()[:5])}."
        )

    def _mark(self, row: int, error: Exception) -> None:
        self._broken[row] = 1
        count = int(self._broken.sum())
        if count > self.max_broken * len(self):
            raise RuntimeError(
                f"{count} of {len(self)} pictures cannot be read, more than max_broken={self.max_broken:.2%}: "
                f"{', '.join(self.broken()[:5])}{' ...' if count > 5 else ''}. The last one: {error!r}. Going on would "
                "train on copies of their neighbours."
            ) from error

    def _values(self, rows: list[int]) -> list[Any]:
        if isinstance(self._rows, Dataset):
            return self._rows[rows][self.image].to_pylist()
        return [self._rows[row][self.image] for row in rows]

    def _name(self, row: int) -> str:
        (value,) = self._values([row])
        value = value.get("path") if isinstance(value, dict) else value
        return str(value) if isinstance(value, str | os.PathLike) else f"row {row}"


_KINDS = (Image.Image, np.ndarray, list, dict, bytes, str, os.PathLike, type(None))


def _decode(value: Any) -> Image.Image:
    """A value of the image column -> PIL image in RGB; raises whatever PIL raises where it cannot be read."""
    try:
        return _to_rgb(value)
    except Warning:  # under -W error; a readable picture with odd metadata is no broken picture
        with (
            warnings.catch_warnings()
        ):  # only here: entering it resets the once-only memory of all other warnings
            warnings.simplefilter("ignore")
            return _to_rgb(value)


def _to_rgb(value: Any) -> Image.Image:
    if isinstance(value, dict):  # HF Image
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, np.ndarray | list):
        if isinstance(value, np.ndarray) and value.dtype != np.uint8:
            raise ValueError(f"array of {value.dtype}, expected uint8")
        return Image.fromarray(np.asarray(value, np.uint8)).convert("RGB")
    if isinstance(value, Image.Image):
        return _convert(value)
    if value is None:
        raise ValueError("no picture in this row")
    with Image.open(BytesIO(value) if isinstance(value, bytes) else value) as picture:
        return _convert(picture)


def _convert(picture: Image.Image) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if (
        limit is not None and picture.width * picture.height > limit
    ):  # PIL itself only warns, up to twice the limit
        raise Image.DecompressionBombError(
            f"{picture.width} x {picture.height} pixels, more than {limit}"
        )
    picture.load()
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255 instead of scaling
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB is a warning
    return picture.convert("RGB")


def _column(dataset: Dataset | Sequence[dict], name: str) -> np.ndarray:
    """Class indices of column `name` [N]."""
    if isinstance(dataset, Dataset):
        return column_array(dataset, name)
    values = np.array([row[name] for row in dataset])
    if values.dtype.kind not in "iu":
        raise ValueError(
            f"Column {name!r} holds {values.dtype} (first value {values[0]!r}), expected class indices."
        )
    return values.astype(np.int64)


def _check_labels(labels: np.ndarray, name: str, low: int, num_classes: int) -> None:
    if labels.min() < low or labels.max() >= num_classes:
        row = int(((labels < low) | (labels >= num_classes)).argmax())
        raise ValueError(
            f"Label {labels[row]} in row {row} of column {name!r}: labels go from {low} to {num_classes - 1}."
        )
