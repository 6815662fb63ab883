"""Distillation through feature maps: hints, attention, variational information.

Each is the term alone, as in ``CE() + 100 * FitNet()``. Some learn parameters of their own
(regressors, variances), which have to be trained with the student; ``MutualDistillationTrainer``
does so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validate
from .base import Loss, LossArguments
from .maps import at_layer, map_at, same_size
from .registry import register_loss
from .sizes import Sizes

Maps = Sequence[Tensor]  # of one network, shallow to deep
TeacherMaps = Sequence[Maps]


class MapDistillation(Loss):
    """A loss on a map of the student and a map of each teacher, all from one layer.

    Args:
        student_dim: channels of the student's map; None until :meth:`bind`.
        teacher_dims: of the teacher's, or of each teacher's; None until :meth:`bind`.
        layer: which map.
    """

    student_dim: Any  # int, or None as long as it is not known
    teacher_dims: Any  # tuple[int, ...], or None
    needs: Mapping[str, str] = {
        "student_dim": "feature_dims",
        "teacher_dims": "teacher_feature_dims",
    }

    def __init__(
        self,
        student_dim: int | None,
        teacher_dims: int | Sequence[int] | None,
        layer: int,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(**base)
        dims = (teacher_dims,) if isinstance(teacher_dims, int) else teacher_dims
        self.student_dim, self.layer, self.layers = student_dim, layer, (layer,)
        self.teacher_dims = None if dims is None else tuple(dims)
        known = [1 if student_dim is None else student_dim, *(self.teacher_dims or ())]
        if self.teacher_dims == () or min(known) < 1:
            raise ValueError(
                f"student_dim={student_dim}, teacher_dims={self.teacher_dims}: expected the "
                "channels of the student's map and of each teacher's (timm: model.num_features "
                "for the last)"
            )

    def take_sizes(self, sizes: Sizes) -> None:
        name = type(self).__name__
        if sizes.feature_dims is not None:
            self.settle("student_dim", at_layer(name, sizes.feature_dims[0], self.layer))
        if sizes.teacher_feature_dims is not None:
            dims = (at_layer(name, t, self.layer) for t in sizes.teacher_feature_dims)
            self.settle("teacher_dims", tuple(dims))
        super().take_sizes(sizes)

    def maps(
        self, logits: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> tuple[Tensor, list[Tensor]]:
        """F_S and the F_k, if they fit this loss."""
        name = type(self).__name__
        student, *teachers = (
            map_at(name, f, self.layer, len(logits)) for f in (features, *teacher_features)
        )
        found = student.shape[1], tuple(f.shape[1] for f in teachers)
        if found != (self.student_dim, self.teacher_dims):
            raise ValueError(
                f"{name} was made for student_dim={self.student_dim} and teacher_dims="
                f"{self.teacher_dims}, got maps with {found[0]} and {found[1]} channels"
            )
        return student, teachers

    def pairs(
        self, logits: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> list[list[Tensor]]:
        """[F_S, F_k] for each teacher k, the larger map pooled to the size of the smaller."""
        student, teachers = self.maps(logits, features, teacher_features)
        return [same_size([student, teacher]) for teacher in teachers]


def _per_sample_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


@register_loss("fitnet")
class FitNet(MapDistillation):
    """Hints, L = mean_k mean (r_k(F_S) - F_k)², r_k a learned 1x1 convolution to k's channels.

    The inner mean is over channels and positions. The larger map is pooled to the smaller. The
    usual weight is 100.

    Args:
        student_dim: channels of the student's map. :meth:`bind` can fill in this and
            ``teacher_dims``.
        teacher_dims: of the teacher's, or of each teacher's.
        layer: which map; by default the last but one, where there are several.

    References:
        Romero et al., "FitNets: hints for thin deep nets", ICLR 2015; the joint form with weight
        100 of CRD's public code, the mean over several teachers (FitNet-MKD) of CA-MKD's.

    Notes:
        FitNets trains the hint in a stage of its own, before distillation. Public code has strided
        or transposed convolutions with normalisation and ReLU as regressor. That of FitNet-MKD
        makes a new tensor of the list of hints, which cuts the graph: the term trains nothing
        there.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dims: int | Sequence[int] | None = None,
        layer: int = -2,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(student_dim, teacher_dims, layer, **base)
        self.complete()

    def build(self) -> None:
        convolutions = (nn.Conv2d(self.student_dim, d, 1) for d in self.teacher_dims)
        self.regressors: Any = nn.ModuleList(convolutions)

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> Tensor:
        hints = []
        pairs = self.pairs(logits, features, teacher_features)
        for k, (student, teacher) in enumerate(pairs):
            hints.append(_per_sample_mean((self.regressors[k](student) - teacher) ** 2))
            self.log(f"teacher_{k}", hints[k])
        return torch.stack(hints).mean(0)


