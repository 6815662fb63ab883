"""Rerun the papers' tables with one command: a matrix of method x setting x seed, one recipe run a cell.

    python recipes/tables.py --table smkd-1 --data uoft-cs/cifar100 --label fine_label --bf16 --jobs 4
    python recipes/tables.py --table smkd-1 --data FOLDER --budget small --jobs 2

Each cell is a run of `cifar100_noise.py` or `distill_teachers.py` in a folder of its own, `OUTPUT_DIR/TABLE/BUDGET/...`, with its
log. Give the same command again and what is done is not done again, what was killed goes on from its checkpoint, and what failed is
tried once more. `--jobs` cells run at once, dealt out over the GPUs there are; a cell that fails beside others, for want of memory
say, is tried once more by itself at the end. Options that are not listed here go to every cell (`--bf16`, `--num_train_epochs 3`).

`--budget` says how much of the papers' setting is run: `full` is theirs; `small` takes narrow networks, few epochs, part of the
classes and other options (see BUDGETS), so that a table runs on two cores in minutes to an hour. No figure of it is comparable with
the papers', and every output says so.

Written: `results.parquet`, one row per cell, seed and metric; and from it `table.md`, `table.tex`, `table.png` (mean, deviation,
the paper's figure and the difference) and the training curves of the first seed, `curves-*.png`.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from kd_plugins import report

HERE = Path(__file__).resolve().parent
Options = dict[str, Any]  # of a recipe: a list is several values, a dict is NAME=VALUE pairs


@dataclass(frozen=True)
class Table:
    """Rows and columns are options of the recipe; a cell runs `base`, its column, its row and its budget together."""

    title: str
    rows: dict[str, Options]
    columns: dict[str, Options]
    base: Options
    recipe: str = "cifar100_noise.py"
    paper: dict[tuple[str, str], float] = field(default_factory=dict)  # per cent; what could be read of it
    note: str = ""
    metric: str = "eval_accuracy"  # mean over the networks
    only: dict[str, list[str]] = field(default_factory=dict)  # rows that have some columns only


LABELS: dict[str, Options] = {
    "label smoothing": {"refine": "label_smoothing"},
    "confidence penalty": {"refine": "confidence_penalty"},
    "ProSelfLC": {"refine": "proselflc"},
    "MyLC": {"refine": "mylc"},
}
KNOWLEDGE: dict[str, Options] = {
    "zero": {"loss_args": {"eta": "inf", "b2": 0}},
    "all": {"loss_args": {"eta": 0.5, "b2": 0}},
    "SMKD-S": {"loss_args": {"eta": 2, "b2": 0}},
    "SMKD-P": {"loss_args": {"eta": 2, "b2": -6}},
}
PAIR = ["resnet34_cifar", "resnet34_cifar"]
SMKD: Options = {"method": "smkd", "models": PAIR, "noise": "symmetric", "rate": 0.4, "num_train_epochs": 100}
NOISE: dict[str, Options] = {
    "symmetric 20%": {"noise": "symmetric", "rate": 0.2},
    "symmetric 40%": {"noise": "symmetric", "rate": 0.4},
    "pair flip 20%": {"noise": "pair_flip", "rate": 0.2},
    "pair flip 40%": {"noise": "pair_flip", "rate": 0.4},
}


def methods(pairs: dict[str, str], **options: Any) -> dict[str, Options]:
    return {label: {"method": method, **options} for label, method in pairs.items()}


OTHERS: dict[str, Options] = {
    **methods({"cross-entropy": "ce", "label smoothing": "label_smoothing", "confidence penalty": "confidence_penalty",
               "Boot-soft": "boot_soft", "ProSelfLC": "proselflc", "GCE": "gce", "SCE": "sce", "NCE + RCE": "apl", "MKD": "mkd",
               "DML": "dml", "KDCL": "kdcl", "Co-teaching": "co_teaching", "Co-teaching+": "co_teaching_plus", "S2E": "s2e",
               "FFL": "ffl", "PCL": "pcl", "AFD": "afd", "MentorNet": "mentornet"}),
    # of several stages, or on one network
    **methods({"Joint": "joint", "Tf-KD reg": "tf_kd_reg", "Tf-KD self": "tf_kd_self", "Forward": "forward_correction",
               "Backward": "backward_correction", "T-revision": "t_revision", "L_DMI": "dmi", "CDR": "cdr"}, models=PAIR[:1]),
    "Dual-T": {"method": "forward_correction", "estimator": "dual_t", "models": PAIR[:1]},
}  # fmt: skip
OURS = {
    f"{knowledge} + {label}": KNOWLEDGE[knowledge] | LABELS[label]
    for knowledge in ("SMKD-S", "SMKD-P")
    for label in ("ProSelfLC", "MyLC")
}
TEACHING: dict[str, Options] = {"train_teachers": True, "student": "resnet10_cifar"}
SEVERAL: dict[str, Options] = {
    "student alone": {"terms": "ce"},
    "AVER": {"preset": "aver"},
    "FitNet-MKD": {"terms": "ce + aver + 100*fitnet", "preset": "aver"},
    "EBKD": {"preset": "ebkd"},
    "AEKD": {"preset": "aekd"},
    "CA-MKD on logits": {"preset": "camkd_logits"},
    "CA-MKD": {"preset": "camkd"},
}
NO_FIGURES = "The paper's figures could not be read, and its CIFAR networks are not timm's: ours stand in."

TABLES = {
    "smkd-1": Table(
        "SMKD, Table I: label modification x knowledge, CIFAR-100, symmetric noise 40%",
        rows={"cross-entropy": {"refine": "ce"}, **LABELS},
        columns=KNOWLEDGE,
        base=SMKD,
        only={"cross-entropy": ["zero"]},
        paper={("cross-entropy", "zero"): 47.20, ("MyLC", "zero"): 65.04, ("MyLC", "SMKD-P"): 69.09,
               ("ProSelfLC", "SMKD-S"): 67.26, ("ProSelfLC", "all"): 59.26},
        note="The paper searches eta in {1, 2, 3, 4} per noise rate; here it is 2. ProSelfLC's figures are those of its Table V.",
    ),
    "smkd-2": Table(
        "SMKD, Table II: comparison on CIFAR-100",
        rows=OTHERS | OURS,
        columns=NOISE,
        base=SMKD,
        paper={("cross-entropy", "symmetric 40%"): 47.20, ("SMKD-S + ProSelfLC", "symmetric 20%"): 72.11,
               ("SMKD-S + ProSelfLC", "symmetric 40%"): 67.26, ("SMKD-P + MyLC", "symmetric 40%"): 69.09},
        note="Which other rates the paper has could not be read. Methods of several stages train one network.",
    ),
    "smkd-4": Table(
        "SMKD, Table IV: two architectures, CIFAR-100, symmetric noise 40%",
        rows={"cross-entropy": {"method": "ce"}, "SMKD-P + MyLC": {"refine": "mylc"}},
        columns={"network a": {}},
        base=SMKD | {"models": ["resnet18_cifar", "mobilenetv2_100"], "num_train_epochs": 200},
        metric="eval_accuracy_a",
        paper={("cross-entropy", "network a"): 55.94, ("SMKD-P + MyLC", "network a"): 68.10},
        note="The paper's second network, ShuffleNetV2 (61.21 and 64.37), is not in timm: MobileNetV2 stands in, figures of the "
             "first, ResNet-18, are shown; results.parquet has both.",
    ),
    "smkd-5": Table(
        "SMKD, Table V and Figure 4: the threshold, SMKD-S + ProSelfLC on CIFAR-100",
        rows={f"eta = {eta}": {"loss_args": {"eta": eta, "b2": 0}} for eta in (1, 2, 3, 4)},
        columns={name: NOISE[name] for name in ("symmetric 20%", "symmetric 40%")},
        base=SMKD | {"refine": "proselflc"},
        paper={("eta = 2", "symmetric 20%"): 72.11, ("eta = 4", "symmetric 20%"): 73.25, ("eta = 1", "symmetric 40%"): 59.26,
               ("eta = 2", "symmetric 40%"): 65.04, ("eta = 4", "symmetric 40%"): 67.26},
        note="One of the paper's cells may be a copy error: eta = 2 at 40% is also its MyLC with zero knowledge.",
    ),
    "smkd-figures": Table(
        "SMKD, Figures 2 and 3: curves over the training at eta = 2 (curves-*.png)",
        rows={label: LABELS[label] for label in ("ProSelfLC", "MyLC")},
        columns=KNOWLEDGE,
        base=SMKD,
    ),
    "camkd-1": Table(
        "CA-MKD, Table 1: three teachers of one architecture, methods for several teachers",
        rows=SEVERAL,
        columns={"top-1": {}},
        base=TEACHING | {"teachers": ["resnet34_cifar"] * 3},
        recipe="distill_teachers.py",
        note=NO_FIGURES,
    ),
    "camkd-2": Table(
        "CA-MKD, Table 2: methods for one teacher beside it",
        rows={"student alone": {"terms": "ce"}}
        | {name: {"preset": key} for name, key in {"KD": "kd", "FitNet": "fitnet", "AT": "at", "VID": "vid", "CRD": "crd"}.items()}
        | {"CA-MKD, three teachers": {"preset": "camkd"}},
        columns={"top-1": {}},
        base=TEACHING | {"teachers": ["resnet34_cifar"] * 3},
        recipe="distill_teachers.py",
        note=NO_FIGURES + " Rows of one method have the first teacher.",
    ),
    "camkd-3": Table(
        "CA-MKD, Table 3: teachers of different architecture and quality",
        rows=SEVERAL,
        columns={"top-1": {}},
        base=TEACHING | {"teachers": ["resnet34_cifar", "resnet18_cifar", "mobilenetv2_100"]},
        recipe="distill_teachers.py",
        note=NO_FIGURES,
    ),
    "lr-ds": Table(
        "Label Revision + Data Selection: one teacher",
        rows={
            "student alone": {"terms": "ce"},
            "KD": {"terms": "ce + kd", "preset": "kd"},
            "KD + Label Revision": {"preset": "lr"},
            "KD + Data Selection": {"terms": "ce + kd", "keep": 0.8, "preset": "kd"},
            "KD + Label Revision + Data Selection": {"preset": "lr_ds"},
        },
        columns={"top-1": {}},
        base=TEACHING | {"teachers": ["resnet34_cifar"]},
        recipe="distill_teachers.py",
        note=NO_FIGURES,
    ),
}  # fmt: skip

# What `small` changes. The schedule and SMKD's normalize="batch" were chosen on held-out noisy labels: see recipes/README.md.
NARROW = {
    "resnet34_cifar": "resnet10_cifar",
    "resnet18_cifar": "resnet10_cifar",
    "mobilenetv2_100": "mobilenetv3_small_050",
}
SCHEDULE: Options = {"per_device_train_batch_size": 64, "optim": "adamw_torch", "optim_args": "eps=1e-8", "learning_rate": 0.002,
                     "weight_decay": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "bf16": True}  # fmt: skip
BUDGETS: dict[str, dict[str, Options]] = {
    "full": {"cifar100_noise.py": {}, "distill_teachers.py": {}},
    "small": {
        "cifar100_noise.py": SCHEDULE
        | {"label": "coarse_label", "classes": 10, "augment": False, "num_train_epochs": 12},
        "distill_teachers.py": SCHEDULE | {"num_train_epochs": 5, "teacher_epochs": 10},
    },
}


@dataclass
class Settings:
    table: str = field(metadata={"help": f"one of {', '.join(TABLES)}"})
    data: str = field(default="uoft-cs/cifar100", metadata={"help": "hub id or folder"})
    label: str = field(default="label", metadata={"help": "column of the labels"})
    budget: str = field(default="full", metadata={"help": f"one of {', '.join(BUDGETS)}"})
    seeds: int = field(default=3, metadata={"help": "runs of each cell: seeds 0, 1, ..."})
    jobs: int = field(default=1, metadata={"help": "cells at once"})
    rows: list[str] = field(default_factory=list, metadata={"help": "these rows only"})
    columns: list[str] = field(default_factory=list, metadata={"help": "these columns only"})
    first: list[str] = field(default_factory=list, metadata={"help": "cells to run before the others: 'ROW:COLUMN'"})
    output_dir: str = "runs/tables"


@dataclass(frozen=True)
class Cell:
    row: str
    column: str
    seed: int
    folder: Path
    command: list[str]

    @property
    def done(self) -> Path:
        return self.folder / "results.json"


def merged(*parts: Options) -> Options:
    """Later options win; pairs are joined."""
    out: Options = {}
    for part in parts:
        for key, value in part.items():
            out[key] = {**out.get(key, {}), **value} if isinstance(value, dict) else value
    return out


def arguments(options: Options) -> list[str]:
    out = []
    for key, value in options.items():
        values = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
        if values != []:
            out += [f"--{key}", *map(str, values if isinstance(values, list) else [values])]
    return out


def slug(text: str) -> str:
    """A name for a folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower().replace("+", " plus ")).split())


