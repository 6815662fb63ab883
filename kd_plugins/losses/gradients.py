"""What is done to gradients between backward and step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def mask_noncritical_(parameters: Iterable[Tensor], noise_rate: float) -> None:
    """CDR: only the critical weights of a network learn, g <- (1 - tau) g · 1[(w g)² is among the top 1 - tau], in place.

    Of all n weights of the network (parameters with 2 or 4 dimensions, pooled) the int((1 - tau) n) with the largest
    s = |w g| are critical, with all that tie with the last of them. The others get gradient 0, and so the optimizer's weight
    decay shrinks them. Biases and norms learn as usual. Call it between ``backward`` and ``step`` for each network by itself,
    once accumulation is complete, before or after ``scaler.unscale_`` (a common scale of the gradients changes nothing). The
    parameters must be whole, not sharded.

    Source: Xia et al., "Robust early-learning: hindering the memorization of noisy labels", ICLR 2021 (CDR).
    Differs: the paper has a schedule for the factor on the critical gradients, which the authors' code overwrites with the
    constant 1 - tau; so here.

    Args:
        parameters: of one network; those without gradient are skipped.
        noise_rate: tau, in [0, 1); 0 leaves the gradients as they are.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    >>> w.grad = torch.tensor([[4.0, -3.0], [2.0, 1.0]])
    >>> mask_noncritical_([w], noise_rate=0.5)
    >>> w.grad
    tensor([[ 2.0000, -1.5000],
            [ 0.0000,  0.0000]])
    """
    noise_rate = _rate(noise_rate)
    learned = [(w, w.grad) for w in parameters if w.grad is not None]
    if not learned:
        raise ValueError(
            "no parameter has a gradient, so nothing would be masked: call it after backward, before zero_grad"
        )
    pairs = [(w, g) for w, g in learned if w.dim() in (2, 4)]
    if noise_rate == 0 or not pairs:
        return
    scores = [(_full(w) * _full(g)).abs() for w, g in pairs]
    pooled = torch.cat([s.flatten() for s in scores])
    n = len(pooled)
    count = max(int(round((1.0 - noise_rate) * n, 6)), 1)  # int((1 - 0.9) * 10) alone is 0
    threshold = pooled.topk(count, sorted=False).values.amin()
    for (_, g), s in zip(pairs, scores, strict=True):
        g.mul_(
            (s >= threshold) * (1.0 - noise_rate)
        )  # not torch.where: an inf has to reach the GradScaler


def _full(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _rate(noise_rate: float) -> float:
    if not 0.0 <= noise_rate < 1.0:
        raise ValueError(
            f"noise_rate={noise_rate}: expected the share of wrong labels, in [0, 1); at 1 no weight would learn"
        )
    return noise_rate
