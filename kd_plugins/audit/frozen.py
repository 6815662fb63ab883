"""Wrong labels without training a network: frozen features, and heads that take seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from datasets import Dataset

from ..data.feature_cache import FeatureView, cache_features
from ..data.image_view import ImageView
from ..losses import validate
from ..models.factory import make_teacher
from .out_of_sample import out_of_sample
from .ranking import LabelNoise, estimate_label_noise


def frozen_features(
    rows: Dataset,
    backbone: str,
    folder: str | os.PathLike,
    *,
    side: int = 96,
    batch_size: int = 256,
    num_workers: int = 0,
    **columns: Any,
) -> FeatureView:
    """The features of all pictures from a frozen timm network, in `folder`; see `cache_features`.

    Args:
        rows: the data.
        backbone: a timm name, whose pretrained weights are loaded, `"NAME=FILE"` for weights in a
            file, or a folder that `export` wrote.
        folder: of the cache. What was computed before a kill is kept.
        side: of the input in pixels. Smaller pictures are enlarged. Time grows with its square.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        columns: `image`, `label` and `clean` of `ImageView`.

    Raises:
        ValueError: there is no such network, or its weights cannot be loaded or do not fit.
    """
    validate.count("side", side, "it is the side of the pictures in pixels", least=8)
    try:
        network = make_teacher(backbone, None)
    except OSError as error:
        raise ValueError(
            f"the weights of {backbone} cannot be loaded: {error}. Without a network, name a file "
            f"of weights: {backbone}=FILE.safetensors"
        ) from error
    except RuntimeError as error:  # of load_state_dict
        raise ValueError(
            f"the weights of {backbone} do not fit the network: expected the file of this timm "
            "name, with timm's own number of classes; for a network with another head, name a "
            f"folder that export() wrote ({str(error).splitlines()[-1].strip()})"
        ) from error
    config = timm.data.resolve_data_config(model=network)
    config |= {"input_size": (3, side, side), "crop_pct": 1.0}
    view = ImageView(rows, timm.data.create_transform(**config), **columns)
    if torch.accelerator.is_available():
        network.to(torch.accelerator.current_accelerator())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    return cache_features(view, network, folder, **loading)


def noise_of_pictures(
    rows: Dataset, backbone: str, folder: str | os.PathLike, **options: Any
) -> LabelNoise:
    """How probable it is that each label is wrong, from pictures: all steps with their defaults.

    These are :func:`frozen_features`, :func:`out_of_sample` and :func:`estimate_label_noise`. A
    picture that cannot be read has no probability (NaN).

    Args:
        rows: the data.
        backbone: see :func:`frozen_features`.
        folder: for what is computed on the way, `features` and `folds` in it. After a kill, nothing
            that is complete is computed again.
        options: of :func:`frozen_features`.
    """
    view = frozen_features(rows, backbone, Path(folder, "features"), **options)
    probs = out_of_sample(
        view.features, view.labels, view.num_classes, folder=Path(folder, "folds")
    )
    probs[view.index != np.arange(len(view))] = np.nan  # these have the features of another row
    return estimate_label_noise(view.labels, probs, view.features)
