"""Each recipe as a user starts it, with tiny networks on tiny data."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers.cards import card_accuracy, loaded_by_card, predictor
from helpers.pictures import hub
from PIL import Image
from safetensors.torch import load_file

from kd_plugins import MutualDistillationTrainer, list_losses, loss_class
from kd_plugins.audit import summarise
from kd_plugins.data import load_webvision
from kd_plugins.models import export
from kd_plugins.train import run_main

RECIPES = Path(__file__).parents[2] / "recipes"


def start(monkeypatch, recipe, *argv):
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, argv)])
    monkeypatch.syspath_prepend((RECIPES / recipe).parent)  # as python does for a script
    try:
        return runpy.run_path(str(RECIPES / recipe), run_name="__main__")
    except SystemExit as error:  # a user's error: what was said, after a check of the exit code
        assert error.code == 2
        raise error.__cause__ from None


@pytest.fixture
def pictures(tmp_path):
    """A data set of four classes in a folder of parquet files."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list("wxyz")),
            "coarse_label": datasets.Value("int64"),
        }
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for split, n in (("train", 32), ("test", 8)):
        label = [i % 4 for i in range(n)]
        rows = {"image": list(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)), "label": label}
        rows["coarse_label"] = [k // 2 for k in label]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    return folder


def open_picture(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_webvision_mini(tmp_path, monkeypatch, capsys):
    """The demo writes a table, pictures and networks. A second start trains nothing."""
    argv = [
        "webvision_mini.py",
        "--models",
        "test_resnet",
        "test_efficientnet",
        "--num_train_epochs",
        1,
        "--output_dir",
        tmp_path,
    ]
    start(monkeypatch, *argv)
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in ("cross-entropy", "SMKD-P + MyLC", "truncated GCE"))
    assert "train_memorised" in out
    assert (tmp_path / "pictures" / "curves.png").stat().st_size > 10_000
    assert "labels are suspected\n" in out and "of all wrong labels are among them" in out
    assert (tmp_path / "pictures" / "suspects.html").stat().st_size > 100_000
    assert (tmp_path / "pictures" / "suspects.png").stat().st_size > 10_000
    assert (tmp_path / "smkd-42" / "peer_b" / "model.safetensors").exists()
    figures = json.loads((tmp_path / "smkd-42" / "results.json").read_text())
    assert figures["eval_train_noise_rate"] == pytest.approx(0.4, abs=0.001)

    rows = load_webvision(tmp_path / "data-42", "val", classes=None)
    folder = tmp_path / "smkd-42" / "peer_b"
    named = card_accuracy(folder, "_b", of="eval_val_accuracy")
    predict = predictor(next(loaded_by_card(folder)))
    right = [predict(open_picture(row["image"])) == row["label"] for row in rows]
    assert np.mean(right) == pytest.approx(named, abs=0.005)

    start(monkeypatch, *argv)
    again = capsys.readouterr().out
    assert again.count("done before") == 3 and "train_runtime" not in again
    argv[argv.index("--num_train_epochs") + 1] = 2
    with pytest.raises(
        ValueError, match=r"holds a run with {'epochs': 1\.0}, asked for is {'epochs': 2\.0}"
    ):
        start(monkeypatch, *argv)


METHODS = [
    ["--method", "ce", "--noise", "symmetric"],
    ["--method", "mylc", "--noise", "circular", "--models", "test_resnet"],
    ["--method", "proselflc", "--noise", "pair_flip", "--holdout", "0.25", "--dynamics", "True"],
    [
        "--method",
        "smkd",
        "--refine",
        "label_smoothing",
        "--refine_args",
        "eps=0.2",
        "--loss_args",
        "eta=inf",
        "b2=0",
        "normalize=batch",
    ],
    ["--method", "mkd", "--noise", "none", "--models", "test_resnet", "test_resnet", "test_resnet"],
]


@pytest.mark.parametrize("more", METHODS, ids=[m[1] for m in METHODS])
def test_cifar100_noise(more, tmp_path, pictures, monkeypatch):
    """Methods by name, with every kind of noise, with one network and with several."""
    out = tmp_path / "out"
    models = [] if "--models" in more else ["--models", "test_resnet", "test_efficientnet"]
    fixed = [
        "--data",
        pictures,
        "--output_dir",
        out,
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        8,
    ]
    start(monkeypatch, "cifar100_noise.py", *fixed, *models, *more)
    figures = json.loads((out / "results.json").read_text())
    assert 0 <= figures["eval_accuracy"] <= 1 and figures["method"] == more[1]
    assert len(list((out / "dynamics").glob("*.parquet"))) == ("--dynamics" in more)
    rate = 0.0 if "none" in more else 0.4
    assert figures["train_noise_rate"] == pytest.approx(rate, abs=0.1)  # of a hold-out: about


STAGED = {
    "joint": ["1-joint", "2-soft_labels"],
    "tf_kd_self": ["1-ce", "2-tf_kd_self"],
    "forward_correction": ["1-ce", "2-forward_correction"],
    "backward_correction": ["1-ce", "2-backward_correction"],
    "t_revision": ["1-ce", "2-reweighting", "3-t_revision"],
    "dmi": ["1-ce", "2-dmi"],
}
TAUGHT = {
    n for n in list_losses() if loss_class(n).required_inputs & {"teacher", "teacher_features"}
} - {
    "tf_kd_self",
    "pcl",
}
OTHERS = [
    n
    for n in [*list_losses(), "cdr"]
    if n not in {m[1] for m in METHODS} | {"soft_labels"} | TAUGHT
]


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_by_name(name, tmp_path, pictures, monkeypatch):
    """Every method trains by name. Methods of several stages leave a folder per stage."""
    networks = ["test_resnet"] * (2 if name != "cdr" and loss_class(name).num_peers > 1 else 1)
    argv = [
        "--data",
        pictures,
        "--output_dir",
        tmp_path / "out",
        "--num_train_epochs",
        1,
        "--method",
        name,
    ]
    more = ["--estimator", "dual_t"] if name == "backward_correction" else []
    start(
        monkeypatch,
        "cifar100_noise.py",
        *argv,
        "--models",
        *networks,
        "--per_device_train_batch_size",
        8,
        *more,
    )
    assert 0 <= json.loads((tmp_path / "out" / "results.json").read_text())["eval_accuracy"] <= 1
    assert sorted(p.name for p in (tmp_path / "out").glob("[0-9]-*")) == STAGED.get(name, [])
    assert (tmp_path / "out" / "pictures").exists()


def test_what_the_recipe_fills_in_fits_the_method(tmp_path, pictures, monkeypatch):
    """Joint keeps ten epochs of each sample. A known matrix needs no first stage."""
    argv = [
        "--data",
        pictures,
        "--num_train_epochs",
        1,
        "--models",
        "test_resnet",
        "--per_device_train_batch_size",
        8,
    ]
    start(
        monkeypatch,
        "cifar100_noise.py",
        *argv,
        "--output_dir",
        tmp_path / "joint",
        "--method",
        "joint",
    )
    saved = load_file(next((tmp_path / "joint" / "1-joint").glob("checkpoint-*/model.safetensors")))
    assert saved["criterion.outputs.rows"].shape == (32, 10, 4)
    known = [
        "--output_dir",
        tmp_path / "known",
        "--method",
        "backward_correction",
        "--estimator",
        "known",
    ]
    start(monkeypatch, "cifar100_noise.py", *argv, *known)
    saved = load_file(next((tmp_path / "known").glob("checkpoint-*/model.safetensors")))
    assert saved["criterion.transition"].diagonal().tolist() == pytest.approx([0.6] * 4)
    with pytest.raises(SystemExit, match="--noise none has no known matrix"):
        start(
            monkeypatch,
            "cifar100_noise.py",
            *argv,
            *known[2:],
            "--output_dir",
            tmp_path / "none",
            "--noise",
            "none",
        )


def test_stages_continue_where_they_should(tmp_path, pictures, monkeypatch):
    """T-revision continues with the network of stage 2. Finished stages are not repeated."""
    argv = [
        "--data",
        pictures,
        "--output_dir",
        tmp_path / "out",
        "--method",
        "t_revision",
        "--models",
        "test_resnet",
    ]
    argv += [
        "--stage_epochs",
        1,
        2,
        1,
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        8,
        "--save_total_limit",
        9,
    ]
    start(monkeypatch, "cifar100_noise.py", *argv)
    seen = {
        p.parent.name: sorted(c.name for c in p.parent.glob("checkpoint-*"))
        for p in (tmp_path / "out").glob("*/checkpoint-4")
    }
    assert seen == {
        "1-ce": ["checkpoint-4"],
        "2-reweighting": ["checkpoint-4", "checkpoint-8"],
        "3-t_revision": ["checkpoint-4"],
    }
    weights = [
        load_file(tmp_path / "out" / c / "model.safetensors")["peers.0.fc.weight"]
        for c in ("1-ce/checkpoint-4", "2-reweighting/checkpoint-8", "3-t_revision/checkpoint-4")
    ]
    assert 0 < (weights[2] - weights[1]).abs().max() < 1e-4 < (weights[1] - weights[0]).abs().max()
    correction = load_file(
        tmp_path / "out" / "3-t_revision" / "checkpoint-4" / "model.safetensors"
    )["criterion.delta"]
    assert 0 < correction.abs().max() < 1e-4
    before = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/checkpoint-*/model.safetensors")
    }
    results = (tmp_path / "out" / "results.json").read_text()
    start(monkeypatch, "cifar100_noise.py", *argv)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (tmp_path / "out" / "results.json").read_text() == results


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ["--method", "joint", "--models", "test_resnet", "test_resnet"],
            "joint takes 2 stages, for one network",
        ),
        (
            ["--method", "dmi", "--models", "test_resnet", "--stage_epochs", 1],
            r"\[1.0\]: dmi has 2 stages, \[.ce., .dmi.\]",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(more, match, tmp_path, pictures, monkeypatch):
    with pytest.raises((SystemExit, ValueError), match=match):
        start(
            monkeypatch,
            "cifar100_noise.py",
            "--data",
            pictures,
            "--output_dir",
            tmp_path / "out",
            *more,
        )


def test_cifar100_noise_on_part_of_the_data(tmp_path, pictures, monkeypatch):
    """The options --classes, --where, --size, --augment, and --noise with the name of a column."""
    rows = datasets.load_dataset(str(pictures))
    given = [(k + i % 2) % 3 for i, k in enumerate(rows["train"]["label"])]
    train = (
        rows["train"]
        .add_column("exact", [k < 2 for k in rows["train"]["label"]])
        .add_column("human", given)
    )
    other = tmp_path / "other"
    other.mkdir()
    train.to_parquet(other / "train-00000-of-00001.parquet")
    blank = {"exact": [True] * 8, "human": rows["test"]["label"]}
    test = rows["test"].add_column("exact", blank["exact"]).add_column("human", blank["human"])
    test.to_parquet(other / "test-00000-of-00001.parquet")

    seen = []
    original = MutualDistillationTrainer.__init__

    def watch(self, models, loss, args, **kwargs):
        seen.append((kwargs["train_dataset"], kwargs["eval_dataset"]))
        original(self, models, loss, args, **kwargs)

    monkeypatch.setattr(MutualDistillationTrainer, "__init__", watch)
    argv = ["--data", other, "--models", "test_resnet", "--num_train_epochs", 1, "--method", "ce"]
    parts = [
        "--classes",
        3,
        "--output_dir",
        tmp_path / "classes",
        "--size",
        24,
        "--augment",
        "False",
    ]
    start(monkeypatch, "cifar100_noise.py", *argv, *parts)
    train, test = seen.pop()
    assert (train.num_classes, len(train), len(test)) == (3, 24, 6) and train[0][
        "pixel_values"
    ].shape == (3, 24, 24)
    train.set_epoch(1)
    before = train[0]["pixel_values"]
    train.set_epoch(2)
    assert before.equal(train[0]["pixel_values"])

    human = ["--where", "exact", "--noise", "human", "--output_dir", tmp_path / "human"]
    start(monkeypatch, "cifar100_noise.py", *argv, *human)
    train, test = seen.pop()
    assert (train.num_classes, len(train), len(test)) == (4, 16, 4) and set(test.labels) == {0, 1}
    kept = [i for i, k in enumerate(rows["train"]["label"]) if k < 2]
    assert train.labels.tolist() == [given[i] for i in kept] and set(train.clean_labels) == {0, 1}
    with pytest.raises(ValueError, match="classes=5: expected 2 to 4"):
        start(
            monkeypatch,
            "cifar100_noise.py",
            *argv,
            "--classes",
            5,
            "--output_dir",
            tmp_path / "five",
        )


def test_cifar100_noise_refuses_unknown_noise(tmp_path, pictures, monkeypatch):
    with pytest.raises(ValueError, match="noise salt: expected symmetric"):
        start(
            monkeypatch,
            "cifar100_noise.py",
            "--data",
            pictures,
            "--noise",
            "salt",
            "--output_dir",
            tmp_path,
        )


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        (["--method", "cee"], ValueError, "unknown loss 'cee': did you mean ce"),
        (
            ["--method", "ce", "--refine", "nonsense"],
            SystemExit,
            "--refine nonsense: ce takes no refine",
        ),
        (
            ["--method", "ce", "--refine_args", "b1=2"],
            SystemExit,
            "--refine mylc b1=2: ce takes no refine and would ignore it",
        ),
        (["--refine", "nonsense"], ValueError, "unknown loss 'nonsense'"),
        (
            ["--loss_args", "etta=2", "b2=0"],
            TypeError,
            "SMKD has no argument 'etta'; did you mean eta",
        ),
        (["--loss_args", "eta"], SystemExit, "--loss_args eta: expected NAME=VALUE"),
        (
            ["--refine_args", "eps=2"],
            TypeError,
            "MyLC has no argument 'eps'; it has b1, rho, window",
        ),
        (
            ["--method", "dmi", "--models", "test_resnet", "--loss_args", "ep=2"],
            TypeError,
            "DMI has no argument 'ep'; did you mean eps",
        ),
        (
            ["--models", "test_resnet", "resnet99"],
            ValueError,
            "resnet99: expected a timm name; there is no such network; did you mean resnet",
        ),
        (
            ["--models", RECIPES],
            ValueError,
            ".*recipes: expected a timm name; there is no",
        ),  # trained ones are not asked for
        (
            ["--estimator", "anker"],
            SystemExit,
            "--estimator anker: expected anchor, dual_t or known",
        ),
        (
            ["--label", "fin_label"],
            ValueError,
            "label fin_label: expected the name of one ClassLabel column, here label",
        ),
        (["--noise", "salt"], ValueError, "noise salt: expected symmetric"),
        (
            ["--method", "dml", "--models", "test_resnet"],
            ValueError,
            "teaches peers and there is one network",
        ),
    ],
)
def test_a_mistyped_command_does_not_take_the_folder(
    more, error, match, tmp_path, pictures, monkeypatch
):
    """It is refused before it claims the folder, so the corrected command can use the folder."""
    models = [] if "--models" in more else ["--models", "test_resnet", "test_resnet"]
    with pytest.raises(error, match=match):
        start(
            monkeypatch,
            "cifar100_noise.py",
            "--data",
            pictures,
            "--output_dir",
            tmp_path / "out",
            *models,
            *more,
        )
    assert not (tmp_path / "out" / "settings.json").exists()


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        (["--noise", "none"], 0.0),
        (["--noise", "none", "--rate", 0.2], 0.2),
        ([], 0.4),
        (["--rate", 0.0], 0.0),
    ],
)
def test_what_co_teaching_forgets(more, rate, monkeypatch):
    """The default is the noise rate, and 0 without noise. An explicit --rate wins."""
    recipe = recipe_of(monkeypatch, "cifar100_noise.py", "--method", "co_teaching", *more)
    s, *_ = recipe["options"]()
    assert recipe["make_loss"](s, "co_teaching", [None, None]).select.forget == s.rate == rate


