"""recipes/experiments/tables.py: which cells run, none of them twice, and the tables."""

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from transformers import HfArgumentParser

from kd_plugins import MutualTrainingArguments, create_loss, list_losses
from kd_plugins.train import STAGES

RECIPES = Path(__file__).parents[2] / "recipes"

# A stand-in for a recipe. It counts its starts, fails where it is told to or if its GPU is busy,
# and else writes figures that depend on cell and seed.
FAKE = """
import json, os, sys, time
from pathlib import Path
args = sys.argv[1:]
value = lambda name: args[args.index(name) + 1] if name in args else None
out = Path(value("--output_dir"))
with open(out / "starts", "a") as log:
    log.write(os.environ["OMP_NUM_THREADS"] + "\\n")
starts = len((out / "starts").read_text().split())
if os.environ["FAIL"] in out.parent.name and starts <= int(os.environ["TIMES"]):
    raise SystemExit("out of memory")
if gpu := os.environ.get("CUDA_VISIBLE_DEVICES"):
    busy = out.parent.parent / f"gpu-{gpu}"
    busy.mkdir()
    time.sleep(0.2)
    busy.rmdir()
    (out / "gpu").write_text(gpu)
if os.environ["FAIL"] == "stop":
    (out / "pid").write_text(str(os.getpid()))
    time.sleep(3600)  # until it is killed
score = {"mylc": 0.6, "ce": 0.4}.get(value("--refine"), 0.5) + 0.01 * int(value("--seed"))
figures = {"eval_accuracy": score, "eval_accuracy_a": score, "method": "x", "seed": 0}
(out / "results.json").write_text(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES / "experiments"))  # as python puts it there for a script
        yield runpy.run_path(str(RECIPES / "experiments" / "tables.py"))


@pytest.fixture(scope="module")
def recipes():
    """The names of the recipes that cells run."""
    names = ("cifar100_noise.py", "distill_teachers.py")
    return {name: runpy.run_path(str(RECIPES / name)) for name in names}


@pytest.fixture
def start(tables, tmp_path, monkeypatch):
    """Run the matrix with the stand-in. Returns the exit code and the folder of the table."""
    (tmp_path / "cifar100_noise.py").write_text(FAKE)
    monkeypatch.setitem(tables["main"].__globals__, "RECIPES", tmp_path)

    def run(*argv, budget="full", fail="nothing", times=9):
        monkeypatch.setenv("FAIL", fail)  # not an option: what is done was done with the same ones
        monkeypatch.setenv("TIMES", str(times))
        argv = [*argv, "--budget", budget, "--output_dir", tmp_path / "out"]
        monkeypatch.setattr(
            sys, "argv", ["tables.py", "--table", "smkd-1", "--data", "d", *map(str, argv)]
        )
        return tables["main"](), tmp_path / "out" / "smkd-1" / budget

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)  # forks of later tests would have the recipe's


def starts(root):
    return {
        str(p.parent.relative_to(root)): len(p.read_text().split()) for p in root.rglob("starts")
    }


def test_matrix_is_run_once_and_published(start, capsys):
    """Sixteen cells and the reference, two seeds: the figures are right in every format."""
    code, root = start("--seeds", 2, "--jobs", 3)
    assert code == 0 and len(starts(root)) == 34 and set(starts(root).values()) == {1}
    text = (root / "table.md").read_text()
    assert (
        "| MyLC | 60.5 ± 0.7 (paper 65.04, -4.5) | 60.5 ± 0.7 |" in text and "Budget full" in text
    )
    assert "| cross-entropy | 40.5 ± 0.7 (paper 47.20, -6.7) |  |  |  |" in text
    tex = (root / "table.tex").read_text()
    assert (
        r"MyLC & 60.5 $\pm$ 0.7 (paper 65.04, -4.5) & 60.5" in tex
        and r"40\%" in tex
        and r"\bottomrule" in tex
    )
    assert (root / "table.png").stat().st_size > 10_000

    figures = pd.read_parquet(root / "results.parquet")
    one = figures[
        (figures.row == "MyLC") & (figures.column == "SMKD-P") & (figures.metric == "eval_accuracy")
    ]
    assert (
        one.value.tolist() == [0.6, 0.61]
        and one.seed.tolist() == [0, 1]
        and one.paper.tolist() == pytest.approx([0.6909] * 2)
    )
    assert set(figures.metric) == {"eval_accuracy", "eval_accuracy_a"} and set(figures.budget) == {
        "full"
    }
    assert figures[figures.metric == "eval_accuracy_a"].paper.isna().all()
    assert one.command.str.contains("--refine mylc").all()
    assert one.device.str.contains("CPU cores|NVIDIA|AMD").all() and one.jobs.tolist() == [3, 3]

    start("--seeds", 2, "--jobs", 3)
    assert set(starts(root).values()) == {1}  # nothing twice
    assert start("--seeds", 3)[0] == 0 and len(starts(root)) == 51  # a third seed runs alone
    capsys.readouterr()


def test_a_cell_that_fails(start, capsys):
    """A failed cell is tried once more alone and reported. The others run on."""
    code, root = start("--seeds", 1, "--jobs", 2, fail="mylc--all", times=1)
    assert code == 0 and starts(root)["mylc--all/0"] == 2
    code, root = start("--seeds", 2, "--jobs", 2, fail="mylc--zero")
    done = starts(root)
    assert code == 1 and done["mylc--zero/1"] == 2 and done["proselflc--zero/1"] == 1
    assert "mylc--zero/1: out of memory" in capsys.readouterr().err
    assert "60.0" in (root / "table.md").read_text()  # seed 0, which was done before
    assert start("--seeds", 2)[0] == 0 and starts(root)["mylc--zero/1"] == 3


@pytest.mark.parametrize(
    "second", [["--num_train_epochs", "16"], ["--num-train-epochs=16"], ["--bf16"]], ids=str
)
def test_figures_of_another_command_are_not_published(second, start, capsys):
    """A finished cell with other options is refused. Without a record of them it is accepted."""
    asked = ["--seeds", 1, "--rows", "MyLC", "--columns", "zero"]
    _, root = start(*asked, "--num_train_epochs", "12")
    start(*asked, "--num_train_epochs=12")  # the same
    before = (root / "table.md").read_text()
    with pytest.raises(
        SystemExit,
        match=r"mylc--zero/0 was run with .*, asked for is .*Choose another --output_dir",
    ):
        start(*asked, *second)
    assert (root / "table.md").read_text() == before
    (root / "mylc--zero" / "0" / "clock.json").unlink()
    assert start(*asked, *second)[0] == 0 and starts(root) == {"mylc--zero/0": 1}
    capsys.readouterr()


def test_what_a_changed_command_is_told(start, tables, tmp_path, capsys):
    """The error names what differs. The path of the folder does not count."""
    start("--seeds", 1, "--rows", "MyLC", "--columns", "zero", "--num_train_epochs", "12")
    wanted = (
        r"{'num_train_epochs': \['12'\]}, asked for is {'num_train_epochs': \['16'\]}; "
        "its figures would be published"
    )
    with pytest.raises(SystemExit, match=wanted):
        start(
            "--seeds",
            1,
            "--rows",
            "MyLC",
            "--columns",
            "SMKD-P",
            "zero",
            "--num_train_epochs",
            "16",
        )
    (tmp_path / "out").rename(tmp_path / "moved")
    s = tables["Settings"](
        table="smkd-1",
        data="d",
        seeds=1,
        rows=["MyLC"],
        columns=["zero"],
        output_dir=str(tmp_path / "moved"),
    )
    tables["refuse_others"](tables["make_cells"](s, ["--num_train_epochs", "12"])[0])
    with pytest.raises(SystemExit, match=r"moved.* was run with"):
        tables["refuse_others"](tables["make_cells"](s, [])[0])
    capsys.readouterr()


@pytest.mark.parametrize(
    "more",
    [
        ["--seed", "5"],
        ["--seed=5"],
        ["--see", "5"],
        ["--refine", "ce"],
        ["--loss-args", "eta=1"],
        ["--loss_a", "eta=1"],
        ["stray"],
    ],
    ids=str,
)
def test_options_that_cells_have_of_their_own_are_refused(more, start, tmp_path):
    """They would make all rows or all seeds the same. --seed is no short form of --seeds."""
    with pytest.raises(SystemExit, match=r"has its own|it would be dropped"):
        start(*more, "--rows", "MyLC")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", ["full", "small"])
def test_what_is_passed_on_reaches_whom_it_concerns(tables, budget):
    """Options that teachers have too go to every cell, options of students to the students."""
    asked = tables["Settings"](table="camkd-1", seeds=1, budget=budget, teacher_epochs=7)
    more = ["--student", "resnet18_cifar", "--learning_rate=0.01", "--num_train_epochs", "9"]
    for cell in tables["make_cells"](asked, more)[0]:
        given = tables["options_of"](cell.command)
        assert given["learning_rate"] == ["0.01"]
        assert given["num_train_epochs"] == (["9"] if cell.row else ["7"])
        assert given.get("student") == (["resnet18_cifar"] if cell.row else None)
    for bad in ("--teachers", "--terms", "--preset"):
        with pytest.raises(SystemExit, match=f"{bad} x: each cell of camkd-1 has its own"):
            tables["make_cells"](tables["Settings"](table="camkd-1", seeds=1), [bad, "x"])


def test_cells_are_dealt_out_over_the_gpus(start, monkeypatch, capsys):
    """One cell at a time on each of two GPUs. The record names the GPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda k: f"NVIDIA {k}")
    code, root = start("--seeds", 1, "--jobs", 2, "--rows", "MyLC")
    seen = {p.parent: p.read_text() for p in root.rglob("gpu")}
    assert (
        code == 0
        and set(starts(root).values()) == {1}
        and set(seen.values()) == {"0", "1"}
        and len(seen) == 4
    )
    assert all(f'"NVIDIA {gpu}"' in (cell / "clock.json").read_text() for cell, gpu in seen.items())
    capsys.readouterr()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_matrix_that_is_stopped(name, start, tmp_path):
    """Ctrl-C and kill end the running cells too, or the next start would run them twice."""
    before, number = signal.getsignal(signal.SIGTERM), getattr(signal, name)
    root = tmp_path / "out" / "smkd-1" / "full"

    over = threading.Event()  # a signal that came after the test would stop all tests

    def stop():
        while len(list(root.glob("*/0/pid"))) < 2 and not over.is_set():
            time.sleep(0.05)
        if not over.is_set():
            os.kill(os.getpid(), number)

    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit):
            start("--seeds", 1, "--jobs", 2, fail="stop")
    finally:
        over.set()
        stopping.join()
        signal.signal(signal.SIGTERM, before)
    pids = [int(p.read_text()) for p in root.glob("*/0/pid")]
    time.sleep(1)
    assert len(starts(root)) == 2 and not list(root.glob("*/0/results.json"))
    for pid in pids:  # gone, not only told to go
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_choice_of_cells(start, capsys):
    code, root = start(
        "--seeds", 1, "--rows", "MyLC", "--columns", "SMKD-P", "zero", budget="small"
    )
    assert code == 0 and set(starts(root)) == {"mylc--smkd-p/0", "mylc--zero/0"}
    text = (root / "table.md").read_text()
    assert (
        "| MyLC | 60.0 (paper 65.04) | 60.0 (paper 69.09) |" in text
        and "Not comparable with the paper" in text
    )
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
def test_every_cell_is_a_command_that_its_recipe_takes(tables, recipes, budget):
    """The recipe's own parser takes the options, and the named losses can be made."""
    for name, table in tables["TABLES"].items():
        cells, _ = tables["make_cells"](tables["Settings"](table=name, seeds=1, budget=budget), [])
        assert len({cell.folder for cell in cells}) == len(cells)
        assert set(table.paper) <= {(c.row, c.column) for c in cells}, name
        for cell in cells:
            kind = table.recipe if cell.row else "cifar100_noise.py"
            recipe = recipes[kind]
            assert cell.command[1] == str(RECIPES / kind)
            parser = HfArgumentParser((recipe["Settings"], MutualTrainingArguments))
            s, args = parser.parse_args_into_dataclasses(cell.command[2:])
            assert args.seed == cell.seed and args.output_dir == str(cell.folder)
            if kind == "distill_teachers.py":
                assert not s.preset or s.preset in recipe["PRESETS"]
                continue
            if s.method == "smkd":
                loss = recipe["make_loss"](s, "smkd", {})
                assert loss.normalize == ("selected" if budget == "full" else "batch")
                assert type(loss.refine[0]) is type(create_loss(s.refine))
            else:
                assert s.method in {*STAGES, *list_losses()}
            assert "resnet34_cifar" not in s.models or budget == "full"


