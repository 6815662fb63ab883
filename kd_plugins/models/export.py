"""Save one network so that timm and transformers load it alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch


def library_of(model: Any) -> str:
    """What loads an exported network: ``"timm"`` (and transformers), ``"transformers"``, or for any other module ``"pytorch"``."""
    if hasattr(model, "save_pretrained"):
        return "transformers"
    known = isinstance(getattr(model, "pretrained_cfg", None), dict) and hasattr(
        model, "default_cfg"
    )
    return "timm" if known else "pytorch"


def export(model: Any, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Save one network so that timm and transformers load it alone, with equal logits. Nobody deploys a pair.

    timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``; transformers:
    ``AutoModelForImageClassification.from_pretrained("FOLDER")``. A module of neither is saved as ``model.safetensors``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(class_names) if class_names is not None else None
    library = library_of(model)
    if library == "transformers":
        if names and hasattr(model, "config"):
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: i for i, name in enumerate(names)}
        model.save_pretrained(folder)
    elif library == "timm":
        model_config = {"label_names": names} if names else None
        packed = copy.deepcopy(model).to(
            memory_format=torch.contiguous_format
        )  # safetensors takes no channels_last
        timm.models.save_for_hf(
            packed, str(folder), model_config=model_config, safe_serialization=True
        )
        # transformers passes num_classes itself and fails on a second one in model_args
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    else:
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))
    return folder
