"""What every loss shares: calling convention, checks, precision, reduction, progress, sums and the registry."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .functional import as_probs, full_dtype
from .state import KeepsPrecision, Progress

EXTRAS = (
    "teacher",
    "features",
    "teacher_features",
    "index",
)  # what a loss may read beside logits and target


REDUCTIONS = ("mean", "sum", "none")


class Loss(KeepsPrecision):
    """A drop-in for ``nn.CrossEntropyLoss``: ``loss(logits [B, C], target [B] or [B, C]) -> scalar``.

    A new loss writes :meth:`per_sample` and nothing else; whatever it needs beside logits and target is a keyword of
    that method (``teacher``, ``features``, ``teacher_features``, ``index``), and callers supply exactly those.

    Args:
        num_classes: only checked against the logits, when given.
        reduction: ``"mean"`` over the batch, ``"sum"`` or ``"none"`` ([B]).

    Attributes:
        reads: the keywords that ``forward`` wants, from the signature of ``per_sample``.
        peers: True if ``logits`` is a sequence of the logits of several networks.
        indices: True if ``per_sample`` also takes class indices [B], and logits of 16 bits, as they are, and is faster for it.
        stats: detached 0-d diagnostics of the last forward, by name.
    """

    reads: frozenset[str] = frozenset()
    peers: bool = False
    indices: bool = False
    stats: dict[str, Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = list(inspect.signature(cls.per_sample).parameters)[3:]
        if "extra" not in names:
            if unknown := set(names) - set(EXTRAS):
                raise TypeError(
                    f"{cls.__name__}.per_sample asks for {sorted(unknown)}: a loss can read only {EXTRAS}"
                )
            cls.reads = frozenset(names)

    def __init__(self, *, num_classes: int | None = None, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: expected one of {REDUCTIONS}")
        self.num_classes = num_classes
        self.reduction = reduction
        self.stats = {}

    def per_sample(self, logits: Tensor, target: Tensor, **extra: Any) -> Tensor:
        """([B, C] float32 or float64, [B, C]) -> [B], or a scalar for a loss on the whole batch. A subclass writes this."""
        raise NotImplementedError

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, **extra: Any) -> Tensor:
        first = self._check(logits, target, extra)
        with torch.autocast(
            first.device.type, enabled=False
        ):  # CPU autocast would leave log_softmax in bfloat16
            if target.dim() == 2 or not self.indices:
                target = as_probs(target, first.shape[-1], full_dtype(first))
            full: Any = logits  # what takes indices makes no copy of them
            if not self.indices:
                full = [_full(z) for z in logits] if self.peers else _full(first)
            extra = {name: _prepare(name, value, self) for name, value in extra.items()}
            self.stats = {}  # whoever calls per_sample empties them: torch.compile would guard on what they held before
            losses = self.per_sample(full, target, **extra)
            if losses.device.type == "cpu" and not torch.compiler.is_compiling():
                _refuse_nan(
                    losses, self
                )  # on an accelerator this would wait for it; the Trainer looks there
            if self.reduction == "none" or losses.dim() == 0:
                return losses
            return losses.mean() if self.reduction == "mean" else losses.sum()

    def set_progress(self, progress: float) -> None:
        """Tell this loss, and every part of it, how far training is: t/Γ in [0, 1]."""
        if not 0.0 <= progress <= 1.0:
            raise ValueError(
                f"progress={progress}: expected step / total_steps in [0, 1]; schedules end at 1"
            )
        for module in self.modules():
            if isinstance(module, Progress):
                module.set(progress)

    def __add__(self, other: Loss) -> Sum:
        return Sum([*_terms(self), *_terms(other)]) if isinstance(other, Loss) else NotImplemented

    def __rmul__(self, weight: float) -> Sum:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        return Sum([(weight * w, term) for w, term in _terms(self)])

    def _check(self, logits: Any, target: Tensor, extra: dict[str, Any]) -> Tensor:
        """Refuse what cannot be right, before any arithmetic; the logits of the first peer."""
        name = type(self).__name__
        if self.peers:
            if isinstance(logits, Tensor) or len(logits) < 2:
                raise ValueError(
                    f"{name} teaches peers: expected a tuple of at least two logits [B, C], got {_what(logits)}"
                )
            if len({tuple(z.shape) for z in logits}) > 1:
                raise ValueError(
                    f"{name}: all peers must have logits of one shape [B, C], got {_what(logits)}"
                )
        elif not isinstance(logits, Tensor):
            hint = (
                f"; Mutual({name}(), Nothing()) trains several networks side by side"
                if isinstance(logits, tuple)
                else ""
            )
            raise TypeError(f"{name} expects a tensor of logits [B, C], got {_what(logits)}{hint}")
        z = logits[0] if self.peers else logits
        if z.dim() != 2 or z.shape[1] < 2:
            raise ValueError(f"{name} expects logits [B, C] with C >= 2, got {_what(z)}")
        for peer in logits if self.peers else (z,):
            if not peer.is_floating_point():
                raise TypeError(
                    f"{name} expects floating-point logits, got {peer.dtype}: logits, not predicted classes"
                )
        if z.shape[0] == 0:
            raise ValueError(
                f"{name}: the batch is empty, its mean would be NaN; got logits {_what(z)}"
            )
        if self.num_classes not in (None, z.shape[1]):
            raise ValueError(
                f"{name} was made for num_classes={self.num_classes}, got logits {_what(z)}"
            )
        if target.shape not in ((z.shape[0],), z.shape):
            raise ValueError(
                f"{name}: target must be class indices [{z.shape[0]}] or distributions "
                f"{list(z.shape)}, got {list(target.shape)}"
            )
        if target.dim() == 1:
            if target.is_floating_point():
                raise TypeError(f"{name}: class indices must be integers, got {target.dtype}")
            if (
                target.device.type == "cpu" and not torch.compiler.is_compiling()
            ):  # an accelerator asserts by itself
                wrong = (target < 0) | (target >= z.shape[1])
                if wrong.any():
                    raise ValueError(
                        f"{name}: label {target[wrong][0].item()} at position {wrong.nonzero()[0].item()} is "
                        f"outside the {z.shape[1]} classes 0 to {z.shape[1] - 1}"
                    )
        if missing := self.reads - {k for k, v in extra.items() if v is not None}:
            raise TypeError(f"{name} reads {sorted(self.reads)}: missing {sorted(missing)}")
        if unknown := set(extra) - self.reads:
            raise TypeError(
                f"{name} reads {sorted(self.reads) or 'logits and target only'}: it would ignore {sorted(unknown)}"
            )
        teacher, index = extra.get("teacher"), extra.get("index")
        if teacher is not None and (teacher.dim() not in (2, 3) or teacher.shape[-2:] != z.shape):
            raise ValueError(
                f"{name}: teacher must be logits [T, B, C] or [B, C] for {_what(z)}, got {_what(teacher)}"
            )
        if index is not None and index.shape != z.shape[:1]:
            raise ValueError(f"{name}: index must be positions [{z.shape[0]}], got {_what(index)}")
        return z

    def extra_repr(self) -> str:
        """The constructor's scalar arguments, so that a log or a model card can name the loss in full."""
        names = list(inspect.signature(type(self).__init__).parameters)
        names += ["reduction"] if self.reduction != "mean" else []
        return ", ".join(
            f"{n}={getattr(self, n)}"
            for n in names
            if isinstance(getattr(self, n, None), int | float | str)
        )


