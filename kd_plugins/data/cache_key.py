"""What a cache of teacher logits belongs to: pictures, transform and teachers, as short hashes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.inputs import normalization
from .decode import decode_picture
from .image_view import ImageView
from .randomness import repeated


def data_key(view: ImageView) -> str:
    """Hash of the image column: encoded pictures by their bytes, files by path, size and time."""
    digest = blake2b(digest_size=16)
    bar = tqdm(view.pictures, "pictures", len(view), leave=False, disable=None, delay=1.0)
    for value in bar:
        content = _content(value)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return f"{len(view)} rows, {digest.hexdigest()}"


def transform_key(view: ImageView, kind: str) -> str:
    """Hash of the transform's output for up to 16 rows.

    ``kind`` is what the cache is for, "teacher" or "feature".

    Raises:
        ValueError: the transform is random, so that its pixels differ from epoch to epoch.
    """
    digest = blake2b(digest_size=16)
    kept = {"teacher": "logits", "feature": "features"}[kind]
    or_else = {"teacher": ", or pass the teachers to the Trainer", "feature": ""}[kind]
    for row in sorted({round(k * (len(view) - 1) / 15) for k in range(16)}):
        pixels = repeated(_transformed(view, row), view.seed, row)
        if pixels is None:
            raise ValueError(
                f"the transform draws at random (row {row} of the data): {transform_text(view)}. "
                f"It makes other pixels in each epoch, and the cached {kept} would belong to "
                f"another crop. Use a transform without randomness{or_else}"
            )
        digest.update(_bytes(pixels))
    return digest.hexdigest()


def transform_text(view: ImageView) -> str:
    """The transform as it prints, shortened, for errors."""
    return " ".join(repr(view.transform).split())[:500]


def teacher_key(teacher: nn.Module, pixels: Any) -> str:
    """Hash of the weights, buffers and printed modules of a teacher, and its normalisation.

    ``pixels`` is the (mean, std) of the pixels that it sees, or None if they are not converted.
    """
    digest = blake2b(digest_size=16)
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(teacher))  # activations are not among the weights
    digest.update(text.encode())
    for name, value in [*teacher.state_dict().items(), *teacher.named_buffers()]:
        digest.update(name.encode())
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return (
        f"{type(teacher).__name__} {digest.hexdigest()}, mean and std {normalization(teacher)}, "
        f"of the pixels {pixels}"
    )


def _transformed(view: ImageView, row: int) -> Callable[[], Any]:
    picture = view.readable(row)[1]
    return lambda: view.transform(picture)


def _content(value: Any) -> bytes:
    if isinstance(value, dict):  # of a Hugging Face Image column
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        try:
            stat = os.stat(value)
        except OSError:
            return f"{value}: missing".encode()
        return f"{value}: {stat.st_size} {stat.st_mtime_ns}".encode()
    try:
        picture = decode_picture(value)
    except Exception:  # the view takes the next readable row
        return b"broken"
    return f"{picture.size}".encode() + picture.tobytes()


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().flatten()
    return f"{value.dtype} {list(value.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
