"""Tensor primitives that the losses share. Pure functions; units are nats.

Legend, used in every file: B samples in the batch · C classes · K peers · T teachers (in shapes) or temperature ·
D feature dimension · z logits · p = softmax(z) · q the label as a distribution · q~ a refined label · H entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def as_probs(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class indices [B] or distributions [B, C] as distributions [B, C].

    >>> as_probs(torch.tensor([2]), 3)
    tensor([[0., 0., 1.]])
    """
    if target.dim() == 2:
        return target.to(dtype)
    onehot = torch.zeros(target.shape[0], num_classes, dtype=dtype, device=target.device)
    return onehot.scatter_(1, target.long().unsqueeze(1), 1.0)


def log_softmax(logits: Tensor) -> Tensor:
    """log p over the last dimension, in float32 also for logits of 16 bits (without a copy of them in the graph)."""
    return F.log_softmax(logits, dim=-1, dtype=full_dtype(logits))


def full_dtype(z: Tensor) -> torch.dtype:
    """What losses are computed in: float64 for float64, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    """H(q, p) = -Σ_c q_c log p_c per sample: ([B, C], [B, C]) -> [B]. A class without mass costs nothing, even at p = 0."""
    return -torch.where(target == 0, 0.0, target * log_p).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """H(p) = -Σ_c p_c log p_c in nats, exact at p = 0 and never negative: [..., C] -> [...].

    >>> entropy(torch.log(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])))
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(log_p.exp()).sum(-1).clamp_min(0.0)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_c p_c (log p_c - log q_c) per sample: ([..., C], [..., C]) -> [...]."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def softened_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)) of logits: ([..., C], [..., C]) -> [...]."""
    lesson, answer = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * kl(lesson, answer)


def certainty(entropy: Tensor, num_classes: int) -> Tensor:
    """l(p) = 1 - H(p) / ln C, in [0, 1]: 0 on a uniform row, 1 on a certain one."""
    return (1.0 - entropy / math.log(num_classes)).clamp(0.0, 1.0)


def logistic(x: Any, steepness: float) -> Any:
    """h(x, b) = 1 / (1 + exp(-b x)).

    >>> logistic(0.0, 10.0)
    0.5
    """
    if isinstance(x, Tensor):
        return torch.sigmoid(steepness * x)
    return 0.5 * (1.0 + math.tanh(0.5 * steepness * x))  # does not overflow


@torch.no_grad()
def simplex_qp(gram: Tensor, cap: float = 1.0) -> Tensor:
    """The weights a that minimise a^T G a subject to Σ_k a_k = 1 and 0 <= a_k <= cap: [K, K] -> [K], for small K.

    Exact, by trying each assignment of every weight to {0, free, cap}: the free ones solve a linear system, and the
    best solution within the bounds is the answer. G is positive semidefinite, of any scale (a Gram matrix of vectors, whose
    shortest mixture is sought). Equal rows get equal weights, and G = 0 gives 1/K: a ridge of 1e-8 of its scale sees to it.
    Runs in float64; no gradient, nothing waits for the device. It takes 3^K systems: keep K at 6 or below.

    >>> simplex_qp(torch.diag(torch.tensor([1.0, 3.0])))
    tensor([0.7500, 0.2500])
    """
    size = gram.shape[-1]
    if gram.shape != (size, size):
        raise ValueError(f"simplex_qp: expected a matrix [K, K], got {list(gram.shape)}")
    if not cap * size >= 1.0 - 1e-9:
        raise ValueError(
            f"cap={cap}: {size} weights of at most {cap} cannot sum to 1; expected at least 1/{size}"
        )
    g = gram.double()
    scale = g.diagonal().abs().amax()
    eye = torch.eye(size, dtype=g.dtype, device=g.device)
    g = g / torch.where(scale > 0, scale, 1.0) + 1e-8 * eye

    at = (
        torch.arange(3**size, device=g.device)[:, None]
        // 3 ** torch.arange(size, device=g.device)
        % 3
    )  # [S, K]
    free = (at == 1).double()
    # for a free weight (G a)_k + m = 0, with the multiplier m of the sum; for the others a_k = 0 or cap; and Σ a_k = 1
    rows = torch.cat([free[:, :, None] * g + (1.0 - free)[:, :, None] * eye, free[:, :, None]], -1)
    last = torch.ones(size + 1, dtype=g.dtype, device=g.device)
    last[-1] = 0.0
    system = torch.cat([rows, last.expand(len(at), 1, -1)], 1)  # [S, K + 1, K + 1]
    right = torch.cat([cap * (at == 2), torch.ones_like(free[:, :1])], 1)
    a = torch.linalg.solve_ex(system, right, check_errors=False)[0][:, :-1]

    # with none free the system is singular, and nothing is lost: a corner is also what one free weight solves for
    inside = ((a > -1e-7) & (a < cap + 1e-7)).all(1) & (at == 1).any(1)
    value = torch.where(inside, ((a @ g) * a).sum(1), math.inf)
    return a.index_select(0, value.argmin(0, keepdim=True))[0].clamp(0.0, cap).to(gram.dtype)


