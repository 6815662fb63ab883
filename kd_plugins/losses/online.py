"""Peers that teach each other: by their predictions (MKD, DML) or by an ensemble of all (KDCL)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .functional import as_probs, cross_entropy, kl, log_softmax, simplex_qp, softened_kl
from .registry import register_loss


class PeerLoss(Loss):
    """A loss that adds up, over the peers, their own cross-entropies and what they learn."""

    num_peers = 2
    own = 1.0  # weight of a peer's own cross-entropy

    def __init__(self, num_peers: int = 2, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        nobody = "one network has nobody to learn from"
        self.num_peers = validate.count("num_peers", num_peers, nobody, least=2)

    def from_others(self, lesson: Callable[[int, int], Tensor]) -> list[Tensor]:
        """For each peer k the mean over j ≠ k of ``lesson(j, k)``, [B]."""
        peers = range(self.num_peers)
        return [torch.stack([lesson(j, k) for j in peers if j != k]).mean(0) for k in peers]

    def add_up(
        self, log_ps: Sequence[Tensor], target: Tensor, lessons: Sequence[Tensor], weight: Any = 1.0
    ) -> Tensor:
        """Σ_k [ own · H(q, p_k) + weight · lesson_k ], [B]."""
        owns = [cross_entropy(log_p, target) for log_p in log_ps]
        self.log("own", owns)
        self.log("taught", lessons)
        total = torch.zeros_like(owns[0])
        for own, lesson in zip(owns, lessons, strict=True):
            total = total + self.own * own + weight * lesson
        return total


class _Mutual(PeerLoss):
    taught = 1.0  # weight of what a peer learns from the others

    def per_sample(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        log_ps = [log_softmax(z) for z in logits]
        return self.add_up(log_ps, target, self.lessons(log_ps, target), self.taught)

    def lessons(self, log_ps: list[Tensor], target: Tensor) -> list[Tensor]:
        """For each peer mean_{j≠k} KL(p_j ‖ p_k), [B], with p_j as a constant."""
        consts = [log_p.detach() for log_p in log_ps]
        return self.from_others(lambda j, k: kl(consts[j], log_ps[k]))


@register_loss("mkd")
class MKD(_Mutual):
    """Plain mutual distillation, L = Σ_k [ (1 - eps) H(q, p_k) + eps mean_{j≠k} KL(p_j ‖ p_k) ].

    The temperature is 1.

    Args:
        eps: weight of the peers' predictions, in [0, 1].
        num_peers: how many networks.

    References:
        Li et al., SMKD, IJCNN 2023, equation 2.

    Notes:
        The paper does not give eps; the default is 0.5. p_j is a constant in peer k's loss.

    >>> MKD()((torch.zeros(1, 2), torch.zeros(1, 2)), torch.tensor([0]))
    tensor(0.6931)
    """

    def __init__(self, eps: float = 0.5, num_peers: int = 2, **base: Unpack[LossArguments]) -> None:
        super().__init__(num_peers, **base)
        self.eps = validate.fraction("eps", eps, "the weight of the peers' predictions")
        self.own, self.taught = 1 - eps, eps


@register_loss("dml")
class DML(_Mutual):
    """Deep mutual learning, L = Σ_k [ H(q, p_k) + mean_{j≠k} KL(p_j ‖ p_k) ].

    The temperature is 1, and p_j is a constant in peer k's loss.

    Args:
        num_peers: how many networks.

    References:
        Zhang et al., "Deep mutual learning", CVPR 2018.

    Notes:
        The authors' code sums over the other peers and adds 1e-8 inside its logarithms; with two
        peers, sum and mean are the same. There the networks take their steps in turn; here all
        learn from one forward pass.

    >>> DML()((torch.zeros(1, 2), torch.zeros(1, 2)), torch.tensor([0]))  # 2 ln 2: no divergence
    tensor(1.3863)
    """


RULES = ("naive", "linear", "minlogit", "general")


@register_loss("kdcl")
class KDCL(_Mutual):
    """Collaborative learning, L = Σ_k [ H(q, p_k) + alpha T² KL(p_t ‖ p_k) ] at temperature T.

    The teacher p_t is an ensemble of the peers. Its logits z_t are a constant, made from the peers'
    logits z_1 ... z_K by ``rule``:

    - ``"naive"``: for each sample, the logits of the peer with the smallest cross-entropy.
    - ``"linear"``: for each sample, the convex combination of the peers' logits with the smallest
      cross-entropy.
    - ``"minlogit"``: for each class, the minimum over the peers of z_c - Σ_c' q_c' z_c', the logit
      minus that of the label.
    - ``"general"``: one convex combination for all samples, fitted to held-out data by :meth:`fit`;
      until then the mean.

    Args:
        rule: how the peers' logits make those of the ensemble.
        temperature: T of the ensemble and of the peers.
        alpha: weight of the ensemble's lesson.
        num_peers: how many networks.

    References:
        Guo et al., "Online knowledge distillation via collaborative learning", CVPR 2020. The paper
        could not be read; the rules and the loss agree with summaries of it
        (docs/unconfirmed.md).

    Notes:
        In the paper each student sees its own augmentation of a picture; here the peers get what
        the caller passes. Line searches of fixed length find the optimum of ``"linear"``: to float
        precision for two peers. For more peers they run over the pairs in turn and reach about
        1e-4 in cross-entropy, unless logits of the size of tens contradict each other. The weights
        of ``"general"`` are never negative; the closed form of the paper has no such bound.

    >>> a, b = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])
    >>> loss = KDCL(rule="naive")
    >>> loss((a, b), torch.tensor([1]))  # b teaches a: 0.3133 + 0.0486, and 4 KL = 0.3609
    tensor(0.7228)
    >>> loss.stats["taught_b"]
    tensor(0.)
    """

    weights: Tensor

    def __init__(
        self,
        rule: str = "naive",
        temperature: float = 2.0,
        alpha: float = 1.0,
        num_peers: int = 2,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(num_peers, **base)
        self.rule = validate.one_of("rule", rule, RULES, "each builds another teacher")
        self.temperature = validate.positive("temperature", temperature, "logits are divided by it")
        self.alpha = self.taught = alpha
        if rule == "general":
            self.register_buffer("weights", torch.full((num_peers,), 1.0 / num_peers))

    def lessons(self, log_ps: list[Tensor], target: Tensor) -> list[Tensor]:
        teacher = self.ensemble(log_ps, target)
        return [softened_kl(teacher, log_p, self.temperature) for log_p in log_ps]

    @torch.no_grad()
    def ensemble(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """The ensemble's logits z_t [B, C]; they carry no gradient.

        Args:
            logits: [B, C] of each peer.
            target: distributions [B, C].
        """
        z = torch.stack(list(logits))  # [K, B, C]
        if self.rule == "linear":
            return _best_mixture(z, target)
        if self.rule == "minlogit":
            return (z - (target * z).sum(-1, keepdim=True)).amin(0)
        if self.rule == "general":
            return (self.weights[:, None, None] * z).sum(0)
        best = cross_entropy(log_softmax(z), target).argmin(0)  # [B]
        return z.gather(0, best[None, :, None].expand(1, *z.shape[1:]))[0]

    @torch.no_grad()
    def fit(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Set the weights of ``rule="general"`` from held-out data, and return them.

        The weights minimise w^T C w over the simplex, C_ij = mean_n <p_i - y, p_j - y>: the squared
        error of the mixed predictions. Call it once an epoch or so with
        ``torch.stack([torch.cat([peer(x) for x, _ in held_out]) for peer in peers])``. Give every
        process the same data: nothing is exchanged between them.

        Args:
            logits: [K, N, C], of each peer in eval mode, on data that trains none of them.
            target: class indices [N] or distributions [N, C].
        """
        if self.rule != "general":
            raise ValueError(f"fit sets the weights of rule='general'; rule={self.rule!r} has none")
        z = torch.stack(list(logits)).double()
        if z.dim() != 3 or len(z) != self.num_peers or len(target) != z.shape[1] or not len(target):
            raise ValueError(
                f"fit: expected logits [{self.num_peers}, N, C] and N > 0 targets, got "
                f"{list(z.shape)} and {list(target.shape)}"
            )
        error = (z.softmax(-1) - as_probs(target, z.shape[-1], z.dtype)).flatten(1)  # [K, N C]
        self.weights.copy_(simplex_qp(error @ error.T / len(target)))
        return self.weights.clone()


