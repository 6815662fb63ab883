"""Callbacks for the Hugging Face Trainer."""

from __future__ import annotations

import re
from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from ..data import set_epoch
from ..losses import validate
from ..losses.base import Loss
from ..losses.gradients import mask_noncritical_
from ..models.hosted import PeerModule
from .checks import mark_used, refuse_used


class ScheduleCallback(TrainerCallback):
    """Tell the loss how far training is and the data their epoch; update averages over time.

    Args:
        loss: the loss to tell; by default that of the ``PeerModule`` that is trained.
    """

    def __init__(self, loss: Loss | None = None) -> None:
        self.loss: Any = loss

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        if isinstance(hosted, PeerModule):
            self.loss = hosted.criterion
        self._epoch = int(state.epoch or 0)
        if not state.global_step:  # a checkpoint replaces the state
            refuse_used(self.loss, control)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # accelerate sets the sampler's epoch or the data set's, never both
        set_epoch(getattr(train_dataloader, "dataset", None), self._epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._epoch += 1  # of a stream without a length, state.epoch is a share of max_steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.set_progress(min(state.global_step / state.max_steps, 1.0))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        mark_used(self.loss, control)
        hosted = extract_model_from_parallel(model)
        if isinstance(hosted, PeerModule):
            hosted.average()


class CDRCallback(TrainerCallback):
    """Use CDR in a Trainer, for each network by itself.

    See :func:`kd_plugins.losses.gradients.mask_noncritical_`. It acts on the complete gradient
    just before the step: accumulated, averaged over the processes and clipped.

    Args:
        noise_rate: tau, the share of wrong labels, in [0, 1).

    >>> Trainer(vit, args, callbacks=[CDRCallback(noise_rate=0.4)])  # doctest: +SKIP
    """

    def __init__(self, noise_rate: float) -> None:
        self.noise_rate = validate.fraction(
            "noise_rate", noise_rate, "at 1 no weight would learn", with_one=False
        )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = extract_model_from_parallel(model)
        for network in model.peers if isinstance(model, PeerModule) else [model]:
            mask_noncritical_(network.parameters(), self.noise_rate)


def short(progress: type[TrainerCallback]) -> type[TrainerCallback]:
    """The Trainer's progress bar, or its table in notebooks, with only as many figures as fit.

    The log keeps them all.
    """

    class Short(progress):  # type: ignore[valid-type, misc]
        def on_log(self, args, state, control, logs=None, **kwargs):
            super().on_log(args, state, control, logs=_few(logs), **kwargs)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            super().on_evaluate(args, state, control, metrics=_few(metrics), **kwargs)

    Short.__name__ = Short.__qualname__ = f"Short{progress.__name__}"
    return Short


FEW = re.compile(
    r"loss|learning_rate|threshold|selected_.|right_.|epoch|train_(loss|runtime)|"
    r"(eval_)(.*_)?(loss|accuracy|accuracy_ensemble|memorised)"
)


def _few(figures: dict[str, float] | None) -> dict[str, float]:
    return {name: value for name, value in (figures or {}).items() if FEW.fullmatch(name)}
