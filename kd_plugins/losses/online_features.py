"""Peers that teach each other through their features: a fused or concatenated head, averages over time, adversaries.

What these losses learn (heads, adversaries) are their own parameters; ``MutualDistillationTrainer`` trains them with the
networks and keeps them in the checkpoint. Features are the last maps [B, D, h, w], one per peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, at_layer, peer_name
from .functional import Prediction, cross_entropy, kl
from .registry import register_loss
from .state import Progress


class _Featured(Loss):
    """Peers, their features, and T² KL between their predictions at temperature T."""

    num_peers = 2

    def __init__(self, feature_dims: Sequence[int], temperature: float, **base: Any) -> None:
        super().__init__(**base)
        if len(feature_dims) < 2:
            raise ValueError(
                f"feature_dims={tuple(feature_dims)}: expected the channels of each peer's last map, two or "
                "more (timm: model.num_features)"
            )
        if not temperature > 0.0:
            raise ValueError(
                f"temperature={temperature}: logits are divided by it; expected a positive number"
            )
        self.feature_dims, self.temperature = tuple(feature_dims), temperature
        self.num_peers = len(self.feature_dims)

    def soft(self, logits: Tensor) -> Tensor:
        """log softmax(z / T)."""
        return F.log_softmax(logits / self.temperature, dim=-1)

    def taught(self, teacher: Tensor, student: Tensor) -> Tensor:
        """T² KL(teacher ‖ student) per sample at temperature T; the teacher's logits are a constant."""
        return self.temperature**2 * kl(self.soft(teacher.detach()), self.soft(student))

    def last_maps(self, logits: Sequence[Tensor], features: Sequence[Any]) -> list[Tensor]:
        """The last map of each peer, once they fit."""
        name = type(self).__name__
        if len(logits) != self.num_peers or len(features) != self.num_peers:
            raise ValueError(
                f"{name} was made for {self.num_peers} peers, got {len(logits)} logits and {len(features)} features"
            )
        maps = [at_layer(f, -1) for f in features]
        if (dims := tuple(f.shape[1] for f in maps)) != self.feature_dims:
            raise ValueError(
                f"{name} was made for feature_dims={self.feature_dims}, got features with {dims} channels"
            )
        return maps


class _Ramped(_Featured):
    """A weight on what is taught that rises as w(t) = exp(-5 (1 - t / ramp)²) and stays 1 after ``ramp``."""

    def __init__(
        self, feature_dims: Sequence[int], temperature: float, ramp: float, **base: Any
    ) -> None:
        super().__init__(feature_dims, temperature, **base)
        if not 0.0 <= ramp <= 1.0:
            raise ValueError(f"ramp={ramp}: expected a share of the training in [0, 1]")
        self.ramp = ramp
        self.progress = Progress()

    def weight(self) -> Tensor:
        """w(t), 0-d."""
        t = self.progress.get(self)
        return (
            torch.exp(-5.0 * (1.0 - (t / self.ramp).clamp(max=1.0)) ** 2)
            if self.ramp
            else torch.ones_like(t)
        )


def _pooled(features: Tensor) -> Tensor:
    """A map [B, D, h, w] or pooled features [B, D] -> [B, D]."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def _same_size(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps [B, D, h, w] pooled to the smallest height and width among them."""
    size = min(f.shape[-2] for f in features), min(f.shape[-1] for f in features)
    return [f if f.shape[-2:] == size else F.adaptive_avg_pool2d(f, size) for f in features]


