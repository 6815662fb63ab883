"""Parts of a view: torch's `Subset` and `random_split` keep what the view knows."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from .feature_cache import FeatureView
from .image_view import ImageView
from .teacher_cache import TeacherCache


class SubsetView(Subset):
    """Some rows of a view. Items are those of the view, with their `index` there.

    `labels` and `clean_labels` are those of the rows; all else (`class_names`, `set_epoch`,
    `broken`, ...) is the view's.

    Args:
        view: an `ImageView`, the data of `cache_teachers` or `cache_features`, or a
            `SubsetView`.
        indices: positions in `view`.
    """

    def __init__(self, view: Any, indices: Any) -> None:
        super().__init__(view, indices)
        rows = np.asarray(indices, np.int64)
        self.labels: np.ndarray = view.labels[rows]
        self.clean_labels = None if view.clean_labels is None else view.clean_labels[rows]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "dataset":  # `dataset` is not there while unpickling
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.dataset, name)


def as_view(dataset: Any) -> Any:
    """A `Subset` of a view as a `SubsetView`; anything else as it is.

    Raises:
        ValueError: a `ConcatDataset` of views: rows of different views share an `index`.
    """
    if isinstance(dataset, ConcatDataset):
        if any(_is_view(as_view(part)) for part in dataset.datasets):
            raise ValueError(
                "ConcatDataset joins views whose rows have the same index, so losses with a table "
                "per sample and training dynamics would mix their samples. Join the data sets "
                "below one view instead: ImageView(datasets.concatenate_datasets([a, b]), ...)"
            )
    elif isinstance(dataset, Subset) and not isinstance(dataset, SubsetView):
        view = as_view(dataset.dataset)
        return SubsetView(view, dataset.indices) if _is_view(view) else dataset
    return dataset


def num_samples(dataset: Any) -> int | None:
    """How many rows an `index` of this data set can name: for a subset, those of the whole view.

    None for a stream, whose length is unknown.
    """
    known = getattr(as_view(dataset), "num_samples", None)
    return known if known is not None or not hasattr(dataset, "__len__") else len(dataset)


def set_epoch(dataset: Any, epoch: int) -> None:
    """Call `set_epoch` of a data set, or of the views that it holds: augmentation depends on it."""
    view = as_view(dataset)
    if hasattr(view, "set_epoch"):
        view.set_epoch(epoch)
        return
    for part in vars(view).values() if hasattr(view, "__dict__") else ():
        if _is_view(part) or isinstance(part, Subset):
            set_epoch(part, epoch)


def _is_view(dataset: Any) -> bool:
    return isinstance(dataset, ImageView | TeacherCache | FeatureView | SubsetView)