RECIPES_ON_DATA = {
    "cifar100_noise.py": ["--models", "test_resnet", "--method", "ce", "--noise", "circular"],
    "distill_teachers.py": ["--student", "test_resnet", "--terms", "ce"],
    "finetune_mylc.py": ["--model", "test_resnet"],
    "find_wrong_labels.py": ["--networks", "test_resnet"],
}


@pytest.mark.parametrize("recipe", RECIPES_ON_DATA)
def test_columns_of_the_hub(recipe, tmp_path, monkeypatch, two_teachers):
    """The picture column is found. Of two label columns one has to be named."""
    more = [
        "--data",
        hub(tmp_path / "data"),
        "--output_dir",
        tmp_path / "out",
        *RECIPES_ON_DATA[recipe],
    ]
    with pytest.raises(
        ValueError,
        match="label None: expected the name of one ClassLabel column, here fine_label or coarse",
    ):
        start(monkeypatch, recipe, *more)
    assert not (tmp_path / "out").exists()
    more += (
        ["--networks", two_teachers[0]]
        if recipe == "find_wrong_labels.py"
        else ["--num_train_epochs", 1]
    )
    more += ["--model", two_teachers[0], "--size", 32] if recipe == "finetune_mylc.py" else []
    start(monkeypatch, recipe, *more, "--label", "fine_label")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["image"], results["label"]) == ("img", "fine_label")


