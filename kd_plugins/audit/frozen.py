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
from ..data.labels import label_column
from ..losses import validate
from ..models.factory import make_teacher
from .out_of_sample import out_of_sample
from .ranking import LabelNoise, estimate_label_noise
from .zero_shot import ROWS, zero_shot_probs


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
        columns: `image`, `label`, `clean` and `max_broken` of `ImageView`.

    Raises:
        ValueError: there is no such network, or its weights cannot be loaded or do not fit.
    """
    validate.count("side", side, "it is the side of the pictures in pixels", least=8)
    try:
        network = make_teacher(backbone, None)
    except OSError as error:
        if "=" in backbone:
            raise ValueError(f"backbone {error}") from error
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
    rows: Dataset,
    backbone: str | None,
    folder: str | os.PathLike,
    *,
    probs: np.ndarray | None = None,
    zero_shot: str | os.PathLike | None = None,
    side: int = 96,
    **options: Any,
) -> LabelNoise:
    """How probable it is that each label is wrong, from pictures: all steps with their defaults.

    These are :func:`frozen_features`, :func:`out_of_sample` and :func:`estimate_label_noise`. A
    picture that cannot be read has no probability (NaN).

    With `zero_shot`, the probabilities are the geometric mean, normalised, of those of
    :func:`zero_shot_probs` and of the other source; or the former alone, if `backbone` and `probs`
    are None. Then the neighbours are those of the model's embeddings.

    Args:
        rows: the data.
        backbone: see :func:`frozen_features`.
        folder: for what is computed on the way, `features`, `folds` and `zero-shot` in it. After a
            kill, nothing that is complete is computed again.
        probs: instead of the backbone, out-of-sample probabilities [N, C].
        zero_shot: the model of :func:`zero_shot_probs`.
        side: of the backbone's input in pixels.
        options: of :func:`frozen_features`.

    Raises:
        ValueError: no source, or both a backbone and `probs`; or `probs` of another shape.
    """
    given = [source is not None for source in (backbone, probs)]
    if all(given) or not (any(given) or zero_shot):
        raise ValueError("expected a backbone or probs, or zero_shot, alone or with one of them")
    labels = label_column(rows, label := options.get("label", "label"))
    if probs is not None:
        classes = getattr(rows.features[label], "num_classes", probs.shape[-1])
        if probs.shape != (len(rows), classes):
            raise ValueError(
                f"probs: expected {[len(rows), classes]}, a row for each picture and a "
                f"column for each class, got {probs.dtype} {list(probs.shape)}"
            )
    features = None
    if backbone is not None:
        view = frozen_features(rows, backbone, Path(folder, "features"), side=side, **options)
        features, folds = view.features, Path(folder, "folds")
        read: dict[str, Any] = {"left_out": view.stand_in, "folder": folds}
        probs = out_of_sample(features, view.labels, view.num_classes, **read)
    if zero_shot is not None:
        own, view = zero_shot_probs(rows, zero_shot, Path(folder, "zero-shot"), **options)
        if probs is not None:
            _pool_into(own, probs)
        probs, features = own, view.features if features is None else features
    return estimate_label_noise(labels, probs, features)


def _pool_into(probs: np.ndarray, other: np.ndarray) -> None:
    """Replace probs [N, C] by the geometric mean of both, normalised."""
    if probs.shape != other.shape:
        raise ValueError(
            f"probs: expected {list(probs.shape)}, as many as zero_shot gives, got "
            f"{list(other.shape)}"
        )
    for start in range(0, len(probs), ROWS):
        part = slice(start, start + ROWS)
        pooled = np.sqrt((probs[part] + 1e-6) * (other[part] + 1e-6))  # no class is ruled out
        probs[part] = pooled / pooled.sum(1, keepdims=True)