class Sum(Loss):
    """Σ_i w_i L_i: what ``0.1 * CE() + 0.9 * KD(temperature=4)`` makes. Each term is handed what it reads."""

    def __init__(
        self, terms: Sequence[tuple[float, Loss]], *, reduction: str | None = None
    ) -> None:
        reductions = {reduction} if reduction else {term.reduction for _, term in terms}
        sizes = {term.num_classes for _, term in terms} - {None}
        if len(reductions) > 1 or len(sizes) > 1:
            raise ValueError(
                f"terms of a sum must agree on reduction, here {reductions}, and num_classes, here {sizes}"
            )
        super().__init__(num_classes=next(iter(sizes), None), reduction=reductions.pop())
        if len({term.peers for _, term in terms}) > 1:
            raise TypeError(
                "a loss for several networks and a loss for one cannot be added: "
                + " + ".join(type(t).__name__ for _, t in terms)
            )
        self.weights = [float(w) for w, _ in terms]
        self.terms: Any = nn.ModuleList(term for _, term in terms)
        self.reads = frozenset(name for _, term in terms for name in term.reads)
        self.peers = terms[0][1].peers

    def per_sample(self, logits: Tensor, target: Tensor, **extra: Any) -> Tensor:
        self.stats = {}
        total: Tensor | float = 0.0
        for i, (weight, term) in enumerate(zip(self.weights, self.terms, strict=True)):
            term.stats = {}
            loss = term.per_sample(
                logits, target, **{k: v for k, v in extra.items() if k in term.reads}
            )
            name = f"{type(term).__name__.lower()}_{i}"
            self.stats |= {name: loss.detach().mean()} | {
                f"{name}_{k}": v for k, v in term.stats.items()
            }
            total = total + weight * loss
        return total  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _terms(loss: Loss) -> list[tuple[float, Loss]]:
    return (
        list(zip(loss.weights, loss.terms, strict=True)) if isinstance(loss, Sum) else [(1.0, loss)]
    )  # type: ignore[arg-type]


def _full(z: Tensor) -> Tensor:
    return z.to(full_dtype(z))


def _prepare(name: str, value: Any, loss: Loss) -> Any:
    if name == "teacher":
        value = value.unsqueeze(0) if value.dim() == 2 else value  # [T, B, C]
        return _full(value.detach())
    if name == "teacher_features":
        return tree_map(lambda f: _full(f.detach()), list(value))
    return tree_map(_full, value) if name == "features" else value


def _refuse_nan(losses: Tensor, loss: Loss) -> None:
    if torch.isnan(losses).any():
        where = (
            torch.isnan(losses).nonzero().flatten().tolist()[:5]
            if losses.dim()
            else "the whole batch"
        )
        raise ValueError(
            f"{type(loss).__name__} is NaN for samples {where}: NaN stands in the logits or in the target, "
            "and one step on it would make every weight NaN; look at the learning rate and the input"
        )


def at_layer(features: Any, layer: int) -> Tensor:
    """One map [B, D, h, w] of a network's maps by layer, shallow to deep; a bare map is the one there is."""
    return features if isinstance(features, Tensor) else features[layer]


def _what(x: Any) -> str:
    if isinstance(x, Tensor):
        return str(list(x.shape))
    if isinstance(x, list | tuple):
        return "(" + ", ".join(_what(v) for v in x) + ")"
    return type(x).__name__


def peer_name(k: int) -> str:
    """a, b, c ... for 0, 1, 2 ...: how peers are named in logs and folders."""
    return chr(ord("a") + k)
