"""Hugging Face data sets with a column of noisy labels; no picture is copied."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import ArrayLike

from .labels import check_labels, class_indices, class_names, column_array, label_column
from .noise import as_transition, corrupt_by_key, corrupt_in_place


def noisy_view(
    dataset: Dataset,
    noise: ArrayLike | str,
    *,
    seed: int = 0,
    exact: bool = True,
    label: str = "label",
    noisy: str = "noisy_label",
) -> Dataset:
    """`dataset` with one more column `noisy`, of the same feature as `label`.

    The clean labels stay. No picture is copied, also after `shuffle`, `select` and `split`.

    Args:
        noise: a transition matrix [C, C]; or the noisy labels, integers [N]; or the name of a
            column with them (human annotations such as CIFAR-N). If both columns name their
            classes, the labels are matched by name.
        seed, exact: see `corrupt`; unused if the labels are given. Equal noise gives an equal
            fingerprint.

    Raises:
        TypeError: `dataset` is not a `Dataset`.
        ValueError: labels outside the classes, other class names, or a column that exists already.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"noisy_view needs a datasets.Dataset, got {type(dataset).__name__}; noisy_stream "
            "takes streams"
        )
    _refuse_existing(noisy, dataset.column_names)
    given = _noisy_labels(dataset, noise, label, seed, exact)
    feature = dataset.features[label]
    # The same noise gives the same fingerprint. `datasets` would make one by pickling the column
    # twice: 40 MB at 2.4M rows.
    digest = blake2b(f"{dataset._fingerprint}/{label}/{noisy}/".encode(), digest_size=8)
    digest.update(given.data)
    add = {"name": noisy, "feature": feature, "new_fingerprint": digest.hexdigest()}
    if dataset._indices is None:
        return dataset.add_column(column=given, **add)
    return _add_below(dataset, given, label, add)


def _noisy_labels(
    dataset: Dataset, noise: ArrayLike | str, label: str, seed: int, exact: bool
) -> np.ndarray:
    """Labels [N] in memory of their own: Arrow would otherwise keep looking at the caller's."""
    clean, names = column_array(dataset, label), getattr(dataset.features[label], "names", None)
    if not isinstance(noise, str) and np.ndim(noise) == 2:
        if names is not None and len(names) != len(noise):  # type: ignore[arg-type]
            raise ValueError(
                f"transition is {np.shape(noise)}, but column {label!r} has {len(names)} classes."
            )
        labels = np.require(clean, requirements="W")  # a copy only where Arrow owns the memory
        return corrupt_in_place(labels, noise, seed, exact)
    column = noise if isinstance(noise, str) else None
    given = np.array(
        class_indices(noise)
        if column is None
        else label_column(dataset, column, class_names(dataset, label))
    )
    if given.shape != (len(dataset),):
        raise ValueError(
            f"Given labels have shape {given.shape}, the data set has {len(dataset)} rows."
        )
    check_labels(given, None if names is None else len(names), column)
    return given


def _add_below(dataset: Dataset, given: np.ndarray, label: str, add: dict[str, Any]) -> Dataset:
    """Add a column to a data set whose rows are mapped (shuffled, selected, split).

    `add_column` would rewrite all rows: 87 s and every byte for 2.4M of them. So the column goes
    into the table below, in the order there, and the mapping is kept. Rows out of view keep their
    clean label.
    """
    indices: Any = dataset._indices
    rows = indices.column(0).to_numpy()
    below = Dataset(
        dataset.data, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint
    )
    column = np.array(column_array(below, label))
    column[rows] = given
    if (column[rows] != given).any():
        raise ValueError(
            "a row is selected twice and got two labels: add the noise before selecting rows "
            "repeatedly"
        )
    below = below.add_column(column=column, **add)
    view = Dataset(
        below.data,
        info=below.info,
        split=below.split,
        indices_table=indices,
        fingerprint=below._fingerprint,
    )
    form = dataset.format
    columns = form["columns"] if set(form["columns"]) != set(dataset.column_names) else None
    return view.with_format(
        form["type"], columns, form["output_all_columns"], **form["format_kwargs"]
    )


def noisy_stream(
    dataset: IterableDataset,
    transition: ArrayLike,
    *,
    seed: int = 0,
    key: str = "__key__",
    label: str = "label",
    noisy: str = "noisy_label",
) -> IterableDataset:
    """A streaming data set with one more column `noisy`: `corrupt_by_key` of `key` and `label`."""
    matrix = as_transition(transition)  # an error now, and not at the first batch
    features = dataset.features
    if features is not None:
        for name in (key, label):
            if name not in features:
                raise ValueError(f"no column {name!r}; there are {sorted(features)}")
        _refuse_existing(noisy, features)
        features = features.copy()
        features[noisy] = features[label]

    def add(batch: dict[str, list]) -> dict[str, np.ndarray]:
        _refuse_existing(noisy, batch)
        return {noisy: corrupt_by_key(batch[key], batch[label], matrix, seed)}

    return dataset.map(add, batched=True, features=features)


def _refuse_existing(name: str, columns: Any) -> None:
    if name in columns:
        raise ValueError(
            f"Column {name!r} exists already; noise would replace its labels. Name another one."
        )
