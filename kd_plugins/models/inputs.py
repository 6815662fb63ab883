"""What each network sees of a batch of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std


class InputAdapter(nn.Module):
    """Convert a batch of pictures to what one network expects: normalisation and fixed size.

    Floats are normalised again for a network that expects another normalisation than the first
    peer. Bytes (uint8) are normalised here, on the device; for a network without a
    known normalisation they become x / 255. A network tells its normalisation by ``pretrained_cfg``
    (``mean``, ``std``), as timm's do. Floats pass unchanged where one of the two is not known.

    Args:
        model: the network that will see the batch.
        first: the first peer, which sees floats as they come.
        given: (mean, std) by which the data normalises floats, where they say it; else it is taken
            to be that of the first peer.
    """

    of_floats: Tensor | None
    of_bytes: Tensor | None

    def __init__(
        self, model: nn.Module, first: nn.Module, given: Normalization | None = None
    ) -> None:
        super().__init__()
        self.own, of_first = normalization(model), normalization(first)
        self.reference = given or of_first
        self.size = fixed_size(model)
        self._keep("of_floats", self.own if self.own != of_first else None, self.reference)
        self._keep("of_bytes", self.own or ((0.0,), (1.0,)), ((0.0,), (1.0,)), 255.0)

    def _keep(self, name: str, own: Any, reference: Any, unit: float = 1.0) -> None:
        """Store x -> ((x / unit * std_ref + mean_ref) - mean) / std as (scale, shift), or None."""
        affine = None
        if own and reference:
            pairs = (torch.tensor(pair, dtype=torch.float64) for pair in (own, reference))
            (mean, std), (ref_mean, ref_std) = pairs
            affine = torch.stack([ref_std / std / unit, (ref_mean - mean) / std]).float()
            affine = affine[:, :, None, None]
        self.register_buffer(name, affine, persistent=False)

    def _affine(self, channels: int, of_bytes: bool) -> Tensor | None:
        """(scale, shift) for pictures of so many channels; None where it does not fit them."""
        affine = self.of_bytes if of_bytes else self.of_floats
        return affine if affine is not None and affine.shape[1] in (1, channels) else None

    def forward(self, pixels: Tensor) -> Tensor:
        of_bytes = pixels.dtype == torch.uint8
        affine = self._affine(pixels.shape[1], of_bytes)
        if affine is not None:  # one new batch, not two
            pixels = pixels.to(affine.dtype, copy=not of_bytes).mul_(affine[0]).add_(affine[1])
        elif of_bytes:
            raise ValueError(
                f"bytes of {pixels.shape[1]} channels, {list(pixels.shape)}, and the network's "
                "mean and std have another number: hand over normalised floats"
            )
        if self.size and tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(
                pixels, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        return pixels

    def input_config(self, batch: Mapping[str, Any], of_bytes: bool) -> dict[str, Any]:
        """The input config of what this network sees, given that of the batches.

        Args:
            batch: ``input_size`` (C, H, W) and, where they are known, ``mean``, ``std``,
                ``crop_pct``, ``interpolation``, as ``ImageView.input_config`` returns them.
            of_bytes: whether the batches hold bytes.
        """
        config = dict(batch)
        channels, *size = config["input_size"]
        if self.size and tuple(size) != self.size:
            config |= {"input_size": (channels, *self.size), "interpolation": "bilinear"}
        if "mean" not in config or of_bytes:
            unchanged = ((0.0,) * channels, (1.0,) * channels) if of_bytes else None
            if known := self.own or unchanged:
                config["mean"], config["std"] = known
        elif (affine := self._affine(channels, of_bytes)) is not None:
            scale, shift = affine.double().cpu().flatten(1)
            mean, std = (torch.tensor(config[k], dtype=torch.float64) for k in ("mean", "std"))
            config["mean"] = _rounded(mean - shift * std / scale)
            config["std"] = _rounded(std / scale)
        return config


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) + 0.0 for value in values.tolist())  # no -0.0


def normalization(model: nn.Module) -> Normalization | None:
    """(mean, std) that a network expects, from its ``pretrained_cfg``; None if it does not say."""
    config = getattr(model, "config", None)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(config, "pretrained_cfg", None) or {}
    if cfg.get("mean") is None or cfg.get("std") is None:
        return None
    return tuple(cfg["mean"]), tuple(cfg["std"])


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) if the network takes one size only, as a ViT or a Swin does."""
    model = getattr(model, "timm_model", model)  # as transformers wraps it
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
    if size is None and hasattr(model, "config"):
        # not config.image_size: convolutional networks name one and take any
        size = next((m.image_size for m in model.modules() if getattr(m, "image_size", None)), None)
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if size else None
