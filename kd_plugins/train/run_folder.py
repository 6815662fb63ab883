"""The folder of a run: its checkpoints, its settings, the data that it was trained on."""

from __future__ import annotations

import contextlib
import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainingArguments

if TYPE_CHECKING:  # timm's tasks do without transformers
    from transformers import TrainingArguments

DATA = "training_data.json"  # in each checkpoint


def identity(view: Any) -> dict[str, Any]:
    """What tells training data from other training data: their rows, and a digest of their labels where they show them."""
    labels = getattr(view, "labels", None)
    digest = (
        None
        if labels is None
        else blake2b(np.ascontiguousarray(labels, np.int64).tobytes(), digest_size=16).hexdigest()
    )
    return {"rows": len(view) if hasattr(view, "__len__") else None, "labels": digest}


def refuse_other_data(path: Path, view: Any) -> None:
    """A run goes on with the data that it began with."""
    if not path.exists():  # of an earlier version
        return
    then, now = json.loads(path.read_text(encoding="utf-8")), identity(view)
    if then != now:
        what = (
            f"{then['rows']} rows, now {now['rows']}"
            if then["rows"] != now["rows"]
            else "other labels in as many rows"
        )
        raise ValueError(
            f"{path.parent} was trained on other data: {what}; tables by sample and the order of the samples would "
            "no longer fit. Give it the same data, or train anew into another output_dir"
        )


def last_checkpoint(output_dir: str | Path | None) -> str | None:
    """The newest checkpoint in a folder that was written to its end; None if there is none."""
    paths = [
        p for p in Path(output_dir or ".").glob("checkpoint-*") if p.name.split("-")[-1].isdecimal()
    ]
    for path in sorted(paths, key=lambda p: -int(p.name.split("-")[-1])):
        with contextlib.suppress(OSError, ValueError):  # the Trainer writes its state last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
    return None


def claim_folder(args: TrainingArguments, **settings: Any) -> None:
    """Keep ``args.output_dir`` for one experiment: a run with other settings would go on from its checkpoints, unnoticed.

    The first call writes ``settings.json``; a later one with other settings, seed, length, batch or optimizer raises.
    """
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings |= {
        "seed": args.seed,
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "batch": batch,
    }
    settings |= {
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "optim": args.optim,
    }
    asked = json.loads(json.dumps(settings, default=str))
    path = Path(str(args.output_dir), "settings.json")
    if path.exists():
        made = json.loads(path.read_text(encoding="utf-8"))
        if other := [k for k in sorted({*made, *asked}) if made.get(k) != asked.get(k)]:
            raise ValueError(
                f"{path.parent} holds a run with { ({k: made.get(k) for k in other}) }, asked for is "
                f"{ ({k: asked.get(k) for k in other}) }; its checkpoints would be taken for this run's. Choose "
                "another --output_dir, or delete it"
            )
    elif args.process_index == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asked, indent=1), encoding="utf-8")
        part.replace(path)  # whole or not at all


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
