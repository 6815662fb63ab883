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
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from costs_of_data import data_rate, import_time, noisy_view_of_millions
from costs_of_losses import (
    graphs_of_a_schedule,
    loss_alone,
    no_synchronisation,
    peak_memory,
    step_with_teachers,
)
from costs_of_training import compute_limit, epoch_in_the_trainer, step_of_a_pair, two_peers_on_one
from measuring import GPU, Row

from kd_plugins import AEKD, AVER, CAMKD, CE, KD, LabelRevision, MaskedLoss
from kd_plugins.train import run_main

Rows = dict[str, Callable[[], Row]]
SHAPES = [(128, 100), (128, 1000), (256, 21_841)]
WAYS = {  # whether ours and theirs are compiled
    "eager": (False, False),
    "compiled": (True, False),
    "compiled as they are": (True, True),
}


def rows_of_losses(quick: bool) -> Rows:
    rows: Rows = {}
    for way, which in WAYS.items():
        for b, c in SHAPES:
            name = f"loss alone [{b}, {c}], {way}"
            rows[name] = lambda b=b, c=c, which=which: loss_alone(b, c, quick, *which)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"peak memory of the loss [256, 21841], {str(dtype).removeprefix('torch.')}"
        rows[name] = lambda dtype=dtype: peak_memory(256, 21_841, dtype)
    revised = CE() + MaskedLoss(torch.arange(64) % 5 > 0, LabelRevision(KD()))
    beside = {
        "AEKD step, five teachers, against AVER": (AEKD(), AVER(), 5),
        "CA-MKD step, three teachers, against KD": (CAMKD(), KD(), 3),
        "LR + DS step, one teacher, against KD": (revised, CE() + KD(), 1),
    }
    for name, sides in beside.items():
        rows[name] = lambda sides=sides: step_with_teachers(*sides, quick)
    return rows | {"losses compiled whole, over a schedule": graphs_of_a_schedule}


def rows_of_training(quick: bool) -> Rows:
    pair = "resnet18_cifar", 32, 128, quick
    return {
        "step of two ResNet-18 at 32 px, SMKD + MyLC": lambda: step_of_a_pair(*pair),
        "epoch in the Trainer": lambda: epoch_in_the_trainer(quick),
    }


def rows_of_data(quick: bool) -> Rows:
    return {
        "import kd_plugins": import_time,
        "noisy view, 2.4 million rows": lambda: noisy_view_of_millions(memory=False),
        "noisy view, 2.4 million rows, memory": lambda: noisy_view_of_millions(memory=True),
        "data from parquet": lambda: data_rate("parquet", quick),
        "data from folders": lambda: data_rate("folders", quick),
        "data from parquet, handed out as floats": lambda: data_rate("parquet", quick, floats=True),
    }


def rows_of_a_gpu(quick: bool) -> Rows:
    pair = "resnet50", 224, 32, quick
    return {
        "step of two ResNet-50 at 224 px, SMKD + MyLC, GPU": lambda: step_of_a_pair(*pair),
        "host synchronisations, GPU": no_synchronisation,
        "two ResNet-18 at 32 px, eager, GPU": lambda: two_peers_on_one("eager", quick),
        "two ResNet-18 at 32 px, compiled, GPU": lambda: two_peers_on_one("compiled", quick),
        "two ResNet-18 at 32 px, two streams, GPU": lambda: two_peers_on_one("streams", quick),
        "step of two ResNet-34 at 32 px, GPU": lambda: compute_limit(quick),
    }


def machine() -> str:
    if GPU:
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[""], help="names, or parts of them")
    parser.add_argument("--quick", action="store_true", help="smaller data, fewer repeats")
    parser.add_argument("--output", default="runs/benchmark.json")
    args = parser.parse_args()
    rows = rows_of_data(args.quick) | rows_of_losses(args.quick) | rows_of_training(args.quick)
    rows |= rows_of_a_gpu(args.quick) if GPU else {}
    if unknown := [part for part in args.rows if not any(part in name for name in rows)]:
        raise SystemExit(
            f"--rows {unknown}: expected parts of the names of rows, here {'; '.join(rows)}"
        )
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    names = ("torch", "timm", "transformers", "datasets", "kd-plugins")
    results = {"device": machine(), "threads": threads, "quick": args.quick}
    results |= {"versions": {n: version(n) for n in names}, "rows": {}}
    header = "| what | measured | to reach |\n|---|---|---|"
    print(f"{machine()}, {threads} threads\n\n{header}", flush=True)
    for name in [name for name in rows if any(part in name for part in args.rows)]:
        figure, unit, goal = rows[name]()
        results["rows"][name] = {"figure": figure, "unit": unit, "goal": goal}
        print(
            f"| {name} | {figure:.3g} {unit} | {'' if goal is None else f'{goal:g}'} |", flush=True
        )
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
