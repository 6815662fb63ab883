"""What every loss shares: calling convention, checks, precision, class weights, diagnostics."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import validate
from .functional import as_probs, full_dtype
from .sizes import NeedsSizes
from .state import Progress

INPUTS = ("teacher", "features", "teacher_features", "index", "mixed")  # beside logits and target
REDUCTIONS = ("mean", "sum", "none")
Selection = list[tuple[Tensor, Tensor]]  # per peer: mask [B], target [B, C]


class LossArguments(TypedDict, total=False):
    """Keywords of every loss: ``def __init__(self, q=0.7, **base: Unpack[LossArguments])``."""

    num_classes: int | None
    reduction: str
    weight: Tensor | Sequence[float] | None


class Loss(NeedsSizes):
    """A drop-in for ``nn.CrossEntropyLoss``: ``loss(logits [B, C], target [B] or [B, C])``.

    A new loss writes :meth:`per_sample` and nothing else. What it reads beside logits and target is
    a keyword of that method: ``teacher``, ``features``, ``teacher_features`` or ``index``.

    Args:
        num_classes: if given, the logits must have as many.
        reduction: ``"mean"`` over the batch, ``"sum"``, or ``"none"`` for losses [B].
        weight: class weights [C]. A sample weighs as much as the class of its label, and the mean
            is divided by the weights of the batch, as in ``nn.CrossEntropyLoss``.

    Attributes:
        required_inputs: the keywords that ``forward`` takes, from the signature of ``per_sample``.
        num_peers: 1 for a loss of one network; K for one that takes a sequence of K logits.
        layers: which maps of ``features`` and ``teacher_features`` it reads.
        ema_decay: if set, ``teacher`` is the peers themselves with weights averaged at this decay.
        views: how many augmented views of each picture it wants.
        selection: None, or the samples that each peer taught in the last forward: a mask [B] and
            the targets [B, C].
    """

    required_inputs: frozenset[str] = frozenset()
    num_peers: int = 1
    layers: tuple[int, ...] = (-1,)
    ema_decay: float | None = None
    views: int = 1
    any_precision = False  # per_sample takes logits of 16 bits as they are
    weighs_labels = False  # per_sample applies the class weights itself
    logged: dict[str, Tensor]
    selection: Selection | None
    class_weights: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.per_sample).parameters.values())[3:]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return  # it hands its inputs on to its parts
        names = {p.name for p in parameters}
        if unknown := names - set(INPUTS):
            raise TypeError(
                f"{cls.__name__}.per_sample asks for {sorted(unknown)}: a loss can read only "
                f"{INPUTS}"
            )
        cls.required_inputs = frozenset(names)

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        reduction: str = "mean",
        weight: Tensor | Sequence[float] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise validate.unknown_argument(type(self), next(iter(unknown)), _KEYWORDS)
        super().__init__()
        self.reduction = validate.one_of("reduction", reduction, REDUCTIONS)
        self.num_classes = num_classes
        if weight is not None:
            weight = validate.class_weights(weight, num_classes)
            self.num_classes = len(weight)
        self.register_buffer("class_weights", weight, persistent=False)
        self.logged, self.selection = {}, None

    # ------------------------------------------------------------------------------------- calling

    def per_sample(self, logits: Any, target: Tensor, **inputs: Any) -> Tensor:
        """([B, C], [B, C]) -> [B], or a scalar for a loss on the whole batch. A subclass writes it.

        Args:
            logits: [B, C] in float32 or float64; for peers a list of K of them.
            target: distributions [B, C].
            inputs: ``teacher`` logits [T, B, C]; ``features``, a list of maps [B, D, h, w], shallow
                to deep, for peers one list each; ``teacher_features``, a list of maps per teacher;
                ``index`` [B], positions in the training data.
        """
        raise NotImplementedError

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, **inputs: Any) -> Tensor:
        name = type(self).__name__
        peers = validate.logits(name, logits, self.num_peers, self.num_classes)
        target = validate.target(name, target, peers[0])
        validate.inputs(name, inputs, self.required_inputs, peers[0])
        device = peers[0].device.type
        autocast = torch.is_autocast_enabled(device)  # it leaves log_softmax in bfloat16 on the CPU
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            target = as_probs(target, peers[0].shape[1], full_dtype(peers[0]))
            if not self.any_precision:
                peers = [_full(z) for z in peers]
            inputs = {key: self._prepared(key, value) for key, value in inputs.items()}
            losses = self.run(peers if self.num_peers > 1 else peers[0], target, **inputs)
            if losses.device.type == "cpu" and not torch.compiler.is_compiling():
                validate.refuse_nan(name, losses)  # the Trainer looks for NaN on accelerators
            if self.reduction == "none" or losses.dim() == 0:
                return losses
            return losses.mean() if self.reduction == "mean" else losses.sum()

    def run(self, logits: Any, target: Tensor, **inputs: Any) -> Tensor:
        """:meth:`per_sample` with fresh diagnostics and class weights: how a loss calls its parts.

        ``inputs`` may hold more than this loss reads.
        """
        self.require_sizes()
        self.logged, self.selection = {}, None  # written, never read: torch.compile needs no guard
        own = {key: value for key, value in inputs.items() if key in self.required_inputs}
        losses = self.per_sample(logits, target, **own)
        return losses if self.class_weights is None else self._weigh(losses, target)

    def _weigh(self, losses: Tensor, target: Tensor) -> Tensor:
        if losses.dim() == 0:
            raise TypeError(
                f"{type(self).__name__} is one number for the whole batch: class weights have no "
                "samples to act on"
            )
        sample = target @ self.class_weights.to(target.dtype)  # type: ignore[union-attr]
        if not self.weighs_labels:
            losses = sample * losses
        if self.reduction != "mean":
            return losses
        total = sample.sum()
        return losses * (len(sample) / torch.where(total > 0, total, 1.0))

    def _prepared(self, name: str, value: Any) -> Any:
        """An input in full precision, in the form that ``per_sample`` expects."""
        if name == "teacher":
            return _full((value if value.dim() == 3 else value.unsqueeze(0)).detach())
        if name == "teacher_features":
            return tree_map(lambda f: _full(f.detach()), [_maps(network) for network in value])
        if name == "features":
            maps = [_maps(f) for f in value] if self.num_peers > 1 else _maps(value)
            return tree_map(_full, maps)
        if name == "mixed":
            return tree_map(lambda t: _full(t.detach()) if t.is_floating_point() else t, value)
        return value

    # --------------------------------------------------------------------------------- diagnostics

    def log(self, name: str, values: Tensor | Sequence[Tensor]) -> None:
        """Leave a diagnostic for :attr:`stats`: a tensor, or one tensor per peer."""
        if isinstance(values, Tensor):
            self.logged[name] = values.detach()
            return
        for k, value in enumerate(values):
            self.log(f"{name}_{peer_name(k)}", value)

    @property
    def stats(self) -> dict[str, Tensor]:
        """Diagnostics of the last forward: the mean of each tensor that was logged, 0-d, by name.

        They are computed here, so that a step in which nobody reads them does not pay for them.
        """
        return {
            name: (value if value.is_floating_point() else value.float()).mean()
            for name, value in self.logged.items()
        }

    def collect(self, part: Loss, pattern: str = "{}") -> None:
        """Take over the diagnostics and the selection of a part that has just run."""
        self.logged |= {pattern.format(name): value for name, value in part.logged.items()}
        if self.selection is None or part.selection is None:
            self.selection = part.selection or self.selection
            return
        pairs = zip(self.selection, part.selection, strict=True)  # taught by one part or the other
        self.selection = [(a | b, torch.where(a.unsqueeze(-1), q, r)) for (a, q), (b, r) in pairs]

    # ------------------------------------------------------------------------------------ progress

    def set_progress(self, progress: float) -> None:
        """Tell this loss and all its parts how far training is: t/Γ in [0, 1]."""
        validate.fraction("progress", progress, "it is step / total_steps, and schedules end at 1")
        for module in self.modules():
            if isinstance(module, Progress):
                module.set(progress)

    # ----------------------------------------------------------------------------------- arithmetic

    def __add__(self, other: Loss) -> Sum:
        return Sum([*_terms(self), *_terms(other)]) if isinstance(other, Loss) else NotImplemented

    def __rmul__(self, weight: float) -> Sum:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        return Sum([(weight * w, term) for w, term in _terms(self)])

    def extra_repr(self) -> str:
        """The constructor's scalar arguments: a log or a model card can then name the loss."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n not in _KEYWORDS]
        names += (
            ["num_classes"] if "num_classes" in inspect.signature(type(self)).parameters else []
        )
        names += ["reduction"] if self.reduction != "mean" else []
        own = {name: getattr(self, name, None) for name in names}
        shown = [f"{n}={value}" for n, value in own.items() if isinstance(value, int | float | str)]
        if self.class_weights is not None and len(self.class_weights) <= 10:
            shown.append(f"weight={[round(w, 4) for w in self.class_weights.tolist()]}")
        elif self.class_weights is not None:
            shown.append(f"weight=[{len(self.class_weights)} classes]")
        return ", ".join(shown)


