"""The sizes of data and networks, told to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..losses.base import Loss
from ..models.factory import class_count
from ..models.features import feature_dims


def bind_sizes(
    loss: Loss, peers: Sequence[nn.Module], teachers: Sequence[nn.Module] = (), data: Any = None
) -> None:
    """``loss.bind`` with the rows of the training data and with what the networks say."""
    counts = [count for peer in peers if (count := class_count(peer))]
    reads = loss.required_inputs
    loss.bind(
        num_samples=len(data) if hasattr(data, "__len__") else None,
        num_classes=counts[0] if counts else getattr(data, "num_classes", None),
        feature_dims=[feature_dims(p) for p in peers] if "features" in reads else None,
        teacher_feature_dims=(
            [feature_dims(t) for t in teachers] if "teacher_features" in reads else None
        ),
    )
