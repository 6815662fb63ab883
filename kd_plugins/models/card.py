"""The model card that is written beside an exported network."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData

from ..losses.base import peer_name
from .export import library_of

_TIMES = ("runtime", "per_second", "model_preparation_time")


def model_card(trainer: Any, k: int, repo: str | None = None, **metadata: Any) -> str:
    """Card of network k of a ``MutualDistillationTrainer``: method, data, noise, and the figures of its last evaluation.

    Args:
        repo: id of the repository that it is for; none for a folder.
        **metadata: fields of ``huggingface_hub.ModelCardData``, such as ``license`` and ``datasets``, which nobody here knows.
    """
    peers, args, state, data = (
        trainer.model.peers,
        trainer.args,
        trainer.state,
        trainer.train_dataset,
    )
    peer, name = peers[k], peer_name(k)
    library = library_of(peer)
    beside = ", ".join(_architecture(other) for other in peers if other is not peer)
    loss = "\n".join(f"    {line}" for line in repr(trainer.model.criterion).splitlines())
    figures: dict[str, float] = {}
    for log in state.log_history:  # the last of each kind
        figures |= {
            n: v for n, v in log.items() if n.startswith("eval_") and not n.endswith(_TIMES)
        }
    rows = "\n".join(
        [
            "| metric | last evaluation |",
            "|---|---|",
            *(f"| {_plain(n)} | {figures[n]:.4f} |" for n in sorted(figures)),
        ]
    )
    return f"""---
{_metadata(library, metadata)}
---
# {_architecture(peer)}

Network {name} of {len(peers)}, trained with kd-plugins{f" beside {beside}" if beside else ""}.

**Method**

{loss}

**Data**: {_describe(data)}

**Label noise**: {_noise(data)}

**Training**: {state.global_step} steps, {state.epoch or 0:.4g} epochs, {getattr(args.optim, "value", args.optim)},
learning rate {args.learning_rate}, batch {args.train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size},
seed {args.seed}.

**Figures** (all networks of the run; {name} is this one)

{rows if figures else "Not evaluated."}

**Use**: {_use(library, repo, _architecture(peer))}
"""


def _metadata(library: str, given: dict[str, Any]) -> str:
    """The YAML block at the head of a card."""
    fields = set(inspect.signature(ModelCardData).parameters) - {"kwargs", "ignore_metadata_errors"}
    if unknown := set(given) - fields:
        raise TypeError(
            f"a model card has no field {sorted(unknown)}, the hub would ignore it; it has {sorted(fields)}"
        )
    loaders = {"timm": ["timm", "transformers"], "transformers": ["transformers"]}.get(library, [])
    tags = given.get("tags") or []
    known = {"library_name": library, "pipeline_tag": "image-classification"} | given
    known["tags"] = [
        "image-classification",
        *loaders,
        "kd-plugins",
        *([tags] if isinstance(tags, str) else tags),
    ]
    return ModelCardData(**known).to_yaml()


def _use(library: str, repo: str | None, architecture: str) -> str:
    place = repo or "FOLDER"
    transformers = f'`AutoModelForImageClassification.from_pretrained("{place}")`.'
    if library == "transformers":
        return transformers
    if library == "pytorch":
        return '`safetensors.torch.load_model(network, "model.safetensors")`, into the module that was trained.'
    first = (
        " after `import kd_plugins.models`, which knows the architecture"
        if architecture.endswith("_cifar")
        else ""
    )
    return f'`timm.create_model("{"hf-hub" if repo else "local-dir"}:{place}", pretrained=True)` or\n{transformers[:-1]}{first}.'


def _plain(text: Any) -> str:
    """A name that comes with data, on one line and with nothing that Markdown or HTML would read."""
    return re.sub(r"[^\w .,/()%+-]", "_", " ".join(str(text).split()))


def _architecture(model: Any) -> str:
    return _plain(
        (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    )


def _noise(data: Any) -> str:
    given, clean = getattr(data, "labels", None), getattr(data, "clean_labels", None)
    if given is None or clean is None:
        return "not known: there are no clean labels to compare with"
    return f"{np.mean(np.asarray(given) != np.asarray(clean)):.1%} of the {len(given)} training labels are wrong"


def _describe(data: Any) -> str:
    if data is None:
        return "none"
    rows = f", {len(data)} rows" if hasattr(data, "__len__") else ""
    return f"{_plain(getattr(data, 'name', None) or type(data).__name__)}{rows}"
