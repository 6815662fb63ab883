"""The Trainer: a run is a plain loop, what it logs, precision, compiling, NaN."""

import copy
import dataclasses
import json
import logging
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.tiny import (
    CLASSES,
    ROWS,
    Net,
    Recorder,
    difference,
    logged,
    rows,
    state,
    to_tensor,
    trainer,
    view,
    vit,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from kd_plugins import (
    CE,
    KD,
    MKD,
    SMKD,
    Joint,
    LabelSmoothing,
    Loss,
    Mutual,
    MyLC,
    ProSelfLC,
    SelectNone,
    SoftLabels,
)
from kd_plugins.data import ImageView
from kd_plugins.losses import validate
from kd_plugins.models.factory import network_list
from kd_plugins.train import MutualTrainingArguments, as_compute_loss_func, last_checkpoint


class FromTeacher(Loss):
    def per_sample(self, logits, target, teacher):
        return (logits - teacher.mean(0)).square().sum(-1)


def replay(batches, models, loss, lrs, momentum=0.9, weight_decay=5e-4):
    """The run again as a plain loop: same batches, torch's own SGD. Returns what the loss
    reported, per step."""
    params = [p for m in models for p in m.parameters()]
    optimizer = torch.optim.SGD(params, lr=1.0, momentum=momentum, weight_decay=weight_decay)
    reports = []
    for step, (batch, lr) in enumerate(zip(batches, lrs, strict=True)):
        loss.set_progress(step / len(batches))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        value = loss(tuple(m(batch["pixel_values"]) for m in models), batch["labels"])
        value.backward()
        optimizer.step()
        report = {"loss": value.item()} | {k: v.item() for k, v in loss.stats.items()}
        for peer, (mask, taught) in zip("abc", loss.selection, strict=False):
            right = mask & (taught.argmax(-1) == batch["clean_labels"])
            report[f"selected_right_{peer}"] = right.float().mean().item()
        reports.append(report)
    return reports


def test_run_is_a_plain_loop_and_logs_means_of_its_steps(tmp_path):
    """SMKD-P + MyLC on two peers equals ten lines of PyTorch; a log says the mean since the log
    before, not the last step."""
    seen = Recorder()
    run = trainer(tmp_path, logging_steps=4, logging_first_step=False, hf={"callbacks": [seen]})
    run.train()
    models, loss = [Net(1), Net(2)], SMKD(MyLC(window=ROWS), eta=1.5, b2=-4, normalize="batch")
    reports = replay(seen.batches, models, loss, [0.05] * 6 + [0.01] * 6)
    for theirs, ours in zip(run.peers, models, strict=True):
        assert difference(state(theirs), state(ours)) < 1e-5
    assert difference(state(run.model.criterion), state(loss)) < 1e-6

    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [4, 8, 12]
    keys = {
        f"{name}_{peer}"
        for name in ("own", "taught", "selected", "right", "mean_certainty", "eps")
        for peer in "ab"
    }
    always = {"threshold", "loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert logs[0].keys() == keys | always
    for i, log in enumerate(logs):
        part = reports[4 * i : 4 * i + 4]
        mean = {name: sum(report[name] for report in part) / 4 for name in part[0]}
        for peer in "ab":
            mean[f"right_{peer}"] = mean.pop(f"selected_right_{peer}") / mean[f"selected_{peer}"]
        for name, value in mean.items():
            assert log[name] == pytest.approx(value, rel=2e-4), name
    spread = [report["own_a"] for report in reports[:4]]
    assert max(spread) > 1.01 * min(spread)  # else a mean and the last step could not be told apart
    assert 0 < logs[1]["selected_a"] < 1


def test_nothing_selected_leaves_the_purity_out(tmp_path):
    run = trainer(tmp_path, loss=Mutual(CE(), SelectNone()), num_train_epochs=1)
    run.train()
    assert logged(run, "selected_a") == [[0.0]] * 6
    assert not [key for log in run.state.log_history for key in log if key.startswith("right_")]


def test_sum_of_mutual_losses_reports_its_purity(tmp_path):
    """The terms of a sum prefix what they report; the purity must not stumble over that."""
    loss = SMKD(CE(), eta=0.5, b2=0) + 0.5 * MKD()
    run = trainer(tmp_path, loss=loss, num_train_epochs=1)
    run.train()
    noisy = np.mean(
        [row["label"] == row["clean"] for row in rows()]
    )  # everything is selected, and is taught as labelled
    assert np.mean(logged(run, "right_a")) == pytest.approx(noisy)


def test_one_network(tmp_path):
    seen = Recorder()
    run = trainer(
        tmp_path,
        Net(1),
        LabelSmoothing(0.2),
        evaluate=view(20),
        num_train_epochs=1,
        hf={"callbacks": [seen]},
    )
    run.train()
    model, rates = Net(1), [0.05] * 3 + [0.01] * 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for batch, rate in zip(seen.batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(
            model(batch["pixel_values"]), batch["labels"], label_smoothing=0.2
        ).backward()
        optimizer.step()
    assert difference(state(run.peers[0]), state(model)) < 1e-6
    metrics = run.evaluate()
    assert "eval_accuracy" in metrics
    assert not [key for key in metrics if key.endswith(("_a", "_ensemble"))]


def test_three_peers_of_three_libraries(tmp_path):
    """A timm network, one of transformers and a module of one's own, with three input sizes."""
    models = [timm.create_model("test_resnet", num_classes=CLASSES), vit(), Net(3)]
    before = [state(m) for m in models]
    run = trainer(
        tmp_path,
        models,
        SMKD(MyLC(window=ROWS), eta=0.9, b2=0, num_peers=3),
        train=view(16),
        evaluate=view(8),
        num_train_epochs=1,
        learning_rate=0.01,
    )
    run.train()
    assert all(difference(a, state(m)) > 0 for a, m in zip(before, models, strict=True))
    assert logged(run, "selected_a", "selected_b", "selected_c") == [[1.0] * 3] * 2
    assert {
        "eval_accuracy_a",
        "eval_accuracy_b",
        "eval_accuracy_c",
        "eval_accuracy_ensemble",
    } <= run.evaluate().keys()
    folders = run.export()
    assert [f.name for f in folders] == ["peer_a", "peer_b", "peer_c"]
    assert all((f / "model.safetensors").exists() and (f / "README.md").exists() for f in folders)


def test_teachers_in_a_run(tmp_path):
    teacher, seen = Net(5, bn=True), Recorder()
    before = state(teacher)
    loss = CE() + 0.5 * FromTeacher()
    run = trainer(
        tmp_path, Net(1), loss, num_train_epochs=1, hf={"teachers": [teacher], "callbacks": [seen]}
    )
    run.train()
    assert difference(before, state(teacher)) == 0
    assert teacher.training  # handed back as it came
    teacher.eval()
    model, batch = Net(1), seen.batches[0]
    x, y = batch["pixel_values"], batch["labels"]
    first = F.cross_entropy(model(x), y) + 0.5 * (model(x) - teacher(x)).square().sum(-1).mean()
    assert logged(run, "loss")[0][0] == pytest.approx(first.item(), rel=1e-5)


def test_one_teacher_needs_no_list(tmp_path):
    """A name is not read letter by letter, and the layers of a network are not its teachers."""
    stacked = nn.Sequential(Net(1), nn.Identity())
    weights = timm.create_model("resnet10_cifar", num_classes=CLASSES).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    for one in (Net(1), f"resnet10_cifar={tmp_path / 'weights.safetensors'}", stacked):
        assert len(trainer(tmp_path, Net(2), CE() + KD(), hf={"teachers": one}).model.teachers) == 1
        assert len(network_list(one)) == len(as_compute_loss_func(CE() + KD(), one).teachers) == 1
    assert len(network_list(nn.ModuleList([Net(1), Net(2)]))) == 2
    assert len(trainer(tmp_path, stacked, CE()).peers) == 1


def test_names_need_the_number_of_classes_and_are_seeded(tmp_path):
    with pytest.raises(ValueError, match=r"'resnet10_cifar'.*number of classes is not known"):
        trainer(tmp_path, ["resnet10_cifar"], CE(), train=[view()[0]])
    a, b, c = [
        trainer(tmp_path, ["resnet10_cifar"] * 2, Mutual(CE(), SelectNone()), seed=s).model
        for s in (3, 3, 4)
    ]
    assert difference(state(a), state(b)) == 0
    assert difference(state(a), state(c)) > 0
    assert difference(state(a.peers[0]), state(a.peers[1])) > 0


def test_broken_pictures_are_named_at_the_end(tmp_path, caplog):
    data = rows()
    data[5]["image"] = b"no picture"
    data[7]["image"] = str(tmp_path / "gone.jpg")
    train = ImageView(data, to_tensor, clean="clean", max_broken=0.1)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, train=train, evaluate=view(8), num_train_epochs=1).train()
    [message] = [
        record.getMessage()
        for record in caplog.records
        if record.name == "kd_plugins.train.trainer"
    ]
    assert message.startswith("2 pictures of the train data")
    assert "row 5" in message
    assert "gone.jpg" in message


def test_second_stage_after_a_picture_that_cannot_be_read(tmp_path):
    data = rows()
    data[5]["image"] = b"no picture"
    train = ImageView(data, to_tensor, max_broken=0.1)
    first = Joint()
    trainer(tmp_path / "1", [Net(1)], first, train=train, num_train_epochs=1).train()
    with pytest.raises(ValueError, match=f"1 of {ROWS} samples were not seen"):
        first.soft_labels()
    labels = first.soft_labels(train.labels)
    assert labels[5].argmax() == train.labels[5] and labels[5].max() == 1
    second = SoftLabels(labels)
    trainer(tmp_path / "2", [Net(2)], second, train=train, num_train_epochs=1).train()


def test_bar_is_short_and_the_log_is_full(tmp_path, capfd):
    run = trainer(
        tmp_path, evaluate=view(8), num_train_epochs=1, eval_strategy="epoch", disable_tqdm=False
    )
    run.train()
    printed = "".join(capfd.readouterr())
    for name in (
        "'loss'",
        "'threshold'",
        "'selected_a'",
        "'right_b'",
        "'eval_accuracy'",
        "'eval_loss'",
        "'eval_memorised'",
    ):
        assert name in printed
    for name in ("own_a", "eps_b", "taught_a", "grad_norm", "eval_corrected_a"):
        assert name not in printed
        assert any(name in log for log in run.state.log_history)


class Table(TrainerCallback):
    """Like the Trainer's table in a notebook, which makes a column of each figure it is given."""

    columns: ClassVar = set()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.columns.update(metrics)


def test_table_in_a_notebook_has_few_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", Table)
    run = trainer(tmp_path, evaluate=view(8), max_steps=1, disable_tqdm=False)
    figures = run.evaluate()
    wanted = {"epoch", "eval_loss", "eval_accuracy", "eval_accuracy_ensemble", "eval_memorised"}
    assert Table.columns == wanted and len(figures) > 15


def test_a_loss_with_state_does_not_carry_it_into_another_trainer(tmp_path):
    """One that was primed, one that trains again in its Trainer and one that is restored go on."""
    loss = SMKD(MyLC(window=ROWS), eta=1.5)
    run = trainer(tmp_path, loss=loss, num_train_epochs=1, save_strategy="steps", save_steps=6)
    loss.prime(run.peers, run.get_train_dataloader())
    run.train()
    run.train()
    with pytest.raises(ValueError, match="this SMKD was trained by another Trainer, and its state"):
        trainer(tmp_path / "next", loss=loss, num_train_epochs=1).train()
    with pytest.raises(ValueError, match="this SMKD was trained by another Trainer"):
        trainer(tmp_path / "next", loss=copy.deepcopy(loss), num_train_epochs=1).train()
    trainer(tmp_path, loss=loss, num_train_epochs=1).train(resume_from_checkpoint=True)
    fresh = SMKD(MyLC(window=ROWS), eta=1.5)
    fresh.load_state_dict(loss.state_dict())
    trainer(tmp_path / "next", loss=fresh, num_train_epochs=1).train()
    stateless = CE()
    for _ in range(2):
        trainer(tmp_path / "next", Net(1), stateless, max_steps=1).train()


def test_accumulation_changes_nothing(tmp_path):
    """8x1 = 2x4 = 1x8 where the loss is a mean over the batch; 44 rows: the last window is a short
    one."""

    def run(size, windows, normalize="batch"):
        loss = SMKD(ProSelfLC(b1=4.0), eta=1.5, b2=-4, normalize=normalize)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": windows}
        made = trainer(tmp_path, loss=loss, train=view(44), num_train_epochs=1, **settings)
        made.train()
        return made

    whole = run(8, 1)
    assert whole.model_accepts_loss_kwargs is False  # transformers before 5.19 looks at this alone
    selected = np.array(logged(whole, "selected_a"))
    assert ((selected > 0) & (selected < 1)).any()
    for size, windows in ((2, 4), (1, 8)):
        cut = run(size, windows)
        assert difference(state(cut.model), state(whole.model)) < 1e-5
        assert np.allclose(logged(cut, "loss"), logged(whole, "loss"), atol=1e-4)
        assert np.allclose(
            logged(cut, "selected_a", "own_b"), logged(whole, "selected_a", "own_b"), atol=1e-4
        )
    uneven = [run(size, windows, "selected") for size, windows in ((8, 1), (2, 4))]
    assert (
        difference(state(uneven[0].model), state(uneven[1].model)) > 1e-3
    )  # the paper's mean is over what was selected


def test_bf16_agrees_with_float32(tmp_path):
    """Within 5 % of the loss and 0.02 in the weights after six steps; the loss itself is computed
    in float32."""
    dtypes = []

    def run(**kwargs):
        loss = SMKD(MyLC(window=ROWS), eta=0.9, b2=0, normalize="batch")
        loss.register_forward_hook(
            lambda _, args, out: dtypes.append(
                (args[0][0].dtype, out.dtype, loss.stats["own_a"].dtype)
            )
        )
        made = trainer(
            tmp_path, loss=loss, num_train_epochs=1, evaluate=view(20), learning_rate=0.02, **kwargs
        )
        made.train()
        return made, made.evaluate()["eval_loss"]

    (full, full_loss), count = run(), len(dtypes)
    half, half_loss = run(bf16=True)
    assert set(dtypes[:count]) == {(torch.float32,) * 3}
    assert set(dtypes[count:]) == {(torch.bfloat16, torch.float32, torch.float32)}
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert 0 < difference(state(half.model), state(full.model)) < 0.02
    assert half_loss == pytest.approx(full_loss, rel=0.05)
    assert np.allclose(logged(half, "loss"), logged(full, "loss"), rtol=0.05)


def test_compiled_is_eager_and_compiles_once(tmp_path):
    """A schedule kept as a Python float would compile anew at every step."""
    eager = trainer(tmp_path, num_train_epochs=1)
    eager.train()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = trainer(
            tmp_path,
            num_train_epochs=1,
            torch_compile=True,
            torch_compile_backend="aot_eager",
            save_strategy="steps",
            save_steps=6,
        )
        torch._dynamo.utils.counters.clear()
        compiled.train()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert difference(state(compiled.model), state(eager.model)) < 1e-5
    names = ("loss", "own_a", "selected_b", "mean_certainty_a", "threshold", "right_a")
    assert np.allclose(
        logged(compiled, *names[:-1]), logged(eager, *names[:-1]), rtol=1e-3, atol=1e-4
    )
    assert not [
        name
        for name in load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        if "_orig_mod" in name
    ]


def test_activation_checkpointing_by_argument(tmp_path):
    models = [
        timm.create_model("test_vit", img_size=16, patch_size=8, num_classes=CLASSES)
        for _ in range(2)
    ]
    fields = {field.name for field in dataclasses.fields(MutualTrainingArguments)}
    # transformers < 5.23 has the second name only
    name = min(fields & {"activation_checkpointing", "gradient_checkpointing"})
    run = trainer(tmp_path, models, train=view(8), num_train_epochs=1, **{name: True})
    run.train()
    assert all(m.grad_checkpointing for m in models)


def test_model_card(tmp_path):
    run = trainer(tmp_path, evaluate=view(20), num_train_epochs=1, eval_strategy="epoch")
    run.train()
    run.create_model_card()
    wrong = np.mean([row["label"] != row["clean"] for row in rows()])
    figure = [log["eval_accuracy_b"] for log in run.state.log_history if "eval_accuracy_b" in log][
        -1
    ]
    card = (tmp_path / "peer_b" / "README.md").read_text(encoding="utf-8")
    for part in (
        "SMKD(",
        "MyLC(",
        "eta=1.5",
        "b2=-4",
        f"{wrong:.1%} of the {ROWS} training labels are wrong",
        "6 steps",
        f"| eval_accuracy_b | {figure:.4f} |",
        "Network b of 2",
        f"{ROWS} rows",
        "learning rate 0.05",
    ):
        assert part in card, part
    assert "runtime" not in card
    fresh = trainer(tmp_path / "x", Net(), CE(), train=view(clean=False))
    fresh.export(tmp_path / "y")
    card = (tmp_path / "y" / "peer_a" / "README.md").read_text(encoding="utf-8")
    assert "not known: there are no clean labels" in card
    assert "Not evaluated" in card


class Poison(nn.Module):
    """A network whose logits, or whose gradient, turn to NaN in training batch number ``at``."""

    def __init__(self, at, where="logits"):
        super().__init__()
        self.net, self.at, self.where, self.calls = Net(2), at, where, 0

    def forward(self, pixels):
        z, self.calls = self.net(pixels), self.calls + self.training
        if self.calls == self.at and self.training:
            if self.where == "logits":
                return z * float("nan")
            z.register_hook(lambda grad: grad * float("nan"))
        return z


def test_nan_in_the_logits_stops_the_run_before_the_step(tmp_path):
    run = trainer(tmp_path, [Net(1), Poison(5)], save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match="SMKD is NaN for samples"):
        run.train()
    assert run.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_nan_that_the_loss_does_not_see_spoils_no_checkpoint(tmp_path, monkeypatch, logging_steps):
    """On an accelerator the loss does not look, that would wait for it; the Trainer looks when it
    logs and when it saves."""
    monkeypatch.setattr(validate, "refuse_nan", lambda *_: None)
    settings = {
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 1,
        "logging_steps": logging_steps,
    }
    run = trainer(tmp_path, [Net(1), Poison(6)], **settings)
    with pytest.raises(
        FloatingPointError,
        match=r"training loss is nan at step.*last checkpoint in .* is not.*0\.05",
    ):
        run.train()
    assert run.state.global_step == (6 if logging_steps == 1 else 8)
    assert [p.name for p in tmp_path.glob("checkpoint-*/model.safetensors")] == [
        "model.safetensors"
    ]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


class NanValue(Loss):
    """A value that is NaN in the sixth batch, with a gradient that is not."""

    calls = 0

    def per_sample(self, logits, target):
        self.calls += 1
        return -(target * logits.log_softmax(-1)).sum(-1) + (
            float("nan") if self.calls == 6 else 0.0
        )


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_nan_of_the_loss_alone_is_no_zero_and_no_checkpoint(tmp_path, monkeypatch, logging_steps):
    """The Trainer's own filter would log it as the mean of the others."""
    monkeypatch.setattr(validate, "refuse_nan", lambda *_: None)
    run = trainer(
        tmp_path,
        Net(1),
        NanValue(),
        save_strategy="steps",
        save_steps=4,
        logging_steps=logging_steps,
    )
    assert run.args.logging_nan_inf_filter is False
    with pytest.raises(FloatingPointError, match=r"training loss is nan.*\['loss'\]"):
        run.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_nan_in_the_gradient_of_the_last_step_is_not_saved(tmp_path):
    """The loss was still finite, the weights are not: nothing in the log tells."""
    run = trainer(
        tmp_path,
        [Net(1), Poison(8, "gradient")],
        save_strategy="steps",
        save_steps=4,
        save_total_limit=1,
    )
    with pytest.raises(FloatingPointError, match=r"peers\.1"):
        run.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_logs_are_json(tmp_path):
    """A NaN among the figures would make a state file that strict readers refuse."""
    trainer(tmp_path, evaluate=view(8), eval_strategy="epoch", save_strategy="epoch").train()

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "checkpoint-12" / "trainer_state.json").read_text(encoding="utf-8")
    history = json.loads(text, parse_constant=refuse)["log_history"]
    assert any("right_a" in log for log in history)