@register_loss("ffl")
class FFL(_Ramped):
    """Feature fusion learning: L = Σ_k CE_k + CE_f + w(t) [ Σ_k T² KL(p_f ‖ p_k) + T² KL(p_m ‖ p_f) ].

    p_f is a classifier on the peers' last maps, fused by a depthwise and a pointwise convolution; p_m is the softmax of the
    peers' mean logits. Whoever teaches is a constant; w(t) = exp(-5 (1 - t / ramp)²), 1 after ``ramp``.

    Source: Kim et al., "Feature fusion for online mutual knowledge distillation", ICPR 2020; the objective as in its
    public code, the fusion module from memory of the paper.
    Unsaid there: maps of different size are pooled to the smallest; probabilities need no 1e-7, as logarithms are kept.

    Args:
        feature_dims: channels of each peer's last map (timm: ``model.num_features``).
        num_classes: C.
        temperature: 3 in the code.
        ramp: share of the training after which w = 1; 80 of 300 epochs in the code.
    """

    def __init__(
        self,
        feature_dims: Sequence[int],
        num_classes: int,
        temperature: float = 3.0,
        ramp: float = 80 / 300,
        **base: Any,
    ) -> None:
        super().__init__(feature_dims, temperature, ramp, num_classes=num_classes, **base)
        wide, width = sum(self.feature_dims), max(self.feature_dims)
        self.fuse = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(
                wide, track_running_stats=False
            ),  # one NaN batch would stay in its statistics
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
        )
        self.head = nn.Linear(width, num_classes)

    def per_sample(
        self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor]
    ) -> Tensor:
        features = self.last_maps(logits, features)
        fused = self.head(_pooled(self.fuse(torch.cat(_same_size(features), dim=1))))
        mean = torch.stack([z.detach() for z in logits]).mean(0)
        weight = self.weight()
        own = cross_entropy(Prediction.of(fused).log_p, target)
        total = own + weight * self.taught(mean, fused)
        self.stats |= {"own_fused": own.detach().mean(), "ramp": weight}
        for k, z in enumerate(logits):
            own, lesson = cross_entropy(Prediction.of(z).log_p, target), self.taught(fused, z)
            self.stats |= {
                f"own_{peer_name(k)}": own.detach().mean(),
                f"taught_{peer_name(k)}": lesson.detach().mean(),
            }
            total = total + own + weight * lesson
        return total


@register_loss("pcl")
class PCL(_Ramped):
    """Peer collaborative learning: L = CE_e + Σ_k [ CE_k + w(t) T² ( KL(p_e ‖ p_k) + mean_{j≠k} KL(p^ema_j ‖ p_k) ) ].

    p_e is a classifier on the peers' concatenated pooled features, p^ema_j peer j with weights averaged over time: read as
    ``teacher`` [K, B, C]. ``MutualDistillationTrainer`` keeps the averages (decay ``ema``); in a loop of your own,
    ``torch.optim.swa_utils.AveragedModel`` does. w(t) = exp(-5 (1 - t / ramp)²), 1 after ``ramp``.

    Source: Wu and Gong, "Peer collaborative learning for online knowledge distillation", AAAI 2021, from memory of the
    paper and a public port; whether the averages teach in training or in eval mode could not be confirmed (here: eval).
    Differs: the paper's peers share their first stages, these are networks of their own; the port's ramp divides by 1
    epoch instead of 80, so that it never is one.

    Args:
        feature_dims: channels of each peer's features (timm: ``model.num_features``).
        num_classes: C.
        temperature: 3 in the paper.
        ramp: share of the training after which w = 1; 80 of 300 epochs.
        ema: decay of the averages.
    """

    def __init__(
        self,
        feature_dims: Sequence[int],
        num_classes: int,
        temperature: float = 3.0,
        ramp: float = 80 / 300,
        ema: float = 0.999,
        **base: Any,
    ) -> None:
        super().__init__(feature_dims, temperature, ramp, num_classes=num_classes, **base)
        if not 0.0 <= ema < 1.0:
            raise ValueError(
                f"ema={ema}: expected the decay of the averages in [0, 1); at 1 they would never move"
            )
        self.ema = self.ema_decay = ema
        self.head = nn.Linear(sum(self.feature_dims), num_classes)

    def per_sample(
        self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor], teacher: Tensor
    ) -> Tensor:
        features = self.last_maps(logits, features)
        if teacher.shape[0] != self.num_peers:
            raise ValueError(
                f"PCL: expected as teacher the logits of the {self.num_peers} averaged peers [K, B, C], got "
                f"{list(teacher.shape)}"
            )
        ensemble = self.head(torch.cat([_pooled(f) for f in features], dim=1))
        weight = self.weight()
        own = cross_entropy(Prediction.of(ensemble).log_p, target)
        total = own
        self.stats |= {"own_ensemble": own.detach().mean(), "ramp": weight}
        for k, z in enumerate(logits):
            own = cross_entropy(Prediction.of(z).log_p, target)
            others = [self.taught(teacher[j], z) for j in range(self.num_peers) if j != k]
            lesson = self.taught(ensemble, z) + torch.stack(others).mean(0)
            self.stats |= {
                f"own_{peer_name(k)}": own.detach().mean(),
                f"taught_{peer_name(k)}": lesson.detach().mean(),
            }
            total = total + own + weight * lesson
        return total


