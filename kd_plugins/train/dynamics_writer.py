"""Collect what networks predict for the samples of each batch, and write it to files."""

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
from torch import Tensor
from torch.utils.data import Dataset
from transformers.utils import logging

from ..audit.dynamics import SEGMENT
from ..losses.base import peer_name

logger = logging.get_logger(__name__)

UNFINISHED = re.compile(r"step-\d+-rank-\d+\.[0-9a-f]+\.part")
WAITING = 100  # batches whose figures stay on the device


class DynamicsWriter:
    """The visits of one process: in memory, until :meth:`write` makes a file of them.

    Args:
        folder: where to write.
        rank: of the process.
        step: the optimizer step at which the training starts.
        clean: remove the visits of later steps; one process of each host does so.
    """

    def __init__(self, folder: str | Path, rank: int, step: int, clean: bool) -> None:
        self.path, self.rank = Path(folder), rank
        self.path.mkdir(parents=True, exist_ok=True)
        if clean:
            _drop_after(self.path, step)
        self._clear()

    def _clear(self) -> None:
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []  # (step, figures), on the device
        self._parts: list[dict[str, np.ndarray]] = []  # on the host
        self.rows = 0

    def add(self, step: int, figures: dict[str, Tensor]) -> None:
        """Keep the figures of a batch on its device, so that nothing waits for them."""
        self._waiting.append((step, figures))
        self.rows += len(figures["index"])
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

    def write(self, epoch: int) -> None:
        """Write all visits in memory to one file."""
        self._fetch()
        if not self._parts:
            return
        whole = {name: np.concatenate([p[name] for p in self._parts]) for name in self._parts[0]}
        columns = {"epoch": np.full(self.rows, epoch, np.int16)}
        columns |= {name: whole[name] for name in ("step", "index", "label")}
        for k in range(whole["pred"].shape[1]):
            for name in [name for name, values in whole.items() if values.ndim == 2]:
                columns[f"{name}_{peer_name(k)}"] = whole[name][:, k]
        name = f"step-{whole['step'][-1]:08d}-rank-{self.rank}.parquet"
        _write_whole(pa.table(columns), self.path / name)
        self._clear()


class NumberedRows(Dataset):
    """A data set for timm's loader whose targets also carry the row: row * num_classes + label.

    ``StatefulClassificationTask(..., dynamics=FOLDER)`` takes them apart. Mixup cannot read them.

    Args:
        dataset: with (picture, label) as rows, such as timm's ``create_dataset`` makes. Its
            ``transform`` is set through this one, as ``create_loader`` does.
        num_classes: C.
    """

    def __init__(self, dataset: Any, num_classes: int) -> None:
        self.dataset, self.num_classes = dataset, num_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        picture, label = self.dataset[row]
        return picture, row * self.num_classes + int(label)

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


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
