"""Right and wrong labels as two Gaussians over the losses of all samples: DivideMix's co-divide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import validate
from .functional import Prediction, cross_entropy
from .mutual import Selector
from .state import Progress, SampleTable

BINS = 1024  # of losses in [0, 1]; a bin is 1/20 of the smallest standard deviation
FLOOR = 5e-4  # added to each variance
ITERATIONS, TOLERANCE = 10, 1e-2  # of EM: it stops where the mean log-likelihood gains less


class Gaussians(NamedTuple):
    """Two Gaussians for each of K columns of numbers: [2, K] each."""

    share: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, parts: Tensor, x: Tensor) -> Gaussians:
        """Fitted to numbers x [M, 1], of which component and column get parts [2, M, K]."""
        mass = parts.sum(1) + 10 * torch.finfo(parts.dtype).eps
        mean = (parts * x).sum(1) / mass
        variance = (parts * (x - mean[:, None]) ** 2).sum(1) / mass + FLOOR
        return cls(mass / mass.sum(0), mean, variance)

    def log_joint(self, x: Tensor) -> Tensor:
        """log of share times density at x [M, 1] or [M, K]: [2, M, K]."""
        share, mean, variance = (value[:, None] for value in self)
        return share.log() - 0.5 * ((2 * math.pi * variance).log() + (x - mean) ** 2 / variance)

    def first(self, x: Tensor) -> Tensor:
        """The probability that x [M, K] is of the component with the smaller mean: [M, K]."""
        log_joint = self.log_joint(x)
        low = torch.where(self.mean[0] <= self.mean[1], log_joint[0], log_joint[1])
        return (low - log_joint.logsumexp(0)).exp()


class Division(NamedTuple):
    """Two Gaussians over losses that are scaled to [0, 1] by their range, for K networks."""

    gaussians: Gaussians
    low: Tensor  # [K]
    span: Tensor  # [K]; 0 where all losses are equal
    wrong: Tensor  # [K], 1 - the mean of the probabilities

    @classmethod
    def of(cls, losses: Tensor) -> Division:
        """Fitted to the losses [N, K] that are 0 or more; negative ones were not seen.

        EM starts from the best split of the losses in two, which has no random start.
        """
        seen = losses >= 0
        low = torch.where(seen, losses, math.inf).amin(0)
        low = torch.where(low < math.inf, low, 0.0)
        span = (losses.amax(0) - low).clamp_min(0.0)
        bins = (cls._scaled(losses, low, span) * (BINS - 1)).round().long()
        counts = torch.zeros(BINS, losses.shape[1], dtype=losses.dtype, device=losses.device)
        counts = counts.scatter_add(0, bins, seen.to(losses.dtype))
        x = torch.linspace(0.0, 1.0, BINS, dtype=losses.dtype, device=losses.device)[:, None]
        gaussians = _expectation_maximisation(x, counts)
        wrong = ((1.0 - gaussians.first(x)) * counts).sum(0) / counts.sum(0).clamp_min(1.0)
        return cls(gaussians, low, span, torch.where(span > 0, wrong, 0.0))

    @staticmethod
    def _scaled(losses: Tensor, low: Tensor, span: Tensor) -> Tensor:
        return ((losses - low) / torch.where(span > 0, span, 1.0)).clamp(0.0, 1.0)

    def clean(self, losses: Tensor) -> Tensor:
        """The probability [M, K] that losses [M, K] are of the component of small losses."""
        clean = self.gaussians.first(self._scaled(losses, self.low, self.span))
        return torch.where(self.span > 0, clean, 1.0)


def _expectation_maximisation(x: Tensor, counts: Tensor) -> Gaussians:
    """Two Gaussians for numbers x [M, 1], in order, that occur counts [M, K] times."""
    low = _best_split(x, counts)
    now = Gaussians.of(torch.stack([low, ~low]) * counts, x)
    total = counts.sum(0).clamp_min(1.0)
    bound, runs = torch.full_like(total, -math.inf), torch.ones_like(total, dtype=torch.bool)
    for _ in range(ITERATIONS):
        log_joint = now.log_joint(x)
        log_density = log_joint.logsumexp(0)
        following = Gaussians.of((log_joint - log_density).exp() * counts, x)
        now = Gaussians(*(torch.where(runs, b, a) for a, b in zip(now, following, strict=True)))
        mean = (log_density * counts).sum(0) / total
        runs, bound = runs & ((mean - bound).abs() >= TOLERANCE), mean
    return now


def _best_split(x: Tensor, counts: Tensor) -> Tensor:
    """Mask [M, K] of the smaller numbers, for the split with the smallest squares within parts."""
    count, total = counts.cumsum(0), (counts * x).cumsum(0)
    rest, remainder = count[-1] - count, total[-1] - total
    apart = total / count.clamp_min(1.0) - remainder / rest.clamp_min(1.0)
    best = (apart**2 * count * rest).argmax(0)
    return torch.arange(len(x), device=x.device)[:, None] <= best


@torch.no_grad()
def clean_probability(losses: Tensor) -> Tensor:
    """The probability that each label is right, from the losses of all training samples.

    Two Gaussians are fitted to the losses, scaled to [0, 1] by their range. The probability is that
    of the one with the smaller mean. Where all losses are equal, it is 1.

    Args:
        losses: [N], 0 or more: the cross-entropy of each sample with its given label, of a network
            that has not learned the wrong labels by heart. Or [N, K] for K networks.

    Returns:
        As many probabilities.

    Raises:
        ValueError: a loss is negative or no number.

    References:
        Li, Socher and Hoi, "DivideMix: learning with noisy labels as semi-supervised learning",
        ICLR 2020, co-divide.

    Notes:
        As in the authors' code: at most 10 steps of EM, until the mean log-likelihood gains less
        than 0.01 (mostly after 2 or 3), and 5e-4 added to each variance. EM to convergence divides
        differently. Theirs starts from k-means without a seed; here it is the best split, of 1,024
        bins of losses. A single huge loss makes all others look equal. A wide second Gaussian also
        owns the smallest losses, so the probability does not always fall with the loss.

    >>> clean_probability(torch.tensor([0.1, 0.2, 0.1, 3.0])).round(decimals=3)
    tensor([1., 1., 1., 0.])
    """
    if not (torch.isfinite(losses) & (losses >= 0)).all():
        raise ValueError(
            "losses: expected finite numbers, 0 or more; others cannot be scaled to [0, 1]"
        )
    columns = losses.detach().float().reshape(len(losses), -1)
    return Division.of(columns).clean(columns).reshape(losses.shape).to(losses.dtype)


def estimate_noise_rate(evidence: Tensor, prior: Sequence[float] | Tensor | None = None) -> float:
    """The share of wrong labels.

    Args:
        evidence: the losses of all training samples [N], see :func:`clean_probability`: the rate
            is 1 - the mean probability. Or a transition matrix [C, C] with P(given j | true i) in
            row i: the rate is 1 - Σ_i prior_i T_ii.
        prior: the shares of the true classes [C], for a matrix; equal if not given.

    Raises:
        ValueError: the evidence has another shape, or the matrix has rows that do not sum to 1.

    >>> estimate_noise_rate(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), prior=[0.75, 0.25])
    0.15
    """
    evidence = torch.as_tensor(evidence).detach()
    if evidence.dim() == 1 and prior is None:
        return round(1.0 - clean_probability(evidence.double()).mean().item(), 6)
    square = evidence.dim() == 2 and evidence.shape[0] == evidence.shape[1]
    if not square or (evidence.double().sum(1) - 1).abs().max() > 1e-2:
        raise ValueError(
            "estimate_noise_rate: expected losses [N] without a prior, or a transition matrix "
            f"[C, C] whose rows sum to 1; got {list(evidence.shape)}"
        )
    right = evidence.double().cpu().diagonal()
    shares = torch.full_like(right, 1 / len(right)) if prior is None else torch.as_tensor(prior)
    return round(1.0 - (right @ shares.to(right)).item() / float(shares.sum()), 6)


class GMMSelector(Selector):
    """Samples whose label is probably right, w > threshold: co-divide without a noise rate.

    w is :func:`clean_probability`, of each network by its own losses. ``Mutual`` hands the samples
    that one network selects to the others, as in DivideMix. A table holds the last loss of each
    training sample; each step moves the rows of its batch and fits the Gaussians anew, on the
    device. Before progress ``start`` every sample is selected.

    Logged: ``noise_rate``, 1 - the mean of w over all samples and networks. A step with 50,000
    samples and two networks takes 12 ms longer on one CPU core.

    Args:
        num_samples: rows of the training data; ``loss.bind`` can fill it in.
        threshold: 0.5 in the paper, 0.6 for 90% noise (its table 7).
        start: length of the warm-up: 30 of 300 epochs for CIFAR-100; 10 (0.033) for CIFAR-10.

    References:
        Li, Socher and Hoi, "DivideMix: learning with noisy labels as semi-supervised learning",
        ICLR 2020, co-divide.

    Notes:
        The paper computes all losses before each epoch, in eval mode and without augmentation.
        Here they are those of the training steps: no pass of its own, but up to an epoch old.

    >>> from kd_plugins import CE, Mutual
    >>> loss = Mutual(CE(), GMMSelector(num_samples=4, start=0), own=0)
    >>> a = torch.tensor([[9.0, 0.0], [8.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    >>> _ = loss((a, a), torch.tensor([0, 0, 0, 1]), index=torch.arange(4))
    >>> loss.selection[0][0], loss.stats["noise_rate"].item()
    (tensor([ True,  True,  True, False]), 0.25)
    """

    required_inputs = frozenset({"index"})

    def __init__(
        self, num_samples: int | None = None, threshold: float = 0.5, start: float = 0.1
    ) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.threshold = validate.fraction("threshold", threshold, "it is a probability")
        self.start = validate.fraction("start", start, "it is progress, not epochs")
        self.progress = Progress() if start else None

    def build(self, num_samples: int, num_peers: int) -> None:
        self.losses = SampleTable(num_samples, num_peers, fill=-1.0)  # -1: not seen yet

    def choose(
        self, preds: Sequence[Prediction], target: Tensor, index: Tensor | None = None
    ) -> list[Tensor]:
        assert index is not None  # the loss has checked it
        losses = torch.stack([cross_entropy(pred.log_p, target) for pred in preds], 1)  # [B, K]
        moves = self.moves_state
        with torch.no_grad():
            if moves:
                self.losses.write(index, losses)
            division = Division.of(self.losses.rows)
            clean = division.clean(losses.to(self.losses.rows.dtype)) > self.threshold
        self.stats = {"noise_rate": division.wrong.mean()}
        if self.progress is not None:
            clean = clean | (self.progress.get(self) < self.start)
        return list(clean.unbind(1))

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, start={self.start}"
