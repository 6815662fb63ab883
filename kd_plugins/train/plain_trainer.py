"""A loss of kd_plugins in a plain Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from ..data.labels import refuse_other_order
from ..losses.base import Loss
from ..models.factory import class_count, input_names, logits_of, make_teacher, network_list
from ..models.hosted import PeerModule
from ..models.input_config import normalization_of, warn_of_inputs
from .callbacks import ScheduleCallback
from .check_arguments import refuse_untrained
from .checks import refuse_pairing, refuse_plain
from .run_folder import (
    LOSS,
    checkpoint_of,
    describe_run,
    refuse_damaged,
    refuse_other_run,
    write_run,
)
from .sizes import bind_sizes

OF_THE_LOSS = ("index", "teacher", "clean_labels")  # of a row, and for no network


def as_compute_loss_func(
    loss: Loss, teachers: str | Path | nn.Module | Sequence[str | Path | nn.Module] = ()
) -> Callable[..., Tensor]:
    """``compute_loss_func`` for a plain HF ``Trainer``.

    Without class weights the gradient is that of one batch, also under accumulation and on several
    processes.

    Args:
        loss: for one network. Add ``ProgressCallback(loss)`` for its schedule, its state and its
            sizes, and for what it reads beside logits and labels: ``index`` and the logits of
            teachers. A loss that reads features needs ``MutualDistillationTrainer``.
        teachers: trained networks, as ``MutualDistillationTrainer`` takes them. They run in eval
            mode and without gradients, in the precision of the run, on inputs that are normalised
            and resized for each.

    Raises:
        ValueError: a plain Trainer cannot give this loss what it reads.

    Notes:
        ``eval_loss`` is the loss itself, and plain cross-entropy for a loss that reads ``index`` or
        teachers.

    >>> kd = CE() + KD()  # doctest: +SKIP
    >>> ours = {"compute_loss_func": as_compute_loss_func(kd, [teacher])}  # doctest: +SKIP
    >>> Trainer(vit, args, callbacks=[ProgressCallback(kd)], **ours)  # doctest: +SKIP
    """
    return _ComputeLoss(loss, teachers)


class _ComputeLoss:
    """What ``as_compute_loss_func`` returns. ``ProgressCallback`` gives it network and batch."""

    def __init__(self, loss: Loss, teachers: Any) -> None:
        refuse_plain(loss)
        self.loss = loss
        self.teachers: list[Any] = network_list(
            teachers
        )  # modules, from the begin of a training on
        self.batch: dict[str, Any] = {}  # what the network was given in the last forward
        self._hosted: PeerModule | None = None
        self._autocast: torch.dtype | None = None
        _OF_LOSS[loss] = [ref(function) for function in (*_functions_of(loss), self)]

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if labels is None:
            raise ValueError(
                "the batch has no labels: rows need 'labels' (or 'label'), and "
                "remove_unused_columns must not drop them"
            )
        logits, loss = logits_of(outputs), self.loss
        if loss.required_inputs and not torch.is_grad_enabled():
            return F.cross_entropy(logits.float(), labels)
        loss.bind(num_classes=logits.shape[-1])
        # The Trainer does not switch the mode of the loss. Evaluation must not change its state.
        loss.train(torch.is_grad_enabled())
        if any(t.device != logits.device for t in (*loss.buffers(), *loss.parameters())):
            loss.to(logits.device)
        value = loss(logits, labels, **self._read(logits.device))
        if num_items_in_batch is None or loss.reduction == "sum":
            return value
        # The Trainer adds up the values of all accumulation steps and processes. It counts the
        # items as (labels != -100).sum(): B for class indices [B], B * C for distributions [B, C].
        return value * (labels.numel() / num_items_in_batch)

    def begin(self, args: Any, network: nn.Module, data: Any) -> None:
        """Take network and teachers for a training; refuse what does not fit together."""
        loss = self.loss
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} has no effect beside "
                "compute_loss_func: use LabelSmoothing(eps)"
            )
        if not (loss.required_inputs or self.teachers):
            return
        if args.n_gpu > 1:
            raise RuntimeError(
                f"{args.n_gpu} GPUs are visible to one process: nn.DataParallel would give "
                f"{type(loss).__name__} a part of each batch. Start with `accelerate launch`, or "
                "set CUDA_VISIBLE_DEVICES=0"
            )
        self.teachers = [make_teacher(t, class_count(network)) for t in self.teachers]
        cached = getattr(data, "teacher_logits", None)
        refuse_pairing([network], self.teachers, loss, cached)
        refuse_other_order({f"teacher {k}": t for k, t in enumerate(self.teachers)}, data)
        if args.remove_unused_columns and ("index" in loss.required_inputs or cached is not None):
            raise ValueError(
                f"{type(loss).__name__} reads {', '.join(sorted(loss.required_inputs))} from the "
                "rows, and remove_unused_columns=True drops what the network does not read: "
                "TrainingArguments(remove_unused_columns=False)"
            )
        known = normalization_of([data], [network, *self.teachers])
        warn_of_inputs(self.teachers, network, known)
        self._hosted = PeerModule([network], loss, self.teachers, known)
        self._autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None

    def _read(self, device: torch.device) -> dict[str, Tensor]:
        """What the loss reads beside logits and labels, for the batch of the last forward."""
        name, required, batch = type(self.loss).__name__, self.loss.required_inputs, self.batch
        if not required:
            return {}
        if self._hosted is None:
            raise RuntimeError(
                f"{name} reads {', '.join(sorted(required))}, which a callback hands over: "
                "Trainer(..., callbacks=[ProgressCallback(loss)]) with this loss"
            )
        if "index" in required and "index" not in batch:
            raise ValueError(
                f"{name} reads index, and the batch has only {sorted(batch)}: the rows need their "
                "position in the data as 'index', as ImageView gives it"
            )
        read = {"index": batch["index"]} if "index" in required else {}
        if "teacher" in required and (cached := batch.get("teacher")) is not None:
            read["teacher"] = cached.transpose(0, 1)  # [B, T, C], as rows are collated
        elif "teacher" in required:
            read["teacher"] = self._ask(self._hosted, device)
        return read

    def _ask(self, hosted: PeerModule, device: torch.device) -> Tensor:
        for module in (hosted.inputs, *hosted.teachers):
            module.to(device)
        precision = torch.autocast(device.type, self._autocast) if self._autocast else nullcontext()
        try:
            with precision:
                return hosted.ask_teachers(self.batch)["teacher"]
        finally:
            hosted.teachers.release()


_OF_LOSS: WeakKeyDictionary[nn.Module, list[ref[_ComputeLoss]]] = WeakKeyDictionary()
_HOOKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # by the network that they watch


def _functions_of(loss: nn.Module) -> list[_ComputeLoss]:
    """What `as_compute_loss_func` has made of a loss, as far as it is in use, newest last."""
    found = [function() for function in _OF_LOSS.get(loss, [])]
    return [function for function in found if function is not None]


class ProgressCallback(ScheduleCallback, ExportableState):
    """Tell a loss how far training is; keep the state of the loss in the checkpoints.

    For a plain ``Trainer``; ``MutualDistillationTrainer`` brings its own. It also hands the loss
    what it reads of a row (``index``), which the network then does not see. Each checkpoint gets
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

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._watch(model)  # so that the network can be evaluated before it is trained

    def _watch(self, network: nn.Module) -> None:
        """Read along what the network is given, and keep from it what only the loss reads."""
        if (earlier := _HOOKS.pop(network, None)) is not None:  # perhaps of an earlier Trainer
            earlier.remove()
        self._hidden = {name for name in OF_THE_LOSS if name not in input_names(network)}
        _HOOKS[network] = network.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, network: nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
        for function in _functions_of(self.loss):  # several Trainers may share the loss
            function.batch = inputs
        return args, {name: value for name, value in inputs.items() if name not in self._hidden}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model)
        data = getattr(kwargs.get("train_dataloader"), "dataset", None)
        network = extract_model_from_parallel(model)
        self._watch(network)
        function = next(reversed(_functions_of(self.loss)), None)
        if function is not None:
            function.begin(args, network, data)
        bind_sizes(self.loss, [network], data=data)
        refuse_untrained(self.loss, kwargs.get("optimizer"))
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes new callbacks from JSON, and "
                "ProgressCallback holds a loss: leave it out"
            )
        # A checkpoint of a run without this callback does not know it, and the Trainer asks.
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        if not self.save:
            return
        teachers = function.teachers if function else ()
        run = describe_run(args, self.loss, [network], teachers, data)
        if state.global_step:
            self._resume(checkpoint_of(args, state), run)
        self._training = args, state, run

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
