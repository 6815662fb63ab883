"""Tensor primitives that the losses share: pure functions, entropies in nats.

Letters in every file: B samples in the batch, C classes, K peers, T teachers (in shapes) or the
temperature, D feature dimension, z logits, p = softmax(z), q the label as a distribution, q~ a
refined label, H entropy.
"""

from __future__ import annotations

import math
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
    """log p over the last dimension. Logits of 16 bits are computed in float32 without a copy."""
    return F.log_softmax(logits, dim=-1, dtype=full_dtype(logits))


def label_of(target: Tensor) -> Tensor:
    """The class with the most mass as a mask: distributions [B, C] -> booleans [B, C].

    A NaN does not show in it: a loss that reads nothing else of the target adds
    ``0 * target.sum(-1)``.
    """
    classes = torch.arange(target.shape[-1], device=target.device)
    return classes == target.argmax(-1, keepdim=True)


def full_dtype(z: Tensor) -> torch.dtype:
    """The precision of a loss: float64 for float64, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    """H(q, p) = -Σ_c q_c log p_c per sample: ([..., C], [..., C]) -> [...].

    A class without mass costs nothing, even at p = 0; mass on a class of p = 0 costs infinity.
    """
    return Prediction(log_p).cost(target)


def entropy(log_p: Tensor) -> Tensor:
    """H(p) = -Σ_c p_c log p_c in nats, exact at p = 0 and never negative: [..., C] -> [...].

    >>> entropy(torch.log(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])))
    tensor([0.6931, 0.0000])
    """
    return Prediction(log_p).entropy


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_c p_c (log p_c - log q_c) per sample: ([..., C], [..., C]) -> [...]."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def centred(x: Tensor, dim: int = -1) -> Tensor:
    """x less its mean over ``dim``. What is constant but for rounding is 0, without a gradient.

    Whoever divides by the spread would otherwise make a gradient of 1e7 of rounding errors.
    """
    spread = x - x.mean(dim, keepdim=True)
    with torch.no_grad():
        rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax(dim, keepdim=True)
        flat = spread.abs().amax(dim, keepdim=True) <= rounding  # False for NaN, which stays
    return torch.where(flat, 0.0, spread)


def standardized(logits: Tensor) -> Tensor:
    """Each row with mean 0 and deviation 1, (z - mean z) / (1e-7 + std z): [..., C] -> [..., C].

    The deviation is that of C - 1 degrees of freedom. A row of equal logits becomes 0.

    >>> standardized(torch.tensor([[3.0, 5.0, 7.0]]))
    tensor([[-1.,  0.,  1.]])
    """
    spread = centred(logits)
    norm = torch.linalg.vector_norm(spread, dim=-1, keepdim=True)
    return spread / (1e-7 + norm / math.sqrt(logits.shape[-1] - 1))


def softened_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)): logits ([..., C], [..., C]) -> [...]."""
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
    """The weights a that minimise aᵀ G a, with Σ_k a_k = 1 and 0 <= a_k <= cap: [K, K] -> [K].

    G is the Gram matrix of K vectors, of any scale; a mixes the shortest vector from them. The
    result is exact: every weight is tried at 0, free and at cap, the free ones solve a linear
    system, and the best solution within the bounds is returned. A ridge of 1e-8 of G's scale gives
    equal rows equal weights, and 1/K for G = 0. It runs in float64, without gradient and without
    waiting for the device. There are 3^K systems to solve: use it for K up to 6.

    >>> simplex_qp(torch.diag(torch.tensor([1.0, 3.0])))
    tensor([0.7500, 0.2500])
    """
    size = gram.shape[-1]
    if gram.shape != (size, size):
        raise ValueError(f"simplex_qp: expected a matrix [K, K], got {list(gram.shape)}")
    if not cap * size >= 1.0 - 1e-9:
        raise ValueError(
            f"cap={cap}: {size} weights of at most {cap} cannot sum to 1; expected at least "
            f"1/{size}"
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
    # A free weight has (G a)_k + m = 0, with the multiplier m of the sum; the others are 0 or cap.
    rows = torch.cat([free[:, :, None] * g + (1.0 - free)[:, :, None] * eye, free[:, :, None]], -1)
    last = torch.ones(size + 1, dtype=g.dtype, device=g.device)
    last[-1] = 0.0
    system = torch.cat([rows, last.expand(len(at), 1, -1)], 1)  # [S, K + 1, K + 1]
    right = torch.cat([cap * (at == 2), torch.ones_like(free[:, :1])], 1)
    a = torch.linalg.solve_ex(system, right, check_errors=False)[0][:, :-1]

    # Without a free weight the system is singular. Such corners are found with one free weight too.
    inside = ((a > -1e-7) & (a < cap + 1e-7)).all(1) & (at == 1).any(1)
    value = torch.where(inside, ((a @ g) * a).sum(1), math.inf)
    return a.index_select(0, value.argmin(0, keepdim=True))[0].clamp(0.0, cap).to(gram.dtype)


class Prediction:
    """Predictions p [..., C], by their logarithms. The rest is computed when it is first read."""

    def __init__(self, log_p: Tensor, positive: bool | None = None) -> None:
        self.log_p = log_p
        # No p is 0: to look is cheaper than a mask. An accelerator would make the host wait.
        look = log_p.device.type == "cpu" and not torch.compiler.is_compiling()
        self._positive = look and log_p.amin().item() > -math.inf if positive is None else positive
        self._p: Tensor | None = None
        self._entropy: Tensor | None = None
        self._certainty: Tensor | None = None

    @staticmethod
    def of(logits: Tensor) -> Prediction:
        """p = softmax(z) of logits z [B, C]."""
        return Prediction(log_softmax(logits))

    def constant(self) -> Prediction:
        """The same predictions without gradient."""
        return Prediction(self.log_p.detach(), self._positive)

    def cost(self, label: Tensor) -> Tensor:
        """H(q, p) [...] of labels q [..., C]: see :func:`cross_entropy`."""
        product = label * self.log_p
        if not self._positive:
            product = torch.where(label == 0, 0.0, product)  # 0 · log 0 is 0
        return 0.0 - product.sum(-1)  # not -0.0

    @property
    def num_classes(self) -> int:
        """C."""
        return self.log_p.shape[-1]

    @property
    def p(self) -> Tensor:
        """[..., C]."""
        if self._p is None:
            self._p = self.log_p.exp()
        return self._p

    @property
    def entropy(self) -> Tensor:
        """H(p) [...], in nats."""
        if self._entropy is None:
            self._entropy = self.cost(self.p)
        return self._entropy

    @property
    def certainty(self) -> Tensor:
        """l(p) = 1 - H(p) / ln C [...], in [0, 1]."""
        if self._certainty is None:
            self._certainty = certainty(self.entropy, self.num_classes)
        return self._certainty
