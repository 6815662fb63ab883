"""The matrix of recipes/tables.py: what it runs, that nothing is run twice, and what it makes of the figures."""

import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import HfArgumentParser

from kd_plugins import MutualTrainingArguments, create_loss, list_losses

RECIPES = Path(__file__).parent.parent / "recipes"

# Stands in for a recipe: counts its starts, fails where it is told to, else writes figures that depend on cell and seed.
FAKE = """
import json, os, sys
from pathlib import Path
args = sys.argv[1:]
value = lambda name: args[args.index(name) + 1] if name in args else None
out = Path(value("--output_dir"))
with open(out / "starts", "a") as log:
    log.write(os.environ["OMP_NUM_THREADS"] + "\\n")
starts = len((out / "starts").read_text().split())
if value("--fail") in out.parent.name and starts <= int(value("--times")):
    raise SystemExit("out of memory")
score = {"mylc": 0.6, "ce": 0.4}.get(value("--refine"), 0.5) + 0.01 * int(value("--seed"))
(out / "results.json").write_text(json.dumps({"eval_accuracy": score, "eval_accuracy_a": score, "method": "x", "seed": 0}))
"""


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(RECIPES / "tables.py"))


@pytest.fixture
def start(tables, tmp_path, monkeypatch):
    """Run the matrix with the stand-in; its exit code and the table's folder."""
    (tmp_path / "cifar100_noise.py").write_text(FAKE)
    monkeypatch.setitem(tables["main"].__globals__, "HERE", tmp_path)

    def run(*argv, budget="full", fail="nothing", times=9):
        argv = [*argv, "--budget", budget, "--output_dir", tmp_path / "out", "--fail", fail, "--times", times]
        monkeypatch.setattr(sys, "argv", ["tables.py", "--table", "smkd-1", "--data", "d", *map(str, argv)])
        return tables["main"](), tmp_path / "out" / "smkd-1" / budget

    return run


def starts(root):
    return {str(p.parent.relative_to(root)): len(p.read_text().split()) for p in root.rglob("starts")}


def test_matrix_is_run_once_and_published(start, capsys):
    """Sixteen cells and the reference, two seeds; means, deviations and differences to the paper in every format."""
    code, root = start("--seeds", 2, "--jobs", 3)
    assert code == 0 and len(starts(root)) == 34 and set(starts(root).values()) == {1}
    text = (root / "table.md").read_text()
    assert "| MyLC | 60.5 ± 0.7 (paper 65.04, -4.5) | 60.5 ± 0.7 |" in text and "Budget full" in text
    assert "| cross-entropy | 40.5 ± 0.7 (paper 47.20, -6.7) |  |  |  |" in text
    tex = (root / "table.tex").read_text()
    assert r"MyLC & 60.5 $\pm$ 0.7 (paper 65.04, -4.5) & 60.5" in tex and r"40\%" in tex and r"\bottomrule" in tex
    assert (root / "table.png").stat().st_size > 10_000

    figures = pd.read_parquet(root / "results.parquet")
    one = figures[(figures.row == "MyLC") & (figures.column == "SMKD-P") & (figures.metric == "eval_accuracy")]
    assert (
        one.value.tolist() == [0.6, 0.61]
        and one.seed.tolist() == [0, 1]
        and one.paper.tolist() == pytest.approx([0.6909] * 2)
    )
    assert set(figures.metric) == {"eval_accuracy", "eval_accuracy_a"} and set(figures.budget) == {"full"}
    assert figures[figures.metric == "eval_accuracy_a"].paper.isna().all()
    assert one.command.str.contains("--refine mylc").all()
    assert one.device.str.contains("CPU cores|NVIDIA|AMD").all() and one.jobs.tolist() == [3, 3]

    start("--seeds", 2, "--jobs", 3)
    assert set(starts(root).values()) == {1}  # nothing twice
    assert start("--seeds", 3)[0] == 0 and len(starts(root)) == 51  # a third seed runs alone
    capsys.readouterr()


def test_a_cell_that_fails(start, capsys):
    """It is tried once more by itself, reported with its last line, and run again by the next command; others go on."""
    code, root = start("--seeds", 1, "--jobs", 2, fail="mylc--all", times=1)
    assert code == 0 and starts(root)["mylc--all/0"] == 2
    code, root = start("--seeds", 2, "--jobs", 2, fail="mylc--zero")
    done = starts(root)
    assert code == 1 and done["mylc--zero/1"] == 2 and done["proselflc--zero/1"] == 1
    assert "mylc--zero/1: out of memory" in capsys.readouterr().err
    assert "60.0" in (root / "table.md").read_text()  # seed 0, which was done before
    assert start("--seeds", 2)[0] == 0 and starts(root)["mylc--zero/1"] == 3


