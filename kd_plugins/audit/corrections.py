"""Correct, drop or down-weight the labels that are wrong, by the suspects or by decisions on them.

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

>>> decisions = read_decisions("decisions.csv")  # doctest: +SKIP
>>> train = apply_decisions(train, decisions)  # doctest: +SKIP
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

from ..data import noisy_view
from ..data.decode import PictureColumn
from ..data.labels import check_labels, column_array
from ..data.pictures import separator
from ..losses import validate

PROVENANCE = {"given_label", "decision", "original_row"}  # columns that apply_decisions adds
OPTIONAL = ("new_label", "data", "file")
DECISIONS = ("wrong", "fine", "other", "skip", "")
HOW = ("correct", "drop", "weight")
NO_CLASS = -1
NEW = "__new_label"


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


def correct_labels(
    dataset: Dataset, suspects: Dataset, *, label: str = "label", corrected: str = "corrected_label"
) -> Dataset:
    """Add the column `corrected`: the right label where `label` is wrong, else `label`.

    No picture is copied.

    Args:
        dataset: the data in which the suspects were found.
        suspects: the result of `find_suspects`, or some of its rows; all of them are corrected. If
            there is a column `decision`, as in the CSV file of `html_page`, only rows decided
            "wrong" or "other" are corrected. The others keep their label; a warning counts those
            without a decision.
        label: the column of doubted labels.
        corrected: the name of the new column.

    Raises:
        ValueError: the suspects have other labels than `dataset`, or two proposals or decisions for
            one row, or a row's new label is its own, or a picture belongs to no class.
    """
    changes = changes_of(suspects, dataset, label)
    if (none := changes.new == NO_CLASS).any():
        raise ValueError(
            f"row {changes.rows[none][0]} belongs to no class by its decision, so it has no right "
            "label: use apply_decisions or drop_suspects, which remove it"
        )
    return noisy_view(dataset, _new_labels(dataset, changes, label), label=label, noisy=corrected)


def drop_suspects(dataset: Dataset, suspects: Dataset, *, label: str = "label") -> Dataset:
    """Remove the rows whose label is wrong. No picture is copied.

    Arguments, decisions and errors are those of :func:`correct_labels`, but a row may be decided
    "wrong" for which no other class is proposed, or that belongs to no class.
    """
    return _without(dataset, changes_of(suspects, dataset, label).rows)


def apply_decisions(
    dataset: Dataset,
    decisions: Dataset,
    *,
    how: str = "correct",
    weight: float = 0.1,
    label: str = "label",
) -> Dataset:
    """The data set without its wrong labels, and columns that tell what was changed.

    New columns: ``given_label`` (the label before), ``decision`` (empty if there was none) and
    ``original_row`` (the row before rows were dropped). A second round, with decisions on the
    result, keeps the first ``given_label`` and ``original_row``.

    Args:
        dataset: the data for which the decisions were made.
        decisions: the result of :func:`read_decisions`, or of `find_suspects`.
        how: "correct" replaces wrong labels, and drops pictures that belong to no class; "drop"
            removes all rows with a wrong label; "weight" keeps all rows and labels, and adds a
            column ``weight``.
        weight: of rows with a wrong label, with ``how="weight"``. All others keep the weight that
            they have, or get 1.
        label: the column of doubted labels.

    Raises:
        ValueError: see :func:`correct_labels`; or the decisions were made for other data.
    """
    _refuse_own_provenance(dataset, label)
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {', '.join(HOW)}")
    weight = validate.fraction("weight", weight, "a wrong label would count more than a right one")
    changes = changes_of(decisions, dataset, label)
    applied = _with_provenance(dataset, decisions, changes, how, label)
    if how == "weight":
        weights = np.ones(len(dataset), np.float32)
        if "weight" in dataset.column_names:
            weights[:] = dataset["weight"][:]
        weights[changes.rows] = weight
        kept = applied.column_names
        applied = applied.select_columns([name for name in kept if name != "weight"])
        return applied.add_column("weight", weights, feature=Value("float32"))
    dropped = changes.rows if how == "drop" else changes.rows[changes.new == NO_CLASS]
    return _without(applied, dropped)


def _refuse_own_provenance(dataset: Dataset, label: str) -> None:
    """Raise ValueError if a column of the data has the name of one that is written."""
    names = set(dataset.column_names)
    foreign = sorted(PROVENANCE & names) if PROVENANCE - names else []
    if foreign or label in PROVENANCE:
        name = label if label in PROVENANCE else foreign[0]
        raise ValueError(
            f"the data have a column {name!r}, which is the name of a column that tells what was "
            f"changed: it would be lost. Rename it: dataset.rename_column({name!r}, ...)"
        )


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


def _new_labels(dataset: Dataset, changes: Changes, label: str) -> np.ndarray:
    """The labels of all rows after the changes [N]. Rows of no class keep theirs."""
    labels = np.array(column_array(dataset, label))
    if (same := changes.new == labels[changes.rows]).any():
        row, own = changes.rows[same][0], changes.new[same][0]
        raise ValueError(
            f"row {row} is marked wrong, but the proposed label is its own, {own}: expected "
            "another class"
        )
    known = changes.new != NO_CLASS
    names = getattr(dataset.features[label], "names", None)
    check_labels(changes.new[known], None if names is None else len(names))
    labels[changes.rows[known]] = changes.new[known]
    return labels


def _with_provenance(
    dataset: Dataset, decisions: Dataset, changes: Changes, how: str, label: str
) -> Dataset:
    """The data set with its new labels, and with the columns that tell what was decided."""
    applied, before = dataset, set(dataset.column_names)
    if how == "correct" and len(changes.rows):  # other splits may have rows without a label, -1
        labels = _new_labels(dataset, changes, label)
        applied = noisy_view(dataset, labels, label=label, noisy=NEW).remove_columns(label)
        applied = applied.rename_column(NEW, label).select_columns(dataset.column_names)
    if "given_label" not in before:  # plain integers, so that there is one column of classes
        given = np.array(column_array(dataset, label))
        applied = applied.add_column("given_label", given, feature=Value("int64"))
    if "original_row" not in before:
        rows = np.arange(len(dataset))
        applied = applied.add_column("original_row", rows, feature=Value("int64"))
    texts = np.full(len(dataset), "", object)
    if "decision" in before:
        texts[:] = applied["decision"][:]
        applied = applied.remove_columns("decision")
    texts[changes.rows] = "wrong"
    if "decision" in decisions.column_names:
        index, decided = column_array(decisions, "index"), decisions["decision"][:]
        known = [k for k, decision in enumerate(decided) if decision]
        texts[index[known]] = [decided[k] for k in known]
    return applied.add_column("decision", texts.tolist(), feature=Value("string"))


def _without(dataset: Dataset, index: np.ndarray) -> Dataset:
    keep = np.ones(len(dataset), bool)
    keep[index] = False
    return dataset.select(np.flatnonzero(keep))


def _integer(text: str, column: str, path: str | Path) -> int | None:
    if not text and column == "new_label":
        return None
    try:
        return int(re.sub(r"\.0$", "", text))  # a column with empty cells is of floats in pandas
    except ValueError:
        raise ValueError(
            f"{path}: {text!r} in column {column!r}; expected an integer, as the page saves it"
        ) from None