def test_suspects_of_other_rows_are_refused(tmp_path, pictures, monkeypatch):
    """The dynamics belong to the rows and labels of the run. Other rows or labels are refused."""
    run = tmp_path / "run"
    argv = ["--data", pictures, "--models", "test_resnet", "--method", "ce", "--dynamics", "True"]
    argv += ["--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--noise", "pair_flip"]
    start(monkeypatch, "cifar100_noise.py", *argv, "--output_dir", run)
    known = summarise(run / "dynamics")
    rows = datasets.load_dataset(str(pictures), split="train")
    given = rows.add_column("given", known["label"], feature=rows.features["label"])
    others = {
        "same": (given, "given", None),
        "column": (
            given,
            "label",
            r"row \d+ has label \d in column 'label', and \d among the suspects",
        ),
        "order": (
            given.select(range(31, -1, -1)),
            "given",
            r"row \d+ has label \d in column 'given', and \d among",
        ),
        "fewer": (
            given.select(range(20)),
            "given",
            r"have row \d+, the data set 20 rows",
        ),
    }
    for name, (data, label, refused) in others.items():
        folder = tmp_path / name
        folder.mkdir()
        data.to_parquet(folder / "train-00000-of-00001.parquet")
        argv = ["--data", folder, "--label", label, "--dynamics", run / "dynamics"]
        argv += ["--output_dir", tmp_path / f"suspects-{name}"]
        if refused:
            with pytest.raises(ValueError, match=refused):
                start(monkeypatch, "find_wrong_labels.py", *argv)
        else:
            start(monkeypatch, "find_wrong_labels.py", *argv)
        assert (tmp_path / f"suspects-{name}").exists() == (not refused)


