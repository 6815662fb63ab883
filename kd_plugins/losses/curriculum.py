"""Curricula: which samples count, and how much, judged by their loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Loss
from .functional import Prediction, cross_entropy
from .registry import register_loss
from .state import Progress, gather_over_ranks

CURRICULA = ("predefined", "self_paced", "linear")


BURN_IN, LINEAR_FROM = 0.18, 0.90  # of the predefined one, in progress


@register_loss("mentornet")
class MentorNet(Loss):
    """MentorNet's predefined curricula, L_i = v_i H(q_i, p_i), v_i from d_i = H(q_i, p_i) - m, m a moving percentile.

    ``"self_paced"``: v = 1 where d <= 0, else 0. ``"linear"``: v = 1 - d / gamma, clipped to [0, 1]. ``"predefined"`` (PD):
    v = 1 up to progress 0.18, self-paced until 0.90, then linear. m moves with each batch of training, over all processes, and
    the weights are read after it: m <- decay m + (1 - decay) (percentile of the batch), from m = 0. The weights carry no
    gradient, and the mean is over the whole batch, not over what counts.

    Source: Jiang et al., "MentorNet", ICML 2018 (arXiv 1712.05055): the predefined curricula, with the moving percentile of the
    authors' code.
    Differs: left out are the dropping of examples at random, the scaling of the weight decay by mean v, and the curriculum that
    a trained MentorNet gives (DD), whose weights are not to be had. The authors' stop_gradient(v) had no effect, as its
    result was dropped; here v is detached.
    Unsaid there: gamma, 1 nat here. A batch whose percentile is not finite does not move m.

    Args:
        curriculum: ``"predefined"``, ``"self_paced"`` or ``"linear"``.
        percentile: the share of samples that count once the loss stands still; 0.7 to 0.75 there.
        decay: of m.
        gamma: the excess of loss, in nats, at which the linear weight is 0.

    >>> loss = MentorNet("self_paced", decay=0.0)  # m is the batch's percentile: three of four count
    >>> loss(torch.tensor([[3.0, 0.0]] * 3 + [[0.0, 3.0]]), torch.tensor([0, 0, 0, 0])), loss.stats["kept"]
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
        if curriculum not in CURRICULA:
            raise ValueError(f"curriculum={curriculum!r}: expected one of {CURRICULA}")
        if not 0.0 <= percentile <= 1.0:
            raise ValueError(
                f"percentile={percentile}: expected a share in [0, 1], 0.75 for the 75th percentile"
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"decay={decay}: expected a number in [0, 1); at 1 the percentile would stay at 0"
            )
        if not gamma > 0:
            raise ValueError(
                f"gamma={gamma}: expected a number above 0; the excess of loss is divided by it"
            )
        self.curriculum, self.percentile, self.decay, self.gamma = (
            curriculum,
            percentile,
            decay,
            gamma,
        )
        self.register_buffer("moving_percentile", torch.zeros(()))
        self.progress = Progress() if curriculum == "predefined" else None

    def weights(self, losses: Tensor) -> Tensor:
        """v [B] in [0, 1] of losses [B], as m stands."""
        excess = losses - self.moving_percentile
        self_paced = (excess <= 0).to(losses.dtype)
        linear = (1.0 - excess / self.gamma).clamp(0.0, 1.0)
        if self.progress is None:
            return linear if self.curriculum == "linear" else self_paced
        t = self.progress.get(self)
        return torch.where(t < LINEAR_FROM, torch.where(t <= BURN_IN, 1.0, self_paced), linear)

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = cross_entropy(Prediction.of(logits).log_p, target)
        with torch.no_grad():
            m = self.moving_percentile
            if self.training:
                batch = torch.quantile(
                    gather_over_ranks(losses.detach()), self.percentile, interpolation="nearest"
                )
                moved = self.decay * m + (1.0 - self.decay) * batch.to(m.dtype)
                m.copy_(torch.where(moved.isfinite(), moved, m))
            v = self.weights(losses)
        self.stats |= {"kept": v.mean(), "percentile": m.clone()}
        return v * losses
