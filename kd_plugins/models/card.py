"""The model card that is written beside an exported network."""

from __future__ import annotations

import inspect
import re
from textwrap import indent
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData

from ..losses.base import peer_name
from .export import library_of

_TIMES = ("runtime", "per_second", "model_preparation_time")


def model_card(
    trainer: Any,
    k: int,
    repo: str | None = None,
    input_config: dict[str, Any] | None = None,
    **metadata: Any,
) -> str:
    """Card of network k of a ``MutualDistillationTrainer``: method, data, noise and figures.

    Args:
        trainer: after training.
        k: number of the network among the peers.
        repo: id of the repository that the card is for; None for a folder.
        input_config: how pictures were prepared for this network.
        **metadata: fields of ``huggingface_hub.ModelCardData`` that only the caller knows, such as
            ``license`` and ``datasets``.
    """
    peers, data, peer = trainer.model.peers, trainer.train_dataset, trainer.model.peers[k]
    name, title, library, of_text = (
        peer_name(k),
        _architecture(peer),
        library_of(peer),
        reads_text(peer),
    )
    beside = ", ".join(_architecture(other) for other in peers if other is not peer)
    taught = _taught(trainer)
    paragraphs = [
        f"# {title}",
        f"Network {name} of {len(peers)}, trained with kd-plugins"
        f"{f' beside {beside}' if beside else ''}{f', taught by {taught}' if taught else ''}.",
        "**Method**",
        indent(repr(trainer.model.criterion), "    "),
        f"**Data**: {_describe(data)}",
        f"**Label noise**: {_noise(data)}",
        f"**Training**: {_training(trainer, k)}",
        f"**Input**: {'tokens.' if of_text else _input(input_config)}",
        f"**Figures** (all networks of the run; {name} is this one)",
        _evaluated(trainer),
        _figures(_logs(trainer)),
        "**Use**",
        _use(library, of_text, repo, title),
    ]
    return f"---\n{_metadata(library, of_text, metadata)}\n---\n" + "\n\n".join(paragraphs) + "\n"


def reads_text(model: Any) -> bool:
    """Whether a network takes tokens, as a Hugging Face text classifier says of itself."""
    return getattr(model, "main_input_name", None) == "input_ids"


def _metadata(library: str, of_text: bool, given: dict[str, Any]) -> str:
    """The YAML block at the head of a card."""
    fields = set(inspect.signature(ModelCardData).parameters) - {"kwargs", "ignore_metadata_errors"}
    if unknown := set(given) - fields:
        raise TypeError(
            f"a model card has no field {sorted(unknown)}, the hub would ignore it; it has "
            f"{sorted(fields)}"
        )
    loaders = {"timm": ["timm", "transformers"], "transformers": ["transformers"]}.get(library, [])
    tags = given.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    task = "text-classification" if of_text else "image-classification"
    known = {"library_name": library, "pipeline_tag": task} | given
    known["tags"] = [task, *loaders, "kd-plugins", *tags]
    return ModelCardData(**known).to_yaml()


def _taught(trainer: Any) -> str:
    """The teachers by name, or how many there were if the data bring their logits."""
    cached = getattr(trainer.train_dataset, "teacher_logits", None)
    if cached is not None:
        return f"the cached logits of {cached.shape[1]} network{'s' * (cached.shape[1] > 1)}"
    return ", ".join(_architecture(teacher) for teacher in trainer.model.teachers)


def _training(trainer: Any, k: int) -> str:
    args, state = trainer.args, trainer.state
    batch = f"{args.train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size}"
    rate = (trainer.optim_per_peer or [{}] * (k + 1))[k].get("lr", args.learning_rate)
    best = f" The weights are those of step {step}, the best." if (step := _best(trainer)) else ""
    return (
        f"{state.global_step} steps, {state.epoch or 0:.4g} epochs, "
        f"{getattr(args.optim, 'value', args.optim)}, learning rate {rate}, "
        f"batch {batch}, seed {args.seed}.{best}"
    )


def _best(trainer: Any) -> int | None:
    """The step whose weights were loaded at the end; None if they are those of the last step."""
    step = trainer.state.best_global_step
    return step if trainer.args.load_best_model_at_end and step else None


