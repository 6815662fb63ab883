"""Distillation from logits: of one teacher or several, corrected by the label, or of a network's own (Tf-KD)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Loss
from .functional import Prediction, cross_entropy, entropy, kl, simplex_qp
from .refined import _share
from .registry import register_loss

SCALE = ("paper", "code")


APPLY_TO = ("all", "wrong")


VIRTUAL = ("softmaxed", "direct")


KL_REDUCTION = ("batchmean", "mean")


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T)."""
    return torch.log_softmax(logits / temperature, dim=-1)


def _temperature(value: float) -> float:
    if not 0.0 < value < math.inf:
        raise ValueError(
            f"temperature={value}: expected a finite number above 0; logits are divided by it"
        )
    return float(value)


@register_loss("kd")
class KD(Loss):
    """Knowledge distillation, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)) over teachers k, w_k = 1/K.

    The term alone: ``0.1 * CE() + 0.9 * KD()`` is a whole objective. T² keeps the gradient's size as T changes. One teacher
    is the usual case; of several it is AVER. A loss that weighs teachers otherwise writes :meth:`weights`.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015 (arXiv 1503.02531).

    Args:
        temperature: T of teachers and student; 4 in CA-MKD and in CRD's comparison, with weights 1 / 1 and 0.1 / 0.9 on
            cross-entropy / KD.

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> KD()(z, torch.tensor([0]), teacher=z)
    tensor(0.)
    """

    def __init__(self, temperature: float = 4.0, **base: Any) -> None:
        super().__init__(**base)
        self.temperature = _temperature(temperature)

    def weights(self, student: Tensor, target: Tensor, teacher: Tensor, taught: Tensor) -> Tensor:
        """w [T, B] of two teachers or more, summing to 1 over T: constants, whatever they are computed from.

        Args:
            student: log softmax(z / T) [B, C].
            target: distributions [B, C].
            teacher: logits [T, B, C].
            taught: log-probabilities [T, B, C] at temperature T that the student is to learn: the teachers', or revised.
        """
        return torch.full_like(taught[..., 0], 1.0 / len(taught))

    def factor(self, num_teachers: int) -> float:
        """What the whole loss is multiplied by."""
        return 1.0

    def per_sample(self, logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        return self.learn(logits, target, teacher, _softened(teacher, self.temperature))

    def learn(self, logits: Tensor, target: Tensor, teacher: Tensor, taught: Tensor) -> Tensor:
        """:meth:`per_sample` where the student learns ``taught`` in place of what the teachers say."""
        student = _softened(logits, self.temperature)
        divergence = self.temperature**2 * kl(taught, student)  # [T, B]
        with torch.no_grad():
            one = len(teacher) == 1  # the published weights of one teacher are 0 / 0
            weight = (
                torch.ones_like(divergence)
                if one
                else self.weights(student, target, teacher, taught)
            )
        self.stats |= {f"weight_{k}": w.mean() for k, w in enumerate(weight)}
        return self.factor(len(teacher)) * (weight * divergence).sum(0)


@register_loss("aver")
class AVER(KD):
    """Average of teachers, L = (1/K) Σ_k T² KL(softmax(z_k / T) ‖ softmax(z / T)): KD by its name in tables of several.

    Source: the baseline AVER of Zhang et al., CA-MKD, ICASSP 2022 (arXiv 2201.00007).

    Args:
        temperature: T of teachers and student.
    """


class _Doubting(KD):
    """w_k = (1 - d_k) / (K - 1), d_k the share of teacher k in what is doubtful about all of them: Σ_k d_k = 1."""

    def __init__(self, temperature: float = 4.0, scale: str = "paper", **base: Any) -> None:
        super().__init__(temperature, **base)
        if scale not in SCALE:
            raise ValueError(f"scale={scale!r}: expected one of {SCALE}")
        self.scale = scale

    def doubt(self, target: Tensor, teacher: Tensor) -> Tensor:
        """d [T, B]."""
        raise NotImplementedError

    def weights(self, student: Tensor, target: Tensor, teacher: Tensor, taught: Tensor) -> Tensor:
        return (1.0 - self.doubt(target, teacher)) / (len(teacher) - 1)


@register_loss("ebkd")
class EBKD(_Doubting):
    """Entropy-based KD, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)), w_k = (1 - H_k / Σ_j H_j) / (K - 1).

    Per sample, the surer a teacher is the more it counts, right or wrong. H_k is the entropy of softmax(z_k), at T = 1.

    Source: Kwon et al., "Adaptive knowledge distillation based on entropy", ICASSP 2020, as the baseline of CA-MKD's code;
    the paper itself could not be confirmed.
    Differs: the weights there sum to K - 1 and the loss is a mean over samples and teachers, (K - 1)/K of this one:
    ``scale="code"``. Their entropy is NaN where a probability underflows, their weights where all teachers are certain; here
    0 log 0 = 0, and teachers without doubt count alike. One teacher has weight 1, where the code would teach nothing.

    Args:
        temperature: T of teachers and student, not of the weights.
        scale: ``"paper"``: weights that sum to 1; ``"code"``: times (K - 1)/K.
    """

    def doubt(self, target: Tensor, teacher: Tensor) -> Tensor:
        doubt = entropy(torch.log_softmax(teacher, dim=-1))
        total = doubt.sum(0)
        return torch.where(
            total > 0, doubt / torch.where(total > 0, total, 1.0), 1.0 / len(teacher)
        )

    def factor(self, num_teachers: int) -> float:
        return 1.0 - 1.0 / num_teachers if self.scale == "code" and num_teachers > 1 else 1.0


@register_loss("camkd")
class CAMKD(_Doubting):
    """CA-MKD on logits, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)), w_k = (1 - softmax_k(H(q, p_k))) / (K - 1).

    Per sample, the better a teacher knows the label the more it counts: H(q, p_k) is its cross-entropy, at T = 1. The paper's
    objective is ``CE() + CAMKD() + 50 * CAMKDFeatures(...)``.

    Source: Zhang et al., "Confidence-aware multi-teacher knowledge distillation", ICASSP 2022 (arXiv 2201.00007).
    Differs: the paper's term, from its prose and from memory, has the cross-entropy at temperature T in place of T² KL: the
    gradient of ``1 / T**2 * CAMKD()``. The authors' code has T² KL, as here, which makes one teacher KD and equal ones AVER,
    and divides by K once more: ``scale="code"``. Their weights 1 and 50 were tuned with that. For one teacher it gives NaN;
    here the weight is 1.

    Args:
        temperature: T of teachers and student, not of the weights.
        scale: ``"paper"``: weights that sum to 1; ``"code"``: times 1/K.

    >>> loss, teachers = CAMKD(), torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]])  # both sure, the second one wrong
    >>> _ = loss(torch.zeros(1, 2), torch.tensor([0]), teacher=teachers)
    >>> loss.stats
    {'weight_0': tensor(0.9999), 'weight_1': tensor(0.0001)}
    """

    def doubt(self, target: Tensor, teacher: Tensor) -> Tensor:
        return torch.softmax(cross_entropy(torch.log_softmax(teacher, dim=-1), target), dim=0)

    def factor(self, num_teachers: int) -> float:
        return 1.0 / num_teachers if self.scale == "code" else 1.0


@register_loss("aekd")
class AEKD(KD):
    """Adaptive ensemble KD, L = Σ_k w_k KD_k, w = argmin ‖Σ_k w_k d_k‖² with Σ_k w_k = 1 and 0 <= w_k <= cap.

    KD_k = T² KL(softmax(z_k / T) ‖ softmax(z / T)) and d_k is the batch mean of its gradient by the student's logits,
    T (softmax(z / T) - softmax(z_k / T)): the shortest mixture is a direction that all teachers agree on. The weights are one
    set for the batch of this process, constants, and exact for any size of the gradients. Keep K at 6 or below.

    Source: Du et al., "Agree to disagree: adaptive ensemble knowledge distillation in gradient space", NeurIPS 2020, the form
    on logits, after the authors' code; the paper's text could not be confirmed.
    Differs: there a one-class SVM solves the same problem, to an absolute tolerance that small gradients fall below. Where K
    weights of at most ``cap`` cannot sum to 1, the cap is 1/K (theirs too): equal weights, as of equal teachers.

    Args:
        temperature: T of teachers and student.
        cap: the largest weight, in (0, 1]; 1 is no bound. 0.6 in the code, with weights 1 / 0.9 on cross-entropy / AEKD.
    """

    def __init__(self, temperature: float = 4.0, cap: float = 0.6, **base: Any) -> None:
        super().__init__(temperature, **base)
        if not 0.0 < cap <= 1.0:
            raise ValueError(
                f"cap={cap}: expected the largest weight of a teacher, in (0, 1]; 1 is no bound"
            )
        self.cap = float(cap)

    def weights(self, student: Tensor, target: Tensor, teacher: Tensor, taught: Tensor) -> Tensor:
        d = (
            (student.exp() - taught.exp()).mean(1).double()
        )  # [T, C], without the factor T; double: no TF32 below
        weight = simplex_qp(d @ d.T, max(self.cap, 1.0 / len(taught))).to(taught.dtype)
        return weight[:, None].expand(taught.shape[:2])


@register_loss("label_revision")
class LabelRevision(Loss):
    """Label Revision: any KD term on p' = b p + (1 - b) q in place of each teacher's p, b = eta / (p_max - p_y + 1).

    p = softmax(z_k / T), and p' is what the student learns: in it the label's class leads by 1 - eta at least, and by just
    that where the teacher was wrong. ``term`` says how teachers are weighed: by what they said themselves in EBKD and CA-MKD
    (revised, all would know the label), by the gradients of the revised terms in AEKD.

    Where the teacher is right, b = eta: also a good teacher is mixed with the label, unless p = q or ``apply_to="wrong"``. A
    teacher is wrong where its largest class is not the target's. For targets that are distributions p_y = Σ_c q_c p_c; the
    lead is a promise for hard labels only.

    Source: Lan et al., "Improve knowledge distillation via label revision and data selection", IEEE TCDS 2025
    (arXiv 2404.03693), its p' and b.
    Unsaid there, as far as the text could be read: eta; the temperature of p (here T, as in the term); whether teachers that
    are right are revised (the formula is for all of them).

    Args:
        term: ``KD``, ``AVER``, ``EBKD``, ``AEKD`` or ``CAMKD``; None is ``KD(temperature)``.
        eta: in (0, 1); towards 1 p is revised just enough, towards 0 p' is the label.
        temperature: T, where no term brings its own; None is 4.
        apply_to: ``"all"``, or ``"wrong"`` for the teachers' wrong answers only.

    ``stats["revised"]`` is the share of the teachers' answers that were wrong.

    >>> p = torch.tensor([[[0.6, 0.3, 0.1]]])
    >>> LabelRevision(eta=0.9).revise(p.log(), torch.tensor([[0.0, 1.0, 0.0]])).exp()  # b = 0.9 / 1.3
    tensor([[[0.4154, 0.5154, 0.0692]]])
    """

    def __init__(
        self,
        term: KD | None = None,
        eta: float = 0.8,
        temperature: float | None = None,
        apply_to: str = "all",
        **base: Any,
    ) -> None:
        term = KD(4.0 if temperature is None else temperature) if term is None else term
        if not isinstance(term, KD):
            raise TypeError(
                f"term={term!r}: expected KD, AVER, EBKD, AEKD or CAMKD; put other losses beside this one"
            )
        super().__init__(**{"num_classes": term.num_classes, "reduction": term.reduction} | base)
        if temperature not in (None, term.temperature):
            raise ValueError(
                f"temperature={temperature}: {term!r} has its own, and this one would be ignored"
            )
        if not 0.0 < eta < 1.0:
            raise ValueError(
                f"eta={eta}: expected a number in (0, 1); at 1 the label's class no longer leads"
            )
        if apply_to not in APPLY_TO:
            raise ValueError(f"apply_to={apply_to!r}: expected one of {APPLY_TO}")
        self.term, self.eta, self.apply_to = term, float(eta), apply_to

    def revise(self, log_p: Tensor, target: Tensor) -> Tensor:
        """log p' [T, B, C] of log p [T, B, C] and distributions [B, C]."""
        p = log_p.exp()
        b = (self.eta / (p.amax(-1) - (p * target).sum(-1) + 1.0)).unsqueeze(-1)
        revised = (b * p + (1.0 - b) * target).log()
        wrong = p.argmax(-1) != target.argmax(-1)  # [T, B]
        self.stats["revised"] = wrong.to(p.dtype).mean()
        return (
            revised if self.apply_to == "all" else torch.where(wrong.unsqueeze(-1), revised, log_p)
        )

    def per_sample(self, logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        self.term.stats = {}
        taught = self.revise(_softened(teacher, self.term.temperature), target)
        loss = self.term.learn(logits, target, teacher, taught)
        self.stats |= self.term.stats
        return loss


class _TeacherFree(Loss):
    """L = (1 - alpha) H(q, p) + alpha · multiplier · KL, the KL divided by C with ``kl_reduction="mean"``."""

    def __init__(
        self, alpha: float, temperature: float, multiplier: float, kl_reduction: str, **base: Any
    ) -> None:
        super().__init__(**base)
        if kl_reduction not in KL_REDUCTION:
            raise ValueError(f"kl_reduction={kl_reduction!r}: expected one of {KL_REDUCTION}")
        self.alpha, self.temperature = _share("alpha", alpha), _temperature(temperature)
        self.multiplier, self.kl_reduction = multiplier, kl_reduction

    def _mix(self, log_p: Tensor, target: Tensor, divergence: Tensor) -> Tensor:
        if self.kl_reduction == "mean":
            divergence = divergence / log_p.shape[-1]
        self.stats["kl"] = divergence.detach().mean()
        return (1.0 - self.alpha) * cross_entropy(
            log_p, target
        ) + self.alpha * self.multiplier * divergence


@register_loss("tf_kd_reg")
class TfKDReg(_TeacherFree):
    """Tf-KD by a virtual teacher, L = (1 - alpha) H(q, p) + alpha m KL(softmax(p_d / T) ‖ p), p_d = 0.99 on the label.

    The virtual teacher is always right: p_d is ``correct`` on the label and (1 - correct) / (C - 1) elsewhere, mixed by the
    target's weights where it is a distribution. Softened by a high T it is nearly uniform.

    Source: Yuan et al., "Revisiting knowledge distillation via label smoothing regularization", CVPR 2020, Tf-KD-reg.
    Differs: the default is the authors' code, which made the published numbers: a softmax of the probabilities p_d / T, the
    student at T = 1, no factor T². The equation, from memory of the paper, is ``virtual="direct"``: KL(p_d^T ‖ p^T) with both
    distributions at temperature T, p^T = p^(1/T) normalised; at T = 1 it is label smoothing.
    Their KL is a mean over samples and classes, 1/C of ours, which is why their multipliers are large: ResNet-18 on CIFAR-100
    (alpha 0.1, T 20, multiplier 100, ``kl_reduction="mean"``) is the default here. Further settings of theirs, all with "mean":
    MobileNetV2 0.95, 40, 1; ShuffleNetV2 0.95, 10, 1; GoogLeNet 0.1, 40, 50.

    Args:
        alpha: weight of the virtual teacher, in [0, 1].
        temperature: T.
        multiplier: m, on the KL alone.
        correct: what p_d puts on the label.
        virtual: ``"softmaxed"`` or ``"direct"``.
        kl_reduction: ``"batchmean"``, or ``"mean"`` for KL / C.

    >>> TfKDReg(alpha=1.0, temperature=1e6)(torch.zeros(1, 4), torch.tensor([0])).abs() < 1e-6  # a uniform teacher
    tensor(True)
    """

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: float = 20.0,
        multiplier: float = 1.0,
        correct: float = 0.99,
        virtual: str = "softmaxed",
        kl_reduction: str = "batchmean",
        **base: Any,
    ) -> None:
        super().__init__(alpha, temperature, multiplier, kl_reduction, **base)
        if not 0.0 < correct <= 1.0:
            raise ValueError(
                f"correct={correct}: expected the teacher's probability of the label, in (0, 1]"
            )
        if virtual not in VIRTUAL:
            raise ValueError(f"virtual={virtual!r}: expected one of {VIRTUAL}")
        self.correct, self.virtual = float(correct), virtual

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = student = Prediction.of(logits).log_p
        teacher = self.correct * target + (1.0 - self.correct) / (logits.shape[-1] - 1) * (
            1.0 - target
        )  # p_d
        if self.virtual == "direct":
            teacher, student = teacher.log(), _softened(logits, self.temperature)
        return self._mix(log_p, target, kl(_softened(teacher, self.temperature), student))


@register_loss("tf_kd_self")
class TfKDSelf(_TeacherFree):
    """Tf-KD by itself, L = (1 - alpha) H(q, p) + alpha m T² KL(softmax(z_t / T) ‖ softmax(z / T)), z_t of an earlier self.

    The teacher is the same architecture, trained before in the plain way. Of several teachers it is the mean of their KLs.

    Source: Yuan et al., "Revisiting knowledge distillation via label smoothing regularization", CVPR 2020, Tf-KD-self.
    Differs: the authors' KL is a mean over samples and classes, 1/C of ours: their settings, alpha 0.9 to 0.95, T = 20 and
    multiplier 1 to 100 by architecture, want ``kl_reduction="mean"``.

    Args:
        alpha: weight of the teacher, in [0, 1].
        temperature: T of teacher and student.
        multiplier: m, on the KL alone.
        kl_reduction: ``"batchmean"``, or ``"mean"`` for KL / C.

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> TfKDSelf(alpha=1.0)(z, torch.tensor([0]), teacher=z).abs() < 1e-6
    tensor(True)
    """

    def __init__(
        self,
        alpha: float = 0.9,
        temperature: float = 20.0,
        multiplier: float = 1.0,
        kl_reduction: str = "batchmean",
        **base: Any,
    ) -> None:
        super().__init__(alpha, temperature, multiplier, kl_reduction, **base)

    def per_sample(self, logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        t = self.temperature
        divergence = kl(_softened(teacher, t), _softened(logits, t)).mean(0)  # [T, B] -> [B]
        return self._mix(Prediction.of(logits).log_p, target, t * t * divergence)