def parse(recipes, command, monkeypatch):
    """Settings and arguments as the recipe of a command reads and checks them."""
    monkeypatch.setattr(sys, "argv", command[1:])
    s, args, *_ = recipes[Path(command[1]).name]["options"]()
    return vars(s), args


SCHEDULE = [
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "lr_scheduler_type",
    "warmup_steps",
    "milestones",
    "lr_decay",
    "max_grad_norm",
]


def test_cells_of_a_distillation_table_share_one_schedule(tables, recipes, monkeypatch):
    """Teachers and rows have the published schedule, also rows that name only their terms."""
    distill = recipes["distill_teachers.py"]
    there = {name: t for name, t in tables["TABLES"].items() if t.recipe == "distill_teachers.py"}
    assert len(there) == 5
    published = MutualTrainingArguments("x", report_to="none", **distill["SCHEDULE"])
    for name, table in there.items():
        cells, _ = tables["make_cells"](tables["Settings"](table=name, seeds=1), [])
        for cell in cells:
            s, args = parse(recipes, cell.command, monkeypatch)
            for key in SCHEDULE:
                assert getattr(args, key) == getattr(published, key), (cell, key)
            if not cell.row or (cell.row, cell.column) in table.cells:
                continue  # a teacher, or a cell whose options are not those of the row
            own = table.rows[cell.row]
            learned = {"revise": 0.0, "keep": 1.0, "standardize": 0.0}
            learned |= distill["PRESETS"].get(own.get("preset"), {}) | own
            named = ("terms", "revise", "keep", "standardize")
            assert [s[key] for key in named] == [learned[key] for key in named]


