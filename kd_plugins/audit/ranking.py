"""How probable it is that each label is wrong: a model of the noise, fitted to probabilities.

>>> probs = np.array([[0.99, 0.01]] * 50 + [[0.01, 0.99]] * 50)
>>> labels = np.array([0] * 50 + [1] * 40 + [0] * 10)  # the last ten are wrong
>>> noise = estimate_label_noise(labels, probs)
>>> noise.p_wrong[[0, 50, 90]].round(2), int(noise.proposed[90]), round(noise.count()[0])
(array([0., 0., 1.]), 1, 10)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ..data.labels import check_labels, class_indices
from ..losses import validate
from .neighbours import find_neighbours, outlier_ranks, scratch

ROWS = 4096  # per temporary copy
POWERS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)  # of the probabilities; 1 leaves them as they are
SAMPLE = 20_000  # rows at most, from which the power is chosen
PRIORS = (2.0, 5.0, 20.0, 100.0, 500.0, 1e6)  # weights of the prior of T, in samples of a class


@dataclass(frozen=True)
class LabelNoise:
    """The result of :func:`estimate_label_noise`; made by it.

    Attributes:
        labels: the given labels [N].
        p_wrong: the probability that the label is wrong [N]; NaN for a row without probabilities.
        proposed: the most probable class [N].
        p_proposed: its probability [N].
        transition: T [C, C], T[i, j] = P(given label j | true class i).
        draws: the share of wrong labels among those given as each class, in each resampling of the
            data [draws, C].
        features: those that were given, or None.
        near: with features, the rows of the nearest neighbours of each sample [N, neighbours],
            nearest first; -1 for a row without probabilities.
        outlier: with features, the share of samples that are nearer to a class than this one [N].
            It is high for pictures that belong to no class.
    """

    labels: np.ndarray
    p_wrong: np.ndarray
    proposed: np.ndarray
    p_proposed: np.ndarray
    transition: np.ndarray
    draws: np.ndarray
    features: np.ndarray | None = None
    near: np.ndarray | None = None
    outlier: np.ndarray | None = None

    def count(self, confidence: float = 0.9) -> tuple[float, float, float]:
        """How many labels are wrong: estimate, lower and upper end of the interval.

        The interval says how far the estimate would move with another sample of the data. It does
        not contain the errors of the model of the noise.
        """
        validate.fraction("confidence", confidence, "it is the share of intervals that hold")
        sizes = self._sizes()
        return _interval(np.nansum(self.p_wrong), self.draws @ sizes, confidence)

    def count_by_class(self, confidence: float = 0.9) -> list[tuple[float, float, float]]:
        """The same among the labels given as each class."""
        wrong = np.nan_to_num(self.p_wrong)
        total = np.bincount(self.labels, wrong, len(self.transition))
        draws = self.draws * self._sizes()
        return [_interval(*pair, confidence) for pair in zip(total, draws.T, strict=True)]

    def worst_pairs(self, count: int = 10) -> list[tuple[int, int, float]]:
        """The largest T[i, j] off the diagonal, as (true class i, given label j, T[i, j])."""
        off = self.transition * (1 - np.eye(len(self.transition)))
        order = np.argsort(-off, axis=None, kind="stable")[:count]
        rows, columns = np.unravel_index(order, off.shape)
        return [(int(i), int(j), float(off[i, j])) for i, j in zip(rows, columns, strict=True)]

    def _sizes(self) -> np.ndarray:
        known = self.labels[np.isfinite(self.p_wrong)]
        return np.bincount(known, minlength=len(self.transition))


def estimate_label_noise(
    labels: ArrayLike,
    probs: Any,
    features: np.ndarray | None = None,
    *,
    neighbours: int = 20,
    bank: int = 16_384,
    draws: int = 100,
    seed: int = 0,
) -> LabelNoise:
    """The probability that each label is wrong, 1 - q_y T[y, y] / Σ_i q_i T[i, y].

    q is what the pictures say about the class, T what the labels of all samples say about the
    noise, T[i, j] = P(given label j | true class i). T is fitted to the given labels by expectation
    maximisation. So a label that is often given to pictures of class i is doubted more where q
    says i. With features, q is the geometric mean of a sample's own probabilities and of the mean
    of its neighbours' probabilities, normalised.

    Args:
        labels: the doubted labels [N].
        probs: the result of :func:`out_of_sample`, or other out-of-sample probabilities [N, C].
            Rows of NaN are left out.
        features: floats [N, D]; without them q is `probs`.
        neighbours: the number of neighbours, which are the samples with the largest cosine of
            features.
        bank: the number of samples among which neighbours are looked for, drawn at random if
            there are more. Time grows with N times this number.
        draws: resamplings (bootstrap) for the intervals of :meth:`LabelNoise.count`.
        seed: the seed of the bank and of the draws.

    Raises:
        ValueError: the shapes do not fit.

    References:
        Dawid and Skene, "Maximum likelihood estimation of observer error-rates using the EM
        algorithm", Applied Statistics 28, 1979. Northcutt, Jiang and Chuang, "Confident learning",
        JAIR 70, 2021, for the joint of given and true labels. The pooling is ours.

    Notes:
        The prior of T is symmetric noise. Its weight is the one of six with which T, fitted to
        half of the labels, explains the other half best. Probabilities of networks that saw these
        labels hide the noise: T then approaches the identity. The doubt of
        heads that were trained for few steps would do the same. So q is first raised to the power,
        one of seven from 1 to 9, with which T best explains labels that it was not fitted to.
    """
    labels, probs = class_indices(labels), np.asarray(probs)
    _refuse(labels, probs, features)
    known = _known(probs)
    order = known[np.argsort(labels[known], kind="stable")]  # class by class
    q = scratch((len(order), probs.shape[1]))
    for part, rows in _parts(order):
        q[part] = _normalised(probs[rows])
    near = outlier = None
    if features is not None and len(order) > 1:
        count = min(neighbours, min(bank, len(order)) - 1)
        near = find_neighbours(features, order, count, bank, seed)
        outlier = outlier_ranks(features, labels, order, probs.shape[1])
        q = _pool(q, order, near)
    _sharpen(q, labels[order])
    model, shares = _fitted(q, labels[order], draws, seed)
    p_wrong, p_proposed = np.full((2, len(labels)), np.nan)
    proposed = labels.copy()
    p_wrong[order], proposed[order], p_proposed[order] = model.posterior()
    found = (labels, p_wrong, proposed, p_proposed, model.transition[..., 0], shares)
    return LabelNoise(*found, features, near, outlier)


class _NoiseModel:
    """T of the noise, fitted K times to differently weighted samples: [C, C, K].

    Args:
        q: the probabilities of the samples [N, C], class by class of the given label.
        labels: the given labels [N], sorted.
        weigh: a slice of samples -> their weights [n, K].
        priors: the weight of the prior in each fit, in samples of a class [K]. The prior of T is
            symmetric noise, of the rate that the fit itself has.
        start: T to begin with.
    """

    def __init__(
        self,
        q: np.ndarray,
        labels: np.ndarray,
        weigh: Callable[[slice], np.ndarray],
        priors: ArrayLike,
        start: np.ndarray | None = None,
    ) -> None:
        self.q, self.weigh, classes = q, weigh, q.shape[1]
        self.ends = np.searchsorted(labels, np.arange(classes + 1))
        self.priors = np.asarray(priors, np.float64)
        start = _symmetric(classes, np.array(0.3)) if start is None else start
        self.transition = np.repeat(start[..., None], len(self.priors), axis=2)
        self.wrong = np.zeros((len(self.priors), classes))

    def fit(self, steps: int = 200, tolerance: float = 1e-4) -> None:
        """Steps of expectation maximisation, until no entry of T moves by the tolerance."""
        for _ in tqdm(range(steps), "noise", leave=False, disable=None):
            before = self.transition
            self._step()
            if np.abs(self.transition - before).max() < tolerance:
                break

    def _step(self) -> None:
        """Expect the number of samples for each pair of classes, and take T from it."""
        joint = np.zeros_like(self.transition)  # true class i, given label j
        for part, j in self._blocks():
            column = self.transition[:, j]  # [C, K]
            ratio = self.weigh(part) / np.maximum(self.q[part] @ column, 1e-30)
            joint[:, j] += column * (self.q[part].T @ ratio)
        right, given = np.einsum("iik->ik", joint), joint.sum(0)
        self.wrong = (1 - right / np.maximum(given, 1e-30)).T
        rate = 1 - right.sum(0) / given.sum(0)
        joint += self.priors * _symmetric(len(joint), rate)
        self.transition = joint / joint.sum(1, keepdims=True)

    def log_likelihood(self, weigh: Callable[[slice], np.ndarray]) -> np.ndarray:
        """Of the given labels with these weights [K]."""
        total = np.zeros(len(self.priors))
        for part, j in self._blocks():
            density = np.maximum(self.q[part] @ self.transition[:, j], 1e-30)
            total += (weigh(part) * np.log(density)).sum(0)
        return total

    def posterior(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P(label is wrong), the most probable class and its probability, by the first T."""
        wrong, best = np.empty((2, len(self.q)))
        proposed = np.empty(len(self.q), np.int64)
        for part, j in self._blocks():
            r = _normalised(self.q[part] * self.transition[:, j, 0])
            wrong[part], best[part] = 1 - r[:, j], r.max(1)
            # Of equally probable classes the given one stands.
            proposed[part] = np.where(r[:, j] >= best[part], j, r.argmax(1))
        return wrong, proposed, best

    def _blocks(self) -> Iterator[tuple[slice, int]]:
        """Slices of samples with one given label each."""
        for j, (first, last) in enumerate(zip(self.ends[:-1], self.ends[1:], strict=True)):
            for start in range(first, last, ROWS):
                yield slice(start, min(start + ROWS, last)), j


