"""Pictures in any form (path, bytes, PIL image, array) -> PIL image in RGB."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps


class NotAPicture(TypeError):
    """A value of the wrong type, or an array of unknown range: the column holds no pictures."""


class BrokenPictures(RuntimeError):
    """More pictures cannot be read than are allowed; the message is one line."""


class PictureColumn:
    """The image column of a data set as it is stored: `{bytes, path}`, paths, arrays ...

    Args:
        dataset: a `Dataset`, or a sequence of dict rows.
        name: the name of the column.
    """

    def __init__(self, dataset: Dataset | Sequence[dict], name: str) -> None:
        self.name = name
        if isinstance(dataset, Dataset):
            if name not in dataset.column_names:
                raise ValueError(f"no column {name!r}; there are {dataset.column_names}")
            # Arrow gives {bytes, path} without decoding, and follows the indices mapping.
            dataset = dataset.with_format("arrow", columns=[name])
        self._rows = dataset

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), 1000):
            yield from self.read(range(start, min(start + 1000, len(self))))

    def read(self, rows: Sequence[int]) -> list[Any]:
        """The values of some rows."""
        if isinstance(self._rows, Dataset):
            return self._rows[rows][self.name].to_pylist()
        return [self._rows[row][self.name] for row in rows]

    def row_name(self, row: int) -> str:
        """The path of a row's picture, or `row 12` if it has none."""
        return self.paths([row])[0].as_py() or f"row {row}"

    def paths(self, rows: np.ndarray | Sequence[int]) -> pa.Array:
        """The paths of the pictures of some rows, null if there is none. No picture is read."""
        if not isinstance(self._rows, Dataset):
            values = [self._rows[row][self.name] for row in rows]
            return pa.array(map(_path_of, values), pa.string())
        column, indices = self._rows.data.column(self.name), self._rows._indices
        wanted = pa.array(rows, pa.int64())
        if indices is not None:
            wanted = indices.column(0).take(wanted)
        if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            column = pc.struct_field(column, "path")
        elif not pa.types.is_string(column.type):
            return pa.nulls(len(rows), pa.string())
        found = column.take(wanted)
        return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found

    def picture(self, row: int, value: Any) -> Image.Image:
        """`decode_picture(value)`; the error for a value of the wrong kind names column and row."""
        try:
            return decode_picture(value)
        except NotAPicture as error:
            raise NotAPicture(f"column {self.name!r} holds {error} (row {row}).") from None


def _path_of(value: Any) -> str | None:
    value = value.get("path") if isinstance(value, dict) else value
    return os.fspath(value) if isinstance(value, str | os.PathLike) else None


def decode_picture(value: Any) -> Image.Image:
    """A picture as a PIL image in RGB.

    Args:
        value: a value of a Hugging Face `Image` column, a path, an encoded picture in bytes, a PIL
            image, or an array or nested list [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of integers
            in [0, 255], floats in [0, 1] or booleans. A picture with an EXIF orientation is turned
            upright, as Hugging Face `datasets` does.

    Raises:
        NotAPicture: the value is none of these.
        Exception: the picture cannot be read. The error is PIL's.
    """
    try:
        return _to_rgb(value)
    except Warning:  # under -W error; a readable picture with odd metadata is no broken picture
        with warnings.catch_warnings():  # not around everything: it makes seen warnings new again
            warnings.simplefilter("ignore")
            return _to_rgb(value)


def _to_rgb(value: Any) -> Image.Image:
    if isinstance(value, dict):  # of a Hugging Face Image column
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, np.ndarray | list):
        return _from_array(np.asarray(value)).convert("RGB")
    if isinstance(value, Image.Image):
        return _convert(value)
    if value is None:
        raise ValueError("no picture in this row")
    if isinstance(value, str | os.PathLike):
        if not stat.S_ISREG(os.stat(value).st_mode):  # to open a named pipe would wait for ever
            raise ValueError(f"{value} is not a regular file")
    elif isinstance(value, bytes):
        value = BytesIO(value)
    else:
        raise NotAPicture(f"{type(value).__name__}: expected picture, path or array")
    with Image.open(value) as picture:
        return _convert(picture)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise NotAPicture(
            f"an array of shape {list(array.shape)}: expected [H, W] or [H, W, 3], channels last"
        )
    kind, low, high = array.dtype.kind, array.min(initial=0), array.max(initial=0)
    if kind not in "biuf" or not 0 <= low <= high <= (1 if kind == "f" else 255):
        raise NotAPicture(
            f"an array of {array.dtype} from {low} to {high}: expected integers in [0, 255] or "
            "floats in [0, 1]; other values would be cut off"
        )
    if kind in "bf":
        array = np.round(array * 255.0)
    array = array.astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _convert(picture: Image.Image) -> Image.Image:
    limit, pixels = Image.MAX_IMAGE_PIXELS, picture.width * picture.height
    if limit is not None and pixels > limit:  # PIL only warns up to twice the limit
        raise Image.DecompressionBombError(
            f"{picture.width} x {picture.height} pixels, more than {limit}"
        )
    picture.load()
    picture = _upright(picture)
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F":
        return _from_array(np.asarray(picture)).convert("RGB")
    if picture.mode.startswith("I"):
        return Image.fromarray(_to_bytes(np.asarray(picture), picture)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # PIL warns if this goes to RGB at once
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        if picture.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return picture
        return ImageOps.exif_transpose(picture)
    except Warning:
        raise
    except Exception:  # PIL's, of damaged metadata; the pixels have been read
        return picture


def _to_bytes(values: np.ndarray, picture: Image.Image) -> np.ndarray:
    """16-bit grey / 256, which PIL would cut off; 32-bit integers may also be in [0, 255]."""
    if picture.mode == "I" and picture.format != "PPM" and 0 <= values.min() <= values.max() <= 255:
        return values.astype(np.uint8)
    return (values >> 8).clip(0, 255).astype(np.uint8)