def test_rows_have_the_teachers_that_they_name(tables):
    """Methods for one teacher have the first one, CA-MKD has all, the student alone has none."""
    table = tables["TABLES"]["camkd-2"]
    cells, root = tables["make_cells"](tables["Settings"](table="camkd-2", seeds=1), [])
    folders = [str(root / "teachers" / str(k) / "peer_a") for k in range(3)]
    seen = {
        cell.row: [a for a in cell.command if a.endswith("peer_a")] for cell in cells if cell.row
    }
    others = {"student alone": [], "CA-MKD, three teachers": folders}
    assert seen == dict.fromkeys(table.rows, folders[:1]) | others


def test_each_column_has_its_pair(tables):
    """DKD's pairs: the student of the column learns from the teacher of the column."""
    cells = tables["make_cells"](tables["Settings"](table="dkd", seeds=1), [])[0]
    trained = tables["TABLES"]["dkd"].base["teachers"]
    for cell in cells[len(trained) :]:
        options = tables["options_of"](cell.command)
        (student,), taught = options["student"], options.get("teachers", [])
        assert bool(taught) == (cell.row != "student alone")
        names = [trained[int(Path(folder).parent.name)] for folder in taught]
        pair = [*(name.removesuffix("_cifar") for name in names), student.removesuffix("_cifar")]
        column = cell.column.lower().replace("-", "").split(", ")
        assert pair == [column[0], "resnet" + column[1]][-len(pair) :]