def _fitted(
    q: np.ndarray, labels: np.ndarray, draws: int, seed: int
) -> tuple[_NoiseModel, np.ndarray]:
    """The model fitted to all samples, and the shares of wrong labels in resamplings [draws, C]."""
    prior = PRIORS[int(_explained(q, labels).argmax())]
    model = _NoiseModel(q, labels, lambda part: np.ones((_length(part), 1)), [prior])
    model.fit()

    def drawn(part: slice) -> np.ndarray:
        rng = np.random.default_rng((seed, part.start))  # the same draw at each step
        return rng.poisson(1.0, (_length(part), draws)).astype(np.float64)

    resampled = _NoiseModel(q, labels, drawn, [prior] * draws, model.transition[..., 0])
    if draws:
        resampled.fit(steps=20, tolerance=1e-3)
    return model, resampled.wrong


def _sharpen(q: np.ndarray, labels: np.ndarray) -> None:
    """Raise q to the power that explains the labels best, in place."""
    some = slice(None, None, -(-len(q) // SAMPLE) or 1)
    found = [_explained(_raised(q[some], power), labels[some]).max() for power in POWERS]
    power = POWERS[int(np.argmax(found))]
    for start in range(0, len(q) if power > 1 else 0, ROWS):
        q[start : start + ROWS] = _raised(q[start : start + ROWS], power)


def _raised(q: np.ndarray, power: float) -> np.ndarray:
    return _normalised((q / q.max(1, keepdims=True)) ** power)  # of many classes all may be tiny


def _explained(q: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How well T, fitted to half of the labels, explains the other half, with each prior."""

    def half(first: int) -> Callable[[slice], np.ndarray]:
        return lambda part: (np.arange(part.start, part.stop) % 2 == first)[:, None] * 1.0

    total = np.zeros(len(PRIORS))
    for first in (0, 1):
        model = _NoiseModel(q, labels, half(first), PRIORS)
        model.fit(steps=50, tolerance=1e-3)
        total += model.log_likelihood(half(1 - first))
    return total


def _symmetric(classes: int, rate: np.ndarray) -> np.ndarray:
    """Symmetric noise of some rates [...]: [C, C, ...]."""
    eye = np.eye(classes).reshape(classes, classes, *[1] * rate.ndim)
    return eye * (1 - rate) + (1 - eye) * rate / (classes - 1)


def _length(part: slice) -> int:
    return part.stop - part.start


def _pool(q: np.ndarray, order: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The geometric mean of q and of the mean q of the neighbours."""
    position = np.empty(len(near), np.int64)
    position[order] = np.arange(len(order))
    pooled = scratch(q.shape)
    for part, rows in _parts(order):
        mean = sum(q[position[k]] for k in near[rows].T) / near.shape[1]
        pooled[part] = _normalised(np.sqrt((q[part] + 1e-6) * (mean + 1e-4)))
    return pooled


def _parts(order: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(order), ROWS):
        yield slice(start, min(start + ROWS, len(order))), order[start : start + ROWS]


def _normalised(p: np.ndarray) -> np.ndarray:
    return p / np.maximum(p.sum(1, keepdims=True), 1e-30)


def _interval(value: float, draws: np.ndarray, confidence: float) -> tuple[float, float, float]:
    if not len(draws):
        return float(value), float("nan"), float("nan")
    # The spread around the median of the draws: resampled data with repeats shift all of them.
    ends = [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
    low, middle, high = np.quantile(draws, ends)
    return float(value), max(0.0, float(value + low - middle)), float(value + high - middle)


def check_probs(labels: np.ndarray, probs: np.ndarray) -> None:
    """Raise ValueError unless probs are floats [N, C] and the labels [N] are among the classes."""
    fits = probs.ndim == 2 and probs.shape[1] > 1 and labels.shape == probs.shape[:1]
    if not fits or probs.dtype.kind != "f":
        raise ValueError(
            f"probs: expected floats [N, C] for labels {list(labels.shape)}, got {probs.dtype} "
            f"{list(probs.shape)}"
        )
    try:
        check_labels(labels, probs.shape[1])
    except ValueError as error:
        raise ValueError(
            f"probs {list(probs.shape)} are of {probs.shape[1]} classes. {error}"
        ) from None


def _refuse(labels: np.ndarray, probs: np.ndarray, features: np.ndarray | None) -> None:
    check_probs(labels, probs)
    if features is not None and (features.ndim != 2 or len(features) != len(labels)):
        raise ValueError(
            f"features: expected floats [{len(labels)}, D], one row for each label, got "
            f"{list(features.shape)}"
        )


def _known(probs: np.ndarray) -> np.ndarray:
    """The rows without NaN."""
    rows = []
    for start in range(0, len(probs), ROWS):
        part = probs[start : start + ROWS]
        finite = np.isfinite(part).all(1)
        rows.append(start + np.flatnonzero(finite))
        low, high = (float(f(part[finite], initial=0.5)) for f in (np.min, np.max))
        validate.check(low >= 0 and high <= 1.001, "probs", (low, high), "numbers in [0, 1]")
    found = np.concatenate(rows) if rows else np.empty(0, np.int64)
    if not len(found):
        raise ValueError("probs: every row has a NaN, so there is nothing to fit the noise to")
    return found
