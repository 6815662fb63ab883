"""Label modification: losses H(q~, p) whose target q~ mixes the given label with a smoother one.

Every class writes :meth:`Refined.refine`. In a ``Mutual`` loss, q~ is also what a peer teaches.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .functional import Prediction, as_probs
from .registry import register_loss


class Refined(Loss):
    """L = mean H(q~, p) with q~ = refine(prediction, target). A subclass writes :meth:`refine`.

    Attributes:
        detach: q~ is a constant; no gradient runs through the prediction inside it.
    """

    detach = True
    any_precision = True
    weighs_labels = True

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        """q~ [B, C] of a prediction and distributions [B, C]; its rows sum to 1."""
        raise NotImplementedError

    def label(self, pred: Prediction, constant: Prediction, target: Tensor) -> Tensor:
        """q~ of a prediction, or of the same prediction without gradient if ``detach``."""
        self.logged = {}
        return self.refine(constant if self.detach else pred, target.to(pred.log_p.dtype))

    def cost(self, pred: Prediction, label: Tensor) -> Tensor:
        """H(q~, p) per sample [B]; with class weights w, -Σ_c w_c q~_c log p_c."""
        if self.class_weights is not None:
            label = label * self.class_weights.to(label.dtype)
        return pred.cost(label)

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        pred = Prediction.of(logits)
        return self.cost(pred, self.label(pred, pred.constant(), target))


def _eps(value: float) -> float:
    return validate.fraction("eps", value, "it is the weight of what is mixed into the label")


@register_loss("ce")
class CE(Refined):
    """Cross-entropy L = H(q, p) with the label as it is given, as ``nn.CrossEntropyLoss``.

    Args:
        label_smoothing: as :class:`LabelSmoothing`.

    References:
        The baseline of every table.

    Notes:
        ``nn.CrossEntropyLoss`` divides a mean with class weights by the weights of the batch for
        class indices, and by B for distributions. Here it is the weights of the batch for both, so
        that one-hot rows and indices give the same. There is no ``ignore_index``: leave these
        samples out, ``keep = target != -100; loss(logits[keep], target[keep])``.

    >>> import torch
    >>> CE()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """

    def __init__(self, label_smoothing: float = 0.0, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        why = "it is the weight of the uniform distribution"
        self.label_smoothing = validate.fraction("label_smoothing", label_smoothing, why)

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        smoothed = self.label_smoothing
        return _smooth(target, smoothed) if smoothed else target


@register_loss("label_smoothing")
class LabelSmoothing(Refined):
    """Label smoothing, q~ = (1 - eps) q + eps u with u = 1/C everywhere.

    With eps < 0 it is negative label smoothing (NLS). Negative smoothing has no lower bound: on
    sure rows it falls without end. Do not start with it; the authors train 120 epochs with
    cross-entropy and 100 with eps < 0 at a learning rate of 1e-6.

    Args:
        eps: weight of the uniform part, at most 1. Szegedy has 0.1; SMKD and ProSelfLC search
            0.125, 0.25 and 0.5; NLS searches 0.8 to -8, the noisier the more negative.

    References:
        Szegedy et al., "Rethinking the Inception architecture for computer vision", CVPR 2016,
        section 7; in the form of ProSelfLC (Wang et al., CVPR 2021). For eps < 0, Wei et al., "To
        smooth or not? When label smoothing meets noisy labels", ICML 2022.

    Notes:
        Tf-KD's "label smoothing" puts eps/(C-1) on the other classes only.

    >>> import torch
    >>> label = torch.tensor([[0.0, 1.0, 0.0]])
    >>> LabelSmoothing(eps=0.3).refine(Prediction.of(torch.zeros(1, 3)), label)
    tensor([[0.1000, 0.8000, 0.1000]])
    """

    def __init__(self, eps: float = 0.1, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        small, why = validate.number("eps", eps) <= 1, "above 1 the label would count negatively"
        self.eps = validate.check(small, "eps", eps, "a number of at most 1", why)

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        return _smooth(target, self.eps)


def _smooth(target: Tensor, eps: float) -> Tensor:
    return (1.0 - eps) * target + eps / target.shape[-1]


@register_loss("confidence_penalty")
class ConfidencePenalty(Refined):
    """Confidence penalty, L = (1 - eps) H(q, p) - eps H(p), or q~ = (1 - eps) q - eps p.

    The entropy term is the method, so its gradient is always kept. What a peer teaches is a
    constant all the same.

    Args:
        eps: weight of the entropy, in [0, 1].

    References:
        Pereyra et al., "Regularizing neural networks by penalizing confident output
        distributions", 2017 (arXiv 1701.06548), in the (1 - eps) form of ProSelfLC (Wang et al.,
        CVPR 2021).

    Notes:
        Pereyra's own form is H(q, p) - beta H(p). It is the same up to a factor, with
        beta = eps / (1 - eps). On a uniform batch the lower bound is -eps ln C. q~ has negative
        entries, and its rows sum to 1 - 2 eps.

    >>> import torch
    >>> ConfidencePenalty(eps=0.5)(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.)
    """

    detach = False

    def __init__(self, eps: float = 0.1, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.eps = _eps(eps)

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        return (1.0 - self.eps) * target - self.eps * pred.p


@register_loss("boot_soft")
class BootSoft(Refined):
    """Soft bootstrapping, q~ = (1 - eps) q + eps p.

    Args:
        eps: weight of the prediction, in [0, 1]; 1 - 0.95 in the paper.
        detach: q~ is a constant.

    References:
        Reed et al., "Training deep neural networks on noisy labels with bootstrapping", ICLR 2015
        workshop, soft bootstrapping. Their beta weighs the label and is 1 - eps here.

    Notes:
        The paper does not say whether the gradient runs through q~. By default it does (their
        "minimum entropy regularisation"). With ``detach=True`` q~ is a constant, as what a peer
        teaches always is.

    >>> import torch
    >>> label = torch.tensor([[1.0, 0.0]])
    >>> BootSoft(eps=0.5).refine(Prediction.of(torch.zeros(1, 2)), label)
    tensor([[0.7500, 0.2500]])
    """

    def __init__(
        self, eps: float = 0.05, detach: bool = False, **base: Unpack[LossArguments]
    ) -> None:
        super().__init__(**base)
        self.eps, self.detach = _eps(eps), detach

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        return target.lerp(pred.p, self.eps)


@register_loss("boot_hard")
class BootHard(Refined):
    """Hard bootstrapping, q~ = (1 - eps) q + eps onehot(argmax p). The target carries no gradient.

    Args:
        eps: weight of the predicted class, in [0, 1]; 1 - 0.8 in the paper.

    References:
        Reed et al., "Training deep neural networks on noisy labels with bootstrapping", ICLR 2015
        workshop, hard bootstrapping. Their beta weighs the label and is 1 - eps here.

    >>> import torch
    >>> label = torch.tensor([[1.0, 0.0]])
    >>> BootHard(eps=0.25).refine(Prediction.of(torch.tensor([[0.0, 3.0]])), label)
    tensor([[0.7500, 0.2500]])
    """

    def __init__(self, eps: float = 0.2, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.eps = _eps(eps)

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        predicted = as_probs(pred.log_p.argmax(-1), target.shape[-1], target.dtype)
        return target.lerp(predicted, self.eps)
