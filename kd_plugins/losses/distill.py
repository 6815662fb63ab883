"""Distillation from the logits of one teacher or several, as they are or corrected by the label."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .functional import cross_entropy, entropy, kl, log_softmax, simplex_qp, standardized
from .registry import register_loss

SCALES = ("paper", "code")
APPLY_TO = ("all", "wrong")


@register_loss("kd")
class KD(Loss):
    """Knowledge distillation, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)), w_k = 1/K.

    This is the term alone; ``0.1 * CE() + 0.9 * KD()`` is a whole objective. T² keeps the size of
    the gradient as T changes. With several teachers k it is AVER. A loss with other weights writes
    :meth:`weights`; one that compares otherwise writes :meth:`divergence`.

    Args:
        temperature: T of teachers and student. CA-MKD and CRD's comparison use 4, with weights
            1 / 1 and 0.1 / 0.9 on cross-entropy / KD.
        standardize: Sun et al.'s logit standardisation: each row of logits, of teachers and
            student, is shifted to mean 0 and scaled to deviation 1 before it is divided by T. Their
            usual setting is T = 2 with weights 0.1 / 9.

    References:
        Hinton et al., "Distilling the knowledge in a neural network", 2015 (arXiv 1503.02531).
        Sun et al., "Logit standardization in knowledge distillation", CVPR 2024 (arXiv 2403.01427).

    Notes:
        Standardised, the term does not see the size of the student's logits; only cross-entropy
        sets it, so keep a small weight on that. The gradient grows as the deviation of a row falls,
        and two classes have none. As in the authors' code the deviation is that of C - 1 degrees of
        freedom plus 1e-7, and the gradient passes through it. A row of equal logits has no
        gradient; in the code it is of the order of 1e7.

    >>> z = torch.tensor([[2.0, 0.0, -1.0]])
    >>> KD()(z, torch.tensor([0]), teacher=z)
    tensor(0.)
    """

    revisable = True  # whether LabelRevision changes what the student learns

    def __init__(
        self,
        temperature: float = 4.0,
        standardize: bool = False,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(**base)
        self.temperature = validate.positive("temperature", temperature, "logits are divided by it")
        self.standardize = standardize

    def soften(self, logits: Tensor) -> Tensor:
        """log softmax(z / T) of logits [..., C], standardised first if asked."""
        logits = standardized(logits) if self.standardize else logits
        return log_softmax(logits / self.temperature)

    def divergence(self, student: Tensor, target: Tensor, lesson: Tensor) -> Tensor:
        """What a student pays per teacher and sample [T, B]; arguments as in :meth:`weights`."""
        return self.temperature**2 * kl(lesson, student)

    def weights(self, student: Tensor, target: Tensor, teacher: Tensor, lesson: Tensor) -> Tensor:
        """w [T, B] of two teachers or more, with sum 1 over T; always taken as constants.

        Args:
            student: log softmax(z / T) [B, C].
            target: distributions [B, C].
            teacher: logits [T, B, C].
            lesson: log-probabilities [T, B, C] at temperature T that the student learns: those of
                the teachers, or revised.
        """
        return torch.full_like(lesson[..., 0], 1.0 / len(lesson))

    def factor(self, num_teachers: int) -> float:
        """A factor on the whole loss."""
        return 1.0

    def per_sample(self, logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        return self.learn(logits, target, teacher, self.soften(teacher))

    def learn(self, logits: Tensor, target: Tensor, teacher: Tensor, lesson: Tensor) -> Tensor:
        """:meth:`per_sample`, where the student learns ``lesson`` instead of the teachers."""
        student = self.soften(logits)
        divergence = self.divergence(student, target, lesson)
        weight = torch.ones_like(divergence)  # of one teacher; the published weights are 0 / 0
        if len(teacher) > 1:
            with torch.no_grad():
                weight = self.weights(student, target, teacher, lesson)
        for k, w in enumerate(weight):
            self.log(f"weight_{k}", w)
        return self.factor(len(teacher)) * (weight * divergence).sum(0)


@register_loss("aver")
class AVER(KD):
    """Average of teachers, L = (1/K) Σ_k T² KL(softmax(z_k / T) ‖ softmax(z / T)).

    It is :class:`KD` under the name that tables of several teachers use.

    Args:
        temperature: T of teachers and student.
        standardize: as in :class:`KD`.

    References:
        Zhang et al., CA-MKD, ICASSP 2022 (arXiv 2201.00007), the baseline AVER.
    """


class _Doubting(KD):
    """w_k = (1 - d_k) / (K - 1), where d_k is teacher k's share of the doubt, Σ_k d_k = 1."""

    def __init__(
        self,
        temperature: float = 4.0,
        scale: str = "paper",
        standardize: bool = False,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(temperature, standardize, **base)
        self.scale = validate.one_of("scale", scale, SCALES)

    def doubt(self, target: Tensor, teacher: Tensor) -> Tensor:
        """d [T, B]."""
        raise NotImplementedError

    def weights(self, student: Tensor, target: Tensor, teacher: Tensor, lesson: Tensor) -> Tensor:
        return (1.0 - self.doubt(target, teacher)) / (len(teacher) - 1)


@register_loss("ebkd")
class EBKD(_Doubting):
    """Entropy-based KD, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)).

    The weights are w_k = (1 - H_k / Σ_j H_j) / (K - 1), with H_k the entropy of softmax(z_k) at
    T = 1. Per sample, a teacher counts the more the surer it is, right or wrong.

    Args:
        temperature: T of teachers and student, not of the weights.
        scale: ``"paper"``: weights with sum 1; ``"code"``: times (K - 1)/K.
        standardize: as in :class:`KD`; the weights stay as they are.

    References:
        Kwon et al., "Adaptive knowledge distillation based on entropy", ICASSP 2020, as the
        baseline of CA-MKD's code. The paper's equation could not be read (docs/unconfirmed.md).

    Notes:
        In the code the weights sum to K - 1 and the loss is a mean over samples and teachers, which
        is (K - 1)/K of this one: ``scale="code"``. Its entropy is NaN where a probability
        underflows, and its weights are NaN where all teachers are certain; here 0 log 0 = 0, and
        teachers without doubt count alike. One teacher has weight 1; in the code it teaches
        nothing.
    """

    def doubt(self, target: Tensor, teacher: Tensor) -> Tensor:
        doubt = entropy(log_softmax(teacher))
        total = doubt.sum(0)
        known = total > 0
        return torch.where(known, doubt / torch.where(known, total, 1.0), 1.0 / len(teacher))

    def factor(self, num_teachers: int) -> float:
        return 1.0 - 1.0 / num_teachers if self.scale == "code" and num_teachers > 1 else 1.0


@register_loss("camkd")
class CAMKD(_Doubting):
    """CA-MKD on logits, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)).

    The weights are w_k = (1 - softmax_k(H(q, p_k))) / (K - 1), with H(q, p_k) teacher k's
    cross-entropy at T = 1. Per sample, a teacher counts the more the better it knows the label. The
    paper's objective is ``CE() + CAMKD() + 50 * CAMKDFeatures(heads=...)``.

    Args:
        temperature: T of teachers and student, not of the weights.
        scale: ``"paper"``: weights with sum 1; ``"code"``: times 1/K.
        standardize: as in :class:`KD`; the weights stay as they are.

    References:
        Zhang et al., "Confidence-aware multi-teacher knowledge distillation", ICASSP 2022
        (arXiv 2201.00007).

    Notes:
        The authors' code has T² KL, as here: one teacher is then KD, and equal teachers are AVER.
        It divides by K once more: ``scale="code"``; the authors tuned their weights 1 and 50 with
        that. One teacher makes it NaN; here the weight is 1. The paper's term seems to be a
        cross-entropy at temperature T, which has the gradient of ``1 / T**2 * CAMKD()``; the
        equation could not be read (docs/unconfirmed.md).

    >>> teachers = torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]])  # both are sure, the second is wrong
    >>> loss = CAMKD()
    >>> _ = loss(torch.zeros(1, 2), torch.tensor([0]), teacher=teachers)
    >>> loss.stats
    {'weight_0': tensor(0.9999), 'weight_1': tensor(0.0001)}
    """

    def doubt(self, target: Tensor, teacher: Tensor) -> Tensor:
        return torch.softmax(cross_entropy(log_softmax(teacher), target), dim=0)

    def factor(self, num_teachers: int) -> float:
        return 1.0 / num_teachers if self.scale == "code" else 1.0


@register_loss("aekd")
class AEKD(KD):
    """Adaptive ensemble KD, L = Σ_k w_k T² KL(softmax(z_k / T) ‖ softmax(z / T)).

    The weights are w = argmin ‖Σ_k w_k d_k‖² with Σ_k w_k = 1 and 0 <= w_k <= cap. d_k is the batch
    mean of the gradient of teacher k's term by the student's logits,
    T (softmax(z / T) - softmax(z_k / T)): the shortest mixture is a direction on which all teachers
    agree. The weights are constants, one set for the batch of this process, and exact for gradients
    of any size. Keep K at 6 or below.

    Args:
        temperature: T of teachers and student.
        cap: the largest weight, in (0, 1]; 1 is no bound. The authors' code has 0.6, with weights
            1 / 0.9 on cross-entropy / AEKD.
        standardize: as in :class:`KD`; d_k is then the gradient by the standardised logits.

    References:
        Du et al., "Agree to disagree: adaptive ensemble knowledge distillation in gradient space",
        NeurIPS 2020, the form on logits in the authors' code. The paper's equations could not be
        read (docs/unconfirmed.md).

    Notes:
        In the code a one-class SVM solves this problem, to an absolute tolerance that small
        gradients fall below. Where K weights of at most ``cap`` cannot sum to 1, the cap is 1/K, as
        in the code: all weights are equal. Equal teachers have equal weights.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        cap: float = 0.6,
        standardize: bool = False,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(temperature, standardize, **base)
        self.cap = validate.fraction("cap", cap, "the largest weight", with_zero=False)

    def weights(self, student: Tensor, target: Tensor, teacher: Tensor, lesson: Tensor) -> Tensor:
        # [T, C] without the factor T; in double, since matrix products in float32 may use TF32
        d = (student.exp() - lesson.exp()).mean(1).double()
        weight = simplex_qp(d @ d.T, max(self.cap, 1.0 / len(lesson))).to(lesson.dtype)
        return weight[:, None].expand(lesson.shape[:2])


@register_loss("label_revision")
class LabelRevision(Loss):
    """Label Revision: a KD term on p' = b p + (1 - b) q instead of each teacher's p.

    Here p = softmax(z_k / T), as the term softens it, and b = eta / (p_max - p_y + 1). In p', which
    the student learns, the label's class leads by at least 1 - eta, and by exactly that where the
    teacher is wrong. A teacher is wrong where its largest class is not the target's. Where it is
    right, b = eta: it is mixed with the label as well, unless ``apply_to="wrong"``. For targets
    that are distributions p_y = Σ_c q_c p_c; the lead is promised for hard labels only.

    ``term`` weighs the teachers, and compares. EBKD and CA-MKD weigh them by their own output,
    since revised all of them would know the label; AEKD weighs them by the gradients of the revised
    terms. ``stats["revised"]`` is the share of the teachers' answers that were wrong.

    Args:
        term: any loss on the teachers' logits that derives from ``KD``: ``AVER``, ``EBKD``,
            ``AEKD``, ``CAMKD``, ``DKD``, ``DIST``, ``WTTM``; None is ``KD(temperature)``. ``NKD``
            compares the shares of the other classes, which a revision leaves as they are.
        eta: in (0, 1); towards 1, p is revised just enough; towards 0, p' is the label.
        temperature: T, if ``term`` is None; None is 4.
        apply_to: ``"all"``, or ``"wrong"`` for the teachers' wrong answers only.

    References:
        Lan et al., "Improve knowledge distillation via label revision and data selection", IEEE
        TCDS 2025 (arXiv 2404.03693), its p' and b.

    Notes:
        As far as the text could be read it does not give eta, the temperature of p (here T, as in
        the term), or whether teachers that are right are revised (the formula is for all).

    >>> p = torch.tensor([[[0.6, 0.3, 0.1]]])
    >>> loss = LabelRevision(eta=0.9)
    >>> loss.revise(p.log(), torch.tensor([[0.0, 1.0, 0.0]])).exp()  # b = 0.9 / 1.3
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
                f"term={term!r}: expected KD, AVER, EBKD, AEKD, CAMKD, DKD, DIST or WTTM; "
                "add other losses to it"
            )
        if not term.revisable:
            raise ValueError(
                f"term={term!r}: expected another term, such as KD or DKD. This one compares the "
                "shares of the classes that are not the label's, and a revision leaves them as "
                "they are: it would change nothing"
            )
        own = {"reduction": term.reduction, "weight": term.class_weights}
        super().__init__(**{"num_classes": term.num_classes} | own | base)
        if temperature not in (None, term.temperature):
            raise ValueError(
                f"temperature={temperature}: {term!r} has its own, and this one would be ignored"
            )
        lead = "at 1 the label's class no longer leads"
        self.eta = validate.fraction("eta", eta, lead, with_zero=False, with_one=False)
        self.term, self.apply_to = term, validate.one_of("apply_to", apply_to, APPLY_TO)

    def revise(self, log_p: Tensor, target: Tensor) -> Tensor:
        """log p' [T, B, C] of log p [T, B, C] and distributions [B, C]."""
        p = log_p.exp()
        b = (self.eta / (p.amax(-1) - (p * target).sum(-1) + 1.0)).unsqueeze(-1)
        revised = (b * p + (1.0 - b) * target).log()
        wrong = p.argmax(-1) != target.argmax(-1)  # [T, B]
        self.log("revised", wrong)
        if self.apply_to == "all":
            return revised
        return torch.where(wrong.unsqueeze(-1), revised, log_p)

    def per_sample(self, logits: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        lesson = self.revise(self.term.soften(teacher), target)
        self.term.logged = {}
        loss = self.term.learn(logits, target, teacher, lesson)
        self.collect(self.term)
        return loss
