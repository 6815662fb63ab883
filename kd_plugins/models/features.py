"""Feature maps of timm networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has_features(model: nn.Module) -> bool:
    """Whether it is timm's network, or transformers' wrapper of one."""
    body = getattr(model, "timm_model", model)
    return hasattr(body, "forward_features") and hasattr(body, "forward_head")


def with_features(
    model: nn.Module, pixels: Tensor, deep: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, C] and maps [B, D, h, w] of a timm network in one pass.

    The logits equal ``model(pixels)``. The maps are the last one only (``forward_features``), or
    with ``deep`` those of all stages (of a transformer: blocks), shallow to deep.
    """
    body: Any = getattr(model, "timm_model", model)
    if deep:
        last, maps = body.forward_intermediates(pixels, output_fmt="NCHW")
    else:
        last, maps = body.forward_features(pixels), []
    return body.forward_head(last), [*maps[:-1], _as_map(body, last, pixels)]


def feature_dims(model: nn.Module) -> list[int]:
    """Channels of the maps that :func:`with_features` returns with ``deep``, shallow to deep."""
    body: Any = getattr(model, "timm_model", model)
    return [*[info["num_chs"] for info in body.feature_info[:-1]], body.num_features]


def _as_map(body: Any, last: Tensor, pixels: Tensor) -> Tensor:
    if last.dim() == 4:
        nhwc = getattr(body, "output_fmt", "NCHW") == "NHWC"
        return last.permute(0, 3, 1, 2) if nhwc else last
    if last.dim() != 3:  # pooled already
        return last
    tokens = last[:, getattr(body, "num_prefix_tokens", 0) :]  # [B, N, D] without class tokens
    embed = body.patch_embed
    if hasattr(embed, "dynamic_feat_size"):  # it may take other sizes than its own
        grid = embed.dynamic_feat_size(pixels.shape[-2:])
    else:
        grid = getattr(embed, "grid_size", None) or (int(tokens.shape[1] ** 0.5),) * 2
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))
