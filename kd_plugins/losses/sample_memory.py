"""Labels that live in a table, a row for each training sample: learned while training (Joint), then trained on (SoftLabels)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Loss
from .functional import Prediction, as_probs, cross_entropy
from .registry import register_loss
from .state import Progress, SampleTable


@register_loss("joint")
class Joint(Loss):
    """Joint optimisation, L_i = H(s_i, p_i) + alpha KL(u ‖ mean_j p_j) + beta H(p_i), s_i the mean of the last outputs for i.

    Until progress ``begin`` s_i is the given label. From then on it is the mean of the sample's last ``epochs`` predictions
    (``hard``: its argmax), one for each epoch. A visit first reads its label from what is stored and then stores its own
    prediction; as an epoch visits each sample once, that is the paper's update after each epoch, without a hook. The second
    term, u = 1/C, keeps the network from putting all samples into one class: it is one number for the batch of a process,
    added to every sample. The table takes epochs · N · C · 4 bytes (CIFAR-100: 200 MB) on the device and in each checkpoint.

    When training is over, :meth:`soft_labels` gives the labels for the second stage: a fresh network and :class:`SoftLabels`.

    Source: Tanaka et al., "Joint optimization framework for learning with noisy labels", CVPR 2018.
    Differs: the authors' code has -Σ_c u_c ln(mean_j p_jc) as second term: the same gradient, the value larger by ln C. Here it
    is the paper's divergence, 0 where the classes balance, and finite where a class has no mass. A sample that was seen less
    than ``epochs`` times has the mean of what there is, one that was never seen its given label.

    Args:
        num_samples: rows of the training data; ``index`` counts in them.
        num_classes: C.
        alpha, beta: weights of balance and entropy: 1.2 and 0.8 for 70% symmetric noise (learning rate 0.08), 0.8 and 0.4 for
            40% asymmetric (0.03).
        begin: the progress at which labels change; 70 of 200 epochs in the paper. Earlier predictions are stored all the same.
        epochs: over which a label is a mean.
        hard: one-hot labels.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        alpha: float = 1.2,
        beta: float = 0.8,
        begin: float = 0.35,
        epochs: int = 10,
        hard: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **base)
        if not 0.0 <= begin <= 1.0:
            raise ValueError(
                f"begin={begin}: expected the share of training after which labels change, in [0, 1]; 70 epochs "
                "of 200 are 0.35"
            )
        if epochs < 1:
            raise ValueError(
                f"epochs={epochs}: expected at least 1 epoch; a label that is a mean over none is undefined"
            )
        self.num_samples, self.epochs = int(num_samples), int(epochs)
        self.alpha, self.beta, self.begin, self.hard = alpha, beta, begin, hard
        self.outputs = SampleTable(
            num_samples, self.epochs, num_classes
        )  # a ring: visit v stands in slot v % epochs
        self.visits = SampleTable(num_samples, dtype=torch.int64)
        self.progress = Progress()

    def _labels(self, outputs: Tensor, visits: Tensor) -> Tensor:  # [B, epochs, C], [B] -> [B, C]
        mean = outputs.sum(1) / visits.clamp(1, self.epochs).unsqueeze(
            -1
        )  # what was not visited holds 0
        return as_probs(mean.argmax(-1), mean.shape[-1], mean.dtype) if self.hard else mean

    def soft_labels(self) -> Tensor:
        """The label of every sample as it stands now, [N, C]; the rows sum to 1.

        Raises:
            ValueError: some samples were never seen in training.
        """
        if unseen := int((self.visits.rows == 0).sum()):
            raise ValueError(
                f"{unseen} of {self.num_samples} samples were never seen in training and have no label: train an "
                "epoch over all of them, with drop_last=False, or give the num_samples that there are"
            )
        return self._labels(self.outputs.rows, self.visits.rows)

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        pred = Prediction.of(logits)
        p = pred.p  # before no_grad: what is first computed in there stays without gradient
        with torch.no_grad():
            visits = self.visits.read(index)
            outputs = self.outputs.read(index)
            changed = (self.progress.get(self) >= self.begin) & (visits > 0)
            label = torch.where(
                changed[:, None], self._labels(outputs, visits).to(target.dtype), target
            )
            if self.training:
                now = (
                    torch.arange(self.epochs, device=index.device)
                    == (visits % self.epochs)[:, None]
                )  # [B, epochs]
                self.outputs.write(
                    index, torch.where(now[:, :, None], p[:, None].to(outputs.dtype), outputs)
                )
                self.visits.write(
                    index, visits + p.isfinite().all(-1)
                )  # a NaN is not stored, so it is no visit

        # ln mean_j p_jc in logs: finite, with its gradient, also where the mean itself is 0 in floats
        log_mean = pred.log_p.logsumexp(0) - math.log(len(logits))  # [C]
        balance = -math.log(pred.num_classes) - log_mean.mean()
        entropy = cross_entropy(
            pred.log_p, p
        )  # not functional.entropy, whose gradient is infinite at p = 0
        self.stats |= {"balance": balance.detach(), "entropy": entropy.detach().mean()}
        self.stats["changed"] = (label.argmax(-1) != target.argmax(-1)).to(logits.dtype).mean()
        return cross_entropy(pred.log_p, label) + self.alpha * balance + self.beta * entropy


@register_loss("soft_labels")
class SoftLabels(Loss):
    """Cross-entropy L_i = H(s_i, p_i) with a fixed label s_i for each training sample; the target of the call is ignored.

    The second stage of :class:`Joint`: ``SoftLabels(first.soft_labels())`` for a fresh network, 120 epochs in the paper. Any
    other table of labels will do, such as predictions out of fold. Pictures must not be mixed (Mixup, CutMix): the label
    would stay that of one of them.

    Source: Tanaka et al., "Joint optimization framework for learning with noisy labels", CVPR 2018, the second stage.

    Args:
        labels: a distribution for each sample, [N, C].

    >>> loss = SoftLabels(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    >>> loss(torch.zeros(1, 2), torch.tensor([0]), index=torch.tensor([1]))
    tensor(0.6931)
    """

    def __init__(self, labels: Tensor, **base: Any) -> None:
        labels = torch.as_tensor(labels).detach().float()
        if labels.dim() != 2:
            raise ValueError(f"labels must be distributions [N, C], got {list(labels.shape)}")
        wrong = ~((labels >= 0).all(1) & ((labels.sum(1) - 1).abs() <= 1e-3))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels, row {row}: expected a distribution, no negative number and a sum of 1, got a minimum of "
                f"{labels[row].min():.4g} and a sum of {labels[row].sum():.4g}; {int(wrong.sum())} of {len(labels)} "
                "rows are none"
            )
        super().__init__(**{"num_classes": labels.shape[1]} | base)
        self.labels = SampleTable(*labels.shape)
        self.labels.rows.copy_(labels)

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        label = self.labels.read(index).to(logits.dtype)
        self.stats["changed"] = (label.argmax(-1) != target.argmax(-1)).to(logits.dtype).mean()
        return cross_entropy(Prediction.of(logits).log_p, label)
