"""How networks are made, what they say of themselves, and what of a file is read."""

import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from helpers.networks import pixels, spoil, timm_vit
from helpers.processes import PYTHONPATH
from helpers.tiny import CLASSES, Net, difference, state, vit
from safetensors.torch import save_file
from torch import nn

from kd_plugins.models import class_count, export, logits_of, make_model, make_teacher
from kd_plugins.models.features import feature_dims, with_features


def test_make_model(tmp_path):
    own = Net()
    assert make_model(own, 7) is own
    assert make_model("resnet10_cifar", 4)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(ValueError, match=r"'resnet10_cifar'.*number of classes is not known"):
        make_model("resnet10_cifar", None)

    first, second = make_model("resnet10_cifar", 4), make_model("resnet10_cifar", 4)
    assert difference(state(first), state(second)) > 0  # two peers from one name start apart
    spoil(first)
    export(first, tmp_path)
    again = make_model(f"local-dir:{tmp_path}", 4)
    assert difference(state(first), state(again)) == 0
    other = make_model(
        f"local-dir:{tmp_path}", 6
    )  # another number of classes: the body stays, the head is new
    assert other.fc.out_features == 6
    assert torch.equal(other.conv1.weight, first.conv1.weight)


def test_small_picture_resnets_keep_the_resolution():
    for name, blocks in {"resnet10_cifar": 4, "resnet18_cifar": 8, "resnet34_cifar": 16}.items():
        model = timm.create_model(name, channels=(4, 4, 4, 4), num_classes=CLASSES)
        assert sum(len(getattr(model, f"layer{i}")) for i in range(1, 5)) == blocks
        shapes = [
            tuple(f.shape[-2:]) for f in model.forward_intermediates(torch.zeros(1, 3, 32, 32))[1]
        ]
        assert (
            shapes
            == [(32 // info["reduction"],) * 2 for info in model.feature_info]
            == [(s, s) for s in (32, 32, 16, 8, 4)]
        )


@pytest.mark.parametrize(
    ("name", "weights", "channels"),
    [
        ("resnet20", 278_324, (16, 32, 64)),
        ("resnet32", 472_756, (16, 32, 64)),
        ("resnet56", 861_620, (16, 32, 64)),
        ("resnet110", 1_736_564, (16, 32, 64)),
        ("resnet8x4", 1_250_724, (64, 128, 256)),
        ("resnet32x4", 7_451_044, (64, 128, 256)),
    ],
)
def test_resnets_of_three_stages(name, weights, channels):
    """The published sizes (0.28, 0.47, 0.86, 1.7, 1.2 and 7.4 million); maps end with the
    stages."""
    model = timm.create_model(f"{name}_cifar", num_classes=100).eval()
    assert sum(p.numel() for p in model.parameters()) == weights
    x = pixels(1, 32)
    logits, maps = with_features(model, x, deep=True)
    torch.testing.assert_close(logits, model(x))
    assert [tuple(f.shape[1:]) for f in maps[-3:]] == list(
        zip(channels, (32, 16, 8), (32, 16, 8), strict=True)
    )
    assert feature_dims(model) == [f.shape[1] for f in maps]
    assert [f.shape[-1] for f in maps] == [32 // info["reduction"] for info in model.feature_info]


ANY_IMPORT = """
import os, sys, datasets, timm, torch, transformers
for module in ("kd_plugins.data", "kd_plugins.train", "kd_plugins.models"):
    if not os.fork():  # what is imported so far stays imported
        __import__(module)
        os._exit(not timm.is_model("resnet18_cifar"))
    assert os.wait()[1] == 0, module
"""


def test_small_picture_resnets_are_known_to_timm_after_any_import():
    """No import for its side effect alone in user code."""
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    subprocess.run([sys.executable, "-c", ANY_IMPORT], check=True, env=env)


def test_class_count():
    assert class_count(Net(classes=5)) == 5
    assert class_count(vit(classes=4)) == 4
    assert class_count(timm_vit()) == CLASSES
    assert class_count(nn.Linear(2, 2)) is None
    assert class_count(timm.create_model("test_resnet", num_classes=0)) == 0


def test_logits_of():
    z = torch.zeros(2, 3)
    assert logits_of(z) is z
    assert logits_of((z, "more")) is z
    assert logits_of({"loss": None, "logits": z}) is z
    assert logits_of(vit()(pixels())).shape == (6, CLASSES)
    with pytest.raises(TypeError, match="got dict"):
        logits_of({"scores": z})


def test_teachers_from_a_folder_and_from_a_file(tmp_path):
    """As export() writes them; logits equal, head and normalisation kept."""
    model = with_cfg_timm()
    folder = export(model, tmp_path / "teacher")
    x = pixels(size=32)
    expected = model.eval()(x)
    file = folder / "model.safetensors"
    for teacher in (
        make_teacher(str(folder), None),
        make_teacher(folder, 7),
        make_teacher(f"local-dir:{folder}", None),
        make_teacher(f"test_resnet={file}", CLASSES),
        make_teacher(model, None),
    ):
        assert torch.equal(teacher.eval()(x), expected)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert torch.equal(
        make_teacher(f"test_resnet={tmp_path / 'weights.pth'}", CLASSES).eval()(x), expected
    )
    assert make_teacher(folder, None).pretrained_cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))


def with_cfg_timm():
    model = timm.create_model(
        "test_resnet", num_classes=CLASSES, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3)}
    )
    spoil(model)
    return model


