"""Distillation through relations: how the samples of a batch lie to each other in feature space.

Each is the term alone, as in ``CE() + RKD()``, and a mean over teachers. Nothing is learned, and
the widths of the networks need not agree. The batch is the one of this process and this
accumulation step: nothing is gathered, and the value changes with the way a batch is cut, also
where a weight belongs to one batch size. Each loss has a value per sample i, its relations to the
whole batch. Inside :class:`MaskedLoss` the relations of the samples that the mask drops are not
taught, but they stay in the batch that the kept ones are compared with.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .distill_features import Maps, TeacherMaps
from .functional import kl
from .maps import at_layer, map_at, vectors_at
from .registry import register_loss


class _Relations(Loss):
    """A mean over teachers of what :meth:`compare` says of two networks' features of one layer.

    Args:
        layer: which map.
    """

    def __init__(self, layer: int = -1, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.layer, self.layers = layer, (layer,)

    def vectors(self, maps: Maps, batch_size: int) -> Tensor:
        """[B, D]: the means of a map over its positions."""
        return vectors_at(type(self).__name__, maps, self.layer, batch_size)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """([B, D], [B, D']) -> [B]."""
        raise NotImplementedError

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> Tensor:
        if not teacher_features:
            raise ValueError(
                f"{type(self).__name__}: teacher_features is empty: expected the maps of at least "
                "one teacher"
            )
        student = self.vectors(features, len(logits))
        taught = [self.vectors(maps, len(logits)) for maps in teacher_features]
        losses = torch.stack([self.compare(student, teacher) for teacher in taught])
        for k, loss in enumerate(losses):
            self.log(f"teacher_{k}", loss)
        return losses.mean(0)


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of vectors [..., D]. A zero vector has neither, nor a gradient."""
    square = (x**2).sum(-1)
    zero = square == 0  # not of NaN, which stays
    length = torch.where(zero, 1.0, square).sqrt()
    unit = torch.where(zero.unsqueeze(-1), 0.0, x / length.unsqueeze(-1))
    return unit, torch.where(zero, 0.0, length)


@register_loss("rkd")
class RKD(_Relations):
    """Relational KD, L = mean_k mean_i [ distance mean_j H(d_ij) + angle mean_jl H(a_ijl) ].

    H is Huber's loss (delta 1) of a student's relation less teacher k's. d_ij = ‖f_i - f_j‖ / m is
    a distance, where m is the mean distance of two samples in the batch. a_ijl is the cosine of the
    angle at sample i between j and l. f are pooled features. The term does not change if features
    are shifted, rotated or scaled.

    Args:
        distance: weight of the distances; 25 in CRD's public code.
        angle: weight of the angles; 50 there. The authors have 1 and 2 for metric learning.
        layer: which map.

    References:
        Park et al., "Relational knowledge distillation", CVPR 2019 (arXiv 1904.05068), as in the
        authors' code.

    Notes:
        Means are over all B² pairs and B³ triples, with repetition, as in the code. The code makes
        a batch of one NaN, here it is 0; two samples always give 0. Two samples in one place have
        cosine 0 and no gradient; in the code it is of the order of 1e9. Distances come from the
        differences: in float32 |a|² + |b|² - 2ab loses digits where features are far from 0. The
        memory grows as B² D + B³. The batch is that of one process and accumulation step. The
        weights are made for 240 epochs: in a short run the term leaves cross-entropy no time. In 90
        steps on digits it cost 12 points (docs/results.md).
    """

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        layer: int = -1,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(layer, **base)
        self.distance = validate.non_negative("distance", distance)
        self.angle = validate.non_negative("angle", angle)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        (d_s, a_s), (d_t, a_t) = self._relations(student), self._relations(teacher)
        distances = F.smooth_l1_loss(d_s, d_t, reduction="none").mean(1)
        angles = F.smooth_l1_loss(a_s, a_t, reduction="none").mean((1, 2))
        return self.distance * distances + self.angle * angles

    def _relations(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """d [B, B] and a [B, B, B] of features [B, D]."""
        unit, length = _directions(f[None] - f[:, None])  # from i to j
        mean = length.sum() / max(len(f) * (len(f) - 1), 1)
        return length / torch.where(mean == 0, 1.0, mean), unit @ unit.mT


@register_loss("sp")
class SP(_Relations):
    """Similarity-preserving KD, L = mean_k ‖A - A_k‖² / B².

    A = F Fᵀ [B, B] with each row divided by its length. F are the flattened maps of the batch,
    whose sizes need not agree. The usual weight is 3000, for batches of 64: rows of length 1 make
    the term fall as 1 / B.

    Args:
        layer: which map.

    References:
        Tung and Mori, "Similarity-preserving knowledge distillation", ICCV 2019 (arXiv 1907.09682);
        the weight of 3000 and the last map are those of CRD's public code.

    Notes:
        A sample whose map is all 0 has a row of zeros and no gradient; in the code it is of the
        order of 1e10. A batch of one is 0. The batch is that of one process and accumulation step.
        The weight is made for 240 epochs; in 90 steps on digits it cost 3 points (docs/results.md).
    """

    def vectors(self, maps: Maps, batch_size: int) -> Tensor:
        if at_layer("SP", maps, self.layer).dim() == 2:
            return super().vectors(maps, batch_size)
        return map_at("SP", maps, self.layer, batch_size).flatten(1)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        rows, taught = (_directions(f @ f.T)[0] for f in (student, teacher))
        return ((rows - taught) ** 2).mean(1)


@register_loss("pkt")
class PKT(_Relations):
    """Probabilistic transfer, L = mean_k (1/B²) Σ_ij q_ij ln(q_ij / p_ij).

    p_ij = s_ij / Σ_j s_ij with s = (1 + cos(f_i, f_j)) / 2 says which samples j are near i for the
    student, q_ij says it for teacher k. f are pooled features, and i = j counts. The usual weight
    is 30000, for batches of 64: it is a KL divided by B once more.

    Args:
        layer: which map.

    References:
        Passalis and Tefas, "Learning deep representations with probabilistic knowledge transfer",
        ECCV 2018 (arXiv 1803.10837), as in the author's code; the weight is that of CRD's.

    Notes:
        The code has 1e-7 in norms and logarithms. Here the values are exact, and s is at least the
        smallest number of its type. A zero vector has cosine 0 to all and no gradient; in the code
        the gradient is NaN. A batch of one is 0. The batch is that of one process and accumulation
        step. The weight is made for 240 epochs; in 90 steps on digits it cost 4 points
        (docs/results.md).
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = (self._neighbours(f) for f in (student, teacher))
        return kl(log_q, log_p) / len(student)

    def _neighbours(self, f: Tensor) -> Tensor:
        """log p [B, B] of features [B, D]."""
        unit, _ = _directions(f)
        near = (0.5 + 0.5 * (unit @ unit.T)).clamp_min(torch.finfo(f.dtype).tiny)
        return near.log() - near.sum(1, keepdim=True).log()
