"""Correct, drop or down-weight the labels that are wrong, by the suspects or by decisions on them.

>>> decisions = read_decisions("decisions.csv")  # doctest: +SKIP
>>> train = apply_decisions(train, decisions)  # doctest: +SKIP
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Value

from ..data import noisy_view
from ..data.labels import check_labels, column_array
from ..losses import validate
from .decisions import NO_CLASS, Changes, changes_of

PROVENANCE = {"given_label", "decision", "original_row"}  # columns that apply_decisions adds
HOW = ("correct", "drop", "weight")
NEW = "__new_label"


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
