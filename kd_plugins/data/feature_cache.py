"""Features of a frozen backbone, computed once, and a view over them for training heads.

>>> train = cache_features(train, "efficientnet_b0", "runs/features/train")  # doctest: +SKIP
>>> head = feature_head(train.features.shape[1], train.num_classes)  # doctest: +SKIP
>>> MutualDistillationTrainer(head, MyLC(), args, train_dataset=train).train()  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import timm
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..models.factory import logits_of
from ..models.features import has_features
from .image_view import ImageView
from .labels import check_labels, class_indices, numbered_classes
from .network_outputs import network_outputs


class FeatureView(torch.utils.data.Dataset):
    """Features and labels for training heads; made by `cache_features`, or from any array.

    Item i is {"pixel_values": features [D], "labels": int, "index": int}, and "clean_labels": int
    if there are any. The features go by the name of a network's input, so that the Trainer, the
    callbacks and `predict_probs` take them as they take pictures.

    Args:
        features: floats [N, D], in memory or as a memory map.
        labels: class indices [N] to train on.
        clean_labels: true labels [N], if there are any; -1 there means none of the classes.
        class_names: in the order of the class indices; numbers by default.
        index: the row [N] that each row stands for; 0 to N - 1 by default.

    Attributes:
        stand_in: True [N] where `cache_features` could not read the picture, so that features,
            labels and index are those of the next one.

    Raises:
        ValueError: lengths that differ, or a label outside the classes.
    """

    def __init__(
        self,
        features: np.ndarray | Tensor,
        labels: ArrayLike,
        clean_labels: ArrayLike | None = None,
        class_names: Sequence[str] | None = None,
        index: ArrayLike | None = None,
    ) -> None:
        self.features = features.numpy() if isinstance(features, Tensor) else features
        if self.features.ndim != 2 or self.features.dtype.kind != "f":
            raise ValueError(
                f"features: expected floats [N, D], got {self.features.dtype} "
                f"{list(self.features.shape)}"
            )
        self.labels = self._checked("labels", labels)
        self.class_names = list(class_names or numbered_classes(self.labels))
        self.num_classes = len(self.class_names)
        check_labels(self.labels, self.num_classes)
        self.clean_labels = None
        if clean_labels is not None:
            self.clean_labels = self._checked("clean_labels", clean_labels)
            check_labels(self.clean_labels, self.num_classes, "clean_labels", -1)
        self.index = self._checked("index", np.arange(len(self)) if index is None else index)
        self.stand_in = np.zeros(len(self), bool)
        self.name: str | None = None  # for cards

    def _checked(self, name: str, values: ArrayLike) -> np.ndarray:
        array = class_indices(values, name)
        if array.shape != (len(self),):
            raise ValueError(f"{name} have the shape {array.shape}, and there are {len(self)} rows")
        return array

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_samples(self) -> int:
        """The number of rows that an item's `index` can name."""
        return max(len(self), int(self.index.max()) + 1)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of {len(self)}")
        chosen = np.asarray(rows, int)  # one read for a batch: row by row takes twice as long
        columns = {
            "pixel_values": torch.from_numpy(self.features[chosen].astype(np.float32, copy=False)),
            "labels": self.labels[chosen].tolist(),
            "index": self.index[chosen].tolist(),
        }
        if self.clean_labels is not None:
            columns["clean_labels"] = self.clean_labels[chosen].tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def with_labels(self, labels: ArrayLike, clean_labels: ArrayLike | None = None) -> Self:
        """The same features with other labels [N]; the true ones stay unless they are given.

        Where a picture could not be read, those of the next one are taken.
        """
        source = np.where(self.stand_in, self.index, np.arange(len(self)))
        given = self._checked("labels", labels)[source]
        clean = self.clean_labels
        if clean_labels is not None:
            clean = self._checked("clean_labels", clean_labels)[source]
        view = type(self)(self.features, given, clean, self.class_names, self.index)
        view.stand_in, view.name = self.stand_in, self.name
        return view


def cache_features(
    view: ImageView,
    network: str | nn.Module,
    folder: str | os.PathLike,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
) -> FeatureView:
    """The pooled features [N, D] of a frozen network, as a view over a file in `folder`.

    They are computed once. The file belongs to these pictures in this order, this transform, this
    network and this dtype: a folder with anything else is refused. Labels may differ. What was
    computed before a kill is kept. The file takes N * D * 4 bytes: 256 MB for 50,000 pictures and
    1,280 features.

    The network runs in eval mode, without gradients, on the device where it is. On several
    processes each computes its share.

    Args:
        view: the pictures, without random augmentation, normalised for the network (or bytes).
        network: a timm name, whose pretrained weights are loaded; a timm network, whose classifier
            is left out; or any module from pixels to [B, D].
        folder: for this cache alone; created if needed.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        dtype: the dtype of autocast, such as `torch.bfloat16`; by default there is no autocast.

    Raises:
        ValueError: a random transform, or a folder with other features; the error says which.
        OSError: the folder cannot be written, or has too little space.

    Notes:
        A picture that cannot be read has the features, the label and the index of the next
        readable one, as in `ImageView`.
    """
    if isinstance(network, str):
        network = timm.create_model(network, pretrained=True, num_classes=0)
    files = network_outputs(
        view,
        [network],
        folder,
        "feature",
        pooled_features,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
    )
    source = _source(np.load(files.done) == 2)
    clean = None if view.clean_labels is None else view.clean_labels[source]
    features = np.load(files.values, mmap_mode="r")
    made = FeatureView(features, view.labels[source], clean, view.class_names, source)
    made.stand_in = source != np.arange(len(source))
    made.name = view.name
    return made


def pooled_features(network: nn.Module, pixels: Tensor) -> Tensor:
    """What a network's classifier reads [B, D]; the output itself if it is no timm network."""
    if not has_features(network):
        return logits_of(network(pixels))
    body: Any = getattr(network, "timm_model", network)
    return body.forward_head(body.forward_features(pixels), pre_logits=True)


def _source(replaced: np.ndarray) -> np.ndarray:
    """For each row the next one, cyclically, that could be read [N]."""
    rows = np.arange(len(replaced))
    read = rows[~replaced]
    return read[np.searchsorted(read, rows) % len(read)]