@register_loss("at")
class AT(Loss):
    """Attention transfer, L = mean_k Σ_layers mean (Q_S - Q_k)².

    Q = a / ‖a‖ over positions, with a the mean over channels of F². Nothing is learned, and the
    numbers of channels need not agree. The larger map is pooled to the smaller. The usual weight is
    1000. If a network has one map only, that one is compared, once. A map of zeros has Q = 0.

    Args:
        layers: which maps.

    References:
        Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017, in the form of
        CRD's public code.

    Notes:
        The paper has a norm of Q_S - Q_k instead of the mean of squares, with another weight, as
        far as known; its equation could not be read (docs/unconfirmed.md). The mean over teachers
        is not from the paper.

    >>> f = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])
    >>> z, y = torch.zeros(1, 2), torch.tensor([0])
    >>> AT()(z, y, features=[f[0]], teacher_features=[[f[1]]])
    tensor(1.)
    """

    def __init__(self, layers: Sequence[int] = (-3, -2, -1), **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        validate.check(len(layers) > 0, "layers", layers, "at least one layer")
        self.layers = tuple(layers)

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> Tensor:
        if not teacher_features:
            raise ValueError(
                "AT: teacher_features is empty: expected the maps of at least one teacher"
            )
        single = any(len(maps) == 1 for maps in (features, *teacher_features))
        total = torch.zeros_like(logits[:, 0])
        for layer in self.layers[-1:] if single else self.layers:
            for maps in teacher_features:
                pair = [map_at("AT", f, layer, len(logits)) for f in (features, maps)]
                student, teacher = (_attention(f) for f in same_size(pair))
                total = total + ((student - teacher) ** 2).mean(1)
        return total / len(teacher_features)


def _attention(f: Tensor) -> Tensor:
    """Q of a map: [B, D, h, w] -> [B, h w]."""
    return F.normalize((f**2).mean(1).flatten(1), dim=1)


@register_loss("vid")
class VID(MapDistillation):
    """Variational information, L = mean_k mean 1/2 [ (F_k - μ_k(F_S))² / σ²_k + ln σ²_k ].

    This is the negative log-likelihood, up to a constant, of the teacher's map under a Gaussian. A
    network of three 1x1 convolutions on the student's map gives the mean μ_k. The variance
    σ²_kc = softplus(α_kc) + 1e-5 is learned for each channel: channels that the student cannot
    follow count less. The inner mean is over channels and positions. The larger map is pooled to
    the smaller. L is negative where variances are small. The usual weight is 1; for several
    layers, add several terms.

    Args:
        student_dim: channels of the student's map. :meth:`bind` can fill in this and
            ``teacher_dims``.
        teacher_dims: of the teacher's, or of each teacher's.
        layer: which map.
        variance: σ² at the start.

    References:
        Ahn et al., "Variational information distillation for knowledge transfer", CVPR 2019, in the
        form of the authors' code as CRD's public code has it.

    Notes:
        The mean over several teachers is not from the paper.
    """

    floor = 1e-5

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dims: int | Sequence[int] | None = None,
        layer: int = -1,
        variance: float = 5.0,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(student_dim, teacher_dims, layer, **base)
        self.variance = validate.check(
            variance > self.floor, "variance", variance, f"a number above {self.floor}"
        )
        self.complete()

    def build(self) -> None:
        self.means: Any = nn.ModuleList(_regressor(self.student_dim, d) for d in self.teacher_dims)
        start = self.variance - self.floor
        alpha = start + math.log(-math.expm1(-start))  # the inverse of softplus
        self.alphas: Any = nn.ParameterList(torch.full((d,), alpha) for d in self.teacher_dims)

    def per_sample(
        self, logits: Tensor, target: Tensor, features: Maps, teacher_features: TeacherMaps
    ) -> Tensor:
        total: Any = 0.0
        for k, (student, teacher) in enumerate(self.pairs(logits, features, teacher_features)):
            variance = (F.softplus(self.alphas[k]) + self.floor)[:, None, None]
            error = (self.means[k](student) - teacher) ** 2
            total = total + _per_sample_mean(error / variance + variance.log()) / 2
            self.log(f"variance_{k}", variance)
        return total / len(self.teacher_dims)


def _regressor(student_dim: int, dim: int) -> nn.Module:
    first, middle, last = (nn.Conv2d(d, dim, 1, bias=False) for d in (student_dim, dim, dim))
    return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
