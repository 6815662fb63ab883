"""Training dynamics: what each network predicted for each sample at each visit, in Parquet files.

A visit is one sample in one training batch; it is one row. The peers are a, b ... (a single network
is a). Columns:

| column | type | |
|---|---|---|
| epoch | int16 | from 0, as the Trainer counts |
| step | int32 | the optimizer step, from 1 |
| index | int32 | the row in the data set |
| label | int16 | the given class; the largest one of a soft target (Mixup) |
| pred_a | int16 | the most probable class |
| conf_a | float16 | its probability |
| p_label_a | float16 | the probability of the given class |
| selected_a | bool | a teaches this sample to its peers; only if the loss selects |

Above 32,768 classes, label and pred are int32.

Notes:
    The values come from the forward pass that trains: with augmentation, dropout and batch
    statistics, before the step. NaN logits leave NaN in conf and p_label, and a meaningless pred.
    A sample that comes up twice in an epoch has two rows. This happens if the sampler fills up the
    last batch of several processes, or if a sample replaces an unreadable picture.

>>> trainer.add_callback(DynamicsCallback("runs/pair/dynamics"))  # doctest: +SKIP
>>> trainer.train()  # doctest: +SKIP
>>> visits = read_dynamics("runs/pair/dynamics")  # doctest: +SKIP
>>> summarise("runs/pair/dynamics")["forgetting"]  # doctest: +SKIP
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
from datasets import Dataset
from tqdm.auto import tqdm

SEGMENT = re.compile(r"step-(?P<step>\d+)-rank-\d+\.parquet")  # the names of the files


def read_dynamics(folder: str | Path) -> Dataset:
    """Read all visits as a ``datasets.Dataset`` in memory, also those of a running training.

    The order of the rows is not defined. With two networks a visit takes 24 bytes of memory.
    :func:`summarise` needs less, because it reads one epoch at a time.
    """
    return Dataset(_open(folder).to_table())


def _open(dynamics: str | Path | Dataset) -> pads.Dataset:
    if isinstance(dynamics, Dataset):
        return pads.dataset(dynamics.with_format("arrow")[:])
    paths = [path for path in sorted(Path(dynamics).glob("*")) if SEGMENT.fullmatch(path.name)]
    if not paths:
        raise FileNotFoundError(
            f"{dynamics} contains no training dynamics: expected step-*-rank-*.parquet, which "
            "DynamicsCallback writes to output_dir/dynamics after each epoch and before checkpoints"
        )
    return pads.dataset(paths, format="parquet")


def summarise(
    dynamics: str | Path | Dataset, num_samples: int | None = None, first_epoch: int = 0
) -> dict[str, np.ndarray]:
    """Summarise the visits of each sample i = 0 ... N - 1, as arrays [N].

    - ``index``, ``label``: i, and the label at its last visit (-1 without a visit).
    - ``visits``: the number of visits. Visits with NaN are ignored here and below.
    - ``p_label``: the probability of the given class, averaged over visits and networks.
    - ``proposed``: the class with the largest sum of conf over the votes for it; each network casts
      one vote per visit, for its pred. -1 without a visit.
    - ``confidence``: this sum, divided by the number of all votes. 1 if all are sure of one class.
    - ``forgetting``: how often pred = label turned into pred ≠ label from one visit to the next,
      averaged over networks.
    - ``selected`` [N, K], if the loss selects: the fraction of visits at which each network taught
      the sample to its peers.

    The values of a sample without a visit are NaN.

    Args:
        dynamics: the folder, or the result of :func:`read_dynamics`.
        num_samples: N; by default the largest index + 1.
        first_epoch: ignore the visits of earlier epochs.

    References:
        Toneva et al., "An empirical study of example forgetting during deep neural network
        learning", ICLR 2019 (forgetting events).

    Notes:
        In the paper a sample that was never learned counts as forgotten infinitely often. Here its
        ``forgetting`` is 0.
    """
    source = _open(dynamics)
    rows = source.to_table(columns=["epoch", "index"])
    size, last = pc.max(rows["index"]).as_py() + 1, pc.max(rows["epoch"]).as_py()
    if first_epoch > last:
        raise ValueError(
            f"first_epoch={first_epoch}: the dynamics end with epoch {last}; no visit would count"
        )
    if num_samples is not None and num_samples < size:
        raise ValueError(
            f"num_samples={num_samples}, but the dynamics contain index {size - 1}: they belong to "
            "another data set"
        )
    summary = _Summary(num_samples or size, source.schema.names)
    epochs = sorted(epoch for epoch in rows["epoch"].unique().to_pylist() if epoch >= first_epoch)
    for epoch in tqdm(epochs, desc="dynamics", unit="epoch", disable=None):
        table = source.to_table(filter=pc.field("epoch") == epoch)
        summary.add({name: table[name].to_numpy() for name in table.column_names})
    return summary.arrays()


class _Summary:
    """Sums over the visits of each sample, epoch by epoch."""

    def __init__(self, size: int, columns: list[str]) -> None:
        self.peers = [c.removeprefix("pred_") for c in columns if c.startswith("pred_")]
        self.selects = f"selected_{self.peers[0]}" in columns
        self.visits, self.label = np.zeros(size, np.int64), np.full(size, -1)
        self.p_label, self.forgotten = np.zeros(size), np.zeros(size)
        self.selected = np.zeros((size, len(self.peers)))
        self.right = np.zeros((size, len(self.peers)), bool)  # at the last visit
        # Votes of the same sample for the same class: key = index · 2^32 + class, sorted.
        self.keys: np.ndarray = np.empty(0, np.int64)
        self.votes: np.ndarray = np.empty(0)

    def add(self, visits: dict[str, np.ndarray]) -> None:
        """Add the visits of one epoch."""
        known = np.all([np.isfinite(visits[f"conf_{peer}"]) for peer in self.peers], axis=0)
        order = np.lexsort((visits["step"], visits["index"]))  # by sample, then by time
        order = order[known[order]]
        visits = {name: values[order] for name, values in visits.items()}
        index, label, size = visits["index"].astype(np.int64), visits["label"], len(self.visits)
        first, last = np.diff(index, prepend=-1) > 0, np.diff(index, append=size) > 0
        self.visits += np.bincount(index, minlength=size)
        self.label[index[last]] = label[last]
        for k, peer in enumerate(self.peers):
            right = visits[f"pred_{peer}"] == label
            before = np.where(first, self.right[index, k], np.roll(right, 1))
            self.forgotten += np.bincount(index, before & ~right, size)
            self.right[index[last], k] = right[last]
            self.p_label += np.bincount(index, visits[f"p_label_{peer}"], size)
            if self.selects:
                self.selected[:, k] += np.bincount(index, visits[f"selected_{peer}"], size)
            self._vote(index, visits[f"pred_{peer}"], visits[f"conf_{peer}"])

    def _vote(self, index: np.ndarray, pred: np.ndarray, conf: np.ndarray) -> None:
        keys = np.concatenate([self.keys, index << 32 | pred])
        self.keys, group = np.unique(keys, return_inverse=True)
        self.votes = np.bincount(group, np.concatenate([self.votes, conf]), len(self.keys))

    def arrays(self) -> dict[str, np.ndarray]:
        """The summary."""
        size = len(self.visits)
        index, pred = self.keys >> 32, self.keys & (2**32 - 1)
        order = np.lexsort((-pred, self.votes, index))
        best = order[np.diff(index[order], append=size) > 0]  # most votes; of equals, first class
        proposed, confidence = np.full(size, -1), np.zeros(size)
        proposed[index[best]], confidence[index[best]] = pred[best], self.votes[best]
        visits = np.where(self.visits, self.visits, np.nan)  # 0 visits give NaN
        peers = len(self.peers)
        summary = {
            "index": np.arange(size),
            "label": self.label,
            "visits": self.visits,
            "p_label": self.p_label / (visits * peers),
            "proposed": proposed,
            "confidence": confidence / (visits * peers),
            "forgetting": np.where(self.visits, self.forgotten / peers, np.nan),
        }
        return summary | ({"selected": self.selected / visits[:, None]} if self.selects else {})
