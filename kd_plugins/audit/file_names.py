"""The files of the pictures that a table names by their rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..data.decode import PictureColumn
from ..data.image_view import ImageView
from ..data.labels import column_array

COLUMNS = {"index": "file", "other": "other_file"}  # of rows, and of the files of their pictures


def with_files(
    table: Dataset, dataset: Any, image: str = "image", folder: str | Path | None = None
) -> Dataset:
    """The table with the files of its rows: `file` of `index`, and `other_file` of `other`.

    It stays as it is if it has them already, or if no picture has a path: those inside Parquet
    files may have none. No picture is read.

    Args:
        table: suspects, or another table with row numbers in its column `index`.
        dataset: the data that the rows belong to: a `Dataset`, an `ImageView`, or dict rows.
        image: the column of pictures, as in `ImageView`.
        folder: paths below it are given relative to it; by default paths stay as the data set has
            them.
    """
    for rows, name in COLUMNS.items():
        names = table.column_names
        if rows not in names or name in names:
            continue
        files = file_names(dataset, column_array(table, rows), image, folder)
        if files is not None:
            place = names.index(rows) + 1
            table = table.add_column(name, files)  # type: ignore[arg-type]
            table = table.select_columns([*names[:place], name, *names[place:]])
    return table


def file_names(
    dataset: Any,
    rows: np.ndarray | Sequence[int],
    image: str = "image",
    folder: str | Path | None = None,
) -> pa.Array | None:
    """The path of the picture of each row, as :func:`with_files` gives it; None if none has one."""
    column = dataset.pictures if isinstance(dataset, ImageView) else PictureColumn(dataset, image)
    paths = column.paths(rows)
    if paths.null_count == len(paths):
        return None
    roots = [] if folder is None else [Path(folder), Path(folder).absolute()]
    for root in roots:
        prefix = f"{root.parent if root.is_file() else root}{os.sep}"
        below = pc.starts_with(paths, prefix)
        paths = pc.if_else(below, pc.utf8_slice_codeunits(paths, len(prefix)), paths)
    return paths
