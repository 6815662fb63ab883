"""Work shared by the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

V = TypeVar("V")


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no process group yet: each "
            "process would compute all logits, into the same files. Make the training arguments "
            "first, which start it"
        )
    return 0, 1


def gather(value: V, world: int) -> list[V]:
    """The values of all processes, by rank."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def on_first(call: Callable[[], V], world: int) -> V:
    """The result of `call` in the first process, for all processes.

    Its error is raised in all of them: otherwise the others would wait for ever.
    """
    if world == 1:
        return call()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = call()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
