"""Evaluation of several networks at once: accuracy of each and of their ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PredictionOutput

from ..data import as_view, same_classes
from .checks import refuse_labels
from .class_order import check_class_order


@contextmanager
def _no_row_dropped(args: Any) -> Iterator[None]:
    drop, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop


class RankingTrainer(Trainer):
    """A Trainer of a hosted module. It evaluates on ranked class ids and predicts logits."""

    _predicts = False
    evaluated: dict[str, Any]  # by prefix of its figures, the data of the last evaluation
    _views: dict[str, Any]  # the data sets that the constructor was given

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As the Trainer's, with logits [B, C] of one network or [B, K, C] of peers.

        For the Trainer's own metrics only the five most probable class ids are kept, computed on
        the device: the logits of 20,000 samples, 1,000 classes and two networks take 300 MB.
        """
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if logits is None:
            return loss, None, labels
        logits, clean = logits if isinstance(logits, tuple) else (logits, None)
        own = self.compute_metrics == self._metrics
        if own and not self._predicts:
            logits = _ranked(logits)
        elif logits.shape[1] == 1:
            logits = logits[:, 0]
        return loss, (logits, clean) if own and clean is not None else logits, labels

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, over all rows: ``dataloader_drop_last`` is for training."""
        with _no_row_dropped(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As the Trainer's, over all rows."""
        with _no_row_dropped(self.args):
            return super().get_test_dataloader(test_dataset)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As the Trainer's. The model card names the data."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(data, dict):  # the Trainer then calls this for each of them
            data = self.eval_dataset[data] if isinstance(data, str) else data  # type: ignore[index]
            self._refuse_other_classes(data)
            self.evaluated[metric_key_prefix] = data
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As the Trainer's; ``predictions`` are logits [N, C] of a network, [N, K, C] of peers."""
        self._refuse_other_classes(test_dataset)
        self._predicts = True
        try:
            output = super().predict(test_dataset, *args, **kwargs)
        finally:
            self._predicts = False
        if isinstance(output.predictions, tuple):  # with the clean labels
            output = output._replace(predictions=output.predictions[0])
        return output

    def _refuse_other_classes(self, data: Any) -> None:
        """As the constructor, for data that come later."""
        hosted: Any = self.model
        view, peers = as_view(data), hosted.peers
        refuse_labels(view, peers, "evaluation")
        if (train := self._views.get("train")) is not None:
            same_classes(view, train, "the evaluation data")
        elif view is not None:
            check_class_order(peers, (), {"evaluation": view})

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        from ..audit.metrics import peer_metrics

        ranked: Any = prediction.predictions
        ranked, clean = ranked if isinstance(ranked, tuple) else (ranked, None)
        if self._predicts:
            logits = torch.from_numpy(ranked)
            ranked = _ranked(logits if logits.dim() == 3 else logits.unsqueeze(1)).numpy()
        labels = np.asarray(prediction.label_ids)
        labels = labels if labels.ndim == 1 else labels.argmax(-1)  # distributions [N, C]
        known = labels >= 0  # the loss leaves -100 out too
        clean = None if clean is None else clean[known]
        return peer_metrics(ranked[known], labels[known], clean) if known.any() else {}


def _ranked(logits: Tensor) -> Tensor:
    """[B, K, C] -> class ids [B, K (+ 1), 5], most likely first. Peers are followed by their
    ensemble (mean probability).
    """
    scores = logits.float().softmax(-1)
    if scores.shape[1] > 1:
        scores = torch.cat([scores, scores.mean(1, keepdim=True)], dim=1)
    return scores.topk(min(5, scores.shape[-1]), dim=-1).indices.to(torch.int32)
