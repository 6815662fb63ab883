"""Changes of gradients between backward and step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def mask_noncritical_(parameters: Iterable[Tensor], noise_rate: float) -> None:
    """CDR, in place: g <- (1 - tau) g for the critical weights of a network, 0 for the others.

    A network's n weights are its parameters with 2 or 4 dimensions. The int((1 - tau) n) weights
    with the largest |w g| are critical, and all that tie with the last of them. The others get no
    gradient, so weight decay shrinks them. Biases and norms learn as usual.

    Call it between ``backward`` and ``step``, once for each network, when accumulation is complete.
    ``scaler.unscale_`` may come before or after it. Sharded parameters do not work.

    Args:
        parameters: of one network. Those without gradient are skipped.
        noise_rate: tau, in [0, 1). 0 leaves the gradients as they are.

    References:
        Xia et al., "Robust early-learning: hindering the memorization of noisy labels", ICLR 2021.

    Notes:
        The paper has a schedule for the factor of the critical gradients. The authors' code
        replaces it by the constant 1 - tau, and so does this function.

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
            "no parameter has a gradient, so nothing would be masked: call it after backward and "
            "before zero_grad"
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
        # torch.where would hide an inf from the GradScaler
        g.mul_((s >= threshold) * (1.0 - noise_rate))


def _full(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _rate(noise_rate: float) -> float:
    if not 0.0 <= noise_rate < 1.0:
        raise ValueError(
            f"noise_rate={noise_rate}: expected the share of wrong labels, in [0, 1); at 1 no "
            "weight would learn"
        )
    return noise_rate
