"""A data set as a torch `Dataset` of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from PIL import Image

from ..losses.validate import fraction, one_of
from .decode import BrokenPictures, NotAPicture, PictureColumn, decode_picture
from .input_config import input_config
from .labels import check_labels, label_column, numbered_classes
from .randomness import generators_kept, seed_generators

MAX_BROKEN, HANDFUL = 0.01, 5  # a share of the rows, and as many of few rows
CHUNK = 8  # pictures in memory at once, since some are large


class ImageView(torch.utils.data.Dataset):
    """Pictures and labels for training: augmentation repeats exactly, broken pictures are replaced.

    Item i is {"pixel_values": transform(picture), "labels": int, "index": int}, and
    "clean_labels": int if there are any. With `views=2` it also has a "second_view",
    transform(picture) drawn once more.

    What `transform` draws from torch, `random` or `numpy.random` is a function of (seed, epoch, i),
    and another one for the second view:
    it does not depend on the number of workers, on the order, or on a resume. The generators are
    left as they were. `set_epoch` also reaches persistent workers: the epoch is in shared memory.

    A picture that cannot be read (missing, empty, truncated, a decompression bomb) is replaced by
    the next readable row: its picture, its labels and its index. `broken()` lists such rows.

    Args:
        dataset: a `datasets.Dataset`, or a sequence of dict rows. Columns are read as they are
            stored, whatever the format.
        transform: PIL image in RGB -> tensor, such as `timm.data.create_transform(...)`. A
            transform that returns uint8 (`normalize=False` there, or `PILToTensor`) is faster:
            `MutualDistillationTrainer` normalises on the device.
        seed: of the augmentation.
        image: column of pictures: Hugging Face `Image`, paths, PIL images or arrays; see
            `decode_picture`.
        label: column of class indices to train on (with label noise: "noisy_label").
        clean: column of true labels, if there is one; -1 there means none of the classes.
        max_broken: the largest share of broken rows, in [0, 1]. By default 1%; of fewer than 500
            rows five, but no more than a tenth.
        class_names: the order of the classes; labels with names are matched to it. By default the
            names of `label`, or numbers.
        views: 1, or 2 for a loss that wants two (`loss.views`), such as DivideMix.

    Raises:
        TypeError: `dataset` is a `DatasetDict` or a stream, or has a transform of its own;
            `transform` is no function; or (when reading) the column holds no pictures.
        ValueError: a label outside the classes, or two columns with different classes.
        BrokenPictures (a RuntimeError, when reading): more broken pictures than `max_broken`.
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
        max_broken: float | None = None,
        class_names: Sequence[str] | None = None,
        views: int = 1,
    ):
        _refuse_other_kinds(dataset)
        if not callable(transform):
            raise TypeError(
                f"transform={transform!r}: expected a function from a PIL picture to a tensor, "
                "such as torchvision.transforms.ToTensor()"
            )
        if max_broken is None:
            max_broken = max(MAX_BROKEN, min(HANDFUL / len(dataset), 0.1))
        fraction("max_broken", max_broken, "a share of the rows (1% is 0.01)")
        self.transform, self.seed, self.max_broken = transform, seed, max_broken
        self.views = one_of("views", views, (1, 2), "an item has pixel_values and a second_view")
        self.name = _name(dataset) if isinstance(dataset, Dataset) else None  # for cards
        self.labels = label_column(dataset, label, class_names)
        feature = dataset.features[label] if isinstance(dataset, Dataset) else None
        if class_names is None and isinstance(feature, ClassLabel):
            class_names = feature.names
        self.class_names = list(class_names or numbered_classes(self.labels))
        self.num_classes = len(self.class_names)
        check_labels(self.labels, self.num_classes, label)
        self.clean_labels = None
        if clean is not None:
            self.clean_labels = label_column(dataset, clean, self.class_names)
            check_labels(self.clean_labels, self.num_classes, clean, -1)
        self.pictures = PictureColumn(dataset, image)
        # In shared memory: workers see the epoch, and this process sees what they found broken.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._broken = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def num_samples(self) -> int:
        """The number of rows that an item's `index` can name."""
        return len(self)

    def set_epoch(self, epoch: int) -> None:
        """Augment as in this epoch, from the next item on and in all workers."""
        self._epoch.fill_(int(epoch))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """`[self[i] for i in indices]`, but faster; torch's DataLoader calls it."""
        if type(self).__getitem__ is not ImageView.__getitem__:  # a subclass has its own items
            return [self[index] for index in indices]
        indices = list(indices)
        chunks = (indices[k : k + CHUNK] for k in range(0, len(indices), CHUNK))
        return [item for chunk in chunks for item in self._items(chunk)]

    def broken(self) -> list[str]:
        """The rows found broken so far, also by workers: the path if there is one, or `row 12`."""
        return [self.pictures.row_name(row) for row in self._broken.nonzero().flatten().tolist()]

    def input_config(self) -> dict[str, Any] | None:
        """What the transform does to a picture, in the terms of a timm `pretrained_cfg`.

        It is found by running the transform on test pictures of the size of the first readable one.
        The global generators and the view stay as they were.

        Returns:
            `input_size` (C, H, W), `mean`, `std` (per channel, absent if the output is uint8),
            `crop_pct`, `crop_mode`, `interpolation` ("bicubic" if it cannot be read off). None if
            the transform is random or these terms cannot describe it.
        """
        with generators_kept():
            for row in range(len(self)):
                try:
                    picture = decode_picture(self.pictures.read([row])[0])
                except Exception:  # PIL's plugins raise nearly anything on broken files
                    continue
                return input_config(self.transform, picture.size)
        return None

    def readable(
        self, index: int, values: Mapping[int, Any] | None = None
    ) -> tuple[int, Image.Image]:
        """The first readable row from `index` on, cyclically, and its picture in RGB.

        Args:
            values: values of the image column that have been read already, by row.
        """
        for step in range(len(self)):
            row = (index + step) % len(self)
            value = values[row] if values and row in values else self.pictures.read([row])[0]
            try:
                return row, self.pictures.picture(row, value)
            except NotAPicture:
                raise
            except Exception as error:  # PIL's plugins raise nearly anything on broken files
                self._mark_broken(row, error)
        raise BrokenPictures(
            f"None of the {len(self)} pictures can be read, as {', '.join(self.broken()[:5])}."
        )

    def _items(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
        indices = [int(index) for index in indices]
        values = dict(zip(indices, self.pictures.read(indices), strict=True))
        items = []
        with generators_kept():
            for index in indices:
                row, picture = self.readable(index, values)
                views = [self._transformed(picture, row, index, k) for k in range(self.views)]
                item = dict(zip(("pixel_values", "second_view"), views, strict=False))
                item |= {"labels": int(self.labels[row]), "index": row}
                if self.clean_labels is not None:
                    item["clean_labels"] = int(self.clean_labels[row])
                items.append(item)
        return items

    def _transformed(self, picture: Image.Image, row: int, index: int, view: int) -> Any:
        seed_generators(self.seed, int(self._epoch), index, view)
        with _named(row, picture):
            return self.transform(picture)

    def _mark_broken(self, row: int, error: Exception) -> None:
        self._broken[row] = 1
        count = int(self._broken.sum())
        if count > self.max_broken * len(self) + 1e-6:  # 5 / N * N may be less than 5
            raise BrokenPictures(
                f"{count} of {len(self)} pictures cannot be read, more than max_broken="
                f"{self.max_broken:.2%}: {', '.join(self.broken()[:5])}{' ...' * (count > 5)}. "
                f"The last one: {error!r}. Copies of other rows would be seen instead. Replace or "
                f"delete these files, or allow a larger share with max_broken, such as 0.1"
            ) from error


def _name(dataset: Dataset) -> str | None:
    """The hub id or the folder's name, as far as it is known, and the split."""
    files = [file["filename"] for file in dataset.cache_files]
    folder = Path(*files[:1]).parts[-5:-4]  # CACHE/OWNER___NAME/CONFIG/VERSION/HASH/FILE
    hub = [part.replace("___", "/", 1) for part in folder if "___" in part]
    name = hub[0] if hub else dataset.info.dataset_name
    return f"{name}, the split {dataset.split}" if name and dataset.split else name


@contextmanager
def _named(row: int, picture: Image.Image) -> Iterator[None]:
    """Name the row in an error of the transform, such as that of a crop larger than the picture."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"ImageView: row {row}, a picture of {picture.width} x {picture.height} pixels"
        )
        raise


def _refuse_other_kinds(dataset: Any) -> None:
    if isinstance(dataset, dict):  # a DatasetDict
        first = next(iter(dataset), "")
        raise TypeError(
            f"ImageView expects one data set, got {type(dataset).__name__} with the splits "
            f"{list(dataset)}: pass one of them, as ImageView(data[{first!r}], ...)"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"ImageView expects a Dataset or a sequence of rows, got {type(dataset).__name__}: it "
            "reads rows by number, which a stream cannot"
        )
    if not len(dataset):
        raise ValueError("The data set has no rows: there is nothing to view.")
    if hasattr(dataset, "iloc"):
        raise TypeError(
            "ImageView expects a Dataset, got a DataFrame: datasets.Dataset.from_pandas(frame), "
            "and .cast_column(NAME, datasets.Image()) for a column of paths"
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise TypeError(
            "The data set has a transform (set_transform), and ImageView reads the stored columns, "
            "without it: pass it as ImageView(data.with_format(None), transform)"
        )
