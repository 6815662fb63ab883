"""Methods that train in several stages: their losses, and what a stage leaves to the next."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ..audit.estimate_transition import estimate_transition
from .arguments import MutualTrainingArguments

TRANSITION = ("forward_correction", "backward_correction", "t_revision", "reweighting")


@dataclass(frozen=True)
class Stage:
    """One training of a method.

    Args:
        name: of its loss. ``"reweighting"`` is T-revision with the matrix as estimated.
        new: it has new networks; else it goes on with those of the stage before.
        settings: training arguments that differ, as in the authors' code.
    """

    name: str
    new: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


REVISION = {"learning_rate": 5e-7, "optim": "adamw_torch", "optim_args": None}
STAGES = {
    "cdr": [Stage("ce")],  # with CDRCallback
    "joint": [Stage("joint"), Stage("soft_labels")],
    "tf_kd_self": [Stage("ce"), Stage("tf_kd_self")],
    "forward_correction": [Stage("ce"), Stage("forward_correction")],
    "backward_correction": [Stage("ce"), Stage("backward_correction")],
    "t_revision": [
        Stage("ce"),
        Stage("reweighting", new=False),
        Stage("t_revision", new=False, settings=REVISION),
    ],
    "dmi": [Stage("ce"), Stage("dmi", new=False, settings={"learning_rate": 1e-6})],
}


def stages_of(method: str, epochs: Sequence[float] = (), known: bool = False) -> list[Stage]:
    """The stages of a method; a loss that is none of ``STAGES`` is one stage.

    Args:
        method: name of a loss, or ``"cdr"``.
        epochs: ``num_train_epochs`` of each stage; those of the training arguments by default.
        known: the transition matrix is known. A correction then needs no stage to estimate it.

    Raises:
        ValueError: there are not as many ``epochs`` as stages.

    >>> [stage.name for stage in stages_of("joint")]
    ['joint', 'soft_labels']
    """
    stages = STAGES.get(method, [Stage(method)])
    if known and method.endswith("_correction"):
        stages = stages[-1:]
    if epochs and len(epochs) != len(stages):
        names = [stage.name for stage in stages]
        raise ValueError(
            f"epochs of the stages {list(epochs)}: {method} has {len(stages)} stages, {names}"
        )
    lengths = [{"num_train_epochs": length} for length in epochs] or [{}] * len(stages)
    pairs = zip(stages, lengths, strict=True)
    return [replace(stage, settings={**stage.settings, **more}) for stage, more in pairs]


def arguments_of(
    stages: Sequence[Stage], number: int, args: MutualTrainingArguments
) -> MutualTrainingArguments:
    """The arguments of a stage. One of several stages has its own folder, ``2-soft_labels``."""
    stage, own = stages[number], copy.copy(args)
    for key, value in stage.settings.items():
        setattr(own, key, value)
    if len(stages) > 1:
        own.output_dir = str(Path(str(args.output_dir), f"{number + 1}-{stage.name}"))
    return own


def hand_over(
    following: Stage, trainer: Any, view: Any, known: Mapping[str, Any], estimator: str
) -> dict[str, Any]:
    """What a trained stage gives the next one: an argument of its loss, or teachers.

    Args:
        following: the next stage.
        trainer: of the stage that has been trained.
        view: its training data without augmentation.
        known: what needs no estimate: the arguments from before.
        estimator: of the transition matrix; see :func:`kd_plugins.estimate_transition`.
    """
    if following.name == "soft_labels":
        return {"labels": trainer.model.criterion.soft_labels(view.labels).cpu()}
    if following.name == "tf_kd_self":
        return {"teachers": trainer.peers}
    if following.name not in TRANSITION or "transition" in known:
        return {}
    args = trainer.args
    loader = DataLoader(view, args.eval_batch_size, num_workers=args.dataloader_num_workers)
    return {"transition": estimate_transition(trainer.peers[0], loader, method=estimator)}
