"""The folder of a run: its settings, its checkpoints, and a description of the run."""

from __future__ import annotations

import inspect
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..data import as_view
from ..data.labels import class_names
from ..losses.base import peer_name
from ..losses.state import SampleTable
from .sizes import labels_of

logger = logging.get_logger(__name__)

RUN, STATE, LOSS = "run.json", "trainer_state.json", "loss.safetensors"
NEEDED = {  # a part of a checkpoint, and its names under the plain Trainer, FSDP and DeepSpeed
    "model.safetensors": ("model*.safetensors", "adapter_model*", "pytorch_model*", "global_step*"),
    "optimizer.pt": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}
READ = ("*.safetensors", "*.json", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
SETTINGS = (  # what a checkpoint continues, or silently overrides
    *("num_train_epochs", "max_steps", "seed", "learning_rate", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "milestones", "lr_decay"),
)


# ---------------------------------------------------------------------------------- what a run is


def describe_run(
    args: TrainingArguments,
    loss: nn.Module,
    networks: Sequence[nn.Module],
    teachers: Sequence[nn.Module],
    data: Any,
) -> dict[str, Any]:
    """What distinguishes a run from other runs, as a flat dictionary that JSON can hold."""
    run = _describe_loss(loss, "loss")
    for k, network in enumerate(networks):
        run |= _describe_network(network, f"network {peer_name(k)}")
    for k, teacher in enumerate(teachers):
        name = f"teacher {k}"
        run |= _describe_network(teacher, name)
        run[f"{name}.weights"] = _digest(v.flatten()[:64] for v in teacher.state_dict().values())
    run |= _describe_data(data) | describe_arguments(args)
    return json.loads(json.dumps(run, default=str))


def describe_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide what a run computes."""
    settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    if args.max_steps > 0:  # the Trainer then ignores the epochs
        settings["num_train_epochs"] = None
    settings["batch"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {name: getattr(value, "value", value) for name, value in settings.items()}


def _describe_loss(module: nn.Module, name: str) -> dict[str, Any]:
    """Every part of a loss with its constructor arguments, without the state of training."""
    description: dict[str, Any] = {name: f"{type(module).__name__}({module.extra_repr()})"}
    own = vars(module) | module._buffers | module._modules
    for argument in ["class_weights", *inspect.signature(type(module).__init__).parameters]:
        value = own.get(argument)
        value = value.rows if isinstance(value, SampleTable) else value
        if isinstance(value, Tensor | np.ndarray):
            description[f"{name}.{argument}"] = _digest([torch.as_tensor(value)])
        elif isinstance(value, list | tuple):
            description[f"{name}.{argument}"] = [_plain(v) for v in value]
        elif callable(value) and not isinstance(value, nn.Module):
            description[f"{name}.{argument}"] = _plain(value)
    for child, part in module.named_children():
        description = _describe_loss(part, f"{name}.{child}") | description
    return description


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _describe_network(network: nn.Module, name: str) -> dict[str, Any]:
    config = getattr(network, "pretrained_cfg", None) or {}
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    digest = blake2b(json.dumps(shapes, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {name: config.get("architecture") or type(network).__name__, f"{name}.shapes": digest}


def _describe_data(data: Any) -> dict[str, Any]:
    """The rows of a data set, and a digest of labels, class names and cached logits it shows."""
    data = as_view(data)
    parts: dict[str, Any] = {"data.rows": len(data) if hasattr(data, "__len__") else None}
    if (labels := labels_of(data)) is not None:
        parts["data.labels"] = _digest([torch.tensor(labels)])
    if (names := class_names(data)) is not None:
        text = json.dumps(list(names)).encode()
        parts["data.class_names"] = blake2b(text, digest_size=16).hexdigest()
    if (logits := getattr(data, "teacher_logits", None)) is not None:
        parts["data.teacher_logits"] = list(logits.shape)
    return parts


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        value = tensor.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        digest.update(np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs, in words. The parts of an object of another class are not named as well."""

    def shown(values: Mapping[str, Any], name: str) -> str:
        return str(values[name]) if name in values else "not given"

    names = [n for n in sorted({*saved, *current}) if saved.get(n) != current.get(n)]
    other = [n for n in names if shown(saved, n).split("(")[0] != shown(current, n).split("(")[0]]
    names = [n for n in names if not any(n.startswith(f"{o}.") for o in other)]
    return [f"{n} was {shown(saved, n)} and is now {shown(current, n)}" for n in names]


# ----------------------------------------------------------------------------------- checkpoints


def write_run(folder: Path, run: dict[str, Any], args: TrainingArguments, *files: str) -> None:
    """Write into a checkpoint to which run it belongs and which files it has."""
    ranks = range(args.world_size)
    if args.save_on_each_node:
        first = args.process_index - args.local_process_index
        ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    states = [f"rng_state_{k}.pth" for k in ranks] if args.world_size > 1 else ["rng_state.pth"]
    content = {"run": run, "processes": args.world_size, "files": [*states, *files]}
    write_whole(folder / RUN, json.dumps(content, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is complete or absent."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    """Raise if a checkpoint belongs to another run. One without ``run.json`` is not checked."""
    path = folder / RUN
    if not path.exists():
        return
    if other := differences(json.loads(path.read_text(encoding="utf-8"))["run"], run):
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(other)}. Its weights, schedule and "
            f"tables would not fit this one. Train into another output_dir, or use the settings of "
            f"that run. To go on from it all the same, delete {path}"
        )


def refuse_damaged(folder: Path) -> None:
    """Raise if a checkpoint lacks a file or has one that cannot be read."""
    if found := faults(folder):
        raise ValueError(
            f"{folder} cannot be resumed: {'; '.join(found)}. The run would go on with part of its "
            "state. Choose another checkpoint"
        )


def faults(folder: Path) -> list[str]:
    """Which files of a checkpoint are missing or damaged, in words."""
    if not folder.is_dir():
        return [f"there is no such folder in {folder.parent}"]
    found = {path for pattern in READ for path in folder.glob(pattern)}
    damaged = {path.name: why for path in sorted(found) if (why := _damage(path))}
    needed = [STATE]
    if (folder / RUN).exists() and RUN not in damaged:
        needed += json.loads((folder / RUN).read_text(encoding="utf-8"))["files"]
    for index in folder.glob("*.safetensors.index.json"):
        if index.name not in damaged:
            needed += json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    missing = [name for name in dict.fromkeys(needed) if not (folder / name).exists()]
    missing += [
        name
        for name, patterns in NEEDED.items()
        if name not in missing and not any(True for p in patterns for _ in folder.glob(p))
    ]
    return [f"{name} is missing" for name in missing] + [
        f"{name} is damaged ({why})" for name, why in damaged.items()
    ]


def _damage(path: Path) -> str | None:
    """Why a file cannot be read; None if it can. Nothing is unpickled."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.is_file():
            with zipfile.ZipFile(path) as archive:  # as torch writes it, with checksums
                return f"wrong checksum of {bad}" if (bad := archive.testzip()) else None
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        return str(error) or type(error).__name__
    return None


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last."""
    return (folder / STATE).exists() and _damage(folder / STATE) is None


def last_checkpoint(output_dir: str | Path | None) -> str | None:
    """The newest checkpoint from which a run can go on; None if no checkpoint was finished.

    A checkpoint that a kill has left unfinished is passed over, and so is one with a missing or
    damaged file; the log names it.

    Raises:
        ValueError: there are finished checkpoints, and each one has a missing or damaged file.
    """
    paths = [p for p in Path(output_dir or ".").glob("checkpoint-*") if p.is_dir()]
    paths = [p for p in paths if p.name.split("-")[-1].isdecimal()]
    passed: list[str] = []
    damaged = False
    for path in sorted(paths, key=lambda p: -int(p.name.split("-")[-1])):
        found = faults(path) if is_finished(path) else ["it was not written to its end"]
        if not found:
            if passed:
                logger.warning(f"{'; '.join(passed)}. Going on from {path} instead")
            return str(path)
        damaged = damaged or is_finished(path)
        passed.append(f"{path} cannot be resumed: {', '.join(found)}")
    if damaged:
        raise ValueError(
            f"{'; '.join(passed)}. No older checkpoint is complete. To train from the start, "
            "choose another output_dir or delete these folders"
        )
    if passed:
        logger.warning(f"{'; '.join(passed)}. There is no older checkpoint: training starts anew")
    return None


def checkpoint_of(args: Any, state: Any) -> Path:
    """The checkpoint of the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


# ------------------------------------------------------------------------------------- experiments


def claim_folder(args: TrainingArguments, **settings: Any) -> None:
    """Keep ``args.output_dir`` for one experiment.

    The first call writes ``settings.json``; a later one with other settings, seed, length, batch,
    optimizer or schedule raises.
    """
    settings |= describe_arguments(args)
    current = json.loads(json.dumps(settings, default=str))
    path = Path(str(args.output_dir), "settings.json")
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if other := [k for k in sorted({*saved, *current}) if saved.get(k) != current.get(k)]:
            raise ValueError(
                f"{path.parent} holds a run with { ({k: saved.get(k) for k in other}) }, asked for "
                f"is { ({k: current.get(k) for k in other}) }. Its checkpoints would be taken for "
                "this run's. Choose another --output_dir, or delete it"
            )
    elif args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(current, indent=1))


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The lines that :func:`append_result` wrote; none if there is no such file.

    A line that a kill has cut short is left out.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def append_result(path: str | Path, result: Mapping[str, Any]) -> None:
    """Add the result of one of many runs to a file, as a line of JSON."""
    path = Path(path)
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(result) + "\n")
