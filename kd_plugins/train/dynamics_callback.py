"""Write training dynamics while a run trains: see :mod:`kd_plugins.audit.dynamics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.labels import label_column
from ..data.subset import SubsetView, as_view
from ..models.factory import input_names, logits_of
from ..models.hosted import PeerModule
from .dynamics_writer import DynamicsWriter, batch_figures
from .plain_trainer import OF_THE_LOSS


class DynamicsCallback(TrainerCallback):
    """Write what each network predicts for each training sample, at each visit.

    It works with ``MutualDistillationTrainer`` and with the plain HF ``Trainer``;
    :mod:`kd_plugins.audit.dynamics` lists the columns and reads them. Each process writes its own
    files: before a checkpoint, at the end of an epoch, and after ``max_rows`` visits. A file is
    complete or absent.

    A run that resumes at step s first removes the visits of later steps, because it trains them
    again. So each visit is stored once, also after a kill. A run from the start (s = 0) empties the
    folder of earlier dynamics; a warning says how many files it removed. Other files stay.

    Args:
        folder: where to write; ``output_dir/dynamics`` by default. Several hosts need no common
            disk. Each then has the files of its own processes.
        max_rows: visits that a process keeps in memory (about 25 bytes each).

    Raises:
        ValueError: the batches have no ``index``.

    Notes:
        The plain Trainer keeps ``index`` in the batch only with
        ``TrainingArguments(remove_unused_columns=False)``. The network does not see it.
    """

    def __init__(self, folder: str | Path | None = None, max_rows: int = 1_000_000) -> None:
        self.folder, self.max_rows = folder, max_rows
        self._watch: _Watch | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if not isinstance(model, PeerModule):  # the network may be evaluated before it is trained
            self._watch = _Watch(model, None)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._hosted: Any = extract_model_from_parallel(model)
        if not isinstance(self._hosted, PeerModule):
            _refuse_plain(args)
        folder = Path(self.folder or Path(args.output_dir) / "dynamics")
        # The other processes write only after the first step, which they cannot finish alone.
        clean = args.local_process_index == 0
        self._writer = DynamicsWriter(folder, args.process_index, state.global_step, clean)
        self._epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if not isinstance(self._hosted, PeerModule):
            # Not before: other callbacks, too, watch the network from the begin of training on.
            if self._watch is not None:
                self._watch.remove()
            self._watch = _Watch(self._hosted, getattr(train_dataloader, "dataset", None))

    def on_substep_end(self, args, state, control, **kwargs):
        self._collect(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self._collect(state.global_step)
        # A kill between the checkpoint and a later write would leave a gap that no resume fills.
        # All processes have written when rank 0 completes the checkpoint, because the Trainer sums
        # their counters first.
        if control.should_save or self._writer.rows >= self.max_rows:
            self._write()

    def on_evaluate(self, args, state, control, **kwargs):
        self._write()  # save_strategy="best" decides now

    def on_save(self, args, state, control, **kwargs):
        self._write()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._write()
        self._epoch += 1  # of a stream without a length, state.epoch is a share of max_steps

    def on_train_end(self, args, state, control, **kwargs):
        self._write()

    def _collect(self, step: int) -> None:
        selection = None
        if isinstance(self._hosted, PeerModule):
            last, selection = self._hosted.last, self._hosted.criterion.selection
        else:
            assert self._watch is not None
            last = self._watch.last
        self._writer.add(step, batch_figures(**last, selection=selection))

    def _write(self) -> None:
        if hasattr(self, "_writer"):  # an evaluation before the training has none
            self._writer.write(self._epoch)


class _Watch:
    """Read along the batches and logits of a network, and keep from it what it does not know.

    Attributes:
        last: of the last training forward, as ``PeerModule.last``.
    """

    def __init__(self, network: nn.Module, data: Any) -> None:
        self.data, self.last = data, {}  # type: ignore[var-annotated]
        self._labels: Any = None
        self._batch: dict[str, Any] = {}
        self._hidden = {name for name in OF_THE_LOSS if name not in input_names(network)}
        # Read before other hooks take something away, and take away after all of them.
        self._handles = [
            network.register_forward_pre_hook(self._read, with_kwargs=True, prepend=True),
            network.register_forward_pre_hook(self._hide, with_kwargs=True),
            network.register_forward_hook(self._keep),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _read(self, network: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self._batch = inputs

    def _hide(self, network: nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
        return args, {name: value for name, value in inputs.items() if name not in self._hidden}

    def _keep(self, network: nn.Module, args: Any, output: Any) -> None:
        batch, self._batch = self._batch, {}
        if not (network.training and torch.is_grad_enabled()):
            return
        logits, index, labels = logits_of(output).detach(), batch.get("index"), batch.get("labels")
        if labels is None and index is not None:  # the Trainer gave them to the loss only
            labels = self._labels_of(index)
        self.last = {"logits": (logits,), "labels": labels, "index": index}

    def _labels_of(self, index: Tensor) -> Tensor:
        """The labels of some rows, as the data have them."""
        if self._labels is None:
            self._labels = torch.as_tensor(_all_labels(self.data))
        self._labels = self._labels.to(index.device)
        return self._labels[index.long()]


def _all_labels(data: Any) -> Any:
    """The labels of all rows that an ``index`` may name."""
    view = as_view(data)
    while isinstance(view, SubsetView):
        view = view.dataset
    if (labels := getattr(view, "labels", None)) is not None:
        return labels
    columns = getattr(view, "column_names", None) or view[0]
    return label_column(view, "labels" if "labels" in columns else "label")


def _refuse_plain(args: Any) -> None:
    if args.n_gpu > 1:
        raise RuntimeError(
            f"{args.n_gpu} GPUs are visible to one process: nn.DataParallel would show "
            "DynamicsCallback a part of each batch. Start with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if args.remove_unused_columns:
        raise ValueError(
            "DynamicsCallback reads index from the rows, and remove_unused_columns=True drops what "
            "the network does not read: TrainingArguments(remove_unused_columns=False)"
        )