class _Adversary(nn.Module):
    """D: a map [B, D, h, w] -> a score [B]. ``frozen`` takes its weights as constants, for the network that fools it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(dim, max(dim // 2, 4), 3, padding=1)
        self.last = nn.Linear(max(dim // 2, 4), 1)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        w, b, v, c = (
            p.detach() if frozen else p for p in (*self.first.parameters(), *self.last.parameters())
        )
        return F.linear(_pooled(F.leaky_relu(F.conv2d(x, w, b, padding=1), 0.2)), v, c).squeeze(1)


@register_loss("afd")
class AFD(_Featured):
    """Adversarial feature-map distillation: L = Σ_k [ CE_k + mean_{j≠k} T² KL(p_j ‖ p_k) + a (1 - D_k(r_k F_k))² + L_D,k ].

    Each adversary learns L_D,k = (1 - D_k(F_j))² + D_k(r_k F_k)² with the maps F as constants: the map of the next peer
    j = k + 1 (cyclically) is real, that of k, brought to j's channels by a 1x1 convolution r_k, is not. Network k learns to
    fool D_k, whose weights are constants there: one backward serves both.

    Source: Chung et al., "Feature-map-level online adversarial knowledge distillation", ICML 2020, from memory of the
    paper. Could not be confirmed: the layers of D and r, and the weight a of the adversarial part.
    Differs: the paper steps the adversarial part by an optimizer of its own; here a small weight stands for its small steps. At
    a = 1 two networks trained from scratch learned to fool each other and nothing else (recipes/README.md).

    Args:
        feature_dims: channels of each peer's last map (timm: ``model.num_features``).
        temperature: 3 in the paper.
        adversarial: a; ours.
    """

    def __init__(
        self,
        feature_dims: Sequence[int],
        temperature: float = 3.0,
        adversarial: float = 0.01,
        **base: Any,
    ) -> None:
        super().__init__(feature_dims, temperature, **base)
        self.adversarial = adversarial
        following = [*self.feature_dims[1:], self.feature_dims[0]]
        self.transfer = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(self.feature_dims, following, strict=True)
        )
        self.adversaries = nn.ModuleList(_Adversary(b) for b in following)

    def per_sample(
        self, logits: Sequence[Tensor], target: Tensor, features: Sequence[Tensor]
    ) -> Tensor:
        features = self.last_maps(logits, features)
        total = torch.zeros_like(logits[0][:, 0])
        for k, (z, transfer, adversary) in enumerate(
            zip(logits, self.transfer, self.adversaries, strict=True)
        ):
            own = cross_entropy(Prediction.of(z).log_p, target)
            others = [self.taught(y, z) for j, y in enumerate(logits) if j != k]
            lesson = torch.stack(others).mean(0)
            real, fake = _same_size(
                [features[(k + 1) % self.num_peers].detach(), transfer(features[k])]
            )
            fool = (1.0 - adversary(fake, frozen=True)) ** 2
            tell = (1.0 - adversary(real)) ** 2 + adversary(fake.detach()) ** 2
            self.stats |= {
                f"own_{peer_name(k)}": own.detach().mean(),
                f"taught_{peer_name(k)}": lesson.detach().mean(),
            }
            self.stats |= {f"adversary_{peer_name(k)}": tell.detach().mean()}
            total = total + own + lesson + self.adversarial * fool + tell
        return total
