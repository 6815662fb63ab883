"""What the library costs, as ratios within one run: each row against the same work without it.

    python recipes/experiments/benchmark.py                          # all rows: minutes
    python recipes/experiments/benchmark.py --rows "loss" "import"   # rows with this in their name
    python recipes/experiments/benchmark.py --quick                  # smaller networks and data

Both sides of a ratio are warmed up and then run in turns. The figure is the median ratio of
neighbouring runs, so that a machine that is slow for a while is slow for both. The table is
printed, and written to `--output` with hardware and versions. Rows with "GPU" in their name need
one.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import timm
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from kd_plugins import (
    AEKD,
    AVER,
    CAMKD,
    CE,
    KD,
    SMKD,
    LabelRevision,
    Loss,
    MaskedLoss,
    MutualDistillationTrainer,
    MutualTrainingArguments,
    MyLC,
    create_loss,
    list_losses,
)
from kd_plugins.data import ImageView, noisy_view, symmetric
from kd_plugins.losses import loss_class
from kd_plugins.models import PeerModule  # and makes resnet18_cifar known to timm
from kd_plugins.train import run_main

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


# ---------------------------------------------------------------------------------------- the rows


def loss_alone(batch: int, classes: int, ours_compiled: bool, theirs_compiled: bool = False) -> Row:
    """SMKD + MyLC, forward and backward, against two cross-entropies of torch."""
    zs = [torch.randn(batch, classes, device=DEVICE, requires_grad=True) for _ in range(2)]
    y = torch.randint(classes, (batch,), device=DEVICE)
    smkd, plain = SMKD(MyLC(window=50_000)).to(DEVICE), nn.CrossEntropyLoss()
    smkd.set_progress(0.5)
    ours: Callable = torch.compile(smkd, fullgraph=True) if ours_compiled else smkd

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
    )
    if theirs_compiled:
        return figure, "x two compiled cross-entropies", None
    eager = 5 if classes == 100 else 4
    return figure, "x two cross-entropies", 2.5 if ours_compiled else eager


def step_of_a_pair(name: str, size: int, batch: int, quick: bool) -> Row:
    """A training step of two networks: SMKD + MyLC against cross-entropy."""
    if quick:
        name, size, batch = "resnet10_cifar", 32, 64
    nets = [
        timm.create_model(name, num_classes=100).to(DEVICE, memory_format=torch.channels_last)
        for _ in range(2)
    ]
    optimizer = torch.optim.SGD(
        [p for net in nets for p in net.parameters()], lr=1e-3, momentum=0.9
    )
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(100, (batch,), device=DEVICE)
    smkd, plain = SMKD(MyLC(window=50_000)).to(DEVICE), nn.CrossEntropyLoss()
    smkd.set_progress(0.5)

    def step(loss: Callable) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            zs = tuple(net(x) for net in nets)
        loss(zs).backward()
        optimizer.step()

    figure = ratio(
        lambda: step(lambda zs: smkd(zs, y)),
        lambda: step(lambda zs: sum(plain(z.float(), y) for z in zs)),
        repeats=31 if GPU or quick else 3,
        warm=1,
    )
    return figure, "x with cross-entropy", 1.03


def step_with_teachers(ours, theirs, count: int) -> Row:
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
    return (
        ratio(lambda: step(losses[0]), lambda: step(losses[1]), repeats=15),
        "x the step beside it",
        1.05,
    )


def epoch_in_the_trainer(quick: bool) -> Row:
    """An epoch in MutualDistillationTrainer, after start-up, against a loop of ten lines."""
    rows, batch = 512 if quick else 2048, 64
    pictures = torch.randn(rows, 3, 32, 32)
    data = [{"pixel_values": pictures[i], "labels": i % 10, "index": i} for i in range(rows)]

    def networks() -> list[nn.Module]:
        return [timm.create_model("resnet10_cifar", num_classes=10) for _ in range(2)]

    class Clock(TrainerCallback):
        """Seconds of each epoch."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_epoch_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter() - self.start)

    def plain() -> list[float]:
        nets = [net.to(DEVICE) for net in networks()]
        loss = SMKD(MyLC(window=rows)).to(DEVICE)
        optimizer = torch.optim.SGD(
            [p for net in nets for p in net.parameters()], lr=0.01, momentum=0.9
        )
        loader = torch.utils.data.DataLoader(data, batch, shuffle=True)
        out = []
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
            out.append(time.perf_counter() - start)
        return out

    times: list[float] = []
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2 if quick else 3):
            times.clear()
            args = MutualTrainingArguments(
                f"{folder}/{k}",
                num_train_epochs=3,
                per_device_train_batch_size=batch,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                learning_rate=0.01,
                logging_steps=10_000,
            )
            loss = SMKD(MyLC(window=rows))
            MutualDistillationTrainer(
                networks(), loss, args, train_dataset=data, callbacks=[Clock()]
            ).train()
            ratios += [ours / theirs for ours, theirs in zip(times[1:], plain()[1:], strict=True)]
    return statistics.median(ratios), "x a plain loop", 1.05


