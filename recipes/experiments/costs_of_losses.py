"""Rows of benchmark.py on losses: time, memory, graphs, host synchronisations."""

from collections.abc import Callable, Iterator

import timm
import torch
from measuring import DEVICE, Row, calls, peak_bytes, ratio, smkd
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from kd_plugins import Loss, create_loss, list_losses
from kd_plugins.losses import loss_class


def loss_alone(
    batch: int, classes: int, quick: bool, ours_compiled: bool, theirs_compiled: bool
) -> Row:
    """SMKD + MyLC, forward and backward, against two cross-entropies of torch."""
    zs = [torch.randn(batch, classes, device=DEVICE, requires_grad=True) for _ in range(2)]
    y = torch.randint(classes, (batch,), device=DEVICE)
    mutual, plain = smkd(), nn.CrossEntropyLoss()
    ours: Callable = torch.compile(mutual, fullgraph=True) if ours_compiled else mutual

    def two(zs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return plain(zs[0], y) + plain(zs[1], y)

    theirs: Callable = torch.compile(two) if theirs_compiled else two

    def both(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        for z in zs:
            z.grad = None

    count = max(1, 200_000 // (batch * classes // 10))
    figure = ratio(
        calls(lambda: both(lambda: ours(tuple(zs), y)), count),
        calls(lambda: both(lambda: theirs(tuple(zs), y)), count),
        repeats=3 if quick else 11,
    )
    if theirs_compiled:
        return figure, "x two compiled cross-entropies", None
    eager = 5 if classes == 100 else 4
    return figure, "x two cross-entropies", 2.5 if ours_compiled else eager


def step_with_teachers(ours, theirs, count: int, quick: bool) -> Row:
    """A student's step with `count` teachers, with one loss against another."""
    student = timm.create_model("resnet10_cifar", num_classes=100).to(DEVICE)
    x, y = torch.randn(64, 3, 32, 32, device=DEVICE), torch.randint(100, (64,), device=DEVICE)
    teachers = [
        timm.create_model("resnet10_cifar", num_classes=100).to(DEVICE).eval() for _ in range(count)
    ]
    extra = {"index": torch.arange(64, device=DEVICE)}

    def step(loss) -> None:
        with torch.no_grad():
            teacher = torch.stack([model(x) for model in teachers])
        known = {"teacher": teacher, **extra}
        loss(student(x), y, **{name: known[name] for name in loss.required_inputs}).backward()
        student.zero_grad()

    losses = [loss.to(DEVICE) for loss in (ours, theirs)]
    repeats = 3 if quick else 15
    figure = ratio(lambda: step(losses[0]), lambda: step(losses[1]), repeats)
    return figure, "x the step beside it", 1.05


def every_loss() -> Iterator[tuple[str, Loss, Callable[[Callable], torch.Tensor]]]:
    """Name, loss and a call of it. Losses on features or mixtures are in the contract tests."""
    classes, rows, g = 10, 64, torch.Generator().manual_seed(0)
    matrix = {"transition": 0.8 * torch.eye(classes) + 0.2 / classes}
    known = dict.fromkeys(("forward_correction", "backward_correction", "t_revision"), matrix)
    known["soft_labels"] = {"labels": torch.full((rows, classes), 1 / classes)}
    inputs = {
        "teacher": torch.randn(3, rows, classes, generator=g).to(DEVICE),
        "index": torch.arange(rows, device=DEVICE),
    }
    y = torch.randint(classes, (rows,), generator=g).to(DEVICE)
    for name in list_losses():
        if loss_class(name).required_inputs & {"features", "mixed"}:
            continue
        loss = create_loss(name, **known.get(name, {})).bind(rows, classes).to(DEVICE)
        zs = tuple(
            torch.randn(rows, classes, generator=g).to(DEVICE).requires_grad_() for _ in range(2)
        )
        logits = zs if loss.num_peers > 1 else zs[0]
        own = {key: value for key, value in inputs.items() if key in loss.required_inputs}
        yield name, loss, lambda call, logits=logits, own=own: call(logits, y, **own)


def no_synchronisation() -> Row:
    """Losses in whose step the host waits for the GPU."""
    waited = []
    for name, loss, call in every_loss():
        loss.set_progress(0.5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(loss).backward()
        except RuntimeError as error:
            waited.append(f"{name}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    print(*waited, sep="\n", end="")
    return len(waited), "losses that wait", 0


def graphs_of_a_schedule() -> Row:
    """Into how many graphs a loss compiles while its schedule runs; the most of any loss."""
    most = 0
    for _, loss, call in every_loss():
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(loss, fullgraph=True, backend=counter)
        for step in range(11):
            loss.set_progress(step / 10)
            call(compiled).backward()
        most = max(most, counter.frame_count)
    return most, "graphs for a whole schedule", 1


def peak_memory(batch: int, classes: int, dtype: torch.dtype) -> Row:
    """SMKD + MyLC against two cross-entropies in float32, in which the loss computes too."""
    y = torch.randint(classes, (batch,), device=DEVICE)
    mutual, plain = smkd(), nn.CrossEntropyLoss()

    def peak(loss: Callable[[list[torch.Tensor]], torch.Tensor]) -> int:
        zs: list[torch.Tensor] = []

        def work() -> None:
            zs.extend(
                torch.randn(batch, classes, device=DEVICE, dtype=dtype, requires_grad=True)
                for _ in range(2)
            )
            loss(zs).backward()

        return peak_bytes(work)

    theirs = peak(lambda zs: plain(zs[0].float(), y) + plain(zs[1].float(), y))
    return peak(lambda zs: mutual(tuple(zs), y)) / theirs, "x two cross-entropies", 2
