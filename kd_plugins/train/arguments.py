"""Training arguments with the defaults of the papers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.utils import logging

from ..losses import validate

logger = logging.get_logger(__name__)


@dataclass
class MutualTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of the papers.

    SGD with momentum, weight decay on everything, a learning rate that falls in steps. The
    hyperparameters of a loss live in the loss.

    Args:
        milestones: shares of the training after which the learning rate is multiplied by
            ``lr_decay``. They are used with the default ``lr_scheduler_type``,
            ``"constant_with_warmup"``; another one, such as ``"cosine"`` or ``"constant"``,
            replaces them.
        lr_decay: the factor at each milestone.
        max_grad_norm: clips the gradient of each network by itself; 0 does not clip.
    """

    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    optim: str = "sgd"
    optim_args: str | None = "momentum=0.9"
    lr_scheduler_type: str = "constant_with_warmup"
    milestones: list[float] = field(
        default_factory=lambda: [0.3, 0.6, 0.8],
        metadata={"help": "Shares of the training after which the learning rate falls."},
    )
    lr_decay: float = field(
        default=0.2, metadata={"help": "Factor on the learning rate at each milestone."}
    )
    num_train_epochs: float = 100
    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 256
    max_grad_norm: float = 0.0
    logging_steps: float = 50
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False  # it would log a NaN loss as 0
    remove_unused_columns: bool = False  # the views make their columns on the fly
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else bf16 and a second process fail or run apart
        if self.use_cpu and self.fp16:
            logger.warning(
                "fp16=True: on a CPU accelerate trains in float32 all the same; bf16=True is mixed "
                "precision there"
            )
        if self.use_cpu and self.bf16 and torch.backends.cpu.get_cpu_capability() == "AVX2":
            logger.warning(
                "bf16=True: this CPU has no AVX-512, without which bfloat16 takes many times as "
                "long as float32; leave bf16 out"
            )
        rising = sorted(self.milestones) == list(self.milestones)
        inside = all(0 < m < 1 for m in self.milestones)
        validate.check(
            rising and inside, "milestones", self.milestones, "rising shares of training, in (0, 1)"
        )
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.use_cpu and several and not dist.is_initialized():
            # transformers does it too, but forgets ddp_timeout on CPUs: a process that is cut off
            # from the others would wait for half an hour
            timeout = timedelta(seconds=self.ddp_timeout)
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timeout)
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """As of transformers, but without the number that a CPU gets among several processes.

        torch < 2.14 cannot load a checkpoint to "cpu:0".
        """
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device
