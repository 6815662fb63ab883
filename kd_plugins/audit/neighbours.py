"""Nearest neighbours in feature space: who they are, copies of a picture, pictures of no class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import DTypeLike
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from ..losses import validate
from .out_of_sample import moments

if TYPE_CHECKING:
    from .ranking import LabelNoise

ROWS = 1024  # per temporary copy of features
CHUNK = 1 << 16  # per temporary copy of neighbours
SPEAKING = 4  # neighbours at most for each suspect
CELLS = 3  # of a sample; copies share one of them
SHRINKAGE = 1.0  # weight of the identity in the covariance within classes


def near_duplicates(
    noise: LabelNoise, *, least: float = 0.85, class_names: Sequence[str] | None = None
) -> Dataset:
    """Pairs of pictures that are nearly the same, and have different labels.

    At least one label of each pair is wrong, or the classes overlap. The similarity is the cosine
    of the standardised features. Two samples are compared if they share one of their three nearest
    neighbours, or if one is among those of the other.

    Args:
        noise: the result of :func:`estimate_label_noise` with features.
        least: the similarity of a pair. Copies that were shifted by a pixel, mirrored or scaled
            mostly have 0.85 or more, and other pictures hardly ever. So have copies that were
            compressed again, unless they are as small as 32 px. "Find wrong labels" in the guide
            has the figures.
        class_names: for the columns `label_name` and `other_name`.

    Returns:
        A `Dataset`, most similar first, with the columns `index` and `other` (rows of the data),
        `label`, `other_label` and `similarity`.

    Raises:
        ValueError: the noise was estimated without features.

    Notes:
        A small network tells fewer pictures apart, and pictures that only resemble each other reach
        0.85 too. Pairs for more than a few per cent of the rows are a sign of it: look at some, and
        raise ``least``.

    >>> import kd_plugins as kd
    >>> features = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    >>> features[7] = features[3]
    >>> labels = np.arange(50) % 2 + (np.arange(50) == 7)  # 0 or 1, but 2 for row 7
    >>> noise = kd.estimate_label_noise(labels, np.full((50, 3), 1 / 3), features, draws=0)
    >>> near_duplicates(noise).to_list()[0]["index"], near_duplicates(noise)["other"][0]
    (3, 7)
    """
    validate.fraction("least", least, "it is a cosine")
    if noise.near is None or noise.features is None:
        raise ValueError("noise: expected that of features; without them there are no neighbours")
    space = moments(noise.features)
    found = [_copies(noise, rows, space, least) for rows in _cells(noise)]
    pairs = np.concatenate([np.empty((0, 3)), *found])
    _, first = np.unique(pairs[:, :2], axis=0, return_index=True)
    pairs = pairs[first]
    pairs = pairs[np.argsort(-pairs[:, 2], kind="stable")]
    index, other = pairs[:, :2].T.astype(np.int64)
    columns: dict[str, Any] = {"index": index, "other": other}
    columns |= {"label": noise.labels[index], "other_label": noise.labels[other]}
    if class_names is not None:
        text = np.array([str(name) for name in class_names], object)
        columns |= {
            "label_name": text[columns["label"]],
            "other_name": text[columns["other_label"]],
        }
    return Dataset.from_dict(columns | {"similarity": pairs[:, 2].astype(np.float32)})


def _cells(noise: LabelNoise) -> Iterator[np.ndarray]:
    """The rows that have one neighbour in common, and this neighbour, for each neighbour."""
    assert noise.near is not None
    near = np.array(noise.near[:, :CELLS])
    rows = np.repeat(np.arange(len(near), dtype=np.int32), near.shape[1])
    cells = near.ravel()
    rows, cells = rows[cells >= 0], cells[cells >= 0]
    order = np.argsort(cells, kind="stable")
    rows, cells = rows[order], cells[order]
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    bounds = zip(starts, [*starts[1:], len(cells)], strict=True)
    for start, end in tqdm(bounds, "copies", len(starts), leave=False, disable=None):
        yield np.append(rows[start:end], cells[start])


def _copies(noise: LabelNoise, rows: np.ndarray, space: Any, least: float) -> np.ndarray:
    """The pairs among some rows, as (row, other row, similarity) [n, 3]."""
    labels, pairs = noise.labels[rows], [np.empty((0, 3))]
    if (labels == labels[0]).all():
        return pairs[0]
    parts = [slice(start, start + ROWS) for start in range(0, len(rows), ROWS)]
    for k, one in enumerate(parts):
        left = _directions(noise.features, rows[one], space)
        for two in parts[k:]:
            right = left if two == one else _directions(noise.features, rows[two], space)
            cosine = (left @ right.T).numpy()
            i, j = np.nonzero((cosine >= least) & (labels[one, None] != labels[two]))
            ends = np.sort(np.stack([rows[one][i], rows[two][j]], 1), 1)
            pairs.append(np.column_stack([ends, cosine[i, j]]))
    return np.concatenate(pairs)


def find_neighbours(
    features: np.ndarray, rows: np.ndarray, count: int, bank: int, seed: int
) -> np.ndarray:
    """The nearest of some rows by cosine, nearest first: int32 [N, count], -1 for other rows.

    Neighbours are looked for in a bank of rows, drawn at random if there are more.
    """
    near = scratch((len(features), count), np.int32)
    near[:] = -1
    chosen = np.arange(len(rows))
    if len(rows) > bank:
        chosen = np.sort(np.random.default_rng(seed).choice(len(rows), bank, replace=False))
    chosen = np.sort(rows[chosen])
    keys = _directions(features, chosen).T.contiguous()
    bar = tqdm(total=len(rows), desc="neighbours", leave=False, disable=None)
    for part in np.array_split(np.sort(rows), -(-len(rows) // ROWS)):
        cosine = _directions(features, part) @ keys
        own = np.minimum(np.searchsorted(chosen, part), len(chosen) - 1)
        is_in = np.flatnonzero(chosen[own] == part)
        cosine[is_in, own[is_in]] = -2.0  # no sample is its own neighbour
        near[part] = chosen[cosine.topk(count).indices.numpy()]
        bar.update(len(part))
    bar.close()
    return near


def speaking_neighbours(noise: LabelNoise, rows: np.ndarray) -> pa.ChunkedArray:
    """For some rows, the nearest neighbours that have the proposed class as their label."""
    assert noise.near is not None
    lists = []
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        near = noise.near[part]
        speaks = (noise.labels[near] == noise.proposed[part, None]) & (near >= 0)
        speaks &= speaks.cumsum(1) <= SPEAKING
        ends = pa.array(np.append(0, speaks.sum(1).cumsum()), pa.int32())
        lists.append(pa.ListArray.from_arrays(ends, pa.array(near[speaks].astype(np.int64))))
    return pa.chunked_array(lists, pa.list_(pa.int64()))


def outlier_ranks(
    features: np.ndarray, labels: np.ndarray, rows: np.ndarray, classes: int
) -> np.ndarray:
    """How far each picture is from all classes: the share of pictures that are nearer [N].

    The distance is the largest cosine between z and the mean of z in a class, after the features
    were standardised, and whitened by their covariance within classes, shrunk by half.

    References:
        Lee et al., "A simple unified framework for detecting out-of-distribution samples and
        adversarial attacks", NeurIPS 2018 (a shared covariance within classes).
    """
    space, width = moments(features), features.shape[1]
    total, square = np.zeros((classes, width)), np.zeros((width, width))
    parts = np.array_split(rows, -(-len(rows) // ROWS))
    for part in tqdm(parts, "classes", leave=False, disable=None):
        x = _standardised(features, part, space)
        np.add.at(total, labels[part], x)
        square += x.T @ x
    sizes = np.bincount(labels[rows], minlength=classes)
    total, sizes = total[sizes > 0], sizes[sizes > 0]
    means = total / sizes[:, None]
    within = (square - total.T @ means) / len(rows)
    within += SHRINKAGE * max(np.trace(within) / width, 1e-6) * np.eye(width)
    whiten = np.linalg.cholesky(np.linalg.inv(within)).astype(np.float32)
    centres = normalize(torch.from_numpy(means.astype(np.float32) @ whiten)).T
    likeness = np.full(len(features), np.nan, np.float32)
    for part in tqdm(parts, "outliers", leave=False, disable=None):
        z = torch.from_numpy(_standardised(features, part, space) @ whiten)
        likeness[part] = (normalize(z) @ centres).amax(1).numpy()
    ranks = np.full(len(features), np.nan, np.float32)
    order = rows[np.argsort(-likeness[rows], kind="stable")]
    ranks[order] = np.arange(len(rows)) / len(rows)
    return ranks


def _standardised(features: np.ndarray, rows: np.ndarray, space: Any) -> np.ndarray:
    mean, std = space
    return (np.asarray(features[rows], np.float32) - mean) / std


def _directions(features: Any, rows: np.ndarray, space: Any = (0.0, 1.0)) -> torch.Tensor:
    return normalize(torch.from_numpy(_standardised(features, rows, space)))


def scratch(shape: Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
    """An array in a nameless file, which may be larger than the memory."""
    with TemporaryFile() as file:  # the map keeps it until it goes itself
        return np.memmap(file, dtype, "w+", shape=tuple(shape))
