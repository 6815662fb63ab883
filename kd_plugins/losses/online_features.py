"""Peers that teach each other through features: fused or joined heads, averages, adversaries.

These losses learn parameters of their own (heads, adversaries). ``MutualDistillationTrainer``
trains them with the networks and keeps them in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validate
from .base import LossArguments
from .functional import cross_entropy, log_softmax, softened_kl
from .maps import at_layer, map_at, pooled, same_size
from .online import PeerLoss
from .registry import register_loss
from .sizes import Sizes
from .state import Progress

PeerMaps = Sequence[Sequence[Tensor]]  # per peer, shallow to deep


class _Featured(PeerLoss):
    """Peers with features, which also learn from each other's predictions at temperature T."""

    feature_dims: Any  # tuple[int, ...], or None as long as it is not known
    needs: Mapping[str, str] = {"feature_dims": "feature_dims"}

    def __init__(
        self,
        feature_dims: Sequence[int] | None,
        temperature: float,
        num_peers: int | None,
        **base: Any,
    ) -> None:
        dims = None if feature_dims is None else tuple(feature_dims)
        super().__init__(num_peers or max(2, len(dims or ())), **base)
        fits = dims is None or len(dims) == self.num_peers
        validate.check(fits, "feature_dims", dims, f"the channels of {self.num_peers} networks")
        self.feature_dims = dims
        self.temperature = validate.positive("temperature", temperature, "logits are divided by it")

    def take_sizes(self, sizes: Sizes) -> None:
        if sizes.feature_dims is not None:
            name = type(self).__name__
            dims = tuple(at_layer(name, network, -1) for network in sizes.feature_dims)
            if len(dims) != self.num_peers:
                raise ValueError(
                    f"{name} was made for num_peers={self.num_peers}, and there are {len(dims)} "
                    f"networks: {name}(num_peers={len(dims)})"
                )
            self.settle("feature_dims", dims)
        super().take_sizes(sizes)

    def taught(self, teacher: Tensor, student: Tensor) -> Tensor:
        """T² KL(teacher ‖ student) [B] at temperature T; the teacher's logits are a constant."""
        return softened_kl(teacher.detach(), student, self.temperature)

    def last_maps(self, logits: Sequence[Tensor], features: PeerMaps) -> list[Tensor]:
        """The last map of each peer, if they fit this loss."""
        name = type(self).__name__
        maps = [map_at(name, f, -1, len(logits[0])) for f in features]
        if (dims := tuple(f.shape[1] for f in maps)) != self.feature_dims:
            raise ValueError(
                f"{name} was made for feature_dims={self.feature_dims}, got features with {dims} "
                "channels"
            )
        return maps


class _Ramped(_Featured):
    """A weight on the lessons that rises as w(t) = exp(-5 (1 - t / ramp)²) and is 1 after ``ramp``.

    Its head [C] needs the number of classes.
    """

    num_classes: Any
    needs: Mapping[str, str] = {"feature_dims": "feature_dims", "num_classes": "num_classes"}

    def __init__(
        self,
        feature_dims: Sequence[int] | None,
        temperature: float,
        num_peers: int | None,
        ramp: float,
        **base: Any,
    ) -> None:
        super().__init__(feature_dims, temperature, num_peers, **base)
        self.ramp = validate.fraction("ramp", ramp, "it is a share of the training")
        self.progress = Progress()

    def ramp_weight(self) -> Tensor:
        """w(t), 0-d."""
        t = self.progress.get(self)
        if not self.ramp:
            return torch.ones_like(t)
        return torch.exp(-5.0 * (1.0 - (t / self.ramp).clamp(max=1.0)) ** 2)

    def with_head(
        self,
        name: str,
        joint: Tensor,
        logits: Sequence[Tensor],
        target: Tensor,
        lessons: Sequence[Tensor],
        lesson: Tensor | float = 0.0,
    ) -> Tensor:
        """CE of the joint logits and of the peers, plus w(t) times what each of them learns."""
        own, weight = cross_entropy(log_softmax(joint), target), self.ramp_weight()
        self.log(f"own_{name}", own)
        self.log("ramp", weight)
        log_ps = [log_softmax(z) for z in logits]
        return own + weight * lesson + self.add_up(log_ps, target, lessons, weight)


