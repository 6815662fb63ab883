"""The README's code is executed as it stands, and its table of methods is the registry's."""

import re
import runpy
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers.tiny import arguments, view
from torch import nn
from torchvision import transforms as T

from kd_plugins import ProSelfLC

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def network(classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a reader of the README would have: two networks, pictures, an optimizer."""
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

    from kd_plugins import ImageView, MutualTrainingArguments

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = {
        "image": list(rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)),
        "label": [i % 10 for i in range(20)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {k}" for k in range(10)]),
        }
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    transform = T.Compose([T.RandomHorizontalFlip(), T.ToTensor()])
    train = ImageView(dataset, transform)
    model = network()
    vit = ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=10,
    )
    import kd_plugins.models  # noqa: F401  the registered resnet10_cifar

    torch.manual_seed(0)
    student, t1, t2 = (timm.create_model("resnet10_cifar", num_classes=10) for _ in range(3))
    return {
        "student": student,
        "t1": t1,
        "t2": t2,
        "fixed_train": ImageView(dataset, T.ToTensor()),
        "a": network(),
        "b": network(),
        "model": model,
        "vit": ViTForImageClassification(vit),
        "dataset": dataset,
        "transform": transform,
        "train": train,
        "test": train,
        "held_out": train,
        "loader": torch.utils.data.DataLoader(train, batch_size=5),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "human_labels": [(k + 1) % 10 for k in range(20)],
        "args": MutualTrainingArguments("pair", num_train_epochs=1, report_to="none"),
        "hf_args": TrainingArguments("plain", num_train_epochs=1, report_to="none", use_cpu=True),
    }


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs_as_it_stands(number, names):
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)


@pytest.mark.parametrize("number", [k for k, b in enumerate(BLOCKS) if ".backward()" in b])
def test_loops_tell_the_epoch(number, names, monkeypatch):
    """Without set_epoch every epoch has the augmentation of the first."""
    told = []
    monkeypatch.setattr(type(names["train"]), "set_epoch", lambda self, epoch: told.append(epoch))
    exec(BLOCKS[number], names)
    assert told == [0, 1]


def test_the_loop_takes_a_loss_with_a_schedule(names):
    """It tells the progress before each step: 20 pictures, 2 epochs, 8 steps in all."""
    loop = next(block for block in BLOCKS if "criterion.prime" in block)
    loop = loop.replace("MyLC(window=len(train))", "Told()").replace("criterion.prime", "id")
    names["Told"] = Told
    exec(loop.replace("id(model, loader)", "id(model)"), names)
    assert names["criterion"].told == [k / 8 for k in range(8)]


class Told(ProSelfLC):
    """ProSelfLC, which refuses to run without a progress, and remembers it."""

    def __init__(self):
        super().__init__()
        self.told = []

    def set_progress(self, progress):
        super().set_progress(progress)
        self.told.append(progress)


def test_there_is_code():
    assert len(BLOCKS) >= 6


def test_methods_are_the_registry():
    """`python -m kd_plugins.audit.plots README.md` writes it; a loss that is registered and not in it fails here."""
    from kd_plugins.audit.plots import methods

    assert methods() in README


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

    for name, value in {"METHOD": "ce", "MODELS": "resnet10_cifar", "SEED": "0", "$": ""}.items():
        options = options.replace(name, value)
    argv = [word for word in shlex.split(options) if word != "OPTIONS"]
    monkeypatch.setattr("sys.argv", [recipe, *argv])
    settings = runpy.run_path(str(ROOT / recipe))["Settings"]
    arguments = TrainingArguments if "finetune" in recipe else MutualTrainingArguments
    kinds = [settings] if "find_wrong" in recipe else [settings, arguments]
    assert parse_settings(*kinds, defaults={})[0].data


def test_there_are_commands():
    assert len(COMMANDS) == 9


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)


FAMILY = """
from collections.abc import Mapping, Sequence
from typing import Any, Unpack
import torch
from torch import Tensor, nn
from kd_plugins.losses import Loss, register_loss, validate
from kd_plugins.losses.base import LossArguments, Sizes
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
