"""Evaluation and prediction: metrics of the Trainer, metrics of the user, logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import CLASSES, Net, difference, state, trainer, view

from kd_plugins import CE, MKD, SMKD, MyLC


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


def test_evaluation_takes_all_rows_also_if_training_drops_the_last_batch(tmp_path):
    data, model = view(21), Net(1)
    settings = {"per_device_eval_batch_size": 16, "num_train_epochs": 1}
    want = trainer(tmp_path, model, CE(), evaluate=data, **settings).evaluate()
    run = trainer(
        tmp_path,
        model,
        CE(),
        view(21),
        data,
        dataloader_drop_last=True,
        per_device_train_batch_size=16,
        **settings,
    )
    for key in ("eval_loss", "eval_accuracy"):
        assert run.evaluate()[key] == want[key]
    assert len(run.predict(data).predictions) == 21
    run.train()
    assert run.state.global_step == 1 and run.args.dataloader_drop_last


def test_rows_without_a_label_count_in_no_figure(tmp_path):
    items = [dict(view(21)[k]) for k in range(21)]
    hidden = [item | {"labels": -100} if k % 3 else item for k, item in enumerate(items)]
    run = trainer(tmp_path, Net(1), CE(), per_device_eval_batch_size=8)
    want, got = run.evaluate(items[::3]), run.evaluate(hidden)
    assert got["eval_accuracy"] == want["eval_accuracy"]
    assert "eval_accuracy" not in run.evaluate([i | {"labels": -100} for i in items])


def test_a_last_batch_of_one_picture_is_warned_of(tmp_path, caplog):
    """BatchNorm may end the run there, after an epoch."""
    for settings, said in [
        ({"per_device_train_batch_size": 4}, True),
        ({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, False),
        ({"per_device_train_batch_size": 7}, False),
    ]:
        settings |= {"max_steps": 1}
        trainer(tmp_path, Net(1, bn=True), CE(), view(21), **settings).train()
        assert ("one picture (21 rows in batches of 4)" in caplog.text) == said
        caplog.clear()
    trainer(tmp_path, Net(1), CE(), view(21), per_device_train_batch_size=4, max_steps=1).train()
    assert "one picture" not in caplog.text  # no BatchNorm


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
