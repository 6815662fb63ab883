"""Training dynamics in the plain Trainer and in timm's tasks: the whole way to the suspects."""

import numpy as np
import pytest
import torch
from helpers.tiny import (
    CLASSES,
    ROWS,
    Net,
    StopAt,
    arguments,
    jitter,
    plain,
    resnet,
    rows,
    soft,
    to_tensor,
    view,
    vit,
)
from timm.data import create_loader
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd_plugins import (
    CE,
    SMKD,
    DynamicsCallback,
    Joint,
    MutualDistillationTask,
    MyLC,
    NumberedRows,
    StatefulClassificationTask,
    find_suspects,
)
from kd_plugins.audit import read_dynamics
from kd_plugins.data import ImageView, SubsetView

ONE = ["epoch", "step", "index", "label", "pred_a", "conf_a", "p_label_a"]


def visits(folder):
    """All rows, sorted for a comparison."""
    table = read_dynamics(folder).data.table
    return table.sort_by([(name, "ascending") for name in ("step", "index")]).combine_chunks()


def finds_the_wrong_labels(folder, wrong, least=0.6):
    suspects = find_suspects(dynamics=folder)["index"][:]
    return wrong[suspects[: wrong.sum()]].mean() > least


class Seen(TrainerCallback):
    """The rows and logits of each training batch."""

    def __init__(self):
        self.batches = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def keep(network, given, inputs, output):
            if network.training:
                self.batches.append((inputs["pixel_values"], output.logits.detach()))

        model.register_forward_hook(keep, with_kwargs=True)


# --------------------------------------------------------------------------------- plain Trainer


