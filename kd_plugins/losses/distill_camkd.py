"""Distillation through features that each teacher's own classifier judges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validate
from .distill_features import MapDistillation, Maps, TeacherMaps
from .functional import cross_entropy, log_softmax
from .maps import pooled
from .registry import register_loss
from .state import KeepsPrecision

SCALES = ("code", "paper")


@contextmanager
def _as_constants(teacher: Any) -> Iterator[None]:
    """A teacher whose method is called gets no gradients, although it may not be frozen."""
    parameters = teacher.parameters() if isinstance(teacher, nn.Module) else ()
    learning = [p for p in parameters if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


class _Head(KeepsPrecision):
    """A teacher's classifier: a map [B, D, h, w] -> logits [B, C]. Frozen, in no checkpoint."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        linear = isinstance(head, nn.Linear)
        for name in ("weight", "bias"):
            own = getattr(head, name) if linear else None
            copied = None if own is None else own.detach().clone()
            self.register_buffer(name, copied, persistent=False)
        if isinstance(head, nn.Module):
            head = copy.deepcopy(head).requires_grad_(False).eval()
        self.hidden = [] if linear else [head]  # a list hides it from the state dict

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for head in self.hidden:
            if isinstance(head, nn.Module):
                head._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            with _as_constants(getattr(self.hidden[0], "__self__", None)):
                return self.hidden[0](x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(pooled(x), self.weight.to(x.dtype), bias)


@register_loss("camkd_features")
class CAMKDFeatures(MapDistillation):
    """CA-MKD's feature term, L = Σ_k w_k ‖F_k - r_k(F_S)‖².

    The weights are w_k = (1 - e^L_k / Σ_j e^L_j) / (K - 1) with L_k = H(q, h_k(r_k(F_S))). F are
    last maps, r_k is a learned 1x1 convolution with batch normalisation and ReLU to teacher k's
    channels, and h_k is teacher k's own classifier, frozen. Per sample, a teacher weighs the more
    the better it reads the label from the student's features. A single teacher has weight 1. The
    authors' code has ``CE() + CAMKD(scale="code") + 50 * CAMKDFeatures(heads=...)``.

    Args:
        student_dim: channels of the student's last map. :meth:`bind` can fill in this and
            ``teacher_dims``.
        teacher_dims: of each teacher's.
        heads: each teacher's classifier; required. An ``nn.Linear`` on the pooled map (timm:
            ``teacher.get_classifier()``) or another module that makes logits of the map is copied
            as it is. A function (``teacher.forward_head``, of a teacher on the same device) is used
            itself; a method's network gets no gradients.
        scale: ``"code"``, or ``"paper"`` for the squared norm and no 1/K.
        detach_weights: take w as a constant; the code differentiates it.

    References:
        Zhang et al., "Confidence-aware multi-teacher knowledge distillation", ICASSP 2022, the
        intermediate term, after the authors' code. The paper's equations could not be read
        (docs/unconfirmed.md).

    Notes:
        The code has the mean over channels and positions instead of the squared norm, and divides
        by K once more. The published weight of 50 belongs to that, so it is the default;
        ``scale="paper"`` is larger by K D h w. r_k comes before the classifier because the channels
        differ, as in the code. The code pools or enlarges the student's map for one teacher after
        the other, each time from the last result, so the order of teachers matters; here each
        starts from the map itself, and the larger map is pooled. The code leaves the term out in
        its first epoch. Here a batch is normalised by its own statistics, in eval mode as well:
        r_k is of no use after training.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dims: int | Sequence[int] | None = None,
        heads: Sequence[Callable[[Tensor], Tensor]] = (),
        scale: str = "code",
        detach_weights: bool = False,
        **base: Any,
    ) -> None:
        linear = [head for head in heads if isinstance(head, nn.Linear)]
        if teacher_dims is None and linear and len(linear) == len(heads):
            teacher_dims = [head.in_features for head in linear]
        classes = {"num_classes": linear[0].out_features} if linear else {}
        super().__init__(student_dim, teacher_dims, -1, **classes | base)
        validate.check(len(heads) > 0, "heads", heads, "the classifier of each teacher")
        self.scale, self.detach_weights = validate.one_of("scale", scale, SCALES), detach_weights
        self.heads: Any = nn.ModuleList(_Head(head) for head in heads)
        self.complete()

    def build(self) -> None:
        validate.same_length(teacher_dims=self.teacher_dims, heads=self.heads)
        for head, dim in zip(self.heads, self.teacher_dims, strict=True):
            if head.weight is not None and head.weight.shape != (self.num_classes, dim):
                raise ValueError(
                    f"heads: expected a classifier from {dim} features to {self.num_classes} "
                    f"classes, got one from {head.weight.shape[1]} to {head.weight.shape[0]}"
                )
        self.embeds: Any = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(self.student_dim, dim, 1, bias=False),
                nn.BatchNorm2d(dim, track_running_stats=False),
                nn.ReLU(),
            )
            for dim in self.teacher_dims
        )

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> Tensor:
        losses, distances, count = [], [], len(self.teacher_dims)
        pairs = self.pairs(logits, features, teacher_features)
        for head, embed, (student, teacher) in zip(self.heads, self.embeds, pairs, strict=True):
            student = embed(student)
            losses.append(cross_entropy(log_softmax(head(student)), target))
            square = ((teacher - student) ** 2).flatten(1)
            distances.append(square.mean(1) / count if self.scale == "code" else square.sum(1))
        weights = torch.ones_like(losses[0])[None]
        if count > 1:
            weights = (1.0 - torch.stack(losses).softmax(0)) / (count - 1)
        if self.detach_weights:
            weights = weights.detach()
        for k, weight in enumerate(weights):
            self.log(f"weight_{k}", weight)
        return (weights * torch.stack(distances)).sum(0)
