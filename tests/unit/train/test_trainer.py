"""The Trainer: what it logs, evaluates, saves, resumes and refuses; and the same losses in a stock Trainer."""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from helpers.processes import PYTHONPATH
from helpers.tiny import (
    CLASSES,
    ROWS,
    SIZE,
    Net,
    arguments,
    difference,
    hard,
    jitter,
    logged,
    plain,
    resnet,
    rows,
    soft,
    state,
    to_tensor,
    trainer,
    view,
    vit,
)
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers import trainer as hf_trainer
from transformers.trainer_utils import HPSearchBackend

from kd_plugins import (
    CE,
    MKD,
    SMKD,
    Joint,
    LabelSmoothing,
    Loss,
    Mutual,
    MyLC,
    Nothing,
    ProSelfLC,
    TRevision,
    TruncatedGCE,
)
from kd_plugins.data import ImageView
from kd_plugins.losses import validate
from kd_plugins.train import (
    MutualDistillationTrainer,
    MutualTrainingArguments,
    ProgressCallback,
    as_compute_loss_func,
    last_checkpoint,
)

STEPS = 12  # two epochs of six batches of eight


class FromTeacher(Loss):
    def per_sample(self, logits, target, teacher):
        return (logits - teacher.mean(0)).square().sum(-1)


class WithFeatures(Loss):
    def per_sample(self, logits, target, features):
        return logits.sum(-1)


class Recorder(TrainerCallback):
    """What the networks were given, batch by batch, and the state after each step."""

    def __init__(self):
        self.batches, self.states = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, inputs):
        if module.training:
            self.batches.append(inputs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: p.detach().clone() for name, p in model.named_parameters()})


def replay(batches, models, loss, lrs, momentum=0.9, weight_decay=5e-4):
    """The run again as a plain loop: same batches, torch's own SGD. Returns what the loss reported, per step."""
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
            report[f"selected_right_{peer}"] = (
                (mask & (taught == batch["clean_labels"])).float().mean().item()
            )
        reports.append(report)
    return reports


# ------------------------------------------------------------------------------------------------- training and logs


