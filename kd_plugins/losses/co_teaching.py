"""Networks that learn from what another one finds easy: Co-teaching, Co-teaching+, S2E."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from . import validate
from .base import LossArguments
from .functional import Prediction, cross_entropy
from .mixture import GMMSelector
from .mutual import Mutual, Selector
from .refined import CE
from .registry import register_loss
from .state import KeepsPrecision, Progress


class SmallLoss(Selector):
    """The k = int((1 - R(t)) B) samples of smallest H(q, p).

    R(t) = forget · min((t / ramp)^exponent, 1) is the share left out. It is 0 at first, when no
    network knows right from wrong, and ``forget`` from ``ramp`` on. If k = 0, nothing is selected.
    Of equal losses the earlier sample goes first.

    Args:
        forget: share left out in the end, in [0, 1); the noise rate in the paper.
        ramp: the progress at which it is reached; 0: at once.
        exponent: shape of the ramp, 1 in the paper's main results.
        keep: progress (0-d tensor) -> share kept (0-d tensor), in place of the three, such as
            :class:`S2ESchedule`.

    References:
        Han et al., "Co-teaching: robust training of deep neural networks with extremely noisy
        labels", NeurIPS 2018. t is in [0, 1], so T_k = 10 of 200 epochs is ramp = 0.05.

    Notes:
        The authors' code counts epochs, rises linearly to forget^exponent and jumps to ``forget``
        after, and is NaN at k = 0. Here the exponent bends a ramp that ends at ``ramp``; with
        exponent = 1 all are the same. k is rounded down with a tolerance of 1e-6 B, so that
        int((1 - 0.2) 10) is 8 in any precision.

    >>> pred = Prediction.of(torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    >>> SmallLoss(forget=0.5, ramp=0)(pred, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    tensor([ True, False])
    """

    def __init__(
        self,
        forget: float = 0.2,
        ramp: float = 0.05,
        exponent: float = 1.0,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        why = "it is the share left out; at 1 no sample is left to learn from"
        validate.fraction("forget", forget, why, with_one=False)
        validate.fraction("ramp", ramp, "it is progress, not epochs")
        validate.positive("exponent", exponent, "R(t) would not rise from 0 to forget")
        if keep is not None and (forget, ramp, exponent) != (0.2, 0.05, 1.0):
            raise ValueError(
                f"keep={keep} replaces the schedule of forget={forget}, ramp={ramp} and "
                f"exponent={exponent}, which would be ignored: give one or the other"
            )
        self.forget, self.ramp, self.exponent = float(forget), float(ramp), float(exponent)
        self.keep = keep
        self.progress = Progress() if keep is not None or (forget and ramp) else None

    def forward(self, pred: Prediction, target: Tensor) -> Tensor:
        losses = cross_entropy(pred.log_p, target)
        return smallest(losses, self.count(losses), torch.ones_like(losses, dtype=torch.bool))

    def count(self, losses: Tensor, n: Tensor | int | None = None) -> Tensor:
        """How many of ``n`` samples to keep now, by default of all of ``losses`` [B]: 0-d."""
        if self.progress is None:
            share = losses.new_full((), 1.0 - self.forget)
        elif self.keep is not None:
            share = self.keep(self.progress.get(self))
        else:
            risen = (self.progress.get(self) / self.ramp).clamp(max=1.0)
            share = 1.0 - self.forget * risen**self.exponent
        self.stats = {"keep": share}
        return ((share + 1e-6) * (len(losses) if n is None else n)).floor()

    def extra_repr(self) -> str:
        if self.keep is not None:
            return "" if isinstance(self.keep, torch.nn.Module) else f"keep={self.keep}"
        return f"forget={self.forget}, ramp={self.ramp}, exponent={self.exponent}"


def smallest(losses: Tensor, k: Tensor, among: Tensor) -> Tensor:
    """Mask [B] of the k smallest losses [B] among the samples of a mask [B]."""
    order = losses.detach().argsort(stable=True)
    here = among[order]
    return torch.zeros_like(among).scatter(0, order, here & (here.cumsum(0) <= k))


@register_loss("co_teaching")
class CoTeaching(Mutual):
    """Co-teaching, L = Σ_k Σ_{j≠k} mean of H(q, p_k) over the (1 - R(t)) B easiest for peer j.

    Each network learns on what its peer chose, and on nothing else. A wrong label that one has come
    to believe is not fed back to itself. ``forget=0`` is plain cross-entropy of each.

    Args:
        forget, ramp, exponent: R(t), see :class:`SmallLoss`; ``forget`` is the noise rate. With
            ``forget=None`` it is not known, and a :class:`GMMSelector` finds the samples (ours).
        num_peers: how many networks; two in the paper.

    References:
        Han et al., "Co-teaching: robust training of deep neural networks with extremely noisy
        labels", NeurIPS 2018.

    Notes:
        The authors' code divides the mean over the k samples by k once more. More than two peers
        are ours.

    >>> loss = CoTeaching(forget=0.5, ramp=0)
    >>> a = torch.tensor([[0.0, 9.0], [0.0, 0.0]])
    >>> b = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
    >>> loss((a, b), torch.tensor([1, 1]))  # each learns the other's easy sample: both ln 2
    tensor(1.3863)
    """

    def __init__(
        self,
        forget: float | None = 0.2,
        ramp: float = 0.05,
        exponent: float = 1.0,
        num_peers: int = 2,
        **base: Unpack[LossArguments],
    ) -> None:
        if forget is None and (ramp, exponent) != (0.05, 1.0):
            raise ValueError(
                f"ramp={ramp}, exponent={exponent}: they shape what a known rate forgets, and "
                "forget=None would ignore them"
            )
        select = GMMSelector() if forget is None else SmallLoss(forget, ramp, exponent)
        super().__init__(CE(), select, own=0.0, normalize="selected", num_peers=num_peers, **base)


@register_loss("co_teaching_plus")
class CoTeachingPlus(Mutual):
    """Co-teaching+, L = Σ_k mean of H(q, p_k) over the k of n samples easiest for the other peer.

    The n samples are those where argmax p_a ≠ argmax p_b, and k = int((1 - R(t)) n). What both
    predict alike teaches neither anything and makes them one network. Before progress ``start`` it
    is Co-teaching. Where the networks agree on the whole batch, both learn from all of it.

    Args:
        forget, ramp, exponent: R(t), see :class:`SmallLoss`; ``forget`` is the noise rate.
        start: progress up to which it is Co-teaching: 5 of 200 epochs on CIFAR-100; 0.1 (20) on
            CIFAR-10, 0 on MNIST, 0.5 (100) on Tiny-ImageNet.

    References:
        Yu et al., "How does disagreement help generalization against label corruption?", ICML 2019.

    Notes:
        The authors' code takes the cross-entropy of a softmax of the softmax, loses a sample each
        time that number 0 of the data set comes, divides the mean by k once more (by B where all
        agree), and compares epoch · batch with the step. As there, k = 0 takes all n.
    """

    select: SmallLoss

    def __init__(
        self,
        forget: float = 0.2,
        ramp: float = 0.05,
        exponent: float = 1.0,
        start: float = 0.025,
        **base: Unpack[LossArguments],
    ) -> None:
        select = SmallLoss(forget, ramp, exponent)
        super().__init__(CE(), select, own=0.0, normalize="selected", **base)
        self.start = float(validate.fraction("start", start, "it is progress, not epochs"))
        self.progress = Progress() if start else None

    def per_sample(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        preds = [Prediction.of(z) for z in logits]
        losses = [cross_entropy(pred.log_p, target) for pred in preds]
        a, b = (pred.log_p.detach().argmax(-1) for pred in preds)
        disagree = among = a != b
        if self.progress is not None:
            among = disagree | (self.progress.get(self) < self.start)
        n = among.sum()
        k = self.select.count(losses[0], n)
        k = torch.where(k < 1, n, k)
        masks = [smallest(loss, k, among) | (n == 0) for loss in losses]  # chosen by each peer
        weights = [self._weight(mask.to(target.dtype)) for mask in reversed(masks)]
        costs = [refine.cost(pred, target) for refine, pred in zip(self.refine, preds, strict=True)]
        taught = [w * cost for w, cost in zip(weights, costs, strict=True)]
        self.log("own", losses)
        self.log("taught", taught)
        self.log("selected", masks)
        self.log("disagree", disagree)
        self.logged |= self.select.stats
        self.selection = [(mask, target) for mask in masks]
        return taught[0] + taught[1]


class S2ESchedule(KeepsPrecision):
    """Share of samples kept, 1 - R(t) = Σ_i alpha_i f_i(t; beta_i) clipped to [0, 1].

    t = progress · horizon. Each f_i is a decay, for what the network begins to memorise, plus a
    growth, for what it can be trusted with in the end (T = horizon):

    f_1 = exp(-b2 t^b1) + b3 (t/T)^b4, f_2 = exp(-b2 t^b1) + b3 ln(1 + t^b4) / ln(1 + T^b4),
    f_3 = (1 + b2 t)^-b1 + b3 (t/T)^b4, f_4 = (1 + b2 t)^-b1 + b3 ln(1 + t^b4) / ln(1 + T^b4).

    Args:
        alpha: weights of the four, not negative, with sum 1.
        beta: for each of the four (b1, b2, b3, b4), not negative; searched in [0, 1], [0, 0.5],
            [0, 0.5] and [0, 2] in the code.
        horizon: T, the number of epochs in which t is counted.

    References:
        Yao et al., "Searching to exploit memorization effect in learning with noisy labels", ICML
        2020.

    Notes:
        The two decays and the two growths are in the authors' code. That they pair into these four
        could not be confirmed. The code adds a third decay, gives all of them one growth, and keeps
        at least 1 in 100. The default values are ours, not searched: from 1 over 0.85 after 10
        epochs to 0.80 at the end.

    >>> S2ESchedule()(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.7983])
    """

    def __init__(
        self,
        alpha: Sequence[float] = (0.25, 0.25, 0.25, 0.25),
        beta: Sequence[Sequence[float]] = (
            *((0.1, 0.17, 0.05, 1.0),) * 2,
            *((0.06, 1.0, 0.07, 1.0),) * 2,
        ),
        horizon: float = 200.0,
    ) -> None:
        super().__init__()
        weights = len(alpha) == 4 and min(alpha) >= 0 and abs(sum(alpha) - 1) < 1e-6
        why = "the schedule is their mean"
        validate.check(weights, "alpha", alpha, "four weights, 0 or more, with sum 1", why)
        shapes = [len(b) == 4 and all(0 <= x < math.inf for x in b) for b in beta]
        why = "each of the four functions is a decay plus a growth"
        expected = "four times (b1, b2, b3, b4), 0 or more"
        validate.check(shapes == [True] * 4, "beta", beta, expected, why)
        self.horizon = float(validate.positive("horizon", horizon, "it is a number of epochs"))
        self.alpha = tuple(map(float, alpha))
        self.beta = tuple(tuple(map(float, b)) for b in beta)

    def forward(self, progress: Tensor) -> Tensor:
        share, t = torch.zeros_like(progress), progress * self.horizon
        for i, (alpha, (b1, b2, b3, b4)) in enumerate(zip(self.alpha, self.beta, strict=True)):
            decay = torch.exp(-b2 * t**b1) if i < 2 else (1.0 + b2 * t) ** -b1
            slow = torch.log1p(t**b4) / math.log1p(self.horizon**b4)
            share = share + alpha * (decay + b3 * (slow if i % 2 else progress**b4))
        return share.clamp(0.0, 1.0)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, horizon={self.horizon}"


@register_loss("s2e")
class S2E(Mutual):
    """Co-teaching on a searched schedule: each peer chooses its (1 - R(t)) B easiest samples.

    1 - R(t) = Σ_i alpha_i f_i(t). The schedule is given. To search for it, train many times and
    score each run on clean held-out data, in a loop around this loss.

    Args:
        keep: progress (0-d tensor) -> share kept; None is ``S2ESchedule()``.
        num_peers: how many networks; two in the paper.

    References:
        Yao et al., "Searching to exploit memorization effect in learning with noisy labels", ICML
        2020.

    Notes:
        The authors' code divides the mean over the k samples by k once more. See
        :class:`S2ESchedule` for the rest.
    """

    def __init__(
        self,
        keep: Callable[[Tensor], Tensor] | None = None,
        num_peers: int = 2,
        **base: Unpack[LossArguments],
    ) -> None:
        select = SmallLoss(keep=keep or S2ESchedule())
        super().__init__(CE(), select, own=0.0, normalize="selected", num_peers=num_peers, **base)
