"""Two networks with one joint loss, which also decides from which samples both learn: JoCoR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .co_teaching import SmallLoss, smallest
from .functional import cross_entropy, kl, log_softmax
from .registry import register_loss


@register_loss("jocor")
class JoCoR(Loss):
    """JoCoR, L = mean of the (1 - R(t)) B smallest (1 - λ) Σ_k H(q, p_k) + λ Σ_{j≠k} KL(p_j ‖ p_k).

    The networks choose their samples together, by the loss that both reduce. A sample on which they
    disagree has a large one, and is left out. Each network gets the gradient of both divergences.
    ``lambda_=0, forget=0`` is the sum of the cross-entropies.

    Args:
        lambda_: λ, the weight of agreement, in [0, 1]. The authors recommend 0.85 for CIFAR-100
            (the default), 0.9 for CIFAR-10 and 0.65 for CIFAR-10 with 80% noise, and to search 0.5
            to 0.9 for other networks. Their code's default is 0.1.
        forget: share left out in the end, see :class:`SmallLoss`: the noise rate, half of it for
            asymmetric noise.
        ramp, exponent: of R(t), see :class:`SmallLoss`.
        num_peers: how many networks; two in the paper. More are ours: the divergences of all pairs.

    References:
        Wei et al., "Combating noisy labels by agreement: a joint training method with
        co-regularization", CVPR 2020.

    Notes:
        k = 0 gives 0; in the authors' code it is NaN. Of equal losses the earlier sample goes
        first.

    >>> loss = JoCoR(lambda_=0.5, forget=0.5, ramp=0)
    >>> a = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
    >>> loss((a, -a), torch.tensor([1, 1]))  # they agree on the first: ln 2
    tensor(0.6931)
    """

    num_peers = 2

    def __init__(
        self,
        lambda_: float = 0.85,
        forget: float = 0.2,
        ramp: float = 0.05,
        exponent: float = 1.0,
        num_peers: int = 2,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(**base)
        why = "cross-entropy weighs 1 - lambda_, and agreement lambda_"
        self.lambda_ = validate.fraction("lambda_", lambda_, why)
        self.select = SmallLoss(forget, ramp, exponent)
        self.forget, self.ramp, self.exponent = forget, ramp, exponent
        why = "one network has nobody to agree with"
        self.num_peers = validate.count("num_peers", num_peers, why, least=2)

    def per_sample(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        log_ps = [log_softmax(z) for z in logits]
        own = [cross_entropy(log_p, target) for log_p in log_ps]
        pairs = [(p, q) for p in log_ps for q in log_ps if p is not q]
        apart = torch.stack([kl(p, q) for p, q in pairs]).sum(0)
        losses = (1.0 - self.lambda_) * torch.stack(own).sum(0) + self.lambda_ * apart
        everywhere = torch.ones_like(losses, dtype=torch.bool)
        mask = smallest(losses, self.select.count(losses), everywhere)
        self.log("own", own)
        self.log("apart", apart)
        self.log("selected", [mask] * self.num_peers)
        self.logged |= self.select.stats
        self.selection = [(mask, target)] * self.num_peers
        return mask * losses * (len(mask) / mask.sum().clamp_min(1))  # the mean divides by B
