"""Distillation from logits beyond one KL: label and other classes apart, correlations, powers.

Each is the term alone, as in ``CE() + DKD()``, and a mean over teachers. All derive from
:class:`KD`: they work inside :class:`LabelRevision` and :class:`MaskedLoss`, and with cached
teachers.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from . import validate
from .base import LossArguments
from .distill import KD
from .functional import centred, cross_entropy, kl, label_of, log_softmax
from .registry import register_loss
from .state import Progress


def _apart(log_p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """log [p_y, 1 - p_y] [..., 2] and log of the other classes' shares h [..., C], -inf at y.

    It stays in logarithms, so that neither end underflows. If all other classes have p = 0, so has
    h.
    """
    own = torch.where(label, log_p, 0.0).sum(-1)
    others = log_p.masked_fill(label, -math.inf)
    rest = others.logsumexp(-1)
    shares = others - torch.where(rest == -math.inf, 0.0, rest).unsqueeze(-1)
    return torch.stack([own, rest], -1), shares


@register_loss("dkd")
class DKD(KD):
    """Decoupled KD, L = mean_k T² [ alpha KL(b_k ‖ b) + beta KL(h_k ‖ h) ].

    At temperature T, b = (p_y, 1 - p_y) says how sure a network is of the label y, and
    h_c = p_c / (1 - p_y) how it ranks the other classes. KD is alpha = 1 with beta = 1 - p_y of the
    teacher, which vanishes where the teacher is sure; here beta is free. With two classes the
    second term is 0. A label that is a distribution counts as its largest class.

    Args:
        temperature: T of teachers and student; the authors use 4 on CIFAR-100, 1 on ImageNet.
        alpha: weight of the label's part; 1 in the authors' code.
        beta: weight of the other classes' part. Theirs for CIFAR-100 are 8 (ResNet-32x4 to 8x4 and
            most unlike pairs), 6 (VGG, WRN) and 2 (ResNet-56 to 20); for ImageNet 0.5 or 2.
        warmup: the share of training in which the whole term grows from 0; 0 is without. Theirs is
            20 of 240 epochs, ``1 / 12``.
        standardize: as in :class:`KD`.

    References:
        Zhao et al., "Decoupled knowledge distillation", CVPR 2022 (arXiv 2203.08679), as in the
        authors' code.

    Notes:
        The code takes logarithms of probabilities, which is infinite once p_y or 1 - p_y
        underflows, and hides the label by subtracting 1000 from its logit. Here all is computed in
        logarithms. With beta = 8 and T = 4 the term is large: keep the warm-up with their learning
        rate. Their warm-up counts whole epochs from 1, here it is continuous from 0.

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> DKD()(z, torch.tensor([0]), teacher=z)
    tensor(0.)
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup: float = 0.0,
        standardize: bool = False,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(temperature, standardize, **base)
        self.alpha = validate.non_negative("alpha", alpha)
        self.beta = validate.non_negative("beta", beta)
        self.warmup = validate.fraction("warmup", warmup, "a share of the training")
        self.progress = Progress() if warmup > 0 else None

    def divergence(self, student: Tensor, target: Tensor, lesson: Tensor) -> Tensor:
        label = label_of(target)
        (b_s, h_s), (b_t, h_t) = _apart(student, label), _apart(lesson, label)
        tckd, nckd = (self.temperature**2 * kl(t, s) for t, s in ((b_t, b_s), (h_t, h_s)))
        self.log("tckd", tckd)
        self.log("nckd", nckd)
        whole = self.alpha * tckd + self.beta * nckd + 0.0 * target.sum(-1)  # keeps a NaN label
        if self.progress is not None:
            whole = whole * (self.progress.get(self) / self.warmup).clamp(max=1.0)
        return whole


