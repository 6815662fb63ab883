"""Networks that label mixtures of pictures for each other: DivideMix, ELR+."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validate
from .averaged_labels import clipped
from .base import Loss
from .functional import cross_entropy, log_softmax
from .mixture import Division
from .registry import register_loss
from .state import Progress, SampleTable


class Mixed(NamedTuple):
    """How the pictures of a batch were mixed, and what the networks say of the unmixed ones."""

    guess: Tensor  # [K, B, C] probabilities, without gradient
    partner: Tensor  # [B] row that each picture is mixed with
    share: Tensor  # 0-d: of the picture itself, in [1/2, 1]

    def blend(self, rows: Tensor) -> Tensor:
        """share · rows + (1 - share) · rows of the partners: [B, ...] -> [B, ...]."""
        share = self.share.to(rows.dtype)
        return share * rows + (1.0 - share) * rows[self.partner]


class MixedLoss(Loss):
    """A loss of two networks on mixtures of pictures, as the hosted module feeds it.

    The hosted module first asks the networks, or their averages over time if ``ema_decay`` is set,
    about each view of each picture. It calls :meth:`draw`, mixes the pictures and runs the networks
    on the mixtures. All views of all pictures are one batch; both networks get the same mixtures.

    Args:
        alpha: the share is max(l, 1 - l) with l ~ Beta(alpha, alpha).
    """

    num_peers = 2

    def __init__(self, num_samples: int | None, alpha: float, **base: Any) -> None:
        super().__init__(**base)
        self.num_samples: Any = num_samples
        why = "it is the parameter of Beta(alpha, alpha)"
        self.alpha = validate.positive("alpha", alpha, why)

    def draw(self, guess: Tensor) -> Mixed:
        """Pairs and a share for a batch of which the networks' probabilities are [K, B, C]."""
        alpha = torch.full((), float(self.alpha), device=guess.device)
        share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        partner = torch.randperm(guess.shape[1], device=guess.device)
        return Mixed(guess, partner, torch.maximum(share, 1.0 - share))


