"""Label modification: losses H(q~, p) whose target q~ mixes the given label q with something smoother.

Every class writes :meth:`Refined.refine`; in a ``Mutual`` loss the same q~ is the knowledge that is handed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Loss
from .functional import (
    Prediction,
    Predictions,
    as_probs,
    cross_entropy,
    logistic,
    mixed_cross_entropy,
)
from .registry import register_loss
from .state import Progress, RunningMean, in_eval, sum_over_ranks


class Refined(Loss):
    """L = mean H(q~, p) with q~ = refine(logits, target). A subclass writes :meth:`refine`.

    Args:
        detach: take q~ as a constant (no gradient through the model's own prediction in the target).
    """

    detach = True

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        """The refined label q~ [B, C] of logits [B, C] and distributions [B, C]; rows sum to 1 (CP: to 1 - 2 eps)."""
        raise NotImplementedError

    @staticmethod
    def shares(peers: Sequence[Any], preds: Predictions) -> tuple[Tensor, Tensor | None]:
        """(a, b), constants [K, B], of each peer's label q~ = a q + b p, for a class with ``indices``; b is None where it is 0."""
        raise NotImplementedError

    def per_sample(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        if self.indices and self.detach and isinstance(logits, Tensor):
            preds = Predictions([logits])
            return mixed_cross_entropy([logits], preds, target, *self.shares([self], preds))[0]
        pred = Prediction.of(logits)
        target = as_probs(target, pred.num_classes, pred.log_p.dtype)
        return cross_entropy(
            pred.log_p, self.refine(pred.detach() if self.detach else pred, target)
        )


def _mix(target: Tensor, other: Tensor | float, eps: Tensor | float) -> Tensor:
    return (1.0 - eps) * target + eps * other


def _share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value}: expected the weight of what is not the label, in [0, 1]")
    return value


@register_loss("ce")
class CE(Refined):
    """Cross-entropy L = H(q, p): the label as it is given, q~ = q.

    Source: the baseline of every table.

    >>> CE()(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """

    indices = True

    @staticmethod
    def shares(peers: Sequence[CE], preds: Predictions) -> tuple[Tensor, None]:
        return preds.p[0].new_ones(len(peers), len(preds.p[0])), None

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        return target


@register_loss("label_smoothing")
class LabelSmoothing(Refined):
    """Label smoothing, q~ = (1 - eps) q + eps u with u = 1/C everywhere.

    Source: Szegedy et al., CVPR 2016, section 7; in the form of ProSelfLC (Wang et al., CVPR 2021).
    Differs: Tf-KD's "label smoothing" puts eps/(C-1) on the other classes only.

    Args:
        eps: weight of the uniform part, in [0, 1]. 0.1 is Szegedy's; SMKD and ProSelfLC search 0.125, 0.25 and 0.5.

    >>> LabelSmoothing(eps=0.3).refine(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]]))
    tensor([[0.1000, 0.8000, 0.1000]])
    """

    def __init__(self, eps: float = 0.1, **base: Any) -> None:
        super().__init__(**base)
        self.eps = _share("eps", eps)

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        return _mix(target, 1.0 / target.shape[-1], self.eps)


@register_loss("confidence_penalty")
class ConfidencePenalty(Refined):
    """Confidence penalty, L = (1 - eps) H(q, p) - eps H(p); as a refined label q~ = (1 - eps) q - eps p.

    The entropy term is the method, so its gradient is always kept; only what is handed to a peer is a constant.

    Source: Pereyra et al., 2017 (arXiv 1701.06548), in the (1 - eps) form of ProSelfLC (Wang et al., CVPR 2021).
    Differs: Pereyra's own form is H(q, p) - beta H(p), the same up to a factor with beta = eps / (1 - eps).
    Unsaid there: it has no lower bound on a uniform batch other than -eps ln C; q~ carries negative mass.

    Args:
        eps: weight of the entropy, in [0, 1].

    >>> ConfidencePenalty(eps=0.5)(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.)
    """

    detach = False

    def __init__(self, eps: float = 0.1, **base: Any) -> None:
        super().__init__(**base)
        self.eps = _share("eps", eps)

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        return (1.0 - self.eps) * target - self.eps * Prediction.of(logits).p


@register_loss("boot_soft")
class BootSoft(Refined):
    """Soft bootstrapping, q~ = (1 - eps) q + eps p.

    Source: Reed et al., ICLR 2015 workshop, soft bootstrapping; their beta = 0.95 weights the label and is 1 - eps here.
    Unsaid there: with the gradient through q~ (the default, their "minimum entropy regularisation") the prediction's
    entropy is minimised; ``detach=True`` takes q~ as a constant, which is how SMKD hands it to a peer in any case.

    Args:
        eps: weight of the prediction, in [0, 1].
        detach: take q~ as a constant.

    >>> BootSoft(eps=0.5).refine(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor([[0.7500, 0.2500]])
    """

    def __init__(self, eps: float = 0.05, detach: bool = False, **base: Any) -> None:
        super().__init__(**base)
        self.eps, self.detach = _share("eps", eps), detach

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        return _mix(target, Prediction.of(logits).p, self.eps)


@register_loss("boot_hard")
class BootHard(Refined):
    """Hard bootstrapping, q~ = (1 - eps) q + eps onehot(argmax p). The target carries no gradient.

    Source: Reed et al., ICLR 2015 workshop, hard bootstrapping; their beta = 0.8 weights the label and is 1 - eps here.

    Args:
        eps: weight of the predicted class, in [0, 1].

    >>> BootHard(eps=0.25).refine(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([[0.7500, 0.2500]])
    """

    def __init__(self, eps: float = 0.2, **base: Any) -> None:
        super().__init__(**base)
        self.eps = _share("eps", eps)

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        predicted = Prediction.of(logits).log_p.argmax(-1)
        return _mix(target, as_probs(predicted, target.shape[-1], target.dtype), self.eps)


class _SelfTrust(Refined):
    """q~ = (1 - eps) q + eps p with a trust eps = g l(p) per sample: how far training is, times how sure p is."""

    indices = True

    def __init__(self, detach: bool = True, **base: Any) -> None:
        super().__init__(**base)
        self.detach = detach

    @staticmethod
    def trust(peers: Sequence[Any], certainty: Tensor) -> Tensor:
        """g in [0, 1] of each peer, [K, 1] or [1], given l(p) [K, B]."""
        raise NotImplementedError

    @classmethod
    @torch.no_grad()  # the weights are not differentiated, also where q~ is
    def shares(cls, peers: Sequence[_SelfTrust], preds: Predictions) -> tuple[Tensor, Tensor]:
        eps = cls.trust(peers, preds.certainty).to(preds.certainty.dtype) * preds.certainty
        for peer, mean in zip(peers, eps.mean(-1), strict=True):
            peer.stats["eps"] = mean
        return 1.0 - eps, eps

    def refine(self, logits: Tensor | Prediction, target: Tensor) -> Tensor:
        pred = Prediction.of(logits)
        a, b = self.shares([self], Predictions([pred.log_p]))
        return a[0].unsqueeze(-1) * target + b[0].unsqueeze(-1) * pred.p


@register_loss("proselflc")
class ProSelfLC(_SelfTrust):
    """ProSelfLC: q~ = (1 - eps) q + eps p, eps = g(t) l(p), g(t) = h(t/Γ - shift, b1), l(p) = 1 - H(p) / ln C.

    Trust in the model grows with the clock; it therefore assumes training from scratch. Needs :meth:`set_progress`.

    Source: Wang et al., ProSelfLC, CVPR 2021, equation 7.
    Differs: the authors' CVPR code does not detach q~ (``detach=False``); their later scripts do (the default here).
    Unsaid there: eps itself carries no gradient (as in the authors' code).

    Args:
        b1: steepness B of the clock; 8 to 16 in the paper, smaller for more noise.
        shift: the progress at which g = 0.5.
        detach: take q~ as a constant.
    """

    def __init__(
        self, b1: float = 10.0, shift: float = 0.5, detach: bool = True, **base: Any
    ) -> None:
        super().__init__(detach, **base)
        self.b1, self.shift = b1, shift
        self.progress = Progress()

    @staticmethod
    def trust(peers: Sequence[ProSelfLC], certainty: Tensor) -> Tensor:
        return logistic(
            peers[0].progress.get(peers[0]) - peers[0].shift, peers[0].b1
        )  # the peers' clock is one


@register_loss("mylc")
class MyLC(_SelfTrust):
    """MyLC: q~ = (1 - eps) q + eps p, eps = g(r) l(p), g(r) = h(r - rho, b1), r = 1 - mean_i H(p_i) / ln C.

    Trust in the model grows with what it knows (r, its mean certainty over the data set) instead of with the clock, so
    it also works for a pretrained model: :meth:`prime` then sets r before the first step.

    Source: Li et al., SMKD, IJCNN 2023 (arXiv 2106.01489), where MyLC is defined.
    Unsaid there: when r is measured. Here over training-mode predictions, each batch counted before r is read: cumulative
    over the first ``window`` samples, exponential with that horizon after; summed over processes, unchanged in ``eval()``.
    b1 is unpublished; 10 is the middle of what ProSelfLC searched.

    Args:
        b1: steepness of g; 0 makes g = 0.5.
        rho: the mean certainty at which g = 0.5.
        window: samples over which r is a mean; ``len(train_dataset)`` is the paper's "all samples".
        detach: take q~ as a constant.

    >>> loss = MyLC(window=50_000)
    >>> loss(torch.zeros(2, 4), torch.tensor([0, 1])), loss.r  # a model that knows nothing: r = 0, the label is kept
    (tensor(1.3863), tensor(0.))
    """

    def __init__(
        self,
        b1: float = 10.0,
        rho: float = 0.5,
        window: int = 10_000,
        detach: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(detach, **base)
        self.b1, self.rho, self.window = b1, _share("rho", rho), window
        self.mean_certainty = RunningMean(window)

    @property
    def r(self) -> Tensor:
        """Mean certainty of the model's predictions over the data set, in [0, 1]."""
        return self.mean_certainty.mean.clone()

    @staticmethod
    def trust(peers: Sequence[MyLC], certainty: Tensor) -> Tensor:
        if peers[0].training:
            RunningMean.update_all([peer.mean_certainty for peer in peers], certainty)
        r = torch.stack([peer.mean_certainty.mean for peer in peers])
        for peer, mean in zip(peers, r, strict=True):
            peer.stats["r"] = mean
        return logistic(r - peers[0].rho, peers[0].b1).unsqueeze(-1)

    def prime(self, model: nn.Module, loader: Iterable[Any]) -> Tensor:
        """Set r from one pass of ``model`` (in eval mode) over ``loader``; returns r.

        For a model that is already good on the task, before fine-tuning goes on: r would otherwise start at 0. A model
        whose head is new knows nothing yet, and r should start at 0: do not prime it.

        Args:
            model: pixels [B, ...] -> logits [B, C], or an output with ``.logits``.
            loader: batches ``(pixels, ...)`` or dictionaries with ``pixel_values``.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        total = torch.zeros(2, device=self.mean_certainty.mean.device)  # Σ l(p), samples
        with in_eval(model):
            for batch in loader:
                pixels = batch["pixel_values"] if isinstance(batch, dict) else batch[0]
                logits = model(pixels.to(device))
                pred = Prediction.of(getattr(logits, "logits", logits).float())
                sure = pred.certainty.to(total.device)
                total += torch.stack([sure.sum(), torch.full_like(sure.sum(), len(sure))])
        total = sum_over_ranks(total)  # once: ranks may hold different numbers of batches
        if total[1] == 0:
            raise ValueError("prime: the loader gave no batch, so r would stay what it was")
        self.mean_certainty.mean.copy_(total[0] / total[1])
        self.mean_certainty.count.copy_(total[1].clamp(max=self.window))
        return self.r