def test_suspects_among_labels_that_are_all_right(
    tmp_path, pictures, two_teachers, monkeypatch, capsys
):
    """Without wrong labels nothing is measured, but the files are written."""
    argv = ["--data", pictures, "--clean", "label", "--output_dir", tmp_path / "out", "--networks"]
    start(monkeypatch, "find_wrong_labels.py", *argv, two_teachers[0])
    out = capsys.readouterr().out
    assert (
        "--clean label: 0 of 32 labels are wrong; nothing to measure" in out and "AUROC" not in out
    )
    assert (tmp_path / "out" / "suspects.csv").exists()
    with pytest.raises(
        ValueError, match=r"gone: expected a timm name, NAME=FILE or a folder that export\(\) wrote"
    ):
        start(monkeypatch, "find_wrong_labels.py", *argv, tmp_path / "gone")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--seeds", 0], "--seeds 0: expected at least 1"),
        (["--models", "resnet99", "x"], "resnet99: expected a timm name; there is no"),
    ],
)
def test_webvision_mini_refuses(more, match, tmp_path, monkeypatch):
    with pytest.raises((SystemExit, ValueError), match=match):
        start(monkeypatch, "webvision_mini.py", "--output_dir", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [["--data_dir", "w"], ["--data_dir=w"], ["--data_di", "w"]], ids=str
)
def test_webvision_mini_takes_the_papers_schedule_with_data(given, tmp_path, monkeypatch):
    recipe = recipe_of(
        monkeypatch,
        "webvision_mini.py",
        "--output_dir",
        tmp_path,
        "--models",
        "test_resnet",
        *given,
    )

    def run(s, args, root, method):
        raise RuntimeError(f"{root}, {args.num_train_epochs:g} epochs")

    monkeypatch.setitem(recipe["main"].__globals__, "run", run)
    with pytest.raises(RuntimeError, match="w, 100 epochs"):
        recipe["main"]()