class Prediction:
    """A batch of predictions p = softmax(z) of which every quantity is computed at most once.

    Mutual learning asks for the entropy of the same prediction up to three times (trust, r, selection): refine and
    selectors therefore take logits [B, C] or a ``Prediction`` of them, through :meth:`of`.
    """

    def __init__(self, log_p: Tensor) -> None:
        self.log_p = log_p  # [B, C]
        self._p: Tensor | None = None
        self._entropy: Tensor | None = None
        self._certainty: Tensor | None = None

    @staticmethod
    def of(logits: Tensor | Prediction) -> Prediction:
        return logits if isinstance(logits, Prediction) else Prediction(log_softmax(logits))

    def detach(self) -> Prediction:
        return Prediction(self.log_p.detach()) if self.log_p.requires_grad else self

    @property
    def num_classes(self) -> int:
        return self.log_p.shape[-1]

    @property
    def p(self) -> Tensor:  # [B, C]
        if self._p is None:
            self._p = self.log_p.exp()
        return self._p

    @property
    def entropy(self) -> Tensor:  # [B], nats
        if self._entropy is None:
            # entr takes a logarithm again, but its gradient is finite at p = 0; nansum would hide a NaN, which softmax
            # spreads over its row
            constant = not self.log_p.requires_grad
            h = (
                0.0 * self.p[:, 0] - (self.p * self.log_p).nansum(-1)
                if constant
                else entropy(self.log_p)
            )
            self._entropy = h.clamp_min(0.0)
        return self._entropy

    @property
    def certainty(self) -> Tensor:  # [B], in [0, 1]
        if self._certainty is None:
            self._certainty = certainty(self.entropy, self.num_classes)
        return self._certainty


class Predictions:
    """Predictions of K networks on one batch, as constants: what is known of a sample stands in [K, B].

    One operation for all networks, since at 100 classes a loss is as slow as it has operations.

    Args:
        logits: [B, C] of each network.
    """

    def __init__(self, logits: Sequence[Tensor]) -> None:
        with torch.no_grad():
            self.log_p = [log_softmax(z) for z in logits]  # [B, C] each
            self.p = [log_p.exp() for log_p in self.log_p]
        self._entropy: Tensor | None = None
        self._certainty: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return self.p[0].shape[-1]

    @property
    def entropy(self) -> Tensor:  # [K, B], nats
        if self._entropy is None:
            h = torch.stack(
                [(p * log_p).nansum(-1) for p, log_p in zip(self.p, self.log_p, strict=True)]
            )
            self._entropy = (self.nan - h).clamp_(min=0.0)
        return self._entropy

    @property
    def certainty(self) -> Tensor:  # [K, B], in [0, 1]
        if self._certainty is None:
            self._certainty = certainty(self.entropy, self.num_classes)
        return self._certainty

    @property
    def nan(self) -> Tensor:  # [K, B]
        """0, or NaN where the logits have one: softmax spreads it over its row, and a nansum would hide it."""
        return 0.0 * torch.stack([p[:, 0] for p in self.p])


