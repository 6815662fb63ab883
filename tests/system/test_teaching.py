"""Teachers in the Trainer: beside a student and beside peers, on logits and features; frozen, not
saved, resumed exactly."""

import copy

import pytest
import timm
import torch
from helpers.tiny import CLASSES, ROWS, difference, state, to_tensor, trainer, view
from safetensors.torch import load_file
from torch import nn

from kd_plugins import (
    AT,
    CAMKD,
    CE,
    CRD,
    KD,
    SMKD,
    VID,
    CAMKDFeatures,
    FitNet,
    LabelRevision,
    MaskedLoss,
)
from kd_plugins.models import export, feature_dims


def larger(picture):
    return nn.functional.interpolate(to_tensor(picture)[None], (32, 32))[0]


def network(name="test_resnet", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def teachers():
    return [
        network("test_resnet", 5),
        network("test_convnext", 6, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}),
    ]


def objectives(student, masters):
    wide, hints = [m.num_features for m in masters], [feature_dims(m)[-2] for m in masters]
    heads = [masters[0].get_classifier(), masters[1].forward_head]
    own = student.num_features
    mask = torch.arange(ROWS) % 3 > 0
    return {
        "camkd": CE() + CAMKD() + 50 * CAMKDFeatures(own, wide, heads),
        "hints": CE() + FitNet(feature_dims(student)[-2], hints) + 10 * AT() + VID(own, wide),
        "crd": CE() + CRD(ROWS, own, wide, feat_dim=8, negatives=16),
        "lr_ds": CE() + 2 * MaskedLoss(mask, LabelRevision(KD())),
    }


NAMES = ("camkd", "hints", "crd", "lr_ds")


@pytest.mark.parametrize("name", NAMES)
def test_trained_saved_and_resumed(name, tmp_path):
    """Half way and on is bit-equal; what the loss learns moves; teachers stay what they were and
    outside the checkpoint."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 0.005,
        "num_train_epochs": 1,
    }

    def make(folder, seed):
        student, masters = network(seed=seed), teachers()
        loss = objectives(student, masters)[name]
        return trainer(
            folder, student, loss, view(transform=larger), hf={"teachers": masters}, **settings
        )

    run = make(tmp_path / "run", 1)
    before, taught = state(run.model), [copy.deepcopy(t.state_dict()) for t in run.model.teachers]
    run.train()
    after = state(run.model)
    learned = [k for k, p in run.model.named_parameters() if p.requires_grad]
    assert all(not torch.equal(before[k], after[k]) for k in learned)
    assert any("criterion" in k for k in learned) == (name != "lr_ds")
    for teacher, was in zip(run.model.teachers, taught, strict=True):
        torch.testing.assert_close(teacher.state_dict(), was, rtol=0, atol=0)
        assert all(p.grad is None for p in teacher.parameters())
        assert all(m.training for m in teacher.modules())  # handed back as they came
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert {k.split(".")[0] for k in saved} <= {"peers", "criterion", "inputs"}
    assert not any(
        torch.equal(v, t) for v in saved.values() if v.numel() > 9 for t in taught[1].values()
    )

    again = make(tmp_path / "again", 2)
    again.train(str(tmp_path / "run" / "checkpoint-3"))
    assert difference(after, state(again.model)) == 0


def test_teachers_beside_peers(tmp_path):
    """Each peer learns from the teachers, and from its peer what that is sure of."""
    peers, masters = [network(seed=1), network("test_efficientnet", 2)], teachers()
    loss = SMKD(CE() + KD(), eta=1.5, b2=-4, normalize="batch")
    run = trainer(
        tmp_path, peers, loss, view(transform=larger), hf={"teachers": masters}, num_train_epochs=1
    )
    seen = []
    run.model.criterion.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["teacher"]), with_kwargs=True
    )
    run.train()
    assert seen[0].shape == (2, 8, CLASSES)
    logs = [log for log in run.state.log_history if "own_b" in log]
    assert all(log["kd_1_a"] > 0 and log["kd_1_b"] > 0 for log in logs)


def test_teachers_from_folders(tmp_path):
    """By the path that export() wrote: the same run as with the modules."""
    masters = teachers()
    folders = [str(export(m, tmp_path / str(k))) for k, m in enumerate(masters)]
    results = []
    for given in (masters, folders):
        run = trainer(
            tmp_path / "run",
            network(seed=1),
            CE() + KD(),
            view(transform=larger),
            hf={"teachers": given},
            max_steps=3,
        )
        run.train()
        results.append(state(run.model))
    assert difference(*results) == 0


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: {"loss": CE() + KD()}, ValueError, "reads teacher, and there are no teachers"),
        (
            lambda: {"loss": AT(), "hf": {"teachers": ()}},
            ValueError,
            "reads teacher_features, and there are no teachers",
        ),
        (
            lambda: {"loss": CE(), "hf": {"teachers": teachers()}},
            ValueError,
            "2 teachers would run for nothing",
        ),
        (
            lambda: {"loss": AT(), "hf": {"teachers": [nn.Conv2d(3, 3, 1)]}},
            TypeError,
            "not from .'Conv2d'.",
        ),
        (
            lambda: {
                "loss": CE() + KD(),
                "hf": {"teachers": [timm.create_model("test_resnet", num_classes=7)]},
            },
            ValueError,
            "different numbers of classes.*'teacher 0': 7",
        ),
    ],
)
def test_refused_at_construction(build, error, match, tmp_path):
    with pytest.raises(error, match=match):
        trainer(tmp_path, network(), train=view(transform=larger), **build())
