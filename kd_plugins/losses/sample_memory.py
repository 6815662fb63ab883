"""Labels in a table, one row per training sample: learned in training (Joint) or fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import validate
from .base import Loss
from .functional import as_probs, cross_entropy, log_softmax
from .registry import register_loss
from .state import Progress, SampleTable


def fill_unseen(labels: Tensor, unseen: Tensor, given: Any, when: str = "") -> Tensor:
    """Labels [N, C] with the given ones [N] in the rows that are unseen [N].

    Raises:
        ValueError: there are such rows and no labels for them.
    """
    labels, rows = labels.clone(), unseen.nonzero().flatten()
    if not len(rows):
        return labels
    if given is None:
        raise ValueError(
            f"{len(rows)} of {len(labels)} samples were not seen in training{when} and have no "
            "corrected label: pass their given ones, soft_labels(view.labels), if their pictures "
            "cannot be read; else train an epoch over all of them (drop_last=False), or pass the "
            "num_samples that there are"
        )
    target = torch.as_tensor(given, device=labels.device)
    if target.shape != unseen.shape:
        raise ValueError(f"given: expected {len(labels)} labels, got {list(target.shape)}")
    if (wrong := (target[rows] < 0) | (target[rows] >= labels.shape[1])).any():
        row = int(rows[wrong][0])
        raise ValueError(
            f"given: the label {int(target[row])} of row {row} is none of the {labels.shape[1]} "
            "classes, and the row was not seen in training"
        )
    labels[rows] = as_probs(target[rows], labels.shape[1], labels.dtype)
    return labels


@register_loss("joint")
class Joint(Loss):
    """Joint optimisation, L_i = H(s_i, p_i) + alpha KL(u ‖ mean_j p_j) + beta H(p_i).

    Until progress ``begin`` the label s_i is the given one. From then on it is the mean of the
    sample's last ``epochs`` predictions (``hard``: its argmax), one per epoch. A visit first reads
    its label from the table and then stores its prediction. Where each epoch visits every sample
    once, this is the paper's update after each epoch.

    The second term, with u = 1/C, keeps the network from putting all samples into one class. It is
    one number for the batch of a process, added to every sample. After training,
    :meth:`soft_labels` gives the labels of the second stage: a fresh network with
    :class:`SoftLabels`.

    The table takes epochs · N · C · 4 bytes (CIFAR-100: 200 MB) on the device and in each
    checkpoint.

    Args:
        num_samples: rows of the training data; ``index`` counts in them. :meth:`bind` can fill in
            this and ``num_classes``.
        num_classes: C.
        alpha, beta: weights of balance and entropy: 1.2 and 0.8 for 70% symmetric noise (learning
            rate 0.08), 0.8 and 0.4 for 40% asymmetric noise (0.03).
        begin: the progress at which labels change; 70 of 200 epochs in the paper. Earlier
            predictions are stored all the same.
        epochs: number of predictions that a label is a mean of.
        hard: use one-hot labels.

    References:
        Tanaka et al., "Joint optimization framework for learning with noisy labels", CVPR 2018.

    Notes:
        The authors' code has -Σ_c u_c ln(mean_j p_jc) as second term: the same gradient, a value
        larger by ln C. Here it is the paper's divergence, 0 where the classes balance, and finite
        where a class has no mass. A sample that was seen less than ``epochs`` times has the mean of
        what is stored; one that was never seen has its given label.
    """

    num_samples: Any  # int, or None as long as it is not known
    num_classes: Any
    needs: Mapping[str, str] = {"num_samples": "num_samples", "num_classes": "num_classes"}

    def __init__(
        self,
        num_samples: int | None = None,
        num_classes: int | None = None,
        alpha: float = 1.2,
        beta: float = 0.8,
        begin: float = 0.35,
        epochs: int = 10,
        hard: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **base)
        self.begin = validate.fraction("begin", begin, "70 epochs of 200 are 0.35")
        self.epochs = validate.count("epochs", epochs, "a label is a mean over them")
        self.num_samples, self.alpha, self.beta, self.hard = num_samples, alpha, beta, hard
        self.progress = Progress()
        self.complete()

    def build(self) -> None:
        # a ring: visit v is stored in slot v % epochs
        self.outputs = SampleTable(self.num_samples, self.epochs, self.num_classes)
        self.visits = SampleTable(self.num_samples, dtype=torch.int64)

    def soft_labels(self, given: Any = None) -> Tensor:
        """The current label of every sample, [N, C]; rows sum to 1.

        Args:
            given: class indices [N], for samples that training never saw, such as those whose
                picture cannot be read.

        Raises:
            ValueError: some samples were never seen, and ``given`` is missing.
        """
        self.require_sizes()
        labels = self._labels(self.outputs.rows, self.visits.rows)
        return fill_unseen(labels, self.visits.rows == 0, given)

    def _labels(self, outputs: Tensor, visits: Tensor) -> Tensor:  # [B, epochs, C], [B] -> [B, C]
        # slots that were not visited hold 0
        mean = outputs.sum(1) / visits.clamp(1, self.epochs).unsqueeze(-1)
        return as_probs(mean.argmax(-1), mean.shape[-1], mean.dtype) if self.hard else mean

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        log_p = log_softmax(logits)
        p = log_p.exp()
        label = self._read(index, target)
        if self.moves_state:
            self._store(index, p.detach())
        # ln mean_j p_jc in logarithms: finite, with its gradient, where the mean is 0 in floats
        log_mean = log_p.logsumexp(0) - math.log(len(logits))  # [C]
        balance = -math.log(logits.shape[-1]) - log_mean.mean()
        entropy = cross_entropy(log_p, p)  # the gradient of functional.entropy is infinite at p = 0
        self.log("balance", balance)
        self.log("entropy", entropy)
        self.log("changed", label.argmax(-1) != target.argmax(-1))
        return cross_entropy(log_p, label) + self.alpha * balance + self.beta * entropy

    @torch.no_grad()
    def _read(self, index: Tensor, target: Tensor) -> Tensor:
        """The labels [B, C] of samples."""
        visits = self.visits.read(index)
        stored = self._labels(self.outputs.read(index), visits).to(target.dtype)
        changed = (self.progress.get(self) >= self.begin) & (visits > 0)
        return torch.where(changed[:, None], stored, target)

    @torch.no_grad()
    def _store(self, index: Tensor, p: Tensor) -> None:
        visits, outputs = self.visits.read(index), self.outputs.read(index)
        slots = torch.arange(self.epochs, device=index.device)
        now = (slots == (visits % self.epochs)[:, None])[:, :, None]  # [B, epochs, 1]
        self.outputs.write(index, torch.where(now, p[:, None].to(outputs.dtype), outputs))
        self.visits.write(index, visits + p.isfinite().all(-1))  # a NaN is not stored: no visit


@register_loss("soft_labels")
class SoftLabels(Loss):
    """Cross-entropy L_i = H(s_i, p_i) with a fixed label s_i per training sample.

    The target of the call is ignored. It is the second stage of :class:`Joint`:
    ``SoftLabels(first.soft_labels())`` for a fresh network, 120 epochs in the paper. Any other
    table of labels works too, such as predictions out of fold. Do not mix pictures (Mixup, CutMix):
    the label would stay that of one of them.

    Args:
        labels: a distribution per sample, [N, C].

    References:
        Tanaka et al., "Joint optimization framework for learning with noisy labels", CVPR 2018, the
        second stage.

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
                f"labels, row {row}: expected a distribution (no negative number, a sum of 1), got "
                f"a minimum of {labels[row].min():.4g} and a sum of {labels[row].sum():.4g}; "
                f"{int(wrong.sum())} of {len(labels)} rows are none"
            )
        super().__init__(**{"num_classes": labels.shape[1]} | base)
        self.num_samples = len(labels)
        self.labels = SampleTable(*labels.shape)
        self.labels.rows.copy_(labels)

    def per_sample(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        label = self.labels.read(index).to(logits.dtype)
        self.log("changed", label.argmax(-1) != target.argmax(-1))
        return cross_entropy(log_softmax(logits), label)
