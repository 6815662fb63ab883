"""Callbacks for the Hugging Face Trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_callback import ProgressCallback as TrainerBar

from ..data import set_epoch
from ..losses.base import Loss
from ..losses.gradients import _rate, mask_noncritical_
from ..models.hosted import Hosted
from .checks import refuse_used
from .run_folder import (
    LOSS,
    checkpoint_of,
    describe_run,
    refuse_damaged,
    refuse_other_run,
    write_run,
)


class ScheduleCallback(TrainerCallback):
    """Tell a loss how far training is, and a seeded view which epoch it is."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def on_train_begin(self, args, state, control, **kwargs):
        refuse_used(self.loss, control, resumed=bool(state.global_step))

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # accelerate sets the sampler's epoch or the data set's, never both
        set_epoch(getattr(train_dataloader, "dataset", None), int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.set_progress(min(state.global_step / state.max_steps, 1.0))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        if isinstance(hosted, Hosted):
            hosted.average()


class ProgressCallback(ScheduleCallback, ExportableState):
    """Tell a loss how far training is; keep the state of the loss in the checkpoints.

    For a plain ``Trainer``; ``MutualDistillationTrainer`` brings its own. Each checkpoint gets
    ``run.json`` (what the run is) and ``loss.safetensors`` (where the loss has state). They are
    written before ``trainer_state.json``, which completes a checkpoint, and before older ones are
    deleted: a run that is killed at any moment can be resumed.

    Args:
        loss: the loss that ``as_compute_loss_func`` was given.
        save: whether to write and to read these files.

    Raises:
        ValueError (when a run resumes from a checkpoint in ``args.output_dir``): the checkpoint
            belongs to another run, or a file is missing or damaged.

    Notes:
        ``resume_from_checkpoint=True`` of the plain ``Trainer`` takes the newest folder, also one
        that a kill has left unfinished. :func:`~kd_plugins.train.last_checkpoint` does not. On
        several processes the Trainer may delete an old checkpoint before the others have written
        their part of the new one: keep at least two (``save_total_limit=2``).

    >>> trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))  # doctest: +SKIP
    """

    def __init__(self, loss: Loss, *, save: bool = True) -> None:
        super().__init__(loss)
        self.save = save
        self._training: tuple[Any, Any, dict[str, Any]] | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        super().on_train_begin(args, state, control)
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes new callbacks from JSON, and "
                "ProgressCallback holds a loss: leave it out"
            )
        # A checkpoint of a run without this callback does not know it, and the Trainer asks.
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        if not self.save:
            return
        data = getattr(train_dataloader, "dataset", None)
        run = describe_run(args, self.loss, [extract_model_from_parallel(model)], (), data)
        if state.global_step:
            self._resume(checkpoint_of(args, state), run)
        self._training = args, state, run

    def _resume(self, folder: Path, run: dict[str, Any]) -> None:
        if not folder.exists() and not self.loss.state_dict():
            return  # a checkpoint from elsewhere, and nothing to read from it
        refuse_other_run(folder, run)
        refuse_damaged(folder)
        if self.loss.state_dict():
            if not (folder / LOSS).exists():
                raise FileNotFoundError(
                    f"{folder / LOSS} is missing: the loss would start with empty state. Resume "
                    f"from a checkpoint in {folder.parent} that has it"
                )
            self.loss.load_state_dict(load_file(folder / LOSS))

    def on_train_end(self, args, state, control, **kwargs):
        self._training = None

    def state(self) -> dict[str, Any]:
        """Write the files of a checkpoint.

        The Trainer calls this on the main process when all else is written, just before it writes
        its own state. It has no other hook there: ``on_save`` comes after the old are deleted.
        """
        if self._training is not None and self.save:
            args, state, run = self._training
            if (folder := checkpoint_of(args, state)).is_dir():
                tensors = {k: v.contiguous() for k, v in self.loss.state_dict().items()}
                if tensors:
                    save_file(tensors, folder / LOSS)
                write_run(folder, run, args, *[LOSS] * bool(tensors))
        return {"args": {}, "attributes": {}}


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