@pytest.mark.parametrize("ours", [True, False], ids=["our loss", "its own loss"])
def test_plain_trainer_tells_what_its_network_said(tmp_path, ours):
    """Under accumulation. With a loss function of its own the Trainer keeps the labels from the
    network, so they come from the data; rows of a subset are those of the whole."""
    seen, whole = Seen(), ImageView(rows(60), to_tensor)
    data = SubsetView(whole, range(60 - ROWS, 60))
    settings = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8}
    callbacks = [DynamicsCallback(), seen]
    if ours:
        run = plain(tmp_path, MyLC(window=ROWS), train=data, callbacks=callbacks, **settings)
    else:
        args = arguments(tmp_path, TrainingArguments, remove_unused_columns=False, **settings)
        run = Trainer(vit(), args, train_dataset=data, callbacks=callbacks)
    run.evaluate(data)  # before the training; the network sees no index
    run.train()
    run.evaluate(data)
    got = visits(tmp_path / "dynamics").to_pydict()
    assert list(got) == ONE
    assert sorted(got["index"]) == sorted([*range(60 - ROWS, 60)] * 2)
    assert got["label"] == whole.labels[got["index"]].tolist()
    assert got["epoch"] == sorted(got["epoch"]) and set(got["epoch"]) == {0, 1}
    assert max(got["step"]) == run.state.global_step == 6
    by_pixels = {whole[k]["pixel_values"].numpy().tobytes(): k for k in range(60)}
    said = {
        (k, epoch): (p, c)
        for k, epoch, p, c in zip(
            *(got[name] for name in ("index", "epoch", "p_label_a", "pred_a")), strict=True
        )
    }
    for n, (pixels, logits) in enumerate(seen.batches):
        for picture, z in zip(pixels, logits.softmax(-1), strict=True):
            row = by_pixels[picture.numpy().tobytes()]
            p, pred = said[row, n * 2 // len(seen.batches)]
            assert p == pytest.approx(z[whole.labels[row]].item(), abs=1e-3)
            assert pred == z.argmax()


def test_plain_trainer_after_a_stop_and_a_resume(tmp_path):
    """Each visit once, as in the undisturbed run, with the network that reads index beside it."""

    def run(folder, *callbacks):
        # Joint reads index too: both callbacks have to get it
        settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
        data, loss = view(transform=jitter, clean=False), Joint()
        callbacks = [DynamicsCallback(), *callbacks]
        return plain(folder, loss, resnet(), data, callbacks=callbacks, **settings)

    run(tmp_path / "whole").train()
    whole = visits(tmp_path / "whole" / "dynamics")
    assert len(whole) == 2 * ROWS
    run(tmp_path / "cut", StopAt(9)).train()  # the last checkpoint is that of step 8 or later
    last = str(tmp_path / "cut" / "checkpoint-8")
    run(tmp_path / "cut").train(resume_from_checkpoint=last)
    assert visits(tmp_path / "cut" / "dynamics").equals(whole)


def test_plain_trainer_finds_the_wrong_labels(tmp_path):
    data = ImageView(rows(wrong=0.15), to_tensor, clean="clean")
    wrong = data.labels != data.clean_labels
    dynamics = DynamicsCallback(tmp_path / "dynamics")
    network = resnet()
    args = arguments(
        tmp_path,
        TrainingArguments,
        remove_unused_columns=False,
        num_train_epochs=12,
        optim="sgd",
        learning_rate=0.2,
    )
    Trainer(network, args, train_dataset=data, callbacks=[dynamics]).train()
    assert finds_the_wrong_labels(tmp_path / "dynamics", wrong)


def test_plain_trainer_refusals(tmp_path):
    args = arguments(tmp_path, TrainingArguments)
    run = Trainer(vit(), args, train_dataset=view(), callbacks=[DynamicsCallback()])
    with pytest.raises(ValueError, match=r"reads index from the rows.*remove_unused_columns=False"):
        run.train()
    bare = [{k: v for k, v in view()[i].items() if k != "index"} for i in range(8)]
    with pytest.raises(ValueError, match=r"no index.*ImageView"):
        plain(tmp_path, CE(), train=bare, callbacks=[DynamicsCallback()]).train()


def test_soft_labels_of_a_plain_trainer(tmp_path):
    """They are in the batch for a network that computes its own loss."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(1)

        def forward(self, pixel_values, labels=None):
            logits = self.net(pixel_values)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    args = arguments(tmp_path, TrainingArguments, remove_unused_columns=False, num_train_epochs=1)
    data = view(clean=False)
    Trainer(Own(), args, train_dataset=soft(data), callbacks=[DynamicsCallback()]).train()
    got = read_dynamics(tmp_path / "dynamics")
    assert got["label"] == data.labels[got["index"]].tolist()


# --------------------------------------------------------------------------------------- timm


class Pictures:
    """A data set as timm's create_dataset makes one: (picture, label), and a transform to set."""

    def __init__(self, wrong=0.25):
        self.rows, self.transform = rows(wrong=wrong), None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        from PIL import Image

        return self.transform(Image.fromarray(self.rows[row]["image"])), self.rows[row]["label"]


def timm_run(task, folder, data, epochs, *, resume=None, accumulate=1, lr=0.05):
    """The steps of timm's train.py, in its order, with timm's own loader."""
    loader = create_loader(
        NumberedRows(data, CLASSES), (3, 12, 12), 8, is_training=True, no_aug=True,
        use_prefetcher=False, num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3,
        persistent_workers=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=lr)
    start = resume_task_checkpoint(task, resume, optimizer, log_info=False) if resume else 0
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, task=task,
        checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    for epoch in range(start, epochs):
        torch.manual_seed(epoch)
        updates = epoch * -(-len(loader) // accumulate)
        task.get_trainable_module().train()
        for i, (pixels, target) in enumerate(loader):
            (task(pixels, target)["loss"] / accumulate).backward()
            if (i + 1) % accumulate and i + 1 < len(loader):
                continue
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
        if hasattr(task, "create_evaluator"):  # from timm 1.0.31 on
            task.create_evaluator()
        task.get_eval_model().eval()
        saver.save_checkpoint(epoch, metric=epoch)


def one(folder):
    return StatefulClassificationTask(Net(1), CE(), num_samples=ROWS, dynamics=folder)


def pair(folder):
    return MutualDistillationTask(
        [Net(1), Net(2)], SMKD(eta=1.5), num_samples=ROWS, total_updates=18, dynamics=folder
    )


@pytest.mark.parametrize("make", [one, pair])
def test_timm_tells_each_visit_once_also_after_a_resume(tmp_path, make):
    data = Pictures()
    timm_run(make(tmp_path / "whole"), tmp_path, data, 3, accumulate=2)
    whole = visits(tmp_path / "whole")
    got = whole.to_pydict()
    assert sorted(got["index"]) == sorted([*range(ROWS)] * 3)
    assert got["label"] == [data.rows[k]["label"] for k in got["index"]]
    assert [got["epoch"].count(k) for k in range(3)] == [ROWS] * 3 and max(got["step"]) == 9
    assert ("selected_b" in got) == (make is pair)

    timm_run(make(tmp_path / "cut"), tmp_path, data, 2, accumulate=2)
    task = make(tmp_path / "cut")
    timm_run(task, tmp_path, data, 3, resume=str(tmp_path / "checkpoint-0.pth.tar"), accumulate=2)
    assert visits(tmp_path / "cut").equals(whole)  # the second epoch was trained again


def test_timm_finds_the_wrong_labels(tmp_path):
    data = Pictures(wrong=0.15)
    timm_run(one(tmp_path / "dynamics"), tmp_path, data, 12, lr=0.5)
    wrong = np.array([row["label"] != row["clean"] for row in data.rows])
    assert finds_the_wrong_labels(tmp_path / "dynamics", wrong)


def test_timm_refuses_targets_that_name_no_rows(tmp_path):
    pixels = torch.zeros(4, 3, 12, 12)
    with pytest.raises(ValueError, match=r"all targets of the first batch are below 3.*Numbered"):
        one(tmp_path)(pixels, torch.tensor([0, 1, 2, 1]))
    with pytest.raises(ValueError, match=r"Mixup and CutMix lose the row"):
        one(tmp_path)(pixels, torch.full((4, CLASSES), 1 / 3))
    nameless = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, CLASSES))
    with pytest.raises(ValueError, match="do not tell their number of classes"):
        StatefulClassificationTask(nameless, CE(), dynamics=tmp_path)
