"""Estimate the transition matrix of label noise from a network trained on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.state import in_eval
from ..losses.transition import TOLERANCE


def predict(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """What ``model`` (in eval mode) says about ``loader``, and its labels: probs [N, C] float32 and labels [N], on the CPU.

    Takes 4 N C bytes (ImageNet: 5 GB), twice that for a moment at the end. Every process goes over the whole of what it is
    given: give each the same data, or they hold different matrices.

    Args:
        model: pixels [B, ...] -> logits [B, C], or an output with ``.logits``.
        loader: batches ``(pixels, labels, ...)`` or dictionaries with ``pixel_values`` and ``labels``; no Mixup.
    """
    from tqdm.auto import tqdm

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    probs, labels = [], []
    with in_eval(model):
        for batch in tqdm(
            loader, desc="predict", leave=False, disable=None
        ):  # None: on a terminal only
            pixels, y = (
                (batch["pixel_values"], batch["labels"]) if isinstance(batch, dict) else batch[:2]
            )
            logits = model(pixels.to(device))
            probs.append(getattr(logits, "logits", logits).float().softmax(-1).cpu())
            labels.append(y.cpu())
    if not probs:
        raise ValueError("predict: the loader gave no batch, so there is nothing to estimate from")
    return torch.cat(probs), torch.cat(labels)


def anchor(probs: Tensor, quantile: float | None = None) -> Tensor:
    """Anchor-point estimate of T from probs [N, C]: row i is the prediction for the sample with the largest p_i.

    Exact if ``probs`` is the noisy posterior, every class has a sample that surely belongs to it, and T_ii is the largest in
    its column. A class of which the network is never sure gets the row of whatever comes nearest to it.

    Source: Patrini et al., CVPR 2017; the filter as in their code.

    Args:
        probs: softmax outputs of a network trained on the noisy labels.
        quantile: for each class i, first drop the samples whose p_i is at or above this quantile: 0.97 keeps outliers out
            where classes are few. None for many classes (T-revision does so for CIFAR-100): with 100 of them 3% of the data
            are more than a class has.

    >>> anchor(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]))
    tensor([[0.9000, 0.1000],
            [0.3000, 0.7000]])
    """
    if probs.dim() != 2 or 0 in probs.shape:
        raise ValueError(
            f"probs: expected [N, C] with at least one sample, got {list(probs.shape)}"
        )
    if not ((probs >= 0).all() and ((probs.sum(1) - 1).abs() <= TOLERANCE).all()):
        raise ValueError(
            "probs: expected rows of probabilities that sum to 1; the softmax of logits, not logits"
        )
    if quantile is not None and not 0.0 < quantile <= 1.0:
        raise ValueError(
            f"quantile={quantile}: expected a share of the samples in (0, 1], or None for all of them"
        )
    found = []
    for p in (
        probs.T
    ):  # torch.quantile refuses more than 16 million numbers, and copies of probs are large
        if quantile is not None:
            limit = p.kthvalue(
                math.ceil(quantile * (len(p) - 1)) + 1
            ).values  # numpy's method="higher"
            p = p - 2.0 * (
                p >= limit
            )  # behind all that are kept; if none is, the largest p still wins
        found.append(int(p.argmax()))
    return probs[found]


def dual_t(probs: Tensor, labels: Tensor, quantile: float | None = 0.97) -> Tensor:
    """Dual-T estimate T = T_club T_spade from probs [N, C] and noisy labels [N]; rows sum to 1.

    T_club[i, l] = P(predicted l | clean i) is the anchor estimate; T_spade[l, j], the share of noisy label j among the
    samples predicted l, is counted, and counting errs less than the posterior of a network that is too sure of itself. On an
    exact posterior it is :func:`anchor` that is exact.

    Source: Yao et al., "Dual T", NeurIPS 2020.
    Differs: a class that is never predicted has an empty row in T_spade; public code leaves zeros, which makes T lose mass
    and the loss -log 0. Here the row is the identity's.

    Args:
        probs: softmax outputs of a network trained on the noisy labels.
        labels: the noisy labels of the same samples.
        quantile: see :func:`anchor`.
    """
    club = anchor(probs, quantile).double()
    n, c = probs.shape
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(
            f"labels: expected integers [{n}], one for each row of probs, got {labels.dtype} {list(labels.shape)}"
        )
    if not ((labels >= 0) & (labels < c)).all():
        raise ValueError(
            f"labels: expected 0 to {c - 1} as in probs, got {int(labels.min())} to {int(labels.max())}"
        )
    spade = torch.bincount(probs.argmax(1) * c + labels.long(), minlength=c * c).view(c, c).double()
    spade = torch.where(
        spade.sum(1, keepdim=True) == 0, torch.eye(c, dtype=spade.dtype, device=spade.device), spade
    )
    return (club @ (spade / spade.sum(1, keepdim=True))).to(probs.dtype)


def estimate_transition(
    model: nn.Module, loader: Iterable[Any], method: str = "anchor", **options: Any
) -> Tensor:
    """T [C, C] of the label noise in ``loader``, from a ``model`` trained on it: :func:`predict`, then ``method``.

    Train that model for a few epochs with cross-entropy on the noisy labels (T-revision: 20, the one best on noisy
    validation data), before it memorises them.

    Args:
        model, loader: see :func:`predict`; the training data without augmentation, the same for every process.
        method: ``"anchor"`` (:func:`anchor`) or ``"dual_t"`` (:func:`dual_t`).
        options: ``quantile`` for the method; by default None for anchor and 0.97 for dual_t.
    """
    if method not in ("anchor", "dual_t"):
        raise ValueError(f"method={method!r}: expected 'anchor' or 'dual_t'")
    probs, labels = predict(model, loader)
    return anchor(probs, **options) if method == "anchor" else dual_t(probs, labels, **options)
