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

>>> from kd_plugins.dynamics import DynamicsCallback, read_dynamics, summarise
>>> trainer.add_callback(DynamicsCallback("runs/pair/dynamics"))  # doctest: +SKIP
>>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
>>> summarise("runs/pair/dynamics")["forgetting"], read_dynamics("runs/pair/dynamics")[0]  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from .losses.mutual import Mutual, peer_name
from .models import Hosted

logger = logging.get_logger(__name__)

SEGMENTS = "step-*-rank-*.parquet"
SMALL = {"index": torch.int32, "conf": torch.float16, "p_label": torch.float16}


class DynamicsCallback(TrainerCallback):
    """Keep the dynamics of a run of ``MutualDistillationTrainer``: see :mod:`kd_plugins.dynamics` for the columns.

    Each process writes segments of its own, ``step-00000123-rank-0.parquet`` with everything since its last one up to step 123:
    before a checkpoint, at the end of an epoch, after ``max_rows`` visits; whole or not at all. A run that goes on
    from step s removes what the folder holds of later steps, since they are trained again: after a kill and a resume every
    visit is there once. So a run from the start (s = 0) empties the folder, as it writes over the checkpoints beside it; a warning
    says how many segments went. Processes on several hosts need no common disk; ``folder`` is then each host's.

    Args:
        folder: where to; ``output_dir/dynamics`` by default.
        max_rows: visits that a process keeps in memory (about 25 bytes each).

    Raises:
        ValueError: the batches have no ``index``; TypeError: it was given to another Trainer.
    """

    def __init__(self, folder: str | Path | None = None, max_rows: int = 1_000_000) -> None:
        self.folder, self.max_rows = folder, max_rows
        self._clear()

    def _clear(self) -> None:
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []  # (step, figures on the device) of the last batches
        self._parts: list[dict[str, np.ndarray]] = []  # what has come to the host
        self._rows = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        if not isinstance(hosted, Hosted):
            raise TypeError(f"DynamicsCallback reads the networks of MutualDistillationTrainer, not {type(hosted).__name__}; one "
                            "network and its loss train there too")  # fmt: skip
        hosted.watch = True
        for module in hosted.modules():
            if isinstance(module, Mutual):
                module.watch = True
        self._clear()
        self.path = Path(self.folder or Path(args.output_dir) / "dynamics")
        self.rank = args.process_index
        self.path.mkdir(parents=True, exist_ok=True)
        if args.local_process_index == 0:  # the others write after the first step, and cannot finish it alone
            _drop_after(self.path, state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch = int(state.epoch or 0)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, state.global_step + 1)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, state.global_step)
        # Before the checkpoint, not after it: a kill between the two would leave a hole that no resume fills. All processes
        # have written when rank 0 completes it, since the Trainer sums their counters first.
        if control.should_save or self._rows >= self.max_rows:
            self._close()

    def on_evaluate(self, args, state, control, **kwargs):
        self._close()  # save_strategy="best" decides now

    def on_save(self, args, state, control, **kwargs):
        self._close()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._close()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._close()
        extract_model_from_parallel(model).watch = False

    def _collect(self, model: Any, step: int) -> None:
        """Copies of the figures of the last batch, on its device: nothing waits for them. CUDA graphs write over the originals."""
        seen = extract_model_from_parallel(model).seen  # type: ignore[attr-defined]
        seen = {name: value.to(SMALL.get(name, value.dtype), copy=True) for name, value in seen.items()}
        self._waiting.append((step, seen))
        self._rows += len(seen["index"])
        if len(self._waiting) >= 100:
            self._fetch()

    def _fetch(self) -> None:
        """Bring the figures that wait on the device to the host."""
        if not self._waiting:
            return
        steps, batches = zip(*self._waiting, strict=True)
        part = {name: torch.cat([batch[name] for batch in batches]).cpu().numpy() for name in batches[0]}
        part["step"] = np.repeat(np.array(steps, np.int32), [len(batch["index"]) for batch in batches])
        self._parts.append(part)
        self._waiting = []

    def _close(self) -> None:
        """Write what there is as one segment."""
        self._fetch()
        if not self._parts:
            return
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        columns = {"epoch": np.full(self._rows, self._epoch, np.int16)}
        columns |= {name: whole[name] for name in ("step", "index", "label")}
        for k in range(whole["pred"].shape[1]):
            columns |= {f"{name}_{peer_name(k)}": values[:, k] for name, values in whole.items() if values.ndim == 2}
        _write(pa.table(columns), self.path / f"step-{whole['step'][-1]:08d}-rank-{self.rank}.parquet")
        self._clear()