def test_run_is_a_plain_loop_and_logs_means_of_its_steps(tmp_path):
    """SMKD-P + MyLC on two peers equals ten lines of PyTorch; a log says the mean since the log before, not the last step."""
    seen = Recorder()
    run = trainer(tmp_path, logging_steps=4, logging_first_step=False, hf={"callbacks": [seen]})
    run.train()
    models, loss = [Net(1), Net(2)], SMKD(MyLC(window=ROWS), eta=1.5, b2=-4, normalize="batch")
    loss.watch = True
    reports = replay(seen.batches, models, loss, [0.05] * 6 + [0.01] * 6)
    for theirs, ours in zip(run.peers, models, strict=True):
        assert difference(state(theirs), state(ours)) < 1e-5
    assert difference(state(run.model.criterion), state(loss)) < 1e-6

    logs = [log for log in run.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [4, 8, 12]
    keys = {
        f"{name}_{peer}"
        for name in ("own", "taught", "selected", "right", "r", "eps")
        for peer in "ab"
    }
    assert logs[0].keys() == keys | {"chi", "loss", "grad_norm", "learning_rate", "epoch", "step"}
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
    run = trainer(tmp_path, loss=Mutual(CE(), Nothing()), num_train_epochs=1)
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


def hf_dataset(n=16, features=None, **more):
    """A data set of datasets with a transform, which alone makes pixels and labels."""
    data = rows(n)
    columns = {
        "picture": [row["image"].tolist() for row in data],
        "label": [row["label"] for row in data],
    }

    def transform(batch):
        pictures = [to_tensor(np.array(p, dtype=np.uint8)) for p in batch["picture"]]
        made = {"pixel_values": pictures, "labels": batch["label"]}
        return made | {name: batch[name] for name in more}

    made = Dataset.from_dict(columns | more)
    if features:
        made = made.cast_column("label", features)
    return made.with_transform(transform)


def test_plain_hf_dataset_with_a_transform(tmp_path):
    """Dropping the columns that forward() does not name would take the picture away before the
    transform sees it."""
    run = trainer(tmp_path, train=hf_dataset(), num_train_epochs=1)
    run.train()
    assert run.state.global_step == 2
    assert "selected_a" in run.state.log_history[0]
    assert "right_a" not in run.state.log_history[0]


def test_networks_by_name_find_the_classes_of_a_plain_hf_dataset(tmp_path):
    """The ClassLabel of its features; and a loss that needs sizes finds them there as well."""
    train = hf_dataset(features=ClassLabel(names=["red", "green", "blue"]))
    run = trainer(tmp_path, ["resnet10_cifar"], CE() + 0.1 * TruncatedGCE(), train=train)
    assert run.peers[0].num_classes == 3
    assert run.model.criterion.terms[1].num_samples == 16


def test_extra_columns_are_left_alone(tmp_path):
    train = hf_dataset(file=["a.png"] * 16, source=list(range(16)))
    run = trainer(tmp_path, [Net(1), vit()], train=train, num_train_epochs=1)
    run.train()
    assert run.state.global_step == 2


def test_rows_without_labels_say_so(tmp_path):
    bare = [{"pixel_values": torch.zeros(3, SIZE, SIZE)}] * 8
    with pytest.raises(ValueError, match="the training batch has no labels"):
        trainer(tmp_path, train=bare).train()
    with pytest.raises(ValueError, match="the batch has no labels"):
        plain(tmp_path, CE(), train=bare).train()


def test_distributions_in_training_and_evaluation(tmp_path):
    """eval_loss is their cross-entropy; the class that counts as right is the most probable one."""
    hard, spread = view(21), soft(view(21))
    run = trainer(tmp_path, train=soft(view(24)), evaluate=spread, num_train_epochs=1)
    run.train()
    metrics, wanted = run.evaluate(), run.evaluate(hard)
    x, y = (torch.stack([row[k] for row in spread]) for k in ("pixel_values", "labels"))
    with torch.no_grad():
        losses = [F.cross_entropy(peer(x), y).item() for peer in run.peers]
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(wanted["eval_accuracy"])
    assert metrics["eval_memorised"] == pytest.approx(wanted["eval_memorised"])


class Trial(dict):
    """What a search backend knows of a trial."""


class Trials:
    """A search backend: what transformers does with optuna or ray, for two trials."""

    default_hp_space = staticmethod(lambda trial: {"learning_rate": trial["rate"]})

    def ensure_available(self):
        pass

    def run(self, run, n_trials, direction, **kwargs):
        found = []
        for number in range(n_trials):
            trial = Trial(rate=0.05, eta=1.5 + number)
            trial.number, trial.params = number, {}
            run.train(trial=trial)
            found.append((run.evaluate()["eval_loss"], state(run.model)))
        return found


def test_hyperparameter_search_makes_everything_anew_for_each_trial(tmp_path, monkeypatch):
    """The networks start from the same weights, the loss from an empty state; both know the trial."""
    monkeypatch.setitem(
        hf_trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Trials
    )
    monkeypatch.setattr(hf_trainer.Trainer, "_report_to_hp_search", lambda *_: None)
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # knows the types of optuna
    etas, losses = [], []

    def loss(trial):
        etas.append(trial and trial["eta"])
        losses.append(SMKD(MyLC(), eta=1.5, normalize="batch"))
        return losses[-1]

    settings = {"evaluate": view(8), "num_train_epochs": 1}
    run = trainer(tmp_path, lambda trial: pair(), loss, **settings)
    (first, a), (second, b) = run.hyperparameter_search(backend="optuna", n_trials=2)
    assert etas == [None, 1.5, 2.5]
    assert first == second
    assert difference(a, b) == 0
    assert run.model.criterion is losses[2]
    assert losses[1].refine[0].r > 0
    alone = trainer(tmp_path / "alone", pair(), SMKD(eta=1.5, normalize="batch"), **settings)
    alone.train()
    assert difference(a, state(alone.model)) == 0
    with pytest.raises(RuntimeError, match=r"MutualDistillationTrainer\(lambda trial: \["):
        alone.hyperparameter_search(backend="optuna", n_trials=2)


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


def test_names_need_the_number_of_classes_and_are_seeded(tmp_path):
    with pytest.raises(ValueError, match=r"'resnet10_cifar'.*number of classes is not known"):
        trainer(
            tmp_path, ["resnet10_cifar"], CE(), train=torch.utils.data.TensorDataset(torch.zeros(4))
        )
    a, b, c = [
        trainer(tmp_path, ["resnet10_cifar"] * 2, Mutual(CE(), Nothing()), seed=s).model
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


def test_bar_is_short_and_the_log_is_full(tmp_path, capfd):
    run = trainer(
        tmp_path, evaluate=view(8), num_train_epochs=1, eval_strategy="epoch", disable_tqdm=False
    )
    run.train()
    printed = "".join(capfd.readouterr())
    for name in (
        "'loss'",
        "'chi'",
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


# -------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_against_plain_arithmetic(tmp_path):
    classes, data = 7, view(45, classes=7, wrong=0.4, seed=3)
    models = [Net(1, classes=classes), Net(2, classes=classes)]
    run = trainer(
        tmp_path, models, train=view(classes=classes), evaluate=data, per_device_eval_batch_size=15
    )
    before = state(run.model)
    got = run.evaluate()
    assert difference(before, state(run.model)) == 0  # r above all

    items = [data[i] for i in range(len(data))]
    x = torch.stack([item["pixel_values"] for item in items])
    given, true = (torch.tensor([item[k] for item in items]) for k in ("labels", "clean_labels"))
    wrong = given != true
    with torch.no_grad():
        z = [m(x) for m in models]
    scores = {"a": z[0], "b": z[1], "ensemble": z[0].softmax(-1) + z[1].softmax(-1)}
    want = {
        "loss": sum(F.cross_entropy(s, given).item() for s in z) / 2,
        "noise_rate": wrong.float().mean().item(),
    }
    for name, s in scores.items():
        guess = s.argmax(-1)
        want |= {
            f"accuracy_{name}": (guess == true).float().mean().item(),
            f"top5_{name}": (s.topk(5).indices == true[:, None]).any(1).float().mean().item(),
            f"accuracy_clean_part_{name}": (guess == true)[~wrong].float().mean().item(),
            f"memorised_{name}": (guess == given)[wrong].float().mean().item(),
            f"corrected_{name}": (guess == true)[wrong].float().mean().item(),
        }
    for name in ("accuracy", "top5", "accuracy_clean_part", "memorised", "corrected"):
        want[name] = (want[f"{name}_a"] + want[f"{name}_b"]) / 2
    for name, value in want.items():
        assert got[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name
    other = trainer(
        tmp_path, models, MKD(), train=view(classes=classes), evaluate=data
    )  # another loss, another batch size
    assert other.evaluate()["eval_loss"] == pytest.approx(want["loss"], abs=1e-6)
    assert want["accuracy_a"] != want["accuracy_b"]


def test_eval_loss_of_an_uneven_last_batch(tmp_path):
    data, model = view(21, clean=False), Net(1)
    got = trainer(tmp_path, model, CE(), evaluate=data, per_device_eval_batch_size=16).evaluate()
    items = [data[i] for i in range(len(data))]
    x, y = (
        torch.stack([item["pixel_values"] for item in items]),
        torch.tensor([item["labels"] for item in items]),
    )
    assert got["eval_loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-6)
    assert not [key for key in got if "memorised" in key or "noise" in key]


def test_several_eval_sets_and_prediction_without_labels(tmp_path):
    sets = {"easy": view(12, wrong=0), "hard": view(12, clean=False, seed=5)}
    run = trainer(tmp_path, evaluate=sets, num_train_epochs=1, eval_strategy="epoch")
    run.train()
    logs = {key for log in run.state.log_history for key in log}
    assert {
        "eval_easy_accuracy_a",
        "eval_hard_accuracy_ensemble",
        "eval_easy_noise_rate",
        "eval_easy_loss",
    } <= logs
    assert "eval_hard_noise_rate" not in logs
    bare = [{"pixel_values": sets["easy"][i]["pixel_values"]} for i in range(12)]
    assert run.predict(bare).predictions.shape == (12, 2, CLASSES)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("networks", [1, 2])
def test_metrics_of_the_user_and_predict_get_logits(tmp_path, networks, clean):
    """[N, C] of one network, [N, K, C] of peers, so that the usual argmax is an accuracy."""
    models = [Net(k + 1) for k in range(networks)]
    loss = CE() if networks == 1 else SMKD()
    data, given = view(21, clean=clean), []

    def accuracy(prediction):
        given.append(prediction.predictions)
        right = prediction.predictions.argmax(-1).reshape(21, -1) == prediction.label_ids[:, None]
        return {"mine": right.mean()}

    settings = {"train": view(clean=clean), "evaluate": data, "per_device_eval_batch_size": 8}
    mine = trainer(tmp_path, models, loss, hf={"compute_metrics": accuracy}, **settings)
    metrics = mine.evaluate()
    pixels = torch.stack([data[i]["pixel_values"] for i in range(21)])
    with torch.no_grad():
        logits = torch.stack([model(pixels) for model in models], dim=1)
    logits = logits.squeeze(1) if networks == 1 else logits
    assert np.allclose(given[0], logits, atol=1e-6)
    right = logits.argmax(-1).reshape(21, -1) == torch.as_tensor(data.labels)[:, None]
    assert metrics["eval_mine"] == pytest.approx(right.float().mean().item())
    assert "eval_accuracy" not in metrics
    assert np.allclose(mine.predict(data).predictions, logits, atol=1e-6)

    ours = trainer(tmp_path, models, MyLC() if networks == 1 else MKD(), **settings)
    output, metrics = ours.predict(data), ours.evaluate()
    assert np.allclose(output.predictions, logits, atol=1e-6)
    for name, value in metrics.items():
        if name != "epoch" and not name.endswith(("runtime", "second", "time")):
            assert output.metrics[name.replace("eval", "test")] == pytest.approx(value), name
    kept = ours.evaluation_loop(ours.get_eval_dataloader(), "Evaluation").predictions
    kept = kept[0] if clean else kept
    assert kept.dtype == np.int32  # the logits are not kept for our own metrics
    assert kept.shape == (21, 1 if networks == 1 else 3, CLASSES)


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    torch.manual_seed(1)
    run = hard(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def equal(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert difference(state(resumed.model), state(whole.model)) == 0
    momentum = [
        s["momentum_buffer"]
        for run in (resumed, whole)
        for s in run.optimizer.state_dict()["state"].values()
    ]
    half = len(momentum) // 2
    assert half > 0
    assert all(torch.equal(a, b) for a, b in zip(momentum[:half], momentum[half:], strict=True))


@pytest.mark.parametrize(("step", "workers"), [(4, 0), (6, 0), (10, 0), (4, 2)])
def test_resume_is_bit_equal(whole, tmp_path, step, workers):
    """In the middle of an epoch, at its end, in the middle of the next: weights, BatchNorm, r, momentum."""
    torch.manual_seed(99)
    run = hard(tmp_path, save_strategy="no", dataloader_num_workers=workers)
    run.train(f"{whole.args.output_dir}/checkpoint-{step}")
    equal(run, whole)
    assert whole.model.criterion.refine[0].r > 0


def test_run_depends_on_every_source_of_chance(whole, tmp_path):
    """Else bit-equality would be easy."""
    run = hard(tmp_path, save_strategy="no", seed=5)
    run.train()
    assert difference(state(run.model), state(whole.model)) > 0
    item = [run.train_dataset[0]["pixel_values"] for run.train_dataset.seed in range(4)]
    assert len({x.sum().item() for x in item}) > 1


def test_killed_run_resumes_bit_equal(whole, tmp_path):
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-m", "helpers.tiny", str(tmp_path)]
    killed = subprocess.run(command, env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    run = hard(tmp_path)
    run.train(resume_from_checkpoint=True)
    equal(run, whole)


def test_resume_takes_the_last_complete_checkpoint(whole, tmp_path):
    """A kill while a checkpoint is written leaves one without its last file, the Trainer's state."""
    assert last_checkpoint(tmp_path) is None
    run = hard(tmp_path)
    run.train(resume_from_checkpoint=True)  # nothing there: from the start
    equal(run, whole)
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    seen = Recorder()
    run = hard(tmp_path, [seen], save_strategy="no")
    run.train(resume_from_checkpoint=True)
    equal(run, whole)
    assert len(seen.batches) == 4


def test_best_model_restores_both_peers(tmp_path):
    run = hard(
        tmp_path,
        evaluate=view(20),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=0.02,
    )
    run.train()
    losses = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    best = tmp_path / f"checkpoint-{6 * (1 + losses.index(max(losses)))}"
    other = tmp_path / f"checkpoint-{6 * (1 + losses.index(min(losses)))}"
    assert Path(run.state.best_model_checkpoint) == best != other
    saved, left = (load_file(path / "model.safetensors") for path in (best, other))
    now = run.model.state_dict()
    assert difference(now, saved) == 0
    for part in ("peers.0.", "peers.1.", "criterion."):
        assert any(
            (now[name] - left[name]).abs().max() > 0 for name in now if name.startswith(part)
        ), part


def test_channels_last_networks_are_saved_and_resumed(tmp_path):
    """safetensors refuses a strided weight."""

    def make(**kwargs):
        models = [Net(1).to(memory_format=torch.channels_last), Net(2)]
        return trainer(tmp_path, models, num_train_epochs=1, **kwargs)

    run = make(save_strategy="steps", save_steps=3)
    assert not run.peers[0].conv.weight.is_contiguous()
    run.train()
    again = make()
    again.train(str(tmp_path / "checkpoint-3"))
    assert not again.peers[0].conv.weight.is_contiguous()
    assert difference(state(run.model), state(again.model)) == 0


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


# --------------------------------------------------------------------------------- accumulation, precision, compiling


def test_accumulation_changes_nothing(tmp_path):
    """8x1 = 2x4 = 1x8 where the loss is a mean over the batch; 44 rows: the last window is a short one."""

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
    """Within 5 % of the loss and 0.02 in the weights after six steps; the loss itself is computed in float32."""
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
    names = ("loss", "own_a", "selected_b", "r_a", "chi", "right_a")
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
    run = trainer(
        tmp_path, models, train=view(8), num_train_epochs=1, activation_checkpointing=True
    )
    run.train()
    assert all(m.grad_checkpointing for m in models)


# --------------------------------------------------------------------------------------------------------- optimizer


def step(tmp_path, models, loss=None, **kwargs):
    """How far each network went in one step, as tensors by name."""
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    loss = Mutual(CE(), Nothing()) if loss is None else loss
    settings = {
        "max_steps": 1,
        "milestones": [],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
    }
    run = trainer(tmp_path, models, loss, **settings | kwargs)
    run.train()
    return run, [
        {n: p.detach() - b[n] for n, p in m.named_parameters()}
        for m, b in zip(models, before, strict=True)
    ]


def norm(moves):
    return torch.stack([d.square().sum() for d in moves.values()]).sum().sqrt().item()


def test_clipping_is_per_network(tmp_path):
    """Joint clipping would let one peer's spike shrink the other's step."""
    calm, (alone, _) = step(tmp_path, [Net(1), Net(2)], max_grad_norm=0.5)
    spike, (beside, spiked) = step(tmp_path, [Net(1), Net(2, scale=1e4)], max_grad_norm=0.5)
    assert difference(alone, beside) == 0
    assert norm(beside) == pytest.approx(0.05 * 0.5, rel=1e-3)  # learning rate x clipped norm
    assert norm(spiked) == pytest.approx(0.05 * 0.5, rel=1e-2)
    assert logged(spike, "grad_norm")[0][0] > 100 * logged(calm, "grad_norm")[0][0] > 50
    _, (free, wild) = step(tmp_path, [Net(1), Net(2, scale=1e4)])
    assert norm(free) > 2 * norm(beside)
    assert norm(wild) > 1e3 * norm(spiked)


def test_optimizer_settings_per_network(tmp_path):
    own = [{"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.004, "momentum": 0.0}]
    run = trainer(tmp_path, hf={"optim_per_peer": own}, weight_decay=0.3)
    run.train()
    first, second = run.optimizer.param_groups
    assert (first["momentum"], second["momentum"]) == (0.9, 0.0)
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.3)
    assert (first["initial_lr"], second["initial_lr"]) == (0.02, 0.004)
    assert (first["lr"], second["lr"]) == pytest.approx(
        (0.02 * 0.2, 0.004 * 0.2)
    )  # the schedule multiplies both
    assert {id(p) for p in first["params"]} == {id(p) for p in run.peers[0].parameters()}
    _, (a, b) = step(tmp_path, [Net(1), Net(2)], hf={"optim_per_peer": [{"lr": 0.0}, {}]})
    assert norm(a) == 0 < norm(b)
    with pytest.raises(ValueError, match=r"SGD has no setting \['learning_rate'\]"):
        trainer(tmp_path, hf={"optim_per_peer": [{"learning_rate": 0.1}, {}]}).train()


def test_momentum_is_on_and_decay_covers_everything(tmp_path):
    """With no gradient at all, two steps by hand: v = decay w, w -= lr v; v = 0.9 v + decay w, w -= lr v. Norms too."""
    models = [Net(1, bn=True), Net(2)]
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    _, moves = step(
        tmp_path,
        models,
        0.0 * Mutual(CE(), Nothing()),
        max_steps=2,
        learning_rate=0.1,
        weight_decay=0.5,
    )
    for move, start in zip(moves, before, strict=True):
        for name, w in start.items():
            v = 0.5 * w
            w1 = w - 0.1 * v
            w2 = w1 - 0.1 * (0.9 * v + 0.5 * w1)
            torch.testing.assert_close(w + move[name], w2, rtol=1e-5, atol=1e-7)
        assert move["norm.weight"].abs().min() > 0.1


def test_parameters_of_the_loss_learn(tmp_path):
    class Scaled(Loss):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def per_sample(self, logits, target):
            return -(target * (self.log_scale.exp() * logits).log_softmax(-1)).sum(-1)

    run = trainer(tmp_path, Net(1), Scaled(), num_train_epochs=1, max_grad_norm=1.0)
    run.train()
    assert len(run.optimizer.param_groups) == 2
    assert run.model.criterion.log_scale.abs() > 1e-3


def test_learning_rates_by_hand(tmp_path):
    def rates(**kwargs):
        run = trainer(tmp_path, Net(1), CE(), max_steps=10, learning_rate=1e-3, **kwargs)
        run.train()
        return [rate for [rate] in logged(run, "learning_rate")]

    one = 1e-3
    assert rates(milestones=[0.3, 0.6, 0.8], lr_decay=0.1) == pytest.approx(
        [one] * 3 + [one / 10] * 3 + [one / 100] * 2 + [one / 1000] * 2
    )
    assert rates(milestones=[0.5], warmup_steps=3) == pytest.approx(
        [one / 4, one / 2, 3 * one / 4] + [one] * 2 + [one / 5] * 5
    )
    linear = [one * (10 - i) / 10 for i in range(10)]
    assert rates(lr_scheduler_type="linear") == pytest.approx(
        linear
    )  # takes the place of the default milestones
    defaults = MutualTrainingArguments(str(tmp_path))
    # without it two processes on a machine without an accelerator run apart, and bf16 is refused
    assert defaults.use_cpu is not torch.accelerator.is_available()
    assert (defaults.milestones, defaults.lr_decay, defaults.optim, defaults.optim_args) == (
        [0.3, 0.6, 0.8],
        0.2,
        "sgd",
        "momentum=0.9",
    )


# --------------------------------------------------------------------------------------------- a stock Trainer of HF


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


class Epochs(ImageView):
    """A view that writes down which epochs it was told."""

    def set_epoch(self, epoch):
        told = self.__dict__.setdefault("told", [])
        if epoch not in told[-1:]:  # accelerate may tell it as well
            told.append(epoch)
        super().set_epoch(epoch)


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
    assert saved["terms.0.mean_certainty.count"] == ROWS
    again, data, resumed = run()
    resumed.train(str(tmp_path / "checkpoint-8"))
    assert data.told == [1]
    assert difference(state(loss), state(again)) == 0
    assert difference(state(whole.model), state(resumed.model)) == 0
    (tmp_path / "checkpoint-8" / "loss.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8 cannot be.*loss\.safetensors is missing"):
        run()[2].train(str(tmp_path / "checkpoint-8"))


def test_views_are_told_the_epoch_also_after_a_resume(tmp_path):
    def run(**kwargs):
        train = Epochs(rows(20), jitter, clean="clean")
        return train, trainer(
            tmp_path, train=train, gradient_accumulation_steps=2, num_train_epochs=3, **kwargs
        )

    data, whole = run(save_strategy="steps", save_steps=1)
    whole.train()
    assert data.told == [0, 1, 2]
    assert whole.state.global_step == 6
    for start, told in ((2, [1, 2]), (3, [1, 2]), (4, [2])):
        data, resumed = run()
        resumed.train(str(tmp_path / f"checkpoint-{start}"))
        assert data.told == told
        assert difference(state(resumed.model), state(whole.model)) == 0


# --------------------------------------------------------------------------------------------------------- bad input

SHARED = Net()


def pair():
    return [Net(1), Net(2)]


BAD = {
    "label too large": (
        ValueError,
        r"label 3 in row 3 of the train data is outside the 3 classes",
        lambda: {"train": view(classes=4, wrong=0)},
    ),
    "label of an eval set": (
        ValueError,
        r"label 3 in row 3 of the hard data is outside the 3",
        lambda: {"evaluate": {"easy": view(8), "hard": view(8, classes=4, wrong=0)}},
    ),
    "class counts": (
        ValueError,
        r"different numbers of classes: \{'network a': 3, 'network b': 4\}",
        lambda: {"models": [Net(), Net(1, 4)]},
    ),
    "class count of a teacher": (
        ValueError,
        r"different numbers of classes: \{'network a': 3, 'teacher 0': 5\}",
        lambda: {"models": Net(), "loss": FromTeacher(), "hf": {"teachers": [Net(1, 5)]}},
    ),
    "teachers missing": (
        ValueError,
        r"FromTeacher reads teacher, and there are no teachers",
        lambda: {"models": Net(), "loss": FromTeacher()},
    ),
    "teachers for nothing": (
        ValueError,
        r"SMKD does not read teacher: the 1 teachers would run for nothing",
        lambda: {"hf": {"teachers": [Net(3)]}},
    ),
    "features": (
        TypeError,
        r"WithFeatures reads features.*not from \['Net'\]",
        lambda: {"models": Net(), "loss": WithFeatures()},
    ),
    "one network for a mutual loss": (
        ValueError,
        "SMKD teaches peers and there is one network",
        lambda: {"models": Net()},
    ),
    "two networks for a loss of one": (
        ValueError,
        r"CE is a loss for one network and there are 2: Mutual\(CE\(\), Nothing\(\)\)",
        lambda: {"loss": CE()},
    ),
    "num_peers": (
        ValueError,
        "SMKD was made for num_peers=3, there are 2",
        lambda: {"loss": SMKD(num_peers=3)},
    ),
    "num_peers in a sum": (
        ValueError,
        "Sum was made for num_peers=3, there are 2",
        lambda: {"loss": 0.5 * MKD(num_peers=3) + SMKD(num_peers=3)},
    ),
    "one module twice": (
        ValueError,
        "the same module stands twice",
        lambda: {"models": [SHARED, SHARED]},
    ),
    "peer is teacher": (
        ValueError,
        "the same module stands twice",
        lambda: {"models": SHARED, "loss": FromTeacher(), "hf": {"teachers": [SHARED]}},
    ),
    "frozen peer": (
        ValueError,
        r"network b \(Net\) has no trainable parameter and would never learn",
        lambda: {"models": [Net(1), Net(2).requires_grad_(False)]},
    ),
    "no loss of ours": (
        TypeError,
        "must be a kd_plugins loss, got CrossEntropyLoss",
        lambda: {"loss": nn.CrossEntropyLoss()},
    ),
    "label smoothing": (
        ValueError,
        r"label_smoothing_factor=0\.1.*LabelSmoothing",
        lambda: {"label_smoothing_factor": 0.1},
    ),
    "full eval": (
        ValueError,
        "bf16_full_eval",
        lambda: {"bf16_full_eval": True, "eval_strategy": "epoch", "evaluate": view(8)},
    ),
    "a value per sample": (
        ValueError,
        "CE has reduction='none', a value per sample: training needs one number",
        lambda: {"models": Net(), "loss": CE(reduction="none")},
    ),
    "a table of other data": (
        ValueError,
        "num_samples=9, and the data or the networks have num_samples=48",
        lambda: {"models": Net(), "loss": Joint(9, CLASSES)},
    ),
    "classes of the loss": (
        ValueError,
        "num_classes=7, and the data or the networks have num_classes=3",
        lambda: {"models": Net(), "loss": CE(num_classes=7)},
    ),
    "model_init": (
        ValueError,
        "model_init would be ignored: pass functions of the trial",
        lambda: {"hf": {"model_init": lambda: Net()}},
    ),
    "compute_loss_func": (
        ValueError,
        "compute_loss_func would be ignored: pass a loss",
        lambda: {"hf": {"compute_loss_func": lambda *_: 0}},
    ),
    "preprocess without metrics": (
        ValueError,
        "preprocess_logits_for_metrics: the metrics of this Trainer",
        lambda: {"hf": {"preprocess_logits_for_metrics": lambda logits, labels: logits}},
    ),
    "one loss for all trials": (
        ValueError,
        "would go on with what the last one has trained",
        lambda: {"models": lambda trial: pair()},
    ),
    "networks for all trials": (
        ValueError,
        "would go on with what the last one has trained",
        lambda: {"models": pair(), "loss": lambda trial: SMKD()},
    ),
    "metrics by batch": (
        ValueError,
        "batch_eval_metrics=True: the metrics of this Trainer",
        lambda: {"batch_eval_metrics": True},
    ),
    "hub": (ValueError, "push_to_hub=True would upload the pair", lambda: {"push_to_hub": True}),
    "settings per peer": (
        ValueError,
        "optim_per_peer has 1 entries for 2 networks",
        lambda: {"hf": {"optim_per_peer": [{}]}},
    ),
    "milestone outside": (
        ValueError,
        r"milestones=\[0\.5, 1\.5\]",
        lambda: {"milestones": [0.5, 1.5]},
    ),
    "milestones falling": (
        ValueError,
        r"milestones=\[0\.6, 0\.3\]",
        lambda: {"milestones": [0.6, 0.3]},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_at_construction(case, tmp_path):
    error, message, kwargs = BAD[case]
    with pytest.raises(error, match=message):
        trainer(tmp_path, **kwargs())


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "parallelism_config"])
def test_sharded_parameters_are_refused_by_name(name, tmp_path, monkeypatch):
    """By an argument, or as `accelerate launch` tells it."""
    args = arguments(tmp_path)
    setattr(args, name, "given")
    with pytest.raises(ValueError, match=f"{name} shards the parameters.*work by DDP"):
        MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())
    setattr(args, name, None)
    MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name} shards the parameters.*work by DDP"):
        MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())


def test_good_input_is_not_refused(tmp_path):
    """The nearest neighbours of what is refused above."""
    trainer(tmp_path, train=view(classes=2), evaluate={"one": view(8)})
    trainer(tmp_path, Net(), FromTeacher(), hf={"teachers": [Net(3)]})
    trainer(tmp_path, [Net(i) for i in range(3)], SMKD(num_peers=3) + MKD(num_peers=3))
    trainer(tmp_path, bf16_full_eval=True)
    trainer(
        tmp_path, [nn.Sequential(nn.Flatten(), nn.LazyLinear(9)), Net()]
    )  # says nothing of its classes


def test_processes_that_do_not_see_each_other(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2, but this process sees itself alone"):
        MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())
    monkeypatch.setenv("WORLD_SIZE", "1")
    MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())
    args._n_gpu = 2
    with pytest.raises(RuntimeError, match="2 GPUs are visible to one process"):
        MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())


# --------------------------------------------------------------------------------------------------------------- NaN


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
    """On an accelerator the loss does not look, that would wait for it; the Trainer looks when it logs and when it saves."""
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

    text = (tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text(encoding="utf-8")
    history = json.loads(text, parse_constant=refuse)["log_history"]
    assert any("right_a" in log for log in history)
