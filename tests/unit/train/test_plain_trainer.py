"""Losses in a plain HF Trainer: gradient, state, sizes, and what it cannot feed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import (
    CLASSES,
    ROWS,
    Epochs,
    Net,
    Recorder,
    arguments,
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
from transformers import Trainer, TrainingArguments

from kd_plugins import (
    AT,
    CE,
    KD,
    SMKD,
    Joint,
    LabelSmoothing,
    MutualDistillationTrainer,
    MyLC,
    ProSelfLC,
    TRevision,
    TruncatedGCE,
)
from kd_plugins.data import cache_teachers
from kd_plugins.train import ProgressCallback, as_compute_loss_func


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


def test_stock_trainers_in_turn_train_one_network(tmp_path):
    """The callback of the first must not take away what the loss of the second reads."""
    network, settings = resnet(), {"remove_unused_columns": False}
    stock(tmp_path, CE(), network, **settings).train()
    loss = Joint()
    stock(tmp_path, loss, network, **settings).train()
    assert loss.outputs.rows.any() and len(network._forward_pre_hooks) == 1


def test_stock_trainer_refuses_smoothing_that_would_have_no_effect(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 has no effect.*Smoothing"):
        plain(tmp_path, CE(), max_steps=1, label_smoothing_factor=0.1).train()


def test_stock_trainers_do_not_share_a_part_of_a_loss(tmp_path):
    part = MyLC(window=20)
    plain(tmp_path, 0.5 * part + CE(), max_steps=1).train()
    with pytest.raises(ValueError, match="this MyLC was trained by another Trainer"):
        plain(tmp_path, 0.2 * part + CE(), max_steps=1).train()


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda: CE(reduction="none"), "reduction='none', a value per sample"),
        (SMKD, "SMKD teaches several networks.*use MutualDistillationTrainer"),
        (AT, "AT reads features and teacher_features, maps from.*use MutualDistillationTrainer"),
        (nn.CrossEntropyLoss, "must be a kd_plugins loss, got CrossEntropyLoss"),
    ],
)
def test_stock_trainer_refuses_what_it_cannot_feed(loss, match):
    with pytest.raises((TypeError, ValueError), match=match):
        as_compute_loss_func(loss())


def stock(folder, loss, model, teachers=(), train=None, callbacks=None, **kwargs):
    """A Trainer as a user makes it: nothing is set but what the loss needs."""
    return Trainer(
        model,
        arguments(folder, TrainingArguments, **{"max_steps": 4, "optim": "sgd"} | kwargs),
        train_dataset=view(clean=False) if train is None else train,
        compute_loss_func=as_compute_loss_func(loss, teachers=teachers),
        callbacks=[ProgressCallback(loss)] if callbacks is None else callbacks,
    )


def teacher(seed=7, **cfg):
    """A network in training mode, with dropout, that expects other pictures than the student."""
    network = Net(seed, dropout=0.5, bn=True)
    network.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3)} | cfg
    return network


def expecting(model):
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_stock_trainer_distils_as_our_trainer_does(tmp_path, settings):
    """Frozen, in eval mode, on inputs that are normalised for them, in the precision of the run."""
    settings |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 4}
    teachers, student = [teacher(7), teacher(8)], expecting(resnet())
    before = [state(t) for t in teachers]
    run = stock(tmp_path / "plain", CE() + KD(), student, teachers, **settings)
    run.train()
    args = arguments(tmp_path / "ours", TrainingArguments, optim="sgd", **settings)
    own, data = expecting(resnet()), view(clean=False)
    ours = MutualDistillationTrainer(own, CE() + KD(), args, teachers=teachers, train_dataset=data)
    ours.train()
    assert difference(state(student), state(own)) < 1e-5
    assert np.allclose(logged(run, "loss"), logged(ours, "loss"), rtol=1e-3)
    assert [difference(state(t), b) for t, b in zip(teachers, before, strict=True)] == [0, 0]
    assert all(module.training for t in teachers for module in t.modules())
    assert all(p.grad is None and p.requires_grad for t in teachers for p in t.parameters())


def test_stock_trainer_reads_the_index_of_the_rows(tmp_path):
    """A ResNet's forward refuses the keyword ``index``: the loss gets it, the network does not."""
    loss, settings = Joint(), {"remove_unused_columns": False, "num_train_epochs": 2}
    run = stock(tmp_path, loss, resnet(), max_steps=-1, **settings)
    before = run.evaluate(view(20, clean=False))["eval_loss"]  # also before there was any training
    run.train()
    assert loss.num_samples == ROWS and loss.outputs.rows.any(1).all()
    moved = state(loss)
    data = view(20, clean=False)
    after = run.evaluate(data)["eval_loss"]
    pixels, labels = (torch.stack([torch.as_tensor(row[k]) for row in data]) for k in KEYS)
    with torch.no_grad():
        plain_loss = F.cross_entropy(run.model.eval()(pixels).logits, labels)
    assert after == pytest.approx(plain_loss.item(), rel=1e-4) and after != before
    assert difference(moved, state(loss)) == 0
    torch.save(run.model, tmp_path / "whole.pt")  # what the callback leaves in it can be pickled


