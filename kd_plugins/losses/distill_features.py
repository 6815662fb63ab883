"""Distillation through the features of one or several teachers, each the term alone: ``CE() + 100 * FitNet(...)``.

The student's ``features`` are its maps [B, D, h, w] by layer, shallow to deep, or one such map; ``teacher_features`` the same
for each teacher. What these losses learn (regressors, embeddings, variances) are their own parameters: train them too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Loss, at_layer
from .functional import cross_entropy
from .online_features import _pooled, _same_size
from .registry import register_loss
from .state import KeepsPrecision, SampleTable, sum_over_ranks

SCALES = ("code", "paper")


class _Taught(Loss):
    """One student map and one map of each teacher, of known channels, from one layer."""

    def __init__(
        self, student_dim: int, teacher_dims: int | Sequence[int], layer: int, **base: Any
    ) -> None:
        super().__init__(**base)
        dims = (teacher_dims,) if isinstance(teacher_dims, int) else tuple(teacher_dims)
        if not dims or min(student_dim, *dims) < 1:
            raise ValueError(
                f"student_dim={student_dim}, teacher_dims={dims}: expected the channels of the student's map and of "
                "each teacher's (timm: model.num_features for the last)"
            )
        self.student_dim, self.teacher_dims, self.layer = student_dim, dims, layer
        self.layers = (layer,)

    def maps(
        self, logits: Tensor, features: Any, teacher_features: Sequence[Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """F_S and the F_k, once they fit."""
        student, *teachers = (
            _map(self, logits, f, self.layer) for f in (features, *teacher_features)
        )
        found = student.shape[1], tuple(f.shape[1] for f in teachers)
        if found != (self.student_dim, self.teacher_dims):
            raise ValueError(
                f"{type(self).__name__} was made for student_dim={self.student_dim} and teacher_dims="
                f"{self.teacher_dims}, got maps with {found[0]} and {found[1]} channels"
            )
        return student, teachers

    def pairs(
        self, logits: Tensor, features: Any, teacher_features: Sequence[Any]
    ) -> list[list[Tensor]]:
        """[F_S, F_k] for each teacher k, the larger pooled to the smaller; always from the maps as they came."""
        student, teachers = self.maps(logits, features, teacher_features)
        return [_same_size([student, teacher]) for teacher in teachers]


def _map(owner: Loss, logits: Tensor, features: Any, layer: int) -> Tensor:
    """The map of a layer, once it is one of this batch."""
    layer = layer if len(features) > 1 else -1
    if not -len(features) <= layer < len(features):
        raise ValueError(
            f"{type(owner).__name__} reads layer {layer}, got the maps of {len(features)} layers"
        )
    found = at_layer(features, layer)
    if found.dim() != 4 or len(found) != len(logits):
        raise ValueError(
            f"{type(owner).__name__}: expected a map [{len(logits)}, D, h, w] at layer {layer}, got "
            f"{list(found.shape)}"
        )
    return found


def _per_sample_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


@register_loss("fitnet")
class FitNet(_Taught):
    """Hints, L = mean_k mean (r_k(F_S) - F_k)², r_k a learned 1x1 convolution to teacher k's channels.

    The inner mean is over channels and positions. The larger map is pooled to the smaller. The weight is 100.

    Source: Romero et al., "FitNets: hints for thin deep nets", ICLR 2015; the joint form with weight 100 of CRD's public code,
    the mean over several teachers (FitNet-MKD) of CA-MKD's.
    Differs: FitNets trains the hint in a stage of its own, before distillation. Public code has strided or transposed
    convolutions with normalisation and ReLU as regressor. That of FitNet-MKD rebuilds the list of hints as a new tensor, which
    cuts the graph, so that the term trains nothing there; here it does.

    Args:
        student_dim: channels of the student's map.
        teacher_dims: of the teacher's, or of each teacher's.
        layer: which map; the last but one by default, where there are several.
    """

    def __init__(
        self, student_dim: int, teacher_dims: int | Sequence[int], layer: int = -2, **base: Any
    ) -> None:
        super().__init__(student_dim, teacher_dims, layer, **base)
        self.regressors: Any = nn.ModuleList(
            nn.Conv2d(student_dim, d, 1) for d in self.teacher_dims
        )

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Any, teacher_features: Sequence[Any]
    ) -> Tensor:
        pairs = self.pairs(logits, features, teacher_features)
        hints = [
            _per_sample_mean((r(s) - t) ** 2)
            for r, (s, t) in zip(self.regressors, pairs, strict=True)
        ]
        self.stats |= {f"teacher_{k}": hint.detach().mean() for k, hint in enumerate(hints)}
        return torch.stack(hints).mean(0)


@register_loss("at")
class AT(Loss):
    """Attention transfer, L = mean_k Σ_layers mean (Q_S - Q_k)², Q = a / ‖a‖ over positions, a = mean over channels of F².

    Nothing is learned, and channels need not agree. The larger map is pooled to the smaller. The weight is 1000. Of a network
    that gives one map only, that one is compared, once. A map of zeros has Q = 0.

    Source: Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017, in the form of CRD's public code.
    Differs: the paper, from memory, has the norm of Q_S - Q_k, not the mean of squares, with a weight of its own. The mean over
    teachers is ours.

    Args:
        layers: which maps.

    >>> f = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])
    >>> AT()(torch.zeros(1, 2), torch.tensor([0]), features=f[0], teacher_features=[f[1]])
    tensor(1.)
    """

    def __init__(self, layers: Sequence[int] = (-3, -2, -1), **base: Any) -> None:
        super().__init__(**base)
        if len(layers) < 1:
            raise ValueError(
                f"layers={layers}: expected at least one layer; the loss would be a constant zero"
            )
        self.layers = tuple(layers)

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Any, teacher_features: Sequence[Any]
    ) -> Tensor:
        if not teacher_features:
            raise ValueError(
                "AT: teacher_features is empty: expected the maps of at least one teacher"
            )
        alone = any(len(f) == 1 for f in (features, *teacher_features))
        total = torch.zeros_like(logits[:, 0])
        for layer in self.layers[-1:] if alone else self.layers:
            for taught in teacher_features:
                s, t = (
                    _attention(f)
                    for f in _same_size([_map(self, logits, f, layer) for f in (features, taught)])
                )
                total = total + ((s - t) ** 2).mean(1)
        return total / len(teacher_features)


def _attention(f: Tensor) -> Tensor:
    """Q of a map: [B, D, h, w] -> [B, h w]."""
    return F.normalize((f**2).mean(1).flatten(1), dim=1)


@register_loss("vid")
class VID(_Taught):
    """Variational information distillation, L = mean_k mean 1/2 [ (F_k - μ_k(F_S))² / σ²_k + ln σ²_k ].

    The negative log-likelihood, but for a constant, of the teacher's map under a Gaussian whose mean μ_k is a network of three
    1x1 convolutions on the student's map and whose variance σ²_kc = softplus(α_kc) + 1e-5 is learned for each channel: channels
    that the student cannot follow count less. The inner mean is over channels and positions. The larger map is pooled to the
    smaller. It falls below zero where variances are below 1. The weight is 1; for several layers add several terms.

    Source: Ahn et al., "Variational information distillation for knowledge transfer", CVPR 2019, from memory of the paper; the
    form of μ, the initial variance and the weight as in CRD's public code.
    Unsaid there: the mean over several teachers.

    Args:
        student_dim: channels of the student's map.
        teacher_dims: of the teacher's, or of each teacher's.
        layer: which map.
        variance: σ² at the start.
    """

    floor = 1e-5

    def __init__(
        self,
        student_dim: int,
        teacher_dims: int | Sequence[int],
        layer: int = -1,
        variance: float = 5.0,
        **base: Any,
    ) -> None:
        super().__init__(student_dim, teacher_dims, layer, **base)
        if not variance > self.floor:
            raise ValueError(
                f"variance={variance}: expected the initial variance, above {self.floor}"
            )
        self.variance = variance
        self.means: Any = nn.ModuleList(_regressor(student_dim, d) for d in self.teacher_dims)
        start = variance - self.floor
        alpha = start + math.log(-math.expm1(-start))  # the inverse of softplus
        self.alphas: Any = nn.ParameterList(torch.full((d,), alpha) for d in self.teacher_dims)

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Any, teacher_features: Sequence[Any]
    ) -> Tensor:
        total: Any = 0.0
        for k, (student, teacher) in enumerate(self.pairs(logits, features, teacher_features)):
            variance = (F.softplus(self.alphas[k]) + self.floor)[:, None, None]
            total = (
                total
                + _per_sample_mean(
                    (self.means[k](student) - teacher) ** 2 / variance + variance.log()
                )
                / 2
            )
            self.stats[f"variance_{k}"] = variance.detach().mean()
        return total / len(self.teacher_dims)


def _regressor(student_dim: int, dim: int) -> nn.Module:
    first, middle, last = (nn.Conv2d(d, dim, 1, bias=False) for d in (student_dim, dim, dim))
    return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)


class _Contrast(KeepsPrecision):
    """A student, a teacher, their embeddings and banks: maps, positions, positions of negatives -> NCE loss [B]."""

    z: Tensor

    def __init__(
        self,
        num_samples: int,
        dims: Sequence[int],
        feat_dim: int,
        tau: float,
        momentum: float,
        start: torch.Generator,
    ) -> None:
        super().__init__()
        self.tau, self.momentum = tau, momentum
        self.embeds: Any = nn.ModuleList(nn.Linear(d, feat_dim) for d in dims)
        self.banks: Any = nn.ModuleList(SampleTable(num_samples, feat_dim) for _ in dims)
        bank: Any
        for bank in self.banks:
            bank.rows.uniform_(
                -math.sqrt(3 / feat_dim), math.sqrt(3 / feat_dim), generator=start
            )  # E ‖m‖² = 1
        self.register_buffer("z", torch.zeros(2))  # 0: not known yet

    def forward(self, maps: Sequence[Tensor], index: Tensor, negatives: Tensor) -> Tensor:
        anchors = [
            F.normalize(e(_pooled(f)), dim=1) for e, f in zip(self.embeds, maps, strict=True)
        ]
        rows, scores = torch.cat([index, negatives]), []
        for v, bank in zip(
            anchors, (self.banks[1], self.banks[0]), strict=True
        ):  # each against the other's bank
            # positives too by a matrix product: what only feeds elementwise products, torch.compile reads anew in the
            # backward, from banks that have changed by then (pytorch/pytorch#197039)
            found = v @ bank.read(rows).to(v.dtype).T / self.tau  # [B, B + K]
            scores.append(
                torch.cat(
                    [found[:, : len(index)].diagonal()[:, None], found[:, len(index) :]], dim=1
                )
            )
        score = torch.stack(scores)  # [2, B, 1 + K]
        share = len(negatives) / self.banks[0].num_samples  # K P_n
        log_odds = score - (share * self._normalizer(score.detach())).log()[:, None, None]
        if self.training:
            for v, bank in zip(anchors, self.banks, strict=True):
                mixed = (
                    self.momentum * bank.read(index).to(v.dtype)
                    + (1.0 - self.momentum) * v.detach()
                )
                bank.write(index, F.normalize(mixed, dim=1))
        return (F.softplus(-log_odds[..., 0]) + F.softplus(log_odds[..., 1:]).sum(-1)).sum(0)

    @torch.no_grad()
    def _normalizer(self, score: Tensor) -> Tensor:
        """Z of both directions, [2]: N times the mean e^score of the first batch, over all processes."""
        total = torch.cat([score.exp().sum((1, 2)), score.new_full((1,), score[0].numel())])
        if self.training:
            total = sum_over_ranks(total)
        now = self.banks[0].num_samples * total[:2] / total[2]
        z = torch.where(self.z > 0, self.z, now.to(self.z.dtype))
        if self.training:
            self.z.copy_(torch.where(z.isfinite(), z, self.z))
        return z.to(score.dtype)


@register_loss("crd")
class CRD(_Taught):
    """Contrastive distillation, L = mean_k Σ_{a,b} [ -ln D(s_ab) - Σ_negatives ln(1 - D(s)) ], D = P / (P + K/N), P = e^s / Z.

    s = <u_a, m_b> / tau: u_a is the unit embedding (a learned linear layer) of the pooled last map of a, m_b a row of b's memory
    bank, which holds the embedding of each of the N training samples. (a, b) is (student, teacher) and (teacher, student). The
    sample's own row is the positive, K rows drawn at random the negatives. Z is set by the first batch, N times the mean e^s, and
    then kept. After the loss, in training mode, m <- momentum m + (1 - momentum) u, normalised. The weight is 0.8.

    The banks take 8 · N · feat_dim bytes for each teacher, on the device and in each checkpoint (CIFAR-100: 51 MB).

    Source: Tian et al., "Contrastive representation distillation", ICLR 2020, as in its public code.
    Differs: the K negatives are drawn once for the batch, not for each sample: as likely, K rows to gather instead of B K, and
    nothing depends on the order of the samples. As there, they are drawn with replacement and may hold a sample's own row.
    More than N - 1 are not drawn. The code's 1e-7 in D is not needed. Several teachers each have embeddings and banks of
    their own; the mean over them is ours.

    Args:
        num_samples: N, rows of the training data; ``index`` counts in them.
        student_dim: channels of the student's last map.
        teacher_dims: of the teacher's, or of each teacher's.
        feat_dim: size of the embeddings.
        negatives: K.
        tau: temperature.
        momentum: of the banks.
    """

    def __init__(
        self,
        num_samples: int,
        student_dim: int,
        teacher_dims: int | Sequence[int],
        feat_dim: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(student_dim, teacher_dims, -1, **base)
        if num_samples < 2 or negatives < 1:
            raise ValueError(
                f"num_samples={num_samples}, negatives={negatives}: expected two samples or more and a negative or "
                "more; without one there is nothing to tell apart"
            )
        if not tau >= 0.02:
            raise ValueError(
                f"tau={tau}: expected at least 0.02; below, e^(s / tau) exceeds float32"
            )
        if not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"momentum={momentum}: expected a share in [0, 1); at 1 the banks would stay random"
            )
        self.num_samples, self.feat_dim, self.tau, self.momentum = (
            num_samples,
            feat_dim,
            tau,
            momentum,
        )
        self.negatives = min(negatives, num_samples - 1)
        start = torch.Generator().manual_seed(
            0
        )  # DDP does not send tables: all processes have to begin with the same
        self.contrasts: Any = nn.ModuleList(
            _Contrast(num_samples, (student_dim, d), feat_dim, tau, momentum, start)
            for d in self.teacher_dims
        )

    def per_sample(
        self,
        logits: Tensor,
        target: Tensor,
        features: Any,
        teacher_features: Sequence[Any],
        index: Tensor,
    ) -> Tensor:
        student, teachers = self.maps(logits, features, teacher_features)
        negatives = torch.randint(self.num_samples, (self.negatives,), device=index.device)
        losses = [
            c((student, teacher), index, negatives)
            for c, teacher in zip(self.contrasts, teachers, strict=True)
        ]
        return torch.stack(losses).mean(0)


class _Head(KeepsPrecision):
    """A teacher's classifier, frozen: a map [B, D, h, w] -> logits [B, C]. Not trained and not in the checkpoint."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        linear = isinstance(head, nn.Linear)
        for name in ("weight", "bias"):
            own = getattr(head, name) if linear else None
            self.register_buffer(
                name, None if own is None else own.detach().clone(), persistent=False
            )
        if isinstance(head, nn.Module):
            head = copy.deepcopy(head).requires_grad_(False).eval()
        self.hidden = (
            [] if linear else [head]
        )  # a list: no module of ours, so not in the state dict

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for head in self.hidden:
            if isinstance(head, nn.Module):
                head._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return self.hidden[0](x)
        return F.linear(
            _pooled(x),
            self.weight.to(x.dtype),
            None if self.bias is None else self.bias.to(x.dtype),
        )