@register_loss("nkd")
class NKD(KD):
    """Normalised KD, L = mean_k [ -p_ky log p_y - gamma T² Σ_{c≠y} h_kc log h_c ].

    h_c = p_c / (1 - p_y) are the other classes' shares, at temperature T; p_ky and p_y are at T = 1
    throughout. The first part is cross-entropy, weighted by the teacher's trust in the label:
    beside ``CE()`` the label weighs 1 + p_ky. These are cross-entropies, not KL: the least value is
    not 0, the gradient is that of the KL. With two classes the second part is 0. A label that is a
    distribution counts as its largest class.

    Args:
        temperature: T of the other classes; 3 in the authors' code for CIFAR-100, 1 for ImageNet.
        gamma: weight of the other classes' part; 3.5 there, for ImageNet 1.5 (CNNs) and 1 (DeiT).
        standardize: as in :class:`KD`, for the other classes' part.

    References:
        Yang et al., "From knowledge distillation to self-knowledge distillation: a unified approach
        with normalized loss and customized soft labels", ICCV 2023 (arXiv 2303.13005), as in the
        authors' code.

    Notes:
        :class:`LabelRevision` refuses this term. It would leave h_kc as they are, and with a
        revised p_ky every teacher would trust the label.
    """

    revisable = False

    def __init__(
        self,
        temperature: float = 3.0,
        gamma: float = 3.5,
        standardize: bool = False,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(temperature, standardize, **base)
        self.gamma = validate.non_negative("gamma", gamma)

    def divergence(self, student: Tensor, target: Tensor, lesson: Tensor) -> Tensor:
        label = label_of(target)
        (_, shares), (_, taught) = _apart(student, label), _apart(lesson, label)
        return self.gamma * self.temperature**2 * cross_entropy(shares, taught.exp())

    def learn(self, logits: Tensor, target: Tensor, teacher: Tensor, lesson: Tensor) -> Tensor:
        label = label_of(target)
        trust = torch.where(label, teacher.softmax(-1), 0.0).sum(-1)  # [T, B]
        own = torch.where(label, log_softmax(logits), 0.0).sum(-1)
        self.log("trust", trust)
        others = super().learn(logits, target, teacher, lesson)
        return others - trust.mean(0) * own + 0.0 * target.sum(-1)  # keeps a NaN label


@register_loss("dist")
class DIST(KD):
    """Correlations, L = mean_k T² [beta (1 - rho(p_i, p_ki)) + gamma (1 - mean_c rho(p_c, p_kc))].

    rho is Pearson's correlation, p softmax(z / T). The first is between the rows of a sample i,
    over classes. The second is between the columns of a class c, over the batch. The student need
    not match probabilities, only how they vary. The usual weight is 2.

    The batch is the one of this process and this accumulation step: the second part, one number for
    the batch, changes with the way a batch is cut. ``reduction="sum"`` counts it once per sample.
    Inside :class:`MaskedLoss` all samples of the batch stay in it.

    Args:
        temperature: T of teachers and student; the authors use 4 on CIFAR-100, 1 on ImageNet.
        beta: weight of the correlation over classes; 1 there.
        gamma: weight of the correlation over the batch; 1 there.
        eps: beside the product of the two norms; 1e-8 there.
        standardize: as in :class:`KD`.

    References:
        Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022 (arXiv
        2205.10536), as in the authors' code.

    Notes:
        A row or column without spread has rho = 0 and no gradient; in the code the gradient there
        is of the order of 1 / eps. With two classes rho over classes is a sign. In a batch of one
        sample the second part is constant.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        eps: float = 1e-8,
        standardize: bool = False,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(temperature, standardize, **base)
        self.beta = validate.non_negative("beta", beta)
        self.gamma = validate.non_negative("gamma", gamma)
        self.eps = validate.positive("eps", eps, "a row without spread would be 0 / 0")

    def divergence(self, student: Tensor, target: Tensor, lesson: Tensor) -> Tensor:
        p, taught = student.exp(), lesson.exp()
        inter = 1.0 - self._correlation(p, taught, dim=-1)  # [T, B]
        intra = 1.0 - self._correlation(p, taught, dim=-2).mean(-1, keepdim=True)  # [T, 1]
        self.log("inter", inter)
        self.log("intra", intra)
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)

    def _correlation(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = centred(a, dim), centred(b, dim)
        norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
        return (a * b).sum(dim) / (norms + self.eps)


@register_loss("wttm")
class WTTM(KD):
    """Weighted transformed teacher matching, L = mean_k U_k KL(p_k^gamma / U_k ‖ p).

    U_k = Σ_c p_kc^gamma, all at T = 1. The teacher is softened to temperature 1 / gamma, the
    student is not. U_k runs from 1, where the teacher is certain, to C^(1 - gamma), where it has no
    preference: smooth answers count more. The gradient is U_k p - p_k^gamma; at gamma = 1 this is
    KD with T = 1. There is no factor T².

    Args:
        gamma: the power, in (0, 1]. Theirs for CIFAR-100, with the weight of the term: 0.1
            (the default) and 3 for ResNet-32x4 to 8x4 and WRN-40-2 to 40-1, 4 for WRN-40-2 to
            16-2, 2.25 for VGG-13 to 8, 1.5 for ResNet-110 to 32, 2 for ResNet-50 to VGG-8; 0.2 and
            2 for ResNet-110 to 20; 0.3 and 1.5 for ResNet-56 to 20. For ImageNet 0.8 and 1.6
            (ResNet-34 to 18), 0.7 and 3.5 (ResNet-50 to MobileNet).

    References:
        Zheng and Yang, "Knowledge distillation based on transformed teacher matching", ICLR 2024
        (arXiv 2402.11148), as in the authors' code; tables 8 to 10 for gamma and the weights.

    Notes:
        U_k depends on the number of classes: up to 63 for 100 of them at gamma = 0.1, so that an
        unsure teacher weighs most. In 90 steps on digits the term cost 2 points, in 705 steps on
        CIFAR-100 it gained 6 (docs/results.md).
        U_k is computed in logarithms here, so that a teacher's p = 0 does not lose its power.
    """

    def __init__(self, gamma: float = 0.1, **base: Unpack[LossArguments]) -> None:
        super().__init__(1.0, **base)
        self.gamma = validate.fraction(
            "gamma", gamma, "the power of the teacher's probabilities", with_zero=False
        )

    def divergence(self, student: Tensor, target: Tensor, lesson: Tensor) -> Tensor:
        power = self.gamma * lesson
        log_u = power.logsumexp(-1)
        self.log("smoothness", log_u.exp())
        return log_u.exp() * kl(power - log_u.unsqueeze(-1), student)
