"""Label noise as a transition matrix T [C, C] with T[i, j] = P(noisy label j | true label i).

References:
    Han et al., "Co-teaching: robust training of deep neural networks with extremely noisy labels",
    NeurIPS 2018 (`symmetric`, `pair_flip`). Tanaka et al., "Joint optimization framework for
    learning with noisy labels", CVPR 2018 (`symmetric(include_self=True)`). Patrini et al.,
    "Making deep neural networks robust to label noise", CVPR 2017 (`circular`, on CIFAR-100).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike

from ..losses.validate import count, fraction
from .labels import check_labels, class_indices


def symmetric(num_classes: int, rate: float, include_self: bool = False) -> np.ndarray:
    """T[i, i] = 1 - rate, and the rest uniform over the other C - 1 classes -> [C, C].

    With `include_self` the new label is uniform over all C classes, so that a share of
    rate (C - 1) / C of the labels is wrong.
    """
    _check_rate(num_classes, rate)
    share = rate / (num_classes if include_self else num_classes - 1)
    matrix = np.full((num_classes, num_classes), share)
    np.fill_diagonal(matrix, 1 - rate + (share if include_self else 0.0))
    return matrix


def pair_flip(num_classes: int, rate: float) -> np.ndarray:
    """T[i, i] = 1 - rate and T[i, (i + 1) mod C] = rate -> [C, C]."""
    return asymmetric(num_classes, rate, {i: (i + 1) % num_classes for i in range(num_classes)})


def asymmetric(num_classes: int, rate: float, class_map: Mapping[int, int]) -> np.ndarray:
    """T[i, i] = 1 - rate and T[i, class_map[i]] = rate -> [C, C].

    Classes that are not in `class_map` stay clean.
    """
    _check_rate(num_classes, rate)
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
    """Each class flips to the next class of its superclass, and the last to the first -> [C, C].

    Args:
        superclasses: the superclass of each of the C classes. A class that is alone in its
            superclass stays clean.
        rate: P(flip), in [0, 1].
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(superclasses):
        members.setdefault(group, []).append(i)
    class_map = {
        i: group[(k + 1) % len(group)] for group in members.values() for k, i in enumerate(group)
    }
    return asymmetric(len(superclasses), rate, class_map)


def corrupt(
    labels: ArrayLike, transition: ArrayLike, seed: int = 0, exact: bool = True
) -> np.ndarray:
    """A noisy copy of `labels` [N] under `transition` [C, C] -> int64 [N].

    Args:
        exact: change round(sum_i N_i (1 - T_ii)) labels. They are spread over the classes by
            largest remainder and drawn without replacement within a class; the new labels are drawn
            from the off-diagonal row. Otherwise each label is drawn independently, so that the
            realised rate varies.
    """
    return corrupt_in_place(np.array(class_indices(labels)), transition, seed, exact)


def corrupt_in_place(
    labels: np.ndarray, transition: ArrayLike, seed: int = 0, exact: bool = True
) -> np.ndarray:
    """`corrupt`, but in the memory of `labels` (int64 [N])."""
    matrix = as_transition(transition)
    check_labels(labels, len(matrix))
    counts = np.bincount(labels, minlength=len(matrix))
    rng = np.random.default_rng(seed)
    flips = _flips_per_class(matrix, counts, rng, exact)
    # One generator draws the order first and then the labels of each class.
    order, row_mask = _shuffled_by_class(labels, len(matrix), rng)
    start = 0
    for true, (size, k) in enumerate(zip(counts.tolist(), flips.tolist(), strict=True)):
        if k:
            rows = (order[start : start + k] & row_mask).astype(np.int64)
            weights = matrix[true].copy()
            weights[true] = 0.0
            cdf = weights.cumsum()
            # u < 1 and the search from the right: a class of probability 0 is never drawn.
            labels[rows] = np.searchsorted(cdf / cdf[-1], rng.random(k), side="right")
        start += size
    return labels


def _flips_per_class(
    matrix: np.ndarray, counts: np.ndarray, rng: np.random.Generator, exact: bool
) -> np.ndarray:
    """How many labels of each class change [C]."""
    flip = matrix.sum(1) - matrix.diagonal()
    flip[flip < 1e-9] = 0.0  # rounding, not noise
    flip = np.minimum(flip, 1.0)
    if not exact:
        return rng.binomial(counts, flip)  # which of them is then a uniform subset
    expected = np.round(counts * flip, 9)  # 10 * (1 - 0.7) is 3, not 3.0000000000000004
    flips = np.floor(expected).astype(np.int64)
    missing = int(np.floor(expected.sum() + 0.5)) - flips.sum()
    flips[np.argsort(flips - expected, kind="stable")[:missing]] += 1
    return flips