WTTM = {"terms": "ce + 3*wttm", "gamma": 0.1}
DIVIDE = {"lambda_u": 150.0, "threshold": 0.5, "start": 0.1}
DIVIDE10 = {"lambda_u": 25.0, "threshold": 0.5, "start": 10 / 300}
ELR = {"lambda_": 3.0, "beta": 0.7, "ramp": 0.0}
ASYMMETRIC = "asymmetric 40%"
PUBLISHED = [
    ("dkd", "DKD", "ResNet-56, 20", {"terms": "ce + dkd", "beta": 2.0}),
    ("dkd", "DKD", "ResNet-32x4, 8x4", {"terms": "ce + dkd", "beta": 8.0}),
    ("dkd", "WTTM", "ResNet-56, 20", {"terms": "ce + 1.5*wttm", "gamma": 0.3}),
    ("dkd", "WTTM", "ResNet-32x4, 8x4", WTTM),
    ("dkd", "KD, standardised", "ResNet-110, 20", {"terms": "0.1*ce + 12*kd", "standardize": 4.0}),
    ("dividemix-1", "DivideMix", "20%", DIVIDE | {"lambda_u": 25.0}),
    ("dividemix-1", "DivideMix", "90%", DIVIDE | {"threshold": 0.6}),
    ("dividemix-1", "ELR+", "50%", {"lambda_": 7.0, "beta": 0.9, "ramp": 0.41}),
    ("dividemix-1-cifar10", "DivideMix", "80%", DIVIDE10),
    ("dividemix-1-cifar10", "DivideMix", "90%", DIVIDE10 | {"lambda_u": 50.0, "threshold": 0.6}),
    ("dividemix-1-cifar10", "DivideMix", ASYMMETRIC, DIVIDE10 | {"lambda_u": 0.0}),
    ("dividemix-1-cifar10", "ELR+", "90%", ELR),
    ("dividemix-1-cifar10", "ELR+", ASYMMETRIC, ELR | {"lambda_": 1.0, "beta": 0.9}),
]


