"""Data Selection: a term on some of the training samples, chosen once before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from .base import Loss, LossArguments
from .mutual import NORMALIZE
from .state import SampleTable


class Selected(Loss):
    """L = mean_i m_i L_i: a term on the samples that a mask m [N] over the training data keeps; the rest of it costs nothing.

    The objective of Data Selection supervises all samples and distils on the kept ones: with ``mask`` from
    :func:`kd_plugins.data.select_lowest`, ``l1 * CE() + l2 * Selected(mask, LabelRevision())``. The term sees the whole batch
    (its state, and what it computes over the batch, do not depend on the mask). The mask is in the checkpoint, whose mask wins.

    Source: Lan et al., "Improve knowledge distillation via label revision and data selection", IEEE TCDS 2025
    (arXiv 2404.03693), its split of the data; the text could be read in part only.
    Unsaid there: whether the distillation is a mean over the batch or over the kept part; here over the batch, so that a mask
    that keeps everything is the term alone.

    Args:
        mask: [N] booleans, one for each row of the training data; the same on all processes. ``index`` counts in them.
        term: the loss for the kept samples, one number per sample, whatever it reads.
        normalize: ``"batch"``, or ``"selected"`` for a mean over the kept samples of the batch (which depends on how a batch
            is cut over processes and accumulation steps; a batch without any is 0).
        **base: see :class:`Loss`; as in the term if not given.

    >>> from kd_plugins import CE
    >>> loss = Selected([True, False, False], CE())
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]), index=torch.tensor([2, 0])), loss.stats["kept"]
    (tensor(0.3466), tensor(0.5000))
    """

    def __init__(
        self,
        mask: Tensor | Sequence[bool],
        term: Loss,
        *,
        normalize: str = "batch",
        **base: Unpack[LossArguments],
    ) -> None:
        if not isinstance(term, Loss):
            raise TypeError(
                f"term: expected a loss for the kept samples, got {type(term).__name__}"
            )
        mask = torch.as_tensor(mask)
        if mask.dim() != 1 or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected a boolean for each training sample, [N], got {mask.dtype} {list(mask.shape)}; "
                "numbers would be taken for weights, or for positions"
            )
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize={normalize!r}: expected one of {NORMALIZE}")
        super().__init__(**{"num_classes": term.num_classes, "reduction": term.reduction} | base)
        self.normalize, self.term = normalize, term
        self.mask = SampleTable(len(mask), fill=False, dtype=torch.bool)
        self.mask.rows.copy_(mask)
        self.num_peers, self.layers = term.num_peers, term.layers
        self.ema_decay = term.ema_decay
        self.required_inputs = term.required_inputs | {"index"}

    def per_sample(self, logits: Any, target: Tensor, **extra: Any) -> Tensor:
        losses = self.term.run(logits, target, **extra)
        if losses.dim() == 0:
            raise TypeError(
                f"{type(self.term).__name__} is a loss on the whole batch: it has no value for the kept samples alone"
            )
        kept = self.mask.read(extra["index"]).to(losses.dtype)
        self.collect(self.term)
        self.log("kept", kept)
        if self.normalize == "selected":  # times B, since the batch mean will divide by it
            kept = kept * (len(kept) / kept.sum().clamp_min(1.0))
        return kept * losses
