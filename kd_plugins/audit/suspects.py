"""Find the labels that are probably wrong, and correct or drop them.

>>> probs = predict_probs(["runs/pair/peer_a", "runs/pair/peer_b"], view)  # doctest: +SKIP
>>> suspects = find_suspects(view.labels, probs, class_names=view.class_names)  # doctest: +SKIP
>>> html_page(suspects, train, "suspects.html")  # doctest: +SKIP
>>> decisions = Dataset.from_csv("decisions.csv")  # from the page  # doctest: +SKIP
>>> train = correct_labels(train, decisions)  # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data import noisy_view
from ..data.labels import check_labels, class_indices, column_array
from .dynamics import summarise

CHUNK = 1 << 16  # rows per temporary copy; one of 2.4 million rows would take 500 MB


def find_suspects(
    labels: Any = None,
    probs: Any = None,
    *,
    dynamics: Any = None,
    class_names: Sequence[str] | None = None,
    all_rows: bool = False,
) -> Dataset:
    """Rank the samples whose label y is not the most probable class, by score 1 - p_y.

    Suppose labels are wrong equally often in every class, are replaced by each other class equally
    often, and p is right. Then the probability that y is wrong falls with p_y and depends on
    nothing else, so no other ranking is better.

    Args:
        labels: the doubted labels [N]: `view.labels`, or a column as an array.
        probs: the result of `predict_probs`, or other probabilities [N, C]. Rows of NaN are left
            out, with a warning.
        dynamics: instead of both, the folder that `DynamicsCallback` wrote, or a summary of it
            (`summarise`), which can ignore early epochs.
        class_names: `view.class_names`, for the columns `label_name` and `proposed_name`.
        all_rows: also rank the samples whose label is the most probable class. AUROC needs them.

    Returns:
        A `Dataset`, highest score first, with the columns `index` (the row in the data), `label`,
        `proposed` (the most probable class), `score`, `p_label` and `p_proposed`. With dynamics,
        `proposed` is the class with most votes, weighted by confidence, and `p_label` the mean over
        visits and networks. If two classes are equally probable, the given label stands. Use
        `.select(range(100))` or `.filter` to keep a part: weak networks doubt many right labels.

    References:
        Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels",
        JAIR 70, 2021 (the score p_y, self-confidence; it is also cleanlab's default). Swayamdipta
        et al., "Dataset cartography: mapping and diagnosing datasets with training dynamics", EMNLP
        2020 (p_y from training dynamics, confidence).

    Notes:
        Here a label is suspected if another class is more probable. Confident learning uses a
        threshold for each class instead.

    >>> probs = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]]
    >>> suspects = find_suspects([0, 1, 1], np.array(probs))
    >>> [(row["index"], row["proposed"], round(row["score"], 2)) for row in suspects]
    [(1, 2, 0.9), (2, 0, 0.7)]
    """
    given = (labels is not None, probs is not None, dynamics is not None)
    if given not in ((True, True, False), (False, False, True)):
        raise ValueError("expected labels and probs, or dynamics alone: a score has one source")
    columns = _from_probs(labels, probs) if dynamics is None else _from_dynamics(dynamics)
    columns["score"] = np.clip(1 - columns["p_label"], 0, 1)
    order = np.argsort(columns["p_label"], kind="stable")  # NaN last
    kept = np.isfinite(columns["p_label"])
    if not all_rows:
        kept &= columns["proposed"] != columns["label"]
    order = order[kept[order]]
    names = ("index", "label", "proposed", "score", "p_label", "p_proposed")
    table = pa.table({name: columns[name][order] for name in names})
    if class_names is not None:
        text = pa.array([str(name) for name in class_names], pa.string())
        for name in ("label", "proposed"):
            check_labels(table[name].to_numpy(), len(class_names))
            table = table.append_column(f"{name}_name", text.take(table[name]))
    content = b"".join(table[name].to_numpy().tobytes() for name in ("index", "proposed", "score"))
    return Dataset(table, fingerprint=blake2b(content, digest_size=8).hexdigest())


def correct_labels(
    dataset: Dataset, suspects: Dataset, *, label: str = "label", corrected: str = "corrected_label"
) -> Dataset:
    """Add the column `corrected`: the proposed label where `label` is wrong, else `label`.

    No picture is copied.

    Args:
        dataset: the data in which the suspects were found.
        suspects: the result of `find_suspects`, or some of its rows; all of them are corrected. If
            there is a column `decision`, as in the CSV file of `html_page`, only rows marked
            "wrong" are corrected. Rows marked "fine" and undecided rows (empty) keep their label; a
            warning counts the undecided ones.
        label: the column of doubted labels.
        corrected: the name of the new column.

    Raises:
        ValueError: the suspects have other labels than `dataset`, or two proposals or decisions for
            one row, or a row marked "wrong" with its own label as the proposal.
    """
    index, proposed = _wrong_rows(suspects, dataset, label)
    labels = np.array(column_array(dataset, label))
    if (same := labels[index] == proposed).any():
        raise ValueError(
            f"row {index[same][0]} is marked wrong, but the proposed label is its own, "
            f"{proposed[same][0]}: expected another class"
        )
    labels[index] = proposed
    return noisy_view(dataset, labels, label=label, noisy=corrected)


def drop_suspects(dataset: Dataset, suspects: Dataset, *, label: str = "label") -> Dataset:
    """Remove the rows whose label is wrong. No picture is copied.

    Arguments, decisions and errors are those of :func:`correct_labels`.
    """
    index, _ = _wrong_rows(suspects, dataset, label)
    keep = np.ones(len(dataset), bool)
    keep[index] = False
    return dataset.select(np.flatnonzero(keep))


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


def refuse_row_numbers(index: np.ndarray, size: int) -> None:
    """Raise ValueError if a row number is outside a data set of this size."""
    if (outside := (index < 0) | (index >= size)).any():
        raise ValueError(
            f"the suspects have row {index[outside][0]}, the data set {size} rows: they belong to "
            "another data set"
        )


def _from_probs(labels: Any, probs: Any) -> dict[str, np.ndarray]:
    labels, probs = class_indices(labels), np.asarray(probs)
    fits = probs.ndim == 2 and probs.shape[1] > 1 and labels.shape == probs.shape[:1]
    if not fits or probs.dtype.kind != "f":
        raise ValueError(
            f"probs: expected floats [N, C] for labels {list(labels.shape)}, got {probs.dtype} "
            f"{list(probs.shape)}"
        )
    check_labels(labels, probs.shape[1])
    p_label, p_proposed = np.empty((2, len(labels)), np.float32)
    proposed = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        p, y, rows = probs[part], labels[part], np.arange(len(probs[part]))
        total = p.sum(1, dtype=np.float32)
        if (bad := (np.abs(total - 1) > 1e-2) | (p.min(1) < 0)).any():
            row = int(bad.argmax())
            raise ValueError(
                f"row {start + row} of probs sums to {total[row]:.4g}, its lowest is "
                f"{p[row].min():.4g}: expected probabilities, not logits or scores; 1 - p would "
                "not be in [0, 1]"
            )
        best = p.argmax(1)
        proposed[part] = np.where(p[rows, best] > p[rows, y], best, y)
        p_label[part] = np.where(np.isnan(total), np.nan, p[rows, y])
        p_proposed[part] = p[rows, proposed[part]]
    if unknown := int(np.isnan(p_label).sum()):
        warnings.warn(
            f"{unknown} of {len(labels)} rows of probs are NaN and are left out", stacklevel=3
        )
    columns = {"index": np.arange(len(labels)), "label": labels, "proposed": proposed}
    return columns | {"p_label": p_label, "p_proposed": p_proposed}


def _from_dynamics(dynamics: Any) -> dict[str, np.ndarray]:
    summary = dynamics if isinstance(dynamics, dict) else summarise(dynamics)
    columns: dict[str, np.ndarray] = {
        name: np.asarray(summary[name], np.int64) for name in ("index", "label", "proposed")
    }
    columns["p_label"] = np.asarray(summary["p_label"], np.float32)
    confidence = np.asarray(summary["confidence"], np.float32)
    # Votes count only the visits at which the class was the most probable; p_label counts all.
    agreed = columns["proposed"] == columns["label"]
    columns["p_proposed"] = np.where(agreed, columns["p_label"], confidence)
    return columns


def _rows_of(suspects: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers, given labels and proposed labels of the suspects."""
    return (
        column_array(suspects, "index"),
        column_array(suspects, "label"),
        column_array(suspects, "proposed"),
    )


