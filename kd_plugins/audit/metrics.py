"""Accuracy and memorisation, as `evaluate.Metric` modules and for several peers at once.

All inputs are class ids, never logits: a ranking of a few ids per sample is small to gather and to
keep. All results are shares in [0, 1]. The share of an empty group is left out, because NaN in a
log is not JSON.
"""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import datasets
import evaluate
import numpy as np

from ..losses import validate


class _Metric(evaluate.Metric):
    """Takes predictions as ids [N] or ranked ids [N, k], and other inputs as ids [N]."""

    inputs: tuple[str, ...] = ("predictions", "references")

    def __init__(self, **kwargs: Any) -> None:
        # One process can keep everything in memory. Several exchange files, and evaluate insists.
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        columns = dict.fromkeys(self.inputs, ids)
        ranked = {**columns, "predictions": datasets.Sequence(ids)}
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=[datasets.Features(ranked), datasets.Features(columns)],
            inputs_description="\nClass ids: predictions [N] or ranked [N, k], best first; "
            "other inputs [N].",
        )

    def _build_data_dir(self) -> str:
        # evaluate creates a folder under the home directory even for a metric in memory. A
        # read-only home would fail.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample."""
        # evaluate.combine passes predictions= and references= here as well, in the plural.
        sample = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in sample.items()})

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch.

        Raises:
            TypeError: an input does not hold integers.
            ValueError: the shapes do not fit.
        """
        batch = {"predictions": predictions, "references": references, **kwargs}
        batch = {
            name: _class_ids(name, value, (1, 2) if name == "predictions" else (1,))
            for name, value in batch.items()
            if name in self.inputs
        }
        validate.same_length(**batch)
        super().add_batch(**batch)


class TopKAccuracy(_Metric):
    """The share of samples predicted right: `accuracy` by the first id, `top<k>` by the first k.

    Args:
        k: how many ids may contain the reference. `top<k>` is reported where the predictions hold
            at least k ids.

    >>> TopKAccuracy(k=2).compute(predictions=[[1, 0, 2], [2, 0, 1]], references=[1, 0])
    {'accuracy': 0.5, 'top2': 1.0}
    >>> TopKAccuracy().compute(predictions=[1, 2], references=[1, 0])
    {'accuracy': 0.5}
    """

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = validate.count("k", k, "top1 is the accuracy itself", least=2)

    # evaluate.combine passes every metric all inputs, clean_references too.
    def _compute(self, *, predictions: Any, references: Any, clean_references: Any = None) -> Any:
        return _accuracy(_ranked(predictions), np.asarray(references), self.k)


class Memorisation(_Metric):
    """What became of wrong labels, from given labels (references) and true ones (clean_references).

    - `noise_rate`: the share of samples whose given label is wrong.
    - `accuracy_clean_part`: among the rightly labelled, the share predicted right.
    - `memorised`: among the wrongly labelled, the share predicted as their wrong label.
    - `corrected`: among the wrongly labelled, the share predicted as their true class.

    >>> metric = Memorisation()
    >>> given, true = [0, 1, 1, 2], [0, 0, 2, 2]
    >>> metric.compute(predictions=[0, 1, 2, 2], references=given, clean_references=true)
    {'noise_rate': 0.5, 'accuracy_clean_part': 1.0, 'memorised': 0.5, 'corrected': 0.5}
    """

    inputs = ("predictions", "references", "clean_references")

    def _compute(self, *, predictions: Any, references: Any, clean_references: Any) -> Any:
        return _memorisation(
            _ranked(predictions)[:, 0], np.asarray(references), np.asarray(clean_references)
        )


def peer_metrics(
    top_ids: Any, labels: Any, clean_labels: Any = None, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Accuracy and memorisation of each peer (`accuracy_a` ...), their mean and their ensemble.

    The mean over peers has the plain name (`accuracy`), the ensemble `accuracy_ensemble`. A single
    peer has plain names only. With clean labels, accuracy and top5 are measured on those, and the
    results of :class:`Memorisation` are added.

    Args:
        top_ids: ranked class ids, best first: [N, 1, k] for one peer; [N, K + 1, k] for K > 1
            peers, with the ensemble last.
        labels: given labels [N].
        clean_labels: true labels [N], where they are known.
        names: the suffix of each peer; by default a, b, c ...

    Raises:
        TypeError: ids or labels are not integers.
        ValueError: shapes or names do not fit.

    >>> peer_metrics([[[0], [1], [0]], [[1], [1], [1]]], labels=[0, 1])
    {'accuracy': 0.75, 'accuracy_a': 1.0, 'accuracy_b': 0.5, 'accuracy_ensemble': 1.0}
    """
    ids = _class_ids("top_ids", top_ids)
    if ids.ndim != 3 or ids.shape[1] in (0, 2) or 0 in ids.shape:
        raise ValueError(
            "top_ids: expected [N, 1, k] for one peer, or [N, K+1, k] for K > 1 peers followed by "
            f"their ensemble, got {list(ids.shape)}; peers and ensemble could not be told apart"
        )
    count = max(1, ids.shape[1] - 1)
    names = list(ascii_lowercase[:count] if names is None else names)
    if len(names) != count or len({*names, "ensemble"}) != count + 1:
        raise ValueError(
            f"names: expected {count} different names, none of them 'ensemble', got {names}"
        )
    given = _class_ids("labels", labels, (1,))
    true = given if clean_labels is None else _class_ids("clean_labels", clean_labels, (1,))
    validate.same_length(top_ids=ids, labels=given, clean_labels=true)

    rows = []
    for ranked in ids.swapaxes(0, 1):  # on arrays: compute() would convert 50k rows in 0.5 s
        rows.append(_accuracy(ranked, true, k=5))
        if clean_labels is not None:
            rows[-1] |= _memorisation(ranked[:, 0], given, true)
    if count == 1:
        return rows[0]
    result = {key: float(np.mean([row[key] for row in rows[:count]])) for key in rows[0]}
    for name, row in zip([*names, "ensemble"], rows, strict=True):
        row.pop("noise_rate", None)  # it is the same for all peers
        result |= {f"{key}_{name}": share for key, share in row.items()}
    return result


