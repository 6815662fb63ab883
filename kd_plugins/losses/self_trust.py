"""Label modification by trust in the model: ProSelfLC and MyLC."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from . import validate
from .base import LossArguments
from .functional import Prediction, logistic
from .refined import Refined
from .registry import register_loss
from .sizes import Sizes
from .state import Progress, RunningMean, eval_mode, sum_over_ranks

WINDOW = 10_000  # samples, for MyLC without a window in a loop that does not bind


def calibrated_certainty(noise_rate: float, num_classes: int) -> float:
    """r* = 1 - [h(t) + t ln(C - 1)] / ln C: certainty of a model calibrated to wrong labels.

    Where a share t of the labels is wrong, uniformly over the other classes, such a model predicts
    1 - t for one class and t / (C - 1) for each other. Its entropy is h(t) + t ln(C - 1), with
    h(t) = -t ln t - (1 - t) ln(1 - t).

    Args:
        noise_rate: t, in [0, 1).
        num_classes: C.

    >>> round(calibrated_certainty(0.4, 10), 2), round(calibrated_certainty(0.4, 100), 2)
    (0.33, 0.45)
    """
    t = validate.fraction("noise_rate", noise_rate, "it is a share of the labels", with_one=False)
    validate.count("num_classes", num_classes, "one class leaves nothing to be unsure of", least=2)
    if t == 0:
        return 1.0
    entropy = -t * math.log(t) - (1 - t) * math.log(1 - t) + t * math.log(num_classes - 1)
    return 1.0 - entropy / math.log(num_classes)


class _SelfTrust(Refined):
    """q~ = (1 - eps) q + eps p with eps = g l(p) per sample: trust in the model times certainty."""

    def __init__(self, detach: bool = True, **base: Unpack[LossArguments]) -> None:
        super().__init__(**base)
        self.detach = detach

    def trust(self, certainty: Tensor, num_classes: int) -> Tensor:
        """g in [0, 1], 0-d, given l(p) [B]."""
        raise NotImplementedError

    def refine(self, pred: Prediction, target: Tensor) -> Tensor:
        certainty = pred.certainty.detach()  # eps is a constant, also where q~ is not
        eps = self.trust(certainty, pred.num_classes) * certainty
        self.log("eps", eps)
        return target.lerp(pred.p, eps.unsqueeze(-1))


@register_loss("proselflc")
class ProSelfLC(_SelfTrust):
    """ProSelfLC: q~ = (1 - eps) q + eps p, eps = g(t) l(p), l(p) = 1 - H(p) / ln C.

    Trust in the model g(t) = h(t/Γ - shift, b1) grows with the progress of training, so the method
    assumes training from scratch. Needs :meth:`set_progress`.

    Args:
        b1: steepness B of g; 8 to 16 in the paper, smaller for more noise.
        shift: the progress at which g = 0.5.
        detach: q~ is a constant.

    References:
        Wang et al., "ProSelfLC: progressive self label correction for training robust deep neural
        networks", CVPR 2021, equation 7.

    Notes:
        The authors' CVPR code does not detach q~ (``detach=False``). Their later scripts do, as the
        default here. eps carries no gradient, as in the authors' code.
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

    def trust(self, certainty: Tensor, num_classes: int) -> Tensor:
        return logistic(self.progress.get(self) - self.shift, self.b1)


@register_loss("mylc")
class MyLC(_SelfTrust):
    """MyLC: q~ = (1 - eps) q + eps p, eps = g(r) l(p), r = 1 - mean_i H(p_i) / ln C.

    Trust in the model g(r) = h(r - rho, b1) grows with what the model knows: r is its mean
    certainty over the data set. So it also works for a pretrained model, for which :meth:`prime`
    sets r before the first step.

    Args:
        b1: steepness of g; 0 makes g = 0.5. Not published; 10 is the middle of ProSelfLC's search.
        rho: the mean certainty at which g = 0.5; 0.5 in the paper. ``"auto"`` goes beyond it: the
            certainty of a model that is calibrated to the noise, :func:`calibrated_certainty`. A
            larger one means that wrong labels are learned by heart, and with few classes the
            paper's 0.5 comes after that.
        noise_rate: for ``rho="auto"``, the share of wrong labels, known or estimated
            (``estimate_noise_rate``).
        window: samples over which r is a mean. None is the number of rows of the training data
            (the paper's "all samples") once :meth:`bind` tells it, and 10,000 without it.
        detach: q~ is a constant.

    References:
        Li et al., "Selective mutual knowledge distillation", IJCNN 2023 (arXiv 2106.01489), where
        MyLC is defined.

    Notes:
        The paper does not say when r is measured. Here each batch of training counts before r is
        read. r is the mean over the first ``window`` samples and an exponential mean with that
        horizon after them, over all processes. It stands still in ``eval()`` and under ``no_grad``.
        A new head must start unsure, or MyLC trusts it at once. timm's of an EfficientNet or a
        MobileNet does not: use ``kd_plugins.models.make_model`` or ``model.reset_classifier(C)``.

    >>> loss = MyLC()
    >>> loss(torch.zeros(2, 4), torch.tensor([0, 1]))  # the model knows nothing, the label is kept
    tensor(1.3863)
    >>> loss.mean_certainty
    tensor(0.)
    """

    def __init__(
        self,
        b1: float = 10.0,
        rho: float | str = 0.5,
        window: int | None = None,
        detach: bool = True,
        noise_rate: float | None = None,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(detach, **base)
        self.b1 = validate.number("b1", b1, "it is the steepness of the trust")
        if rho == "auto":
            why = "rho='auto' follows from the share of wrong labels"
            noise_rate = validate.fraction("noise_rate", noise_rate, why, with_one=False)
        elif noise_rate is not None:
            raise ValueError(f"noise_rate={noise_rate} is for rho='auto' and would be ignored")
        else:
            why = "it is the mean certainty at which trust is 0.5"
            rho = validate.fraction("rho", rho, why)
        self.rho, self.noise_rate = rho, noise_rate
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
        if self._window_open and sizes.num_rows is not None:
            self.running.window, self._window_open = sizes.num_rows, False

    def trust(self, certainty: Tensor, num_classes: int) -> Tensor:
        if self.moves_state:
            self.running.update(certainty)
        self.log("mean_certainty", self.mean_certainty)
        rho: Any = self.rho
        if self.noise_rate is not None:
            rho = calibrated_certainty(self.noise_rate, num_classes)
        return logistic(self.running.mean - rho, self.b1)

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
