"""timm's own training loop: a loss with state for one network, and networks that teach each other, as ``timm.task`` tasks."""

from __future__ import annotations

import math
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

from ..losses.base import Loss
from ..models.factory import class_count, logits_of, make_model, make_teacher
from ..models.hosted import Hosted
from .checks import refuse_pairing

try:
    from timm.task import ClassificationTask
    from timm.task import resume_task_checkpoint as _with_task_state  # noqa: F401  # as old as get_task_state, which it reads
except ImportError as error:
    raise ImportError(
        f"kd_plugins.train.timm needs timm >= 1.0.31, whose tasks keep state of their own in the checkpoint; found "
        f"timm {timm.__version__}"
    ) from error


class StatefulClassificationTask(ClassificationTask):
    """timm's ``ClassificationTask`` for a kd_plugins loss: its state (MyLC's r, tables) is saved, and restored by ``--resume``.

    The checkpoint holds the network as timm's own does, and the loss as ``task_state``. What a loss learns (T-revision's dT) is
    in :meth:`get_trainable_module`, from which timm's script makes its optimizer. The loss hears how far training is from
    :meth:`update_ema`, which timm's loop calls after every update, with EMA or without. EMA averages the network, not the loss.

    Args:
        model: the network.
        criterion: a loss for one network. A loss that reads ``index`` is refused: timm's loaders do not hand it over.
        teachers: frozen networks, for a loss that reads them: modules, or what :func:`kd_plugins.models.make_teacher` takes.
        total_updates: optimizer steps of the whole training, for a loss that follows a schedule; without it call
            ``task.criterion.set_progress(step / total)`` before each step.
        device, dtype, verbose: as timm's. ``dtype`` is the networks'.
    """

    criterion: Any
    trainable_module: Any

    def __init__(
        self,
        model: nn.Module | Sequence[str | nn.Module],
        criterion: Loss,
        *,
        teachers: Sequence[str | Path | nn.Module] = (),
        total_updates: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if total_updates is not None and total_updates < 1:
            raise ValueError(
                f"total_updates={total_updates}: expected the optimizer steps of the whole training, at least 1"
            )
        models: list[Any] = [model] if isinstance(model, nn.Module) else list(model)
        num_classes = class_count(models[0])
        peers = [_like(models[0], m, num_classes) if isinstance(m, str) else m for m in models]
        masters = [make_teacher(teacher, num_classes) for teacher in teachers]
        refuse_pairing(peers, masters, criterion)
        if "index" in criterion.reads:
            raise ValueError(
                f"{type(criterion).__name__} reads index, the position of a sample in the data set, which timm's "
                "loaders do not hand over: train it with MutualDistillationTrainer"
            )
        for network in (*peers, *masters):
            network.to(device=device, dtype=dtype)
        hosted = _Trained(peers, criterion, masters).to(device=device)
        super().__init__(hosted, criterion, device=device, dtype=dtype, verbose=verbose)
        self.eval_model: Any = peers[0] if len(peers) == 1 else Ensemble(hosted)
        self.total_updates, self.updates = total_updates, 0
        criterion.register_forward_pre_hook(_keep_logits)
        self._tell(0)

    @property
    def peers(self) -> list[nn.Module]:
        """The networks that learn; :func:`kd_plugins.models.export` saves one by itself."""
        return list(unwrap_model(self.trainable_module).peers)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``{"loss", "output" [B, C]}`` and the diagnostics of the loss; in eval mode the loss is plain cross-entropy."""
        hosted = unwrap_model(self.trainable_module)
        if not hosted.training:
            output = logits_of(self.eval_model(input))
            return {"loss": F.cross_entropy(output.float(), target), "output": output}
        loss = self.trainable_module(input, target)["loss"]
        logits = self.criterion.last_logits
        output = logits[0] if len(logits) == 1 else _mean_log_probs(logits)
        # a clone: timm's loop divides the loss in place when it accumulates
        return {**hosted.stats, "loss": loss.clone(), "output": output}

    def _tell(self, updates: int) -> None:
        self.updates = updates
        if self.total_updates is not None:
            self.criterion.set_progress(min(updates / self.total_updates, 1.0))

    def update_ema(self, step: int | None = None) -> None:
        """After an update of the weights, number ``step``: tells the loss its progress, and keeps the averages over time."""
        self._tell(self.updates + 1 if step is None else step)
        unwrap_model(self.trainable_module).average()
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
        self.trainable_module = torch.compile(
            self.trainable_module, backend=backend, mode=mode, **compile_kwargs
        )
        self.eval_model = torch.compile(
            self.eval_model, backend=backend, mode=mode, **compile_kwargs
        )
        return self.eval_model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """As timm: the last two parameters of a network are its head."""
        own = [list(peer.parameters())[: -2 if exclude_head else None] for peer in self.peers]
        return [*(p for params in own for p in params), *self.criterion.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        if ema:
            return {}
        state = unwrap_model(self.trainable_module).state_dict()
        return {
            "loss": {k: v for k, v in state.items() if not k.startswith("peers.")},
            "updates": self.updates,
        }

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
                f"the checkpoint holds no state of this loss, {type(self.criterion).__name__}: of its "
                f"{sorted(own)} it has {sorted(given)}; the loss would start with empty state. Resume a run "
                "of the same task and loss, or begin with --initial-checkpoint"
            )
        unwrap_model(self.trainable_module).load_state_dict(given, strict=False)
        self._tell((state or {}).get("updates", 0))


class MutualDistillationTask(StatefulClassificationTask):
    """Several networks that teach each other, in timm's loop: ``MutualDistillationTask([model_a, model_b], SMKD())``.

    ``output``, and what is evaluated, averaged by EMA and saved as ``state_dict``, is the networks' :class:`Ensemble`. The
    others get their pixels as ``pretrained_cfg`` says, re-normalised and resized from what the first network takes.

    Args:
        models: the networks. A name stands for one made like the first: as many classes, the same device, dtype, memory
            format, checkpointing and synchronised BatchNorm, which timm's script gives to the first before the task is made.
        criterion: a loss for as many networks (``peers = True``).
        **kwargs: of :class:`StatefulClassificationTask`.
    """

    def __init__(self, models: Sequence[str | nn.Module], criterion: Loss, **kwargs: Any) -> None:
        super().__init__(models, criterion, **kwargs)


class Ensemble(nn.Module):
    """Pixels as the first network takes them -> log of the networks' mean probability [B, C]: the ensemble's logits."""

    def __init__(self, hosted: Hosted) -> None:
        super().__init__()
        self.peers: Any = hosted.peers
        self.inputs: Any = hosted.inputs[: len(hosted.peers)]  # type: ignore[misc]

    def forward(self, input: Tensor) -> Tensor:
        dtypes = [next(peer.parameters(), input).dtype for peer in self.peers]
        runs = zip(self.peers, self.inputs, dtypes, strict=True)
        return _mean_log_probs(
            [logits_of(peer(adapt(input).to(dtype))) for peer, adapt, dtype in runs]
        )


class _Trained(Hosted):
    """What timm makes its optimizer from: networks and loss, with what timm asks of a network."""

    def no_weight_decay(self) -> set[str]:
        named = [(k, peer) for k, peer in enumerate(self.peers) if hasattr(peer, "no_weight_decay")]
        return {f"peers.{k}.{name}" for k, peer in named for name in peer.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """For layer decay: the layers of each network by itself, the last of all on one level, and there the loss."""
        layers: list[dict[str, int]] = []
        for peer in self.peers:
            known = hasattr(peer, "group_matcher")
            layers.append(
                group_parameters(peer, peer.group_matcher(coarse=coarse), reverse=True)
                if known
                else {}
            )
        tops = [max(own.values(), default=0) for own in layers]
        level = {
            f"peers.{k}.{name}": layer + max(tops) - top
            for k, (own, top) in enumerate(zip(layers, tops, strict=True))
            for name, layer in own.items()
        }
        return lambda name: level.get(name, max(tops))


def _keep_logits(criterion: Any, args: tuple[Any, ...]) -> None:
    """Hosted returns the loss alone; timm's tasks return the output too."""
    criterion.last_logits = tuple(z.detach() for z in (args[0] if criterion.peers else args[:1]))


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
