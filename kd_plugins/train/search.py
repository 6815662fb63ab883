"""Hyperparameter search over networks and a loss that are made anew for each trial."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from transformers import Trainer


def _mean_loss(figures: Mapping[str, float]) -> float:
    return fmean(value for name, value in figures.items() if name.endswith("_loss"))


class SearchingTrainer(Trainer):
    """A Trainer that makes its networks and its loss by functions of the trial."""

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. Each trial has networks and a loss of its own.

        By default the lowest ``eval_loss`` wins, the mean over several data sets. To maximise, give
        a ``compute_objective`` too, such as ``lambda figures: figures["eval_accuracy"]``.

        >>> losses = lambda trial: SMKD(eta=trial["eta"] if trial else 2)  # doctest: +SKIP
        >>> run = MutualDistillationTrainer(["resnet50"] * 2, losses, args)  # doctest: +SKIP
        """
        if self.model_init is None:
            raise RuntimeError(
                "hyperparameter_search needs networks and a loss for each trial: "
                "MutualDistillationTrainer(lambda trial: [...], lambda trial: SMKD(...), args)"
            )
        if len(args) < 2 and kwargs.get("compute_objective") is None:
            if kwargs.get("direction", "minimize") != "minimize":
                raise ValueError(
                    f"direction={kwargs['direction']!r}: expected a compute_objective with it; the "
                    "default objective is eval_loss, and its largest value would win"
                )
            kwargs["compute_objective"] = _mean_loss
        return super().hyperparameter_search(*args, **kwargs)