def _best_mixture(z: Tensor, target: Tensor) -> Tensor:
    """The convex combination of z_1 ... z_K with the smallest cross-entropy: [K, B, C] -> [B, C].

    It takes two peers at a time. Along z_j + a (z_i - z_j) the cross-entropy is convex in a, with
    slope Σ_c (p_c - q_c) (z_i - z_j)_c, and bisection finds the zero of the slope. The number of
    steps is fixed, since a test of convergence would make the host wait for the device.
    """
    pairs = list(itertools.combinations(range(len(z)), 2))
    sweeps, halvings = (1, 24) if len(pairs) == 1 else (10, 12)
    w = [torch.full_like(z[0, :, :1], 1.0 / len(z)) for _ in z]  # [B, 1] each
    for i, j in pairs * sweeps:
        both = w[i] + w[j]
        step = both * (z[i] - z[j])
        rest = both * z[j] + sum(w[k] * z[k] for k in range(len(z)) if k not in (i, j))
        a = _minimum(rest, step, target, halvings)
        w[i], w[j] = a * both, (1 - a) * both
    return sum((a * peer for a, peer in zip(w, z, strict=True)), torch.zeros_like(z[0]))


def _minimum(rest: Tensor, step: Tensor, target: Tensor, halvings: int) -> Tensor:
    """a [B, 1] in [0, 1] with the smallest cross-entropy of rest + a step; exact at the ends."""

    def slope(a: Tensor) -> Tensor:
        return ((torch.softmax(rest + a * step, dim=-1) - target) * step).sum(-1, keepdim=True)

    low, high = torch.zeros_like(rest[:, :1]), torch.ones_like(rest[:, :1])
    at_low, at_high = slope(low) >= 0, slope(high) <= 0
    for _ in range(halvings):
        half = (low + high) / 2
        falls = slope(half) < 0
        low, high = torch.where(falls, half, low), torch.where(falls, high, half)
    return torch.where(at_low, 0.0, torch.where(at_high, 1.0, (low + high) / 2))
