"""A network that is certain of few classes whatever it sees is noticed, and no other is."""

import pytest
import torch
from helpers.tiny import CLASSES, Net, trainer, view

from kd_plugins.train import collapse as module
from kd_plugins.train.collapse import collapse

LABELS = torch.arange(40) % 10


def test_a_collapsed_network_by_hand():
    logits = torch.zeros(40, 10)
    logits[:, 3] = 30.0
    predicted, given, certain = collapse(logits, LABELS)
    assert (predicted, given, certain) == pytest.approx((1.0, 10.0, 1.0), abs=1e-4)
    logits[20:] = logits[20:].roll(1, 1)
    assert collapse(logits, LABELS)[0] == pytest.approx(2.0, abs=1e-4)
    assert collapse(logits, torch.eye(10)[LABELS]) == pytest.approx(collapse(logits, LABELS))


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(40, 10),  # knows nothing
        30.0 * torch.eye(10)[LABELS],  # certain of the right classes
        30.0 * torch.eye(10)[LABELS.roll(1)],  # certain of wrong ones, but of all of them
        0.3 * torch.eye(10)[torch.full((40,), 3)],  # leans to one class, without certainty
    ],
)
def test_not_collapsed(logits):
    assert collapse(logits, LABELS) is None


def test_few_classes_in_the_batch_are_no_collapse():
    logits = 30.0 * torch.eye(10)[torch.full((40,), 3)]
    assert collapse(logits, torch.full((40,), 3)) is None
    assert collapse(logits, torch.tensor([3, 4]).repeat(20)) is None


@pytest.mark.parametrize("collapsed", [True, False])
def test_the_trainer_says_it_once_and_names_the_network(tmp_path, monkeypatch, collapsed):
    said, networks = [], [Net(1), Net(2)]
    monkeypatch.setattr(module.logger, "warning", said.append)
    if collapsed:
        torch.nn.init.zeros_(networks[1].fc.weight)
        networks[1].fc.bias.data = 60.0 * torch.eye(CLASSES)[0]
    run = trainer(tmp_path, networks, train=view(24), learning_rate=1e-6, logging_steps=1)
    run.train()
    assert len(said) == collapsed
    if collapsed:
        assert said[0].startswith("network b has collapsed at step ")
