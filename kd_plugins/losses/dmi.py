"""Determinant-based mutual information of labels and predictions."""

from __future__ import annotations

import math
import warnings
from typing import Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .registry import register_loss


@register_loss("dmi")
class DMI(Loss):
    """Determinant-based mutual information, L = -log(abs(det U) + eps) with U = Yᵀ P [C, C].

    U is the batch's joint distribution of label and prediction, times B. L is one number for the
    whole batch; each process takes its own batch. It needs a network that cross-entropy has trained
    already, and large batches (the authors: 256): where det U = 0, and so wherever a class is
    missing, the gradient is zero.

    Args:
        eps: 1e-3 in the authors' code. With many classes abs(det U) can be far below it, and the
            gradient then vanishes. eps = 0 gives -log abs(det U), where only a batch without a
            determinant has a finite value and no gradient.

    References:
        Xu et al., "L_DMI: a novel information-theoretic loss function for training deep nets robust
        to label noise", NeurIPS 2019, in the form of the authors' code.

    Notes:
        The paper seems to have U / B and no eps, which changes the value by a constant; it could
        not be read (docs/unconfirmed.md). The float32 determinant of the code under- or overflows
        with 100 classes; here it is a logarithm in float64.

    >>> z = torch.tensor([[1.0, 1.0], [-50.0, 50.0]])
    >>> DMI(eps=0)(z, torch.tensor([0, 1]))  # U = [[1/2, 1/2], [0, 1]]
    tensor(0.6931)
    """

    def __init__(self, eps: float = 1e-3, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.eps = validate.non_negative("eps", eps, "below 0 the logarithm has no value")
        self._warned = False

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        b, c = logits.shape
        if not torch.compiler.is_compiling() and not self._warned and b < c:
            self._warned = True
            warnings.warn(
                f"DMI on a batch of {b} samples: they cannot hold all {c} classes, so the "
                "determinant is zero and the gradient is exactly zero; use batches well above the "
                "number of classes",
                stacklevel=6,
            )
        joint = target.double().T @ logits.double().softmax(-1)  # [C, C]
        singular = _is_singular(joint.detach())
        # the gradient of a determinant holds an inverse, which a singular matrix does not have
        safe = torch.where(singular, torch.eye(c, dtype=joint.dtype, device=joint.device), joint)
        log_det = torch.linalg.slogdet(safe).logabsdet
        log_eps = math.log(self.eps) if self.eps else -math.inf
        value = torch.logaddexp(log_det, torch.full_like(log_det, log_eps))
        without = math.log(max(self.eps, torch.finfo(joint.dtype).tiny))
        return -torch.where(singular, without, value).to(logits.dtype)


@torch.no_grad()
def _is_singular(u: Tensor) -> Tensor:
    """Whether U [C, C] >= 0 has no inverse, up to rounding. False for NaN, which has to be seen."""
    # columns to scale: that a class is hardly predicted does not make U singular
    u = u / u.amax(0).clamp_min(torch.finfo(u.dtype).tiny)
    pivots = torch.linalg.lu_factor_ex(u).LU.diagonal().abs()
    return pivots.amin() <= len(u) * torch.finfo(u.dtype).eps * pivots.amax()
