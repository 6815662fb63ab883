"""Feature maps [B, D, h, w]: the map of one layer, pooled features, maps of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


def at_layer(name: str, layers: Sequence[T], layer: int) -> T:
    """What a network has at one layer; a network with one map only has it at every layer.

    Args:
        name: of the loss, for errors.
        layers: the maps of a network, or their channels, shallow to deep.
        layer: position in ``layers``.
    """
    if len(layers) == 1:
        return layers[0]
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"{name} reads layer {layer}, got the maps of {len(layers)} layers")
    return layers[layer]


def map_at(name: str, maps: Sequence[Tensor], layer: int, batch_size: int) -> Tensor:
    """The map of one layer, if it is a map of this batch."""
    found = at_layer(name, maps, layer)
    if found.dim() != 4 or len(found) != batch_size:
        raise ValueError(
            f"{name}: expected a map [{batch_size}, D, h, w] at layer {layer}, "
            f"got {list(found.shape)}"
        )
    return found


def vectors_at(name: str, maps: Sequence[Tensor], layer: int, batch_size: int) -> Tensor:
    """The features of one layer as vectors [B, D]: a map is pooled, vectors are as they are."""
    found = at_layer(name, maps, layer)
    if found.dim() == 2 and len(found) == batch_size:
        return found
    return pooled(map_at(name, maps, layer, batch_size))


def pooled(features: Tensor) -> Tensor:
    """Means over the positions of a map: [B, D, h, w] -> [B, D]."""
    return features.flatten(2).mean(2)


def same_size(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps, average-pooled to the smallest height and the smallest width among them."""
    size = min(f.shape[-2] for f in maps), min(f.shape[-1] for f in maps)
    return [f if f.shape[-2:] == size else F.adaptive_avg_pool2d(f, size) for f in maps]
