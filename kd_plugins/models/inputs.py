"""What each network gets to see of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Input(nn.Module):
    """Pixels as the first peer expects them, or bytes -> pixels as this network expects them: normalisation, fixed size.

    What is not known of either network is left alone. A module tells by ``pretrained_cfg`` (``mean``, ``std``), as timm's do.
    Bytes are normalised here, a whole batch on the device; for a network that does not tell they become x / 255.
    """

    of_floats: Tensor | None
    of_bytes: Tensor | None

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        own, ref = _normalization(model), _normalization(reference)
        self.size = _fixed_size(model)
        self._keep("of_floats", own if own != ref else None, ref)
        self._keep("of_bytes", own or ((0.0,), (1.0,)), ((0.0,), (1.0,)), 255.0)

    def _keep(self, name: str, own: Any, ref: Any, unit: float = 1.0) -> None:
        """((x / unit · std_ref + mean_ref) - mean) / std as (scale, shift), x · scale + shift; nothing where one is not known."""
        both = None
        if own and ref:
            (mean, std), (ref_mean, ref_std) = (
                torch.tensor(pair, dtype=torch.float64) for pair in (own, ref)
            )
            both = torch.stack([ref_std / std / unit, (ref_mean - mean) / std]).float()[
                :, :, None, None
            ]
        self.register_buffer(name, both, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        of_bytes = pixels.dtype == torch.uint8
        known = self.of_bytes if of_bytes else self.of_floats
        if known is not None and known.shape[1] in (1, pixels.shape[1]):
            pixels = (
                pixels.to(known.dtype, copy=not of_bytes).mul_(known[0]).add_(known[1])
            )  # one new batch, not two
        elif of_bytes:
            raise ValueError(
                f"bytes of {pixels.shape[1]} channels, {list(pixels.shape)}, and the network's mean and std have "
                "another number: hand over normalised floats"
            )
        if self.size and tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(
                pixels, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        return pixels


def _normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    cfg = (
        getattr(model, "pretrained_cfg", None)
        or getattr(getattr(model, "config", None), "pretrained_cfg", None)
        or {}
    )
    if cfg.get("mean") is None or cfg.get("std") is None:
        return None
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) if the network takes one size only: a ViT or Swin of timm, or of transformers."""
    model = getattr(model, "timm_model", model)  # as transformers wraps it
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
    if size is None and hasattr(
        model, "config"
    ):  # not config.image_size: convolutional networks name one and take any
        size = next((m.image_size for m in model.modules() if getattr(m, "image_size", None)), None)
    return (size, size) if isinstance(size, int) else tuple(size) if size else None  # type: ignore[return-value]