def _write(table: pa.Table, path: Path) -> None:
    part = path.with_suffix(f".{uuid4().hex}.part")  # two hosts may cut the same segment
    # a dictionary of what hardly repeats would cost more than it saves
    repeat = [f.name for f in table.schema if f.name != "index" and not pa.types.is_float16(f.type)]
    pq.write_table(table, part, compression="zstd", use_dictionary=repeat)
    part.replace(path)  # whole or not at all


def _drop_after(folder: Path, step: int) -> None:
    """Remove the visits of later steps, and what a killed process left half written."""
    for path in folder.glob("*.part"):
        path.unlink(missing_ok=True)
    late = [path for path in sorted(folder.glob(SEGMENTS)) if int(path.name.split("-")[1]) > step]
    for path in late:
        with contextlib.suppress(FileNotFoundError):  # another host was quicker
            kept = pq.read_table(path, filters=pc.field("step") <= step)
            if len(kept):
                _write(kept, path.with_name(f"step-{pc.max(kept['step']).as_py():08d}-{path.name.split('-', 2)[2]}"))
            path.unlink()
    if late:
        logger.warning(f"{folder}: the {len(late)} segments of training dynamics with steps after {step} are removed, since these "
                       "steps are trained again; for a run of its own choose another output_dir or folder")  # fmt: skip


def read_dynamics(folder: str | Path) -> Dataset:
    """All visits as a ``datasets.Dataset`` in memory, in no promised order; also of a run that is still going.

    It takes 24 bytes a visit with two networks. :func:`summarise` reads the folder an epoch at a time.
    """
    return Dataset(_segments(folder).to_table())


def _segments(folder: str | Path) -> pads.Dataset:
    paths = sorted(Path(folder).glob(SEGMENTS))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no training dynamics: expected {SEGMENTS}, as DynamicsCallback writes them to "
                                "output_dir/dynamics at the end of an epoch and before a checkpoint")  # fmt: skip
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

    visits, label, p_label, forgotten = np.zeros(n, np.int64), np.full(n, -1), np.zeros(n), np.zeros(n)
    selected, right_before = np.zeros((n, len(peers))), np.zeros((n, len(peers)), bool)
    keys, votes = np.empty(0, np.int64), np.empty(0)  # index · 2^32 + class, sorted, and the sum of conf
    for epoch in tqdm(epochs, desc="dynamics", unit="epoch", disable=None):
        table = source.to_table(filter=pc.field("epoch") == epoch)
        seen = {name: table[name].to_numpy() for name in table.column_names}
        known = np.all([np.isfinite(seen[f"conf_{peer}"]) for peer in peers], axis=0)
        order = np.lexsort((seen["step"], seen["index"]))  # visits of a sample stand together, in time
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
    order = np.lexsort((-pred, votes, index))  # the last of a sample has most votes, of equals the first class
    best = order[np.diff(index[order], append=n) > 0]
    proposed, confidence = np.full(n, -1), np.zeros(n)
    proposed[index[best]], confidence[index[best]] = pred[best], votes[best]
    count = np.where(visits, visits, np.nan)  # so that 0 visits give NaN
    summary = {"index": np.arange(n), "label": label, "visits": visits, "p_label": p_label / (count * len(peers))}
    summary |= {"proposed": proposed, "confidence": confidence / (count * len(peers))}
    summary |= {"forgetting": np.where(visits, forgotten / len(peers), np.nan)}
    return summary | ({"selected": selected / count[:, None]} if selects else {})
