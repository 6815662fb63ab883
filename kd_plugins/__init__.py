"""Train better models on labels you cannot fully trust, and let networks teach each other what they are sure of."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .gradients import mask_noncritical_
from .losses import *  # noqa: F403
from .losses import __all__ as _losses

# What imports transformers, timm or datasets is loaded when it is first asked for: `import kd_plugins` costs no more
# than torch.
_LAZY = {
    "CDRCallback": "trainer",
    "DynamicsCallback": "dynamics",
    "MutualDistillationTask": "timm_tasks",
    "MutualDistillationTrainer": "trainer",
    "MutualTrainingArguments": "trainer",
    "ProgressCallback": "trainer",
    "StatefulClassificationTask": "timm_tasks",
    "as_compute_loss_func": "trainer",
    "ImageView": "data",
    "cache_teachers": "data",
    "influence_scores": "data",
    "select_lowest": "data",
    "noisy_view": "data",
    "load_webvision": "data",
    "contact_sheet": "suspects",
    "correct_labels": "suspects",
    "drop_suspects": "suspects",
    "find_suspects": "suspects",
    "html_page": "suspects",
    "predict_probs": "suspects",
}

__all__ = ["mask_noncritical_", *_losses]  # without the lazy names: a star import must not load transformers


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("kd-plugins")
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
