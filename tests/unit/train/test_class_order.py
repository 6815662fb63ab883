"""Networks whose classes are those of the data in another order, by their names."""

import logging

import numpy as np
import pytest
import torch
from helpers.tiny import arguments
from torch import nn
from transformers import Trainer, TrainingArguments

from kd_plugins import CE, KD, predict_probs
from kd_plugins.data import FeatureView
from kd_plugins.data.labels import refuse_other_order
from kd_plugins.train import MutualDistillationTrainer, ProgressCallback, as_compute_loss_func

NAMES, OTHER = ["cat", "dog", "fox"], ["fox", "cat", "dog"]


class Linear(nn.Module):
    """Feature k lights class k of NAMES."""

    num_classes = 3

    def __init__(self, names=None):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        if names is not None:
            self.pretrained_cfg = {"label_names": names}
            self.fc.weight.data = 20 * torch.eye(3)

    def forward(self, pixel_values):
        return self.fc(pixel_values)


def data(names):
    labels = np.arange(30) % 3
    features = np.eye(3, dtype=np.float32)[[NAMES.index(names[label]) for label in labels]]
    return FeatureView(features, labels, class_names=names)


def test_a_teacher_in_another_order_is_refused_and_in_the_same_order_teaches(tmp_path):
    loss, teacher = 0.1 * CE() + 0.9 * KD(), Linear(NAMES)
    view = data(OTHER)
    assert (predict_probs(teacher, view).argmax(1) == view.labels).all()  # matched by name
    with pytest.raises(ValueError, match=r"teacher 0 in another order: class 0 is 'fox'.*'cat'"):
        MutualDistillationTrainer(
            Linear(), loss, arguments(tmp_path), teachers=[teacher], train_dataset=view
        )
    args = arguments(tmp_path, num_train_epochs=8, learning_rate=0.5)
    same = data(NAMES)
    run = MutualDistillationTrainer(
        Linear(), loss, args, teachers=[teacher], train_dataset=same, eval_dataset=same
    )
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1.0


def test_a_plain_trainer_refuses_such_a_teacher(tmp_path):
    loss = CE() + KD()
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    run = Trainer(
        Linear(),
        args,
        train_dataset=data(OTHER),
        compute_loss_func=as_compute_loss_func(loss, [Linear(NAMES)]),
        callbacks=[ProgressCallback(loss)],
    )
    with pytest.raises(ValueError, match=r"teacher 0 in another order"):
        run.train()


def test_a_network_that_is_only_evaluated_is_refused_and_one_that_learns_is_named(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    args, view = arguments(tmp_path), data(OTHER)
    with pytest.raises(ValueError, match=r"network a in another order"):
        MutualDistillationTrainer(Linear(NAMES), CE(), args, eval_dataset=view)
    assert not caplog.records
    MutualDistillationTrainer(Linear(NAMES), CE(), args, train_dataset=view, eval_dataset=view)
    assert any("network a in another order" in record.message for record in caplog.records)


@pytest.mark.parametrize("names", [None, NAMES, ["0", "1", "2"], ["a", "b", "c"], NAMES[:2]])
def test_other_names_are_left_to_the_user(names):
    refuse_other_order({"teacher 0": Linear(names)}, data(NAMES))
    refuse_other_order({"teacher 0": Linear(names)}, None)


def test_data_in_another_order_are_refused_also_after_training(tmp_path):
    run = MutualDistillationTrainer(Linear(), CE(), arguments(tmp_path), train_dataset=data(NAMES))
    alone = MutualDistillationTrainer(Linear(NAMES), CE(), arguments(tmp_path / "alone"))
    for trainer in (run, alone):
        trainer.evaluate(data(NAMES))
        for call in (trainer.evaluate, trainer.predict):
            with pytest.raises(ValueError, match="in another order"):
                call(data(OTHER))