def _wrong_rows(suspects: Dataset, dataset: Dataset, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose label is wrong, and the labels proposed for them."""
    refuse_other_rows(suspects, column_array(dataset, label), f"column {label!r}")
    index, given, proposed = _rows_of(suspects)
    wrong = proposed != given
    if "decision" in suspects.column_names:
        wrong = _decided_wrong(index, suspects["decision"][:])
    return index[wrong], proposed[wrong]


def _decided_wrong(index: np.ndarray, decisions: Sequence[str | None]) -> np.ndarray:
    """Where the decision is "wrong" [N]. Unknown and contradictory decisions are refused."""
    found: dict[int, str] = {}
    for row, decision in zip(index.tolist(), decisions, strict=True):
        decision = decision or ""
        if decision not in ("wrong", "fine", ""):
            raise ValueError(
                f"row {row} has the decision {decision!r}: expected 'wrong', 'fine', or nothing "
                "if it is undecided"
            )
        if found.setdefault(row, decision) != decision:
            raise ValueError(
                f"row {row} has two decisions, {found[row]!r} and {decision!r}: expected one"
            )
    if undecided := list(found.values()).count(""):
        warnings.warn(
            f"{undecided} of {len(found)} suspects are undecided and keep their label", stacklevel=4
        )
    return np.array([found[row] == "wrong" for row in index.tolist()], bool)