class _MixedGradient(torch.autograd.Function):
    """Σ_k costs_k [B], with the gradient mass_k p_k - named_k q - Σ_{j≠k} mixed_j p_j at z_k.

    Takes costs [K, B], (mass, named, mixed) [3, K, B] (two where nothing is mixed in), q (classes [B, 1] or [B, C]), every p_k and
    every z_k. The gradient is written in the backward pass, where its weight in the batch is known.
    """

    @staticmethod
    def forward(ctx: Any, costs: Tensor, factors: Tensor, q: Tensor, *peers: Tensor) -> Tensor:
        ctx.save_for_backward(factors, q, *peers[: len(peers) // 2])
        ctx.dtypes = [z.dtype for z in peers[len(peers) // 2 :]]
        return costs.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        factors, q, *ps = ctx.saved_tensors
        mass, named, *mixed = (factors * upstream).unsqueeze(-1)
        gradients = []
        for k, p in enumerate(ps):
            gradient = p * mass[k]
            for j, other in enumerate(ps):
                if mixed and j != k:
                    gradient.addcmul_(other, mixed[0][j], value=-1.0)
            if q.shape == p.shape:
                gradient.addcmul_(q, named[k], value=-1.0)
            else:
                gradient.scatter_add_(1, q, -named[k])
            gradients.append(gradient.to(ctx.dtypes[k]))
        return None, None, None, *[None] * len(ps), *gradients


def mixed_cross_entropy(
    logits: Sequence[Tensor],
    preds: Predictions,
    target: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    weights: Tensor | None = None,
    own: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_k [ own · H(q~_k, p_k) + Σ_{j≠k} w_j H(q~_j, p_k) ] per sample, for constant labels q~_j = a_j q + b_j p_j.

    The same as cross-entropies with the q~_j, without writing any of them down: H(q~_j, p_k) = a_j H(q, p_k) + b_j H(p_j, p_k), and
    the gradient at z_k is Σ_j w_jk [ a_j (p_k - q) + b_j (p_k - p_j) ] with w_kk = own; p_k Σ_c q_c - q
    where q is of another mass.

    Args:
        logits: [B, C] of each peer.
        preds: their predictions.
        target: class indices [B] or distributions [B, C].
        a, b: [K, B]; b is None where it is 0.
        weights: w, [K, B]; None for one network.
        own: weight of a peer's own label.

    Returns:
        The sum [B], and H(q~_k, p_k) and Σ_{j≠k} w_j H(q~_j, p_k), constants [K, B].
    """
    with torch.no_grad():
        if target.dim() == 1:
            target = target.unsqueeze(1)
            label = -torch.cat(
                [log_p.gather(1, target) for log_p in preds.log_p], 1
            ).t()  # H(q, p_k), [K, B]
            size = None
        else:
            size = target.sum(-1)  # of q, which need not be 1
            label = (
                0.0 * size
                + preds.nan
                - torch.stack([(target * log_p).nansum(-1) for log_p in preds.log_p])
            )
        owns = a * label if b is None else torch.addcmul(a * label, b, preds.entropy)
        lessons = taught = torch.zeros_like(a)
        mixed = None
        if weights is not None:
            taught = _others(weights * a)
            lessons = taught * label
            if b is not None:
                mixed = weights * b
                lessons = lessons + torch.stack(
                    [_crossed(preds, mixed, k) for k in range(len(logits))]
                )
        costs, named = torch.add(lessons, owns, alpha=own), torch.add(taught, a, alpha=own)
        mass = named if size is None else named * size
        if mixed is not None:
            mass = mass + _others(mixed)
        factors = torch.stack([mass, named] if mixed is None else [mass, named, mixed])
    return _MixedGradient.apply(costs, factors, target, *preds.p, *logits), owns, lessons


def _others(x: Tensor) -> Tensor:
    """Σ_{j≠k} x_j: [K, B] -> [K, B]."""
    if len(x) == 2:
        return x.flip(0)
    return torch.stack(
        [torch.cat([x[:k], x[k + 1 :]]).sum(0) for k in range(len(x))]
    )  # x.sum(0) - x would round


def _crossed(preds: Predictions, weights: Tensor, k: int) -> Tensor:
    """Σ_{j≠k} w_j H(p_j, p_k), [B]."""
    terms = [weights[j] * (p * preds.log_p[k]).nansum(-1) for j, p in enumerate(preds.p) if j != k]
    return -sum(terms[1:], terms[0])
