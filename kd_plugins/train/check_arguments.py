"""Refuse arguments of a training that would change what is computed, or be ignored."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:  # timm's tasks do without transformers
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


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
            "models or loss is a function, as for a hyperparameter search, and a trial would go on "
            "with what the last one has trained. For a search pass functions of the trial for both "
            "(or names of networks). To train once, pass a loss such as CE(), or a class of your "
            "own with per_sample"
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