_KEYWORDS = tuple(LossArguments.__annotations__)


class Sum(Loss):
    """Σ_i w_i L_i, as in ``0.1 * CE() + 0.9 * KD(temperature=4)``. Each term gets what it reads."""

    def __init__(
        self,
        terms: Sequence[tuple[float, Loss]],
        *,
        num_classes: int | None = None,
        reduction: str | None = None,
        weight: Tensor | Sequence[float] | None = None,
        **unknown: Any,
    ) -> None:
        reductions = {reduction} if reduction else {term.reduction for _, term in terms}
        sizes = {num_classes, *(term.num_classes for _, term in terms)} - {None}
        found: Any
        for name, found in (("reduction", reductions), ("num_classes", sizes)):
            if len(found) > 1:
                shown = " and ".join(map(repr, sorted(found)))
                raise ValueError(f"the terms of a sum must agree on {name}, here {shown}")
        size, reduction = next(iter(sizes), None), reductions.pop()
        super().__init__(num_classes=size, reduction=reduction, weight=weight, **unknown)
        self.weights = [float(validate.number("weight of a term", w)) for w, _ in terms]
        self.terms: Any = nn.ModuleList(term for _, term in terms)
        losses = [term for _, term in terms]
        if len({term.num_peers for term in losses}) > 1:
            raise TypeError(
                "losses for different numbers of networks cannot be added: "
                + " + ".join(f"{type(t).__name__} ({t.num_peers})" for t in losses)
            )
        self.num_peers = losses[0].num_peers
        self.required_inputs = frozenset().union(*(term.required_inputs for term in losses))
        self.any_precision = all(term.any_precision for term in losses)
        self.layers = tuple(sorted({layer for term in losses for layer in term.layers}))
        decays = {term.ema_decay for term in losses if term.ema_decay is not None}
        if len(decays) > 1:
            raise ValueError(
                f"the terms want averages of the peers with different decays, {sorted(decays)}, "
                "and the Trainer keeps one: give them the same"
            )
        self.ema_decay = next(iter(decays), None)

    def per_sample(self, logits: Any, target: Tensor, **inputs: Any) -> Tensor:
        total: Any = 0.0
        for i, (weight, term) in enumerate(zip(self.weights, self.terms, strict=True)):
            loss = term.run(logits, target, **inputs)
            name = f"{type(term).__name__.lower()}_{i}"
            self.log(name, loss)
            self.collect(term, name + "_{}")
            total = total + weight * loss
        return total

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _terms(loss: Loss) -> list[tuple[float, Loss]]:
    return (
        list(zip(loss.weights, loss.terms, strict=True)) if isinstance(loss, Sum) else [(1.0, loss)]
    )


def _full(z: Tensor) -> Tensor:
    return z.to(full_dtype(z))


def _maps(value: Any) -> list[Tensor]:
    """A network's maps, shallow to deep; a bare map is the only one."""
    return [value] if isinstance(value, Tensor) else list(value)


def peer_name(k: int) -> str:
    """a, b, c ... for 0, 1, 2 ...: how peers are named in logs and folders."""
    return chr(ord("a") + k)
