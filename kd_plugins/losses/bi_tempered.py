"""Cross-entropy with two temperatures: a bounded loss of probabilities with a heavy tail."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .functional import log_softmax
from .registry import register_loss

STEPS = 8  # of Newton's method: Σ p = 1 up to rounding for t <= 4, C <= 20,000 and any logits


@register_loss("bi_tempered")
class BiTempered(Loss):
    """Bi-tempered logistic loss, a cross-entropy with two temperatures,
    L = Σ_c q_c (log_t1 q_c - log_t1 p_c) - (q_c^(2-t1) - p_c^(2-t1)) / (2 - t1).

    log_t(x) = (x^(1-t) - 1) / (1 - t), and p_c = exp_t2(z_c - g) with the g that makes Σ_c p_c = 1.
    t1 < 1 bounds the loss by 1 / (1 - t1), so that an outlier far from the boundary costs little.
    t2 > 1 gives p a heavier tail than softmax has, so that a wrong label next to the boundary costs
    little. For t1 = t2 = 1 and a one-hot label it is cross-entropy; for a distribution it is then
    KL(q ‖ p).

    Args:
        t1: in [0, 1]; 0.8 for CIFAR-100 (the default), 0.9 for ImageNet.
        t2: 1 or more; 1.2 for CIFAR-100 (the default), 1.05 for ImageNet.

    References:
        Amid et al., "Robust bi-tempered logistic loss based on Bregman divergences", NeurIPS 2019.
        The values of t1 and t2 are from memory of the paper (docs/unconfirmed.md).

    Notes:
        g is computed to the precision of the logits, by Newton's method. The authors' code stops
        after 5 fixed-point steps, where Σ p can be off by a per cent. The gradient is that of the
        exact g, not of the iteration. t2 < 1, which cuts the tail off, is not included.

    >>> BiTempered(t1=0.5, t2=1.0)(torch.zeros(1, 4), torch.tensor([0]))  # 1 - (1 - 4 / 8) / 1.5
    tensor(0.6667)
    """

    def __init__(self, t1: float = 0.8, t2: float = 1.2, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        why = "above 1, a wrong prediction would cost more than in cross-entropy"
        self.t1 = validate.fraction("t1", t1, why)
        validate.number("t2", t2)
        why = "below 1, a class could have p = 0 exactly, where training stops"
        self.t2 = validate.check(t2 >= 1, "t2", t2, "a number of at least 1", why)

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = tempered_log_softmax(logits, self.t2)
        best = target * _log_t(target.log(), self.t1)
        best = torch.where(target == 0, 0.0, best)  # 0 · log 0 is 0
        gap = best - torch.where(target == 0, 0.0, target * _log_t(log_p, self.t1))
        power = 2.0 - self.t1
        return (gap - (target**power - (power * log_p).exp()) / power).sum(-1)


def _log_t(log_x: Tensor, t: float) -> Tensor:
    """log_t(x), given log x: log x for t = 1."""
    return log_x if t == 1 else torch.expm1((1.0 - t) * log_x) / (1.0 - t)


def tempered_log_softmax(logits: Tensor, t: float) -> Tensor:
    """log of p_c = exp_t(z_c - g), with the g that makes Σ_c p_c = 1: [B, C] -> [B, C], t >= 1.

    With x_c = 1 + (t - 1) (g - z_c), p_c = x_c^(-1/(t-1)). Newton's method solves S^(1-t) = 1 for
    S = Σ p. This function of g is concave and increasing, so from g = max z, where S >= 1, the
    steps never pass the solution. Where all logits are equal it is linear: one step. A last step
    carries the gradient dg/dz_c = p_c^t / Σ p^t.

    >>> tempered_log_softmax(torch.zeros(1, 4), 1.5).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if t == 1:
        return log_softmax(logits)
    z = logits - logits.detach().amax(-1, keepdim=True)

    def log_p(g: Tensor) -> Tensor:
        return -torch.log1p((t - 1.0) * (g - z)) / (t - 1.0)

    with torch.no_grad():
        g = torch.zeros_like(z[..., :1])
        for _ in range(STEPS):
            total = log_p(g).exp().sum(-1, keepdim=True)
            slope = (t * log_p(g)).exp().sum(-1, keepdim=True)
            g = g + (total**t - total) / ((t - 1.0) * slope)
        slope = (t * log_p(g)).exp().sum(-1, keepdim=True)
    total = log_p(g).exp().sum(-1, keepdim=True)
    return log_p(g + (total - 1.0) / slope)
