"""What cannot be trained is refused at construction, by name; its nearest neighbours are not."""

import pytest
from datasets import ClassLabel, Dataset
from helpers.tiny import CLASSES, Net, arguments, rows, to_tensor, trainer, view
from torch import nn

from kd_plugins import CE, MKD, SMKD, Joint, Loss
from kd_plugins.data import ImageView
from kd_plugins.train import MutualDistillationTrainer


class FromTeacher(Loss):
    def per_sample(self, logits, target, teacher):
        return (logits - teacher.mean(0)).square().sum(-1)


class WithFeatures(Loss):
    def per_sample(self, logits, target, features):
        return logits.sum(-1)


SHARED = Net()


def named(*names):
    """A view whose classes have these names."""
    lists = [{"image": row["image"].tolist(), "label": row["label"]} for row in rows(8)]
    data = Dataset.from_list(lists)
    return ImageView(data.cast_column("label", ClassLabel(names=list(names))), to_tensor)


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
    "classes in another order": (
        ValueError,
        "the eval data has the classes of the training data in another order: class 0 is 'dog'",
        lambda: {"train": named("cat", "dog", "owl"), "evaluate": named("dog", "cat", "owl")},
    ),
    "other classes": (
        ValueError,
        "the hard data.* differ|the hard data are not the classes of the training data",
        lambda: {
            "train": named("cat", "dog", "owl"),
            "evaluate": {"hard": named("a", "dog", "owl")},
        },
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
        r"Sum is a loss for one network and there are 2.*Mutual\(loss, SelectNone\(\)\)",
        lambda: {"loss": CE() + CE()},
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
    "the name of a loss": (
        TypeError,
        r"loss='smkd': expected a kd_plugins loss, create_loss\('smkd'\)",
        lambda: {"loss": "smkd"},
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
    unset = getattr(args, name)
    setattr(args, name, "given")
    with pytest.raises(ValueError, match=f"{name} shards the parameters.*work by DDP"):
        MutualDistillationTrainer(pair(), SMKD(), args, train_dataset=view())
    setattr(args, name, unset)
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


def test_spare_outputs_are_warned_of_once(tmp_path, caplog):
    trainer(tmp_path)
    assert "outputs" not in caplog.text
    trainer(tmp_path, [Net(1, 5), Net(2, 5)], evaluate={"a": view(8), "b": view(8)})
    assert caplog.text.count("network a, b: 5 outputs, and the training data have 3 classes") == 1


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
