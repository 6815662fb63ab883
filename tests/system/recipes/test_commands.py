"""Commands that are wrong, and what a user sees of it."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers.pictures import hub
from helpers.recipes import RECIPES, start

from kd_plugins import loss_class
from kd_plugins.train import run_main


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
            "resnet99: expected a timm name, NAME=FILE .*did you mean resnet",
        ),
        (
            ["--models", RECIPES],
            ValueError,
            ".*recipes: expected a timm name, NAME=FILE",
        ),  # trained ones are not asked for
        (
            ["--estimator", "anker"],
            SystemExit,
            "--estimator anker: expected anchor, dual_t or known",
        ),
        (
            ["--label", "fin_label"],
            ValueError,
            "label 'fin_label': expected the name of one ClassLabel column, here label",
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
        match="no label column was named: expected the name of one ClassLabel column, here fine",
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