def test_teachers_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resnet18=nowhere\.pth.*no file nowhere\.pth"):
        make_teacher("resnet18=nowhere.pth", CLASSES)
    with pytest.raises(ValueError, match=r"config\.json.*'resnet18="):
        make_teacher(tmp_path, CLASSES)


def test_a_network_starts_from_a_file(tmp_path):
    """With its head where that fits, else with a new one; never quietly at random."""
    model = spoil(timm.create_model("test_resnet", num_classes=7))
    file = tmp_path / "eta=2" / "weights.safetensors"  # no part of a name
    file.parent.mkdir()
    save_file(model.state_dict(), file)
    x = pixels(size=32)
    same, other = (make_model(f"test_resnet={file}", n).eval() for n in (7, CLASSES))
    assert torch.equal(same(x), model(x))
    assert other(x).shape == (6, CLASSES) and other.num_classes == CLASSES
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    again = timm.create_model(f"local-dir:{export(other, tmp_path / 'eta=3')}", pretrained=True)
    assert torch.equal(again.eval()(x), other(x))
    assert torch.equal(make_teacher(tmp_path / "eta=3", None).eval()(x), other(x))
    folder = str(tmp_path / "eta=3")  # training can go on from what export() wrote
    assert torch.equal(make_model(folder, CLASSES).eval()(x), other(x))
    assert make_model(folder, 5).num_classes == 5
    with pytest.raises(ValueError, match=r"weights.safetensors do not fit test_vit"):
        make_model(f"test_vit={file}", CLASSES)
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.pth"):
        make_model("test_resnet=nowhere.pth", CLASSES)


def test_a_new_head_starts_unsure(tmp_path):
    """timm's own of an EfficientNet would be sure of nonsense. A trained head is kept."""
    folder = export(timm.create_model("test_efficientnet", num_classes=7), tmp_path / "seven")
    file = {"file": str(folder / "model.safetensors"), "num_classes": 7}
    of_timm = make_model("test_efficientnet", CLASSES).get_classifier().weight
    heads = [
        make_model(f"local-dir:{folder}", CLASSES),
        make_model(f"test_efficientnet={file['file']}", CLASSES),
        make_model("test_efficientnet", CLASSES, pretrained=True, pretrained_cfg_overlay=file),
    ]
    for head in (network.get_classifier().weight for network in heads):
        assert head.shape == (CLASSES, of_timm.shape[1])
        assert head.abs().max() <= of_timm.shape[1] ** -0.5 < of_timm.abs().max()
    kept = make_model("test_efficientnet", 7, pretrained=True, pretrained_cfg_overlay=file)
    trained = make_model(f"local-dir:{folder}", 7)
    assert torch.equal(kept.get_classifier().weight, trained.get_classifier().weight)


def test_pickles_of_teachers_hold_tensors_only(tmp_path):
    """A file from the internet must not run code."""

    class Evil:
        def __reduce__(self):
            return (print, ("code from a checkpoint",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        make_teacher(f"test_resnet={tmp_path / 'evil.pth'}", CLASSES)


def test_names_that_are_no_networks():
    """The error names what was expected, and the nearest name."""
    with pytest.raises(
        ValueError, match=r"resnet99: expected a timm name, NAME=FILE .*did you mean resnet"
    ):
        make_model("resnet99", 3)
    with pytest.raises(ValueError, match=r"gone/a: expected a timm name, NAME=FILE or a folder"):
        make_teacher("gone/a", 3)
