"""What the rows of benchmark.py are measured with."""

import itertools
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

from kd_plugins import SMKD, MyLC
from kd_plugins import models as models  # makes resnet18_cifar known to timm

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Row = tuple[float, str, float | None]  # figure, unit, the figure to reach


def seconds(work: Callable[[], object]) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 11, warm: int = 2
) -> float:
    """Median over neighbouring runs of time of ours to time of theirs."""
    for _ in range(warm):
        ours(), theirs()
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(repeats))


def calls(work: Callable[[], object], count: int) -> Callable[[], None]:
    """Many short calls as one: the clock has its own cost."""

    def several() -> None:
        for _ in range(count):
            work()

    return several


def smkd() -> SMKD:
    """SMKD + MyLC in the middle of its schedule."""
    loss = SMKD(MyLC(window=50_000)).to(DEVICE)
    loss.set_progress(0.5)
    return loss


def networks(name: str, count: int) -> tuple[nn.ModuleList, torch.optim.Optimizer]:
    nets = nn.ModuleList(timm.create_model(name, num_classes=100) for _ in range(count))
    nets = nets.to(DEVICE, memory_format=torch.channels_last)
    return nets, torch.optim.SGD(nets.parameters(), lr=1e-3, momentum=0.9)


def pictures(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, size, size, device=DEVICE)
    y = torch.randint(100, (batch,), device=DEVICE)
    return x.to(memory_format=torch.channels_last), y


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that the tensors made in `work` take at once."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(
        itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    )
