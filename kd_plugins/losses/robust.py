"""Losses on which a wrong label has less effect than on cross-entropy.

All are linear in the label, L = Σ_c q_c L(p_c), except for RCE's log q. A one-hot label gives the
published form in p_y, and Mixup works.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments, Sum
from .functional import cross_entropy, log_softmax
from .registry import create_loss, register_loss
from .state import Progress, SampleTable


def _power_loss(log_p: Tensor, target: Tensor, q: float) -> Tensor:
    """Σ_c q_c (1 - p_c^q) / q, [B]. At p_c = 0 the gradient is its limit 0, not 0 · inf."""
    return (target * -torch.expm1(q * log_p)).sum(-1) / q


@register_loss("mae")
class MAE(Loss):
    """Mean absolute error, L = 1 - p_y: half of the L1 distance ‖q - p‖ for a one-hot q.

    References:
        Ghosh, Kumar and Sastry, "Robust loss functions under label noise for deep neural networks",
        AAAI 2017, where it is the L1 distance, twice this.

    Notes:
        Halved as in the APL authors' code, so that GCE with q = 1 is MAE; their weights beta are
        for this scale.

    >>> MAE()(torch.zeros(1, 4), torch.tensor([0]))
    tensor(0.7500)
    """

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return _power_loss(log_softmax(logits), target, 1.0)


@register_loss("gce")
class GCE(Loss):
    """Generalised cross-entropy, L_q = (1 - p_y^q) / q: cross-entropy as q -> 0, MAE at q = 1.

    Args:
        q: in (0, 1]; the larger, the less a wrong label weighs and the slower it trains. The paper
            uses 0.7.

    References:
        Zhang and Sabuncu, "Generalized cross entropy loss for training deep neural networks with
        noisy labels", NeurIPS 2018.

    Notes:
        p is not clamped. Public code has a NaN gradient at p_y = 0, or none below 1e-7.

    >>> GCE(q=0.5)(torch.zeros(1, 4), torch.tensor([0]))  # (1 - 1/2) / (1/2)
    tensor(1.)
    """

    def __init__(self, q: float = 0.7, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.q = validate.check(
            0.0 < q <= 1.0,
            "q",
            q,
            "0 < q <= 1",
            "q -> 0 is cross-entropy (CE), q = 1 is MAE; above 1, wrong predictions hardly train",
        )

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return _power_loss(log_softmax(logits), target, self.q)


@register_loss("truncated_gce")
class TruncatedGCE(GCE):
    """Truncated GCE, L = w L_q(p) + (1 - w) L_q(k), w = 1[L_q(p) < L_q(k)].

    A sample with p_y <= k is pruned: its loss is a constant. Each training sample has one weight w,
    which is 1 up to ``start`` (plain GCE). From then on w is set at the sample's first visit and at
    every ``refresh``-th visit after it, and kept in between, so a pruned sample can come back.
    Where each epoch visits every sample once, a visit is an epoch. The mean is over the whole
    batch, pruned samples included.

    Weights and visits are state: equal on all processes, in the checkpoint, unchanged in ``eval()``
    and without gradients. Needs :meth:`set_progress`. With k = 0 it is GCE.

    Args:
        num_samples: rows of the training data; :meth:`bind` can fill it in.
        q: see :class:`GCE`.
        k: the p_y at or below which a sample is pruned, in [0, 1); 0.5 in the paper.
        start: training progress at which pruning begins, in [0, 1].
        refresh: visits from one decision on a sample to the next.

    References:
        Zhang and Sabuncu, "Generalized cross entropy loss for training deep neural networks with
        noisy labels", NeurIPS 2018, the truncated loss.

    Notes:
        The public port refreshes w in an extra pass over the data, from epoch 40 of 120 and every
        10 epochs; here w comes from the training forward, at the same times. The port's value
        leaves out L_q(k) of every sample, pruned or not: another value, the same gradient.
    """

    num_samples: Any  # int, or None as long as it is not known
    needs: Mapping[str, str] = {"num_samples": "num_samples"}

    def __init__(
        self,
        num_samples: int | None = None,
        q: float = 0.7,
        k: float = 0.5,
        start: float = 1 / 3,
        refresh: int = 10,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(q, **base)
        self.k = validate.fraction("k", k, "at 1 every sample would be pruned", with_one=False)
        self.start = validate.fraction("start", start, "it is training progress, not an epoch")
        self.refresh = validate.count("refresh", refresh, "visits between two decisions")
        self.num_samples = num_samples
        self.limit = -math.expm1(q * math.log(k)) / q if k else 1.0 / q  # L_q(k)
        self.progress = Progress()
        self.complete()

    def build(self) -> None:
        self.weights = SampleTable(self.num_samples, fill=1.0, dtype=torch.bool)
        self.visits = SampleTable(self.num_samples, dtype=torch.int32)  # since start

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        losses = super().per_sample(logits, target)
        if self.moves_state:
            self._decide(losses.detach(), index)
        w = self.weights.read(index).to(losses.dtype)
        self.log("kept", w)
        return w * losses + (1.0 - w) * self.limit

    def _decide(self, losses: Tensor, index: Tensor) -> None:
        # a NaN is no visit
        counts = (self.progress.get(self) >= self.start) & torch.isfinite(losses)
        visits = self.visits.read(index)
        keep = (losses < self.limit) | (self.k == 0)  # a p_y of 0 in floats is not below k = 0
        due = counts & (visits % self.refresh == 0)
        self.weights.write(index, torch.where(due, keep, self.weights.read(index)))
        self.visits.write(index, visits + counts)


@register_loss("rce")
class RCE(Loss):
    """Reverse cross-entropy, L = -Σ_k p_k log q_k with log 0 := log_zero.

    For a one-hot label, L = -log_zero (1 - p_y).

    Args:
        log_zero: the paper's A, below 0.

    References:
        Wang et al., "Symmetric cross entropy for robust learning with noisy labels" (SCE), ICCV
        2019. The paper could not be read; independent code names A = -4 as its default
        (docs/unconfirmed.md).

    Notes:
        The code of SCE and of APL clamps the label at 1e-4, which is ``log_zero=math.log(1e-4)`` =
        -9.2103, and p at 1e-7, which stops the gradient; here p is not clamped. Soft labels are not
        in the paper: log q_k is never below log_zero, so a mass under exp(log_zero) = 0.018 counts
        as none.

    >>> RCE()(torch.zeros(1, 4), torch.tensor([0]))  # 4 · (1 - 1/4)
    tensor(3.)
    """

    def __init__(self, log_zero: float = -4.0, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.log_zero = validate.check(
            -math.inf < log_zero < 0.0,
            "log_zero",
            log_zero,
            "a finite number below 0 in place of log 0",
            "RCE is -log_zero (1 - p_y): at 0 it is off, above 0 it would maximise the error",
        )

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.reverse(log_softmax(logits), target)

    def reverse(self, log_p: Tensor, target: Tensor) -> Tensor:
        """RCE of log p [B, C] and distributions [B, C]."""
        return -(log_p.exp() * target.log().clamp_min(self.log_zero)).sum(-1)


@register_loss("sce")
class SCE(RCE):
    """Symmetric cross-entropy, L = alpha H(q, p) + beta R(q, p), R the reverse cross-entropy.

    Args:
        alpha, beta: weights of the two terms. CIFAR-100 6, 0.1 (the default); CIFAR-10 0.1, 1;
            Webvision 10, 1; MNIST 0.01, 1.
        log_zero: in place of log 0, below 0.

    References:
        Wang et al., "Symmetric cross entropy for robust learning with noisy labels" (SCE), ICCV
        2019.

    Notes:
        See :class:`RCE`. The authors' code has log_zero = -9.2103 and so a second term 2.3 times as
        large at the same beta; ``log_zero=math.log(1e-4)`` gives it.

    >>> SCE(alpha=0.0, beta=1.0)(torch.zeros(1, 4), torch.tensor([0]))
    tensor(3.)
    """

    def __init__(
        self,
        alpha: float = 6.0,
        beta: float = 0.1,
        log_zero: float = -4.0,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(log_zero, **base)
        self.alpha = validate.non_negative("alpha", alpha, "below 0 the term would be maximised")
        self.beta = validate.non_negative("beta", beta, "below 0 the term would be maximised")

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        reverse = self.reverse(log_p, target)
        return self.alpha * cross_entropy(log_p, target) + self.beta * reverse


@register_loss("nce")
class NCE(Loss):
    """Normalised cross-entropy, L = H(q, p) / Σ_k (-log p_k), in [0, 1].

    It is robust, and trains slowly by itself: it is the active half of :class:`APL`.

    References:
        Ma et al., "Normalized loss functions for deep learning with noisy labels" (APL), ICML 2020.

    >>> NCE()(torch.zeros(1, 4), torch.tensor([0]))
    tensor(0.2500)
    """

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        return cross_entropy(log_p, target) / -log_p.sum(-1)  # at least C ln C: never 0


@register_loss("nfl")
class NFL(Loss):
    """Normalised focal loss, L = (1 - p_y)^gamma log p_y / Σ_k (1 - p_k)^gamma log p_k.

    With gamma = 0 it is NCE.

    Args:
        gamma: 0 or more; 0.5 in the APL authors' code.

    References:
        Ma et al., "Normalized loss functions for deep learning with noisy labels" (APL), ICML 2020,
        from Lin et al., "Focal loss for dense object detection", ICCV 2017.

    Notes:
        The factors (1 - p)^gamma are constants for the gradient, in numerator and denominator. This
        is the authors' code's choice; the equations alone would differentiate them.

    >>> NFL()(torch.zeros(1, 4), torch.tensor([0]))
    tensor(0.2500)
    """

    def __init__(self, gamma: float = 0.5, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.gamma = validate.non_negative("gamma", gamma, "below 0, p_y = 1 weighs infinitely")

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        focal = (-torch.expm1(log_p.detach())) ** self.gamma * log_p
        # the sum is below -2^-gamma ln 2, since some p_k <= 1/2: never 0
        return (target * focal).sum(-1) / focal.sum(-1)


@register_loss("apl")
class APL(Sum):
    """Active passive loss, L = alpha active + beta passive; NCE and RCE by default.

    Active losses only raise p_y (NCE, NFL); passive ones also lower the other p_k (MAE, RCE). It is
    the :class:`Sum` of any two losses, under the paper's name.

    Args:
        active, passive: a registered name, made with its defaults, or a loss.
        alpha, beta: their weights. CIFAR-100 NCE+RCE 10, 0.1 (the default) and NCE+MAE 10, 1;
            CIFAR-10 1, 1; Webvision 50, 0.1 and 50, 1; MNIST 1, 10. The same with NFL.

    References:
        Ma et al., "Normalized loss functions for deep learning with noisy labels" (APL), ICML 2020.

    Notes:
        The authors' RCE has log_zero = -9.2103: ``passive=RCE(log_zero=math.log(1e-4))``. Their GCE
        pairs ignore alpha; here it always counts.

    >>> loss = APL("nfl", "mae", alpha=10, beta=1)
    >>> loss(torch.zeros(1, 4), torch.tensor([0]))  # 10/4 + 3/4
    tensor(3.2500)
    """

    def __init__(
        self,
        active: str | Loss = "nce",
        passive: str | Loss = "rce",
        alpha: float = 10.0,
        beta: float = 0.1,
        **base: Unpack[LossArguments],
    ) -> None:
        terms = [create_loss(term) if isinstance(term, str) else term for term in (active, passive)]
        for name, term in zip(("active", "passive"), terms, strict=True):
            if not isinstance(term, Loss):
                raise TypeError(f"{name} must be the name of a loss or a loss, got {term!r}")
        validate.non_negative("alpha", alpha, "below 0 the term would be maximised")
        validate.non_negative("beta", beta, "below 0 the term would be maximised")
        super().__init__([(alpha, terms[0]), (beta, terms[1])], **base)
