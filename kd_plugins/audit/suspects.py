"""Which labels are probably wrong: a ranked table of suspects; pictures and a page to go through them; the data put right.

>>> probs = predict_probs(["runs/pair/peer_a", "runs/pair/peer_b"], view)  # doctest: +SKIP
>>> suspects = find_suspects(view.labels, probs, class_names=view.class_names)  # doctest: +SKIP
>>> suspects.to_parquet("suspects.parquet"), suspects.to_csv("suspects.csv")  # doctest: +SKIP
>>> html_page(suspects, train, "suspects.html")  # doctest: +SKIP
>>> train = correct_labels(train, suspects.select(range(100)))  # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.noise import _check_labels, _integers, column_array, noisy_view

CHUNK = 1 << 16  # rows copied at a time


def find_suspects(
    labels: Any = None,
    probs: Any = None,
    *,
    dynamics: Any = None,
    class_names: Sequence[str] | None = None,
    all_rows: bool = False,
) -> Dataset:
    """Samples for which the networks prefer another class than the given label y, most suspicious first, by s = 1 - p_y.

    If labels are wrong equally often in every class, replaced by any other alike, and p is right, P(y is wrong | picture) is a
    falling function of p_y alone, so no ranking is better; the margin to the next class is another one.

    Source: the self-confidence p_y by which Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset
    labels", JAIR 70, 2021 rank label errors (from memory of the paper; it is cleanlab's default). From training dynamics p_y
    is the mean over visits and networks, the confidence of Swayamdipta et al., "Dataset cartography: mapping and diagnosing
    datasets with training dynamics", EMNLP 2020.
    Differs: which labels are suspected is decided by the most probable class, by confident learning with a threshold for each
    class.

    Args:
        labels: the doubted labels [N]: `view.labels`, or a column as an array.
        probs: `predict_probs`, or any probabilities [N, C]. Rows of NaN are left out.
        dynamics: instead of both: the folder that `DynamicsCallback` wrote, or `summarise(folder)`, which can leave out epochs.
        class_names: `view.class_names`; gives the columns `label_name` and `proposed_name`.
        all_rows: rank the samples that nobody doubts too (`proposed` is their label), as AUROC needs it.

    Returns:
        A `Dataset` with columns `index` (row in the data), `label`, `proposed` (the most probable class; by the votes of the
        dynamics, weighted by confidence), `score` (s), `p_label`, `p_proposed`. Of two classes as probable the
        given one stands, of equal scores the first row comes first. `.select(range(100))` or `.filter` shorten it:
        weak networks prefer another class often, so trust the order rather than the number.

    >>> probs = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]]
    >>> suspects = find_suspects([0, 1, 1], np.array(probs))
    >>> [(row["index"], row["proposed"], round(row["score"], 2)) for row in suspects]
    [(1, 2, 0.9), (2, 0, 0.7)]
    """
    if [labels is None, probs is None] != [dynamics is not None] * 2:
        raise ValueError("expected labels and probs, or dynamics alone: a score is of one source")
    columns = _from_probs(labels, probs) if dynamics is None else _from_dynamics(dynamics)
    if not all_rows:
        columns = _take(columns, columns["proposed"] != columns["label"])
    columns = _take(columns, np.argsort(columns["p_label"], kind="stable"))
    columns["score"] = np.clip(1 - columns["p_label"], 0, 1)
    table = pa.table(
        {
            name: columns[name]
            for name in ("index", "label", "proposed", "score", "p_label", "p_proposed")
        }
    )
    if class_names is not None:
        for name in ("label", "proposed"):
            _check_labels(columns[name], len(class_names))
            names = pa.array([str(n) for n in class_names], pa.string()).take(
                pa.array(columns[name])
            )
            table = table.append_column(f"{name}_name", names)
    digest = blake2b(
        b"".join(columns[k].tobytes() for k in ("index", "proposed", "score")), digest_size=8
    )
    return Dataset(table, fingerprint=digest.hexdigest())


def _take(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def _from_probs(labels: Any, probs: Any) -> dict[str, np.ndarray]:
    labels, probs = _integers(labels), np.asarray(probs)
    if (
        probs.ndim != 2
        or probs.shape[1] < 2
        or probs.dtype.kind != "f"
        or labels.shape != probs.shape[:1]
    ):
        raise ValueError(
            f"probs: expected floats [N, C] for labels {list(labels.shape)}, got {probs.dtype} {list(probs.shape)}"
        )
    _check_labels(labels, probs.shape[1])
    p_label, p_proposed = np.empty((2, len(labels)), np.float32)
    proposed = np.empty(len(labels), np.int64)
    for start in range(
        0, len(labels), CHUNK
    ):  # one temporary of all 2.4 million rows would be another 500 MB
        s = slice(start, start + CHUNK)
        part, y, rows = probs[s], labels[s], np.arange(len(probs[s]))
        total = part.sum(1, dtype=np.float32)
        if (bad := (np.abs(total - 1) > 1e-2) | (part.min(1) < 0)).any():
            row = int(bad.argmax())
            raise ValueError(
                f"row {start + row} of probs sums to {total[row]:.4g}, its lowest is {part[row].min():.4g}: expected "
                "probabilities, not logits or scores: 1 - p would not be in [0, 1]"
            )
        p_label[s] = np.where(np.isnan(total), np.nan, part[rows, y])
        best = part.argmax(1)
        proposed[s] = np.where(part[rows, best] > part[rows, y], best, y)
        p_proposed[s] = part[rows, proposed[s]]
    known = np.flatnonzero(~np.isnan(p_label))
    if len(known) < len(labels):
        warnings.warn(
            f"{len(labels) - len(known)} of {len(labels)} rows of probs are NaN and are left out",
            stacklevel=3,
        )
    columns = {"index": np.arange(len(labels)), "label": labels, "proposed": proposed}
    return _take(columns | {"p_label": p_label, "p_proposed": p_proposed}, known)


def _from_dynamics(dynamics: Any) -> dict[str, np.ndarray]:
    if not isinstance(dynamics, dict):
        from .dynamics import summarise  # which imports transformers

        dynamics = summarise(dynamics)
    columns = {
        name: np.asarray(dynamics[name], np.int64) for name in ("index", "label", "proposed")
    }
    columns["p_label"] = np.asarray(dynamics["p_label"], np.float32)
    # votes count only visits at which the class was the most probable, p_label all of them
    agreed = columns["proposed"] == columns["label"]
    columns["p_proposed"] = np.where(
        agreed, columns["p_label"], np.asarray(dynamics["confidence"], np.float32)
    )
    return _take(columns, ~np.isnan(columns["p_label"]))


def correct_labels(
    dataset: Dataset, suspects: Dataset, *, label: str = "label", corrected: str = "corrected_label"
) -> Dataset:
    """Add the column `corrected`: the proposed label where a label is wrong, `label` elsewhere.

    No picture is copied.

    Args:
        dataset: the rows that the suspects were found on.
        suspects: `find_suspects`, all of them or a part. With a column `decision`, as in the CSV of
            `html_page`, only the rows marked "wrong" are corrected; "fine" rows and undecided ones
            (empty) keep their label, and a warning counts the undecided ones.
        label: column of the doubted labels.
        corrected: name of the new column.

    Raises:
        ValueError: the labels among the suspects differ from those of `dataset`, so they are of
            other rows; or a row has two proposals or two decisions.
    """
    index, proposed = _wrong_rows(suspects, dataset, label)
    labels = np.array(column_array(dataset, label))
    if (same := labels[index] == proposed).any():
        row = int(index[same.argmax()])
        raise ValueError(
            f"row {row} is marked wrong, and the proposed label is its own, {labels[row]}: expected "
            "another class, else nothing would be corrected"
        )
    labels[index] = proposed
    return noisy_view(dataset, labels, label=label, noisy=corrected)


def drop_suspects(dataset: Dataset, suspects: Dataset, *, label: str = "label") -> Dataset:
    """`dataset` without the rows whose label is wrong; no picture is copied.

    Arguments, decisions and errors are those of :func:`correct_labels`.
    """
    index, _ = _wrong_rows(suspects, dataset, label)
    keep = np.ones(len(dataset), bool)
    keep[index] = False
    return dataset.select(np.flatnonzero(keep))


def refuse_other_rows(suspects: Dataset, labels: np.ndarray, name: str = "label") -> None:
    """Raise ValueError where the suspects are not of the rows with these labels [N].

    Args:
        suspects: :func:`find_suspects`, or the decisions of the page.
        labels: the doubted labels of the data set, in its order.
        name: where the labels come from, for the error.
    """
    index, given, proposed = (
        column_array(suspects, column) for column in ("index", "label", "proposed")
    )
    refuse_row_numbers(index, len(labels))
    if (other := given != labels[index]).any():
        k = int(other.argmax())
        raise ValueError(
            f"row {index[k]} has label {labels[index[k]]} in {name}, and {given[k]} among the "
            "suspects: they are of other data, of another order or of another column"
        )
    order = np.argsort(index, kind="stable")
    row, better = index[order], proposed[order]
    if (twice := (np.diff(row) == 0) & (np.diff(better) != 0)).any():
        k = int(twice.argmax())
        raise ValueError(
            f"row {row[k]} has two proposals among the suspects, {better[k]} and {better[k + 1]}: "
            "expected one for each row"
        )


def refuse_row_numbers(index: np.ndarray, size: int) -> None:
    """Raise ValueError where the suspects have rows that a data set of this size has not."""
    if len(index) and (index.min() < 0 or index.max() >= size):
        bad = index[(index < 0) | (index >= size)][0]
        raise ValueError(
            f"the suspects have row {bad}, the data set {size} rows: they are of another data set"
        )


def _wrong_rows(suspects: Dataset, dataset: Dataset, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose label is wrong, and the labels proposed for them."""
    refuse_other_rows(suspects, column_array(dataset, label), f"column {label!r}")
    index, given, proposed = (
        column_array(suspects, column) for column in ("index", "label", "proposed")
    )
    wrong = proposed != given
    if "decision" in suspects.column_names:
        wrong = _decided_wrong(index, suspects["decision"][:])
    return index[wrong], proposed[wrong]


def _decided_wrong(index: np.ndarray, decisions: Sequence[str | None]) -> np.ndarray:
    """Where the decision is "wrong" [N]; refused if one is unknown or contradicts another."""
    found: dict[int, str] = {}
    for row, decision in zip(index.tolist(), decisions, strict=True):
        decision = decision or ""
        if decision not in ("wrong", "fine", ""):
            raise ValueError(
                f"row {row} has the decision {decision!r}: expected 'wrong', 'fine', or nothing "
                "for an undecided row"
            )
        if found.setdefault(row, decision) != decision:
            raise ValueError(
                f"row {row} has two decisions, {found[row]!r} and {decision!r}: expected one for each "
                "row"
            )
    if undecided := list(found.values()).count(""):
        warnings.warn(
            f"{undecided} of {len(found)} suspects are undecided and keep their label", stacklevel=4
        )
    return np.array([found[row] == "wrong" for row in index.tolist()], bool)