@register_loss("camkd_features")
class CAMKDFeatures(_Taught):
    """CA-MKD's feature term, L = Σ_k w_k ‖F_k - r_k(F_S)‖², w_k = (1 - e^L_k / Σ_j e^L_j) / (K - 1), L_k = H(q, h_k(r_k(F_S))).

    F are last maps, r_k a learned 1x1 convolution with batch normalisation and ReLU to teacher k's channels, h_k teacher k's own
    classifier, frozen: a teacher that reads the label from the student's features weighs more, sample by sample. A single
    teacher has weight 1. The code's objective is ``CE() + CAMKD(scale="code") + 50 * CAMKDFeatures(...)``.

    Source: Zhang et al., "Confidence-aware multi-teacher knowledge distillation", ICASSP 2022, the intermediate term; the
    equations from memory of the paper and its public code.
    Differs: the code has the mean over channels and positions for the squared norm, and divides by K once more. The published
    weight of 50 belongs to that, so it is the default; ``scale="paper"`` is the equation above, larger by K D h w. There the
    classifier reads the student's pooled features; r_k comes first because the channels differ, as in the code. The code pools
    or enlarges the student's map for one teacher after the other, each from what the last one left, so that their order
    matters: here each starts from the map itself and the larger one is pooled. The code leaves the term out in its first
    epoch. Here a batch is normalised by its own statistics, in eval mode as well: r_k is of no use after training.

    Args:
        student_dim: channels of the student's last map.
        teacher_dims: of each teacher's.
        heads: each teacher's classifier, copied as it stands: an ``nn.Linear`` on the pooled map (timm:
            ``teacher.get_classifier()``), any other module that makes logits of the map, or a function, which is used as it is
            (``teacher.forward_head``, of a frozen teacher on the same device).
        scale: ``"code"``, or ``"paper"`` for the squared norm and no 1/K.
        detach_weights: take w as a constant; the code differentiates it.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dims: int | Sequence[int],
        heads: Sequence[Callable[[Tensor], Tensor]],
        scale: str = "code",
        detach_weights: bool = False,
        **base: Any,
    ) -> None:
        linear = [head for head in heads if isinstance(head, nn.Linear)]
        classes = {"num_classes": linear[0].out_features} if linear else {}
        super().__init__(student_dim, teacher_dims, -1, **classes | base)
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r}: expected one of {SCALES}")
        if len(heads) != len(self.teacher_dims):
            raise ValueError(
                f"teacher_dims={self.teacher_dims} and {len(heads)} heads: expected one classifier per teacher"
            )
        for head, dim in zip(heads, self.teacher_dims, strict=True):
            if isinstance(head, nn.Linear) and (head.in_features, head.out_features) != (
                dim,
                self.num_classes,
            ):
                raise ValueError(
                    f"heads: expected a classifier from {dim} features to {self.num_classes} classes, got {head}"
                )
        self.scale, self.detach_weights = scale, detach_weights
        self.heads: Any = nn.ModuleList(_Head(head) for head in heads)
        self.embeds: Any = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(student_dim, d, 1, bias=False),
                nn.BatchNorm2d(d, track_running_stats=False),
                nn.ReLU(),
            )
            for d in self.teacher_dims
        )

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Any, teacher_features: Sequence[Any]
    ) -> Tensor:
        losses, distances, count = [], [], len(self.teacher_dims)
        pairs = self.pairs(logits, features, teacher_features)
        for head, embed, (student, teacher) in zip(self.heads, self.embeds, pairs, strict=True):
            student = embed(student)
            losses.append(cross_entropy(head(student).log_softmax(1), target))
            square = ((teacher - student) ** 2).flatten(1)
            distances.append(square.mean(1) / count if self.scale == "code" else square.sum(1))
        weights = (
            (1.0 - torch.stack(losses).softmax(0)) / (count - 1)
            if count > 1
            else torch.ones_like(losses[0])[None]
        )
        self.stats |= {f"weight_{k}": w.detach().mean() for k, w in enumerate(weights)}
        return (
            (weights.detach() if self.detach_weights else weights) * torch.stack(distances)
        ).sum(0)
