"""Loss correction: losses that know the noise as a matrix T[i, j] = P(noisy label j | clean label i), and its estimators.

The losses take T as it is given. Where it is not known, :func:`estimate_transition` reads it off a network that was trained
on the noisy labels, before training starts anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss
from .functional import cross_entropy
from .registry import register_loss

TOLERANCE = 1e-3  # of a sum that should be 1


LARGEST_CONDITION = 1e6  # above it, float32 has no digit left of T T^-1 = I


UNDERFLOW = 1e-30  # below it, sums of probabilities in float32 lose terms


LEAST = (
    1e-12  # of a denominator; dividing by less, the gradient of dT would overflow Adam's squares
)


class _Corrected(Loss):
    """A loss that knows T [C, C], and from it the number of classes."""

    transition: Tensor

    def __init__(self, transition: Any, **base: Any) -> None:
        matrix = _checked(transition)
        if base.get("num_classes") is None:
            base["num_classes"] = len(matrix)
        elif base["num_classes"] != len(matrix):
            raise ValueError(
                f"num_classes={base['num_classes']}: transition is [{len(matrix)}, {len(matrix)}] and says how "
                "many classes there are; every batch would be refused"
            )
        super().__init__(**base)
        self.register_buffer("transition", matrix.float())


def _checked(transition: Any) -> Tensor:
    """T in float64 on the CPU, or a ValueError that says what is wrong with it."""
    matrix = torch.as_tensor(transition, dtype=torch.float64, device="cpu").detach()
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(
            f"transition: expected a matrix [C, C] with C >= 2, got {list(matrix.shape)}"
        )
    if not (matrix >= 0).all():  # also NaN
        i, j = (~(matrix >= 0)).nonzero()[0].tolist()
        raise ValueError(
            f"transition[{i}, {j}]={matrix[i, j]:.6g}: expected a probability; its logarithm would be NaN"
        )
    off = (matrix.sum(1) - 1).abs()
    if not (off <= TOLERANCE).all():
        i = int(off.argmax())
        turned = bool(((matrix.sum(0) - 1).abs() <= TOLERANCE).all())
        raise ValueError(
            f"transition: row {i} sums to {matrix[i].sum():.6g}, expected 1: T[i, j] = P(noisy j | clean i); the "
            "loss would correct for another noise"
            + ("; its columns sum to 1: it is transposed, give transition.T" if turned else "")
        )
    return matrix


@register_loss("forward_correction")
class ForwardCorrection(_Corrected):
    """Forward correction, L = -Σ_k q_k log (p T)_k: the prediction is sent through the noise before it meets the noisy label.

    Over the noisy labels it is least where p is the clean posterior; with T = I it is cross-entropy.

    Source: Patrini et al., CVPR 2017, the forward procedure.
    Differs: public code takes log((p T)_k + 1e-12), clips p at 1e-7 (no gradient below), or is NaN at 0. Here it is exact
    down to (p T)_k = 1e-30; below, where float32 loses terms, class k's own log p_k + log T_kk stands for the sum, so that
    the value is finite and the gradient still raises p_k.

    Args:
        transition: T [C, C], T[i, j] = P(noisy label j | clean label i); rows sum to 1.

    >>> ForwardCorrection([[0.8, 0.2], [0.4, 0.6]])(torch.zeros(1, 2), torch.tensor([0]))  # -log(0.5 · 0.8 + 0.5 · 0.4)
    tensor(0.5108)
    """

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1)
        matrix = self.transition.to(log_p.dtype)
        noisy = log_p.exp() @ matrix  # [B, C]
        own = log_p + (matrix.diagonal() + UNDERFLOW).log()
        known = noisy > UNDERFLOW
        return cross_entropy(torch.where(known, torch.where(known, noisy, 1.0).log(), own), target)


@register_loss("backward_correction")
class BackwardCorrection(_Corrected):
    """Backward correction, L = -Σ_k (q T⁻¹)_k log p_k: its mean over the noisy labels of a sample is its clean cross-entropy.

    Unbiased for every p, at the price of variance: (q T⁻¹) has negative entries, so the value may be negative, and has no
    lower bound. The forward correction is usually preferred.

    Source: Patrini et al., CVPR 2017, the backward procedure.
    Unsaid there: how near to singular T may be. Here a condition number above 1e6 is refused.

    Args:
        transition: T [C, C], T[i, j] = P(noisy label j | clean label i); rows sum to 1. Inverted once, in float64.

    >>> loss = BackwardCorrection([[0.8, 0.2], [0.4, 0.6]])
    >>> loss.inverse
    tensor([[ 1.5000, -0.5000],
            [-1.0000,  2.0000]])
    """

    inverse: Tensor

    def __init__(self, transition: Any, **base: Any) -> None:
        super().__init__(transition, **base)
        matrix = _checked(transition)
        condition = float(torch.linalg.cond(matrix))
        if not condition <= LARGEST_CONDITION:
            raise ValueError(
                f"transition: its condition number is {condition:.3g}, expected at most {LARGEST_CONDITION:.0g}: "
                "the matrix is (nearly) singular and its inverse would magnify the noise as much; "
                "ForwardCorrection needs no inverse"
            )
        self.register_buffer("inverse", torch.linalg.inv(matrix).float())

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(F.log_softmax(logits, dim=-1), target @ self.inverse.to(target.dtype))


@register_loss("t_revision")
class TRevision(_Corrected):
    """T-revision, L = mean_i β_i H(q_i, p_i) with β = p_y / (p T')_y and T' = T + dT; dT is learned with the network.

    β weights a sample by how much more likely its label is as a clean than as a noisy one. ``revise=False`` is stage 2: dT is
    absent and β a constant. ``revise=True`` is stage 3: dT starts at 0, and β carries gradients, or dT would never learn.
    For a soft label, Σ_k q_k β_k (-log p_k). Stage 1 is :func:`estimate_transition`.

    In stage 3 go on from the network of stage 2 with a tiny learning rate (published: Adam at 5e-7 for network and dT
    together): every entry of dT can only grow, and the network too can lower the loss by lowering β. T' is not renormalised,
    as in the authors' code, so its rows come to sum to more than 1. Should another term make an entry of T' negative, it
    counts as 0. β is at most 1 / T'_yy: a diagonal entry near 0 makes huge weights. The denominator is at least 1e-12; a label
    with p_y far below that is ignored, also with T = I.

    Source: Xia et al., "Are anchor points really indispensable in label-noise learning?", NeurIPS 2019.
    Differs: one version of the authors' code adds dT to T once more for every sample, another detaches β in stage 3.

    Args:
        transition: T [C, C], T[i, j] = P(noisy label j | clean label i); rows sum to 1.
        revise: learn dT (stage 3).

    >>> loss = TRevision([[0.8, 0.2], [0.4, 0.6]])
    >>> loss(torch.zeros(1, 2), torch.tensor([0])), loss.stats["weight"]  # β = 0.5 / 0.6
    (tensor(0.5776, grad_fn=<MeanBackward0>), tensor(0.8333))
    """

    def __init__(self, transition: Any, revise: bool = True, **base: Any) -> None:
        super().__init__(transition, **base)
        self.revise = revise
        self.delta = nn.Parameter(torch.zeros_like(self.transition)) if revise else None

    @property
    def matrix(self) -> Tensor:
        """T' = T + dT as it is now, detached; rows need not sum to 1."""
        return (
            self.transition.clone() if self.delta is None else self.transition + self.delta.detach()
        )

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1)
        matrix = self.transition if self.delta is None else self.transition + self.delta
        matrix = torch.where(matrix < 0, 0.0, matrix)  # clamp gives an entry that is 0 no gradient
        p = log_p.exp()
        beta = p / (p @ matrix.to(p.dtype)).clamp_min(LEAST)  # [B, C]
        if self.delta is None:
            beta = beta.detach()
        else:
            self.stats["revision"] = self.delta.detach().abs().amax()
        self.stats["weight"] = (target * beta).detach().sum(-1).mean()
        return cross_entropy(log_p, target * beta)
