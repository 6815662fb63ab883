"""The code of README and CONTRIBUTING runs as it stands; the commands exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from helpers.tiny import arguments, view

from kd_plugins import ProSelfLC

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """An empty folder, and what the first block defines: the data."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    run(0, names)
    return names


def run(number, names, change=lambda block: block):
    exec(compile(change(BLOCKS[number]), f"README.md, block {number}", "exec"), names)


def test_code_runs_in_order_as_it_stands(names):
    for number in range(1, len(BLOCKS)):
        run(number, names)


LOOPS = [number for number, block in enumerate(BLOCKS) if ".backward()" in block]


@pytest.mark.parametrize("number", LOOPS)
def test_loops_tell_the_epoch(number, names, monkeypatch):
    """Without set_epoch every epoch has the augmentation of the first."""
    told = []
    monkeypatch.setattr(type(names["train"]), "set_epoch", lambda self, epoch: told.append(epoch))
    run(number, names)
    assert told == [0, 1]


@pytest.mark.parametrize("number", LOOPS)
def test_the_loop_takes_a_loss_with_a_schedule(number, names):
    """It tells the progress before each step, of which there are as many as batches."""
    names["Told"] = Told
    run(number, names, lambda block: block.replace("GCE()", "Told()"))
    steps = 2 * len(names["loader"])
    assert names["criterion"].told == [k / steps for k in range(steps)]


class Told(ProSelfLC):
    """ProSelfLC, which refuses to run without a progress, and remembers it."""

    def __init__(self):
        super().__init__()
        self.told = []

    def set_progress(self, progress):
        super().set_progress(progress)
        self.told.append(progress)


def test_there_is_code():
    assert len(BLOCKS) >= 4 and len(LOOPS) == 1


def test_the_front_door_is_short():
    assert len(README.splitlines()) <= 150


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


RECIPES = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^(?:python|accelerate launch -q) (recipes/\w+\.py) (.*)$",
    re.sub(r" \\\n +", " ", RECIPES),  # one command over several lines
    re.MULTILINE,
)


@pytest.mark.parametrize(("recipe", "options"), COMMANDS)
def test_recipes_take_the_commands_of_their_readme(recipe, options, monkeypatch):
    """Every option is one of the recipe; what stands for a value of the reader's is filled in."""
    from transformers import TrainingArguments

    from kd_plugins import MutualTrainingArguments
    from kd_plugins.train import parse_settings

    values = {"METHOD": "ce", "MODELS": "resnet10_cifar", "SEED": "0", "RATE": "0.4", "$": ""}
    for name, value in values.items():
        options = options.replace(name, value)
    argv = [word for word in shlex.split(options) if word != "OPTIONS"]
    monkeypatch.setattr("sys.argv", [recipe, *argv])
    settings = runpy.run_path(str(ROOT / recipe))["Settings"]
    arguments = TrainingArguments if "finetune" in recipe else MutualTrainingArguments
    kinds = [settings] if "find_wrong" in recipe else [settings, arguments]
    assert parse_settings(*kinds, defaults={})[0].data


def test_there_are_commands():
    assert len(COMMANDS) == 11


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)


FAMILY = """
from collections.abc import Mapping, Sequence
from typing import Any, Unpack
import torch
from torch import Tensor, nn
from kd_plugins.losses import Loss, register_loss, validate
from kd_plugins.losses.base import LossArguments
from kd_plugins.losses.sizes import Sizes
from kd_plugins.losses.functional import cross_entropy
"""  # what the files of losses import


def test_the_losses_of_contributing_train(tmp_path, monkeypatch):
    """For one network, and for peers with features: as they stand, by their names alone."""
    from kd_plugins import MutualDistillationTrainer, create_loss
    from kd_plugins.losses import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for example in EXAMPLES:
        exec(FAMILY + example, {})
    for name, models in {
        "my_loss": ["test_resnet"],
        "my_peers": ["test_resnet", "resnet10_cifar"],
    }.items():
        loss = create_loss(name)
        trainer = MutualDistillationTrainer(
            models, loss, arguments(tmp_path / name), train_dataset=view()
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert logs[-1]["loss"] < logs[0]["loss"] and {"unweighted", "own_b"} & logs[0].keys()


def test_contributing_names_files_that_exist():
    for path in re.findall(r"`((?:kd_plugins|tests|recipes|docs)/[^`<]*\.\w+)`", CONTRIBUTING):
        assert (ROOT / path).exists(), path


def test_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
