"""Refuse networks, losses and data that do not fit, before anything runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from PIL import Image
from torch import nn
from torch.utils.data import IterableDataset

from ..data import same_classes
from ..losses.base import Loss, peer_name
from ..models.factory import class_count
from ..models.features import has_features
from .sizes import num_classes_of

if TYPE_CHECKING:  # timm's tasks do without transformers
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

ROWS = "expected a mapping with pixel_values (a tensor) and labels (a class index)"


# ------------------------------------------------------------------------------ networks and loss


def refuse_plain(loss: Loss) -> None:
    """Refuse a loss for peers, on features, or without reduction in a plain Trainer."""
    _refuse_loss(loss)
    name, use = type(loss).__name__, "use MutualDistillationTrainer(models, loss, args, ...)"
    if loss.num_peers > 1:
        raise ValueError(f"{name} teaches several networks, and a plain Trainer has one: {use}")
    if maps := sorted(loss.required_inputs & {"features", "teacher_features"}):
        raise ValueError(
            f"{name} reads {' and '.join(maps)}, maps from within the networks, and a plain "
            f"Trainer shows logits only: {use}"
        )


def refuse_pairing(
    peers: Sequence[nn.Module], teachers: Sequence[nn.Module], loss: Loss, cached: Any = None
) -> None:
    """Refuse networks, teachers and a loss that do not fit together.

    Args:
        peers: the networks that learn.
        teachers: the networks that they learn from.
        loss: of the peers.
        cached: logits of teachers [N, T, C] that come with the training data.
    """
    _refuse_loss(loss)
    _refuse_peers(peers, teachers, loss)
    _refuse_teachers(teachers, loss, cached)
    name, required = type(loss).__name__, loss.required_inputs
    read = [*peers] * ("features" in required) + [*teachers] * ("teacher_features" in required)
    if blind := [type(p).__name__ for p in read if not has_features(p)]:
        raise TypeError(
            f"{name} reads features, which are taken from timm networks (forward_features); not "
            f"from {blind}"
        )
    compared = teachers if "teacher" in required else []
    _refuse_classes(peers, compared, name, cached)


def _refuse_loss(loss: Loss) -> None:
    name = type(loss).__name__
    if isinstance(loss, str):
        raise TypeError(f"loss={loss!r}: expected a kd_plugins loss, create_loss({loss!r})")
    if not isinstance(loss, Loss):
        raise TypeError(
            f"loss must be a kd_plugins loss, got {name}; create_loss('ce') is plain cross-entropy"
        )
    if loss.reduction == "none":
        raise ValueError(
            f"{name} has reduction='none', a value per sample: training needs one number, so use "
            "reduction='mean'"
        )


def _refuse_peers(peers: Sequence[nn.Module], teachers: Sequence[nn.Module], loss: Loss) -> None:
    name, count = type(loss).__name__, len(peers)
    if loss.num_peers > 1 and count < 2:
        raise ValueError(
            f"{name} teaches peers and there is one network: pass at least two, or a loss for one"
        )
    if loss.num_peers == 1 and count > 1:
        raise ValueError(
            f"{name} is a loss for one network and there are {count}: pass one network, or a loss "
            "for peers such as SMKD. In Python, Mutual(loss, SelectNone()) trains them side by side"
        )
    if loss.num_peers != count:
        raise ValueError(
            f"{name} was made for num_peers={loss.num_peers}, there are {count} networks"
        )
    if len({id(p) for p in [*peers, *teachers]}) < count + len(teachers):
        raise ValueError(
            "the same module stands twice among the networks: they would share their weights"
        )
    for k, peer in enumerate(peers):
        if not any(p.requires_grad for p in peer.parameters()):
            raise ValueError(
                f"network {peer_name(k)} ({type(peer).__name__}) has no trainable parameter and "
                "would never learn: call requires_grad_(True), or pass it in teachers=[...]"
            )


def refuse_views(loss: Loss, data: Any) -> None:
    """A view of the training data that has fewer views of each picture than the loss wants."""
    views = getattr(data, "views", loss.views)
    if views < loss.views:
        raise ValueError(
            f"{type(loss).__name__} compares {loss.views} augmented views of each picture, and the "
            f"training data have {views}: expected ImageView(..., views={loss.views})"
        )


def _refuse_teachers(teachers: Sequence[nn.Module], loss: Loss, cached: Any) -> None:
    name, averaged = type(loss).__name__, loss.ema_decay is not None
    taught = sorted(loss.required_inputs & {"teacher", "teacher_features"})
    if averaged and (teachers or cached is not None):
        given = (
            f"the {len(teachers)} teachers given"
            if teachers
            else "the teachers' logits in the training data"
        )
        raise ValueError(f"{name} learns from its peers' averages over time, not from {given}")
    if cached is not None and teachers:
        raise ValueError(
            f"the training data bring logits of {cached.shape[1]} teachers, and {len(teachers)} "
            "teachers are given: pass teachers=[...] or the data of cache_teachers, not both"
        )
    if cached is not None and "teacher_features" in taught:
        raise ValueError(
            f"{name} reads teacher_features, and the training data bring logits only: pass "
            "teachers=[...] and the view without the cache"
        )
    if taught and not teachers and not averaged and cached is None:
        raise ValueError(
            f"{name} reads {', '.join(taught)}, and there are no teachers: pass teachers=[...]"
        )
    if teachers and not taught:
        raise ValueError(
            f"{name} does not read teacher: the {len(teachers)} teachers would run for nothing"
        )


def _refuse_classes(
    peers: Sequence[nn.Module], teachers: Sequence[nn.Module], name: str, cached: Any
) -> None:
    """Logits are compared class by class; ``teachers`` are those whose logits the loss reads."""
    networks = {f"network {peer_name(k)}": peer for k, peer in enumerate(peers)}
    networks |= {f"teacher {k}": teacher for k, teacher in enumerate(teachers)}
    counts = {key: class_count(network) for key, network in networks.items()}
    counts |= {} if cached is None else {"cached teachers": cached.shape[2]}
    if headless := [key for key, count in counts.items() if count == 0]:
        raise ValueError(
            f"{', '.join(headless)}: num_classes=0, so it gives no logits, which {name} reads. "
            "Give it a head, or choose a loss that reads teacher_features only"
        )
    if len({count for count in counts.values() if count is not None}) > 1:
        raise ValueError(
            f"the networks have different numbers of classes: {counts}; they cannot teach each "
            "other by their logits"
        )


def refuse_used(loss: Loss, control: Any) -> None:
    """Refuse a loss whose state comes from the training of another Trainer.

    Args:
        loss: :func:`mark_used` has left a note of its Trainer in it.
        control: of the Trainer; it is the same object in each of its trainings.
    """
    for part in loss.modules():
        other = vars(part).get("_trained_by") not in (None, vars(control).get("trainer_id"))
        if other and part.state_dict():
            raise ValueError(
                f"this {type(part).__name__} was trained by another Trainer, and its state "
                "(running means, tables, parameters) would carry over into this training. Make a "
                "new loss; to carry the state over on purpose, "
                "new.load_state_dict(loss.state_dict())"
            )


def mark_used(loss: Loss, control: Any) -> None:
    """Leave a note of the Trainer in a loss that it trains."""
    trainer = vars(control).setdefault("trainer_id", uuid4().hex)
    for part in loss.modules():  # a part may stand in another loss next time
        vars(part)["_trained_by"] = trainer


# ------------------------------------------------------------------------------------------- data


def refuse_rows(views: Mapping[str, Any], args: TrainingArguments) -> None:
    """Refuse data whose rows the Trainer's collator cannot put into a batch: it reads the first.

    Args:
        views: data sets by name. Streams are not read.
        args: whether the Trainer drops columns that no network reads.
    """
    for name, view in views.items():
        if isinstance(view, IterableDataset) or not hasattr(view, "__getitem__") or not len(view):
            continue
        row = view[0]
        if not isinstance(row, Mapping) and not hasattr(row, "__dict__"):
            raise TypeError(
                f"row 0 of the {name} data is a {type(row).__name__}: {ROWS}. Wrap pictures and "
                "classes: ImageView(dataset, transform), or pass a data_collator"
            )
        values = {} if args.remove_unused_columns else dict(getattr(row, "items", dict)())
        if pictures := [key for key, value in values.items() if isinstance(value, Image.Image)]:
            how = "wrap the data: ImageView(dataset, transform)"
            if "pixel_values" in pictures:
                how = "the transform must return a tensor: end it with ToTensor() or PILToTensor()"
            raise TypeError(
                f"{pictures[0]!r} in row 0 of the {name} data is a picture of PIL "
                f"({type(values[pictures[0]]).__name__}): {ROWS}; {how}"
            )


def refuse_data(views: Mapping[str, Any], peers: Sequence[nn.Module], loss: Loss) -> None:
    """Refuse labels, classes and views of pictures that fit neither the networks nor the loss.

    Warn of networks with more outputs than the training data have classes.
    """
    train = views.get("train")
    refuse_views(loss, train)
    classes, outputs = num_classes_of(train), [class_count(peer) or 0 for peer in peers]
    if classes and (spare := [peer_name(k) for k, n in enumerate(outputs) if n > classes]):
        logger.warning(
            f"network {', '.join(spare)}: {max(outputs)} outputs, and the training data have "
            f"{classes} classes. The other outputs learn only to stay small, and losses that count "
            f"classes count them too: num_classes={classes} makes a network without them"
        )
    for name, view in views.items():
        refuse_labels(view, peers, name)
        same_classes(view, train, f"the {name} data")


def refuse_labels(view: Any, peers: Sequence[nn.Module], name: str) -> None:
    """Refuse labels for which the networks have no class."""
    classes = next((n for p in peers if (n := class_count(p))), None)
    labels = getattr(view, "labels", None)
    if classes is None or labels is None or len(labels) == 0:
        return
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        row = int(np.argmax(np.asarray(labels) == bad))
        raise ValueError(
            f"label {bad} in row {row} of the {name} data is outside the {classes} classes of the "
            "networks"
        )


# ------------------------------------------------------------------------------------ while it runs


def refuse_nan(figures: Mapping[str, float], args: TrainingArguments, step: int) -> None:
    """Refuse a loss that is not finite: every weight it reached is lost."""
    if not math.isfinite(figures["loss"]):
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        raise FloatingPointError(
            f"the training loss is {figures['loss']} at step {step} (not finite: {bad[:9]}). The "
            f"weights are lost; the last checkpoint in {args.output_dir} is not. Lower the "
            f"learning rate ({args.learning_rate}), clip (max_grad_norm) or warm up, and resume"
        )
