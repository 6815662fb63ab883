"""Data Selection: which training samples to distil on, from their influence on the loss of held-out ones.

>>> scores = influence_scores(teacher, train_loader, held_out_loader)  # doctest: +SKIP
>>> loss = CE() + Selected(select_lowest(scores, 0.8), LabelRevision())  # doctest: +SKIP

Scores may come from anywhere else: :func:`select_lowest` takes any numbers [N].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler, RandomSampler

from ..losses.functional import as_probs
from ..losses.state import in_eval

LARGEST = 4096  # numbers in a last layer whose Hessian is still formed: 134 MB


def influence_scores(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    exact: bool = False,
    damping: float = 5e-4,
) -> Tensor:
    """Influence of each training sample on the held-out cross-entropy: -g_val · g_i, or -g_valᵀ (H + damping)⁻¹ g_i -> [N].

    g_i = (p_i - q_i) ⊗ [h_i, 1] is the gradient of H(q_i, p_i) in the last linear layer, h_i the features before it, g_val the
    mean of them over the held-out samples and H the mean Hessian over the training samples: no backward pass. LOW is helpful:
    below 0, more weight on sample i lowers the held-out loss; above 0, as wrong labels often are, it raises it. Without sample i
    the held-out loss changes by about -score / N in the exact form.

    Source: Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017, the exact form; used for
    Data Selection, after Lan et al., "Improve knowledge distillation via label revision and data selection", IEEE TCDS 2025
    (arXiv 2404.03693).
    Unsaid there: which influence function Lan et al. use, of which network and which loss, could not be confirmed. The last
    layer, to first order, of the teacher and in plain cross-entropy is ours.

    Every process goes over all it is given, so all come to the same scores; a sampler that deals the data out would leave gaps.
    Where rounding may differ between them, give the scores of one to all: the masks made from them must be the same.

    Args:
        model: a timm network with one linear classifier, trained; it is put into eval mode and back.
        train_loader: batches ``(pixels, labels, ...)`` in the order of the data set, or dictionaries with ``pixel_values``,
            ``labels`` and ``index`` (the row of the data set) in any order. As in evaluation: no augmentation, no Mixup.
        val_loader: the same of held-out samples, whose labels should be clean.
        exact: with the Hessian, of a last layer of at most 4096 numbers; goes over the training samples twice.
        damping: on the diagonal of H, which has no inverse by itself: the weight decay that the layer was trained with.

    Returns:
        float32 (float64 for a network in it) on the CPU. A row of the data set that never came up has inf, with a warning.
    """
    head = _classifier(model)
    if exact and not damping > 0:
        raise ValueError(
            f"damping={damping}: expected a number above 0; the same vector added to each class's weights changes "
            "no prediction, so the Hessian by itself has no inverse"
        )
    size = sum(p.numel() for p in head.parameters())
    if exact and size > LARGEST:
        raise ValueError(
            f"exact=True: the last layer has {size} numbers, its Hessian {size}²; expected at most {LARGEST}. "
            "Use the first-order scores, or a network with fewer features"
        )
    with in_eval(model):
        direction, count = torch.zeros((), device=head.weight.device), 0
        for x, p, q, _ in _last_layer(model, head, val_loader, "held-out gradient"):
            direction, count = direction + (p - q).T @ x, count + len(x)
        if not count:
            raise ValueError(
                "val_loader gave no batch: without held-out samples there is nothing to influence"
            )
        direction = direction / count  # g_val [C, D + 1]
        if exact:
            hessian = _hessian(model, head, train_loader)
            hessian.diagonal().add_(damping)
            solved = torch.linalg.solve(hessian, direction.flatten().to(hessian))
            direction = solved.view_as(direction).to(direction)

        rows, scores, count = [], [], 0
        for x, p, q, index in _last_layer(model, head, train_loader, "influence"):
            if index is None:
                index = torch.arange(count, count + len(x))
                if isinstance(
                    getattr(train_loader, "sampler", None), RandomSampler | DistributedSampler
                ):
                    raise ValueError(
                        "train_loader shuffles or deals out the data and gives no index: no score could be put to "
                        "its sample. Use shuffle=False, or batches with 'index'"
                    )
            rows.append(index.cpu())
            scores.append(-((p - q) @ direction * x).sum(1).cpu())
            count += len(x)
    if not rows:
        raise ValueError("train_loader gave no batch: there is nothing to score")
    dataset: Any = getattr(train_loader, "dataset", None)
    row, score = torch.cat(rows), torch.cat(scores)
    number = max(int(row.max()) + 1, len(dataset) if hasattr(dataset, "__len__") else 0)
    result, seen = score.new_full((number,), torch.inf), torch.zeros(number, dtype=torch.bool)
    result[row], seen[row] = score, True
    if missing := int((~seen).sum()):
        warnings.warn(
            f"{missing} of {number} samples never came up and are scored inf, kept last: drop_last, a part of the data "
            "set, a sampler for one of several processes, or broken pictures",
            stacklevel=2,
        )
    return result


def select_lowest(scores: Tensor | Sequence[float], fraction: float) -> Tensor:
    """The mask [N] of the round(fraction · N) samples with the lowest scores [N]; of equal ones, the first in the data set.

    Lan et al. keep the most helpful samples; which fraction could not be confirmed.

    >>> select_lowest([0.3, -1.0, 0.3, 2.0], 0.5)
    tensor([ True,  True, False, False])
    """
    scores = torch.as_tensor(scores).detach()
    if scores.dim() != 1 or not len(scores):
        raise ValueError(
            f"scores: expected one number for each sample, [N], got {list(scores.shape)}"
        )
    if unknown := int(scores.isnan().sum()):
        raise ValueError(
            f"{unknown} of {len(scores)} scores are NaN, the first at position {int(scores.isnan().int().argmax())}: "
            "they have no order"
        )
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"fraction={fraction}: expected the share of the samples to keep, in (0, 1]"
        )
    kept = round(fraction * len(scores))
    if not kept:
        raise ValueError(
            f"fraction={fraction} of {len(scores)} samples is none: nothing would be distilled"
        )
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.argsort(stable=True)[:kept]] = True
    return mask


def _classifier(model: nn.Module) -> nn.Linear:
    body: Any = getattr(model, "timm_model", model)  # as transformers wraps it
    able = all(
        hasattr(body, name) for name in ("forward_features", "forward_head", "get_classifier")
    )
    head = body.get_classifier() if able else None
    if not isinstance(head, nn.Linear):
        found = f"its classifier is {type(head).__name__}" if able else "it lacks them"
        raise TypeError(
            f"{type(model).__name__}: influence is computed in the last linear layer of a network with timm's "
            f"forward_features, forward_head and get_classifier; {found}"
        )
    return head


def _last_layer(
    model: nn.Module, head: nn.Linear, loader: Iterable[Any], desc: str
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """For each batch: x = [h, 1] [B, D + 1] (h alone if there is no bias), p [B, C], q [B, C], and the rows [B] if given."""
    from tqdm.auto import tqdm

    body: Any = getattr(model, "timm_model", model)
    for batch in tqdm(loader, desc=desc, leave=False, disable=None):  # None: on a terminal only
        named = isinstance(batch, dict)
        pixels, labels = (batch["pixel_values"], batch["labels"]) if named else batch[:2]
        last = body.forward_features(pixels.to(head.weight.device))
        h, logits = body.forward_head(last, pre_logits=True), body.forward_head(last)
        if h.dim() != 2 or not torch.allclose(
            head(h), logits, rtol=1e-3, atol=1e-3, equal_nan=True
        ):
            raise TypeError(
                f"{type(model).__name__}: its logits are more than its classifier applied to its features "
                f"{list(h.shape)}, so their gradient in that layer is not all there is"
            )
        full = torch.float64 if logits.dtype == torch.float64 else torch.float32
        p, h = logits.to(full).softmax(-1), h.to(full)
        q = as_probs(labels.to(p.device), p.shape[1], full)
        yield (
            (h if head.bias is None else F.pad(h, (0, 1), value=1.0)),
            p,
            q,
            batch.get("index") if named else None,
        )


def _hessian(model: nn.Module, head: nn.Linear, loader: Iterable[Any]) -> Tensor:
    """mean_i (diag(p_i) - p_i p_iᵀ) ⊗ x_i x_iᵀ, [C (D + 1), C (D + 1)] in float64 on the CPU; class by class, as a weight lies."""
    blocks, outer, count = torch.zeros(()), torch.zeros(()), 0
    for x, p, _, _ in _last_layer(model, head, loader, "Hessian"):
        x, p = x.cpu().double(), p.cpu().double()
        px = p[:, :, None] * x[:, None]  # [B, C, D + 1]
        blocks = blocks + torch.einsum("bci,bj->cij", px, x)
        outer, count = outer + px.flatten(1).T @ px.flatten(1), count + len(x)
    if not count:
        raise ValueError("train_loader gave no batch: there is nothing to score")
    return (torch.block_diag(*blocks) - outer) / count
