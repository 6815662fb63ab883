"""Losses that a wrong label can push less far than cross-entropy does.

All but DMI are linear in the label, L = Σ_c q_c L(p_c) (RCE apart from its log q): a one-hot row gives the published form
in p_y, and Mixup works.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, Sum
from .functional import cross_entropy
from .registry import create_loss, register_loss
from .state import Progress, SampleTable


def _weight(name: str, value: float) -> float:
    if not 0.0 <= value < math.inf:
        raise ValueError(
            f"{name}={value}: expected the weight of a term, 0 or more; a negative one would maximise it"
        )
    return value


def _log_zero(value: float) -> float:
    if not -math.inf < value < 0.0:
        raise ValueError(
            f"log_zero={value}: expected a finite number below 0 in place of log 0; RCE is -log_zero (1 - p_y), so 0 would "
            "switch it off, a positive number maximise the error, and -inf make it infinite"
        )
    return value


def _power_loss(log_p: Tensor, target: Tensor, q: float) -> Tensor:
    """Σ_c q_c (1 - p_c^q) / q -> [B]. At p_c = 0 the gradient is its limit 0, not 0 · inf, and no clamp stops it before."""
    return (target * -torch.expm1(q * log_p)).sum(-1) / q


def _reverse_cross_entropy(log_p: Tensor, target: Tensor, log_zero: float) -> Tensor:
    return -(log_p.exp() * target.log().clamp_min(log_zero)).sum(-1)


@register_loss("mae")
class MAE(Loss):
    """Mean absolute error, L = 1 - p_y: half of the L1 distance ‖q - p‖ for a one-hot q.

    Source: Ghosh et al., AAAI 2017, where it is L1, twice this.
    Differs: halved as in the APL authors' code, so that GCE with q = 1 is MAE; their weights beta are for this scale.

    >>> MAE()(torch.zeros(1, 4), torch.tensor([0]))
    tensor(0.7500)
    """

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return _power_loss(F.log_softmax(logits, dim=-1), target, 1.0)


@register_loss("gce")
class GCE(Loss):
    """Generalised cross-entropy, L_q = (1 - p_y^q) / q: cross-entropy as q -> 0, MAE at q = 1.

    Source: Zhang & Sabuncu, NeurIPS 2018.
    Differs: no clamp of p; the public versions have a NaN gradient at p_y = 0, or none below 1e-7.

    Args:
        q: in (0, 1]; the larger, the less a wrong label weighs and the slower it trains. 0.7 in the paper.

    >>> GCE(q=0.5)(torch.zeros(1, 4), torch.tensor([0]))  # (1 - 1/2) / (1/2)
    tensor(1.)
    """

    def __init__(self, q: float = 0.7, **base: Any) -> None:
        super().__init__(**base)
        if not 0.0 < q <= 1.0:
            raise ValueError(
                f"q={q}: expected 0 < q <= 1; q -> 0 is cross-entropy (use CE, here it would be 0 / 0), q = 1 is MAE, and "
                "above 1 samples with a wrong prediction would hardly train"
            )
        self.q = q

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return _power_loss(F.log_softmax(logits, dim=-1), target, self.q)


@register_loss("truncated_gce")
class TruncatedGCE(GCE):
    """Truncated GCE, L = w L_q(p) + (1 - w) L_q(k), w = 1[L_q(p) < L_q(k)]: a label that p does not believe by k is pruned.

    One weight w for each training sample, 1 up to ``start`` (plain GCE). From then on each sample's w is set at its first
    visit and at every ``refresh``-th after it, and kept in between: a pruned sample can come back. A visit is an epoch, for
    samples that are seen once in each. The mean is over the whole batch, with what is pruned. Weights and visits are state:
    the same on all processes, in the checkpoint, unchanged in ``eval()``. Needs :meth:`set_progress`; k = 0 is GCE.

    Source: Zhang & Sabuncu, NeurIPS 2018, the truncated loss.
    Differs: the public port refreshes w in a pass of its own over the data set, from epoch 40 of 120 and every 10 epochs;
    here w comes from the training forward, at the same times. The code's value leaves out the constant L_q(k) of every
    sample, pruned or not: another value, the same gradient.

    Args:
        num_samples: rows of the training data.
        q: see :class:`GCE`.
        k: the p_y below which a sample is pruned, in [0, 1); 0.5 in the paper.
        start: training progress at which pruning begins, in [0, 1].
        refresh: visits from one decision on a sample to the next.
    """

    def __init__(
        self,
        num_samples: int,
        q: float = 0.7,
        k: float = 0.5,
        start: float = 1 / 3,
        refresh: int = 10,
        **base: Any,
    ) -> None:
        super().__init__(q, **base)
        if not 0.0 <= k < 1.0:
            raise ValueError(
                f"k={k}: expected a probability in [0, 1); at 1 every sample would be pruned"
            )
        if not 0.0 <= start <= 1.0:
            raise ValueError(
                f"start={start}: expected a training progress in [0, 1], not an epoch; above 1 pruning would never begin"
            )
        if refresh < 1:
            raise ValueError(
                f"refresh={refresh}: expected at least 1 visit from one decision on a sample to the next"
            )
        self.num_samples, self.k, self.start, self.refresh = num_samples, k, start, refresh
        self.limit = -math.expm1(q * math.log(k)) / q if k else 1.0 / q  # L_q(k)
        self.progress = Progress()
        self.weights = SampleTable(num_samples, fill=1.0, dtype=torch.bool)
        self.visits = SampleTable(num_samples, dtype=torch.int32)  # since start

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        losses = super().per_sample(logits, target)
        if self.training:
            self._decide(losses.detach(), index)
        w = self.weights.read(index).to(losses.dtype)
        self.stats["kept"] = w.mean()
        return w * losses + (1.0 - w) * self.limit

    def _decide(self, losses: Tensor, index: Tensor) -> None:
        counts = (self.progress.get(self) >= self.start) & torch.isfinite(
            losses
        )  # a NaN is no visit
        visits = self.visits.read(index)
        keep = (losses < self.limit) | (self.k == 0)  # p_y that underflows to 0 is not below k = 0
        due = counts & (visits % self.refresh == 0)
        self.weights.write(index, torch.where(due, keep, self.weights.read(index)))
        self.visits.write(index, visits + counts)


@register_loss("rce")
class RCE(Loss):
    """Reverse cross-entropy, L = -Σ_k p_k log q_k with log 0 := log_zero; for a one-hot label -log_zero (1 - p_y).

    Source: Wang et al., SCE, ICCV 2019.
    Differs: log_zero = -4 is the paper's (from memory of it, could not be confirmed); the code of SCE and of APL clamps the
    label at 1e-4, which is ``log_zero=math.log(1e-4)`` = -9.2103, and p at 1e-7, which stops the gradient: no clamp here.
    Unsaid there: soft labels. log q_k is nowhere below log_zero, so a mass under exp(log_zero) = 0.018 counts as none.

    Args:
        log_zero: the paper's A, below 0.

    >>> RCE()(torch.zeros(1, 4), torch.tensor([0]))  # 4 · (1 - 1/4)
    tensor(3.)
    """

    def __init__(self, log_zero: float = -4.0, **base: Any) -> None:
        super().__init__(**base)
        self.log_zero = _log_zero(log_zero)

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return _reverse_cross_entropy(F.log_softmax(logits, dim=-1), target, self.log_zero)


@register_loss("sce")
class SCE(Loss):
    """Symmetric cross-entropy, L = alpha H(q, p) + beta RCE, with RCE = -Σ_k p_k log q_k and log 0 := log_zero.

    Source: Wang et al., SCE, ICCV 2019.
    Differs: see :class:`RCE`: log_zero = -4 is the paper's (from memory), the authors' code has -9.2103 and so a term 2.3
    times as large at the same beta; ``log_zero=math.log(1e-4)`` gives it.

    Args:
        alpha, beta: weights of the two terms. CIFAR-100 6, 0.1 (the default); CIFAR-10 0.1, 1; Webvision 10, 1; MNIST 0.01, 1.
        log_zero: in place of log 0, below 0.

    >>> SCE(alpha=0.0, beta=1.0)(torch.zeros(1, 4), torch.tensor([0]))
    tensor(3.)
    """

    def __init__(
        self, alpha: float = 6.0, beta: float = 0.1, log_zero: float = -4.0, **base: Any
    ) -> None:
        super().__init__(**base)
        self.alpha, self.beta, self.log_zero = (
            _weight("alpha", alpha),
            _weight("beta", beta),
            _log_zero(log_zero),
        )

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1)
        reverse = _reverse_cross_entropy(log_p, target, self.log_zero)
        return self.alpha * cross_entropy(log_p, target) + self.beta * reverse


@register_loss("nce")
class NCE(Loss):
    """Normalised cross-entropy, L = H(q, p) / Σ_k (-log p_k), in [0, 1].

    Robust, and trains slowly by itself: it is the active half of :class:`APL`.

    Source: Ma et al., APL, ICML 2020.

    >>> NCE()(torch.zeros(1, 4), torch.tensor([0]))
    tensor(0.2500)
    """

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1)
        return cross_entropy(log_p, target) / -log_p.sum(-1)  # at least C ln C: needs no guard


@register_loss("nfl")
class NFL(Loss):
    """Normalised focal loss, L = (1 - p_y)^gamma log p_y / Σ_k (1 - p_k)^gamma log p_k; NCE at gamma = 0.

    Source: Ma et al., APL, ICML 2020, from Lin et al., ICCV 2017.
    Unsaid there: the factors (1 - p)^gamma are constants for the gradient, in the numerator and in the denominator. That is
    the authors' code's choice; the equations alone would differentiate them.

    Args:
        gamma: 0 or more; 0.5 in the APL authors' code.

    >>> NFL()(torch.zeros(1, 4), torch.tensor([0]))
    tensor(0.2500)
    """

    def __init__(self, gamma: float = 0.5, **base: Any) -> None:
        super().__init__(**base)
        if not 0.0 <= gamma < math.inf:
            raise ValueError(
                f"gamma={gamma}: expected 0 or more; below 0 a sample that is right would weigh infinitely much"
            )
        self.gamma = gamma

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, dim=-1)
        focal = (-torch.expm1(log_p.detach())) ** self.gamma * log_p
        return (target * focal).sum(-1) / focal.sum(
            -1
        )  # below -2^-gamma ln 2, for some p_k <= 1/2: needs no guard


@register_loss("apl")
class APL(Sum):
    """Active passive loss, L = alpha active + beta passive; NCE and RCE unless told otherwise.

    Active losses raise p_y only (NCE, NFL), passive ones also lower the others (MAE, RCE). Any two losses are taken; it is
    their :class:`Sum`, with the paper's name.

    Source: Ma et al., APL, ICML 2020.
    Differs: the authors' RCE has log_zero = -9.2103; ``passive=RCE(log_zero=math.log(1e-4))`` gives it. Their GCE pairs
    leave alpha out; here it always counts.

    Args:
        active, passive: a registered name, made with its defaults, or a loss.
        alpha, beta: their weights. CIFAR-100 NCE+RCE 10, 0.1 (the default) and NCE+MAE 10, 1; CIFAR-10 1, 1;
            Webvision 50, 0.1 and 50, 1; MNIST 1, 10. The same with NFL.

    >>> APL("nfl", "mae", alpha=10, beta=1)(torch.zeros(1, 4), torch.tensor([0]))  # 10/4 + 3/4
    tensor(3.2500)
    """

    def __init__(
        self,
        active: str | Loss = "nce",
        passive: str | Loss = "rce",
        alpha: float = 10.0,
        beta: float = 0.1,
        *,
        num_classes: int | None = None,
        **base: Any,
    ) -> None:
        terms = [create_loss(term) if isinstance(term, str) else term for term in (active, passive)]
        for name, term in zip(("active", "passive"), terms, strict=True):
            if not isinstance(term, Loss):
                raise TypeError(f"{name} must be the name of a loss or a loss, got {term!r}")
        super().__init__(
            [(_weight("alpha", alpha), terms[0]), (_weight("beta", beta), terms[1])], **base
        )
        if self.num_classes not in (None, num_classes or self.num_classes):
            raise ValueError(
                f"num_classes={num_classes}, but a term was made for num_classes={self.num_classes}"
            )
        self.num_classes = num_classes or self.num_classes


@register_loss("dmi")
class DMI(Loss):
    """Determinant-based mutual information, L = -log(abs(det U) + eps) with U = Yᵀ P [C, C]; one number for the whole batch.

    U is the batch's joint distribution of label and prediction, times B. It wants a network that cross-entropy has trained
    already, and large batches (the authors: 256): where det U = 0, so wherever a class is missing, the gradient is zero. Each
    process takes its own batch.

    Source: Xu et al., L_DMI, NeurIPS 2019, in the form of the authors' code.
    Differs: the paper has no eps and U / B (from memory of it, could not be confirmed), another constant; the code's float32
    determinant under- or overflows with 100 classes, here it is a float64 logarithm.

    Args:
        eps: 1e-3 in the authors' code. With many classes abs(det U) can be far below, and the gradient then vanishes: 0 gives
            the paper's -log abs(det U), where only a batch without a determinant has a finite value and no gradient.

    >>> DMI(eps=0)(torch.tensor([[1.0, 1.0], [-50.0, 50.0]]), torch.tensor([0, 1]))  # U = [[1/2, 1/2], [0, 1]]
    tensor(0.6931)
    """

    def __init__(self, eps: float = 1e-3, **base: Any) -> None:
        super().__init__(**base)
        if not 0.0 <= eps < math.inf:
            raise ValueError(
                f"eps={eps}: expected 0 or more beside the determinant; below 0 the logarithm has no value"
            )
        self.eps = eps
        self._warned = False

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        b, c = logits.shape
        if not torch.compiler.is_compiling() and not self._warned and b < c:
            self._warned = True
            warnings.warn(
                f"DMI on a batch of {b} samples: they cannot hold all {c} classes, so the determinant and with it "
                "the gradient is exactly zero; take batches well above the number of classes",
                stacklevel=5,
            )
        joint = target.double().T @ logits.double().softmax(-1)  # [C, C]
        singular = _is_singular(joint.detach())
        # the gradient of a determinant holds an inverse: a matrix that has none must not come near it
        safe = torch.where(singular, torch.eye(c, dtype=joint.dtype, device=joint.device), joint)
        log_det = torch.linalg.slogdet(safe).logabsdet
        value = torch.logaddexp(
            log_det, torch.full_like(log_det, math.log(self.eps) if self.eps else -math.inf)
        )
        nothing = math.log(max(self.eps, torch.finfo(joint.dtype).tiny))
        return -torch.where(singular, nothing, value).to(logits.dtype)


@torch.no_grad()
def _is_singular(u: Tensor) -> Tensor:
    """Whether U [C, C] >= 0 has no inverse up to rounding; a NaN is not that, for it has to be seen."""
    # columns to scale: that a class is hardly predicted does not make U singular
    u = u / u.amax(0).clamp_min(torch.finfo(u.dtype).tiny)
    pivots = torch.linalg.lu_factor_ex(u).LU.diagonal().abs()
    return pivots.amin() <= len(u) * torch.finfo(u.dtype).eps * pivots.amax()