def _accuracy(ranked: np.ndarray, true: np.ndarray, k: int) -> dict[str, float]:
    hit = ranked == true[:, None]  # [N, k]
    shares = {"accuracy": float(hit[:, 0].mean())}
    if hit.shape[1] >= k:
        shares[f"top{k}"] = float(hit[:, :k].any(1).mean())
    return shares


def _memorisation(guess: np.ndarray, given: np.ndarray, true: np.ndarray) -> dict[str, float]:
    wrong = given != true
    shares = {"noise_rate": float(wrong.mean())}
    if not wrong.all():
        shares["accuracy_clean_part"] = float((guess == true)[~wrong].mean())
    if wrong.any():
        shares["memorised"] = float((guess == given)[wrong].mean())
        shares["corrected"] = float((guess == true)[wrong].mean())
    return shares


def _ranked(predictions: Any) -> np.ndarray:
    """Ids as [N, k]."""
    ids = np.asarray(predictions)
    return ids[:, None] if ids.ndim == 1 else ids


def _class_ids(name: str, value: Any, dims: tuple[int, ...] | None = None) -> np.ndarray:
    """The value as integers; with `dims`, of one of these numbers of dimensions and not empty."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: expected class ids (integers), got {array.dtype} of shape "
            f"{list(array.shape)}; logits would be cut to whole numbers: rank them first, e.g. "
            "logits.topk(5).indices"
        )
    if dims and (array.ndim not in dims or not array.size):
        expected = "[N] or [N, k]" if 2 in dims else "[N]"
        raise ValueError(
            f"{name}: expected class ids {expected} with N > 0, got shape {list(array.shape)}"
        )
    return array