def pictures_on_disk(folder: Path, count: int, side: int) -> None:
    """The same JPEG files as one folder per class and as parquet."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    for i in range(count):
        path = folder / "train" / f"class{i % 4}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small[i]).resize((side, side), Image.Resampling.BILINEAR).save(
            path, quality=90
        )
    files = sorted((folder / "train").rglob("*.jpg"))
    rows = [
        {"image": {"bytes": p.read_bytes(), "path": None}, "label": int(p.parent.name[5:])}
        for p in files
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


def data_rate(kind: str, quick: bool, floats: bool = False) -> Row:
    """Rows a second decoded, augmented, batched, normalised on the device, against timm's loader.

    timm's loader has its prefetcher, as in timm's training script: it batches uint8 and normalises
    whole batches, which is the faster way.
    """
    count, side = (256 if quick else 1024), 256
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures_on_disk(folder, count, side)
        # what timm's loader makes too; the bytes are normalised as the Trainer does it
        transform = timm.data.create_transform(
            224, is_training=True, color_jitter=None, normalize=floats
        )
        normalise = PeerModule([timm.create_model("test_resnet")], CE()).inputs[0].to(DEVICE)
        if kind == "parquet":
            data = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=name)
        else:
            data = datasets.load_dataset(
                "imagefolder", data_dir=str(folder / "train"), split="train", cache_dir=name
            )
        ours = torch.utils.data.DataLoader(
            ImageView(data, transform), 64, shuffle=True, drop_last=True
        )
        theirs = timm.data.create_loader(
            timm.data.create_dataset("", root=str(folder / "train")),
            (3, 224, 224),
            64,
            is_training=True,
            color_jitter=None,
            device=DEVICE,
            num_workers=0,
            persistent_workers=False,
        )

        def run_ours() -> None:
            for batch in ours:
                normalise(batch["pixel_values"].to(DEVICE, non_blocking=True))

        def run_theirs() -> None:
            for _ in theirs:
                pass

        figure = 1 / ratio(run_ours, run_theirs, repeats=5, warm=1)
        return figure, "x timm's rows a second", None if floats else 1.3


def noisy_view_of_millions(memory: bool) -> Row:
    """Seconds, or the peak of additional memory of numpy and Arrow. No picture may be copied."""
    rows = 2_400_000
    starts = pyarrow.py_buffer(np.arange(rows + 1, dtype=np.int32) * 64)
    content = pyarrow.Array.from_buffers(
        pyarrow.binary(), rows, [None, starts, pyarrow.py_buffer(bytes(rows * 64))]
    )
    image = pyarrow.StructArray.from_arrays(
        [content, pyarrow.nulls(rows, pyarrow.string())], ["bytes", "path"]
    )
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1000)}
    )
    columns = {"image": image, "label": np.arange(rows) % 1000}
    data = datasets.Dataset(pyarrow.table(columns, schema=features.arrow_schema))
    noise = symmetric(1000, 0.4)
    if not memory:
        return seconds(lambda: noisy_view(data, noise, seed=0)), "s", 1.0

    def addresses(dataset: datasets.Dataset) -> list[int]:
        return [
            buffer.address
            for chunk in dataset.data["image"].chunks
            for buffer in chunk.buffers()
            if buffer
        ]

    usual = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(usual)  # counts from zero
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()  # numpy tells it what it takes
    view = noisy_view(data, noise, seed=0)
    peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    tracemalloc.stop()
    pyarrow.set_memory_pool(usual)
    if addresses(view) != addresses(data):
        raise RuntimeError(
            "noisy_view has copied the pictures: expected the same buffers in both data sets."
        )
    return peak / 1e6, "MB", 50


def import_time() -> Row:
    def start(module: str) -> float:
        code = (
            f"import time; s = time.perf_counter(); import {module}; print(time.perf_counter() - s)"
        )
        return float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )

    times = [(start("kd_plugins"), start("torch")) for _ in range(5)]
    return statistics.median(ours - theirs for ours, theirs in times), "s more than torch", 0.1


def every_loss() -> Iterator[tuple[str, Loss, Callable[[Callable], torch.Tensor]]]:
    """Name, loss and a call of it. Losses on features are measured by the contract tests."""
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
        if "features" in loss_class(name).required_inputs:
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


def two_peers_on_one(how: str, quick: bool) -> Row:
    """A bf16 step of two ResNet-18 with SMKD + MyLC against one: eager, compiled or in streams."""
    name, batch = ("resnet10_cifar", 8) if quick else ("resnet18_cifar", 128)
    x = torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(100, (batch,), device=DEVICE)
    smkd, plain = SMKD(MyLC(window=50_000)).to(DEVICE), nn.CrossEntropyLoss()
    smkd.set_progress(0.5)
    streams = [torch.cuda.Stream() for _ in range(2)] if how == "streams" else []

    def step_of(count: int) -> Callable[[], None]:
        nets = nn.ModuleList(timm.create_model(name, num_classes=100) for _ in range(count))
        nets = nets.to(DEVICE, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(nets.parameters(), lr=1e-3, momentum=0.9)

        def logits() -> tuple[torch.Tensor, ...]:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                if not streams or count == 1:
                    return tuple(net(x) for net in nets)
                out, here = [], torch.cuda.current_stream()
                for net, stream in zip(nets, streams, strict=True):
                    stream.wait_stream(here)
                    with torch.cuda.stream(stream):
                        out.append(net(x))
                for stream in streams:
                    here.wait_stream(stream)
                return tuple(out)

        def loss() -> torch.Tensor:
            zs = logits()
            return plain(zs[0].float(), y) if count == 1 else smkd(zs, y)

        run = torch.compile(loss) if how == "compiled" else loss

        def step() -> None:
            optimizer.zero_grad()
            run().backward()
            optimizer.step()

        return step

    return ratio(step_of(2), step_of(1), repeats=3 if quick else 31), "x one network", 1.5


def compute_limit(quick: bool) -> Row:
    """A compiled bf16 step of two ResNet-34 against as many operations in a matrix product."""
    name, batch, side = ("resnet10_cifar", 8, 256) if quick else ("resnet34_cifar", 128, 8192)
    nets = nn.ModuleList(timm.create_model(name, num_classes=100) for _ in range(2))
    nets = nets.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(nets.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    y = torch.randint(100, (batch,), device=DEVICE)
    smkd = SMKD(MyLC(window=50_000)).to(DEVICE)
    smkd.set_progress(0.5)

    def loss() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            zs = tuple(net(x) for net in nets)
        return smkd(zs, y)

    def step(run: Callable[[], torch.Tensor]) -> None:
        optimizer.zero_grad()
        run().backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step(loss)
    compiled, square = (
        torch.compile(loss),
        torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16),
    )
    product = counter.get_total_flops() / (2 * side**3)  # as many operations, in products
    return (
        ratio(lambda: step(compiled), lambda: square @ square) / product,
        "x its compute limit",
        None,
    )


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


def peak_memory(batch: int, classes: int, dtype: torch.dtype) -> Row:
    """SMKD + MyLC against two cross-entropies in float32, in which the loss computes too."""
    y = torch.randint(classes, (batch,), device=DEVICE)
    smkd, plain = SMKD(MyLC(window=50_000)).to(DEVICE), nn.CrossEntropyLoss()
    smkd.set_progress(0.5)

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
    return peak(lambda zs: smkd(tuple(zs), y)) / theirs, "x two cross-entropies", 2


def table(quick: bool) -> dict[str, Callable[[], Row]]:
    shapes = [(128, 100), (128, 1000), (256, 21_841)]
    rows: dict[str, Callable[[], Row]] = {
        "import kd_plugins": import_time,
        "noisy view, 2.4 million rows": lambda: noisy_view_of_millions(memory=False),
        "noisy view, 2.4 million rows, memory": lambda: noisy_view_of_millions(memory=True),
    }
    ways = {
        "eager": (False, False),
        "compiled": (True, False),
        "compiled as they are": (True, True),
    }
    for way, which in ways.items():
        for b, c in shapes:
            rows[f"loss alone [{b}, {c}], {way}"] = lambda b=b, c=c, which=which: loss_alone(
                b, c, *which
            )
    for dtype in (torch.float32, torch.bfloat16):
        key = f"peak memory of the loss [256, 21841], {str(dtype).removeprefix('torch.')}"
        rows[key] = lambda dtype=dtype: peak_memory(256, 21_841, dtype)
    rows |= {
        "step of two ResNet-18 at 32 px, SMKD + MyLC": lambda: step_of_a_pair(
            "resnet18_cifar", 32, 128, quick
        ),
        "AEKD step, five teachers, against AVER": lambda: step_with_teachers(AEKD(), AVER(), 5),
        "CA-MKD step, three teachers, against KD": lambda: step_with_teachers(CAMKD(), KD(), 3),
        "LR + DS step, one teacher, against KD": lambda: step_with_teachers(
            CE() + MaskedLoss(torch.arange(64) % 5 > 0, LabelRevision(KD())), CE() + KD(), 1
        ),
        "losses compiled whole, over a schedule": graphs_of_a_schedule,
        "epoch in the Trainer": lambda: epoch_in_the_trainer(quick),
        "data from parquet": lambda: data_rate("parquet", quick),
        "data from folders": lambda: data_rate("folders", quick),
        "data from parquet, handed out as floats": lambda: data_rate("parquet", quick, floats=True),
    }
    if GPU:
        rows |= {
            "step of two ResNet-50 at 224 px, SMKD + MyLC, GPU": lambda: step_of_a_pair(
                "resnet50", 224, 32, quick
            ),
            "host synchronisations, GPU": no_synchronisation,
            "two ResNet-18 at 32 px, eager, GPU": lambda: two_peers_on_one("eager", quick),
            "two ResNet-18 at 32 px, compiled, GPU": lambda: two_peers_on_one("compiled", quick),
            "two ResNet-18 at 32 px, two streams, GPU": lambda: two_peers_on_one("streams", quick),
            "step of two ResNet-34 at 32 px, GPU": lambda: compute_limit(quick),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="names, or parts of them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", default="runs/benchmark.json")
    args = parser.parse_args()
    rows = table(args.quick)
    if unknown := [part for part in args.rows if not any(part in name for name in rows)]:
        raise SystemExit(
            f"--rows {unknown}: expected parts of the names of rows, here {'; '.join(rows)}"
        )
    torch.manual_seed(0)
    device = (
        torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    threads = torch.get_num_threads()
    names = ("torch", "timm", "transformers", "datasets", "kd-plugins")
    results = {"device": device, "threads": threads, "quick": args.quick}
    results |= {"versions": {n: version(n) for n in names}, "rows": {}}
    print(
        f"{device}, {threads} threads\n\n| what | measured | to reach |\n|---|---|---|", flush=True
    )
    for name, measure in rows.items():
        if not any(part in name for part in args.rows):
            continue
        figure, unit, goal = measure()
        results["rows"][name] = {"figure": figure, "unit": unit, "goal": goal}
        print(
            f"| {name} | {figure:.3g} {unit} | {'' if goal is None else f'{goal:g}'} |", flush=True
        )
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
