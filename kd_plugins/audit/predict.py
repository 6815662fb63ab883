"""What networks say of every picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.image_view import ImageView
from ..losses.refined import CE
from ..losses.state import in_eval
from ..models.factory import class_count, make_teacher
from ..models.hosted import Hosted


def predict_probs(
    models: nn.Module | str | Path | Sequence[nn.Module | str | Path],
    view: ImageView,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> np.ndarray:
    """Mean over networks of softmax(logits): what the ensemble thinks of each picture -> float32 [N, C].

    Of pictures that no network was trained on these are out-of-sample probabilities, of the others in-training ones; either are
    what cleanlab calls `pred_probs`. Networks that learned wrong labels by heart agree with them: out-of-sample ones,
    or the training dynamics, tell more.

    Networks run in eval mode, on the device of the first that is a module; where all come from folders on the accelerator, if
    there is one. Every process goes over all pictures.

    Args:
        models: one or several; modules, or folders that `export` wrote (see `make_teacher`).
        view: the pictures, in a transform without augmentation, normalised for the first network; others get theirs
            (`pretrained_cfg`). A network that names its classes (`label_names` of timm, `id2label` of
            Hugging Face) may have them in another order than the view.
        batch_size: of the forward.
        num_workers: processes that read pictures.

    Returns:
        Row i is of row i of the view. Of a picture that cannot be read it is NaN, with a warning: the row that replaces it
        says nothing about its label. cleanlab takes the others: `known = ~np.isnan(probs[:, 0])`.
    """
    if not isinstance(view, ImageView):
        raise TypeError(
            f"the view must be an ImageView, got {type(view).__name__}: choose rows in the data set below it"
        )
    models = [models] if isinstance(models, nn.Module | str | Path) else list(models)
    if not models:
        raise ValueError("there are no networks: nothing predicts")
    device = next(
        (next(m.parameters(), torch.empty(0)).device for m in models if isinstance(m, nn.Module)),
        None,
    )
    networks = [make_teacher(model, view.num_classes) for model in models]
    counts = {class_count(network) or view.num_classes for network in networks}
    if counts != {view.num_classes}:
        raise ValueError(
            f"the data have {view.num_classes} classes, the networks {sorted(counts)}: a probability could not be "
            "put to its class"
        )
    order = torch.tensor(
        [_class_order(network, view.class_names) for network in networks]
    )  # [K, C]
    if device is None:
        device = (
            torch.accelerator.current_accelerator()
            if torch.accelerator.is_available()
            else torch.device("cpu")
        )
    hosted, order = Hosted(networks, CE()).to(device), order.to(device)
    probs = np.full((len(view), view.num_classes), np.nan, np.float32)
    loader: Any = torch.utils.data.DataLoader(
        view, batch_size, num_workers=num_workers, generator=torch.Generator()
    )  # the global generator stays as it is
    with in_eval(*networks, hosted):
        for batch in tqdm(loader, "predictions", leave=False, disable=None):
            logits = hosted(batch["pixel_values"].to(device))["logits"]  # [B, K, C]
            said = (
                logits.softmax(-1).gather(-1, order.expand(len(logits), -1, -1)).mean(1)
            )  # [B, C]
            if not torch.isfinite(said).all():
                row = int(batch["index"][~torch.isfinite(said).all(1).cpu()][0])
                raise ValueError(
                    f"the networks say NaN of row {row}: look at their weights, and at the transform"
                )
            probs[batch["index"].numpy()] = said.cpu().numpy()
    if missing := int(np.isnan(probs[:, 0]).sum()):
        warnings.warn(
            f"{missing} of {len(view)} pictures cannot be read; their probabilities are NaN",
            stacklevel=2,
        )
    return probs


def _class_order(network: nn.Module, wanted: Sequence[str]) -> list[int]:
    """Where a network has each of the wanted classes: by name, or as they come if there are none."""
    names = _class_names(network)
    if names is None or len(names) != len(wanted):  # a new head keeps the old names
        return list(range(len(wanted)))
    if sorted(names) == sorted(wanted):
        return [names.index(name) for name in wanted]
    numbers = [str(k) for k in range(len(wanted))]
    if numbers in (names, list(wanted)):  # positions, not names
        return list(range(len(wanted)))
    k = next(k for k, name in enumerate(wanted) if name not in names)
    raise ValueError(
        f"{type(network).__name__} knows no class {wanted[k]!r}, class {k} of the view; its class {k} "
        f"is {names[k]!r}: expected the same names, in any order. If only the spelling differs, "
        "rename the classes of the data"
    )


def _class_names(network: nn.Module) -> list[str] | None:
    """The classes of a network in its own order, as timm or transformers keep them."""
    names = getattr(getattr(network, "config", None), "id2label", None)
    names = names or (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    if isinstance(names, dict):
        names = [names[k] for k in sorted(names, key=int)]
    if not names or list(names) == [f"LABEL_{k}" for k in range(len(names))]:  # of transformers
        return None
    return [str(name) for name in names]