def _logs(trainer: Any) -> list[dict[str, Any]]:
    """The logs that belong to the weights: where the best were loaded, none of later steps."""
    logs = trainer.state.log_history
    end = max((i for i, log in enumerate(logs) if "train_runtime" in log), default=len(logs))
    since = [log for log in logs[end:] if any(name.startswith("eval_") for name in log)]
    step = _best(trainer)
    return since or [log for log in logs if step is None or log["step"] <= step]


def _input(config: dict[str, Any] | None) -> str:
    if config is None or "mean" not in config:
        return "not known; the config holds what the network came with."
    size = " x ".join(str(n) for n in config["input_size"])
    mean, std = (", ".join(f"{v + 0.0:.4g}" for v in config[key]) for key in ("mean", "std"))
    return f"{size}, mean ({mean}), std ({std}) of pixels in [0, 1]."


def _evaluated(trainer: Any) -> str:
    """On which data the last evaluation was, and what the names of the figures mean."""
    evals = {k: v for k, v in trainer.evaluated.items() if k.startswith("eval")}
    if not evals and trainer.eval_dataset is not None:  # before a resume
        given = trainer.eval_dataset
        evals = given if isinstance(given, dict) else {"eval": given}
    shown = "; ".join(
        _describe(data) if len(evals) == 1 else f"{_plain(name)}: {_describe(data)}"
        for name, data in evals.items()
    )
    on = f"The last evaluation was on {shown}." if shown else ""
    if len(trainer.model.peers) == 1:
        return on
    return f"{on} Figures without _a, _b ... or _ensemble are means of the networks.".strip()


def _figures(log_history: list[dict[str, Any]]) -> str:
    """A table of the figures of the last evaluation, or of the last one of each data set."""
    last: dict[str, dict[str, float]] = {}
    for log in log_history:
        found = {n: v for n, v in log.items() if n.startswith("eval_")}
        prefix = next((n.removesuffix("_runtime") for n in found if n.endswith("_runtime")), "eval")
        if found:
            last[prefix] = {n: v for n, v in found.items() if not n.endswith(_TIMES)}
    figures = {name: value for found in last.values() for name, value in found.items()}
    rows = [f"| {_plain(n)} | {figures[n]:.4f} |" for n in sorted(figures)]
    head = ["| metric | last evaluation |", "|---|---|"]
    return "\n".join([*head, *rows]) if rows else "Not evaluated."


def _use(library: str, of_text: bool, repo: str | None, architecture: str) -> str:
    """How the network is loaded, as code."""
    place = repo or "FOLDER"
    classes = ["AutoImageProcessor", "AutoModelForImageClassification"]
    if of_text:
        classes = ["AutoModelForSequenceClassification", "AutoTokenizer"]
    network, processor = sorted(classes, key=lambda name: "ModelFor" not in name)
    blocks = {
        "timm": f"""import timm
from timm.data import create_transform, resolve_data_config
network = timm.create_model("{"hf-hub" if repo else "local-dir"}:{place}", pretrained=True).eval()
transform = create_transform(**resolve_data_config({{}}, model=network))""",
        "transformers": f"""from transformers import {", ".join(classes)}
network = {network}.from_pretrained("{place}")
processor = {processor}.from_pretrained("{place}")""",
        "pytorch": """from safetensors.torch import load_model
load_model(network, "model.safetensors")  # into the module that was trained""",
    }
    known = "import kd_plugins.models  # makes the architecture known to timm\n"
    first = known if architecture.endswith("_cifar") else ""
    wanted = ["timm", "transformers"] if library == "timm" else [library]
    return "\n\nor\n\n".join(f"```python\n{first}{blocks[name]}\n```" for name in wanted)


def _plain(text: Any) -> str:
    """A name from the data on one line, without anything that Markdown or HTML would read."""
    return re.sub(r"[^\w .,/()%+-]", "_", " ".join(str(text).split()))


def _architecture(model: Any) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return _plain(cfg.get("architecture") or type(model).__name__)


def _noise(data: Any) -> str:
    given, clean = getattr(data, "labels", None), getattr(data, "clean_labels", None)
    if given is None or clean is None:
        return "not known: there are no clean labels to compare with"
    share = np.mean(np.asarray(given) != np.asarray(clean))
    return f"{share:.1%} of the {len(given)} training labels are wrong"


def _describe(data: Any) -> str:
    if data is None:
        return "none"
    rows = f", {len(data)} rows" if hasattr(data, "__len__") else ""
    return f"{_plain(getattr(data, 'name', None) or type(data).__name__)}{rows}"
