"""Curricula: the loss of a sample decides whether, and how much, the sample counts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import validate
from .base import Loss
from .functional import cross_entropy, log_softmax
from .registry import register_loss
from .state import Progress, gather_over_ranks

CURRICULA = ("predefined", "self_paced", "linear")
BURN_IN, LINEAR_FROM = 0.18, 0.90  # phases of the predefined curriculum, as training progress


@register_loss("mentornet")
class MentorNet(Loss):
    """MentorNet's predefined curricula, L_i = v_i H(q_i, p_i).

    The weight v_i depends on d_i = H(q_i, p_i) - m, where m is a moving percentile of the losses:

    - ``"self_paced"``: v = 1 where d <= 0, else 0.
    - ``"linear"``: v = 1 - d / gamma, clipped to [0, 1].
    - ``"predefined"`` (PD): v = 1 up to progress 0.18, then self-paced, and linear from 0.90 on.

    Each training batch moves m <- decay m + (1 - decay) (percentile of the batch), starting from
    m = 0; the batch of all processes counts. The weights are read after this update and carry no
    gradient. The mean is over the whole batch, not over the samples that count.

    Args:
        curriculum: ``"predefined"``, ``"self_paced"`` or ``"linear"``.
        percentile: the share of samples that count once the losses stand still; 0.7 to 0.75 in
            the authors' code.
        decay: of m.
        gamma: the excess of loss, in nats, at which the linear weight reaches 0.

    References:
        Jiang et al., "MentorNet", ICML 2018 (arXiv 1712.05055): the predefined curricula, with the
        moving percentile of the authors' code.

    Notes:
        Not included: random dropping of samples, weight decay scaled by the mean of v, and the
        curriculum of a trained MentorNet (DD), whose weights are not available. The authors' code
        calls ``stop_gradient(v)`` and drops the result; here v is detached. gamma is not
        published. A batch whose percentile is not finite does not move m.

    >>> loss = MentorNet("self_paced", decay=0.0)  # m is the batch's percentile: 3 of 4 count
    >>> z = torch.tensor([[3.0, 0.0]] * 3 + [[0.0, 3.0]])
    >>> loss(z, torch.tensor([0, 0, 0, 0])), loss.stats["kept"]
    (tensor(0.0364), tensor(0.7500))
    """

    moving_percentile: Tensor

    def __init__(
        self,
        curriculum: str = "predefined",
        percentile: float = 0.75,
        decay: float = 0.5,
        gamma: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        self.curriculum = validate.one_of("curriculum", curriculum, CURRICULA)
        self.percentile = validate.fraction("percentile", percentile, "the 75th percentile is 0.75")
        self.decay = validate.fraction(
            "decay", decay, "at 1 the percentile would stay at 0", with_one=False
        )
        self.gamma = validate.positive("gamma", gamma, "the excess of loss is divided by it")
        self.register_buffer("moving_percentile", torch.zeros(()))
        self.progress = Progress() if curriculum == "predefined" else None

    def weights(self, losses: Tensor) -> Tensor:
        """v [B] in [0, 1] of losses [B], for the current m."""
        excess = losses - self.moving_percentile
        self_paced = (excess <= 0).to(losses.dtype)
        linear = (1.0 - excess / self.gamma).clamp(0.0, 1.0)
        if self.progress is None:
            return linear if self.curriculum == "linear" else self_paced
        t = self.progress.get(self)
        return torch.where(t < LINEAR_FROM, torch.where(t <= BURN_IN, 1.0, self_paced), linear)

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = cross_entropy(log_softmax(logits), target)
        if self.moves_state:
            self._move(losses.detach())
        with torch.no_grad():
            v = self.weights(losses)
        self.log("kept", v)
        self.log("percentile", self.moving_percentile)
        return v * losses

    @torch.no_grad()
    def _move(self, losses: Tensor) -> None:
        losses, m = gather_over_ranks(losses), self.moving_percentile
        nearest = round(self.percentile * (len(losses) - 1))
        batch = torch.where(losses.isnan().any(), math.nan, losses.sort().values[nearest])
        moved = self.decay * m + (1.0 - self.decay) * batch.to(m.dtype)
        m.copy_(torch.where(moved.isfinite(), moved, m))
