"""Accuracy and memorisation as `evaluate.Metric` modules that need neither a network nor scikit-learn.

Class ids only, never logits: the Trainer ranks on the device and gathers a few ids per sample instead of C floats.
All results are shares in [0,1]. A share over an empty group is left out of the result, since NaN in a log is not JSON.
"""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import datasets
import evaluate
import numpy as np


class _Metric(evaluate.Metric):
    """Predictions as ids [N] or ranked ids [N, k], other inputs as ids [N]; kept in memory unless told otherwise."""

    inputs: tuple[str, ...] = ("predictions", "references")

    def __init__(self, **kwargs: Any) -> None:
        # In one process nothing has to be written; over several, evaluate exchanges files and refuses memory.
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        one = dict.fromkeys(self.inputs, ids)
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=[
                datasets.Features({**one, "predictions": p}) for p in (datasets.Sequence(ids), ids)
            ],
            inputs_description="\nClass ids, integers: predictions [N] or ranked [N, k], best first; others [N].",
        )

    def _build_data_dir(self) -> str:
        # evaluate makes a folder under the home directory even for a metric in memory: read-only homes would fail.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample."""
        # evaluate.combine passes predictions= and references= here too, in the plural.
        sample = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in sample.items()})

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch. Raises TypeError on anything but integers, ValueError on shapes that do not fit."""
        batch = {"predictions": predictions, "references": references, **kwargs}
        batch = {name: _ids(name, value) for name, value in batch.items() if name in self.inputs}
        super().add_batch(**_same_length(batch))


class TopKAccuracy(_Metric):
    """accuracy: share of samples whose first id is the reference; top<k>: whose first k ids hold it.

    Args:
        k: length of the ranking that counts as a hit. `top<k>` is reported when predictions hold at least k ids.

    >>> TopKAccuracy(k=2).compute(predictions=[[1, 0, 2], [2, 0, 1]], references=[1, 0])
    {'accuracy': 0.5, 'top2': 1.0}
    >>> TopKAccuracy().compute(predictions=[1, 2], references=[1, 0])
    {'accuracy': 0.5}
    """

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 2:
            raise ValueError(
                f"k: expected an integer of at least 2, got {k!r}; top1 is the accuracy itself"
            )
        super().__init__(**kwargs)
        self.k = k

    def _compute(
        self, *, predictions: Any, references: Any, clean_references: Any = None
    ) -> dict[str, float]:
        # clean_references is not read: evaluate.combine hands the inputs of Memorisation to every metric beside it.
        hit = _ranked(predictions) == np.asarray(references)[:, None]  # [N, k]
        shares = {"accuracy": float(hit[:, 0].mean())}
        if hit.shape[1] >= self.k:
            shares[f"top{self.k}"] = float(hit[:, : self.k].any(1).mean())
        return shares


class Memorisation(_Metric):
    """What became of wrong labels. References are the given (noisy) labels, clean_references the true ones.

    accuracy_clean_part: share predicted right among the samples whose given label is right.
    memorised: share of the wrongly labelled samples that are predicted as their wrong label.
    corrected: share of the wrongly labelled samples that are predicted as their true class.
    noise_rate: share of the samples whose given label is wrong.

    >>> Memorisation().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2], clean_references=[0, 0, 2, 2])
    {'noise_rate': 0.5, 'accuracy_clean_part': 1.0, 'memorised': 0.5, 'corrected': 0.5}
    """

    inputs = ("predictions", "references", "clean_references")

    def _compute(
        self, *, predictions: Any, references: Any, clean_references: Any
    ) -> dict[str, float]:
        guess, given, true = (
            _ranked(predictions)[:, 0],
            np.asarray(references),
            np.asarray(clean_references),
        )
        wrong = given != true
        shares = {"noise_rate": float(wrong.mean())}
        if not wrong.all():
            shares["accuracy_clean_part"] = float((guess == true)[~wrong].mean())
        if wrong.any():
            shares["memorised"] = float((guess == given)[wrong].mean())
            shares["corrected"] = float((guess == true)[wrong].mean())
        return shares


def peer_metrics(
    top_ids: Any, labels: Any, clean_labels: Any = None, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Shares of each peer (`accuracy_a`, ...), of the ensemble (`accuracy_ensemble`), mean over peers (`accuracy`).

    One peer has no suffixes. With clean labels, accuracy and top5 are against those, `labels` are the given ones, and
    the results of Memorisation come on top.

    Args:
        top_ids: ranked class ids, best first: [N, 1, k] for one peer, [N, K+1, k] for K > 1 peers, the ensemble last.
        labels: given labels [N].
        clean_labels: true labels [N], where they are known.
        names: suffix of each peer; a, b, c ... by default.

    Raises:
        TypeError: ids or labels are not integers. ValueError: shapes or names do not fit.

    >>> peer_metrics([[[0], [1], [0]], [[1], [1], [1]]], labels=[0, 1])
    {'accuracy': 0.75, 'accuracy_a': 1.0, 'accuracy_b': 0.5, 'accuracy_ensemble': 1.0}
    """
    ids = _integers("top_ids", top_ids)
    if ids.ndim != 3 or ids.shape[1] in (0, 2) or 0 in ids.shape:
        raise ValueError(
            f"top_ids: expected [N, 1, k] for one peer or [N, K+1, k] for K > 1 peers and then their ensemble, "
            f"got {list(ids.shape)}; peers and ensemble could not be told apart"
        )
    count = max(1, ids.shape[1] - 1)
    names = list(ascii_lowercase[:count] if names is None else names)
    if len(names) != count or len({*names, "ensemble"}) != count + 1:
        raise ValueError(
            f"names: expected {count} different names, none of them 'ensemble', got {names}"
        )
    truth = labels if clean_labels is None else clean_labels
    batch = {
        "top_ids": ids,
        "labels": _ids("labels", labels),
        "clean_labels": _ids("clean_labels", truth),
    }
    _, given, true = _same_length(batch).values()

    # The metrics' own arithmetic on arrays: compute() takes each row through Arrow first, 0.5 s for 50k rows each.
    accuracy, memorisation = TopKAccuracy(), Memorisation()
    rows = []
    for peer in range(ids.shape[1]):
        shares = accuracy._compute(predictions=ids[:, peer], references=true)
        if clean_labels is not None:
            shares |= memorisation._compute(
                predictions=ids[:, peer], references=given, clean_references=true
            )
        rows.append(shares)
    if count == 1:
        return rows[0]
    result = {key: float(np.mean([row[key] for row in rows[:count]])) for key in rows[0]}
    for name, row in zip([*names, "ensemble"], rows, strict=True):
        row.pop("noise_rate", None)  # a property of the labels, the same for all
        result |= {f"{key}_{name}": share for key, share in row.items()}
    return result


def _integers(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: expected class ids (integers), got {array.dtype} of shape {list(array.shape)}; "
            f"logits would be cut to whole numbers: rank them first, e.g. logits.topk(5).indices"
        )
    return array


def _ids(name: str, value: Any) -> np.ndarray:
    """[N], or [N, k] for predictions, as integers."""
    array = _integers(name, value)
    if array.size == 0 or array.ndim not in ((1, 2) if name == "predictions" else (1,)):
        expected = "[N] or [N, k]" if name == "predictions" else "[N]"
        raise ValueError(
            f"{name}: expected class ids {expected} with N > 0, got shape {list(array.shape)}"
        )
    return array


def _same_length(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    lengths = {name: len(array) for name, array in batch.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"expected equally many samples in each input, got {lengths}; rows would be mismatched"
        )
    return batch


def _ranked(predictions: Any) -> np.ndarray:
    """Ids as [N, k]."""
    ids = np.asarray(predictions)
    return ids[:, None] if ids.ndim == 1 else ids
