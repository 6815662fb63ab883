"""The suspects that are shown, and their pictures."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from ..data.decode import NotAPicture, PictureColumn
from ..data.image_view import ImageView
from ..data.labels import column_array, label_column
from ..losses import validate
from .decisions import refuse_other_rows, refuse_row_numbers


def shown_rows(suspects: Dataset, count: int) -> list[dict[str, Any]]:
    """The first suspects as rows, with the names of their classes under `given` and `better`."""
    validate.count("count", count, "nothing would be shown")
    shown = suspects.select(doubted(suspects)[:count])
    rows: Any = shown.with_format(None).to_list()
    for row in rows:
        for key, name in (("label", "given"), ("proposed", "better")):
            row[name] = " ".join(str(row.get(f"{key}_name", row[key])).split())
    return rows


def doubted(suspects: Dataset) -> np.ndarray:
    """Where another class is proposed than the label; `all_rows` has the other rows too."""
    return np.flatnonzero(column_array(suspects, "label") != column_array(suspects, "proposed"))


def pictures_of(
    suspects: Dataset, dataset: Any, image: str, label: str | None
) -> Callable[[int], Image.Image | None]:
    """A function from a row to its picture in RGB, or to None if it cannot be read."""
    if label is None:
        refuse_row_numbers(column_array(suspects, "index"), len(dataset))
    else:
        refuse_other_rows(suspects, *labels_of(dataset, label))
    column = dataset.pictures if isinstance(dataset, ImageView) else PictureColumn(dataset, image)

    def picture_of(row: int) -> Image.Image | None:
        try:
            return column.picture(row, column.read([row])[0])
        except NotAPicture:
            raise
        except Exception:  # PIL's plugins raise nearly anything for broken files
            return None

    return picture_of


def labels_of(dataset: Any, label: str) -> tuple[np.ndarray, str]:
    """The labels of all rows [N], and where they come from."""
    if isinstance(dataset, ImageView):
        return dataset.labels, "the view"
    return label_column(dataset, label), f"column {label!r}"


def fit(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    scale = side / max(picture.size)
    scale = scale if enlarge else min(scale, 1.0)
    width, height = (max(1, round(scale * n)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def thumbnail(picture: Image.Image | None, side: int) -> str | None:
    """A picture in WebP, which takes a third of JPEG at this size, in base64."""
    if picture is None:
        return None
    thumbnail = fit(picture, side)
    thumbnail.info = {}  # a colour profile may be larger than the picture
    thumbnail.save(buffer := BytesIO(), "webp", quality=75, method=2)
    return base64.b64encode(buffer.getvalue()).decode()
