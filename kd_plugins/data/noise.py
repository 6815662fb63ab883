"""Label noise: every noise is a transition matrix T [C, C] with T[i, j] = P(given label j | true label i).

Source: symmetric over the other classes and pair flip as in SMKD and Co-teaching; symmetric over all classes as in
Tanaka et al. (CVPR 2018); circular within superclasses as in the CIFAR-100 experiments of Patrini et al. (CVPR 2017).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset


def symmetric(num_classes: int, rate: float, include_self: bool = False) -> np.ndarray:
    """T[i, i] = 1 - rate, the rest uniform over the other C - 1 classes -> [C, C].

    With `include_self` the new label is uniform over all C classes, so only rate (C - 1) / C of the labels are wrong.
    """
    _check(num_classes, rate)
    share = rate / (num_classes if include_self else num_classes - 1)
    matrix = np.full((num_classes, num_classes), share)
    np.fill_diagonal(matrix, 1 - rate + (share if include_self else 0.0))
    return matrix


def pair_flip(num_classes: int, rate: float) -> np.ndarray:
    """T[i, i] = 1 - rate, T[i, (i + 1) mod C] = rate -> [C, C]."""
    return asymmetric(num_classes, rate, {i: (i + 1) % num_classes for i in range(num_classes)})


def asymmetric(num_classes: int, rate: float, class_map: Mapping[int, int]) -> np.ndarray:
    """T[i, class_map[i]] = rate, T[i, i] = 1 - rate; a class that is not in `class_map` stays clean -> [C, C]."""
    _check(num_classes, rate)
    matrix = np.eye(num_classes)
    for source, target in class_map.items():
        if not (0 <= source < num_classes and 0 <= target < num_classes):
            raise ValueError(
                f"class_map has {source} -> {target}, but classes go from 0 to {num_classes - 1}."
            )
        matrix[source, source] -= rate
        matrix[source, target] += rate
    return matrix


def circular(superclasses: Sequence[int], rate: float) -> np.ndarray:
    """Each class flips to the next one of its own superclass, cyclically -> [C, C].

    Args:
        superclasses: the superclass of each of the C classes. A superclass with a single class stays clean.
        rate: P(flip), in [0, 1].
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(superclasses):
        members.setdefault(group, []).append(i)
    class_map = {
        i: group[(k + 1) % len(group)] for group in members.values() for k, i in enumerate(group)
    }
    return asymmetric(len(superclasses), rate, class_map)


def corrupt(labels, transition, seed: int = 0, exact: bool = True) -> np.ndarray:
    """Noisy copy of `labels` [N] under `transition` [C, C] -> int64 [N].

    exact=True: round(sum_i N_i (1 - T_ii)) samples change, spread over the classes by largest remainder, drawn without
    replacement within a class, their new labels from the off-diagonal row. exact=False: every sample is drawn
    independently, so that the realised rate fluctuates.
    """
    return _corrupt_(np.array(_integers(labels)), transition, seed, exact)


def corrupt_by_key(keys, labels, transition, seed: int = 0) -> np.ndarray:
    """Noisy labels as a pure function of (seed, key, label) -> int64 [N]: any order, shard or worker gives the same.

    u = blake2b(seed, key) / 2^32 goes through the inverse CDF of row `label`. Keys are str, bytes or int; equal keys
    share their u, so they should be unique. The same call serves streams (`noisy_stream`) and tables (`noisy_view`).
    """
    matrix, labels = _transition(transition), _integers(labels)
    _check_labels(labels, len(matrix))
    if len(keys) != len(labels):
        raise ValueError(f"{len(keys)} keys for {len(labels)} labels: expected one key per label.")
    prefix = blake2b(str(int(seed)).encode(), digest_size=4, person=b"kd_plugins.noise")
    u = np.empty(len(labels))
    for n, key in enumerate(keys):
        state = prefix.copy()  # the seed is hashed once
        state.update(b"/" + (key if isinstance(key, bytes) else str(key).encode()))
        u[n] = int.from_bytes(state.digest(), "little") / 2**32
    cdf = matrix.cumsum(1)
    # One search for all rows: row i of the CDF lives in [i, i + 1]. u has 32 bits, so i + u is exact.
    flat = (cdf / cdf[:, -1:] + np.arange(len(matrix))[:, None]).ravel()
    return np.searchsorted(flat, labels + u, side="right") - labels * len(matrix)


