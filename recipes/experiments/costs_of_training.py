"""Rows of benchmark.py on whole training steps and epochs."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import timm
import torch
from measuring import DEVICE, GPU, Row, networks, pictures, ratio, smkd
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from kd_plugins import SMKD, MutualDistillationTrainer, MutualTrainingArguments, MyLC


def step_of_a_pair(name: str, size: int, batch: int, quick: bool) -> Row:
    """A training step of two networks: SMKD + MyLC against cross-entropy."""
    if quick:
        name, size, batch = "resnet10_cifar", 32, 64
    nets, optimizer = networks(name, 2)
    x, y = pictures(batch, size)
    mutual, plain = smkd(), nn.CrossEntropyLoss()

    def step(loss: Callable) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            zs = tuple(net(x) for net in nets)
        loss(zs).backward()
        optimizer.step()

    figure = ratio(
        lambda: step(lambda zs: mutual(zs, y)),
        lambda: step(lambda zs: sum(plain(z.float(), y) for z in zs)),
        repeats=31 if GPU or quick else 3,
        warm=1,
    )
    return figure, "x with cross-entropy", 1.03


def epoch_in_the_trainer(quick: bool) -> Row:
    """An epoch in MutualDistillationTrainer, after start-up, against a loop of ten lines."""
    rows = 512 if quick else 2048
    images = torch.randn(rows, 3, 32, 32)
    data = [{"pixel_values": images[i], "labels": i % 10, "index": i} for i in range(rows)]
    ratios = []
    for _ in range(2 if quick else 3):
        ours, theirs = list(epochs_of_the_trainer(data)), list(epochs_of_a_loop(data))
        ratios += [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return statistics.median(ratios), "x a plain loop", 1.05


def ten_classes() -> list[nn.Module]:
    return [timm.create_model("resnet10_cifar", num_classes=10) for _ in range(2)]


class Clock(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter() - self.start)


def epochs_of_the_trainer(data: list[dict]) -> list[float]:
    """Seconds of each of three epochs."""
    settings = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 64, "num_train_epochs": 3}
    settings |= {"learning_rate": 0.01, "logging_steps": 10_000}
    clock, loss = Clock(), SMKD(MyLC(window=len(data)))
    with tempfile.TemporaryDirectory() as folder:
        args = MutualTrainingArguments(folder, **settings)
        MutualDistillationTrainer(
            ten_classes(), loss, args, train_dataset=data, callbacks=[clock]
        ).train()
    return clock.times


def epochs_of_a_loop(data: list[dict]) -> Iterator[float]:
    """Seconds of each of three epochs."""
    nets = nn.ModuleList(ten_classes()).to(DEVICE)
    loss = SMKD(MyLC(window=len(data))).to(DEVICE)
    optimizer = torch.optim.SGD(nets.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(data, 64, shuffle=True)
    for epoch in range(3):
        start = time.perf_counter()
        for i, item in enumerate(loader):
            loss.set_progress((epoch + i / len(loader)) / 3)
            x, y = item["pixel_values"].to(DEVICE), item["labels"].to(DEVICE)
            value = loss(tuple(net(x) for net in nets), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if GPU:
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def two_peers_on_one(how: str, quick: bool) -> Row:
    """A bf16 step of two ResNet-18 with SMKD + MyLC against one: eager, compiled or in streams."""
    name, batch = ("resnet10_cifar", 8) if quick else ("resnet18_cifar", 128)
    x, y = pictures(batch, 32)
    mutual, plain = smkd(), nn.CrossEntropyLoss()

    def step_of(count: int) -> Callable[[], None]:
        nets, optimizer = networks(name, count)

        def loss() -> torch.Tensor:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                side_by_side = how == "streams" and count > 1
                zs = in_streams(nets, x) if side_by_side else tuple(net(x) for net in nets)
            return plain(zs[0].float(), y) if count == 1 else mutual(zs, y)

        run = torch.compile(loss) if how == "compiled" else loss

        def step() -> None:
            optimizer.zero_grad()
            run().backward()
            optimizer.step()

        return step

    return ratio(step_of(2), step_of(1), repeats=3 if quick else 31), "x one network", 1.5


def in_streams(nets: nn.ModuleList, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The logits of the networks, each computed in a CUDA stream of its own."""
    out, here = [], torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in nets]
    for net, stream in zip(nets, streams, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            out.append(net(x))
    for stream in streams:
        here.wait_stream(stream)
    return tuple(out)


def compute_limit(quick: bool) -> Row:
    """A compiled bf16 step of two ResNet-34 against as many operations in a matrix product."""
    name, batch, side = ("resnet10_cifar", 8, 256) if quick else ("resnet34_cifar", 128, 8192)
    nets, optimizer = networks(name, 2)
    x, y = pictures(batch, 32)
    mutual = smkd()

    def loss() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            zs = tuple(net(x) for net in nets)
        return mutual(zs, y)

    def step(run: Callable[[], torch.Tensor]) -> None:
        optimizer.zero_grad()
        run().backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step(loss)
    compiled = torch.compile(loss)
    square = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    product = counter.get_total_flops() / (2 * side**3)  # as many operations, in products
    figure = ratio(lambda: step(compiled), lambda: square @ square) / product
    return figure, "x its compute limit", None