@register_loss("ffl")
class FFL(_Ramped):
    """Feature fusion, L = Σ_k CE_k + CE_f + w(t) [ Σ_k T² KL(p_f ‖ p_k) + T² KL(p_m ‖ p_f) ].

    p_f is a classifier on the peers' last maps, fused by a depthwise and a pointwise convolution.
    p_m is the softmax of the peers' mean logits. A teacher is always a constant.
    w(t) = exp(-5 (1 - t / ramp)²), and 1 after ``ramp``. Maps of different size are pooled to the
    smallest.

    Args:
        feature_dims: channels of each peer's last map (timm: ``model.num_features``).
            :meth:`bind` can fill in this and ``num_classes``.
        num_classes: C.
        temperature: 3 in the authors' code.
        ramp: share of the training after which w = 1; 80 of 300 epochs in the authors' code.
        num_peers: how many networks; None is as many as ``feature_dims``, or 2.

    References:
        Kim et al., "Feature fusion for online mutual knowledge distillation", ICPR 2020; the
        objective and the fusion module as in the authors' code.

    Notes:
        The authors' fusion module has a ReLU after each of its two normalisations; this one has
        none. It needs no 1e-7 beside probabilities, since it keeps logarithms.
    """

    def __init__(
        self,
        feature_dims: Sequence[int] | None = None,
        num_classes: int | None = None,
        temperature: float = 3.0,
        ramp: float = 80 / 300,
        num_peers: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(
            feature_dims, temperature, num_peers, ramp, num_classes=num_classes, **base
        )
        self.complete()

    def build(self) -> None:
        wide, width = sum(self.feature_dims), max(self.feature_dims)
        self.fuse = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            # without running statistics, in which one NaN batch would stay
            nn.BatchNorm2d(wide, track_running_stats=False),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width, track_running_stats=False),
        )
        self.head = nn.Linear(width, self.num_classes)

    def per_sample(self, logits: Sequence[Tensor], target: Tensor, features: PeerMaps) -> Tensor:
        maps = same_size(self.last_maps(logits, features))
        fused = self.head(pooled(self.fuse(torch.cat(maps, dim=1))))
        mean = torch.stack([z.detach() for z in logits]).mean(0)
        lessons = [self.taught(fused, z) for z in logits]
        return self.with_head("fused", fused, logits, target, lessons, self.taught(mean, fused))


