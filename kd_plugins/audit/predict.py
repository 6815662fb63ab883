"""Class probabilities from trained networks, for every picture of a view."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.feature_cache import FeatureView
from ..data.image_view import ImageView
from ..data.labels import class_positions
from ..losses.refined import CE
from ..losses.state import eval_mode
from ..models.factory import class_count, classes_of, make_teacher, network_list
from ..models.hosted import PeerModule
from ..models.input_config import normalization_of


def predict_probs(
    models: nn.Module | str | Path | Sequence[nn.Module | str | Path],
    view: ImageView | FeatureView,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> np.ndarray:
    """Mean over networks of softmax(logits), for each row of the view: float32 [N, C].

    cleanlab accepts them as `pred_probs`. If no network was trained on a picture, its probabilities
    are out-of-sample. Networks agree with wrong labels that they have memorised, so prefer
    out-of-sample probabilities or the training dynamics.

    Args:
        models: one or several networks: modules, or folders that `export` wrote (see
            `make_teacher`). They run in eval mode, on the device of the first module. If all are
            folders, they run on the accelerator, if there is one. Classes are matched by name if
            the network has names (timm's `label_names`, Hugging Face's `id2label`).
        view: the pictures. Its transform should not augment. It normalises for the first network;
            the pixels are converted for the others (`pretrained_cfg`).
        batch_size: pictures per forward pass.
        num_workers: processes that read pictures.

    Returns:
        Row i belongs to row i of the view. If a picture cannot be read, its row is NaN, with a
        warning. cleanlab needs the other rows: `known = ~np.isnan(probs[:, 0])`.

    Raises:
        ValueError: a network has other classes than the view, or predicts NaN.

    Notes:
        In distributed training, every process predicts all pictures.
    """
    if not isinstance(view, ImageView | FeatureView):
        raise TypeError(
            f"view: expected an ImageView or a FeatureView, got {type(view).__name__}; select rows "
            "in the data set below it, because row i of the result is row i of the view"
        )
    models = network_list(models)
    if not models:
        raise ValueError("models: expected at least one network, got none")
    device = _device(models)
    networks = [make_teacher(model, view.num_classes) for model in models]
    order = torch.tensor([_class_order(network, view) for network in networks], device=device)
    hosted = PeerModule(networks, CE(), (), normalization_of([view], networks)).to(device)
    probs = np.full((len(view), view.num_classes), np.nan, np.float32)
    # A generator of its own: the loader would otherwise draw from the global one.
    loader: Any = DataLoader(view, batch_size, num_workers=num_workers, generator=torch.Generator())
    index = torch.empty(len(view), dtype=torch.int64)
    with eval_mode(*networks, hosted):
        for k, batch in enumerate(tqdm(loader, "predictions", leave=False, disable=None)):
            logits = hosted(batch["pixel_values"].to(device))["logits"]  # [B, K, C]
            mean = logits.softmax(-1).gather(-1, order.expand_as(logits)).mean(1)  # [B, C]
            _refuse_nan(mean, batch["index"])
            rows = slice(k * batch_size, k * batch_size + len(mean))
            probs[rows], index[rows] = mean.cpu().numpy(), batch["index"]
    # These rows have the picture of another one.
    of_others = view.stand_in if isinstance(view, FeatureView) else index != torch.arange(len(view))
    probs[np.asarray(of_others)] = np.nan
    if missing := int(np.isnan(probs[:, 0]).sum()):
        warnings.warn(
            f"{missing} of {len(view)} pictures cannot be read; their probabilities are NaN",
            stacklevel=2,
        )
    return probs


def _device(models: Sequence[Any]) -> torch.device:
    """The device of the first module; without modules, the accelerator or the CPU."""
    for model in models:
        if isinstance(model, nn.Module):
            return next(model.parameters(), torch.empty(0)).device
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")


def _refuse_nan(probs: Tensor, index: Tensor) -> None:
    if not (finite := probs.isfinite().all(1).cpu()).all():
        raise ValueError(
            f"the networks predict NaN for row {int(index[~finite][0])}: check their weights and "
            "the transform"
        )


def _class_order(network: nn.Module, view: ImageView | FeatureView) -> list[int]:
    """Where the network has each class of the view: by name, if the network has names."""
    count, wanted = class_count(network) or view.num_classes, view.class_names
    if count != len(wanted):
        raise ValueError(
            f"the data have {len(wanted)} classes, {type(network).__name__} has {count}: expected "
            "the same classes"
        )
    names, positions = classes_of(network), None
    if names and len(names) == count:  # a new head on a network keeps the old names
        other = f"the classes of {type(network).__name__}"
        positions = class_positions(wanted, names, "the view", other)
    return list(range(count)) if positions is None else positions.tolist()
