"""Class probabilities of pictures from the names of the classes alone, by a CLIP-like model.

>>> name = "openai/clip-vit-base-patch32"
>>> probs, view = zero_shot_probs(rows, name, "runs/clip")  # doctest: +SKIP
>>> noise = estimate_label_noise(view.labels, probs, view.features)  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor

from ..data.feature_cache import FeatureView, cache_features
from ..data.image_view import ImageView
from ..losses.state import eval_mode

ROWS = 4096  # per temporary copy
TEMPLATES = ("a photo of a {}.",)
NEEDED = ("get_image_features", "get_text_features", "logit_scale")


def zero_shot_probs(
    rows: Dataset,
    model: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 256,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
    **columns: Any,
) -> tuple[np.ndarray, FeatureView]:
    """softmax(s · cos(v, t_c)) over the classes c, without training: float32 [N, C].

    v is the model's embedding of a picture, t_c the mean of its embeddings of the class name in
    each template, and s the factor that the model has learned (`logit_scale`). No label is used.

    Args:
        rows: the data.
        model: hub id or local folder of a model that transformers' `AutoModel` reads, with a tower
            for pictures, one for text, and a `logit_scale`: CLIP, SigLIP and their like.
        folder: for the embeddings, which do not depend on class names and templates. What was
            computed before a kill is kept.
        class_names: what to call the classes in the templates, in the order of the class indices.
            By default the names in the data, with spaces for underscores.
        templates: sentences with `{}` for the name. The default is the first one of the paper.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        dtype: the dtype of autocast for pictures, such as `torch.bfloat16`; none by default.
        columns: `image`, `label`, `clean` and `max_broken` of `ImageView`.

    Returns:
        The probabilities, a memory map of a file in `folder`, and the embeddings [N, D] as a view.
        A picture that cannot be read has no probabilities (NaN).

    Raises:
        ValueError: the classes have no names, the model cannot be loaded or has no text tower, or
            the folder has something else.

    References:
        Radford et al., "Learning transferable visual models from natural language supervision",
        ICML 2021, section 3.1. Zhai et al., "Sigmoid loss for language image pre-training", ICCV
        2023 (SigLIP).

    Notes:
        SigLIP was trained with a sigmoid for each pair. Its bias is the same for all classes, so
        that the softmax does not depend on it.
    """
    network, processor = _load(model)
    view = ImageView(rows, _Processed(processor.image_processor), **columns)
    names = _names(view, class_names)
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"templates={list(templates)}: expected sentences with {{}} for the class name; all "
            "classes would have the same probability"
        )
    if torch.accelerator.is_available():
        network.to(torch.accelerator.current_accelerator())
    with eval_mode(network):
        text = _text(network, processor.tokenizer, names, templates)
    loading: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    embedded = cache_features(view, _PictureTower(network), folder, dtype=dtype, **loading)
    scaled = network.logit_scale.detach().exp().cpu() * text
    path, shape = Path(folder, "probs.npy"), (len(view), len(names))
    probs = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start in range(0, len(view), ROWS):
        part = torch.from_numpy(np.array(embedded.features[start : start + ROWS]))
        probs[start : start + ROWS] = (part @ scaled.T).softmax(-1).numpy()
    probs[embedded.stand_in] = np.nan  # embeddings of another row
    return probs, embedded


class _PictureTower(nn.Module):
    """Pixels -> embeddings of length 1 [B, D]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return _directions(self.network.get_image_features(pixel_values=pixels))


class _Processed:
    """The transform of a picture that the model was trained with."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]

    def __repr__(self) -> str:
        return repr(self.processor)


def _directions(outputs: Any) -> Tensor:
    return normalize(outputs.pooler_output.float(), dim=-1)


def _text(network: Any, tokenizer: Any, names: list[str], templates: Sequence[str]) -> Tensor:
    """The embedding of each class [C, D]."""
    length = min(tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
    means = []
    for name in names:
        tokens = tokenizer(
            [template.replace("{}", name) for template in templates],
            padding="max_length",  # as SigLIP was trained
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        outputs = network.get_text_features(**tokens.to(network.device))
        means.append(_directions(outputs).mean(0).cpu())
    return normalize(torch.stack(means), dim=-1)


def _load(model: str | os.PathLike) -> tuple[Any, Any]:
    """The model in float32, and its processor."""
    try:
        network, report = AutoModel.from_pretrained(model, output_loading_info=True)
        network = network.float()
        if not all(hasattr(network, name) for name in NEEDED):
            raise ValueError(
                f"{model} is a {type(network).__name__}: expected a tower for pictures, one for "
                "text and a logit_scale, as CLIP and SigLIP have; class names cannot be read"
            )
        processor = AutoProcessor.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"{model} cannot be loaded: {error}. Without a network, name a folder that "
            "save_pretrained wrote, with the model and its processor"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{model} lacks {len(missing)} weights, such as {missing[0]}: they would be random"
        )
    return network, processor


def _names(view: ImageView, given: Sequence[str] | None) -> list[str]:
    names = view.class_names if given is None else [str(name) for name in given]
    if len(names) != view.num_classes:
        raise ValueError(f"class_names: got {len(names)}, and the data have {view.num_classes}")
    if given is None and names == [str(k) for k in range(len(names))]:
        raise ValueError(
            f"the classes are numbers, {', '.join(names[:3])} ..., and the model must read what is "
            "in the pictures: pass class_names"
        )
    return [name.replace("_", " ") for name in names]
