"""Callbacks for the Hugging Face Trainer."""

from __future__ import annotations

import re
from typing import Any

from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback as TrainerBar

from ..losses.base import Loss
from ..losses.gradients import _rate, mask_noncritical_
from ..models.hosted import Hosted
from .run_folder import _checkpoint


class ProgressCallback(TrainerCallback):
    """Tell a loss how far training is, and a seeded view which epoch it is; keep the loss's state in the checkpoints.

    For a plain ``Trainer``; ``MutualDistillationTrainer`` brings its own. The loss is saved as ``loss.safetensors`` in each
    checkpoint and restored when training resumes from one in ``args.output_dir``.
    """

    def __init__(self, loss: Loss, *, save: bool = True) -> None:
        self.loss, self.save = loss, save

    def on_train_begin(self, args, state, control, **kwargs):
        if not (self.save and state.global_step and self.loss.state_dict()):
            return
        path = _checkpoint(args, state) / "loss.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the loss would start with empty state; resume from a checkpoint in "
                f"{args.output_dir} that has it"
            )
        self.loss.load_state_dict(load_file(path))

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset: Any = getattr(train_dataloader, "dataset", None)
        if hasattr(
            dataset, "set_epoch"
        ):  # accelerate sets the sampler's epoch or the data set's, never both
            dataset.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.set_progress(min(state.global_step / state.max_steps, 1.0))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        if isinstance(hosted, Hosted):
            hosted.average()

    def on_save(self, args, state, control, **kwargs):
        if self.save and args.should_save and self.loss.state_dict():
            save_file(
                {k: v.contiguous() for k, v in self.loss.state_dict().items()},
                _checkpoint(args, state) / "loss.safetensors",
            )


class CDRCallback(TrainerCallback):
    """CDR in a Trainer, for each network by itself: see :func:`kd_plugins.losses.gradients.mask_noncritical_`.

    It acts where the gradient is complete: accumulated, averaged over the processes and clipped, just before the step.

    Args:
        noise_rate: tau, the share of wrong labels, in [0, 1).

    >>> Trainer(vit, args, train_dataset=train, callbacks=[CDRCallback(noise_rate=0.4)])  # doctest: +SKIP
    """

    def __init__(self, noise_rate: float) -> None:
        self.noise_rate = _rate(noise_rate)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = extract_model_from_parallel(model)
        for network in model.peers if isinstance(model, Hosted) else [model]:
            mask_noncritical_(network.parameters(), self.noise_rate)


class _ShortBar(TrainerBar):
    """The Trainer's bar; of thirty figures it prints the few that fit a line. The log keeps them all."""

    shown = re.compile(
        r"loss|learning_rate|chi|selected_.|right_.|epoch|train_(loss|runtime)|"
        r"(eval_)(.*_)?(loss|accuracy|accuracy_ensemble|memorised)"
    )

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(
            args,
            state,
            control,
            logs={k: v for k, v in logs.items() if self.shown.fullmatch(k)},
            **kwargs,
        )
