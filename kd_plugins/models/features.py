"""Feature maps of timm networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has_features(model: nn.Module) -> bool:
    """Whether :func:`with_features` can read this network: it is timm's, or transformers' wrapper of one."""
    body = getattr(model, "timm_model", model)
    return hasattr(body, "forward_features") and hasattr(body, "forward_head")


def with_features(
    model: nn.Module, pixels: Tensor, deep: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, C] and maps [B, D, h, w] of a timm network, shallow to deep, in one pass; logits equal ``model(pixels)``.

    Only the last map, what ``forward_features`` returns, or with ``deep`` those of the earlier stages (of a transformer: blocks)
    too: see :func:`feature_dims`.
    """
    body: Any = getattr(model, "timm_model", model)
    if not deep:
        last = body.forward_features(pixels)
        return body.forward_head(last), [_as_map(body, last)]
    last, maps = body.forward_intermediates(pixels, output_fmt="NCHW")
    return body.forward_head(last), [*maps[:-1], _as_map(body, last)]


def feature_dims(model: nn.Module) -> list[int]:
    """Channels of the maps that :func:`with_features` gives, shallow to deep."""
    body: Any = getattr(model, "timm_model", model)
    return [*[info["num_chs"] for info in body.feature_info[:-1]], body.num_features]


def _as_map(body: Any, last: Tensor) -> Tensor:
    if last.dim() == 3:  # tokens [B, N, D], class and register tokens first
        tokens = last[:, getattr(body, "num_prefix_tokens", 0) :]
        height, width = (
            getattr(body.patch_embed, "grid_size", None) or (int(tokens.shape[1] ** 0.5),) * 2
        )
        return tokens.transpose(1, 2).unflatten(2, (height, width))
    return last.permute(0, 3, 1, 2) if getattr(body, "output_fmt", "NCHW") == "NHWC" else last