def test_webvision_mini_that_cannot_start_does_not_take_the_folder(tmp_path, monkeypatch):
    """One network cannot teach itself. The folder stays free for the corrected command."""
    argv = [
        "webvision_mini.py",
        "--output_dir",
        tmp_path,
        "--num_train_epochs",
        1,
        "--models",
        "test_resnet",
    ]
    with pytest.raises(ValueError, match="there is one network: pass at least two"):
        start(monkeypatch, *argv)
    assert not list(tmp_path.rglob("settings.json"))


def test_rows_that_the_benchmark_has_not(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"--rows \['lost'\]: .*import kd_plugins; noisy view"):
        start(
            monkeypatch,
            "experiments/benchmark.py",
            "--rows",
            "import",
            "lost",
            "--output",
            tmp_path / "b.json",
        )
    assert "import" not in capsys.readouterr().out


LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "-q", "--num_processes", "1", "--cpu"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "1"],
}
SHOWN = {  # all of stderr, or how the report of the launcher ends
    "accelerate": r"(The following values were not passed to.*\n(\t.*\n)*.*\n)?LINE\n",
    "torchrun": r"[\s\S]*Root Cause[\s\S]*exitcode  : 2 [\s\S]*\n  traceback : LINE\n=+\n+",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_users_error_is_one_line_however_the_recipe_is_started(launcher, tmp_path):
    """The launchers exit with code 1. torchrun shows the line last."""
    recipe = RECIPES / "cifar100_noise.py"
    command = [sys.executable, *LAUNCHERS[launcher], recipe, "--method", "cee"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    line = "unknown loss 'cee': did you mean .*"
    assert re.fullmatch(SHOWN[launcher].replace("LINE", line), done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--methd", "ce"], r"--methd ce: there is no such option; did you mean --method\?"),
        (["--method", "ce", "astray"], "astray: there is no such option"),
        (["--bf16", "maybe"], "argument --bf16: Truthy value expected: got maybe .*"),
        (["--milestones", "2"], r"milestones=\[2.0\]: expected rising shares.*"),
    ],
    ids=str,
)
def test_options_that_do_not_exist(argv, line, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=line):
        start(monkeypatch, "cifar100_noise.py", *argv)
    assert re.fullmatch(f"{line}\n", capsys.readouterr().err)


def test_commands_with_accelerate_are_quiet():
    """Without -q accelerate adds a traceback of its own to the line of the recipe."""
    root = RECIPES.parent
    for path in [*root.glob("*.md"), root / "Makefile", *RECIPES.rglob("*.*")]:
        if path.suffix in ("", ".md", ".py"):
            commands = re.findall(r"accelerate launch (?!--cpu).*recipes", path.read_text("utf-8"))
            assert all(" -q " in command for command in commands), path


def test_bugs_keep_their_traceback(capsys):
    """Only SystemExit with a message and errors raised by kd_plugins become one line."""
    for bug in (lambda: int("x"), lambda: torch.ones(2) @ torch.ones(3), lambda: sys.exit(3)):
        with pytest.raises((ValueError, RuntimeError, SystemExit)) as raised:
            run_main(bug)
        assert raised.value.args != (2,) and not capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        run_main(lambda: loss_class("cee"))
    assert raised.value.code == 2 and capsys.readouterr().err.startswith("unknown loss 'cee'")


@pytest.mark.parametrize("source", ["folder", "file"])
def test_finetune_mylc(source, tmp_path, pictures, monkeypatch, capsys):
    """A folder with the same classes keeps its head. A file with other classes gets a new head."""
    model = timm.create_model("test_resnet", num_classes=4 if source == "folder" else 7)
    folder = export(model, tmp_path / "pretrained", list("wxyz") if source == "folder" else None)
    given = ["--model", folder, "--prime", "True"]
    if source == "file":
        given = [
            "--model",
            "test_resnet",
            "--weights",
            folder / "model.safetensors",
            "--weights_classes",
            7,
        ]
    out = tmp_path / "out"
    argv = [
        "--data",
        pictures,
        "--rate",
        0.25,
        "--size",
        32,
        "--num_train_epochs",
        1,
        "--output_dir",
        out,
        *given,
    ]
    start(monkeypatch, "finetune_mylc.py", *argv)
    assert ("before training" in capsys.readouterr().out) == (source == "folder")
    assert 0 <= json.loads((out / "results.json").read_text())["eval_accuracy"] <= 1
    assert next(out.glob("checkpoint-*/loss.safetensors"))
    assert (out / "pictures" / "curves.png").exists()
    timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("test_resnet", r"--weights \S*gone.safetensors: expected a file; there is none"),
        (
            str(RECIPES),
            r"--weights \S*gone.safetensors --model \S*: expected a timm name; a folder has",
        ),
    ],
    ids=["missing", "of a folder"],
)
def test_weights_that_are_not_there(model, match, tmp_path, pictures, monkeypatch):
    argv = ["--data", pictures, "--model", model, "--weights", tmp_path / "gone.safetensors"]
    with pytest.raises(SystemExit, match=match):
        start(monkeypatch, "finetune_mylc.py", *argv, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_experiment_does_not_go_on_from_these_checkpoints(tmp_path, pictures, monkeypatch):
    """All methods share a default folder. smkd after ce would continue from ce's checkpoints."""
    argv = [
        "--data",
        pictures,
        "--models",
        "test_resnet",
        "--num_train_epochs",
        1,
        "--output_dir",
        tmp_path / "out",
    ]
    start(monkeypatch, "cifar100_noise.py", *argv, "--method", "ce")
    with pytest.raises(
        ValueError, match=r"holds a run with {'method': 'ce'}, asked for is {'method': 'mylc'}"
    ):
        start(monkeypatch, "cifar100_noise.py", *argv, "--method", "mylc")
    start(monkeypatch, "cifar100_noise.py", *argv, "--method", "ce")


def distil(monkeypatch, folder, pictures, *more):
    argv = [
        "--data",
        pictures,
        "--student",
        "test_resnet",
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        7,
    ]
    start(
        monkeypatch, "distill_teachers.py", *argv, "--holdout", 0.125, "--output_dir", folder, *more
    )
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    """Two exported networks of different kinds."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        export(timm.create_model(name, num_classes=4), folder / name)
        for name in ("test_resnet", "test_convnext")
    ]


TERMS = [
    ["--preset", "kd"],
    ["--preset", "camkd"],
    ["--preset", "lr_ds"],
    ["--preset", "crd"],
    ["--terms", "ce + 0.5*aekd + 100*fitnet + 1000*at + vid", "--keep", "0.5"],
    ["--terms", "ce + ebkd", "--cache", "True", "--augment", "False"],
]


@pytest.mark.parametrize("more", TERMS, ids=lambda m: m[1])
def test_distill_teachers(more, tmp_path, pictures, two_teachers, monkeypatch):
    figures = distil(monkeypatch, tmp_path / "out", pictures, "--teachers", *two_teachers, *more)
    assert 0 <= figures["eval_accuracy"] <= 1
    assert (tmp_path / "out" / "influence.npy").exists() == ("lr_ds" in more or "--keep" in more)
    assert (tmp_path / "out" / "cache").exists() == ("--cache" in more)
    saved = next((tmp_path / "out").glob("checkpoint-*/model.safetensors"))
    assert not any("teacher" in key for key in load_file(saved))


def test_a_teacher_does_not_see_what_is_held_out(tmp_path, pictures, monkeypatch):
    """cifar100_noise.py trains the teacher; with the same --holdout it sees the student's rows."""
    seen = []
    original = MutualDistillationTrainer.__init__

    def watch(self, *args, **kwargs):
        seen.append(kwargs["train_dataset"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(MutualDistillationTrainer, "__init__", watch)
    argv = ["--data", pictures, "--models", "test_resnet", "--method", "ce", "--noise", "none"]
    argv += ["--holdout", 0.125, "--augment", "False", "--num_train_epochs", 1, "--seed", 7]
    start(monkeypatch, "cifar100_noise.py", *argv, "--output_dir", tmp_path / "teacher")
    more = [
        "--teachers",
        tmp_path / "teacher" / "peer_a",
        "--augment",
        "False",
        "--preset",
        "lr_ds",
    ]
    distil(monkeypatch, tmp_path / "student", pictures, *more)
    teacher, student = seen
    assert len(teacher) == len(student) == 28
    assert all(
        a["pixel_values"].equal(b["pixel_values"]) for a, b in zip(teacher, student, strict=True)
    )


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--preset", "best"], "--preset best: expected one of kd, aver"),
        (["--holdout", 0], r"--holdout 0.0: expected a share"),
        (
            [
                "--terms",
                "ce + fitnet",
                "--teachers",
                "test_resnet",
                "--cache",
                "True",
                "--augment",
                "False",
            ],
            r"--terms ce \+ fitnet: expected .*logits \(they read \['teacher_features'\]\)",
        ),
        (
            ["--terms", "ce + aver", "--teachers", "test_resnet", "--cache", "True"],
            "--cache True --augment True",
        ),
        (
            ["--terms", "ce", "--cache", "True", "--augment", "False"],
            r"--terms ce: expected .* and terms on the teachers' logits \(they read \[\]\)",
        ),
        (
            ["--terms", "ce + kdd", "--teachers", "test_resnet"],
            "unknown loss 'kdd': did you mean kd",
        ),
        (
            ["--terms", "ce + x*kd", "--teachers", "test_resnet"],
            r"--terms ce \+ x\*kd: expected WEIGHT\*NAME",
        ),
        (["--terms", "ce + kd"], r"--terms ce \+ kd --keep 1.0: expected --teachers"),
        (
            ["--teachers", "runs/none"],
            "runs/none: expected a timm name, NAME=FILE or a folder that export",
        ),
        (
            ["--student", "resnet99", "--terms", "ce"],
            "resnet99: expected a timm name; there is no such network",
        ),
    ],
)
def test_distill_teachers_refuses(more, match, tmp_path, pictures, monkeypatch):
    """It is refused before it claims the folder, so the corrected command can use the folder."""
    with pytest.raises((SystemExit, ValueError), match=match):
        distil(monkeypatch, tmp_path / "out", pictures, *more)
    assert not (tmp_path / "out").exists()


def recipe_of(monkeypatch, recipe, *argv):
    """The names of a recipe that is not started. It reads this command line."""
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, argv)])
    return runpy.run_path(str(RECIPES / recipe))