def noisy_view(
    dataset: Dataset,
    noise,
    *,
    seed: int = 0,
    exact: bool = True,
    label: str = "label",
    noisy: str = "noisy_label",
) -> Dataset:
    """`dataset` with one more column `noisy`, of the same feature as `label`; clean labels stay, no picture is copied.

    Args:
        noise: a transition matrix [C, C]; or the given labels themselves, [N] integers; or the name of a column that
            holds them (human annotations such as CIFAR-N).
        seed, exact: see `corrupt`; unused for given labels. The same noise gives the same fingerprint.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"noisy_view needs a datasets.Dataset, got {type(dataset).__name__}; streams: noisy_stream."
        )
    if noisy in dataset.column_names:
        raise ValueError(
            f"Column {noisy!r} exists already; noise on top of it would replace labels. Name another one."
        )
    clean = column_array(dataset, label)
    feature = dataset.features[label]
    num_classes = feature.num_classes if isinstance(feature, ClassLabel) else None
    if isinstance(noise, str):
        noise = column_array(dataset, noise)
    if np.ndim(noise) == 2:
        if num_classes not in (None, len(noise)):
            raise ValueError(
                f"transition is {np.shape(noise)}, but column {label!r} has {num_classes} classes."
            )
        labels = np.require(clean, np.int64, "W")  # copied only where Arrow owns the memory
        given = _corrupt_(labels, noise, seed, exact)
    else:
        given = np.array(
            _integers(noise)
        )  # a copy: Arrow would otherwise keep looking at the caller's memory
        if given.shape != (len(dataset),):
            raise ValueError(
                f"Given labels have shape {given.shape}, the data set has {len(dataset)} rows."
            )
        _check_labels(given, num_classes)
    indices = dataset._indices  # no public way tells whether rows are mapped
    # Same noise, same fingerprint. That of `datasets` would do too, but pickles the column twice: 40 MB at 2.4M rows.
    digest = blake2b(f"{dataset._fingerprint}/{label}/{noisy}/".encode(), digest_size=8)
    digest.update(given.data)
    add = {"name": noisy, "feature": feature, "new_fingerprint": digest.hexdigest()}
    if indices is None:
        return dataset.add_column(column=given, **add)
    # After shuffle/select/split, add_column would rewrite all rows (87 s and every byte for 2.4M). Add the column to
    # the table underneath instead, in its own order, and keep the mapping. Rows out of view keep their clean label.
    rows = indices.column(0).to_numpy()
    base = Dataset(
        dataset.data, info=dataset.info, split=dataset.split, fingerprint=dataset._fingerprint
    )
    column = np.array(column_array(base, label), np.int64)
    column[rows] = given
    if (column[rows] != given).any():
        raise ValueError(
            "A row is selected twice and got two labels: add the noise before selecting rows repeatedly."
        )
    base = base.add_column(column=column, **add)
    view = Dataset(
        base.data,
        info=base.info,
        split=base.split,
        indices_table=indices,
        fingerprint=base._fingerprint,
    )
    form = dataset.format
    columns = form["columns"] if set(form["columns"]) != set(dataset.column_names) else None
    return view.with_format(
        form["type"], columns, form["output_all_columns"], **form["format_kwargs"]
    )


def noisy_stream(
    dataset: IterableDataset,
    transition,
    *,
    seed: int = 0,
    key: str = "__key__",
    label: str = "label",
    noisy: str = "noisy_label",
) -> IterableDataset:
    """A streaming data set with one more column `noisy`: `corrupt_by_key` of columns `key` and `label`."""
    matrix = _transition(transition)  # errors now, not at the first batch
    features = dataset.features
    for name in (key, label):
        if features is not None and name not in features:
            raise ValueError(f"No column {name!r}; there are {sorted(features)}.")
    if features is not None:
        if noisy in features:
            raise ValueError(f"Column {noisy!r} exists already. Name another one.")
        features = features.copy()
        features[noisy] = features[label]

    def add(batch):
        return {noisy: corrupt_by_key(batch[key], batch[label], matrix, seed)}

    return dataset.map(add, batched=True, features=features)


@dataclass(frozen=True)
class NoiseReport:
    """What the noise came to: `rate`, the share of wrong labels, and `confusion` [C, C], counts [true, given]."""

    rate: float
    confusion: np.ndarray

    @property
    def transition(self) -> np.ndarray:
        """Realised P(given | true) [C, C]; a class without samples has a row of zeros."""
        return self.confusion / np.maximum(self.confusion.sum(1, keepdims=True), 1)

    def __str__(self) -> str:
        total, wrong = self.confusion.sum(), self.confusion - np.diag(self.confusion.diagonal())
        lines = [
            f"{wrong.sum()} of {total} labels are wrong ({self.rate:.2%}), {len(wrong)} classes"
        ]
        rates = (wrong.sum(1) / np.maximum(self.confusion.sum(1), 1))[self.confusion.sum(1) > 0]
        if wrong.any():
            lines.append(f"per class: {rates.min():.2%} to {rates.max():.2%}")
            top = np.argsort(-wrong, axis=None, kind="stable")[:3]
            pairs = [
                f"{i} -> {j} ({wrong[i, j]})"
                for i, j in zip(*np.unravel_index(top, wrong.shape), strict=True)
            ]
            lines.append("most frequent: " + ", ".join(pairs[: np.count_nonzero(wrong)]))
        return "; ".join(lines)


def noise_report(clean, noisy, num_classes: int) -> NoiseReport:
    """Realised rate and confusion of given labels `noisy` [N] against true labels `clean` [N]."""
    clean, noisy = _integers(clean), _integers(noisy)
    if clean.shape != noisy.shape:
        raise ValueError(
            f"{len(clean)} clean labels and {len(noisy)} noisy ones: expected the same samples in both."
        )
    _check_labels(clean, num_classes)
    _check_labels(noisy, num_classes)
    confusion = np.bincount(clean * num_classes + noisy, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
    return NoiseReport(float(1 - confusion.trace() / max(len(clean), 1)), confusion)


def column_array(dataset: Dataset, name: str) -> np.ndarray:
    """Integer column `name` as an array [N] in the order of `dataset`, without copy where Arrow allows it.

    Straight from the Arrow table: 5 ms for 2.4M rows, where `dataset[name]` takes 22 s.
    """
    if name not in dataset.column_names:
        raise ValueError(f"No column {name!r}; there are {dataset.column_names}.")
    column = _integers(dataset.data.column(name).to_numpy(), f"column {name!r}")
    return column if dataset._indices is None else column[dataset._indices.column(0).to_numpy()]


def _corrupt_(labels: np.ndarray, transition, seed: int, exact: bool) -> np.ndarray:
    """`corrupt` in place."""
    matrix, labels = _transition(transition), labels.astype(np.int64, copy=False)
    _check_labels(labels, len(matrix))
    counts = np.bincount(labels, minlength=len(matrix))
    flip = matrix.sum(1) - matrix.diagonal()
    flip[flip < 1e-9] = 0.0  # rounding, no noise
    flip = np.minimum(flip, 1.0)
    rng = np.random.default_rng(seed)
    if exact:
        expected = np.round(counts * flip, 9)  # 10 * (1 - 0.7) is 3, not 3.0000000000000004
        flips = np.floor(expected).astype(np.int64)
        missing = int(np.floor(expected.sum() + 0.5)) - flips.sum()
        flips[np.argsort(flips - expected, kind="stable")[:missing]] += 1
    else:
        flips = rng.binomial(
            counts, flip
        )  # given their number, independent flips are a uniform subset too
    # Shuffle and group by class with one in-place sort of (class | random bits | row): no [N] temporaries besides it.
    row_bits, class_bits = max(len(labels) - 1, 1).bit_length(), len(matrix).bit_length()
    order = rng.integers(0, 2 ** (64 - row_bits - class_bits), len(labels), dtype=np.uint64)
    for start in range(0, len(labels), 1 << 16):
        part = slice(start, start + (1 << 16))
        rows = np.arange(start, min(start + (1 << 16), len(labels)), dtype=np.uint64)
        order[part] = (
            labels[part].astype(np.uint64) << (64 - class_bits) | order[part] << row_bits | rows
        )
    order.sort()
    start = 0
    for true, (count, k) in enumerate(zip(counts.tolist(), flips.tolist(), strict=True)):
        if k:
            rows = order[start : start + k] & np.uint64(2**row_bits - 1)
            weights = matrix[true].copy()
            weights[true] = 0.0
            cdf = weights.cumsum()
            # u < 1 and a right-sided search: a class of probability 0 is never hit
            labels[rows.astype(np.int64)] = np.searchsorted(
                cdf / cdf[-1], rng.random(k), side="right"
            )
        start += count
    return labels


def _transition(matrix) -> np.ndarray:
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"transition has shape {matrix.shape}, expected [C, C].")
    _check(len(matrix), 0.0)
    bad = ~(np.abs(matrix.sum(1) - 1) < 1e-5)  # float32 matrices pass, nan does not
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"Row {row} of the transition matrix sums to {matrix[row].sum():.6g}, expected 1."
        )
    if (matrix < 0).any():
        i, j = np.argwhere(matrix < 0)[0]
        raise ValueError(
            f"transition[{i}, {j}] = {matrix[i, j]:.6g} is negative: it is a probability."
        )
    return matrix


def _check(num_classes: int, rate: float) -> None:
    if num_classes < 2:
        raise ValueError(
            f"{num_classes} classes: label noise needs at least 2, there is no other label to flip to."
        )
    if not 0 <= rate <= 1:
        raise ValueError(
            f"noise rate {rate} is outside [0, 1]: it is a share of the samples (40% is 0.4)."
        )


def _check_labels(labels: np.ndarray, num_classes: int | None) -> None:
    """Raise on the first label outside 0 .. num_classes - 1."""
    if len(labels) and (
        labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)
    ):
        bad = (labels < 0) | (labels >= (num_classes if num_classes is not None else np.inf))
        row, top = int(bad.argmax()), "" if num_classes is None else f" to {num_classes - 1}"
        raise ValueError(f"Label {labels[row]} at position {row}: labels go from 0{top}.")


def _integers(values, what: str = "labels") -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "iu" and values.size:
        raise ValueError(
            f"{what}: expected class indices, got {values.dtype} (first value {values.flat[0]!r})."
        )
    return values.astype(np.int64, copy=False)
