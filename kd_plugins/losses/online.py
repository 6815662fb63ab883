"""Networks that learn from each other on equal terms: from the others' predictions (MKD, DML) or an ensemble of all (KDCL)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, peer_name
from .functional import Prediction, as_probs, cross_entropy, kl, simplex_qp
from .refined import _share
from .registry import register_loss


class _Peers(Loss):
    """L = Σ_k [ own · H(q, p_k) + taught · what peer k learns from the others ]; a subclass writes :meth:`lessons`."""

    num_peers = 2
    own, taught = 1.0, 1.0

    def __init__(self, num_peers: int = 2, **base: Any) -> None:
        super().__init__(**base)
        if num_peers < 2:
            raise ValueError(
                f"num_peers={num_peers}: expected at least two; one network has nobody to learn from"
            )
        self.num_peers = num_peers

    def per_sample(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        _refuse_count(self, logits)
        log_ps = [Prediction.of(z).log_p for z in logits]
        total = torch.zeros_like(log_ps[0][:, 0])
        for k, (log_p, taught) in enumerate(zip(log_ps, self.lessons(log_ps, target), strict=True)):
            own, peer = cross_entropy(log_p, target), peer_name(k)
            self.stats |= {
                f"own_{peer}": own.detach().mean(),
                f"taught_{peer}": taught.detach().mean(),
            }
            total = total + self.own * own + self.taught * taught
        return total

    def lessons(self, log_ps: list[Tensor], target: Tensor) -> list[Tensor]:
        """For each peer [B]: mean_{j≠k} KL(p_j ‖ p_k), p_j a constant."""
        return [
            torch.stack(
                [kl(other.detach(), log_p) for j, other in enumerate(log_ps) if j != k]
            ).mean(0)
            for k, log_p in enumerate(log_ps)
        ]


def _refuse_count(loss: Any, logits: Sequence[Tensor]) -> None:
    if len(logits) != loss.num_peers:
        raise ValueError(
            f"{type(loss).__name__} was made for num_peers={loss.num_peers}, got {len(logits)} logits"
        )


@register_loss("mkd")
class MKD(_Peers):
    """Plain mutual distillation, L = Σ_k [ (1 - eps) H(q, p_k) + eps mean_{j≠k} KL(p_j ‖ p_k) ], temperature 1.

    Source: Li et al., SMKD, IJCNN 2023, equation 2. Unsaid there: eps (0.5 here); p_j is a constant in L_k.

    Args:
        eps: weight of the peers' predictions, in [0, 1].
        num_peers: how many networks.

    >>> MKD()((torch.zeros(1, 2), torch.zeros(1, 2)), torch.tensor([0]))
    tensor(0.6931)
    """

    def __init__(self, eps: float = 0.5, num_peers: int = 2, **base: Any) -> None:
        super().__init__(num_peers, **base)
        self.eps = _share("eps", eps)
        self.own, self.taught = 1 - eps, eps


@register_loss("dml")
class DML(_Peers):
    """Deep mutual learning, L = Σ_k [ H(q, p_k) + mean_{j≠k} KL(p_j ‖ p_k) ], p_j a constant, temperature 1.

    Source: Zhang et al., "Deep mutual learning", CVPR 2018.
    Differs: the authors' code sums over the other peers and adds 1e-8 inside its logarithms; with two peers the sum is
    the mean. There each network takes its step in turn, here all learn from one forward pass.

    Args:
        num_peers: how many networks.

    >>> DML()((torch.zeros(1, 2), torch.zeros(1, 2)), torch.tensor([0]))  # peers that agree: two cross-entropies
    tensor(1.3863)
    """


RULES = ("naive", "linear", "minlogit", "general")


@register_loss("kdcl")
class KDCL(_Peers):
    """Collaborative learning, L = Σ_k [ H(q, p_k) + alpha T² KL(p_t ‖ p_k) ] at temperature T, p_t an ensemble of the peers.

    The ensemble's logits z_t are a constant, made from the peers' logits z_1 ... z_K by ``rule``:
    ``"naive"``: for each sample the logits of the peer with the smallest cross-entropy;
    ``"linear"``: for each sample the convex combination of the peers' logits with the smallest cross-entropy;
    ``"minlogit"``: for each class the minimum over peers of z_c - Σ_c' q_c' z_c', the logit less that of the label;
    ``"general"``: one convex combination for all samples, fitted on held-out data by :meth:`fit`; the mean until then.

    Source: Guo et al., "Online knowledge distillation via collaborative learning", CVPR 2020.
    Unsaid there: all of this is from memory of the paper and could not be confirmed, the temperature too.
    Differs: there each student sees its own augmentation of a picture; here the peers get what the caller gives them.
    The optimum of ``"linear"`` is found by line searches of fixed length: to float precision for two peers; for more, in
    turn over their pairs, to about 1e-4 in cross-entropy (not on logits of tens that contradict each other).

    Args:
        rule: how the peers' logits make the ensemble's.
        temperature: T of the ensemble and of the peers.
        alpha: weight of what the ensemble teaches.
        num_peers: how many networks.

    >>> a, b = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])
    >>> loss = KDCL(rule="naive")
    >>> loss((a, b), torch.tensor([1]))  # b is the better one and teaches a; H(q, p_a) = 0.3133, H(q, p_b) = 0.0486, 4 KL = 0.3609
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
        **base: Any,
    ) -> None:
        super().__init__(num_peers, **base)
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: expected one of {RULES}; each builds another teacher")
        if not temperature > 0:
            raise ValueError(
                f"temperature={temperature}: expected a positive number; logits are divided by it"
            )
        self.rule, self.temperature, self.alpha = rule, float(temperature), alpha
        self.taught = alpha
        if rule == "general":
            self.register_buffer("weights", torch.full((num_peers,), 1.0 / num_peers))

    def lessons(self, log_ps: list[Tensor], target: Tensor) -> list[Tensor]:
        t = self.temperature
        taught = F.log_softmax(self.ensemble(log_ps, target) / t, dim=-1)
        return [t * t * kl(taught, F.log_softmax(log_p / t, dim=-1)) for log_p in log_ps]

    @torch.no_grad()
    def ensemble(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """The logits z_t [B, C] of K peers' logits [B, C] and the labels as distributions [B, C]; carries no gradient."""
        z = torch.stack(list(logits))  # [K, B, C]
        if self.rule == "linear":
            return _best_mixture(z, target)
        if self.rule == "minlogit":
            return (z - (target * z).sum(-1, keepdim=True)).amin(0)
        if self.rule == "general":
            return (self.weights[:, None, None] * z).sum(0)
        best = cross_entropy(F.log_softmax(z, dim=-1), target).argmin(0)  # [B]
        return z.gather(0, best[None, :, None].expand(1, *z.shape[1:]))[0]

    @torch.no_grad()
    def fit(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Set the weights of ``rule="general"`` from the peers' logits [K, N, C] on held-out data, and return them.

        They minimise w^T C w over the simplex, C_ij = mean_n <p_i - y, p_j - y>: the squared error of the mixed predictions.
        Call it now and then, with ``torch.stack([torch.cat([peer(x) for x, _ in held_out]) for peer in peers])``, and on
        every process with the same: it sends nothing between them.

        Args:
            logits: of each peer, in eval mode, on data that none of them is trained on.
            target: class indices [N] or distributions [N, C].
        """
        if self.rule != "general":
            raise ValueError(f"fit sets the weights of rule='general'; rule={self.rule!r} has none")
        z = torch.stack(list(logits)).double()
        if z.dim() != 3 or len(z) != self.num_peers or len(target) != z.shape[1] or not len(target):
            raise ValueError(
                f"fit: expected logits [{self.num_peers}, N, C] and N > 0 targets, got {list(z.shape)} and "
                f"{list(target.shape)}"
            )
        error = (z.softmax(-1) - as_probs(target, z.shape[-1], z.dtype)).flatten(1)  # [K, N C]
        self.weights.copy_(simplex_qp(error @ error.T / len(target)))
        return self.weights.clone()


def _best_mixture(z: Tensor, target: Tensor) -> Tensor:
    """The convex combination of z_1 ... z_K with the smallest cross-entropy, per sample: [K, B, C] -> [B, C].

    Two at a time: along z_j + a (z_i - z_j) the cross-entropy is convex in a, with slope Σ_c (p_c - q_c)(z_i - z_j)_c, and
    the zero of the slope is found by halving. A fixed number of times, for a test of convergence would wait for the device.
    """
    pairs = list(itertools.combinations(range(len(z)), 2))
    sweeps, halvings = (1, 24) if len(pairs) == 1 else (10, 12)
    w = [torch.full_like(z[0, :, :1], 1.0 / len(z)) for _ in z]  # [B, 1] each
    for i, j in pairs * sweeps:
        both = w[i] + w[j]
        step = both * (z[i] - z[j])
        rest = both * z[j] + sum(w[k] * z[k] for k in range(len(z)) if k not in (i, j))
        low, high = torch.zeros_like(both), torch.ones_like(both)
        at_low, at_high = (
            _slope(rest, step, low, target) >= 0,
            _slope(rest, step, high, target) <= 0,
        )
        for _ in range(halvings):
            half = (low + high) / 2
            down = _slope(rest, step, half, target) < 0
            low, high = torch.where(down, half, low), torch.where(down, high, half)
        a = torch.where(
            at_low, 0.0, torch.where(at_high, 1.0, (low + high) / 2)
        )  # exact where an end is the best
        w[i], w[j] = a * both, (1 - a) * both
    return sum(weight * peer for weight, peer in zip(w, z, strict=True))  # type: ignore[return-value]


def _slope(rest: Tensor, step: Tensor, a: Tensor, target: Tensor) -> Tensor:
    return ((F.softmax(rest + a * step, dim=-1) - target) * step).sum(-1, keepdim=True)
