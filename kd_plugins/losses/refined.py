"""Label modification: losses H(q~, p) whose target q~ mixes the given label q with something smoother.

Every class writes :meth:`Refined.refine`. In a ``Mutual`` loss, q~ is also what a peer teaches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from . import validate
from .base import Loss, LossArguments, Sizes
from .functional import Prediction, as_probs, logistic
from .registry import register_loss
from .state import Progress, RunningMean, eval_mode, sum_over_ranks

WINDOW = 10_000  # samples, for MyLC without a window in a loop that does not bind


class Refined(Loss):
    """L = mean H(q~, p) with q~ = refine(prediction, target). A subclass writes :meth:`refine`.

    Attributes:
        detach: q~ is a constant; no gradient runs through the prediction inside it.
    """

    detach = True
    any_precision = True
    weighs_labels = True

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        """The refined label q~ [B, C] of a prediction and distributions [B, C]; its rows sum to 1."""
        raise NotImplementedError

    def label(self, pred: Prediction, constant: Prediction, target: Tensor) -> Tensor:
        """q~ of a prediction, or of the same prediction without gradient if ``detach``."""
        pred, self.stats = constant if self.detach else pred, {}
        return self.refine(pred, target.to(pred.log_p.dtype))

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

    Source: the baseline of every table.
    Differs: ``nn.CrossEntropyLoss`` divides a mean with class weights by the weights of the batch
    for class indices, and by B for distributions. Here it is the weights of the batch for both, so
    that one-hot rows and indices give the same. There is no ``ignore_index``.

    Args:
        label_smoothing: as :class:`LabelSmoothing`.

    >>> CE()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """

    def __init__(self, label_smoothing: float = 0.0, **base: Unpack[LossArguments]) -> None:
        if "ignore_index" in base:
            raise TypeError(
                "CE has no argument 'ignore_index': MaskedLoss(mask, CE()) leaves out samples, and "
                "rows without a label are best removed from the data set"
            )
        super().__init__(**base)
        why = "it is the weight of the uniform distribution"
        self.label_smoothing = validate.fraction("label_smoothing", label_smoothing, why)

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        smoothed = self.label_smoothing
        return _smooth(target, smoothed) if smoothed else target