def test_choice_of_cells(start, capsys):
    code, root = start("--seeds", 1, "--rows", "MyLC", "--columns", "SMKD-P", "zero", budget="small")
    assert code == 0 and set(starts(root)) == {"mylc--smkd-p/0", "mylc--zero/0"}
    text = (root / "table.md").read_text()
    assert "| MyLC | 60.0 (paper 65.04) | 60.0 (paper 69.09) |" in text and "Not comparable with the paper" in text
    for bad, message in {
        ("--rows", "mylc"): r"--rows \['mylc'\]: smkd-1 has",
        ("--first", "MyLC:none"): "expected ROW:COLUMN",
        ("--budget", "huge"): "expected one of full, small",
        ("--jobs", "0"): "at least 1",
    }.items():
        with pytest.raises(SystemExit, match=message):
            start(*bad, **({"budget": "huge"} if bad[1] == "huge" else {}))
    capsys.readouterr()


def test_first_cells(tables):
    s = tables["Settings"](table="smkd-1", seeds=1, first=["MyLC:SMKD-P", "cross-entropy:zero"])
    cells, _ = tables["make_cells"](s, [])
    assert [(c.row, c.column) for c in cells[:3]] == [
        ("MyLC", "SMKD-P"),
        ("cross-entropy", "zero"),
        ("label smoothing", "zero"),
    ]


@pytest.mark.parametrize("budget", ["full", "small"])
def test_every_cell_is_a_command_that_its_recipe_takes(tables, budget):
    """Options are parsed by the recipe's own parser; the losses that they name can be made."""
    settings = {name: runpy.run_path(str(RECIPES / name)) for name in ("cifar100_noise.py", "distill_teachers.py")}
    for name, table in tables["TABLES"].items():
        cells, _ = tables["make_cells"](tables["Settings"](table=name, seeds=1, budget=budget), [])
        assert len({cell.folder for cell in cells}) == len(cells)
        assert set(table.paper) <= {(c.row, c.column) for c in cells}, name
        recipe = settings[table.recipe]
        parser = HfArgumentParser((recipe["Settings"], MutualTrainingArguments))
        for cell in cells:
            assert cell.command[1] == str(RECIPES / table.recipe)
            s, args = parser.parse_args_into_dataclasses(cell.command[2:])
            assert args.seed == cell.seed and args.output_dir == str(cell.folder)
            if table.recipe == "distill_teachers.py":
                assert not s.preset or s.preset in recipe["PRESETS"]
                continue
            known = {"window": 64, "num_samples": 64, "num_classes": 4}
            if s.method == "smkd":
                loss = recipe["make_loss"](s, "smkd", [None, None], **known)
                assert loss.normalize == ("selected" if budget == "full" else "batch")
                assert type(loss.refine[0]) is type(create_loss(s.refine))
            else:
                assert s.method in {*recipe["STAGES"], *list_losses()}
            assert "resnet34_cifar" not in s.models or budget == "full"


def test_knowledge_columns_are_the_limits(tables):
    """Zero knowledge selects nothing, all knowledge everything, S and P what their names say."""
    made = {name: create_loss("smkd", **{k: float(v) for k, v in options["loss_args"].items()}) for name, options in
            tables["KNOWLEDGE"].items()}  # fmt: skip
    assert {name: round(float(loss.select.chi(100)), 2) for name, loss in made.items() if not loss.select.b2} == {
        "zero": 0.0,
        "all": 9.21,
        "SMKD-S": 2.3,
    }
    assert made["SMKD-P"].select.b2 == -6 and made["SMKD-P"].select.eta == 2


def test_teachers_come_first_and_are_shared(tables, tmp_path):
    """One cell trains them; all students of the table read their folders, the student alone reads none."""
    cells, root = tables["make_cells"](
        tables["Settings"](table="camkd-3", budget="small", output_dir=str(tmp_path)), []
    )
    first, *others = [" ".join(cell.command) for cell in cells]
    assert (
        "--train_teachers True" in first and "--teachers resnet10_cifar resnet10_cifar mobilenetv3_small_050" in first
    )
    folders = " ".join(str(root / "teachers" / "teachers" / str(k) / "peer_a") for k in range(3))
    for cell, command in zip(cells[1:], others, strict=True):
        assert "--train_teachers False" in command
        assert (folders in command) != (cell.row == "student alone")
