"""Logits of frozen teachers for a training set, computed once and kept on disk.

>>> train = cache_teachers(train, [teacher], "runs/cache", student=student)  # doctest: +SKIP
>>> loss = 0.1 * CE() + 0.9 * KD()  # doctest: +SKIP
>>> MutualDistillationTrainer(student, loss, args, train_dataset=train).train()  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..losses.state import eval_mode
from ..models.factory import class_count, logits_of
from ..models.input_config import normalization_of
from ..models.inputs import InputAdapter
from .cache_files import PARTS, CacheFiles
from .cache_key import data_key, teacher_key, transform_key, transform_text
from .image_view import ImageView
from .ranks import gather, on_first, rank_and_world


class TeacherCache(torch.utils.data.Dataset):
    """An `ImageView` whose items also hold `teacher` [T, C]; made by `cache_teachers`.

    All else is the view's: `labels`, `class_names`, `set_epoch`, `broken`, ... Each worker opens
    the file itself.

    Attributes:
        view: the view.
        teacher_logits: float32 [N, T, C], a memory map.
    """

    def __init__(self, view: ImageView, path: Path) -> None:
        self.view, self.path = view, path
        self.teacher_logits: np.ndarray = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.view[index]
        # By position, not by the item's index: that of a broken picture is another row, as it was
        # when the logits were computed.
        return item | {"teacher": torch.from_numpy(np.array(self.teacher_logits[index]))}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # DataLoader asks for __getitems__: the view's has no teachers
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.view, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "teacher_logits"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.teacher_logits = np.load(self.path, mmap_mode="r")


def cache_teachers(
    view: ImageView,
    teachers: Sequence[nn.Module],
    folder: str | os.PathLike,
    *,
    student: nn.Module | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
) -> TeacherCache:
    """The view with the teachers' logits from `folder`; missing ones are computed first.

    For data whose pixels are the same in every epoch. The files belong to these pictures in this
    order, this transform, these teachers and this dtype: a folder with anything else is refused.
    Labels may differ. Logits that were computed before a run was killed are kept. They take
    N * T * C * 4 bytes: 5.1 GB for each teacher on ImageNet.

    Teachers run in eval mode, without gradients, on the device where they are: move them first. On
    several processes each computes its share: call it after `MutualTrainingArguments(...)`, which
    starts the process group. Do not use a collator that changes pixels (Mixup): the teachers have
    seen others.

    Args:
        view: the training data.
        teachers: trained networks, pixels -> logits [B, C]. A network is taken for the same if its
            weights, buffers, printed modules and normalisation are; other attributes are not seen.
        folder: for this cache alone, seen by all processes; created if needed.
        student: the first network of the Trainer, for which the pixels are normalised. They are
            normalised again (`pretrained_cfg`) and resized for each teacher, as in the Trainer.
            Without a student they are only resized.
        batch_size: of the teachers.
        num_workers: processes that read pictures.
        dtype: of autocast, `torch.bfloat16` for a run with `bf16=True`; by default there is none.

    Raises:
        ValueError: a random transform, or a folder with other logits; the error says which.
        OSError: the folder cannot be written, or has too little space.
    """
    teachers, folder = list(teachers), Path(os.path.abspath(folder))
    _refuse_arguments(view, teachers, dtype)
    rank, world = rank_and_world()
    transform = transform_key(view)  # first, since it is cheap beside reading all pictures
    with eval_mode(*teachers):
        networks = _with_inputs(view, teachers, student, dtype)
        classes = _count_classes(view, networks)
        key = {
            "transform": transform,
            "teachers": [network.key for network in networks],
            "dtype": str(dtype),
            "classes": classes,
            "hint": transform_text(view),
        }
        _refuse_differing(gather(key, world))
        files = CacheFiles(folder, (len(view), len(teachers), classes))
        starts = on_first(lambda: files.claim({"data": data_key(view)} | key, batch_size), world)
        blocks = [range(k, min(k + batch_size, len(view))) for k in starts[rank::world]]
        _compute(view, networks, files, blocks, num_workers, show=rank == 0)
    if world > 1:
        dist.barrier()
    return TeacherCache(view, files.logits)


class _Teacher:
    """A frozen network with its input adapter and its autocast."""

    def __init__(
        self, network: nn.Module, adapter: InputAdapter, key: str, dtype: torch.dtype | None
    ) -> None:
        self.network, self.key, self.dtype = network, key, dtype
        self.parameter = next(network.parameters(), None)
        self.device = torch.device("cpu") if self.parameter is None else self.parameter.device
        self.adapter = adapter.to(self.device)

    def logits(self, pixels: Tensor) -> Tensor:
        """The logits of a batch as in the Trainer: float32 [B, C]."""
        dtype = pixels.dtype if self.parameter is None else self.parameter.dtype
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            pixels = self.adapter(pixels.to(self.device))
            return logits_of(self.network(pixels.to(dtype))).float()


def _with_inputs(
    view: ImageView,
    teachers: list[nn.Module],
    student: nn.Module | None,
    dtype: torch.dtype | None,
) -> list[_Teacher]:
    given = None if student is None else normalization_of([view], [student, *teachers])
    networks = []
    for teacher in teachers:
        adapter = InputAdapter(teacher, teacher if student is None else student, given)
        key = teacher_key(teacher, None if student is None else adapter.reference)
        networks.append(_Teacher(teacher, adapter, key, dtype))
    return networks


def _count_classes(view: ImageView, networks: list[_Teacher]) -> int:
    """The number of classes, the same for all teachers. One that does not tell is asked."""
    pixels = torch.as_tensor(view[0]["pixel_values"])[None]
    counts = [class_count(n.network) or n.logits(pixels).shape[-1] for n in networks]
    if len(set(counts)) > 1:
        raise ValueError(
            f"the teachers have different numbers of classes: {counts}; they cannot teach together"
        )
    return counts[0]


def _compute(
    view: ImageView,
    teachers: list[_Teacher],
    files: CacheFiles,
    blocks: list[range],
    num_workers: int,
    show: bool,
) -> None:
    """Compute and store the logits of some blocks of rows."""
    if not blocks:
        return
    loader = DataLoader(
        view,
        batch_sampler=blocks,  # type: ignore[arg-type]
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one stays as it is
    )
    bar = tqdm(loader, "teacher logits", leave=False, disable=None if show else True)
    for rows, batch in zip(blocks, bar, strict=True):
        logits = [teacher.logits(batch["pixel_values"]).cpu() for teacher in teachers]
        for k, values in enumerate(logits):
            expected = [len(rows), files.shape[2]]
            if list(values.shape) != expected:
                raise ValueError(
                    f"teacher {k} gave logits {list(values.shape)}, expected {expected}"
                )
            if values.isnan().any():
                raise ValueError(
                    f"teacher {k} gave NaN for rows {rows.start} to {rows.stop - 1}, which the "
                    f"cache would keep: check its weights, and dtype={teachers[k].dtype}"
                )
        files.write(rows.start, torch.stack(logits, dim=1).numpy())


def _refuse_arguments(
    view: ImageView, teachers: list[nn.Module], dtype: torch.dtype | None
) -> None:
    if not isinstance(view, ImageView):
        raise TypeError(
            f"the view must be an ImageView, got {type(view).__name__}: choose rows in the data "
            "set below it"
        )
    if not teachers:
        raise ValueError("there are no teachers: nothing to cache")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={dtype}: expected torch.bfloat16, torch.float16 or None (no autocast)"
        )


def _refuse_differing(keys: list[dict[str, Any]]) -> None:
    """Refuse processes that would write into one cache for different things."""
    if other := [part for part in PARTS[1:] if any(key[part] != keys[0][part] for key in keys)]:
        values = [{part: key[part] for part in other} for key in keys]
        raise ValueError(
            f"the processes differ in {', '.join(other)}: {values}; they would mix their logits in "
            "one cache"
        )