def make_cells(s: Settings, rest: list[str]) -> tuple[list[Cell], Path]:
    """The cells in the order in which they run; teachers that cells share stand before them, with an empty row."""
    table = chosen(TABLES, "table", s.table)
    budget = chosen(BUDGETS, "budget", s.budget)[table.recipe]
    rows, columns = s.rows or list(table.rows), s.columns or list(table.columns)
    for name, asked, there in (("rows", rows, table.rows), ("columns", columns, table.columns)):
        if unknown := [value for value in asked if value not in there]:
            raise SystemExit(f"--{name} {unknown}: {s.table} has {list(there)}")
    root = Path(s.output_dir, s.table, s.budget)

    def command(folder: Path, seed: int, *parts: Options) -> list[str]:
        options = merged({"data": s.data, "label": s.label}, table.base, *parts)
        if s.budget != "full":
            for key in {"models", "teachers"} & {*options}:
                options[key] = [NARROW.get(name, name) for name in options[key]]
            if options.get("method") == "smkd":
                options = merged(options, {"loss_args": {"normalize": "batch"}})
        options |= {"output_dir": folder, "seed": seed}
        return [sys.executable, str(HERE / table.recipe), *arguments(options), *rest]

    cells, shared = [], {}
    if names := table.base.get("teachers"):
        folder = root / "teachers"
        cells.append(Cell("", "", 0, folder, command(folder, 0, budget, {"terms": "ce"})))
        trained = [str(folder / "teachers" / str(k) / "peer_a") for k in range(len(names))]
        shared = {"train_teachers": False, "teachers": trained}
    grid = [(row, column) for row in rows for column in columns if column in table.only.get(row, columns)]
    urgent = [tuple(cell.split(":", 1)) for cell in s.first]
    if unknown := [":".join(cell) for cell in urgent if cell not in grid]:
        raise SystemExit(f"--first {unknown}: expected ROW:COLUMN of this table, such as {':'.join(grid[0])!r}")
    grid.sort(key=lambda cell: urgent.index(cell) if cell in urgent else len(urgent))
    for seed in range(s.seeds):
        for row, column in grid:
            folder = root / f"{slug(row)}--{slug(column)}" / str(seed)
            own = merged(table.columns[column], table.rows[row])
            lesson = dict(shared)
            if own.get("terms") == "ce":
                lesson["teachers"] = []
            elif s.table == "camkd-2" and "CA-MKD" not in row:
                lesson["teachers"] = trained[:1]
            cells.append(Cell(row, column, seed, folder, command(folder, seed, own, budget, lesson)))
    return cells, root


