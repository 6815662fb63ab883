"""What networks, a loss and data cannot do together, said before anything runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from torch import nn

from ..data import num_samples
from ..losses.base import Loss, peer_name
from ..losses.state import SampleTable
from ..models.factory import class_count
from ..models.features import has_features

if TYPE_CHECKING:  # timm's tasks do without transformers
    from transformers import TrainingArguments


def refuse_arguments(args: TrainingArguments, given_metrics: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.world_size == 1:
        raise RuntimeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but this process sees itself alone: the processes would train apart and write "
            "over each other's files. Without a GPU pass use_cpu=True (MutualTrainingArguments does)"
        )
    if args.n_gpu > 1:
        raise RuntimeError(
            f"{args.n_gpu} GPUs are visible to one process, which would run nn.DataParallel and lose the state of "
            "the loss: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
        )
    if args.batch_eval_metrics and not given_metrics:
        raise ValueError(
            "batch_eval_metrics=True: the metrics of this Trainer are computed at the end, from a "
            "few class ids a sample. Leave it out, or pass compute_metrics"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} would replace the loss: use LabelSmoothing(eps)"
        )
    if (args.bf16_full_eval or args.fp16_full_eval) and args.eval_strategy != "no":
        raise ValueError(
            "bf16_full_eval and fp16_full_eval leave the weights in half precision after the first evaluation, "
            f"and eval_strategy={args.eval_strategy!r} evaluates while training: use bf16 or fp16 alone"
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub=True would upload the pair as one file that nothing loads: leave it out and call "
            "trainer.push_to_hub() after training, which gives each network its repository (and takes hub_model_id, "
            "hub_token, hub_revision and hub_private_repo from these arguments)"
        )


def refuse_pairing(
    peers: list[nn.Module], teachers: list[nn.Module], loss: Loss, cached: Any = None
) -> None:
    """``cached``: what teachers said of the training data [N, T, C], where these bring it."""
    name = type(loss).__name__
    if not isinstance(loss, Loss):
        raise TypeError(
            f"loss must be a kd_plugins loss, got {name}; create_loss('ce') is plain cross-entropy"
        )
    if loss.peers and len(peers) < 2:
        raise ValueError(
            f"{name} teaches peers and there is one network: pass at least two, or a loss for one"
        )
    if not loss.peers and len(peers) > 1:
        raise ValueError(
            f"{name} is a loss for one network and there are {len(peers)}: Mutual({name}(), Nothing()) trains them "
            "side by side, SMKD(...) lets them teach each other"
        )
    if loss.peers and loss.num_peers != len(peers):
        raise ValueError(
            f"{name} was made for num_peers={loss.num_peers}, there are {len(peers)} networks"
        )
    averaged = loss.ema_decay is not None
    if averaged and (teachers or cached is not None):
        given = (
            f"the {len(teachers)} teachers given"
            if teachers
            else "the teachers' logits in the training data"
        )
        raise ValueError(f"{name} learns from its peers' averages over time, not from {given}")
    taught = loss.reads & {"teacher", "teacher_features"}
    if cached is not None and teachers:
        raise ValueError(
            f"the training data bring logits of {cached.shape[1]} teachers, and {len(teachers)} teachers are given "
            "that would not be asked: pass teachers=[...] or the data of cache_teachers, not both"
        )
    if cached is not None and "teacher_features" in taught:
        raise ValueError(
            f"{name} reads teacher_features, and the training data bring logits only: pass teachers=[...], and the "
            "view without the cache"
        )
    if taught and not teachers and not averaged and cached is None:
        raise ValueError(
            f"{name} reads {', '.join(sorted(taught))}, and there are no teachers: pass teachers=[...]"
        )
    if teachers and not taught:
        raise ValueError(
            f"{name} does not read teacher: the {len(teachers)} teachers would run for nothing"
        )
    read = [
        *(peers if "features" in loss.reads else ()),
        *(teachers if "teacher_features" in loss.reads else ()),
    ]
    if blind := [type(p).__name__ for p in read if not has_features(p)]:
        raise TypeError(
            f"{name} reads features, which are taken from timm networks (forward_features); not from {blind}"
        )
    if len({id(p) for p in [*peers, *teachers]}) < len(peers) + len(teachers):
        raise ValueError(
            "the same module stands twice among the networks: they would share their weights; make a second one"
        )
    refuse_frozen(peers)
    _refuse_classes(peers, teachers if "teacher" in taught else [], name, cached)


def _refuse_classes(
    peers: list[nn.Module], teachers: list[nn.Module], name: str, cached: Any
) -> None:
    """Logits are compared class by class; ``teachers`` are those whose logits the loss reads."""
    networks = {f"network {peer_name(k)}": peer for k, peer in enumerate(peers)}
    networks |= {f"teacher {k}": teacher for k, teacher in enumerate(teachers)}
    counts = {key: class_count(network) for key, network in networks.items()}
    counts |= {} if cached is None else {"cached teachers": cached.shape[2]}
    if headless := [key for key, count in counts.items() if count == 0]:
        raise ValueError(
            f"{', '.join(headless)}: num_classes=0, a network without a classifier gives features "
            f"and no logits, which {name} reads. Give it a head, or choose a loss that reads "
            "teacher_features only"
        )
    if len({count for count in counts.values() if count is not None}) > 1:
        raise ValueError(
            f"the networks have different numbers of classes: {counts}; they cannot teach each "
            "other by their logits"
        )


def refuse_frozen(peers: list[nn.Module]) -> None:
    """A peer learns; a network without a trainable parameter is a teacher."""
    for k, peer in enumerate(peers):
        if not any(p.requires_grad for p in peer.parameters()):
            raise ValueError(
                f"network {peer_name(k)} ({type(peer).__name__}) has no parameter that requires a "
                "gradient: it would never learn. Call requires_grad_(True) on it, or pass it in "
                "teachers=[...]"
            )


def refuse_used(loss: Loss, control: Any, resumed: bool) -> None:
    """A loss with state begins a training fresh, or goes on in the Trainer that has trained it.

    Args:
        loss: it keeps a note of its Trainer.
        control: of the Trainer; it is the same object in each of its trainings.
        resumed: a checkpoint has replaced the state.
    """
    trainer = vars(control).setdefault("trainer_id", uuid4().hex)
    other = vars(loss).get("_trained_by", trainer) != trainer
    if other and not resumed and loss.state_dict():
        raise ValueError(
            f"this {type(loss).__name__} was trained by another Trainer, and its state (running "
            "means, tables, parameters) would carry over into this training. Make a new loss; to "
            "carry the state over on purpose, new.load_state_dict(loss.state_dict())"
        )
    vars(loss)["_trained_by"] = trainer


def refuse_tables(loss: Loss, view: Any) -> None:
    """A loss with a row for each training sample has to have as many."""
    rows = num_samples(view)
    for name, module in loss.named_modules():
        if isinstance(module, SampleTable) and rows not in (None, module.num_samples):
            raise ValueError(
                f"{name} of {type(loss).__name__} has num_samples={module.num_samples} rows, the training data "
                f"{rows}: samples would share rows, or have none"
            )


def refuse_labels(view: Any, peers: list[nn.Module], name: str) -> None:
    classes = next((n for p in peers if (n := class_count(p))), None)
    labels = getattr(view, "labels", None)
    if classes is None or labels is None or len(labels) == 0:
        return
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        row = int(np.argmax(np.asarray(labels) == bad))
        raise ValueError(
            f"label {bad} in row {row} of the {name} data is outside the {classes} classes of the networks"
        )
