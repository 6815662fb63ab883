"""Estimate the transition matrix of label noise from a network that was trained on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import validate
from ..losses.state import eval_mode
from ..losses.transition import TOLERANCE


def predict(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Probabilities [N, C] (float32) of ``model`` in eval mode, and labels [N], on the CPU.

    The result takes 4 N C bytes (ImageNet: 5 GB), and twice that for a moment at the end. Every
    process goes over the whole loader: give all of them the same data, or their matrices differ.

    Args:
        model: pixels [B, ...] -> logits [B, C], or an output with ``.logits``.
        loader: batches ``(pixels, labels, ...)``, or dictionaries with ``pixel_values`` and
            ``labels``; no Mixup.
    """
    from tqdm.auto import tqdm

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    probs, labels = [], []
    with eval_mode(model):
        # disable=None: a progress bar on terminals only
        for batch in tqdm(loader, desc="predict", leave=False, disable=None):
            if isinstance(batch, dict):
                pixels, y = batch["pixel_values"], batch["labels"]
            else:
                pixels, y = batch[:2]
            logits = model(pixels.to(device))
            probs.append(getattr(logits, "logits", logits).float().softmax(-1).cpu())
            labels.append(y.cpu())
    if not probs:
        raise ValueError("predict: the loader gave no batch, so there is nothing to estimate from")
    return torch.cat(probs), torch.cat(labels)


def anchor(probs: Tensor, quantile: float | None = None) -> Tensor:
    """Anchor-point estimate of T: row i is the prediction for the sample with the largest p_i.

    It is exact if ``probs`` is the noisy posterior, every class has a sample that surely belongs to
    it, and T_ii is the largest entry of its column. A class of which the network is never sure
    gets the row of the sample that comes nearest.

    Args:
        probs: softmax outputs [N, C] of a network trained on the noisy labels.
        quantile: for each class i, first drop the samples whose p_i is at or above this quantile.
            0.97 keeps outliers out where classes are few. Use None for many classes, as T-revision
            does for CIFAR-100: with 100 of them a class has less than 3% of the data.

    References:
        Patrini et al., "Making deep neural networks robust to label noise: a loss correction
        approach", CVPR 2017; the filter as in their code.

    >>> anchor(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]))
    tensor([[0.9000, 0.1000],
            [0.3000, 0.7000]])
    """
    if probs.dim() != 2 or 0 in probs.shape:
        raise ValueError(f"probs: expected [N, C] with a sample or more, got {list(probs.shape)}")
    if not ((probs >= 0).all() and ((probs.sum(1) - 1).abs() <= TOLERANCE).all()):
        raise ValueError(
            "probs: expected rows of probabilities that sum to 1; the softmax of logits, not logits"
        )
    if quantile is not None:
        validate.fraction("quantile", quantile, "None keeps all samples", with_zero=False)
    found = []
    for p in probs.T:  # torch.quantile refuses more than 16 million numbers
        if quantile is not None:
            rank = math.ceil(quantile * (len(p) - 1)) + 1  # numpy's method="higher"
            limit = p.kthvalue(rank).values
            # behind all that are kept; if none is kept, the largest p still wins
            p = p - 2.0 * (p >= limit)
        found.append(int(p.argmax()))
    return probs[found]


def dual_t(probs: Tensor, labels: Tensor, quantile: float | None = 0.97) -> Tensor:
    """Dual-T estimate T = T_club T_spade; rows sum to 1.

    T_club[i, l] = P(predicted l | clean i) is the anchor estimate. T_spade[l, j], the share of
    noisy label j among the samples predicted l, is counted; counting errs less than the posterior
    of a network that is too sure of itself. On an exact posterior, :func:`anchor` is the exact one.

    Args:
        probs: softmax outputs [N, C] of a network trained on the noisy labels.
        labels: the noisy labels [N] of the same samples.
        quantile: see :func:`anchor`.

    References:
        Yao et al., "Dual T: reducing estimation error for transition matrix in label-noise
        learning", NeurIPS 2020.

    Notes:
        A class that is never predicted has an empty row in T_spade. Public code leaves zeros, so
        that T loses mass and the loss is -log 0; here the row is the identity's.
    """
    club = anchor(probs, quantile).double()
    n, c = probs.shape
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"labels: expected integers [{n}], one for each row of probs, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    labels = labels.long()
    if not ((labels >= 0) & (labels < c)).all():
        raise ValueError(
            f"labels: expected 0 to {c - 1} as in probs, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    spade = torch.bincount(probs.argmax(1) * c + labels, minlength=c * c).view(c, c).double()
    empty = spade.sum(1, keepdim=True) == 0
    spade = torch.where(empty, torch.eye(c, dtype=spade.dtype, device=spade.device), spade)
    return (club @ (spade / spade.sum(1, keepdim=True))).to(probs.dtype)


def estimate_transition(
    model: nn.Module, loader: Iterable[Any], method: str = "anchor", **options: Any
) -> Tensor:
    """T [C, C] of the label noise in ``loader``: :func:`predict`, then ``method``.

    Train ``model`` on the noisy labels for a few epochs with cross-entropy, before it memorises
    them (T-revision: 20 epochs, the one that is best on noisy validation data).

    Args:
        model, loader: see :func:`predict`. Use the training data without augmentation, the same for
            every process.
        method: ``"anchor"`` (:func:`anchor`) or ``"dual_t"`` (:func:`dual_t`).
        options: ``quantile`` for the method; by default None for anchor and 0.97 for dual_t.
    """
    validate.one_of("method", method, ("anchor", "dual_t"))
    probs, labels = predict(model, loader)
    return anchor(probs, **options) if method == "anchor" else dual_t(probs, labels, **options)