def chosen(there: dict[str, Any], name: str, value: str) -> Any:
    if value not in there:
        raise SystemExit(f"--{name} {value}: expected one of {', '.join(there)}")
    return there[value]


def run(cells: list[Cell], jobs: int) -> dict[str, str]:
    """Run what is not done yet, several at once; the names of what failed with the last line of their log."""
    import torch

    devices, waiting, failed, running = torch.cuda.device_count(), queue.Queue(), [], []
    todo = [cell for cell in cells if not cell.done.exists()]
    bar = tqdm(total=len(cells), initial=len(cells) - len(todo), desc="cells", unit="cell", smoothing=0)

    def one(cell: Cell, worker: int, threads: int) -> bool:
        cell.folder.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = str(worker % devices)
        started = time.time()
        with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*cell.command, "--disable_tqdm", "True"], stdout=log, stderr=subprocess.STDOUT, env=env
            )
            running.append(process)
            ok = process.wait() == 0
        if ok:
            name = torch.cuda.get_device_name(worker % devices) if devices else f"{os.cpu_count()} CPU cores"
            clock = {"seconds": round(time.time() - started), "jobs": jobs, "device": name, "command": cell.command[1:]}
            (cell.folder / "clock.json").write_text(json.dumps(clock, indent=1))
            bar.update()
            bar.set_postfix_str(f"{cell.row} {cell.column} {cell.seed}" if cell.row else "teachers")
        return ok

    def work(worker: int) -> None:
        while True:
            try:
                cell = waiting.get_nowait()
            except queue.Empty:
                return
            if not one(cell, worker, max(1, (os.cpu_count() or 1) // jobs)):
                failed.append(cell)

    teachers, others = [c for c in todo if not c.row], [c for c in todo if c.row]
    try:
        for cell in teachers:  # the others need them
            if not one(cell, 0, os.cpu_count() or 1):
                bar.close()
                return {str(cell.folder): last_line(cell)}
        for cell in others:
            waiting.put(cell)
        workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(jobs)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        again = list(failed) if jobs > 1 else []
        for cell in again:  # by itself: it may have wanted memory that others held
            if one(cell, 0, os.cpu_count() or 1):
                failed.remove(cell)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        bar.close()
    return {str(cell.folder): last_line(cell) for cell in failed}


def last_line(cell: Cell) -> str:
    lines = (cell.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no output"


def tidy(s: Settings, cells: list[Cell], table: Table) -> pd.DataFrame:
    """One row for each figure of each finished cell."""
    rows = []
    for cell in cells:
        if not cell.row or not cell.done.exists():
            continue
        clock = json.loads((cell.folder / "clock.json").read_text()) if (cell.folder / "clock.json").exists() else {}
        for metric, value in json.loads(cell.done.read_text()).items():
            if (
                metric.startswith(("eval_", "train_"))
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                paper = table.paper.get((cell.row, cell.column)) if metric == table.metric else None
                rows.append({"table": s.table, "budget": s.budget, "row": cell.row, "column": cell.column, "seed": cell.seed,
                             "metric": metric, "value": float(value), "paper": None if paper is None else paper / 100,
                             **{key: clock.get(key) for key in ("seconds", "jobs", "device")},
                             "command": " ".join(clock.get("command", []))})  # fmt: skip
    return pd.DataFrame(rows)


def grid_of(s: Settings, table: Table, figures: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, in per cent; a difference to the paper's figure is shown at full budget only."""
    shown = figures[figures.metric == table.metric]
    columns = [column for column in table.columns if column in set(shown.column)]
    rows = []
    for row in (row for row in table.rows if row in set(shown.row)):
        texts = []
        for column in columns:
            values = shown[(shown.row == row) & (shown.column == column)].value.tolist()
            text = report.mean_std(values) if values else ""
            if values and (paper := table.paper.get((row, column))) is not None:
                gap = f", {100 * sum(values) / len(values) - paper:+.1f}" if s.budget == "full" else ""
                text += f" (paper {paper:.2f}{gap})"
            texts.append(text)
        rows.append([row, *texts])
    return ["", *columns], rows


def latex(header: list[str], rows: list[list[str]], caption: str) -> str:
    def line(cells: list[str]) -> str:
        text = " & ".join(cells)
        for plain, tex in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("×", r"$\times$")):
            text = text.replace(plain, tex)
        return text + r" \\"

    head = [r"\begin{table}", r"\centering", rf"\caption{{{line([caption]).removesuffix(' ' + chr(92) * 2)}}}"]
    body = [
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        line(header),
        r"\midrule",
        *map(line, rows),
    ]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def picture(s: Settings, table: Table, figures: pd.DataFrame, path: Path, caption: str) -> None:
    """Every seed a dot, the mean a bar, the paper's figure a diamond."""
    from matplotlib.figure import Figure

    shown = figures[figures.metric == table.metric]
    rows = [row for row in table.rows if row in set(shown.row)][::-1]
    columns = [column for column in table.columns if column in set(shown.column)]
    fig = Figure(figsize=(8.5, 1.6 + 0.17 * len(rows) * (len(columns) + 1)), dpi=150, layout="constrained")
    ax = fig.add_subplot()
    for k, column in enumerate(columns):
        colour = report.COLOURS[k % len(report.COLOURS)]
        ax.plot([], [], "|", color=colour, markersize=10, markeredgewidth=3, label=column)
        for y, row in enumerate(rows):
            at = y + (len(columns) - 1 - 2 * k) / (2 * len(columns) + 1)
            values = 100 * shown[(shown.row == row) & (shown.column == column)].value
            if len(values):
                ax.plot(values, [at] * len(values), ".", color=colour, alpha=0.5)
                ax.plot(values.mean(), at, "|", color=colour, markersize=10, markeredgewidth=3)
            if (row, column) in table.paper and s.budget == "full":
                ax.plot(table.paper[row, column], at, "D", color=colour, markerfacecolor="none", markersize=5)
    if table.paper and s.budget == "full":
        ax.plot([], [], "D", color=report.GREY, markerfacecolor="none", markersize=5, label="the paper")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel(f"{'mean over networks, ' if table.metric == 'eval_accuracy' else ''}top-1 test accuracy [%]")
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(caption, loc="left", fontsize=9, wrap=True)
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    fig.savefig(path)


def publish(s: Settings, cells: list[Cell], root: Path, rest: list[str]) -> None:
    table = TABLES[s.table]
    figures = tidy(s, cells, table)
    if figures.empty:
        return
    part = root / "results.parquet.part"
    figures.to_parquet(part, index=False)
    part.replace(root / "results.parquet")
    seeds = sorted({int(seed) for seed in figures.seed})
    caption = (
        f"{table.title}. Budget {s.budget}{': ' + ' '.join(rest) if rest else ''}; seeds {', '.join(map(str, seeds))}; last epoch, "
        f"per cent, mean ± deviation.{' Not comparable with the paper.' if s.budget != 'full' else ''}"
    )
    header, rows = grid_of(s, table, figures)
    text = f"{caption}\n\n{report.markdown(header, rows)}\n" + (f"\n{table.note}\n" if table.note else "")
    (root / "table.md").write_text(text, encoding="utf-8")
    (root / "table.tex").write_text(latex(header, rows, caption), encoding="utf-8")
    picture(s, table, figures, root / "table.png", caption)
    drawn = []
    for row in table.rows:
        runs = {
            c.column: c.folder
            for c in cells
            if c.row == row and c.seed == 0 and (c.folder / "trainer_state.json").exists()
        }
        if len(runs) > 1:
            drawn.append(report.curves(runs, root / f"curves-{slug(row)}.png"))
    print(f"\n{text}")
    print("Written:", *(root / f"results.{e}" for e in ("parquet",)), *(root / f"table.{e}" for e in ("md", "tex", "png")), *drawn,
          sep="\n  ")  # fmt: skip


def main() -> int:
    s, rest = HfArgumentParser(Settings).parse_args_into_dataclasses(return_remaining_strings=True)
    if s.seeds < 1 or s.jobs < 1:
        raise SystemExit(f"--seeds {s.seeds} --jobs {s.jobs}: expected at least 1 of each")
    cells, root = make_cells(s, rest)
    failed = run(cells, s.jobs)
    publish(s, cells, root, rest)
    for folder, why in failed.items():
        print(f"failed: {folder}: {why} (whole log: log.txt there)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