KEYS = ("pixel_values", "labels")


def test_stock_trainers_that_share_a_loss_read_their_own_rows(tmp_path):
    """One that evaluates, made between two trainings of the other, does not take its batches."""
    seen = []

    class Watching(CE):
        def per_sample(self, logits, target, index):
            seen.append((index.clone(), target.argmax(-1)))
            return super().per_sample(logits, target)

    loss, network, data = Watching(), vit(), view(clean=False)
    first = plain(tmp_path, loss, network, data, num_train_epochs=1)
    first.train()
    second = plain(tmp_path / "other", loss, network, data)
    second.evaluate(data)
    first.train()
    labels = torch.tensor(data.labels)
    assert len(seen) > 2 and all((labels[index] == target).all() for index, target in seen)


def test_stock_trainer_reads_cached_teachers(tmp_path):
    """The same training as with the teachers beside it."""
    teachers, models = [teacher(), Net(3)], [resnet(), resnet()]
    data = view(clean=False)
    cached = cache_teachers(data, teachers, tmp_path / "cache", student=models[0])
    stock(tmp_path / "a", CE() + KD(), models[0], teachers).train()
    columns = {"remove_unused_columns": False}
    stock(tmp_path / "b", CE() + KD(), models[1], train=cached, **columns).train()
    assert difference(state(models[0]), state(models[1])) < 1e-5


@pytest.mark.parametrize(
    ("loss", "settings", "match"),
    [
        (CE() + KD(), {}, "reads teacher, and there are no teachers: pass teachers="),
        (CE(), {"teachers": [Net(1)]}, "CE does not read teacher: the 1 teachers would run for"),
        (CE() + KD(), {"teachers": [Net(1, classes=5)]}, "different numbers of classes"),
        (TruncatedGCE(), {}, "TruncatedGCE reads index.*remove_unused_columns=False"),
        (
            CE() + KD(),
            {"teachers": [Net(1)], "callbacks": []},
            r"reads teacher.*ProgressCallback\(",
        ),
        (
            Joint(ROWS, CLASSES),
            {"train": [{k: row[k] for k in KEYS} for row in view(clean=False)]}
            | {"remove_unused_columns": False},
            "Joint reads index, and the batch has only .*'pixel_values'.: the rows need",
        ),
    ],
)
def test_stock_trainer_says_what_is_missing(tmp_path, loss, settings, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        stock(tmp_path, loss, resnet(), **settings).train()


def test_stock_trainer_resumes_with_its_teachers_only(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    stock(tmp_path, CE() + KD(), resnet(), [teacher()], **saving).train()
    other = stock(tmp_path, CE() + KD(), resnet(), [teacher(9)], **saving)
    with pytest.raises(ValueError, match=r"teacher 0\.weights was .* and is now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same = stock(tmp_path, CE() + KD(), resnet(), [teacher()], **saving)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_stock_trainer_refuses_a_loss_that_would_not_learn(tmp_path):
    """Its optimizer has the parameters of the network only."""
    loss = TRevision(0.7 * torch.eye(CLASSES) + 0.1)
    with pytest.raises(ValueError, match="TRevision learns delta, and the optimizer has the"):
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
