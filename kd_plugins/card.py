"""The model card that is written beside an exported network."""

from __future__ import annotations

from typing import Any

import numpy as np

from .losses.mutual import peer_name

_TIMES = ("runtime", "per_second", "model_preparation_time")


def model_card(trainer: Any, k: int) -> str:
    """Card of network k of a ``MutualDistillationTrainer``: method, data, noise, and the figures of its last evaluation."""
    peers, args, state, data = trainer.model.peers, trainer.args, trainer.state, trainer.train_dataset
    peer, name = peers[k], peer_name(k)
    library = "timm" if hasattr(peer, "pretrained_cfg") else "transformers" if hasattr(peer, "config") else "pytorch"
    beside = ", ".join(_architecture(other) for other in peers if other is not peer)
    loss = "\n".join(f"    {line}" for line in repr(trainer.model.criterion).splitlines())
    figures: dict[str, float] = {}
    for log in state.log_history:  # the last of each kind
        figures |= {n: v for n, v in log.items() if n.startswith("eval_") and not n.endswith(_TIMES)}
    rows = "\n".join(
        ["| metric | last evaluation |", "|---|---|", *(f"| {n} | {figures[n]:.4f} |" for n in sorted(figures))]
    )
    return f"""---
tags: [image-classification, kd-plugins]
library_name: {library}
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

**Use**: `timm.create_model("local-dir:FOLDER", pretrained=True)` or
`AutoModelForImageClassification.from_pretrained("FOLDER")`. An architecture whose name ends in `_cifar` wants
`import kd_plugins.models` first.
"""


def _architecture(model: Any) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _noise(data: Any) -> str:
    given, clean = getattr(data, "labels", None), getattr(data, "clean_labels", None)
    if given is None or clean is None:
        return "not known: there are no clean labels to compare with"
    return f"{np.mean(np.asarray(given) != np.asarray(clean)):.1%} of the {len(given)} training labels are wrong"


def _describe(data: Any) -> str:
    if data is None:
        return "none"
    rows = f", {len(data)} rows" if hasattr(data, "__len__") else ""
    return f"{getattr(data, 'name', None) or type(data).__name__}{rows}"
