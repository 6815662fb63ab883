"""The sizes of data and networks, told to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from torch import nn

from ..data import num_samples
from ..data.labels import column_array
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
        num_rows=len(data) if hasattr(data, "__len__") else None,
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
    features, name = getattr(data, "features", None), _label_column(data)
    return features[name].num_classes if features and name else None


def labels_of(data: Any) -> np.ndarray | None:
    """Class indices [N] of a view, or of the ClassLabel column of a ``datasets.Dataset``."""
    if (labels := getattr(data, "labels", None)) is not None:
        return np.asarray(labels, np.int64)
    name = _label_column(data)
    return column_array(data, name) if name and isinstance(data, Dataset) else None


def _label_column(data: Any) -> str | None:
    features = getattr(data, "features", None) or {}
    return next((n for n in ("labels", "label") if isinstance(features.get(n), ClassLabel)), None)