@register_loss("pcl")
class PCL(_Ramped):
    """Peer collaboration, L = CE_e + Σ_k [ CE_k + w(t) (T² KL(p_e ‖ p_k) + A_k) ].

    A_k = mean_{j≠k} T² KL(a_j ‖ p_k).

    p_e is a classifier on the peers' joined pooled features. a_j is the prediction of peer j with
    its weights averaged over time; the averages are read as ``teacher`` [K, B, C].
    ``MutualDistillationTrainer`` keeps them (decay ``ema``); in your own loop,
    ``torch.optim.swa_utils.AveragedModel`` does. w(t) = exp(-5 (1 - t / ramp)²), and 1 after
    ``ramp``.

    Args:
        feature_dims: channels of each peer's last map (timm: ``model.num_features``).
            :meth:`bind` can fill in this and ``num_classes``.
        num_classes: C.
        temperature: 3 in the paper.
        ramp: share of the training after which w = 1; 80 of 300 epochs.
        ema: decay of the averages.
        num_peers: how many networks; None is as many as ``feature_dims``, or 2.

    References:
        Wu and Gong, "Peer collaborative learning for online knowledge distillation", AAAI 2021, as
        in a public port. The paper's equations could not be read (docs/unconfirmed.md).

    Notes:
        The averages teach in eval mode; the paper's choice is not known. The paper's peers share
        their first stages; these are separate networks. The port's ramp divides by 1 epoch instead
        of 80, so that it never is a ramp.
    """

    def __init__(
        self,
        feature_dims: Sequence[int] | None = None,
        num_classes: int | None = None,
        temperature: float = 3.0,
        ramp: float = 80 / 300,
        ema: float = 0.999,
        num_peers: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(
            feature_dims, temperature, num_peers, ramp, num_classes=num_classes, **base
        )
        still = "at 1 the averages would never move"
        self.ema = self.ema_decay = validate.fraction("ema", ema, still, with_one=False)
        self.complete()

    def build(self) -> None:
        self.head = nn.Linear(sum(self.feature_dims), self.num_classes)

    def per_sample(
        self, logits: Sequence[Tensor], target: Tensor, features: PeerMaps, teacher: Tensor
    ) -> Tensor:
        maps = self.last_maps(logits, features)
        if len(teacher) != self.num_peers:
            raise ValueError(
                f"PCL: expected as teacher the logits of the {self.num_peers} averaged peers "
                f"[K, B, C], got {list(teacher.shape)}"
            )
        ensemble = self.head(torch.cat([pooled(f) for f in maps], dim=1))
        averages = self.from_others(lambda j, k: self.taught(teacher[j], logits[k]))
        lessons = [self.taught(ensemble, z) + a for z, a in zip(logits, averages, strict=True)]
        return self.with_head("ensemble", ensemble, logits, target, lessons)


class _Adversary(nn.Module):
    """D: a map [B, D, h, w] -> a score [B]. ``frozen`` takes its weights as constants."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(dim, max(dim // 2, 4), 3, padding=1)
        self.last = nn.Linear(max(dim // 2, 4), 1)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        w, b, v, c = (p.detach() if frozen else p for p in self.parameters())
        return F.linear(pooled(F.leaky_relu(F.conv2d(x, w, b, padding=1), 0.2)), v, c).squeeze(1)


@register_loss("afd")
class AFD(_Featured):
    """Adversarial maps, L = Σ_k [ CE_k + mean_{j≠k} T² KL(p_j ‖ p_k) + a G_k + L_D,k ].

    G_k = (1 - D_k(r_k F_k))².

    Each adversary D_k learns L_D,k = (1 - D_k(F_j))² + D_k(r_k F_k)², with the maps F as constants:
    the map of the next peer j = k + 1 (cyclically) is real; that of k, which a 1x1 convolution r_k
    brings to j's channels, is not. Network k learns to fool D_k, whose weights are constants there:
    one backward pass serves both.

    Args:
        feature_dims: channels of each peer's last map (timm: ``model.num_features``);
            :meth:`bind` can fill it in.
        temperature: 3.
        adversarial: a, the weight of what fools the adversaries.
        num_peers: how many networks; None is as many as ``feature_dims``, or 2.

    References:
        Chung et al., "Feature-map-level online adversarial knowledge distillation", ICML 2020. The
        paper could not be read; the losses agree with a summary of it. The layers of D and r, the
        temperature and the weight a are not confirmed (docs/unconfirmed.md).

    Notes:
        The paper steps the adversarial part with an optimizer and a learning rate of its own; here
        a small weight stands for its small steps. At a = 1, two networks trained from scratch
        learned to fool each other and nothing else (recipes/README.md).
    """

    def __init__(
        self,
        feature_dims: Sequence[int] | None = None,
        temperature: float = 3.0,
        adversarial: float = 0.01,
        num_peers: int | None = None,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(feature_dims, temperature, num_peers, **base)
        self.adversarial = adversarial
        self.complete()

    def build(self) -> None:
        following = [*self.feature_dims[1:], self.feature_dims[0]]
        self.transfer = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(self.feature_dims, following, strict=True)
        )
        self.adversaries = nn.ModuleList(_Adversary(b) for b in following)

    def per_sample(self, logits: Sequence[Tensor], target: Tensor, features: PeerMaps) -> Tensor:
        maps = self.last_maps(logits, features)
        lessons = self.from_others(lambda j, k: self.taught(logits[j], logits[k]))
        total = self.add_up([log_softmax(z) for z in logits], target, lessons)
        games = [self.play(k, maps) for k in range(self.num_peers)]
        self.log("adversary", [tell for _, tell in games])
        for fool, tell in games:
            total = total + self.adversarial * fool + tell
        return total

    def play(self, k: int, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What network k pays if it does not fool its adversary, and L_D,k; [B] each."""
        adversary = self.adversaries[k]
        following = maps[(k + 1) % self.num_peers].detach()
        real, fake = same_size([following, self.transfer[k](maps[k])])
        fool = (1.0 - adversary(fake, frozen=True)) ** 2
        return fool, (1.0 - adversary(real)) ** 2 + adversary(fake.detach()) ** 2
