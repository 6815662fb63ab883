"""A loss of kd_plugins in a plain Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState

from ..losses.base import Loss
from ..models.factory import logits_of
from .callbacks import ScheduleCallback
from .checks import refuse_plain
from .run_folder import (
    LOSS,
    checkpoint_of,
    describe_run,
    refuse_damaged,
    refuse_other_run,
    write_run,
)
from .sizes import bind_sizes


def as_compute_loss_func(loss: Loss) -> Callable[..., Tensor]:
    """``compute_loss_func`` for a plain HF ``Trainer``.

    The gradient is that of one batch, also under accumulation and on several processes.

    Args:
        loss: for one network, without teachers, features or index. Add ``ProgressCallback(loss)``
            for its schedule, its state and its sizes.

    >>> ours = {"compute_loss_func": as_compute_loss_func(loss)}  # doctest: +SKIP
    >>> Trainer(vit, args, callbacks=[ProgressCallback(loss)], **ours)  # doctest: +SKIP
    """
    refuse_plain(loss)

    def compute_loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError(
                "the batch has no labels: rows need 'labels' (or 'label'), and "
                "remove_unused_columns must not drop them"
            )
        logits = logits_of(outputs)
        loss.bind(num_classes=logits.shape[-1])
        # The Trainer does not switch the mode of the loss. Evaluation must not change its state.
        loss.train(torch.is_grad_enabled())
        if any(t.device != logits.device for t in (*loss.buffers(), *loss.parameters())):
            loss.to(logits.device)
        value = loss(logits, labels)
        if num_items_in_batch is None or loss.reduction == "sum":
            return value
        # The Trainer adds up the values of all accumulation steps and processes. It counts the
        # items as (labels != -100).sum(): B for class indices [B], B * C for distributions [B, C].
        return value * (labels.numel() / num_items_in_batch)

    return compute_loss


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

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model)
        data = getattr(kwargs.get("train_dataloader"), "dataset", None)
        network = extract_model_from_parallel(model)
        bind_sizes(self.loss, [network], data=data)
        self._refuse_untrained(kwargs.get("optimizer"))
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes new callbacks from JSON, and "
                "ProgressCallback holds a loss: leave it out"
            )
        # A checkpoint of a run without this callback does not know it, and the Trainer asks.
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        if not self.save:
            return
        run = describe_run(args, self.loss, [network], (), data)
        if state.global_step:
            self._resume(checkpoint_of(args, state), run)
        self._training = args, state, run

    def _refuse_untrained(self, optimizer: Any) -> None:
        groups = getattr(optimizer, "param_groups", None) or []
        known = {id(p) for group in groups for p in group["params"]}
        named = [(name, p) for name, p in self.loss.named_parameters() if p.requires_grad]
        if open_ := [name for name, p in named if id(p) not in known]:
            raise ValueError(
                f"{type(self.loss).__name__} learns {', '.join(open_)}, and the optimizer of this "
                "Trainer has the network's parameters only: they would stay as they are. Use "
                "MutualDistillationTrainer, or pass optimizers=(optimizer, None) with them"
            )

    def _resume(self, folder: Path, run: dict[str, Any]) -> None:
        if folder.exists():
            refuse_damaged(folder)
            refuse_other_run(folder, run)
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
