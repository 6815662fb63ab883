"""What frozen networks return for every picture of a view, computed once and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..losses.state import eval_mode
from ..models.factory import class_count
from ..models.input_config import normalization_of
from ..models.inputs import InputAdapter
from .cache_files import CacheFiles, key_parts
from .cache_key import data_key, teacher_key, transform_key, transform_text
from .image_view import ImageView
from .ranks import gather, on_first, rank_and_world


class Frozen:
    """A frozen network with its input adapter and its autocast: pixels -> float32 [B, ...]."""

    def __init__(
        self,
        network: nn.Module,
        first: nn.Module | None,
        given: Any,
        dtype: torch.dtype | None,
        forward: Callable[[nn.Module, Tensor], Tensor],
    ) -> None:
        self.network, self.dtype, self.forward = network, dtype, forward
        self.parameter = next(network.parameters(), None)
        self.device = torch.device("cpu") if self.parameter is None else self.parameter.device
        self.adapter = InputAdapter(network, first or network, given).to(self.device)
        self.key = teacher_key(network, None if first is None else self.adapter.reference)

    def __call__(self, pixels: Tensor) -> Tensor:
        dtype = pixels.dtype if self.parameter is None else self.parameter.dtype
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            pixels = self.adapter(pixels.to(self.device))
            return self.forward(self.network, pixels.to(dtype)).float()


def network_outputs(
    view: ImageView,
    networks: Sequence[nn.Module],
    folder: str | os.PathLike,
    kind: str,
    forward: Callable[[nn.Module, Tensor], Tensor],
    *,
    first: nn.Module | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
) -> CacheFiles:
    """The files with what the networks return for each row; what is missing is computed first.

    Args:
        view: the pictures.
        networks: run in eval mode, without gradients, on the device where they are.
        folder: for this cache alone.
        kind: "teacher" stores [N, T, C] of all networks, "feature" [N, D] of one.
        forward: what is taken of a network, (network, pixels) -> [B, C] or [B, D].
        first: the network for which the view normalises; by default each one itself.
        batch_size: pictures in a forward pass.
        num_workers: processes that read pictures.
        dtype: of autocast; None for none.

    Raises:
        TypeError, ValueError: no view, a random transform, other outputs in the folder.
        OSError: the folder cannot be written, or has too little space.
    """
    _refuse_arguments(view, networks, kind, dtype)
    folder = Path(os.path.abspath(folder))
    rank, world = rank_and_world()
    transform = transform_key(view, kind)  # first, since it is cheap beside reading all pictures
    with eval_mode(*networks):
        given = None if first is None else normalization_of([view], [first, *networks])
        frozen = [Frozen(network, first, given, dtype, forward) for network in networks]
        width = _width(view, frozen, kind)
        key = {
            "transform": transform,
            f"{kind}s": [network.key for network in frozen],
            "dtype": str(dtype),
            {"teacher": "classes", "feature": "length"}[kind]: width,
            "hint": transform_text(view),
        }
        _refuse_differing(gather(key, world))
        shape = (len(view), len(networks), width) if kind == "teacher" else (len(view), width)
        files = CacheFiles(folder, kind, shape)
        starts = on_first(lambda: files.claim({"data": data_key(view)} | key, batch_size), world)
        blocks = [range(k, min(k + batch_size, len(view))) for k in starts[rank::world]]
        _compute(view, frozen, files, blocks, num_workers, show=rank == 0)
    if world > 1:
        dist.barrier()
    return files


def _width(view: ImageView, networks: list[Frozen], kind: str) -> int:
    """The length of an output, the same for all networks. One that does not tell is asked."""
    pixels = torch.as_tensor(view[0]["pixel_values"])[None]
    told = [class_count(n.network) if kind == "teacher" else None for n in networks]
    widths = [n or network(pixels).shape[-1] for n, network in zip(told, networks, strict=True)]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the teachers have different numbers of classes: {widths}; they cannot teach together"
        )
    return widths[0]


def _compute(
    view: ImageView,
    networks: list[Frozen],
    files: CacheFiles,
    blocks: list[range],
    num_workers: int,
    show: bool,
) -> None:
    """Compute and store some blocks of rows."""
    if not blocks:
        return
    loader = DataLoader(
        view,
        batch_sampler=blocks,  # type: ignore[arg-type]
        num_workers=num_workers,
        generator=torch.Generator(),  # the global one stays as it is
    )
    title = {"teacher": "teacher logits", "feature": "features"}[files.kind]
    bar = tqdm(loader, title, leave=False, disable=None if show else True)
    for rows, batch in zip(blocks, bar, strict=True):
        outputs = [network(batch["pixel_values"]).cpu() for network in networks]
        for k, values in enumerate(outputs):
            name = f"teacher {k}" if files.kind == "teacher" else "the network"
            _refuse_output(values, rows, files, name, networks[k].dtype)
        stacked = torch.stack(outputs, dim=1) if files.kind == "teacher" else outputs[0]
        replaced = batch["index"].numpy() != np.asarray(rows)
        files.write(rows.start, stacked.numpy(), replaced)


def _refuse_output(
    values: Tensor, rows: range, files: CacheFiles, name: str, dtype: torch.dtype | None
) -> None:
    expected = [len(rows), files.shape[-1]]
    if list(values.shape) != expected:
        raise ValueError(
            f"{name} gave {files.values.stem} {list(values.shape)}, expected {expected}"
        )
    if values.isnan().any():
        raise ValueError(
            f"{name} gave NaN for rows {rows.start} to {rows.stop - 1}, which the "
            f"cache would keep: check its weights, and dtype={dtype}"
        )


def _refuse_arguments(
    view: ImageView, networks: Sequence[nn.Module], kind: str, dtype: torch.dtype | None
) -> None:
    if not isinstance(view, ImageView):
        raise TypeError(
            f"the view must be an ImageView, got {type(view).__name__}: choose rows in the data "
            "set below it"
        )
    if not networks:
        raise ValueError(f"there are no {kind}s: nothing to cache")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={dtype}: expected torch.bfloat16, torch.float16 or None (no autocast)"
        )


def _refuse_differing(keys: list[dict[str, Any]]) -> None:
    """Refuse processes that would write into one cache for different things."""
    if other := [p for p in key_parts(keys[0]) if any(key[p] != keys[0][p] for key in keys)]:
        values = [{part: key[part] for part in other} for key in keys]
        raise ValueError(
            f"the processes differ in {', '.join(other)}: {values}; they would mix their outputs "
            "in one cache"
        )