def _shuffled_by_class(
    labels: np.ndarray, num_classes: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.uint64]:
    """The rows grouped by class and shuffled within each -> uint64 [N], and the mask of the row.

    One sort in place of (class | random bits | row), so that it takes no other memory of size N.
    """
    row_bits, class_bits = max(len(labels) - 1, 1).bit_length(), num_classes.bit_length()
    order = rng.integers(0, 2 ** (64 - row_bits - class_bits), len(labels), dtype=np.uint64)
    for start in range(0, len(labels), 1 << 16):
        part = slice(start, min(start + (1 << 16), len(labels)))
        classes = labels[part].astype(np.uint64) << (64 - class_bits)
        order[part] = (
            classes | order[part] << row_bits | np.arange(part.start, part.stop).astype("u8")
        )
    order.sort()
    return order, np.uint64(2**row_bits - 1)


def corrupt_by_key(
    keys: Sequence[str | bytes | int], labels: ArrayLike, transition: ArrayLike, seed: int = 0
) -> np.ndarray:
    """Noisy labels as a function of (seed, key, label) -> int64 [N].

    u = blake2b(seed, key) / 2^32 goes through the inverse CDF of row `label` of `transition`. So
    the result is the same in any order, shard or worker, in a stream and in a table.

    Args:
        keys: one per label; they should be unique, since equal keys share their u.
    """
    matrix, labels = as_transition(transition), class_indices(labels)
    check_labels(labels, len(matrix))
    if len(keys) != len(labels):
        raise ValueError(f"{len(keys)} keys for {len(labels)} labels: expected one key per label.")
    prefix = blake2b(str(int(seed)).encode(), digest_size=4, person=b"kd_plugins.noise")
    u = np.empty(len(labels))
    for n, key in enumerate(keys):
        state = prefix.copy()  # the seed is hashed once
        state.update(b"/" + (key if isinstance(key, bytes) else str(key).encode()))
        u[n] = int.from_bytes(state.digest(), "little") / 2**32
    cdf = matrix.cumsum(1)
    # One search for all rows: row i of the CDF is in [i, i + 1]. u has 32 bits, so i + u is exact.
    flat = (cdf / cdf[:, -1:] + np.arange(len(matrix))[:, None]).ravel()
    return np.searchsorted(flat, labels + u, side="right") - labels * len(matrix)


@dataclass(frozen=True)
class NoiseReport:
    """How much noise there is, counted.

    Attributes:
        rate: the share of wrong labels.
        confusion: counts [C, C] of (true label, noisy label).
    """

    rate: float
    confusion: np.ndarray

    @property
    def transition(self) -> np.ndarray:
        """Realised P(noisy | true) [C, C]; the row of a class without samples is zero."""
        return self.confusion / np.maximum(self.confusion.sum(1, keepdims=True), 1)

    def __str__(self) -> str:
        total, wrong = self.confusion.sum(), self.confusion - np.diag(self.confusion.diagonal())
        text = f"{wrong.sum()} of {total} labels are wrong ({self.rate:.2%}), {len(wrong)} classes"
        if not wrong.any():
            return text
        counts = self.confusion.sum(1)
        rates = wrong.sum(1)[counts > 0] / counts[counts > 0]
        top = np.argsort(-wrong, axis=None, kind="stable")[: min(3, np.count_nonzero(wrong))]
        pairs = zip(*np.unravel_index(top, wrong.shape), strict=True)
        shown = ", ".join(f"{i} -> {j} ({wrong[i, j]})" for i, j in pairs)
        return f"{text}; per class: {rates.min():.2%} to {rates.max():.2%}; most frequent: {shown}"


def noise_report(clean: ArrayLike, noisy: ArrayLike, num_classes: int) -> NoiseReport:
    """Compare noisy labels [N] with true labels [N]."""
    clean, noisy = class_indices(clean), class_indices(noisy)
    if clean.shape != noisy.shape:
        raise ValueError(
            f"{len(clean)} clean labels and {len(noisy)} noisy ones: expected the same samples in "
            "both."
        )
    check_labels(clean, num_classes)
    check_labels(noisy, num_classes)
    counts = np.bincount(clean * num_classes + noisy, minlength=num_classes**2)
    confusion = counts.reshape(num_classes, num_classes)
    return NoiseReport(float(1 - confusion.trace() / max(len(clean), 1)), confusion)


def as_transition(matrix: ArrayLike) -> np.ndarray:
    """A transition matrix as float64 [C, C]. Raises ValueError if its rows are no distributions."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"transition has shape {matrix.shape}, expected [C, C].")
    _check_rate(len(matrix), 0.0)
    bad = ~(np.abs(matrix.sum(1) - 1) < 1e-5)  # float32 matrices pass, NaN does not
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


def _check_rate(num_classes: int, rate: float) -> None:
    count("num_classes", num_classes, "there is no other label to flip to", least=2)
    fraction("rate", rate, "a share of the samples (40% is 0.4)")
