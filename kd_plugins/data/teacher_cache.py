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
from torch import nn

from ..models.factory import logits_of, network_list
from .image_view import ImageView
from .labels import refuse_other_order
from .network_outputs import network_outputs


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
    teachers: nn.Module | Sequence[nn.Module],
    folder: str | os.PathLike,
    *,
    student: nn.Module | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
) -> TeacherCache:
    """The view with the teachers' logits from `folder`; missing ones are computed first.

    Use it for data whose pixels are the same in every epoch. The files belong to these pictures in
    this order, this transform, these teachers and this dtype: a folder with anything else is
    refused. Labels may differ. Logits that were computed before a run was killed are kept. They
    take N * T * C * 4 bytes: 5.1 GB for each teacher on ImageNet.

    Teachers run in eval mode, without gradients, on the device where they are: move them first. On
    several processes each computes its share: call it after `MutualTrainingArguments(...)`, which
    starts the process group. Do not use a collator that changes pixels (Mixup): the teachers have
    seen others.

    Args:
        view: the training data.
        teachers: trained networks, pixels -> logits [B, C]. Two networks count as
            the same if their weights, buffers, printed modules and normalisation are equal; other
            attributes are not compared.
        folder: for this cache alone, seen by all processes; created if needed.
        student: the first network of the Trainer, for which the pixels are normalised. They are
            normalised again (`pretrained_cfg`) and resized for each teacher, as in the Trainer.
            Without a student they are only resized.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        dtype: the dtype of autocast, `torch.bfloat16` for a run with `bf16=True`; by default
            there is no autocast.

    Raises:
        ValueError: a random transform, a folder with other logits, or a teacher whose classes are
            in another order; the error says which.
        OSError: the folder cannot be written, or has too little space.
    """
    networks = network_list(teachers)
    refuse_other_order({f"teacher {k}": teacher for k, teacher in enumerate(networks)}, view)
    files = network_outputs(
        view,
        networks,
        folder,
        "teacher",
        lambda teacher, pixels: logits_of(teacher(pixels)),
        first=student,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
    )
    return TeacherCache(view, files.values)
