"""Write training dynamics while a run trains: see :mod:`kd_plugins.audit.dynamics` for the columns."""

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

from ..losses.base import peer_name
from ..losses.mutual import Mutual
from ..models.hosted import PeerModule

logger = logging.get_logger(__name__)

OWN = re.compile(r"step-(?P<step>\d+)-rank-\d+\.(parquet|(?P<part>[0-9a-f]+\.part))")
SMALL = {"index": torch.int32, "conf": torch.float16, "p_label": torch.float16}


class DynamicsCallback(TrainerCallback):
    """Keep the dynamics of a run of ``MutualDistillationTrainer``: see :mod:`kd_plugins.audit.dynamics` for the columns.

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
        self._waiting: list[
            tuple[int, dict[str, Tensor]]
        ] = []  # (step, figures on the device) of the last batches
        self._parts: list[dict[str, np.ndarray]] = []  # what has come to the host
        self._rows = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        if not isinstance(hosted, PeerModule):
            raise TypeError(
                f"DynamicsCallback reads the networks of MutualDistillationTrainer, not {type(hosted).__name__}; one "
                "network and its loss train there too"
            )
        for module in hosted.modules():
            if isinstance(module, Mutual):
                module.watch = True
        self._clear()
        self.path = Path(self.folder or Path(args.output_dir) / "dynamics")
        self.rank = args.process_index
        self.path.mkdir(parents=True, exist_ok=True)
        if (
            args.local_process_index == 0
        ):  # the others write after the first step, and cannot finish it alone
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

    def on_train_end(self, args, state, control, **kwargs):
        self._close()

    def _collect(self, model: Any, step: int) -> None:
        """Copies of the figures of the last batch, on its device: nothing waits for them. CUDA graphs write over the originals."""
        hosted: Any = extract_model_from_parallel(model)
        seen = {
            name: value.to(SMALL.get(name, value.dtype), copy=True)
            for name, value in _figures(hosted.last, hosted.criterion.selection).items()
        }
        self._waiting.append((step, seen))
        self._rows += len(seen["index"])
        if len(self._waiting) >= 100:
            self._fetch()

    def _fetch(self) -> None:
        """Bring the figures that wait on the device to the host."""
        if not self._waiting:
            return
        steps, batches = zip(*self._waiting, strict=True)
        part = {
            name: torch.cat([batch[name] for batch in batches]).cpu().numpy() for name in batches[0]
        }
        part["step"] = np.repeat(
            np.array(steps, np.int32), [len(batch["index"]) for batch in batches]
        )
        self._parts.append(part)
        self._waiting = []

    def _close(self) -> None:
        """Write what there is as one segment."""
        self._fetch()
        if not self._parts:
            return
        whole = {
            name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]
        }
        columns = {"epoch": np.full(self._rows, self._epoch, np.int16)}
        columns |= {name: whole[name] for name in ("step", "index", "label")}
        for k in range(whole["pred"].shape[1]):
            columns |= {
                f"{name}_{peer_name(k)}": values[:, k]
                for name, values in whole.items()
                if values.ndim == 2
            }
        _write(
            pa.table(columns), self.path / f"step-{whole['step'][-1]:08d}-rank-{self.rank}.parquet"
        )
        self._clear()


@torch.no_grad()
def _figures(last: dict[str, Any], selection: Any) -> dict[str, Tensor]:
    """What a step looked like, sample by sample.

    Index and label [B]; the predicted class, its probability and that of the label [B, K]; and
    whether the network teaches the sample [B, K], where the loss selects.
    """
    if last["index"] is None:
        raise ValueError(
            "training dynamics are kept by sample, and the batches have no index: expected rows with "
            "index, the position in the data set, as ImageView hands out; else nobody knows whose "
            "they are"
        )
    labels = last["labels"]
    label = (labels if labels.dim() == 1 else labels.argmax(-1)).long()
    p = torch.stack([z.float() for z in last["logits"]], dim=1).softmax(-1)  # [B, K, C]
    conf, pred = p.max(-1)
    p_label = p.gather(-1, label.view(-1, 1, 1).expand(-1, p.shape[1], 1)).squeeze(-1)
    small = torch.int16 if p.shape[-1] <= 2**15 else torch.int32
    figures = {"index": last["index"], "label": label.to(small), "pred": pred.to(small)}
    figures |= {"conf": conf, "p_label": p_label}
    if selection:
        figures["selected"] = torch.stack([mask for mask, _ in selection], dim=1)
    return figures


def _write(table: pa.Table, path: Path) -> None:
    part = path.with_suffix(f".{uuid4().hex}.part")  # two hosts may cut the same segment
    # a dictionary of what hardly repeats would cost more than it saves
    repeat = [f.name for f in table.schema if f.name != "index" and not pa.types.is_float16(f.type)]
    pq.write_table(table, part, compression="zstd", use_dictionary=repeat)
    part.replace(path)  # whole or not at all


def _drop_after(folder: Path, step: int) -> None:
    """Remove the visits of later steps, and what a killed process left half written."""
    late = []
    for path in sorted(folder.iterdir()):
        name = OWN.fullmatch(path.name)
        if name and name["part"]:
            path.unlink(missing_ok=True)
        elif name and int(name["step"]) > step:
            late.append(path)
    for path in late:
        with contextlib.suppress(FileNotFoundError):  # another host was quicker
            kept = pq.read_table(path, filters=pc.field("step") <= step)
            if len(kept):
                last = pc.max(kept["step"]).as_py()
                _write(kept, path.with_name(f"step-{last:08d}-{path.name.split('-', 2)[2]}"))
            path.unlink()
    if late:
        logger.warning(
            f"{folder}: removed {len(late)} segments of training dynamics with steps after {step}, "
            "because these steps are trained again. To keep them, choose another output_dir or folder"
        )
