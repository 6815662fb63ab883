"""What a transform does to a picture, found by running it on test pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .randomness import repeated

Transform = Callable[[Image.Image], Any]


def input_config(transform: Transform, size: tuple[int, int]) -> dict[str, Any] | None:
    """The preprocessing of `transform` in timm's terms, or None if these cannot describe it.

    They cannot if the transform draws at random, is not `(x / 255 - mean) / std` per channel, or is
    not a resize followed by a centre crop.

    Args:
        size: (width, height) of the test pictures.

    Returns:
        `input_size` (C, H, W), `mean` and `std` (one per channel; absent if the output is uint8),
        `crop_pct`, `crop_mode` ("center", "squash" or "border") and `interpolation`.
    """
    width, height = size
    black, grey, white, colour = (
        _run(transform, np.full((height, width, 3), value, np.uint8))
        for value in (0, 128, 255, (255, 0, 128))
    )
    if black is None or grey is None or white is None or colour is None:
        return None
    levels = _levels(black, grey, white, colour)
    if levels is None:
        return None
    shape = tuple(black.shape)
    crop = _crop(transform, (width, height), shape)
    if crop is None:
        return None
    low, high = levels
    config: dict[str, Any] = {"input_size": shape}
    if black.dtype != torch.uint8:
        std = 1 / (high - low)
        config["mean"] = tuple(round(x, 6) for x in (-low * std).tolist())
        config["std"] = tuple(round(x, 6) for x in std.tolist())
    elif low.any() or (high != 255).any():
        return None
    return config | crop | {"interpolation": _interpolation(transform) or "bicubic"}


def _run(transform: Transform, pixels: np.ndarray) -> Tensor | None:
    """float64 or uint8 [C, H, W], or None if the transform fails, draws at random or has another output."""
    try:
        out = repeated(lambda: transform(Image.fromarray(pixels)))
    except Exception:  # any code may be in a transform
        return None
    if out is None or out.ndim != 3 or out.shape[0] not in (1, 3) or 0 in out.shape:
        return None
    if not (out.dtype == torch.uint8 or out.is_floating_point()):
        return None
    return out if out.dtype == torch.uint8 else out.double()


def _levels(
    black: Tensor, grey: Tensor, white: Tensor, colour: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What 0 and 255 become in each channel; None if it is not affine, or mixes channels."""
    if not black.shape == grey.shape == white.shape == colour.shape:
        return None
    middle = (slice(None), black.shape[1] // 2, black.shape[2] // 2)
    low, mid, high, hue = (out[middle].double() for out in (black, grey, white, colour))
    span = high - low
    if not (span > 0).all():  # also refuses NaN
        return None
    bad = (low + span * (128 / 255) - mid).abs() > 1e-3 * span
    if len(low) == 3:
        bad |= (low + span * torch.tensor([1.0, 0.0, 128 / 255]) - hue).abs() > 1e-3 * span
    return None if bad.any() else (low, high)


def _crop(
    transform: Transform, size: tuple[int, int], shape: tuple[int, ...]
) -> dict[str, Any] | None:
    """`crop_pct` and `crop_mode`; a picture that is not square tells the modes apart."""
    width, height = size
    if width == height:
        white = _run(transform, np.full((height, width * 3 // 2, 3), 255, np.uint8))
        if white is not None and tuple(white.shape) == shape:
            width = width * 3 // 2
    shown = _visible(transform, (width, height), shape)
    if shown is None:
        return None
    (share_x, share_y), padded = shown
    scale_x, scale_y = shape[2] / (share_x * width), shape[1] / (share_y * height)
    if padded:
        mode, share, side = "border", *min((share_x, shape[2]), (share_y, shape[1]))
    elif abs(scale_x / scale_y - 1) > 0.05:
        if abs(share_x - share_y) > 0.02:
            return None
        mode, share, side = "squash", share_x, shape[2]
    else:
        mode, share, side = "center", *max((share_x, shape[2]), (share_y, shape[1]))
    if share > 1.02:
        return None
    return {"crop_pct": _crop_pct(side, share), "crop_mode": mode}


def _crop_pct(side: int, share: float) -> float:
    """The shortest decimal for which timm resizes to the same size, floor(side / crop_pct)."""
    resized = max(side, round(side / share))
    for digits in range(1, 9):
        value = math.floor(side / resized * 10**digits + 1e-9) / 10**digits
        if value > 0 and math.floor(side / value) == resized:
            return value
    return side / resized


def _visible(
    transform: Transform, size: tuple[int, int], shape: tuple[int, ...]
) -> tuple[list[float], bool] | None:
    """Share of the width and of the height that an output of this size stands for, and whether it is padded.

    A ramp from black to white over the picture shows where each output pixel comes from. None if
    the output is not a centre crop: mirrored, off centre, bent.
    """
    width, height = size
    black, white = (
        _run(transform, np.full((height, width, 3), value, np.uint8)) for value in (0, 255)
    )
    if black is None or white is None or not black.shape == white.shape == shape:
        return None
    low, span = black[0].double(), white[0].double() - black[0].double()
    inside = span > 0.5 * span[shape[1] // 2, shape[2] // 2]  # padding is the same in both
    shares = []
    for axis, length in ((1, width), (0, height)):
        step = max(1, 255 // length) if length <= 256 else 255 / length  # whole levels: no rounding
        ramp = np.round(np.arange(length) * step).astype(np.uint8)
        pixels = np.broadcast_to(ramp[None, :] if axis else ramp[:, None], (height, width))
        out = _run(transform, np.repeat(pixels[..., None], 3, axis=2))
        if out is None or out.shape != shape:
            return None
        line = ((out[0].double() - low) / span).nan_to_num(0.0, 0.0, 0.0)
        line = line.select(1 - axis, shape[2 - axis] // 2)
        line = (255 * line / step + 0.5) / length  # in shares of the picture
        known = inside.select(1 - axis, shape[2 - axis] // 2).nonzero().flatten()
        share = _slope(line[known].numpy(), known.numpy(), shape[1 + axis])
        if share is None:
            return None
        shares.append(share)
    return shares, not bool(inside.all())


def _slope(places: np.ndarray, pixels: np.ndarray, side: int) -> float | None:
    """Share of the picture over `side` output pixels, by a straight line through the middle 80%."""
    edge = len(pixels) // 10  # the ends of the ramp are blurred
    places, pixels = places[edge : len(places) - edge], pixels[edge : len(pixels) - edge]
    if len(pixels) < 2:
        return None
    slope, start = np.polyfit(pixels + 0.5 - side / 2, places, 1)
    error = np.abs(start + slope * (pixels + 0.5 - side / 2) - places).max()
    share = float(slope) * side
    tolerance = max(0.02, 1.5 * share / side)
    return share if share > 0 and error < tolerance and abs(start - 0.5) < tolerance else None


def _interpolation(transform: Any) -> str | None:
    """The first `interpolation` found in a transform and in the parts of a Compose or Sequential."""
    value = getattr(transform, "interpolation", None)
    value = getattr(value, "value", value)  # torchvision's InterpolationMode
    if isinstance(value, str):
        return value
    parts = transform if isinstance(transform, nn.Sequential) else None
    for part in parts or getattr(transform, "transforms", None) or ():
        if found := _interpolation(part):
            return found
    return None
