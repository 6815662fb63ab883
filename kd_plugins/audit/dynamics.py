"""Training dynamics: what each network said of each training sample, visit by visit, in a folder of Parquet segments.

A visit is one row. Columns, for the peers a, b ... (one network is a):

| column | type | |
|---|---|---|
| epoch | int16 | as the Trainer counts, from 0 |
| step | int32 | the optimizer step that it was part of, from 1 |
| index | int32 | position in the data set |
| label | int16 | the given class; of a soft target (Mixup) its largest; int32 above 32,768 classes, as pred |
| pred_a | int16 | most probable class |
| conf_a | float16 | its probability |
| p_label_a | float16 | probability of the given class |
| selected_a | bool | a hands this sample over to the others; only where the loss is a ``Mutual`` |

The figures are of the forward pass that trained: with augmentation, dropout and batch statistics, before the step. Logits that are
NaN leave a row with NaN in conf and p_label, and a pred without meaning. A sample that a sampler repeats, to fill up the
last batch of several processes, has a row for each visit; so has the neighbour that stands in for a broken picture.

>>> from kd_plugins.audit import read_dynamics, summarise
>>> trainer.add_callback(DynamicsCallback("runs/pair/dynamics"))  # doctest: +SKIP
>>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
>>> summarise("runs/pair/dynamics")["forgetting"], read_dynamics("runs/pair/dynamics")[0]  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
from datasets import Dataset
from tqdm.auto import tqdm

SEGMENTS = "step-*-rank-*.parquet"


def read_dynamics(folder: str | Path) -> Dataset:
    """All visits as a ``datasets.Dataset`` in memory, in no promised order; also of a run that is still going.

    It takes 24 bytes a visit with two networks. :func:`summarise` reads the folder an epoch at a time.
    """
    return Dataset(_segments(folder).to_table())


def _segments(folder: str | Path) -> pads.Dataset:
    paths = sorted(Path(folder).glob(SEGMENTS))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no training dynamics: expected {SEGMENTS}, as DynamicsCallback writes them to "
            "output_dir/dynamics at the end of an epoch and before a checkpoint"
        )
    return pads.dataset(paths, format="parquet")


def summarise(
    dynamics: str | Path | Dataset, num_samples: int | None = None, first_epoch: int = 0
) -> dict[str, np.ndarray]:
    """What the visits say of each sample i = 0 ... N - 1, as arrays [N].

    - ``index``, ``label``: i, and the class it was last given (-1: never visited).
    - ``visits``: how many there were; those with NaN do not count, here and below.
    - ``p_label``: probability of the given class, mean over visits and networks.
    - ``proposed``: the class c with most Σ conf over the votes (visit, network) with pred = c; -1 without a visit.
    - ``confidence``: that sum over the number of votes, so 1 where all are sure of the same class.
    - ``forgetting``: how often pred = label turned into pred ≠ label from one visit to the next, mean over networks.
    - ``selected``, where the loss selects: share of the visits in which each network handed the sample over, [N, K].

    Figures of samples without a visit are NaN.

    Source: forgetting events are from Toneva et al., "An empirical study of example forgetting during deep neural network
    learning", ICLR 2019. Differs: a sample that was never learnt has 0 here, there it counts as forgotten for ever.

    Args:
        dynamics: the folder, which is read an epoch at a time, or what :func:`read_dynamics` made of it.
        num_samples: N; the largest index + 1 by default.
        first_epoch: leave out the visits of earlier epochs.
    """
    whole = isinstance(dynamics, Dataset)
    source = pads.dataset(dynamics.with_format("arrow")[:]) if whole else _segments(dynamics)  # type: ignore[union-attr, arg-type]
    where = source.to_table(columns=["epoch", "index"])
    epochs = sorted(epoch for epoch in where["epoch"].unique().to_pylist() if epoch >= first_epoch)
    rows = pc.max(where["index"]).as_py() + 1
    if not epochs:
        raise ValueError(
            f"first_epoch={first_epoch}: the dynamics end with epoch {pc.max(where['epoch'])}; no visit would count"
        )
    if num_samples is not None and num_samples < rows:
        raise ValueError(
            f"num_samples={num_samples}, but the dynamics hold index {rows - 1}: they are of another data set"
        )
    n = num_samples or rows
    peers = [name.removeprefix("pred_") for name in source.schema.names if name.startswith("pred_")]
    selects = f"selected_{peers[0]}" in source.schema.names

    visits, label, p_label, forgotten = (
        np.zeros(n, np.int64),
        np.full(n, -1),
        np.zeros(n),
        np.zeros(n),
    )
    selected, right_before = np.zeros((n, len(peers))), np.zeros((n, len(peers)), bool)
    keys, votes = (
        np.empty(0, np.int64),
        np.empty(0),
    )  # index · 2^32 + class, sorted, and the sum of conf
    for epoch in tqdm(epochs, desc="dynamics", unit="epoch", disable=None):
        table = source.to_table(filter=pc.field("epoch") == epoch)
        seen = {name: table[name].to_numpy() for name in table.column_names}
        known = np.all([np.isfinite(seen[f"conf_{peer}"]) for peer in peers], axis=0)
        order = np.lexsort(
            (seen["step"], seen["index"])
        )  # visits of a sample stand together, in time
        seen = {name: values[order[known[order]]] for name, values in seen.items()}
        index, given = seen["index"].astype(np.int64), seen["label"]
        first = np.diff(index, prepend=-1) > 0
        last = np.diff(index, append=n) > 0
        visits += np.bincount(index, minlength=n)
        label[index[last]] = given[last]
        for k, peer in enumerate(peers):
            pred, conf = seen[f"pred_{peer}"], seen[f"conf_{peer}"]
            right = pred == given
            before = np.where(first, right_before[index, k], np.roll(right, 1))
            forgotten += np.bincount(index, before & ~right, n)
            right_before[index[last], k] = right[last]
            p_label += np.bincount(index, seen[f"p_label_{peer}"], n)
            if selects:
                selected[:, k] += np.bincount(index, seen[f"selected_{peer}"], n)
            keys = np.concatenate([keys, index << 32 | pred])
            votes = np.concatenate([votes, conf])
        order = np.argsort(keys, kind="stable")
        keys, votes = keys[order], votes[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        keys, votes = keys[starts], np.add.reduceat(votes, starts) if len(starts) else votes

    index, pred = keys >> 32, keys & (2**32 - 1)
    order = np.lexsort(
        (-pred, votes, index)
    )  # the last of a sample has most votes, of equals the first class
    best = order[np.diff(index[order], append=n) > 0]
    proposed, confidence = np.full(n, -1), np.zeros(n)
    proposed[index[best]], confidence[index[best]] = pred[best], votes[best]
    count = np.where(visits, visits, np.nan)  # so that 0 visits give NaN
    summary = {
        "index": np.arange(n),
        "label": label,
        "visits": visits,
        "p_label": p_label / (count * len(peers)),
    }
    summary |= {"proposed": proposed, "confidence": confidence / (count * len(peers))}
    summary |= {"forgetting": np.where(visits, forgotten / len(peers), np.nan)}
    return summary | ({"selected": selected / count[:, None]} if selects else {})
