"""Data Selection: choose training samples to distil on, by their influence on held-out ones.

>>> scores = influence_scores(teacher, train_loader, held_out_loader)  # doctest: +SKIP
>>> loss = CE() + MaskedLoss(select_lowest(scores, 0.8), LabelRevision())  # doctest: +SKIP

Other scores work as well: :func:`select_lowest` accepts any numbers [N].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler
from tqdm.auto import tqdm

from ..losses import validate
from ..losses.functional import as_probs
from ..losses.state import eval_mode

LARGEST = 4096  # parameters of the last layer; their Hessian in float64 takes 134 MB


def influence_scores(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    exact: bool = False,
    damping: float = 5e-4,
) -> Tensor:
    """Influence of each training sample i on the held-out cross-entropy, as scores [N].

    score_i = -g_val · g_i, or -g_valᵀ (H + damping)⁻¹ g_i with ``exact``.
    g_i = (p_i - q_i) ⊗ [h_i, 1] is the gradient of H(q_i, p_i) in the last linear layer, h_i the
    features before it, g_val the mean gradient of the held-out samples, and H the mean Hessian of
    the training samples. No backward pass is needed.

    Samples with a LOW score help: below 0, more weight on sample i lowers the held-out loss. Above
    0 it raises the loss, as wrong labels often do. In the exact form, leaving sample i out changes
    the held-out loss by about -score / N.

    Args:
        model: a trained timm network with one linear classifier. It runs in eval mode, and its mode
            is restored.
        train_loader: batches ``(pixels, labels, ...)`` in the order of the data set, or, in any
            order, dictionaries with ``pixel_values``, ``labels`` and ``index`` (the row in the data
            set). Use the evaluation transform, without augmentation and Mixup.
        val_loader: the same for held-out samples. Their labels should be clean.
        exact: use the Hessian. The last layer may have at most 4096 parameters, and the training
            samples are read twice.
        damping: added to the diagonal of H, which has no inverse by itself. Use the weight decay
            with which the layer was trained.

    Returns:
        float32 on the CPU (float64 for a float64 network). A row of the data set that is
        in no batch gets inf, with a warning.

    References:
        Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017 (the
        exact form). Lan et al., "Improve knowledge distillation via label revision and data
        selection", IEEE TCDS 2025, arXiv 2404.03693 (its use for Data Selection).

    Notes:
        We could not confirm which influence function, which network and which loss Lan et al. use.
        The last layer of the teacher, first order and plain cross-entropy are our choice.
        In distributed training each process must read all data, so that all processes compute the
        same scores. If rounding may differ between them, broadcast the scores of one process,
        because the masks made from them must be equal.
    """
    head = _classifier(model)
    if exact:
        _refuse_exact(head, damping)
    with eval_mode(model):
        direction = _mean_gradient(_batches(model, head, val_loader, "val_loader"))
        if exact:
            hessian = _hessian(_batches(model, head, train_loader, "train_loader"))
            hessian.diagonal().add_(damping)
            solved = torch.linalg.solve(hessian, direction.flatten().to(hessian))
            direction = solved.view_as(direction).to(direction)
        rows: list[Tensor] = []
        scores: list[Tensor] = []
        count = 0
        for x, error, _, index in _batches(model, head, train_loader, "train_loader"):
            if index is None:
                _refuse_shuffled(train_loader)
                index = torch.arange(count, count + len(x))
            rows.append(index.cpu())
            scores.append(-(error @ direction * x).sum(1).cpu())
            count += len(x)
    dataset: Any = getattr(train_loader, "dataset", None)
    size = len(dataset) if hasattr(dataset, "__len__") else 0
    return _by_row(torch.cat(rows), torch.cat(scores), size)


def select_lowest(scores: Tensor | Sequence[float], fraction: float) -> Tensor:
    """The mask [N] of the round(fraction · N) samples with the lowest scores [N].

    Among equal scores, the first samples of the data set are kept. Lan et al. keep the most helpful
    samples; which fraction could not be confirmed.

    >>> select_lowest([0.3, -1.0, 0.3, 2.0], 0.5)
    tensor([ True,  True, False, False])
    """
    scores = torch.as_tensor(scores).detach()
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"scores: expected one number for each sample, got {list(scores.shape)}")
    if unknown := int(scores.isnan().sum()):
        raise ValueError(
            f"{unknown} of {len(scores)} scores are NaN, the first at position "
            f"{int(scores.isnan().int().argmax())}: they cannot be ranked"
        )
    kept = round(validate.fraction("fraction", fraction, with_zero=False) * len(scores))
    if not kept:
        raise ValueError(
            f"fraction={fraction} of {len(scores)} samples is none: nothing would be distilled"
        )
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.argsort(stable=True)[:kept]] = True
    return mask


class _Batch(NamedTuple):
    """What the last layer sees of a batch."""

    x: Tensor  # [h, 1] [B, D + 1]; h alone if there is no bias
    error: Tensor  # p - q [B, C]
    p: Tensor  # [B, C]
    rows: Tensor | None  # in the data set [B]


def _batches(
    model: nn.Module, head: nn.Linear, loader: Iterable[Any], name: str
) -> Iterator[_Batch]:
    body: Any = getattr(model, "timm_model", model)  # transformers wraps timm's networks
    empty = True
    for batch in tqdm(loader, desc=name, leave=False, disable=None):
        empty, named = False, isinstance(batch, dict)
        pixels, labels = (batch["pixel_values"], batch["labels"]) if named else batch[:2]
        maps = body.forward_features(pixels.to(head.weight.device))
        h, logits = body.forward_head(maps, pre_logits=True), body.forward_head(maps)
        linear = h.dim() == 2 and torch.allclose(head(h), logits, 1e-3, 1e-3, equal_nan=True)
        if not linear:
            raise TypeError(
                f"{type(model).__name__}: expected logits that are its classifier applied to its "
                f"features {list(h.shape)}; they are not, so the gradient in that layer would be "
                "incomplete"
            )
        full = torch.float64 if logits.dtype == torch.float64 else torch.float32
        p, h = logits.to(full).softmax(-1), h.to(full)
        q = as_probs(labels.to(p.device), p.shape[1], full)
        x = h if head.bias is None else F.pad(h, (0, 1), value=1.0)
        yield _Batch(x, p - q, p, batch.get("index") if named else None)
    if empty:
        raise ValueError(f"{name} gave no batch, so there is nothing to compute")


def _mean_gradient(batches: Iterable[_Batch]) -> Tensor:
    """g_val [C, D + 1]."""
    total, count = torch.zeros(()), 0
    for x, error, _, _ in batches:
        total, count = total.to(x) + error.T @ x, count + len(x)
    return total / count


def _hessian(batches: Iterable[_Batch]) -> Tensor:
    """mean_i (diag(p_i) - p_i p_iᵀ) ⊗ x_i x_iᵀ, [C (D + 1), C (D + 1)] float64 on the CPU."""
    blocks, outer, count = torch.zeros(()), torch.zeros(()), 0
    for x, _, p, _ in batches:
        x, p = x.cpu().double(), p.cpu().double()
        px = p[:, :, None] * x[:, None]  # [B, C, D + 1]
        blocks = blocks + torch.einsum("bci,bj->cij", px, x)
        outer, count = outer + px.flatten(1).T @ px.flatten(1), count + len(x)
    return (torch.block_diag(*blocks) - outer) / count


def _by_row(rows: Tensor, scores: Tensor, size: int) -> Tensor:
    """The scores in the order of the data set [N]; inf where a row has none."""
    result = scores.new_full((max(int(rows.max()) + 1, size),), torch.inf)
    seen = torch.zeros(len(result), dtype=torch.bool)
    result[rows], seen[rows] = scores, True
    if missing := int((~seen).sum()):
        warnings.warn(
            f"{missing} of {len(result)} samples never came up; their score is inf, so they are "
            "kept last. Causes: drop_last, a subset, a sampler of one of several processes, or "
            "broken pictures",
            stacklevel=3,
        )
    return result


def _classifier(model: nn.Module) -> nn.Linear:
    body: Any = getattr(model, "timm_model", model)
    interface = ("forward_features", "forward_head", "get_classifier")
    able = all(hasattr(body, name) for name in interface)
    head = body.get_classifier() if able else None
    if not isinstance(head, nn.Linear):
        found = f"its classifier is {type(head).__name__}" if able else "it lacks them"
        raise TypeError(
            f"{type(model).__name__}: expected a linear last layer and timm's forward_features, "
            f"forward_head and get_classifier; {found}"
        )
    return head


def _refuse_exact(head: nn.Linear, damping: float) -> None:
    # Adding the same vector to each class's weights changes no prediction.
    validate.positive("damping", damping, "the Hessian by itself has no inverse")
    size = sum(p.numel() for p in head.parameters())
    if size > LARGEST:
        raise ValueError(
            f"exact=True: the last layer has {size} parameters, its Hessian {size}²; expected at "
            f"most {LARGEST}. Use the first-order scores, or a network with fewer features"
        )


def _refuse_shuffled(loader: Any) -> None:
    if isinstance(getattr(loader, "sampler", None), RandomSampler | DistributedSampler):
        raise ValueError(
            "train_loader shuffles or distributes the data and gives no index: no score could be "
            "assigned to its sample. Use shuffle=False, or batches with 'index'"
        )
