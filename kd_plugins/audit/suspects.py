"""Find the labels that are probably wrong.

>>> probs = predict_probs(["runs/pair/peer_a", "runs/pair/peer_b"], view)  # doctest: +SKIP
>>> suspects = find_suspects(view.labels, probs, class_names=view.class_names)  # doctest: +SKIP
>>> html_page(suspects, train, "suspects.html")  # doctest: +SKIP
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.labels import check_labels, class_indices
from .dynamics import summarise
from .neighbours import speaking_neighbours
from .ranking import LabelNoise, check_probs

CHUNK = 1 << 16  # rows per temporary copy; one of 2.4 million rows would take 500 MB


def find_suspects(
    labels: Any = None,
    probs: Any = None,
    *,
    dynamics: Any = None,
    noise: LabelNoise | None = None,
    class_names: Sequence[str] | None = None,
    all_rows: bool = False,
) -> Dataset:
    """Rank the samples whose label y is not the most probable class, by score 1 - p_y.

    Suppose labels are wrong equally often in every class, are replaced by each other class equally
    often, and p is right. Then the probability that y is wrong falls with p_y and depends on
    nothing else, so no other ranking is better. `noise` needs only the last of these assumptions.

    Args:
        labels: the doubted labels [N]: `view.labels`, or a column as an array.
        probs: the result of `predict_probs`, or other probabilities [N, C]. Rows of NaN are left
            out, with a warning.
        dynamics: instead of both, the folder that `DynamicsCallback` wrote, or a summary of it
            (`summarise`), which can ignore early epochs.
        noise: instead of these, the result of `estimate_label_noise`. Its score is the probability
            that the label is wrong. It ranks best if labels are not wrong at random.
        class_names: `view.class_names`, for the columns `label_name` and `proposed_name`.
        all_rows: also rank the samples whose label is the most probable class. AUROC needs them.

    Returns:
        A `Dataset`, highest score first, with the columns `index` (the row in the data), `label`,
        `proposed` (the most probable class), `score`, `p_label` and `p_proposed`. With dynamics,
        `proposed` is the class with most votes, weighted by confidence, and `p_label` the mean over
        visits and networks. If two classes are equally probable, the given label stands. Noise
        with features adds two columns: `outlier`, the share of samples that are nearer to a class,
        and `neighbours`, the rows of up to four nearest neighbours whose label is the proposed
        class. Use `.select(range(100))` or `.filter` to keep a part: weak networks doubt many
        right labels.

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
    given = [name is not None for name in (labels, probs, dynamics, noise)]
    if given not in ([True, True, False, False], [False, False, True, False], [False] * 3 + [True]):
        raise ValueError(
            "expected labels and probs, or dynamics alone, or noise alone: a score has one source"
        )
    _refuse_names(class_names, probs if noise is None else noise.transition)
    if noise is not None:
        columns = _from_noise(noise)
    else:
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
    if noise is not None and noise.near is not None and noise.outlier is not None:
        table = table.append_column("outlier", pa.array(noise.outlier[order]))
        table = table.append_column("neighbours", speaking_neighbours(noise, order))
    content = b"".join(table[name].to_numpy().tobytes() for name in ("index", "proposed", "score"))
    return Dataset(table, fingerprint=blake2b(content, digest_size=8).hexdigest())


def _refuse_names(names: Sequence[str] | None, probs: Any) -> None:
    """Refuse probabilities [N, C] of other classes than those with names."""
    width = np.shape(probs)[-1:]
    if names is not None and width not in ((), (len(names),)):
        raise ValueError(
            f"class_names: got {len(names)}, and the probabilities have {width[0]} columns: "
            "expected one for each class"
        )


def _from_probs(labels: Any, probs: Any) -> dict[str, np.ndarray]:
    labels, probs = class_indices(labels), np.asarray(probs)
    check_probs(labels, probs)
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


def _from_noise(noise: LabelNoise) -> dict[str, np.ndarray]:
    return {
        "index": np.arange(len(noise.labels)),
        "label": noise.labels,
        "proposed": noise.proposed,
        "p_label": (1 - noise.p_wrong).astype(np.float32),
        "p_proposed": noise.p_proposed.astype(np.float32),
    }


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
