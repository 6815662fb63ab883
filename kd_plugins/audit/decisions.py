"""Decisions on suspects: read, checked against the data, and what follows from them.

Decisions are a table with a row for each decided suspect, as :func:`html_page`'s page saves it:

| column | |
|---|---|
| index | the row in the data set |
| label | its given label |
| proposed | the label that was proposed |
| decision | wrong: the proposed label is right; fine: the given one is; other: a third one; skip |
| new_label | for other: the right label, or nothing if the picture belongs to no class |
| data | rows of the data set and a hash of their labels: `50000-1f8a03c77d` |
| file | the file of the picture, whose name must be that of the row |

The last three columns may be missing.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, Value

from ..data.decode import PictureColumn
from ..data.labels import column_array
from ..data.pictures import separator

OPTIONAL = ("new_label", "data", "file")
DECISIONS = ("wrong", "fine", "other", "skip", "")
NO_CLASS = -1


class Changes(NamedTuple):
    """The rows whose label is wrong, in order.

    Args:
        rows: their numbers [M].
        given: the labels that they have [M].
        new: the right labels [M], or -1 if the picture belongs to no class.
    """

    rows: np.ndarray
    given: np.ndarray
    new: np.ndarray


def read_decisions(path: str | Path) -> Dataset:
    """Read the CSV file of the page, also after a spreadsheet or pandas has saved it again.

    Other columns than those of decisions are left out.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter=separator(path)))
    columns: dict[str, list[Any]] = {}
    for name in ("index", "label", "proposed", "decision", *OPTIONAL):
        if rows and name not in rows[0] and name not in OPTIONAL:
            raise ValueError(
                f"{path} has no column {name!r}, only {list(rows[0])}: expected the file that the "
                "page of suspects saves"
            )
        columns[name] = [row.get(name) or "" for row in rows]
    for name in ("index", "label", "proposed", "new_label"):
        columns[name] = [_integer(value, name, path) for value in columns[name]]
    texts = ("decision", "data", "file")
    kinds = {name: Value("string" if name in texts else "int64") for name in columns}
    return Dataset.from_dict(columns, features=Features(kinds))


def without_decided(suspects: Dataset, dataset: Dataset) -> tuple[Dataset, int]:
    """The suspects that nobody has decided on, and how many others there were.

    Only data that `apply_decisions` returned know what was decided. A skipped row is undecided.
    """
    if not {"decision", "original_row"} <= set(dataset.column_names):
        return suspects, 0
    final = [text in ("wrong", "fine", "other") for text in dataset["decision"][:]]
    kept = np.flatnonzero(~np.array(final, bool)[column_array(suspects, "index")])
    return suspects.select(kept), len(suspects) - len(kept)


def data_signature(size: int, labels: np.ndarray | None) -> str:
    """The number of rows, and a hash of their labels: ``"50000-1f8a03c77d"``."""
    if labels is None:
        return str(size)
    content = np.ascontiguousarray(labels, np.dtype("<i8")).tobytes()
    return f"{size}-{blake2b(content, digest_size=5).hexdigest()}"


def changes_of(suspects: Dataset, dataset: Dataset, label: str) -> Changes:
    """The rows whose label is wrong by the suspects, or by the decisions on them.

    Raises:
        ValueError: they belong to other data, or contradict each other.
    """
    labels = column_array(dataset, label)
    refuse_other_data(suspects, labels)
    refuse_other_rows(suspects, labels, f"column {label!r}")
    _refuse_other_files(suspects, dataset)
    index, given, new = _rows_of(suspects)
    wrong = new != given
    if "decision" in suspects.column_names:
        decisions = [decision or "" for decision in suspects["decision"][:]]
        _refuse_contradictions(index, decisions)
        other = np.array([decision == "other" for decision in decisions], bool)
        wrong = other | np.array([decision == "wrong" for decision in decisions], bool)
        if other.any():
            new = np.where(other, _chosen(suspects, index[other][0]), new)
    _, first = np.unique(index[wrong], return_index=True)
    return Changes(*(values[wrong][first] for values in (index, given, new)))


def refuse_other_data(suspects: Dataset, labels: np.ndarray) -> None:
    """Raise ValueError if the column `data` of decisions names another data set."""
    own = data_signature(len(labels), labels)
    stored = set(map(str, suspects["data"][:])) if "data" in suspects.column_names else set()
    for signature in stored - {"", "None", own, str(len(labels))}:
        size = signature.partition("-")[0]
        differs = f"{size} rows, these have {len(labels)}"
        if size == str(len(labels)):
            differs = f"{size} rows with other labels than these"
        raise ValueError(
            f"the decisions were made for data of {differs}: they would change the wrong rows"
        )