@pytest.mark.parametrize("preset", [["--preset", "kd"], ["--preset=kd"], ["--pres", "kd"]], ids=str)
def test_a_preset_is_read_however_it_is_written(preset, monkeypatch):
    """A preset sets schedule and terms; explicit options win."""
    recipe = recipe_of(
        monkeypatch, "distill_teachers.py", "--teachers", "x", "--weight_decay", 0.1, *preset
    )
    s, args = recipe["options"]()
    assert (s.terms, args.num_train_epochs, args.lr_decay, args.weight_decay) == (
        "0.1*ce + 0.9*kd",
        240,
        0.1,
        0.1,
    )


def test_a_preset_without_a_name(monkeypatch):
    with pytest.raises(SystemExit, match="--preset: expected one argument"):
        recipe_of(monkeypatch, "distill_teachers.py", "--teachers", "x", "--preset")["options"]()


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Rows are chosen by part of their name. The JSON has figures, goals, hardware and versions."""
    rows = ["loss alone [128, 100], eager", "AEKD", "noisy view"]
    start(
        monkeypatch,
        "experiments/benchmark.py",
        "--quick",
        "--rows",
        *rows,
        "--output",
        tmp_path / "b.json",
    )
    out = json.loads((tmp_path / "b.json").read_text())
    assert (
        len(out["rows"]) == 4
        and {"torch", "timm", "kd-plugins"} <= set(out["versions"])
        and out["device"]
    )
    assert all(row["figure"] > 0 and row["goal"] > 0 for row in out["rows"].values())
    assert capsys.readouterr().out.count("| loss alone") == 1


def test_rows_of_the_benchmark_that_want_a_gpu(monkeypatch):
    """The parts that run without a GPU; every loss has a call."""
    monkeypatch.syspath_prepend(RECIPES / "experiments")
    from costs_of_losses import every_loss, peak_memory
    from costs_of_training import two_peers_on_one

    assert two_peers_on_one("eager", True)[0] > 0
    # each refined label and the sum of them is written down: one [B, C] each
    assert 1 <= peak_memory(64, 2000, torch.float32)[0] < 2
    assert 1 <= peak_memory(64, 2000, torch.bfloat16)[0] < 2
    values = []
    for _, loss, call in every_loss():
        loss.set_progress(0.5)
        values.append(call(loss))
    assert len(values) > 30 and all(value.isfinite() for value in values)


def test_train_heads(tmp_path, pictures, monkeypatch, capsys):
    """Features once, then heads by name; a second command trains only what is new."""
    network = timm.create_model("resnet10_cifar")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = f"resnet10_cifar={tmp_path / 'weights.pth'}"
    argv = ["train_heads.py", "--data", pictures, "--backbone", backbone]
    argv += ["--side", 32, "--seeds", 0, 1]
    argv += ["--features", tmp_path / "features", "--output_dir", tmp_path / "run"]
    argv += ["--num_train_epochs", 1, "--use_cpu", "True", "--noise", "symmetric:0.25"]
    start(monkeypatch, *argv, "--methods", "ce", "smkd:rho=auto,eta=1", "co_teaching", "elr")
    assert "| method | symmetric:0.25 |" in (out := capsys.readouterr().out)
    assert out.count("/8 symmetric:0.25") == 8
    assert (tmp_path / "run" / "results.png").stat().st_size > 5000
    log = tmp_path / "run" / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["wrong"] for row in rows} == {0.25}
    assert {row["method"] for row in rows} == {"ce", "smkd:rho=auto,eta=1", "co_teaching", "elr"}
    log.write_text(log.read_text()[:-20])  # a kill while the last line was written
    start(monkeypatch, *argv, "--methods", "ce", "elr", "gce:q=0.5")
    assert capsys.readouterr().out.count("/6 symmetric:0.25 ") == 3  # and none of the others
    with pytest.raises((TypeError, ValueError), match="did you mean q"):
        start(monkeypatch, *argv, "--methods", "gce:p=0.5")