@register_loss("divide_mix")
class DivideMix(MixedLoss):
    """DivideMix, L = Σ_k [ L_x + lambda_u r(t) L_u + KL(u ‖ mean p_k) ] on mixtures of pictures.

    Each network divides the training data by its losses (:class:`GMMSelector`), for the other one.
    With w the probability that the label is right, p the mean over the views of a picture:

    - w > threshold: the label becomes sharpen(w q + (1 - w) p_k) (co-refinement).
    - else: sharpen(mean of p over networks) (co-guessing).

    sharpen(p)_c = p_c^(1/T) / Σ p^(1/T). Pictures and labels are then mixed. L_x is the mean of
    H(q~, p_k) over the first kind of rows, L_u the mean of (p_k - q~)² over rows of the second
    kind and classes. r rises from 0 to 1. Until progress ``start`` it is cross-entropy with the
    given labels, on unmixed pictures.

    It needs :class:`MutualDistillationTrainer`, and data with two views,
    ``ImageView(..., views=2)``.

    Args:
        num_samples: rows of the training data; :meth:`bind` can fill it in.
        lambda_u: weight of L_u. The paper chooses from 0, 25, 50 and 150; 25 is the default of the
            authors' code. The paper's table 7, as users of the code cite it: CIFAR-100 25 for 20%
            noise and 150 above, CIFAR-10 0 for 20% and for asymmetric noise, 25 for 50 and 80%, 50
            for 90%.
        threshold: 0.5; 0.6 for 90% noise (the same table).
        temperature: T of the sharpening, 0.5 in the paper.
        alpha: of the mixing, 4 in the paper, 0.5 on Clothing1M and WebVision.
        start: length of the warm-up: 30 of 300 epochs for CIFAR-100; 10 (0.033) for CIFAR-10.
        ramp: progress in which r rises, 16 of 300 epochs; 0: at once.

    References:
        Li, Socher and Hoi, "DivideMix: learning with noisy labels as semi-supervised learning",
        ICLR 2020, algorithm 1.

    Notes:
        L_u is a mean over classes, as in the authors' code; the paper's equation has a sum, which
        is C times as much. Here the networks learn side by side from the same batches; there, one
        after the other, with a loader for each kind of rows. Here the losses are those of the
        guesses, which are made in eval mode; there, of a pass over all data before each epoch. The
        confidence penalty that they add in the warm-up for asymmetric noise is not included.
    """

    views = 2
    needs: Mapping[str, str] = {"num_samples": "num_samples"}

    def __init__(
        self,
        num_samples: int | None = None,
        lambda_u: float = 25.0,
        threshold: float = 0.5,
        temperature: float = 0.5,
        alpha: float = 4.0,
        start: float = 0.1,
        ramp: float = 16 / 300,
        **base: Any,
    ) -> None:
        super().__init__(num_samples, alpha, **base)
        self.lambda_u = validate.non_negative("lambda_u", lambda_u)
        self.threshold = validate.fraction("threshold", threshold, "it is a probability")
        self.temperature = validate.positive("temperature", temperature)
        self.start = validate.fraction("start", start, "it is progress, not epochs")
        self.ramp = validate.fraction("ramp", ramp, "it is progress, not epochs")
        self.progress = Progress()
        self.complete()

    def build(self) -> None:
        self.losses = SampleTable(self.num_samples, self.num_peers, fill=-1.0)  # -1: not seen yet

    def draw(self, guess: Tensor) -> Mixed:
        mixed = super().draw(guess)
        warm = self.progress.get(self) < self.start
        return mixed._replace(share=torch.where(warm, 1.0, mixed.share))

    def per_sample(
        self, logits: Sequence[Tensor], target: Tensor, index: Tensor, mixed: Mixed
    ) -> Tensor:
        labelled, labels = self._lessons(mixed.guess, target, index)
        warm = (self.progress.get(self) < self.start).to(target.dtype)
        rows: dict[str, list[Tensor]] = {"own": [], "guessed": [], "balance": []}
        for z, mask, label in zip(logits, labelled, labels, strict=True):
            log_p, label, kept = log_softmax(z), mixed.blend(label), mask.to(z.dtype)
            squares = (log_p.exp() - label).square().mean(-1)
            rows["own"].append(_mean_over(kept) * cross_entropy(log_p, label))
            rows["guessed"].append(_mean_over(1.0 - kept) * squares)
            log_mean = log_p.logsumexp(0) - math.log(len(z))  # finite where a mean is 0
            rows["balance"].append((1.0 - warm) * (-math.log(z.shape[1]) - log_mean.mean()))
        for name, values in rows.items():
            self.log(name, values)
        self.log("selected", labelled[::-1])
        self.selection = list(zip(labelled[::-1], labels[::-1], strict=True))  # of the other
        weight = self.lambda_u * self._risen()
        parts = zip(*rows.values(), strict=True)
        return torch.stack([own + weight * guessed + even for own, guessed, even in parts]).sum(0)

    def _lessons(
        self, guess: Tensor, target: Tensor, index: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each network which rows count as labelled [B], and the labels of all rows [B, C]."""
        moves = self.moves_state
        with torch.no_grad():
            guess = guess.to(target.dtype)
            log_guess = guess.clamp_min(torch.finfo(guess.dtype).tiny).log()
            losses = cross_entropy(log_guess, target).T.to(self.losses.rows.dtype)  # [B, K]
            if moves:
                self.losses.write(index, losses)
            division = Division.of(self.losses.rows)
            self.log("noise_rate", division.wrong)
            clean = division.clean(losses).to(target.dtype).unbind(1)[::-1]  # the other's word
            guessed = self._sharpen(guess.mean(0))
            warm, labelled, labels = self.progress.get(self) < self.start, [], []
            for w, own in zip(clean, guess, strict=True):
                mask, w = ~(w <= self.threshold), w.unsqueeze(-1)  # a NaN stays visible
                refined = self._sharpen(w * target + (1.0 - w) * own)
                label = torch.where(mask.unsqueeze(-1), refined, guessed)
                labelled.append(mask | warm)
                labels.append(torch.where(warm, target, label))
        return labelled, labels

    def _sharpen(self, p: Tensor) -> Tensor:
        return (p.log() / self.temperature).softmax(-1)

    def _risen(self) -> Tensor | float:
        """r(t) in [0, 1]."""
        if not self.ramp:
            return 1.0
        return ((self.progress.get(self) - self.start) / self.ramp).clamp(0.0, 1.0)


def _mean_over(kept: Tensor) -> Tensor:
    """Weights of the rows of a mask [B] of 0 and 1 whose mean over the batch is theirs."""
    return kept * (len(kept) / kept.sum().clamp_min(1.0))


@register_loss("elr_plus")
class ELRPlus(MixedLoss):
    """ELR+, L = Σ_k [ H(q~, p_k) + lambda_ r(t) ln(1 - t~_k·p_k) ] on mixtures of pictures.

    As :class:`ELR` with two networks: the average t_k of a sample takes in what the *other*
    network, with its weights averaged over time, says of the unmixed picture. Pictures, labels q
    and averages t are then mixed.

    It needs :class:`MutualDistillationTrainer`, which also averages the weights.

    Args:
        num_samples: rows of the training data; :meth:`bind` can fill in this and ``num_classes``.
        num_classes: C.
        lambda_, beta: see :class:`ELR`, with the same published values.
        alpha: of the mixing, 1 in the paper.
        ramp: progress in which r rises as exp(-5 (1 - t/ramp)²), 40,000 steps of 250 epochs for
            CIFAR-100; 0 (at once) for CIFAR-10 and Clothing1M.
        ema_decay: of the averaged weights; 0.997 in the authors' code, 0.9999 for Clothing1M.

    References:
        Liu et al., "Early-learning regularization prevents memorization of noisy labels", NeurIPS
        2020, ELR+.

    Notes:
        The decay starts as 1 - 1/(n + 1) and stays at ``ema_decay``; the authors' code has another
        ramp for CIFAR-100, and takes BatchNorm's statistics from passes of the averaged network,
        while here they are averaged too. With exactly 100 classes that code multiplies the mixed
        label by t~, which the equation does not have; it is not included.
    """

    num_classes: Any
    needs: Mapping[str, str] = {"num_samples": "num_samples", "num_classes": "num_classes"}

    def __init__(
        self,
        num_samples: int | None = None,
        num_classes: int | None = None,
        lambda_: float = 7.0,
        beta: float = 0.9,
        alpha: float = 1.0,
        ramp: float = 0.41,
        ema_decay: float = 0.997,
        **base: Any,
    ) -> None:
        super().__init__(num_samples, alpha, num_classes=num_classes, **base)
        why = "below 0 it would push predictions away from what was learned early"
        self.lambda_ = validate.non_negative("lambda_", lambda_, why)
        still = "at 1 the average would stay at its start"
        self.beta = validate.fraction("beta", beta, still, with_one=False)
        self.ramp = validate.fraction("ramp", ramp, "it is progress, not steps")
        self.ema_decay = validate.fraction("ema_decay", ema_decay, still, with_one=False)
        self.progress = Progress() if ramp else None
        self.complete()

    def build(self) -> None:
        self.averages = SampleTable(self.num_samples, self.num_peers, self.num_classes)

    def per_sample(
        self, logits: Sequence[Tensor], target: Tensor, index: Tensor, mixed: Mixed
    ) -> Tensor:
        if self.moves_state:
            self._store(index, mixed.guess)
        label, averages = mixed.blend(target), mixed.blend(self.averages.read(index))
        owns, regularisers = [], []
        for z, average in zip(logits, averages.to(target.dtype).unbind(1), strict=True):
            log_p = log_softmax(z)
            owns.append(cross_entropy(log_p, label))
            regularisers.append(torch.log1p(-(average * clipped(log_p.exp())).sum(-1)))
        self.log("own", owns)
        self.log("regulariser", regularisers)
        weight = self.lambda_ * self._risen()
        parts = zip(owns, regularisers, strict=True)
        return torch.stack([own + weight * regulariser for own, regulariser in parts]).sum(0)

    @torch.no_grad()
    def _store(self, index: Tensor, guess: Tensor) -> None:
        old = self.averages.read(index)  # [B, K, C]
        now = clipped(guess.flip(0).transpose(0, 1).to(old.dtype))  # of the other network
        now = now / now.sum(-1, keepdim=True)
        self.averages.write(index, self.beta * old + (1.0 - self.beta) * now)

    def _risen(self) -> Tensor | float:
        """r(t) in [0, 1]."""
        if self.progress is None:
            return 1.0
        done = (self.progress.get(self) / self.ramp).clamp(max=1.0)
        return torch.exp(-5.0 * (1.0 - done) ** 2)