@register_loss("label_smoothing")
class LabelSmoothing(Refined):
    """Label smoothing, q~ = (1 - eps) q + eps u with u = 1/C everywhere; eps < 0 is negative smoothing.

    Negative smoothing has no lower bound: on sure rows it falls without end. Do not start with it;
    the authors train 120 epochs with cross-entropy and 100 with eps < 0 at a learning rate of 1e-6.

    Source: Szegedy et al., CVPR 2016, section 7; in the form of ProSelfLC (Wang et al., CVPR 2021).
    eps < 0: Wei et al., "To smooth or not? When label smoothing meets noisy labels", ICML 2022.
    Differs: Tf-KD's "label smoothing" puts eps/(C-1) on the other classes only.

    Args:
        eps: weight of the uniform part, at most 1. Szegedy has 0.1; SMKD and ProSelfLC search
            0.125, 0.25 and 0.5; NLS searches 0.8 to -8, the noisier the more negative.

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

    Source: Pereyra et al., 2017 (arXiv 1701.06548), in the (1 - eps) form of ProSelfLC (Wang et
    al., CVPR 2021).
    Differs: Pereyra's own form is H(q, p) - beta H(p). It is the same up to a factor, with
    beta = eps / (1 - eps).
    Unsaid there: on a uniform batch the lower bound is -eps ln C. q~ has negative entries, and its
    rows sum to 1 - 2 eps.

    Args:
        eps: weight of the entropy, in [0, 1].

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

    Source: Reed et al., ICLR 2015 workshop, soft bootstrapping. Their beta = 0.95 weighs the label
    and is 1 - eps here.
    Unsaid there: whether the gradient runs through q~. By default it does (their "minimum entropy
    regularisation"). With ``detach=True`` q~ is a constant, as what a peer teaches always is.

    Args:
        eps: weight of the prediction, in [0, 1].
        detach: q~ is a constant.

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

    Source: Reed et al., ICLR 2015 workshop, hard bootstrapping. Their beta = 0.8 weighs the label
    and is 1 - eps here.

    Args:
        eps: weight of the predicted class, in [0, 1].

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


class _SelfTrust(Refined):
    """q~ = (1 - eps) q + eps p with eps = g l(p) per sample: trust in the model times certainty."""

    def __init__(self, detach: bool = True, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.detach = detach

    def trust(self, certainty: Tensor) -> Tensor:
        """g in [0, 1], 0-d, given l(p) [B]."""
        raise NotImplementedError

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        certainty = pred.certainty.detach()  # eps is a constant, also where q~ is not
        eps = self.trust(certainty).to(certainty.dtype) * certainty
        self.log("eps", eps)
        return target.lerp(pred.p, eps.unsqueeze(-1))


@register_loss("proselflc")
class ProSelfLC(_SelfTrust):
    """ProSelfLC: q~ = (1 - eps) q + eps p, eps = g(t) l(p), l(p) = 1 - H(p) / ln C.

    Trust in the model g(t) = h(t/Γ - shift, b1) grows with the progress of training, so the method
    assumes training from scratch. Needs :meth:`set_progress`.

    Source: Wang et al., ProSelfLC, CVPR 2021, equation 7.
    Differs: the authors' CVPR code does not detach q~ (``detach=False``); their later scripts do,
    as the default here.
    Unsaid there: eps carries no gradient (as in the authors' code).

    Args:
        b1: steepness B of g; 8 to 16 in the paper, smaller for more noise.
        shift: the progress at which g = 0.5.
        detach: q~ is a constant.
    """

    def __init__(
        self,
        b1: float = 10.0,
        shift: float = 0.5,
        detach: bool = True,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(detach, **base)
        self.b1 = validate.number("b1", b1, "it is the steepness of the trust")
        self.shift = validate.number("shift", shift, "it is the progress at which the trust is 0.5")
        self.progress = Progress()

    def trust(self, certainty: Tensor) -> Tensor:
        return logistic(self.progress.get(self) - self.shift, self.b1)


@register_loss("mylc")
class MyLC(_SelfTrust):
    """MyLC: q~ = (1 - eps) q + eps p, eps = g(r) l(p), r = 1 - mean_i H(p_i) / ln C.

    Trust in the model g(r) = h(r - rho, b1) grows with what the model knows: r is its mean
    certainty over the data set. So it also works for a pretrained model, for which :meth:`prime`
    sets r before the first step.

    Source: Li et al., SMKD, IJCNN 2023 (arXiv 2106.01489), where MyLC is defined.
    Unsaid there: when r is measured. Here each batch of training counts before r is read. r is the
    mean over the first ``window`` samples and an exponential mean with that horizon after them,
    over all processes. It stands still in ``eval()`` and under ``no_grad``. b1 is not published;
    10 is the middle of what ProSelfLC searched.

    Args:
        b1: steepness of g; 0 makes g = 0.5.
        rho: the mean certainty at which g = 0.5.
        window: samples over which r is a mean. None is the number of rows of the training data
            (the paper's "all samples") once :meth:`bind` tells it, and 10,000 without it.
        detach: q~ is a constant.

    >>> loss = MyLC()
    >>> loss(torch.zeros(2, 4), torch.tensor([0, 1]))  # the model knows nothing, the label is kept
    tensor(1.3863)
    >>> loss.mean_certainty
    tensor(0.)
    """

    def __init__(
        self,
        b1: float = 10.0,
        rho: float = 0.5,
        window: int | None = None,
        detach: bool = True,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(detach, **base)
        self.b1 = validate.number("b1", b1, "it is the steepness of the trust")
        self.rho = validate.fraction("rho", rho, "it is the mean certainty at which trust is 0.5")
        self.running = RunningMean(WINDOW if window is None else window)
        self._window_open = window is None

    @property
    def window(self) -> int:
        """Samples over which r is a mean."""
        return self.running.window

    @property
    def mean_certainty(self) -> Tensor:
        """r: mean certainty of the predictions over the data set, in [0, 1]. A copy."""
        return self.running.mean.clone()

    @property
    def r(self) -> Tensor:
        """The paper's name of :attr:`mean_certainty`."""
        return self.mean_certainty

    def take_sizes(self, sizes: Sizes) -> None:
        super().take_sizes(sizes)
        if self._window_open and sizes.num_samples is not None:
            self.running.window, self._window_open = sizes.num_samples, False

    def trust(self, certainty: Tensor) -> Tensor:
        if self.moves_state:
            self.running.update(certainty)
        self.log("mean_certainty", self.mean_certainty)
        return logistic(self.running.mean - self.rho, self.b1)

    @torch.no_grad()
    def prime(self, model: nn.Module, loader: Iterable[Any]) -> Tensor:
        """Set r from one pass of ``model``, in eval mode, over ``loader``; returns r.

        For a model that is already good on the task: r would otherwise start at 0. A model with a
        new head knows nothing yet, so do not prime it.

        Args:
            model: pixels [B, ...] -> logits [B, C], or an output with ``.logits``.
            loader: batches ``(pixels, ...)``, or dictionaries with ``pixel_values``.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = torch.zeros(2, device=self.running.mean.device)  # Σ l(p), samples
        with eval_mode(model):
            for batch in loader:
                pixels = batch["pixel_values"] if isinstance(batch, dict) else batch[0]
                output = model(pixels.to(device))
                certainty = Prediction.of(getattr(output, "logits", output)).constant().certainty
                total[0] += certainty.sum().to(total.device)
                total[1] += len(certainty)
        total = sum_over_ranks(total)  # once: ranks may hold different numbers of batches
        if total[1] == 0:
            raise ValueError("prime: the loader gave no batch, so r would stay what it was")
        self.running.mean.copy_(total[0] / total[1])
        self.running.count.copy_(total[1].clamp(max=self.window))
        return self.mean_certainty
