"""Data Selection: a term on some of the training samples, chosen once before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from . import validate
from .base import Loss, LossArguments
from .mutual import NORMALIZE
from .state import SampleTable


class MaskedLoss(Loss):
    """L = mean_i m_i L_i: a term on the samples that a mask m [N] over the training data keeps.

    The objective of Data Selection supervises all samples and distils on the kept ones: with
    ``mask`` from :func:`kd_plugins.audit.select_lowest`,
    ``l1 * CE() + l2 * MaskedLoss(mask, LabelRevision())``. The term sees the whole batch, so its
    state does not depend on the mask. The mask is in the checkpoint, whose mask wins.

    Args:
        mask: [N] booleans, one per row of the training data, the same on all processes. ``index``
            counts in them.
        term: the loss for the kept samples, one number per sample, whatever it reads.
        normalize: ``"batch"``, or ``"selected"`` for a mean over the kept samples of the batch.
            That depends on how a batch is cut over processes and accumulation steps; without a kept
            sample it is 0.
        **base: see :class:`Loss`; as in the term if not given.

    References:
        Lan et al., "Improve knowledge distillation via label revision and data selection", IEEE
        TCDS 2025 (arXiv 2404.03693), its split of the data. The text could be read in part only.

    Notes:
        The paper does not say whether the distillation is a mean over the batch or over the kept
        part. Here it is over the batch, so that a mask that keeps everything is the term alone.

    >>> from kd_plugins import CE
    >>> loss = MaskedLoss([True, False, False], CE())
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]), index=torch.tensor([2, 0]))
    tensor(0.3466)
    >>> loss.stats["kept"]
    tensor(0.5000)
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
                f"mask: expected a boolean per training sample, [N], got {mask.dtype} "
                f"{list(mask.shape)}; numbers would be taken for weights, or for positions"
            )
        base.setdefault("num_classes", term.num_classes)
        base.setdefault("reduction", term.reduction)
        super().__init__(**base)
        self.normalize = validate.one_of("normalize", normalize, NORMALIZE)
        self.term, self.num_samples = term, len(mask)
        self.mask = SampleTable(len(mask), fill=False, dtype=torch.bool)
        self.mask.rows.copy_(mask)
        self.required_inputs = term.required_inputs | {"index"}
        self.num_peers, self.layers = term.num_peers, term.layers
        self.ema_decay, self.any_precision = term.ema_decay, term.any_precision

    def per_sample(self, logits: Any, target: Tensor, **inputs: Any) -> Tensor:
        losses = self.term.run(logits, target, **inputs)
        if losses.dim() == 0:
            raise TypeError(
                f"{type(self.term).__name__} is one number for the whole batch: it has no value "
                "for the kept samples alone"
            )
        self.collect(self.term)
        kept = self.mask.read(inputs["index"]).to(losses.dtype)
        self.log("kept", kept)
        if self.normalize == "selected":  # the batch mean will divide by B
            kept = kept * (len(kept) / kept.sum().clamp_min(1.0))
        return kept * losses
