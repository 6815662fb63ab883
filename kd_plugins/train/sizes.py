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
    student = [feature_dims(peer) for peer in peers] if "features" in reads else None
    taught = [feature_dims(t) for t in teachers] if "teacher_features" in reads else None
    loss.bind(
        num_samples=data if isinstance(data, int) else num_samples(data),
        num_classes=counts[0] if counts else getattr(data, "num_classes", None),
        feature_dims=student,
        teacher_feature_dims=taught,
    )
