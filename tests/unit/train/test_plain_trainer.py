"""Losses in a plain HF Trainer: gradient, state, sizes, and what it cannot feed."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import (
    CLASSES,
    ROWS,
    Epochs,
    Recorder,
    difference,
    jitter,
    logged,
    plain,
    resnet,
    rows,
    soft,
    state,
    view,
    vit,
)
from safetensors.torch import load_file
from torch import nn

from kd_plugins import CE, SMKD, Joint, LabelSmoothing, Loss, MyLC, ProSelfLC, TRevision
from kd_plugins.train import ProgressCallback, as_compute_loss_func


class FromTeacher(Loss):
    def per_sample(self, logits, target, teacher):
        return (logits - teacher.mean(0)).square().sum(-1)


@pytest.mark.parametrize("labels", ["indices", "distributions"])
@pytest.mark.parametrize("windows", [1, 2])
def test_stock_trainer_takes_the_plain_gradient_under_accumulation(tmp_path, windows, labels):
    """A bare lambda would double the gradient with two accumulation steps. 44 rows: the last
    window is 8 + 4. The Trainer counts B * C items for distributions [B, C]."""
    seen, data = Recorder(), view(44, clean=False)
    train = data if labels == "indices" else soft(data)
    settings = {"num_train_epochs": 1, "gradient_accumulation_steps": windows}
    run = plain(tmp_path, LabelSmoothing(0.2), train=train, callbacks=[seen], **settings)
    run.train()
    assert [len(b["index"]) for b in seen.batches] == [8, 8, 8, 8, 8, 4]
    model, given = vit(), torch.stack([torch.as_tensor(row["labels"]) for row in train])
    values = []
    for first in range(0, 6, windows):
        parts = seen.batches[first : first + windows]
        x, index = (torch.cat([part[k] for part in parts]) for k in ("pixel_values", "index"))
        loss = F.cross_entropy(model(x).logits, given[index], label_smoothing=0.2)
        values.append(loss.item())
        for p, g in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            p.data -= 0.05 * g
    assert difference(state(run.model), state(model)) < 1e-5
    assert [value for [value] in logged(run, "loss")] == pytest.approx(values, rel=1e-3)


def test_stock_trainer_evaluation_leaves_the_loss_alone(tmp_path):
    loss = MyLC(window=20)
    run = plain(tmp_path, loss, num_train_epochs=1)
    run.train()
    before = state(loss)
    assert loss.r > 0
    run.evaluate(view(20, clean=False))
    assert difference(before, state(loss)) == 0
    run.train()
    assert difference(before, state(loss)) > 0  # and training goes on with it


def test_stock_trainers_do_not_share_a_loss_with_state(tmp_path):
    loss = MyLC(window=20)
    first, second = (plain(tmp_path, loss, max_steps=1) for _ in range(2))
    first.train()
    first.train()
    with pytest.raises(ValueError, match="this MyLC was trained by another Trainer"):
        second.train()
    again = plain(tmp_path, loss, max_steps=1)
    again.remove_callback(ProgressCallback)
    again.add_callback(first.pop_callback(ProgressCallback))  # one callback in two Trainers
    with pytest.raises(ValueError, match="this MyLC was trained by another Trainer"):
        again.train()


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda: CE(reduction="none"), "reduction='none', a value per sample"),
        (SMKD, "SMKD reads several networks.*use MutualDistillationTrainer"),
        (FromTeacher, "FromTeacher reads teacher, and a plain Trainer hands over"),
        (lambda: Joint(ROWS, CLASSES), "Joint reads index, and a plain Trainer hands over"),
        (nn.CrossEntropyLoss, "must be a kd_plugins loss, got CrossEntropyLoss"),
    ],
)
def test_stock_trainer_refuses_what_it_cannot_feed(loss, match):
    with pytest.raises((TypeError, ValueError), match=match):
        as_compute_loss_func(loss())


def test_stock_trainer_refuses_a_loss_that_would_not_learn(tmp_path):
    """Its optimizer has the parameters of the network only."""
    loss = TRevision(0.7 * torch.eye(CLASSES) + 0.1)
    with pytest.raises(
        ValueError, match="TRevision learns delta, and the optimizer of this Trainer"
    ):
        plain(tmp_path, loss).train()
    run = plain(tmp_path, loss, max_steps=2)
    run.optimizer = torch.optim.SGD([*run.model.parameters(), *loss.parameters()], lr=0.1)
    run.train()
    assert loss.delta.abs().max() > 0


def test_stock_trainer_resumes_bit_equal(tmp_path):
    def run(**kwargs):
        loss = MyLC(window=ROWS) + ProSelfLC()
        train = Epochs(rows(), jitter)
        settings = {"save_steps": 4, "logging_steps": 4} | kwargs
        return loss, train, plain(tmp_path, loss, resnet(), train, **settings)

    loss, data, whole = run(save_strategy="steps")
    whole.train()
    assert data.told == [0, 1]
    assert loss.terms[1].progress.value == pytest.approx(11 / 12)
    saved = load_file(tmp_path / "checkpoint-8" / "loss.safetensors")
    assert saved["terms.0.running.count"] == ROWS
    again, data, resumed = run()
    resumed.train(str(tmp_path / "checkpoint-8"))
    assert data.told == [1]
    assert difference(state(loss), state(again)) == 0
    assert difference(state(whole.model), state(resumed.model)) == 0
    (tmp_path / "checkpoint-8" / "loss.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8 cannot be.*loss\.safetensors is missing"):
        run()[2].train(str(tmp_path / "checkpoint-8"))
