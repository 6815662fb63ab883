"""Loss correction: losses that know the label noise as a matrix T[i, j] = P(noisy j | clean i).

Where T is unknown, :func:`kd_plugins.audit.estimate_transition` estimates it from a network that
was trained on the noisy labels; training then starts anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Loss
from .functional import cross_entropy, log_softmax
from .registry import register_loss
from .validate import check

TOLERANCE = 1e-3  # of a sum that should be 1
LARGEST_CONDITION = 1e6  # above it, no digit of T T⁻¹ = I is left in float32
UNDERFLOW = 1e-30  # below it, sums of probabilities in float32 lose terms
LEAST = 1e-12  # smallest denominator; below it, the square of dT's gradient overflows in Adam


def transition_matrix(transition: Any) -> Tensor:
    """T [C, C] in float64 on the CPU, if it is a transition matrix.

    Raises:
        ValueError: T is not square, an entry is no probability, or a row does not sum to 1.
    """
    matrix = torch.as_tensor(transition, dtype=torch.float64, device="cpu").detach()
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(
            f"transition: expected a matrix [C, C] with C >= 2, got {list(matrix.shape)}"
        )
    if not (matrix >= 0).all():  # also true for NaN
        i, j = (~(matrix >= 0)).nonzero()[0].tolist()
        raise ValueError(
            f"transition[{i}, {j}]={matrix[i, j]:.6g}: expected a probability; its logarithm "
            "would be NaN"
        )
    error = (matrix.sum(1) - 1).abs()
    if not (error <= TOLERANCE).all():
        i = int(error.argmax())
        transposed = bool(((matrix.sum(0) - 1).abs() <= TOLERANCE).all())
        raise ValueError(
            f"transition: row {i} sums to {matrix[i].sum():.6g}, expected 1: T[i, j] = P(noisy j | "
            "clean i); the loss would correct for another noise"
            + ("; its columns sum to 1: pass transition.T" if transposed else "")
        )
    return matrix


class Corrected(Loss):
    """A loss that knows T [C, C], and with it the number of classes."""

    transition: Tensor

    def __init__(self, transition: Any, *, num_classes: int | None = None, **base: Any) -> None:
        matrix = transition_matrix(transition)
        c = len(matrix)
        check(
            num_classes in (None, c), "num_classes", num_classes, f"{c}: transition is [{c}, {c}]"
        )
        super().__init__(num_classes=c, **base)
        self.register_buffer("transition", matrix.float())


@register_loss("forward_correction")
class ForwardCorrection(Corrected):
    """Forward correction, L = -Σ_k q_k log (p T)_k: p passes through the noise, then meets q.

    Over the noisy labels, L is smallest where p is the clean posterior. With T = I it is
    cross-entropy.

    Args:
        transition: T [C, C], T[i, j] = P(noisy label j | clean label i); rows sum to 1.

    References:
        Patrini et al., "Making deep neural networks robust to label noise: a loss correction
        approach", CVPR 2017, the forward procedure.

    Notes:
        Public code takes log((p T)_k + 1e-12), clips p at 1e-7 (no gradient below), or is NaN at 0.
        This one is exact down to (p T)_k = 1e-30. Below that, float32 loses terms of the sum, so
        the term of class k alone, log p_k + log T_kk, replaces it: the value is finite, and the
        gradient still raises p_k.

    >>> loss = ForwardCorrection([[0.8, 0.2], [0.4, 0.6]])
    >>> loss(torch.zeros(1, 2), torch.tensor([0]))  # -log(0.5 · 0.8 + 0.5 · 0.4)
    tensor(0.5108)
    """

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        matrix = self.transition.to(log_p.dtype)
        noisy = log_p.exp() @ matrix  # [B, C]
        own = log_p + (matrix.diagonal() + UNDERFLOW).log()
        known = noisy > UNDERFLOW
        return cross_entropy(torch.where(known, torch.where(known, noisy, 1.0).log(), own), target)


@register_loss("backward_correction")
class BackwardCorrection(Corrected):
    """Backward correction, L = -Σ_k (q T⁻¹)_k log p_k: unbiased for the clean cross-entropy.

    The mean of L over the noisy labels of a sample is its clean cross-entropy, for every p. The
    price is variance: (q T⁻¹) has negative entries, so L may be negative and has no lower bound.
    Forward correction is usually preferred.

    Args:
        transition: T [C, C], T[i, j] = P(noisy label j | clean label i); rows sum to 1. It is
            inverted once, in float64.

    References:
        Patrini et al., "Making deep neural networks robust to label noise: a loss correction
        approach", CVPR 2017, the backward procedure.

    Notes:
        The paper does not say how close to singular T may be. A condition number above 1e6 is
        refused.

    >>> loss = BackwardCorrection([[0.8, 0.2], [0.4, 0.6]])
    >>> loss.inverse
    tensor([[ 1.5000, -0.5000],
            [-1.0000,  2.0000]])
    """

    inverse: Tensor

    def __init__(self, transition: Any, **base: Any) -> None:
        super().__init__(transition, **base)
        matrix = transition_matrix(transition)
        condition = float(torch.linalg.cond(matrix))
        if not condition <= LARGEST_CONDITION:
            raise ValueError(
                f"transition: its condition number is {condition:.3g}, expected at most "
                f"{LARGEST_CONDITION:.0g}: the matrix is (nearly) singular and its inverse would "
                "magnify the noise as much; ForwardCorrection needs no inverse"
            )
        self.register_buffer("inverse", torch.linalg.inv(matrix).float())

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(log_softmax(logits), target @ self.inverse.to(target.dtype))


@register_loss("t_revision")
class TRevision(Corrected):
    """T-revision, L = mean_i β_i H(q_i, p_i) with β = p_y / (p T')_y and T' = T + dT.

    β weights a sample by how much more likely its label is as a clean label than as a noisy one.
    dT is learned together with the network. For soft labels, L_i = Σ_k q_k β_k (-log p_k).

    The method has three stages. Stage 1 is :func:`kd_plugins.audit.estimate_transition`. Stage 2,
    ``revise=False``, has no dT, and β is a constant. Stage 3, ``revise=True``, starts from dT = 0;
    β carries gradients, or dT would never learn.

    Continue stage 3 from the network of stage 2 with a tiny learning rate (published: Adam at 5e-7
    for network and dT together). Every entry of dT can only grow, and the network can lower the
    loss by lowering β. As in the authors' code T' is not renormalised, so its rows come to sum to
    more than 1. An entry of T' that another term makes negative counts as 0. β is at most
    1 / T'_yy, so a diagonal entry near 0 makes huge weights. The denominator is at least 1e-12: a
    label with p_y far below that is ignored, also with T = I.

    Args:
        transition: T [C, C], T[i, j] = P(noisy label j | clean label i); rows sum to 1.
        revise: learn dT (stage 3).

    References:
        Xia et al., "Are anchor points really indispensable in label-noise learning?", NeurIPS 2019.

    Notes:
        One version of the authors' code adds dT to T once more for every sample; another detaches
        β in stage 3.

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
        return self._revised().detach().clone()

    def _revised(self) -> Tensor:
        return self.transition if self.delta is None else self.transition + self.delta

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        matrix = self._revised()
        matrix = torch.where(matrix < 0, 0.0, matrix)  # clamp gives an entry of 0 no gradient
        p = log_p.exp()
        beta = p / (p @ matrix.to(p.dtype)).clamp_min(LEAST)  # [B, C]
        if self.delta is None:
            beta = beta.detach()
        else:
            self.log("revision", self.delta.detach().abs().amax())
        weighted = target * beta
        self.log("weight", weighted.detach().sum(-1))
        return cross_entropy(log_p, weighted)
