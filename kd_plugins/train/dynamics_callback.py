"""Write training dynamics while a run trains: see :mod:`kd_plugins.audit.dynamics`."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..audit.dynamics import SEGMENT
from ..losses.base import peer_name
from ..models.hosted import PeerModule

logger = logging.get_logger(__name__)

UNFINISHED = re.compile(r"step-\d+-rank-\d+\.[0-9a-f]+\.part")
WAITING = 100  # batches whose figures stay on the device


class DynamicsCallback(TrainerCallback):
    """Write what each network predicts for each training sample, at each visit.

    It works with ``MutualDistillationTrainer``; :mod:`kd_plugins.audit.dynamics` lists the columns
    and reads them. Each process writes its own files: before a checkpoint, at the end of an epoch,
    and after ``max_rows`` visits. A file is complete or absent.

    A run that resumes at step s first removes the visits of later steps, because it trains them
    again. So each visit is stored once, also after a kill. A run from the start (s = 0) empties the
    folder of earlier dynamics; a warning says how many files it removed. Other files stay.

    Args:
        folder: where to write; ``output_dir/dynamics`` by default. Several hosts need no common
            disk. Each then has the files of its own processes.
        max_rows: visits that a process keeps in memory (about 25 bytes each).

    Raises:
        TypeError: another Trainer uses it.
        ValueError: the batches have no ``index``.
    """

    def __init__(self, folder: str | Path | None = None, max_rows: int = 1_000_000) -> None:
        self.folder, self.max_rows = folder, max_rows
        self._clear()

    def _clear(self) -> None:
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []  # (step, figures), on the device
        self._parts: list[dict[str, np.ndarray]] = []  # on the host
        self._rows = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        if not isinstance(hosted, PeerModule):
            raise TypeError(
                f"DynamicsCallback expects the model of MutualDistillationTrainer, got "
                f"{type(hosted).__name__}; that Trainer also trains one network with one loss"
            )
        self._clear()
        self.path = Path(self.folder or Path(args.output_dir) / "dynamics")
        self.rank = args.process_index
        self.path.mkdir(parents=True, exist_ok=True)
        # The other processes write only after the first step, which they cannot finish alone.
        if args.local_process_index == 0:
            _drop_after(self.path, state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch = int(state.epoch or 0)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, state.global_step + 1)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._collect(model, state.global_step)
        # A kill between the checkpoint and a later write would leave a gap that no resume fills.
        # All processes have written when rank 0 completes the checkpoint, because the Trainer sums
        # their counters first.
        if control.should_save or self._rows >= self.max_rows:
            self._write()

    def on_evaluate(self, args, state, control, **kwargs):
        self._write()  # save_strategy="best" decides now

    def on_save(self, args, state, control, **kwargs):
        self._write()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._write()

    def on_train_end(self, args, state, control, **kwargs):
        self._write()

    def _collect(self, model: Any, step: int) -> None:
        """Keep the figures of the last batch on its device, so that nothing waits for them."""
        hosted: Any = extract_model_from_parallel(model)
        figures = batch_figures(**hosted.last, selection=hosted.criterion.selection)
        self._waiting.append((step, figures))
        self._rows += len(figures["index"])
        if len(self._waiting) >= WAITING:
            self._fetch()

    def _fetch(self) -> None:
        """Bring the waiting figures to the host."""
        if not self._waiting:
            return
        steps, batches = zip(*self._waiting, strict=True)
        part = {name: torch.cat([b[name] for b in batches]).cpu().numpy() for name in batches[0]}
        part["step"] = np.repeat(np.array(steps, np.int32), [len(b["index"]) for b in batches])
        self._parts.append(part)
        self._waiting = []

    def _write(self) -> None:
        """Write all visits in memory to one file."""
        self._fetch()
        if not self._parts:
            return
        whole = {name: np.concatenate([p[name] for p in self._parts]) for name in self._parts[0]}
        columns = {"epoch": np.full(self._rows, self._epoch, np.int16)}
        columns |= {name: whole[name] for name in ("step", "index", "label")}
        for k in range(whole["pred"].shape[1]):
            for name in [name for name, values in whole.items() if values.ndim == 2]:
                columns[f"{name}_{peer_name(k)}"] = whole[name][:, k]
        name = f"step-{whole['step'][-1]:08d}-rank-{self.rank}.parquet"
        _write_whole(pa.table(columns), self.path / name)
        self._clear()


@torch.no_grad()
def batch_figures(
    logits: tuple[Tensor, ...], labels: Tensor, index: Tensor | None, selection: Any = None
) -> dict[str, Tensor]:
    """What training dynamics keep of a batch, in small types on its device.

    Args:
        logits: [B, C] of each of K networks.
        labels: class indices [B] or distributions [B, C], which count as their largest class.
        index: rows in the data set [B].
        selection: of the loss: for each network a mask [B] and its targets; or None.

    Returns:
        ``index`` and ``label`` [B]; ``pred``, ``conf``, ``p_label``, and ``selected`` if the loss
        selects, [B, K].
    """
    if index is None:
        raise ValueError(
            "the batches have no index: expected the row in the data set, as ImageView gives it; "
            "otherwise the training dynamics could not be assigned to samples"
        )
    label = labels if labels.dim() == 1 else labels.argmax(-1)
    p = torch.stack([z.float() for z in logits], dim=1).softmax(-1)  # [B, K, C]
    conf, pred = p.max(-1)
    p_label = p.gather(-1, label.long().view(-1, 1, 1).expand(-1, p.shape[1], 1)).squeeze(-1)
    small = torch.int16 if p.shape[-1] <= 2**15 else torch.int32
    # Copies: a collator may reuse the memory of a batch.
    figures = {
        "index": index.to(torch.int32, copy=True),
        "label": label.to(small, copy=True),
        "pred": pred.to(small),
        "conf": conf.half(),
        "p_label": p_label.half(),
    }
    if selection:
        figures["selected"] = torch.stack([mask for mask, _ in selection], dim=1)
    return figures


def _write_whole(table: pa.Table, path: Path) -> None:
    """Write a file that is complete or absent."""
    part = path.with_suffix(f".{uuid4().hex}.part")  # two hosts may write the same file
    # A dictionary of values that hardly repeat would cost more than it saves.
    repeat = [f.name for f in table.schema if f.name != "index" and not pa.types.is_float16(f.type)]
    pq.write_table(table, part, compression="zstd", use_dictionary=repeat)
    part.replace(path)


def _drop_after(folder: Path, step: int) -> None:
    """Remove the visits of later steps, and what a killed process left unfinished."""
    late = []
    for path in sorted(folder.iterdir()):
        segment = SEGMENT.fullmatch(path.name)
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)
        elif segment and int(segment["step"]) > step:
            late.append(path)
    for path in late:
        with contextlib.suppress(FileNotFoundError):  # another host was faster
            kept = pq.read_table(path, filters=pc.field("step") <= step)
            if len(kept):
                last = pc.max(kept["step"]).as_py()
                name = re.sub(r"step-\d+", f"step-{last:08d}", path.name)
                _write_whole(kept, path.with_name(name))
            path.unlink()
    if late:
        logger.warning(
            f"{folder}: removed {len(late)} segments of training dynamics with steps after {step}, "
            "because the run trains these steps again. To keep them, choose another output_dir or "
            "folder"
        )
