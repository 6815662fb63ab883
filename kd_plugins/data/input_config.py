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


class _Other(Exception):
    """timm's terms cannot describe the transform."""


def input_config(transform: Transform, size: tuple[int, int]) -> dict[str, Any] | None:
    """The preprocessing of `transform` in timm's terms, or None if these cannot describe it.

    They can if the transform is a resize, a centre crop and `(x / 255 - mean) / std` per channel,
    and does not draw at random.

    Args:
        size: (width, height) of the test pictures.

    Returns:
        `input_size` (C, H, W), `mean` and `std` (one per channel; absent if the output is uint8),
        `crop_pct`, `crop_mode` ("center", "squash" or "border") and `interpolation`.
    """
    try:
        shape, levels = _levels(transform, size)
        crop_pct, crop_mode = _crop(transform, size, shape)
    except _Other:
        return None
    config = {"input_size": shape, **levels, "crop_pct": crop_pct, "crop_mode": crop_mode}
    return config | {"interpolation": _interpolation(transform) or "bicubic"}


def _require(ok: Any) -> None:
    if not ok:
        raise _Other


def _run(transform: Transform, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The output [C, H, W] for a test picture, given as [H, W, 3] or to be broadcast to it."""
    picture = Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (size[1], size[0], 3))))
    try:
        out = repeated(lambda: transform(picture))
    except Exception:  # any code may be in a transform
        raise _Other from None
    if out is None or out.ndim != 3 or out.shape[0] not in (1, 3) or 0 in out.shape:
        raise _Other
    _require(out.dtype == torch.uint8 or out.is_floating_point())
    return out


def _flat(transform: Transform, value: Any, size: tuple[int, int]) -> Tensor:
    return _run(transform, np.array(value, np.uint8), size)


def _levels(transform: Transform, size: tuple[int, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of the output, and mean and std, from flat pictures. Grey and colour check them."""
    flats = [_flat(transform, value, size) for value in (0, 255, 128, (255, 0, 128))]
    shape = tuple(flats[0].shape)
    _require(all(flat.shape == shape for flat in flats))
    low, high, grey, colour = (flat[:, shape[1] // 2, shape[2] // 2].double() for flat in flats)
    span = high - low
    _require((span > 0).all())  # refuses NaN too
    affine = ((grey - low) / span - 128 / 255).abs() < 1e-3
    if len(low) == 3:  # a channel must not depend on the others
        affine &= ((colour - low) / span - torch.tensor([1.0, 0.0, 128 / 255])).abs() < 1e-3
    _require(affine.all())
    if flats[0].dtype == torch.uint8:
        _require((low == 0).all() and (high == 255).all())
        return shape, {}
    mean, std = (tuple(round(x, 6) + 0.0 for x in v.tolist()) for v in (-low / span, 1 / span))
    return shape, {"mean": mean, "std": std}


def _crop(transform: Transform, size: tuple[int, int], shape: tuple[int, ...]) -> tuple[float, str]:
    """`crop_pct` and `crop_mode`. A picture that is not square tells the modes apart."""
    width, height = size
    if width == height and _flat(transform, 255, (width * 3 // 2, height)).shape == shape:
        width = width * 3 // 2
    across, down, padded = _visible(transform, (width, height), shape)
    stretched = shape[2] / (across * width) / (shape[1] / (down * height))
    sides = (across, shape[2]), (down, shape[1])
    if padded:
        mode, (share, side) = "border", min(sides)
    elif abs(stretched - 1) > 0.05:
        _require(abs(across - down) < 0.02)
        mode, (share, side) = "squash", sides[0]
    else:
        mode, (share, side) = "center", max(sides)
    _require(share < 1.02)
    return _crop_pct(side, share), mode


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
) -> tuple[float, float, bool]:
    """The shares of width and height that the output shows, and whether it is padded.

    A ramp from black to white across the picture shows where each output pixel comes from.
    """
    black, white = (_flat(transform, value, size) for value in (0, 255))
    _require(black.shape == white.shape == shape)
    low, span = black[0].double(), white[0].double() - black[0].double()
    inside = span > 0.5 * span[shape[1] // 2, shape[2] // 2]  # padding is the same in both
    shares = []
    for axis, length in ((1, size[0]), (0, size[1])):
        step = max(1, 255 // length) if length <= 256 else 255 / length  # whole levels if possible
        ramp = np.round(np.arange(length) * step).astype(np.uint8)
        out = _run(transform, ramp[None, :, None] if axis else ramp[:, None, None], size)
        _require(out.shape == shape)
        middle = shape[2 - axis] // 2
        known = inside.select(1 - axis, middle).nonzero().flatten()
        levels = ((out[0].double() - low) / span).select(1 - axis, middle)[known]
        places = (255 * levels / step + 0.5) / length  # in shares of the picture
        shares.append(_slope(places.numpy(), known.numpy(), shape[1 + axis]))
    return shares[0], shares[1], not bool(inside.all())


def _slope(places: np.ndarray, pixels: np.ndarray, side: int) -> float:
    """The share that `side` output pixels show, by a straight line through the middle 80%.

    Refuses outputs that are not a centre crop: mirrored, off centre or bent.
    """
    edge = len(pixels) // 10  # the ends of the ramp are blurred
    places, pixels = places[edge : len(places) - edge], pixels[edge : len(pixels) - edge]
    _require(len(pixels) > 1)
    slope, start = np.polyfit(pixels + 0.5 - side / 2, places, 1)
    error = np.abs(start + slope * (pixels + 0.5 - side / 2) - places).max()
    tolerance = max(0.02, 1.5 * slope)
    _require(slope > 0 and error < tolerance and abs(start - 0.5) < tolerance)
    return float(slope) * side


def _interpolation(transform: Any) -> str | None:
    """The first `interpolation` of a transform, or of the parts of a Compose or Sequential."""
    value = getattr(transform, "interpolation", None)
    value = getattr(value, "value", value)  # torchvision's InterpolationMode
    if isinstance(value, str):
        return value
    sequence = isinstance(transform, nn.Sequential)
    parts = transform if sequence else getattr(transform, "transforms", None) or ()
    return next(filter(None, map(_interpolation, parts)), None)