@pytest.mark.parametrize(("table", "row", "column", "expected"), PUBLISHED)
def test_cells_have_the_published_arguments(
    tables, recipes, table, row, column, expected, monkeypatch
):
    """What differs from pair to pair, and from rate to rate, arrives in the recipe's loss."""
    s = tables["Settings"](table=table, seeds=1, rows=[row], columns=[column])
    cell = tables["make_cells"](s, [])[0][-1]
    recipe = recipes[Path(cell.command[1]).name]
    monkeypatch.setattr(sys, "argv", cell.command[1:])
    settings = recipe["options"]()[0]
    known = vars(settings)
    if table != "dkd":
        assert settings.noise == ("cifar10" if column == ASYMMETRIC else "symmetric")
        known = vars(recipe["make_loss"](settings, settings.method, {}))
    assert {name: known[name] for name in expected} == expected


def test_a_given_label_is_used_at_every_budget(tables):
    """Budget small names CIFAR-100's superclasses; other data sets do not have them."""
    for label, expected in ((None, ["coarse_label"]), ("label", ["label"])):
        s = tables["Settings"](table="dividemix-1-cifar10", seeds=1, budget="small", label=label)
        cells = tables["make_cells"](s, [])[0]
        found = [tables["options_of"](cell.command)["label"] for cell in cells]
        assert found == [expected] * len(cells)


def test_knowledge_columns_are_the_limits(tables):
    """Zero knowledge selects nothing, all knowledge everything; S is static, P progressive."""
    made = {
        name: create_loss("smkd", **{k: float(v) for k, v in options["loss_args"].items()})
        for name, options in tables["TABLES"]["smkd-1"].columns.items()
    }
    assert {
        name: round(float(loss.select.threshold(100)), 2)
        for name, loss in made.items()
        if not loss.select.b2
    } == {
        "zero": 0.0,
        "all": 9.21,
        "SMKD-S": 2.3,
    }
    assert made["SMKD-P"].select.b2 == -6 and made["SMKD-P"].select.eta == 2


def test_teachers_come_first_and_are_shared(tables, tmp_path):
    """Each teacher is a cell. All students but the student alone read all of their folders."""
    asked = tables["Settings"](table="camkd-3", budget="small", output_dir=str(tmp_path))
    cells, root = tables["make_cells"](asked, [])
    folders = [root / "teachers" / str(k) for k in range(3)]
    assert [cell.folder for cell in cells if not cell.row] == folders
    options = [tables["options_of"](cell.command) for cell in cells]
    names = ["resnet10_cifar", "resnet10_cifar", "mobilenetv3_small_050"]
    assert [o["models"] for o in options[:3]] == [[name] for name in names]
    assert [o["seed"] for o in options[:3]] == [["0"], ["1"], ["2"]]
    for cell, own in zip(cells[3:], options[3:], strict=True):
        taught = [] if cell.row == "student alone" else [str(f / "peer_a") for f in folders]
        assert own.get("teachers", []) == taught
