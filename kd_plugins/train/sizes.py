"""The sizes of data and networks, told to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..data import num_samples
from ..losses.base import Loss
from ..models.factory import class_count
from ..models.features import feature_dims


def bind_sizes(
    loss: Loss, peers: Sequence[nn.Module], teachers: Sequence[nn.Module] = (), data: Any = None
) -> None:
    """``loss.bind`` with the rows of the training data and with what the networks say.

    Args:
        loss: gets its open sizes.
        peers: the networks that learn.
        teachers: the networks whose features the loss reads.
        data: the training data, or their number of rows.
    """
    counts = [count for peer in peers if (count := class_count(peer))]
    reads = loss.required_inputs
    taught = peers if loss.ema_decay is not None else teachers  # the peers' averages over time
    loss.bind(
        num_samples=data if isinstance(data, int) else num_samples(data),
        num_classes=counts[0] if counts else num_classes_of(data),
        feature_dims=[feature_dims(p) for p in peers] if "features" in reads else None,
        teacher_feature_dims=(
            [feature_dims(t) for t in taught] if "teacher_features" in reads else None
        ),
    )


def num_classes_of(data: Any) -> int | None:
    """The classes that a view says it has, or the ClassLabel of a ``datasets.Dataset``."""
    if (count := getattr(data, "num_classes", None)) is not None:
        return count
    features = getattr(data, "features", None) or {}
    labels = [features[name] for name in ("labels", "label") if name in features]
    return next((n for f in labels if (n := getattr(f, "num_classes", None))), None)
