"""Rerun the papers' tables with one command: a matrix of methods, settings and seeds.

    python recipes/experiments/tables.py --table smkd-1 --data uoft-cs/cifar100 \\
        --label fine_label --bf16 --jobs 4
    python recipes/experiments/tables.py --table smkd-1 --data FOLDER --budget small --jobs 2

Each cell runs `cifar100_noise.py` or `distill_teachers.py` in its own folder,
`OUTPUT_DIR/TABLE/BUDGET/...`, with a log. Give the same command again: finished cells are not run
again, killed ones continue from their checkpoint, and failed ones are tried once more. `--jobs`
cells run at once, spread over the GPUs. A cell that fails beside others (out of memory, say) is
tried once more alone at the end. Options that are not listed here go to every cell (`--bf16`).
Figures made with other options are not published together: they need another `--output_dir`.

`--budget full` is the papers' setting. `small` takes narrow networks, few epochs and part of the
classes, so that a table takes minutes to an hour on two cores. Its figures are not comparable with
the papers', and every output says so. tables_of_papers.py and
tables_of_distillation.py have the content of tables and budgets.

Output: `results.parquet` with one row per cell, seed and metric; `table.md`, `table.tex` and
`table.png` (mean, deviation, the paper's figure and the difference); the training curves of the
first seed, `curves-*.png`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from table import Options, Table
from tables_of_distillation import TEACHER
from tables_of_papers import BUDGETS, NARROW, TABLES
from tables_report import publish, slug
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from kd_plugins.train import MutualTrainingArguments, run_main

RECIPES = Path(__file__).resolve().parents[1]
# options that reach the teachers too; how long they train is --teacher_epochs
SHARED = {f.name for f in fields(MutualTrainingArguments)} - {"num_train_epochs"}
SHARED |= {"image", "augment", "holdout"}


@dataclass
class Settings:
    table: str = HfArg(help=f"one of {', '.join(TABLES)}")
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    label: str | None = HfArg(
        default=None, help="column; at budget small coarse_label, if not given"
    )
    budget: str = HfArg(default="full", help=f"one of {', '.join(BUDGETS)}")
    seeds: int = HfArg(default=3, help="runs of each cell: seeds 0, 1, ...")
    jobs: int = HfArg(default=1, help="cells at once")
    rows: list[str] = HfArg(default_factory=list, help="these rows only")
    columns: list[str] = HfArg(default_factory=list, help="these columns only")
    first: list[str] = HfArg(default_factory=list, help="cells to run first: 'ROW:COLUMN'")
    teacher_epochs: float = HfArg(default=0.0, help="of the teachers; 0: those of the budget")
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
        if values not in (None, []):
            out += [f"--{key}", *map(str, values if isinstance(values, list) else [values])]
    return out


def options_of(command: list[str]) -> dict[str, list[str]]:
    """The options of a command line with their values; the last of a name wins."""
    words = [
        part
        for word in command
        for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    at = [k for k, word in enumerate(words) if word.startswith("--")]
    return {
        words[a][2:].replace("-", "_"): words[a + 1 : b] for a, b in pairwise([*at, len(words)])
    }


def chosen(there: dict[str, Any], name: str, value: str) -> Any:
    if value not in there:
        raise SystemExit(f"--{name} {value}: expected one of {', '.join(there)}")
    return there[value]


def choose_cells(s: Settings, table: Table) -> list[tuple[str, str]]:
    """(row, column) of the cells to run, the urgent ones first."""
    rows, columns = s.rows or list(table.rows), s.columns or list(table.columns)
    for name, chosen, there in (("rows", rows, table.rows), ("columns", columns, table.columns)):
        if unknown := [value for value in chosen if value not in there]:
            raise SystemExit(f"--{name} {unknown}: {s.table} has {list(there)}")
    grid = [(row, column) for row in rows for column in columns]
    grid = [(row, column) for row, column in grid if column in table.only.get(row, columns)]
    urgent = [tuple(cell.split(":", 1)) for cell in s.first]
    if unknown := [":".join(cell) for cell in urgent if cell not in grid]:
        example = ":".join(grid[0])
        raise SystemExit(f"--first {unknown}: expected ROW:COLUMN of this table, as {example!r}")
    return sorted(grid, key=lambda cell: urgent.index(cell) if cell in urgent else len(urgent))


def options_for_all(s: Settings, table: Table, rest: list[str]) -> dict[str, list[str]]:
    """The options that are passed on to every cell; refused if a cell has its own."""
    parts = (*table.rows.values(), *table.columns.values(), *table.cells.values())
    own = {key for part in parts for key in part}
    own |= {"seed", "teachers"}
    given = options_of(rest)
    for key, values in given.items():
        if any(name.startswith(key) for name in own):  # argparse also takes the start of a name
            raise SystemExit(
                f"--{key} {' '.join(values)}: each cell of {s.table} has its own, and this would "
                "replace all of them; expected --rows and --columns to choose cells, --seeds N for "
                "the seeds 0 to N - 1"
            )
    if rest and not rest[0].startswith("--"):
        raise SystemExit(f"{rest[0]}: expected --OPTION VALUE; it would be dropped")
    return given


def make_cells(s: Settings, rest: list[str]) -> tuple[list[Cell], Path]:
    """The cells in the order in which they run, and the folder of the table.

    Each teacher that the cells share is a cell of its own, with an empty row, and comes first.
    """
    table = chosen(TABLES, "table", s.table)
    budget = chosen(BUDGETS, "budget", s.budget)
    grid, given = choose_cells(s, table), options_for_all(s, table, rest)
    root = Path(s.output_dir, s.table, s.budget)

    def make(row: str, column: str, folder: Path, recipe: str, options: Options) -> Cell:
        options = {"data": s.data} | options
        if s.budget != "full":
            for key in {"models", "teachers"} & {*options}:
                options[key] = [NARROW.get(name, name) for name in options[key]]
        if options.get("method") == "smkd":
            normalize = "selected" if s.budget == "full" else "batch"  # the paper's, the default
            options = merged(options, {"loss_args": {"normalize": normalize}})
        options |= {"output_dir": folder, "label": s.label or options.get("label")}
        command = [sys.executable, str(RECIPES / recipe), *arguments(options)]
        for key, values in given.items():
            if row or any(name.startswith(key) for name in SHARED):
                command += [f"--{key}", *values]
        return Cell(row, column, options["seed"], folder, command)

    cells, trained = [], []
    own = merged(TEACHER, budget["teachers"])
    if s.teacher_epochs:
        own["num_train_epochs"] = s.teacher_epochs
    for k, name in enumerate(table.base.get("teachers", [])):
        folder = root / "teachers" / str(k)
        options = own | {"models": [name], "seed": k}
        cells.append(make("", "", folder, "cifar100_noise.py", options))
        trained.append(str(folder / "peer_a"))
    for seed in range(s.seeds):
        for row, column in grid:
            single = table.cells.get((row, column), {})
            own = merged(table.columns[column], table.rows[row], single)
            if trained:
                own["teachers"] = [trained[k] for k in own.get("teachers", range(len(trained)))]
            own = merged(table.base, own, budget[table.recipe], {"seed": seed})
            folder = root / f"{slug(row)}--{slug(column)}" / str(seed)
            cells.append(make(row, column, folder, table.recipe, own))
    return cells, root


def refuse_others(cells: list[Cell]) -> None:
    """A finished cell must have run with this command, if its command is on record."""
    for cell in cells:
        clock = cell.folder / "clock.json"
        record = json.loads(clock.read_text()) if cell.done.exists() and clock.exists() else {}
        saved, current = options_of(record.get("command", cell.command)), options_of(cell.command)
        names = sorted({*saved, *current} - {"output_dir"})
        if other := [name for name in names if saved.get(name) != current.get(name)]:
            raise SystemExit(
                f"{cell.folder} was run with { {k: saved.get(k) for k in other} }, asked for is "
                f"{ {k: current.get(k) for k in other} }; its figures would be "
                "published as this command's. Choose another --output_dir, or delete it"
            )


class Runner:
    """Runs cells, several at once, each on its share of the GPUs and cores."""

    def __init__(self, cells: list[Cell], jobs: int) -> None:
        import torch

        self.jobs, self.cores = jobs, os.cpu_count() or 1
        self.gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        self.todo = [cell for cell in cells if not cell.done.exists()]
        self.processes: list[subprocess.Popen] = []
        self.slots: SimpleQueue[int] = SimpleQueue()  # a slot is a place on a GPU
        for slot in range(jobs):
            self.slots.put(slot)
        done = len(cells) - len(self.todo)
        self.bar = tqdm(total=len(cells), initial=done, desc="cells", unit="cell", smoothing=0)

    def run_all(self) -> dict[str, str]:
        """Folder and last line of the log of each cell that failed."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            failed = [cell for cell in self.todo if not cell.row and not self.run(cell, self.cores)]
            if not failed:  # the others need the teachers
                others = [cell for cell in self.todo if cell.row]
                ended = zip(others, pool.map(self.run, others), strict=True)
                failed = [cell for cell, ok in ended if not ok]
                if self.jobs > 1:  # once more, alone: others may have held the memory
                    failed = [cell for cell in failed if not self.run(cell)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in self.processes:
                process.terminate()
            self.bar.close()
        return {str(cell.folder): last_line(cell) for cell in failed}

    def run(self, cell: Cell, threads: int | None = None) -> bool:
        """Whether the recipe ended well; then its time and its command are recorded."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        slot, started = self.slots.get(), time.time()
        env = os.environ | {"OMP_NUM_THREADS": str(threads or max(1, self.cores // self.jobs))}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(slot % len(self.gpus))
        try:
            with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
                command = [*cell.command, "--disable_tqdm", "True"]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
                self.processes.append(process)
                ok = process.wait() == 0
        finally:
            self.slots.put(slot)
        if ok:
            clock = {"seconds": round(time.time() - started), "jobs": self.jobs}
            device = self.gpus[slot % len(self.gpus)] if self.gpus else f"{self.cores} CPU cores"
            clock |= {"device": device, "command": cell.command[1:]}
            (cell.folder / "clock.json").write_text(json.dumps(clock, indent=1))
            name = f"{cell.row} {cell.column} {cell.seed}" if cell.row else "teacher"
            self.bar.set_postfix_str(name)
            self.bar.update()
        return ok


def last_line(cell: Cell) -> str:
    lines = (cell.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()
    return lines[-1] if lines else "no output"


def main() -> int:
    s, rest = HfArgumentParser(Settings, allow_abbrev=False).parse_args_into_dataclasses(
        return_remaining_strings=True
    )
    if s.seeds < 1 or s.jobs < 1:
        raise SystemExit(f"--seeds {s.seeds} --jobs {s.jobs}: expected at least 1 of each")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # cells left running would be run again beside themselves
    cells, root = make_cells(s, rest)
    refuse_others(cells)
    failed = Runner(cells, s.jobs).run_all()
    publish(s.table, s.budget, cells, root, rest)
    for folder, why in failed.items():
        print(f"failed: {folder}: {why} (whole log: log.txt there)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(lambda: sys.exit(main()))
