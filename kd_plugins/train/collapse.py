"""Notice networks that have collapsed: certain of a few classes, whatever they are shown."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..losses.base import peer_name
from ..losses.functional import Prediction
from ..losses.functional import entropy as entropy_of
from ..models.hosted import PeerModule

logger = logging.get_logger(__name__)

CERTAIN = 0.9  # mean certainty from which a network counts as certain
FEW = 0.5  # share of the classes of the labels below which it counts as collapsed


class CollapseCallback(TrainerCallback):
    """Warn, once in a training, when a network predicts a few classes only and is certain of them.

    At each log it looks at the last batch. MutualDistillationTrainer has this callback.
    """

    def __init__(self) -> None:
        self.said = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.said = False

    def on_log(self, args, state, control, model=None, **kwargs):
        hosted = extract_model_from_parallel(model)
        last = hosted.last if isinstance(hosted, PeerModule) else {}
        if self.said or not last or not state.is_world_process_zero:
            return
        for k, logits in enumerate(last["logits"]):
            figures = collapse(logits, last["labels"])
            if figures is not None:
                self.said = True
                logger.warning(
                    f"network {peer_name(k)} has collapsed at step {state.global_step}: in the "
                    f"last batch it predicts {figures[0]:.1f} classes where the labels have "
                    f"{figures[1]:.1f}, and is certain of them ({figures[2]:.0%}). It will hardly "
                    "recover. Lower the learning rate; a mutual loss also by normalize='batch', a "
                    "larger eta, or a first epoch with cross-entropy alone"
                )
                return


@torch.no_grad()
def collapse(logits: Tensor, labels: Tensor) -> tuple[float, float, float] | None:
    """What shows that a network has collapsed on a batch; None if it has not.

    Returns:
        exp H of the mean prediction, exp H of the mean label (both a number of classes), and the
        mean certainty 1 - H(p) / ln C.
    """
    pred: Any = Prediction.of(logits)
    labels = labels if labels.dim() == 2 else _onehot(labels, logits.shape[-1])
    predicted, given = (_classes(x) for x in (pred.p.mean(0), labels.to(pred.p.dtype).mean(0)))
    certain = float(pred.certainty.mean())
    few = certain > CERTAIN and predicted < FEW * given and given > 2
    return (predicted, given, certain) if few else None


def _classes(distribution: Tensor) -> float:
    """exp H: 3 for a uniform distribution over three classes."""
    return float(entropy_of(distribution.log()).exp())


def _onehot(labels: Tensor, num_classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels.long(), num_classes)