def refuse_other_rows(suspects: Dataset, labels: np.ndarray, source: str) -> None:
    """Raise ValueError if the suspects belong to other rows, or propose two labels for one row.

    Args:
        suspects: the result of `find_suspects`, or the decisions from the page.
        labels: the labels of the data set [N].
        source: where these labels come from, for the error message.
    """
    index, given, proposed = _rows_of(suspects)
    refuse_row_numbers(index, len(labels))
    if (other := given != labels[index]).any():
        row, expected = index[other][0], given[other][0]
        raise ValueError(
            f"row {row} has label {labels[row]} in {source}, and {expected} among the suspects: "
            "they belong to other data, another order or another column"
        )
    order = np.argsort(index, kind="stable")
    row, proposed = index[order], proposed[order]
    if (twice := (np.diff(row) == 0) & (np.diff(proposed) != 0)).any():
        k = int(twice.argmax())
        raise ValueError(
            f"row {row[k]} has two proposals among the suspects, {proposed[k]} and "
            f"{proposed[k + 1]}: expected one"
        )


def _refuse_other_files(suspects: Dataset, dataset: Dataset) -> None:
    """Raise ValueError if the column `file` of the suspects has other names than the pictures.

    Only the last part of a path counts, so that the data may have moved. Of rows with the same
    labels, this finds those that were added, removed or renamed since.
    """
    columns = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
    if "file" not in suspects.column_names or len(columns) != 1:
        return
    index = column_array(suspects, "index")
    found = PictureColumn(dataset, columns[0]).paths(index).to_pylist()
    for row, expected, path in zip(index, suspects["file"][:], found, strict=True):
        if expected and path and _last_part(expected) != _last_part(path):
            raise ValueError(
                f"row {row} is the file {path}, and {expected} among the suspects: files were "
                "added, removed or renamed since, so they would change the wrong rows"
            )


def _last_part(path: str) -> str:
    return " ".join(re.split(r"[/\\]", path)[-1].split())


def refuse_row_numbers(index: np.ndarray, size: int) -> None:
    """Raise ValueError if a row number is outside a data set of this size."""
    if (outside := (index < 0) | (index >= size)).any():
        raise ValueError(
            f"the suspects have row {index[outside][0]}, the data set {size} rows: they belong to "
            "another data set"
        )


def _rows_of(suspects: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers, given labels and proposed labels of the suspects."""
    return (
        column_array(suspects, "index"),
        column_array(suspects, "label"),
        column_array(suspects, "proposed"),
    )


def _refuse_contradictions(index: np.ndarray, decisions: Sequence[str]) -> None:
    """Refuse unknown and contradictory decisions, and count those that are missing."""
    found: dict[int, str] = {}
    for row, decision in zip(index.tolist(), decisions, strict=True):
        if decision not in DECISIONS:
            raise ValueError(
                f"row {row} has the decision {decision!r}: expected 'wrong', 'fine', 'other', "
                "'skip', or nothing if it is undecided"
            )
        if found.setdefault(row, decision) != decision:
            raise ValueError(
                f"row {row} has two decisions, {found[row]!r} and {decision!r}: expected one"
            )
    if undecided := list(found.values()).count(""):
        warnings.warn(
            f"{undecided} of {len(found)} suspects are undecided and keep their label", stacklevel=4
        )


def _chosen(decisions: Dataset, row: int) -> np.ndarray:
    """The column ``new_label`` [N]; -1 where it is empty."""
    if "new_label" not in decisions.column_names:
        raise ValueError(
            f"row {row} is decided 'other', and there is no column 'new_label': expected the class"
        )
    values = decisions["new_label"][:]  # `from_csv` reads empty cells as None, and others as floats
    return np.array([NO_CLASS if v is None or v != v else int(v) for v in values], np.int64)


def _integer(text: str, column: str, path: str | Path) -> int | None:
    if not text and column == "new_label":
        return None
    try:
        return int(re.sub(r"\.0$", "", text))  # a column with empty cells is of floats in pandas
    except ValueError:
        raise ValueError(
            f"{path}: {text!r} in column {column!r}; expected an integer, as the page saves it"
        ) from None
