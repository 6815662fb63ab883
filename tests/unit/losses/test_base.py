"""The registry, and what the base class does with a call."""

import re
import subprocess
import sys

import pytest
import torch

from kd_plugins import CE, Loss, create_loss, list_losses, register_loss
from kd_plugins.losses import loss_class
from kd_plugins.losses import registry as registry_module


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


def test_a_name_is_taken_once(registry):
    class Other(Loss):
        def per_sample(self, logits, target):
            return logits.sum(-1)

    assert register_loss("mine")(Other) is Other and "mine" in list_losses("m*")
    assert isinstance(create_loss("mine", reduction="sum"), Other)
    register_loss("mine")(Other)  # a notebook cell that runs again
    with pytest.raises(ValueError, match="'ce' is taken by CE"):
        register_loss("ce")(Other)
    with pytest.raises(
        ValueError, match="'ce' is taken"
    ):  # a class of the same name is another class all the same
        register_loss("ce")(type("CE", (CE,), {"__qualname__": "CE"}))
    assert loss_class("ce") is CE


def test_names():
    assert list_losses("boot*") == ["boot_hard", "boot_soft"]
    assert list_losses() == sorted(list_losses()) and list_losses("no such*") == []
    assert repr(create_loss("label_smoothing", eps=0.2)) == "LabelSmoothing(eps=0.2)"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("smdk", "smkd"),
        ("label_smothing", "label_smoothing"),
        ("SMKD", "did you mean smkd"),
        ("TruncatedGCE", "mean truncated_gce"),
        ("?", ". Known are:"),
    ],
)
def test_an_unknown_name_suggests(typo, meant):
    with pytest.raises(ValueError, match=re.escape(f"unknown loss '{typo}'") + f".*{meant}"):
        create_loss(typo)


@pytest.mark.parametrize("keyword", ["epoch", "teachers", "idx"])
def test_a_loss_can_read_only_what_callers_supply(keyword):
    namespace = {}
    exec(f"def per_sample(self, logits, target, {keyword}): ...", namespace)
    with pytest.raises(TypeError, match=f"Odd.per_sample asks for .*{keyword}"):
        type("Odd", (Loss,), {"per_sample": namespace["per_sample"]})


def test_what_a_loss_reads_is_its_signature():
    class Both(Loss):
        def per_sample(self, logits, target, teacher, index):
            assert teacher.dim() == 3 and not teacher.requires_grad
            return (logits - teacher[0]).square().sum(-1) + index

    class Heir(Both):
        pass

    assert (
        Both.required_inputs == Heir.required_inputs == {"teacher", "index"}
        and Loss.required_inputs == CE.required_inputs == frozenset()
    )
    z, y, t, i = (
        torch.zeros(2, 3),
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, 3, requires_grad=True),
        torch.tensor([1, 2]),
    )
    assert Both()(z, y, teacher=t, index=i).item() == 3 + 1.5
    assert Both()(z, y, teacher=t[None], index=i).item() == 3 + 1.5
    for wrong in (
        {"teacher": t[:1]},
        {"teacher": t[:, :2]},
        {"index": i[:1]},
        {"index": i[:, None]},
    ):
        with pytest.raises(
            ValueError, match=re.escape(str(list(next(iter(wrong.values())).shape)))
        ):
            Both()(z, y, **{"teacher": t, "index": i} | wrong)


def test_what_a_loss_is_handed():
    """Full precision in any autocast, teachers as constants, the student's own features as they
    are."""

    class Reads(Loss):
        def per_sample(self, logits, target, teacher, features, teacher_features):
            (features,), taught = features, [f for (f,) in teacher_features]  # lists of maps
            assert {t.dtype for t in (logits, target, teacher, features, *taught)} == {
                torch.float32
            }
            assert not any(t.requires_grad for t in (teacher, *taught)) and features.requires_grad
            return (logits @ torch.eye(3) + teacher[0] + features + taught[1]).sum(-1)

    t = torch.full((2, 3), 1 + 2**-7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = Reads()(
            t * 1,
            torch.zeros(2, dtype=torch.long),
            teacher=t * 1,
            features=t * 1,
            teacher_features=(t, t * 1),
        )
    assert value.dtype == torch.float32 and value.item() == 12 * (1 + 2**-7)
    value.backward()
    assert torch.equal(
        t.grad, torch.ones_like(t)
    )  # logits and features, half of the batch mean each


def test_autocast_does_not_reach_into_a_loss():
    class Transfers(Loss):
        def per_sample(self, logits, target):
            return (logits @ torch.full((3, 3), 1 / 3)).sum(-1)

    z, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Transfers()(z, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, Transfers()(z, y))


def test_importing_costs_no_more_than_torch():
    heavy = {"transformers", "datasets", "timm", "evaluate"}
    code = f"import sys, kd_plugins; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
