"""Tasks for timm's own training loop: losses with state, and networks that teach each other."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from ..losses import validate
from ..losses.base import Loss
from ..models.factory import class_count, logits_of, make_model, make_teacher, network_list
from ..models.hosted import PeerModule, weights_dtype
from .checks import refuse_pairing
from .dynamics_writer import DynamicsWriter, batch_figures
from .sizes import bind_sizes

try:
    from timm.task import ClassificationTask
    from timm.task import resume_task_checkpoint as _resume  # noqa: F401  came with get_task_state
except ImportError as error:
    raise ImportError(
        f"{__name__} needs timm.task with get_task_state, which keeps the state of a loss in the "
        f"checkpoint: timm >= 1.0.27. timm {timm.__version__} is installed ({timm.__file__}): "
        f"{error}"
    ) from error

MAX_ROWS = 1_000_000  # visits that a process keeps in memory


class StatefulClassificationTask(ClassificationTask):
    """timm's ``ClassificationTask`` for a kd_plugins loss, whose state is in timm's checkpoints.

    The checkpoint holds the network as timm's own does, and the loss as ``task_state``;
    ``--resume`` restores both. Parameters of the loss (T-revision's dT) are in
    :meth:`get_trainable_module`, from which timm's script makes its optimizer. EMA averages the
    network, not the loss.

    Args:
        model: the network.
        criterion: a loss for one network. A loss that reads ``index`` is refused: timm's loaders do
            not pass it on.
        teachers: trained networks for a loss that reads them: modules, or what
            :func:`kd_plugins.models.make_teacher` takes.
        total_updates: optimizer steps of the whole training, for a loss with a schedule. Without
            it, call ``task.criterion.set_progress(step / total)`` before each step.
        num_samples: rows of the training data, for a loss that averages over them (MyLC).
        dynamics: folder for training dynamics, as ``DynamicsCallback`` writes them: before a
            checkpoint and at each evaluation. The training data have to be ``NumberedRows``.
        device: as for timm's task.
        dtype: of the networks.
        verbose: as for timm's task.

    Notes:
        timm's loop calls :meth:`update_ema` after every update, with EMA or without. The progress
        of the loss is set there. It calls ``train()`` once an epoch, which counts the epochs of the
        dynamics.
    """

    criterion: Any
    trainable_module: Any

    def __init__(
        self,
        model: nn.Module | Sequence[str | nn.Module],
        criterion: Loss,
        *,
        teachers: str | Path | nn.Module | Sequence[str | Path | nn.Module] = (),
        total_updates: int | None = None,
        num_samples: int | None = None,
        dynamics: str | Path | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if total_updates is not None:
            validate.count("total_updates", total_updates, "it counts the optimizer steps")
        models: list[Any] = network_list(model)
        num_classes = class_count(models[0])
        peers = [_like(models[0], m, num_classes) if isinstance(m, str) else m for m in models]
        networks = [make_teacher(teacher, num_classes) for teacher in network_list(teachers)]
        refuse_pairing(peers, networks, criterion)
        if "index" in criterion.required_inputs:
            raise ValueError(
                f"{type(criterion).__name__} reads index, the position of a sample in the data, "
                "and timm's loaders do not pass it on: train it with MutualDistillationTrainer"
            )
        bind_sizes(criterion, peers, networks, num_samples)
        for network in (*peers, *networks):
            network.to(device=device, dtype=dtype)
        hosted = _Trainable(peers, criterion, networks).to(device=device)
        super().__init__(hosted, criterion, device=device, dtype=dtype, verbose=verbose)
        self.eval_model: Any = peers[0] if len(peers) == 1 else Ensemble(hosted)
        self.total_updates, self.updates = total_updates, 0
        self._dynamics = None if dynamics is None else _Dynamics(dynamics, hosted, num_classes)
        self._set_updates(0)

    @property
    def hosted(self) -> _Trainable:
        """The module that timm trains, without the wrappers of DDP and torch.compile."""
        return unwrap_model(self.trainable_module)

    @property
    def peers(self) -> list[nn.Module]:
        """The networks that learn. :func:`kd_plugins.models.export` saves one of them."""
        return list(self.hosted.peers)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``{"loss", "output" [B, C]}`` and the diagnostics; in eval mode plain cross-entropy."""
        if not self.hosted.training:
            output = logits_of(self.eval_model(input))
            return {"loss": F.cross_entropy(output.float(), target), "output": output}
        if self._dynamics is not None:
            rows, target = self._dynamics.take_apart(target)
        loss = self.trainable_module(input, target)["loss"]
        if self._dynamics is not None:
            self._dynamics.collect(rows, self.updates)
        logits = self.hosted.last["logits"]
        output = logits[0] if len(logits) == 1 else _mean_log_probs(logits)
        # a clone: timm's loop divides the loss in place when it accumulates
        return {**self.hosted.stats, "loss": loss.clone(), "output": output}

    def _set_updates(self, updates: int) -> None:
        self.updates = updates
        if self.total_updates is not None:
            self.criterion.set_progress(min(updates / self.total_updates, 1.0))

    def update_ema(self, step: int | None = None) -> None:
        """Set the progress and update all averages, after update number ``step`` of the weights."""
        self._set_updates(self.updates + 1 if step is None else step)
        self.hosted.average()
        if self.has_ema():
            self.trainable_module_ema.update(unwrap_model(self.eval_model), step=step)

    def setup_ema(
        self,
        decay: float = 0.9999,
        use_warmup: bool = False,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        network = unwrap_model(self.eval_model)
        self.trainable_module_ema = ModelEmaV3(
            network, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return self.trainable_module_ema

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> Any:
        options: Any = {"backend": backend, "mode": mode, **compile_kwargs}
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.eval_model = torch.compile(self.eval_model, **options)
        return self.eval_model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All parameters. Without heads: as in timm, the last two of a network are left out."""
        own = [list(peer.parameters())[: -2 if exclude_head else None] for peer in self.peers]
        return [*(p for parameters in own for p in parameters), *self.criterion.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        if ema:
            return {}
        state = self.hosted.state_dict()
        loss = {name: value for name, value in state.items() if not name.startswith("peers.")}
        if self._dynamics is None:
            return {"loss": loss, "updates": self.updates}
        self._dynamics.write()
        return {"loss": loss, "updates": self.updates, "epochs": self.hosted.epochs}

    if hasattr(ClassificationTask, "create_evaluator"):  # from timm 1.0.31 on

        def create_evaluator(self, **kwargs: Any) -> Any:
            if self._dynamics is not None:  # all processes evaluate before one saves
                self._dynamics.write()
            return super().create_evaluator(**kwargs)

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if ema:
            return
        own, given = self.get_task_state()["loss"], (state or {}).get("loss", {})
        if strict and own.keys() != given.keys():
            raise ValueError(
                f"the checkpoint holds no state of this loss, {type(self.criterion).__name__}: of "
                f"its {sorted(own)} it has {sorted(given)}; the loss would start with empty state. "
                "Resume a run of the same task and loss, or begin with --initial-checkpoint"
            )
        self.hosted.load_state_dict(given, strict=False)
        self._set_updates((state or {}).get("updates", 0))
        self.hosted.epochs = (state or {}).get("epochs", 0)


class MutualDistillationTask(StatefulClassificationTask):
    """Networks that teach each other, in timm's loop: ``MutualDistillationTask([a, b], SMKD())``.

    ``output`` is the networks' :class:`Ensemble`. So is what timm evaluates, averages (EMA) and
    saves as ``state_dict``. Pixels come as the first network takes them; the others get them
    normalised again and resized, as their ``pretrained_cfg`` says.

    Args:
        models: the networks. A name makes a network like the first: the same number of classes,
            device, dtype, memory format, gradient checkpointing and synchronised BatchNorm.
        criterion: a loss for as many networks (``num_peers``).
        **kwargs: of :class:`StatefulClassificationTask`.
    """

    def __init__(self, models: Sequence[str | nn.Module], criterion: Loss, **kwargs: Any) -> None:
        super().__init__(models, criterion, **kwargs)


class Ensemble(nn.Module):
    """Pixels as the first network takes them -> log of the networks' mean probability [B, C]."""

    def __init__(self, hosted: PeerModule) -> None:
        super().__init__()
        self.peers: Any = hosted.peers
        self.inputs: Any = hosted.inputs[: len(hosted.peers)]  # type: ignore[misc]

    def forward(self, input: Tensor) -> Tensor:
        logits = []
        for peer, adapter in zip(self.peers, self.inputs, strict=True):
            pixels = adapter(input).to(weights_dtype(peer, input))
            logits.append(logits_of(peer(pixels)))
        return _mean_log_probs(logits)


class _Trainable(PeerModule):
    """Networks and loss, with the methods that timm's optimizer factory asks a network for.

    Attributes:
        epochs: how often ``train()`` was called.
    """

    epochs = 0

    def train(self, mode: bool = True) -> Any:
        self.epochs += mode
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        named = [(k, peer) for k, peer in enumerate(self.peers) if hasattr(peer, "no_weight_decay")]
        return {f"peers.{k}.{name}" for k, peer in named for name in peer.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Layers for layer-wise decay: per network, all last layers and the loss on one level."""
        layers = [_layers(peer, coarse) for peer in self.peers]
        depths = [max(own.values(), default=0) for own in layers]
        level = {
            f"peers.{k}.{name}": layer + max(depths) - depth
            for k, (own, depth) in enumerate(zip(layers, depths, strict=True))
            for name, layer in own.items()
        }
        return lambda name: level.get(name, max(depths))


class _Dynamics:
    """Training dynamics of a task.

    Args:
        folder: where to write.
        hosted: the module that is trained.
        num_classes: C, with which ``NumberedRows`` made the targets.
    """

    def __init__(self, folder: str | Path, hosted: _Trainable, num_classes: int | None) -> None:
        if num_classes is None:
            raise ValueError(
                "dynamics: the networks do not tell their number of classes, with which targets "
                "are taken apart into row and label; expected num_classes on the first network"
            )
        self.folder, self.hosted, self.num_classes = folder, hosted, num_classes
        self._writer: DynamicsWriter | None = None
        self._epochs = 0  # at the last batch

    def take_apart(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and labels of the targets of ``NumberedRows``."""
        if target.is_floating_point() or target.dim() != 1:
            raise ValueError(
                f"dynamics: expected targets of NumberedRows, integers [B], got {target.dtype} "
                f"{list(target.shape)}; Mixup and CutMix lose the row of a sample"
            )
        rows = torch.div(target, self.num_classes, rounding_mode="floor")
        if self._writer is None and len(rows) > 1 and not rows.any():  # at the first batch
            raise ValueError(
                f"dynamics: all targets of the first batch are below {self.num_classes}, so they "
                "name no rows: expected those of NumberedRows(dataset_train, num_classes)"
            )
        return rows, target - rows * self.num_classes

    def collect(self, rows: Tensor, updates: int) -> None:
        """Keep what the networks said in the last forward."""
        if self._writer is None:  # after a checkpoint was loaded
            rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
            self._writer = DynamicsWriter(self.folder, rank, updates, clean=local == 0)
        if self.hosted.epochs != self._epochs:
            self.write()
            self._epochs = self.hosted.epochs
        last = self.hosted.last | {"index": rows}
        selection = self.hosted.criterion.selection
        self._writer.add(updates + 1, batch_figures(**last, selection=selection))
        if self._writer.rows >= MAX_ROWS:
            self.write()

    def write(self) -> None:
        """Write the visits in memory."""
        if self._writer is not None:
            self._writer.write(max(self._epochs - 1, 0))


def _layers(peer: Any, coarse: bool) -> dict[str, int]:
    """Parameter name -> layer, if the network groups its parameters."""
    if not hasattr(peer, "group_matcher"):
        return {}
    return group_parameters(peer, peer.group_matcher(coarse=coarse), reverse=True)


def _mean_log_probs(logits: Sequence[Tensor]) -> Tensor:
    log_p = torch.stack([z.float().log_softmax(-1) for z in logits])
    return log_p.logsumexp(0) - math.log(len(logits))


def _like(first: Any, name: str, num_classes: int | None) -> nn.Module:
    """A network from a name, set up as timm's script has set up the first."""
    model = make_model(name, num_classes)
    if any(isinstance(module, nn.SyncBatchNorm) for module in first.modules()):
        model = convert_sync_batchnorm(model)
    if any(getattr(module, "grad_checkpointing", False) is True for module in first.modules()):
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    weights = [p for p in first.parameters() if p.dim() == 4 and not p.is_contiguous()]
    return model.to(memory_format=torch.channels_last) if weights else model
