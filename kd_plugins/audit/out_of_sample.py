"""Probabilities of each sample from heads that never saw its label.

>>> probs = out_of_sample(train.features, train.labels, folder="runs/folds")  # doctest: +SKIP
>>> noise = estimate_label_noise(train.labels, probs, train.features)  # doctest: +SKIP
>>> suspects = find_suspects(noise=noise)  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.labels import check_labels, class_indices
from ..losses import GCE, Loss, validate

ROWS = 4096  # per temporary copy of features
STEPS = 150  # at least, also for few samples


def out_of_sample(
    features: np.ndarray,
    labels: ArrayLike,
    num_classes: int | None = None,
    *,
    left_out: ArrayLike | None = None,
    folder: str | os.PathLike | None = None,
    loss: Loss | None = None,
    folds: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 15,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> np.ndarray:
    """Mean over seeds of softmax(W f + b), trained on the other folds: float32 [N, C].

    For each seed, the samples of each class are dealt out at random over the folds. A linear head
    is trained on all folds but one, and predicts that one. So no head has seen the label of a
    sample that it predicts, and a wrong label cannot have been memorised.

    Args:
        features: floats [N, D] of a frozen network, in memory or as a memory map, such as
            `cache_features(...).features`. Only a batch of them is copied at a time.
        labels: the doubted labels [N].
        num_classes: C; by default the largest label + 1.
        left_out: True [N] for rows that no head is trained on, and whose probabilities are NaN,
            such as `FeatureView.stand_in`.
        folder: keeps the predictions of each fold, so that a run that was killed goes on after the
            last complete one. It belongs to these features, labels and settings. The result is
            then a memory map of `probs.npy` in it; all files take 4 N C bytes for each seed and
            once more.
        loss: of one network, of logits and target alone. By default `GCE()`, which ranked wrong
            labels better than CE, and as well as heads that cost ten times as much.
        folds: parts of the data, 5 as in cleanlab.
        seeds: one round of folds for each.
        epochs, batch_size, learning_rate: of AdamW, with a cosine schedule. There are at least 150
            steps, also if the samples are few.

    Raises:
        ValueError: the shapes do not fit, the loss needs more inputs, or the folder belongs to
            something else.

    References:
        Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels",
        JAIR 70, 2021 (out-of-sample probabilities). Zhang and Sabuncu, "Generalized cross entropy
        loss for training deep neural networks with noisy labels", NeurIPS 2018 (GCE).

    >>> labels = np.arange(40) % 2
    >>> features = np.eye(2, dtype=np.float32)[labels]
    >>> out_of_sample(features, labels, learning_rate=0.1, batch_size=8).argmax(1)[:6]
    array([0, 1, 0, 1, 0, 1])
    """
    labels, loss = class_indices(labels), GCE() if loss is None else loss
    _refuse(features, labels, loss, folds, seeds)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    check_labels(labels, classes)
    used = np.arange(len(labels)) if left_out is None else np.flatnonzero(~np.asarray(left_out))
    settings = {
        "loss": _described(loss),
        "folds": folds,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "classes": classes,
        "left_out": len(labels) - len(used),
    }
    kept = None if folder is None else _claim(Path(folder), features, labels, settings)
    task = _Task(features, labels, classes, loss, epochs, batch_size, learning_rate)
    probs = _zeros(kept and kept / "probs.npy", (len(labels), classes))
    probs[:] = np.nan
    probs[used] = 0.0
    rounds = [(seed, fold) for seed in seeds for fold in range(folds)]
    for seed, fold in tqdm(rounds, "out of sample", unit="fold", leave=False, disable=None):
        is_out = _fold_of(labels[used], folds, seed) == fold
        train, out = used[~is_out], used[is_out]
        path = kept and kept / f"seed-{seed}-fold-{fold}.npy"
        part = _predicted(task, train, out, seed * folds + fold, path)
        for start in range(0, len(out), ROWS):
            rows = slice(start, start + ROWS)
            probs[out[rows]] += part[rows] / len(seeds)
    return probs


def _predicted(
    task: _Task, train: np.ndarray, out: np.ndarray, seed: int, path: Path | None
) -> np.ndarray:
    """Probabilities of the rows `out`: those in the file if it exists, else it is written."""
    if path is not None and path.exists():
        return np.load(path, mmap_mode="r")
    unfinished = path and path.with_suffix(".part")
    part = _zeros(unfinished, (len(out), task.classes))
    task.predict(part, train, out, seed)
    if path is not None and unfinished is not None and isinstance(part, np.memmap):
        part.flush()
        unfinished.replace(path)  # whole or not at all
    return part


def _zeros(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    """Zeros, in the file if there is one: they may be larger than the memory."""
    if path is None:
        return np.zeros(shape, np.float32)
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


class _Task:
    """What all heads have in common."""

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        classes: int,
        loss: Loss,
        epochs: int,
        batch_size: int,
        learning_rate: float,
    ) -> None:
        self.features, self.labels, self.classes = features, torch.from_numpy(labels), classes
        self.loss, self.epochs, self.batch_size = loss, epochs, batch_size
        self.learning_rate = learning_rate
        self.mean, self.std = moments(features)

    def rows(self, rows: np.ndarray) -> Tensor:
        """Standardised features of some rows."""
        part = np.asarray(self.features[rows], np.float32)
        return torch.from_numpy((part - self.mean) / self.std)

    def predict(self, into: np.ndarray, train: np.ndarray, out: np.ndarray, seed: int) -> None:
        """Write the probabilities of the rows `out`, from a head trained on the rows `train`."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            head = self._train(train)
        with torch.no_grad():
            for start in range(0, len(out), ROWS):
                rows = slice(start, start + ROWS)
                into[rows] = head(self.rows(out[rows])).softmax(-1).numpy()

    def _train(self, train: np.ndarray) -> nn.Module:
        head, loss = nn.Linear(len(self.mean), self.classes), copy.deepcopy(self.loss)
        optimizer = torch.optim.AdamW(head.parameters(), self.learning_rate)
        batches = -(-len(train) // self.batch_size)
        epochs = max(self.epochs, -(-STEPS // batches))
        steps = epochs * batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(train)).split(self.batch_size):
                rows = np.sort(train[batch.numpy()])  # neighbours in the file are read together
                loss.set_progress(schedule.last_epoch / steps)
                optimizer.zero_grad()
                loss(head(self.rows(rows)), self.labels[rows]).backward()
                optimizer.step()
                schedule.step()
        return head


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature."""
    total, square = np.zeros((2, features.shape[1]))
    for start in range(0, len(features), ROWS):
        part = np.asarray(features[start : start + ROWS], np.float64)
        total += part.sum(0)
        square += (part**2).sum(0)
    mean = total / len(features)
    std = np.sqrt(np.maximum(square / len(features) - mean**2, 0)) + 1e-6
    return mean.astype(np.float32), std.astype(np.float32)


def _fold_of(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each sample [N]; each class is dealt out evenly."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def _described(loss: Loss) -> str:
    """A loss with its arguments; tensors among them, which its text leaves out, as a digest."""
    tensors = [*loss.named_buffers(), *loss.named_parameters()]
    if not tensors:
        return repr(loss)
    digest = blake2b(digest_size=8)
    for name, value in tensors:
        digest.update(f"{name} {list(value.shape)}".encode() + value.detach().numpy().tobytes())
    return f"{loss!r} {digest.hexdigest()}"


def _claim(folder: Path, features: np.ndarray, labels: np.ndarray, settings: dict) -> Path:
    """The folder, after a check that its folds belong to this task."""
    digest = blake2b(digest_size=16)
    for start in range(0, len(features), ROWS):
        digest.update(np.ascontiguousarray(features[start : start + ROWS]).tobytes())
    key: dict[str, Any] = {"features": f"{list(features.shape)} {digest.hexdigest()}"}
    key |= {"labels": blake2b(labels.tobytes(), digest_size=16).hexdigest()} | settings
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "key.json"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(key, indent=1), encoding="utf-8")
        part.replace(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in key if saved.get(name) != key[name]]:
        raise ValueError(
            f"the folds in {folder} differ in {', '.join(other)}: they were predicted from "
            f"{ {name: saved.get(name) for name in other} }, asked for is "
            f"{ {name: key[name] for name in other} }. Choose another folder, or delete it"
        )
    return folder


def _refuse(
    features: np.ndarray, labels: np.ndarray, loss: Loss, folds: int, seeds: Sequence[int]
) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or features.dtype.kind != "f":
        raise ValueError(
            f"features: expected floats [N, D] for labels {list(labels.shape)}, got "
            f"{features.dtype} {list(features.shape)}"
        )
    validate.count("folds", folds, "a head would have seen the labels that it predicts", least=2)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: expected different numbers, at least one")
    if len(labels) < folds:
        raise ValueError(f"folds={folds}, but there are {len(labels)} samples: a fold is empty")
    if loss.num_peers > 1 or loss.required_inputs:
        raise ValueError(
            f"loss={loss}: expected a loss of one network that reads logits and target only; a "
            "head has no peers, teachers or rows of its own"
        )
