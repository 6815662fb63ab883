"""Losses and a Trainer for noisy labels, and for networks that teach each other."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from ._moved import moved_names
from .losses import *  # noqa: F403
from .losses import __all__ as _losses

# These import transformers, timm or datasets. They are loaded on first use, so that
# `import kd_plugins` takes no longer than `import torch`.
_LAZY = {
    "CDRCallback": "train",
    "DynamicsCallback": "train",
    "MutualDistillationTask": "train.timm",
    "MutualDistillationTrainer": "train",
    "MutualTrainingArguments": "train",
    "NumberedRows": "train",
    "ProgressCallback": "train",
    "StatefulClassificationTask": "train.timm",
    "as_compute_loss_func": "train",
    "ImageView": "data",
    "cache_features": "data",
    "cache_teachers": "data",
    "noisy_view": "data",
    "load_webvision": "data",
    "apply_decisions": "audit",
    "contact_sheet": "audit",
    "correct_labels": "audit",
    "drop_suspects": "audit",
    "estimate_label_noise": "audit",
    "estimate_transition": "audit",
    "find_suspects": "audit",
    "html_page": "audit",
    "influence_scores": "audit",
    "out_of_sample": "audit",
    "predict_probs": "audit",
    "read_decisions": "audit",
    "select_lowest": "audit",
}

_FLOORS = ("audit", "data", "models", "train")

# A star import loads transformers and the others: whoever asks for everything gets it.
__all__ = [*_losses, *_LAZY]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("kd-plugins")
    if name in _FLOORS:
        return import_module(f".{name}", __name__)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return moved_names(__name__)(name, stacklevel=4)


def __dir__() -> list[str]:
    return sorted([*__all__, *_FLOORS])
