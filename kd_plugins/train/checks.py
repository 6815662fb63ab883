"""Refuse networks, losses, data and arguments that do not fit, before anything runs."""

from __future__ import annotations

import logging
import math
import os
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


# ------------------------------------------------------------------------------------- arguments


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse arguments that would change what a loss computes, or lose its state."""
    _refuse_strategies(args)
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would replace the loss: use "
            "LabelSmoothing(eps)"
        )
    if (args.bf16_full_eval or args.fp16_full_eval) and args.eval_strategy != "no":
        raise ValueError(
            f"bf16_full_eval and fp16_full_eval leave the weights in half precision, and "
            f"eval_strategy={args.eval_strategy!r} evaluates while training: use bf16 or fp16 alone"
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub=True would upload the pair as one file that nothing loads: call "
            "trainer.push_to_hub() after training, which gives each network its repository"
        )


def _refuse_strategies(args: TrainingArguments) -> None:
    """How several devices share the work: DDP works."""
    world = os.environ.get("WORLD_SIZE", "1")
    if int(world) > 1 and args.world_size == 1:
        raise RuntimeError(
            f"WORLD_SIZE={world}, but this process sees itself alone: the processes would train "
            "apart, into the same files. Without a GPU pass use_cpu=True"
        )
    if args.n_gpu > 1:
        raise RuntimeError(
            f"{args.n_gpu} GPUs are visible to one process: nn.DataParallel would lose the state "
            "of the loss. Start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
        )
    for name in ("fsdp", "deepspeed", "parallelism_config"):
        launched = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false")
        if getattr(args, name, None) or launched.lower() in ("1", "true", "yes"):
            raise ValueError(
                f"{name} shards the parameters, and here each network is clipped, averaged and "
                "saved as a whole: several GPUs and hosts work by DDP (accelerate launch, torchrun)"
            )


def refuse_hf_arguments(args: TrainingArguments, hf: Mapping[str, Any]) -> None:
    """Refuse arguments of ``Trainer`` that this Trainer does not read."""
    instead = {
        "model": "pass the networks as models",
        "model_init": "pass functions of the trial as models and loss",
        "compute_loss_func": "pass a loss; one of your own is a class with per_sample",
    }
    for name in [name for name in instead if hf.get(name) is not None]:
        raise ValueError(f"{name} would be ignored: {instead[name]}")
    if hf.get("compute_metrics") is None:
        if args.batch_eval_metrics:
            raise ValueError(
                "batch_eval_metrics=True: the metrics of this Trainer are computed at the end. "
                "Leave it out, or pass compute_metrics"
            )
        if hf.get("preprocess_logits_for_metrics") is not None:
            raise ValueError(
                "preprocess_logits_for_metrics: the metrics of this Trainer would not understand "
                "its result. Pass compute_metrics too"
            )


def refuse_shared(models: Any, loss: Any) -> None:
    """Refuse networks or a loss that the trials of a hyperparameter search would share."""
    names = [models] if isinstance(models, str) else models
    anew = callable(names) or all(isinstance(model, str) for model in names)
    if not anew or isinstance(loss, nn.Module) or isinstance(models, nn.Module):
        raise ValueError(
            "one of models and loss is a function, which makes it for each trial of a "
            "hyperparameter search: a trial would go on with what the last one has trained. Pass "
            "functions of the trial for networks (or their names) and loss. A loss to train with "
            "is one of kd_plugins, such as CE(), or a class of your own with per_sample"
        )


def warn_of_single(args: TrainingArguments, data: Any, networks: Sequence[nn.Module]) -> None:
    """Warn if the last batch of an epoch has one picture: BatchNorm may fail on it."""
    rows, batch = len(data) if hasattr(data, "__len__") else 0, args.train_batch_size
    single = rows % batch == 1 and batch > 1 and args.world_size == 1
    if single and not args.dataloader_drop_last and any(map(_normalises_batches, networks)):
        logger.warning(
            f"the last batch of each epoch has one picture ({rows} rows in batches of {batch}). "
            "BatchNorm cannot train on one value per channel, and where a network pools before it, "
            "the run will end there. dataloader_drop_last=True leaves this batch out"
        )


def refuse_untrained(loss: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer of the user's that leaves out what the loss learns."""
    groups = getattr(optimizer, "param_groups", None) or []
    known = {id(p) for group in groups for p in group["params"]}
    named = [(name, p) for name, p in loss.named_parameters() if p.requires_grad]
    if groups and (open_ := [name for name, p in named if id(p) not in known]):
        raise ValueError(
            f"{type(loss).__name__} learns {', '.join(open_)}, and the optimizer has the network's "
            "parameters only: they would stay as they are. Use MutualDistillationTrainer and leave "
            "the optimizer to it, or pass optimizers=(optimizer, None) with them"
        )


def _normalises_batches(network: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


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
