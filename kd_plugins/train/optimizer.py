"""One optimizer and one schedule for several networks and their loss."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.hosted import PeerModule


def peer_optimizer(
    hosted: PeerModule,
    own: Sequence[dict[str, Any]],
    weight_decay: float,
    cls: type[torch.optim.Optimizer],
    settings: dict[str, Any],
) -> torch.optim.Optimizer:
    """One parameter group per network, with weight decay on all of it, and one for the loss.

    Args:
        hosted: the networks and the loss. A loss without parameters has no group.
        own: settings of each network that differ.
        weight_decay: of the others.
        cls: class of the optimizer.
        settings: its arguments.
    """
    groups = []
    for peer, different in zip(hosted.peers, own, strict=True):
        params = [p for p in peer.parameters() if p.requires_grad]
        groups.append({"params": params, "weight_decay": weight_decay, **different})
    if learned := [p for p in hosted.criterion.parameters() if p.requires_grad]:
        groups.append({"params": learned, "weight_decay": weight_decay})
    optimizer = cls(groups, **settings)
    known = set(optimizer.defaults)
    if unknown := {name for different in own for name in different} - known:
        raise ValueError(
            f"optim_per_peer: {cls.__name__} has no setting {sorted(unknown)} and would ignore it; "
            f"it has {sorted(known)}"
        )
    return optimizer


def stepped(
    milestones: Sequence[float], decay: float, warmup: int, steps: int
) -> Callable[[int], float]:
    """Factor on the learning rate: it rises over ``warmup`` steps and falls at each milestone."""

    def factor(step: int) -> float:
        falls = bisect_right(milestones, step / max(steps, 1))
        return decay**falls * min(1.0, (step + 1) / (warmup + 1))

    return factor


def clip_each(parts: Sequence[nn.Module], max_norm: float) -> Tensor:
    """Clip the gradient of each part by itself; returns the largest norm before clipping.

    Clipped together, one peer's spike would shrink the other's step.
    """
    parameters = [list(part.parameters()) for part in parts]
    norms = [nn.utils.clip_grad_norm_(part, max_norm) for part in parameters if part]
    return torch.stack(norms).max()
