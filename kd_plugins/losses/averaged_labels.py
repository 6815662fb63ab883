"""Predictions averaged over time, in a table with one row per training sample: ELR, SELC, SAT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import validate
from .base import Loss
from .functional import cross_entropy, log_softmax
from .registry import register_loss
from .sample_memory import fill_unseen
from .state import Progress, SampleTable

CLIP = 1e-4  # of ELR: p in [CLIP, 1 - CLIP]


def clipped(p: Tensor) -> Tensor:
    """p within [1e-4, 1 - 1e-4]; without a gradient outside."""
    return p.clamp(CLIP, 1.0 - CLIP)


class _Averaged(Loss):
    """A loss with a table ``averages`` [N, C]. A row that was never written is 0."""

    num_samples: Any  # int, or None as long as it is not known
    num_classes: Any
    needs: Mapping[str, str] = {"num_samples": "num_samples", "num_classes": "num_classes"}

    def __init__(self, num_samples: int | None, num_classes: int | None, **base: Any) -> None:
        super().__init__(num_classes=num_classes, **base)
        self.num_samples = num_samples
        self.complete()

    def build(self) -> None:
        self.averages = SampleTable(self.num_samples, self.num_classes)


@register_loss("elr")
class ELR(_Averaged):
    """Early-learning regularisation, L_i = H(q_i, p_i) + lambda_ ln(1 - t_i·p_i).

    t_i is the average of the sample's predictions: each training visit first moves
    t <- beta t + (1 - beta) p, starting from t = 0, and then reads it, without gradient. The second
    term is at most 0. It pulls a prediction towards what was learned early, before the wrong labels
    were. With ``lambda_=0`` it is cross-entropy.

    The table takes N · C · 4 bytes (CIFAR-100: 20 MB) on the device and in each checkpoint.

    Args:
        num_samples: rows of the training data; ``index`` counts in them. :meth:`bind` can fill in
            this and ``num_classes``.
        num_classes: C.
        lambda_: weight of the regulariser, λ. CIFAR-100 7 (the default), CIFAR-10 symmetric 3,
            CIFAR-10 asymmetric 1.
        beta: of the average, in [0, 1). CIFAR-100 and CIFAR-10 asymmetric 0.9 (the default),
            CIFAR-10 symmetric 0.7.

    References:
        Liu et al., "Early-learning regularization prevents memorization of noisy labels", NeurIPS
        2020.

    Notes:
        In the second term p is clipped to [1e-4, 1 - 1e-4], as in the authors' code, and what the
        average takes is divided by its sum. Without the clip the term is -infinity where t = p is
        one-hot. A clipped p_c has no gradient there. t is not corrected for its start at 0: after k
        visits its row sums to 1 - beta^k, so the first epochs are regularised weakly. The table is
        in the checkpoint here; the authors' code starts it anew. Do not mix pictures (Mixup,
        CutMix): the row belongs to one of them.

    >>> loss = ELR(num_samples=1, num_classes=2, lambda_=1.0, beta=0.5)
    >>> loss(torch.zeros(1, 2), torch.tensor([0]), index=torch.tensor([0]))  # ln 2 + ln(3/4)
    tensor(0.4055)
    """

    def __init__(
        self,
        num_samples: int | None = None,
        num_classes: int | None = None,
        lambda_: float = 7.0,
        beta: float = 0.9,
        **base: Any,
    ) -> None:
        why = "below 0 it would push predictions away from what was learned early"
        validate.non_negative("lambda_", lambda_, why)
        validate.fraction("beta", beta, "at 1 the average would stay 0", with_one=False)
        super().__init__(num_samples, num_classes, **base)
        self.lambda_, self.beta = lambda_, beta

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        p = clipped(log_p.exp())
        if self.moves_state:
            self._store(index, p.detach())
        agreement = (self.averages.read(index).to(p.dtype) * p).sum(-1)  # at most 1 - CLIP
        own, regulariser = cross_entropy(log_p, target), torch.log1p(-agreement)
        self.log("own", own)
        self.log("regulariser", regulariser)
        return own + self.lambda_ * regulariser

    @torch.no_grad()
    def _store(self, index: Tensor, p: Tensor) -> None:
        old, now = self.averages.read(index), p / p.sum(-1, keepdim=True)
        self.averages.write(index, self.beta * old + (1.0 - self.beta) * now.to(old.dtype))


@register_loss("selc")
class SELC(_Averaged):
    """Self-ensemble label correction, L_i = H(s_i, p_i).

    Until progress ``begin`` the label s_i is the given one. From then on each training visit first
    moves s <- alpha s + (1 - alpha) p, without gradient, and then learns from it. After k visits
    the given label weighs alpha^k.

    The table takes N · C · 4 bytes (CIFAR-100: 20 MB) on the device and in each checkpoint. After
    training, :meth:`soft_labels` gives the corrected labels, for a fresh network with
    :class:`SoftLabels`.

    Args:
        num_samples: rows of the training data; ``index`` counts in them. :meth:`bind` can fill in
            this and ``num_classes``.
        num_classes: C.
        alpha: of the average, in [0, 1]: 0.9 in the paper, 0.8 on Clothing1M. At 1 the labels stay.
        begin: the progress at which labels change. The default is 30 of 200 epochs. CIFAR-10 with
            20, 40, 60 and 80% symmetric noise: 40, 30, 30 and 40; CIFAR-100: 30, 20, 30 and 40;
            asymmetric: 40 and 20.

    References:
        Lu and He, "SELC: self-ensemble label correction improves learning with noisy labels", IJCAI
        2022.

    Notes:
        The paper finds ``begin`` for each data set, as the point at which memorisation sets in. The
        authors' code takes the log of a softmax, which can be NaN. Do not mix pictures (Mixup,
        CutMix): the row belongs to one of them.

    >>> loss = SELC(num_samples=1, num_classes=2, alpha=0.5, begin=0.0)
    >>> loss.set_progress(0.0)
    >>> loss(torch.zeros(1, 2), torch.tensor([0]), index=torch.tensor([0]))
    tensor(0.6931)
    >>> loss.soft_labels()
    tensor([[0.7500, 0.2500]])
    """

    def __init__(
        self,
        num_samples: int | None = None,
        num_classes: int | None = None,
        alpha: float = 0.9,
        begin: float = 0.15,
        **base: Any,
    ) -> None:
        validate.fraction("alpha", alpha, "it is what the label keeps of itself at each visit")
        validate.fraction("begin", begin, "30 epochs of 200 are 0.15")
        super().__init__(num_samples, num_classes, **base)
        self.alpha, self.begin = alpha, begin
        self.progress = Progress()

    def soft_labels(self, given: Any = None) -> Tensor:
        """The corrected label of every sample, [N, C]; rows sum to 1.

        Args:
            given: class indices [N], for samples that training did not see after ``begin``, such
                as those whose picture cannot be read.

        Raises:
            ValueError: some samples were not seen, and ``given`` is missing.
        """
        self.require_sizes()
        rows = self.averages.rows
        return fill_unseen(rows, rows.sum(-1) == 0, given, f" after begin={self.begin}")

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        if self.moves_state:
            self._store(index, log_p.detach().exp(), target)
        label = self._read(index, target)
        self.log("changed", label.argmax(-1) != target.argmax(-1))
        return cross_entropy(log_p, label)

    @torch.no_grad()
    def _read(self, index: Tensor, target: Tensor) -> Tensor:
        """The labels [B, C] of samples."""
        row = self.averages.read(index).to(target.dtype)
        return torch.where(row.sum(-1, keepdim=True) > 0, row, target)

    @torch.no_grad()
    def _store(self, index: Tensor, p: Tensor, target: Tensor) -> None:
        old, label = self.averages.read(index), self._read(index, target)
        now = self.alpha * label + (1.0 - self.alpha) * p
        changes = self.progress.get(self) >= self.begin
        self.averages.write(index, torch.where(changes, now.to(old.dtype), old))


@register_loss("sat")
class SAT(SELC):
    """Self-adaptive training, L_i = w_i H(s_i, p_i), where w_i is max_c s_ic over its mean.

    The labels s_i are those of :class:`SELC`. Samples whose label has become unsure weigh less. The
    weights carry no gradient. Their mean is over the batch of a process, so the loss depends on how
    a batch is cut over processes and accumulation steps.

    Args:
        num_samples, num_classes: see :class:`SELC`.
        alpha: of the average; 0.9 in the paper.
        begin: the progress at which labels change; 60 of 200 epochs in the paper.

    References:
        Huang, Zhang and Zhang, "Self-adaptive training: beyond empirical risk minimization",
        NeurIPS 2020.

    Notes:
        The form with a symmetric cross-entropy of the authors' code is not included; it is NaN
        where s or p is 0.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        num_classes: int | None = None,
        alpha: float = 0.9,
        begin: float = 0.3,
        **base: Any,
    ) -> None:
        super().__init__(num_samples, num_classes, alpha, begin, **base)

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        losses = super().per_sample(logits, target, index)
        weights = self._read(index, target).amax(-1)
        self.log("sure", weights)
        return losses * weights / weights.mean()
