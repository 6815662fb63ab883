"""Networks under one roof: how they are made, what the hosted module hands to whom, and what is exported."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.processes import PYTHONPATH
from helpers.tiny import CLASSES, SIZE, Net, difference, state, vit
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from kd_plugins import CE, KD, SMKD, FitNet, Loss, Mutual, MyLC, SelectAll
from kd_plugins.models import (
    PeerModule,
    class_count,
    export,
    feature_dims,
    logits_of,
    make_model,
    make_teacher,
    with_features,
)
from kd_plugins.train.checks import refuse_pairing

NAMES = ["ant", "bee", "cat"]


class FromTeachers(Loss):
    """Squared distance to the teachers' mean logits: shows which logits arrived."""

    def per_sample(self, logits, target, teacher):
        return (logits - teacher.mean(0)).square().sum(-1)


class ByIndex(Loss):
    """Cross-entropy weighted by the position in the data set."""

    def per_sample(self, logits, target, index):
        return -(target * logits.log_softmax(-1)).sum(-1) * index


def pixels(n=6, size=SIZE):
    return torch.randn(n, 3, size, size)


def labels(n=6):
    return torch.arange(n) % CLASSES


def timm_vit(img_size=16, dynamic_img_size=False):
    size = {"img_size": img_size, "patch_size": 8, "dynamic_img_size": dynamic_img_size}
    return timm.create_model("test_vit", num_classes=CLASSES, **size)


def timm_conv():
    return timm.create_model("resnet10t", channels=(8, 8, 8, 8), num_classes=CLASSES)


def with_cfg(model, mean, std):
    model.pretrained_cfg = {"mean": mean, "std": std}
    return model


def spoil(model):
    """Statistics and weights that no constructor makes, so that a load which leaves something out shows."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 + 0.1 * torch.rand_like(tensor))
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- made


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


# ------------------------------------------------------------------------------------------------------------ inputs


def test_each_peer_sees_its_own_normalisation():
    """The pixels come as the first peer wants them; handed on as they are, the second sees wrong contrast."""
    half, imagenet = ((0.5,) * 3, (0.25,) * 3), ((0.48, 0.45, 0.4), (0.22, 0.23, 0.225))
    a, b, unknown = with_cfg(Net(1), *half), with_cfg(Net(2), *imagenet), Net(3)
    hosted = PeerModule([a, b, unknown], CE()).eval()
    raw = torch.rand(6, 3, SIZE, SIZE)
    as_a, as_b = [
        (raw - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]
        for m, s in (half, imagenet)
    ]
    logits = hosted(as_a)["logits"]
    torch.testing.assert_close(logits[:, 0], a(as_a), rtol=0, atol=0)
    torch.testing.assert_close(logits[:, 1], b(as_b), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, 2], unknown(as_a), rtol=0, atol=0)
    assert (b(as_a) - b(as_b)).abs().max() > 0.1
    assert not [
        name for name in hosted.state_dict() if name.startswith("inputs")
    ]  # known from the models: no state


def test_teacher_sees_its_own_normalisation():
    half, other = ((0.5,) * 3, (0.25,) * 3), ((0.1,) * 3, (0.5,) * 3)
    student, teacher = with_cfg(Net(1), *half), with_cfg(Net(2), *other)
    hosted = PeerModule([student], FromTeachers(), [teacher])
    raw = torch.rand(6, 3, SIZE, SIZE)
    loss = hosted((raw - 0.5) / 0.25, labels())["loss"]
    expected = (student((raw - 0.5) / 0.25) - teacher((raw - 0.1) / 0.5)).square().sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_bytes_are_normalised_for_each_network():
    """As floats that were normalised for it; x / 255 where it does not tell; other channels than it knows are refused."""
    own = [((0.5, 0.4, 0.3), (0.2, 0.3, 0.1)), ((0.1,) * 3, (0.5,) * 3)]
    a, b, unknown = with_cfg(Net(1), *own[0]), with_cfg(Net(2), *own[1]), Net(3)
    hosted = PeerModule([a, b, unknown], CE()).eval()
    raw = torch.randint(256, (6, 3, SIZE, SIZE), dtype=torch.uint8)
    means, stds = (
        [torch.tensor(cfg[k])[:, None, None] for cfg in (*own, ((0.0,), (1.0,)))] for k in (0, 1)
    )
    expected = [
        net((raw / 255 - m) / s) for net, m, s in zip((a, b, unknown), means, stds, strict=True)
    ]
    torch.testing.assert_close(
        hosted(raw)["logits"], torch.stack(expected, dim=1), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"bytes of 1 channels, \[6, 1, .*normalised floats"):
        hosted(raw[:, :1])


def test_fixed_size_networks_get_resized_pixels():
    small, big = timm_vit(16).eval(), pixels(4, 24)
    hosted = PeerModule(
        [Net(), small, vit().eval()], CE()
    ).eval()  # the last one: transformers, 8 px
    logits = hosted(big)["logits"]

    def resized(size):
        return F.interpolate(
            big, (size, size), mode="bilinear", antialias=True, align_corners=False
        )

    torch.testing.assert_close(
        logits[:, 0], hosted.peers[0](big)
    )  # takes any size, and gets it untouched
    torch.testing.assert_close(logits[:, 1], small(resized(16)))
    torch.testing.assert_close(logits[:, 2], hosted.peers[2](resized(8)).logits)
    anysize = timm_vit(16, dynamic_img_size=True).eval()
    torch.testing.assert_close(
        PeerModule([anysize], CE()).eval()(big)["logits"][:, 0], anysize(big)
    )


@pytest.mark.parametrize("kind", ["transformers conv net", "timm ViT in transformers"])
def test_size_is_known_of_wrapped_and_not_imposed_on_convolutions(kind, tmp_path):
    """ConvNeXt's config names an image_size that the network does not need; a wrapped ViT needs one it does not name."""
    if kind == "transformers conv net":
        from transformers import ConvNextConfig, ConvNextForImageClassification

        config = ConvNextConfig(
            hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], num_labels=CLASSES, image_size=64
        )
        model, shown = ConvNextForImageClassification(config).eval(), pixels(2, 32)
        expected = model(shown).logits
    else:
        export(timm_vit(16), tmp_path)
        model, shown = (
            AutoModelForImageClassification.from_pretrained(tmp_path).eval(),
            pixels(2, 24),
        )
        expected = model(
            F.interpolate(shown, (16, 16), mode="bilinear", antialias=True, align_corners=False)
        ).logits
    torch.testing.assert_close(PeerModule([model], CE()).eval()(shown)["logits"][:, 0], expected)


def test_pixels_take_the_dtype_of_the_weights():
    """bf16_full_eval casts the weights and leaves the batch: without a cast here the convolution refuses it."""
    a, b, x = (
        with_cfg(Net(1), (0.5,) * 3, (0.2,) * 3),
        with_cfg(Net(2), (0.4,) * 3, (0.3,) * 3),
        pixels(),
    )
    hosted = PeerModule([a, b], Mutual(CE(), SelectAll())).eval()
    full = hosted(x, labels())
    half = hosted.to(torch.bfloat16)(x, labels())
    assert a.conv.weight.dtype == torch.bfloat16
    assert half["logits"].dtype == half["loss"].dtype == torch.float32
    torch.testing.assert_close(half["logits"], full["logits"], rtol=0.1, atol=0.3)


# ------------------------------------------------------------------------------------------------------------ hosted


def test_train_returns_the_loss_alone_and_eval_plain_cross_entropy():
    """Whatever else is in the output is gathered into the predictions; and eval_loss must compare across methods."""
    peers, x, y = [Net(1), Net(2)], pixels(), labels()
    loss = SMKD(MyLC(window=10), eta=1.0, b2=0.0)
    hosted = PeerModule(peers, loss)
    output = hosted(x, y)
    assert output.keys() == {"loss"}
    assert hosted.stats["loss"] == output["loss"]
    assert not hosted.stats["loss"].requires_grad
    assert hosted.stats.keys() >= {
        "own_a",
        "own_b",
        "taught_a",
        "taught_b",
        "selected_a",
        "mean_certainty_a",
        "mean_certainty_b",
        "threshold",
    }
    r, hosted = loss.refine[0].r.clone(), hosted.eval()
    output = hosted(x, y, clean_labels=y.flip(0))
    plain = torch.stack([F.cross_entropy(p(x), y) for p in peers]).mean()
    assert list(output) == ["loss", "logits", "clean_labels"]
    torch.testing.assert_close(output["loss"], plain)
    torch.testing.assert_close(output["logits"], torch.stack([p(x) for p in peers], dim=1))
    assert loss.refine[0].r == r > 0
    assert list(hosted(x)) == ["logits"]


def test_soft_labels_eval_modeuation():
    """The plain cross-entropy to distributions [B, C]; integer labels of any width."""
    peers, x, y = [Net(1), Net(2)], pixels(), labels()
    hosted = PeerModule(peers, Mutual(CE(), SelectAll())).eval()
    soft = 0.8 * F.one_hot(y, CLASSES) + 0.2 / CLASSES
    expected = torch.stack([F.cross_entropy(p(x), soft) for p in peers]).mean()
    torch.testing.assert_close(hosted(x, soft)["loss"], expected)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(hosted(x, y.to(dtype))["loss"], hosted(x, y)["loss"])


def test_rows_without_labels_and_other_columns():
    """In prediction the logits; in training an error that names what there is."""
    hosted, x = PeerModule([Net(1)], CE()), pixels()
    assert list(hosted.eval()(x, path=torch.zeros(6))) == ["logits"]
    hosted.train()
    assert list(hosted(x, labels(), path=torch.zeros(6))) == ["loss"]
    with pytest.raises(ValueError, match=r"no labels, only \['path', 'pixel_values'\]"):
        hosted(x, path=torch.zeros(6))
    with pytest.raises(ValueError, match=r"none of the inputs of Net: expected pixel_values"):
        hosted(picture=x, labels=labels())


def test_the_last_step_is_left_for_whoever_reads_it():
    peers, x, y = [Net(1), Net(2)], pixels(), labels()
    hosted = PeerModule(peers, Mutual(CE(), SelectAll()))
    hosted(x, y, index=torch.arange(6))
    assert not any(z.requires_grad for z in hosted.last["logits"])
    torch.testing.assert_close(hosted.last["logits"][1], peers[1](x).detach())
    assert torch.equal(hosted.last["labels"], y)
    assert torch.equal(hosted.last["index"], torch.arange(6))
    hosted(x, y)
    assert hosted.last["index"] is None


def test_selected_right_counts_what_was_taught():
    x, y = pixels(), labels()
    loss = Mutual(CE(), SelectAll())
    hosted = PeerModule([Net(1), Net(2)], loss)
    clean = y.clone()
    clean[:2] = (clean[:2] + 1) % CLASSES  # two of the six labels that are taught are wrong
    hosted(x, y, clean_labels=clean)
    for peer in "ab":
        assert hosted.stats[f"selected_right_{peer}"].item() == pytest.approx(4 / 6)
    hosted(x, y)
    assert "selected_right_a" not in hosted.stats


def test_teachers_do_not_learn_and_stay_out_of_the_checkpoint():
    teacher = Net(2, bn=True, dropout=0.5).train()
    before = state(teacher)
    hosted = PeerModule([Net(1, bn=True)], FromTeachers(), [teacher]).train()
    assert hosted.peers[0].training
    assert not teacher.training
    hosted(pixels(), labels())["loss"].backward()
    assert hosted.peers[0].conv.weight.grad.abs().max() > 0
    assert difference(before, state(teacher)) == 0  # BatchNorm's means too
    assert all(p.grad is None for p in teacher.parameters())
    owned = {id(p) for p in hosted.parameters()}
    assert not owned & {id(p) for p in teacher.parameters()}
    assert len(hosted.state_dict()) == len(hosted.peers[0].state_dict())
    hosted.double()
    assert teacher.conv.weight.dtype == torch.float64
    hosted.to("meta")
    assert teacher.conv.weight.device.type == "meta"


def test_teachers_are_handed_back_as_they_came():
    """Mode and requires_grad of every module: a teacher may be a peer in the next run."""
    teachers = [Net(2, dropout=0.5).train(), Net(3).eval()]
    teachers[0].norm.eval()  # a part in another mode than the rest
    teachers[1].fc.requires_grad_(False)

    def condition():
        modes = [m.training for t in teachers for m in t.modules()]
        return modes, [p.requires_grad for t in teachers for p in t.parameters()]

    before = condition()
    hosted = PeerModule([Net(1)], FromTeachers(), teachers)
    for _ in range(2):
        hosted.train()(pixels(), labels())
        assert not any(m.training for t in teachers for m in t.modules())
        hosted.eval()
        assert condition() == before
    hosted.train()(pixels(), labels())
    hosted.teachers.release()
    assert condition() == before


def test_teachers_are_stacked_and_not_dropped_out():
    x, y, teachers = pixels(), labels(), [Net(2, dropout=0.5), Net(3)]
    student = Net(1)
    hosted = PeerModule([student], FromTeachers(), teachers)
    mean = torch.stack([t.eval()(x) for t in teachers]).mean(0)
    torch.testing.assert_close(hosted(x, y)["loss"], (student(x) - mean).square().sum(-1).mean())


def test_index_reaches_the_loss_that_reads_it():
    x, y, model = pixels(), labels(), Net(1)
    index = torch.tensor([5, 0, 3, 1, 2, 9])
    loss = PeerModule([model], ByIndex())(x, y, index=index)["loss"]
    torch.testing.assert_close(
        loss, (F.cross_entropy(model(x), y, reduction="none") * index).mean()
    )
    with pytest.raises(TypeError, match=r"ByIndex reads \['index'\]: missing"):
        PeerModule([model], ByIndex())(x, y)


def test_activation_checkpointing_computes_the_same_gradient_twice():
    x, y = pixels(4, 16), labels(4)
    peers = [timm_vit(), vit(image_size=16)]
    layer = next(next(m for m in peers[1].modules() if type(m).__name__ == "ViTLayer").children())
    hosted = PeerModule(peers, Mutual(CE(), SelectAll()))

    def gradient():
        calls = []
        hooks = [
            m.register_forward_pre_hook(lambda *_: calls.append(1))
            for m in (peers[0].blocks[0], layer)
        ]
        hosted.zero_grad()
        hosted(x, y)["loss"].backward()
        for hook in hooks:
            hook.remove()
        return len(calls), {name: p.grad.clone() for name, p in hosted.named_parameters()}

    once, plain = gradient()
    hosted.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    twice, recomputed = gradient()
    assert (once, twice) == (2, 4)  # a block of timm's, a layer of transformers'
    assert difference(plain, recomputed) < 1e-6
    with pytest.raises(ValueError, match="Net has no activation checkpointing"):
        PeerModule([Net()], CE()).activation_checkpointing_enable()


# ------------------------------------------------------------------------------------------------------------ export

EXPORTED = {
    "timm conv net": (timm_conv, 32),
    "timm ViT with its own size": (timm_vit, 16),
    "ResNet for small pictures": (
        lambda: timm.create_model("resnet10_cifar", num_classes=CLASSES),
        32,
    ),
}


@pytest.mark.parametrize("kind", EXPORTED)
def test_export_timm(kind, tmp_path):
    """Alone, in timm and in transformers, with equal logits and the names of its classes."""
    make, size = EXPORTED[kind]
    model = spoil(make()).to(
        memory_format=torch.channels_last
    )  # safetensors refuses strided weights
    strides = [p.stride() for p in model.parameters()]
    x = pixels(3, size)
    expected = model(x)
    assert export(model, tmp_path / "new" / "folder", NAMES) == tmp_path / "new" / "folder"
    assert strides == [p.stride() for p in model.parameters()]  # the running model is left as it is

    folder = tmp_path / "new" / "folder"
    alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(alone(x), expected, rtol=1e-5, atol=1e-5)
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(wrapped(x).logits, expected, rtol=1e-5, atol=1e-5)
    assert [wrapped.config.id2label[i] for i in range(CLASSES)] == NAMES
    assert json.loads((folder / "config.json").read_text())["label_names"] == NAMES
    assert tuple(alone.pretrained_cfg["mean"]) == tuple(model.pretrained_cfg["mean"])

    # a peer that comes from transformers is still re-normalised: it tells by its config
    first = with_cfg(Net(), (0.0,) * 3, (1.0,) * 3)
    raw = torch.rand(3, 3, size, size)
    mean, std = (torch.tensor(model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    second = PeerModule([first, wrapped], Mutual(CE(), SelectAll())).eval()(raw)["logits"][:, 1]
    torch.testing.assert_close(second, model((raw - mean) / std), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_export_transformers(kind, tmp_path):
    if kind == "vit":
        model, size = vit(), SIZE
    else:
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1]}
        model, size = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES)), 32
    model = spoil(model).to(memory_format=torch.channels_last)
    export(model, tmp_path, NAMES)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = pixels(3, size)
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
    assert [again.config.id2label[i] for i in range(CLASSES)] == NAMES
    assert again.config.label2id == {name: i for i, name in enumerate(NAMES)}


def test_export_of_any_other_module(tmp_path):
    model = spoil(Net(bn=True)).to(memory_format=torch.channels_last)
    export(model, tmp_path, NAMES)
    again = Net(seed=9, bn=True).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert difference(state(model), state(again)) == 0


# ------------------------------------------------------------------------------------------------------------- teachers


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


def test_pickles_of_teachers_hold_tensors_only(tmp_path):
    """A file from the internet must not run code."""

    class Evil:
        def __reduce__(self):
            return (print, ("code from a checkpoint",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl"):
        make_teacher(f"test_resnet={tmp_path / 'evil.pth'}", CLASSES)


class FromMaps(Loss):
    """Shows which maps arrived, of the student and of each teacher."""

    layers = (-2, -1)

    def per_sample(self, logits, target, features, teacher_features):
        self.seen = (
            [f.shape for f in features],
            [[f.shape for f in maps] for maps in teacher_features],
        )
        assert not any(f.requires_grad for maps in teacher_features for f in maps)
        return logits.sum(-1) + sum(f.sum((1, 2, 3)) for f in features)


def test_maps_of_student_and_teachers_are_handed_over():
    """All layers where one but the last is asked for; in the teacher's own size; teachers get no gradient, stay in eval."""
    student, cnn = timm.create_model("test_resnet", num_classes=CLASSES), timm_conv()
    loss = FromMaps()
    hosted = PeerModule([student], loss, [cnn, timm_vit()]).train()
    hosted(pixels(4, 32), labels(4))["loss"].backward()
    own, theirs = loss.seen
    assert [s[1] for s in own] == feature_dims(student)
    assert [[s[1] for s in maps] for maps in theirs] == [feature_dims(m) for m in hosted.teachers]
    assert theirs[1][-1][-2:] == (2, 2)  # 16 px in patches of 8
    assert next(student.parameters()).grad is not None and all(
        p.grad is None for m in hosted.teachers for p in m.parameters()
    )
    loss.layers = (-1,)
    hosted = PeerModule([student], loss, [cnn])
    hosted.train()(pixels(4, 32), labels(4))
    assert [s[1] for s in loss.seen[0]] == feature_dims(student)[-1:]


def test_teachers_of_other_widths_and_without_heads():
    """Of teachers only what the loss reads is compared: maps of any width, logits of as many classes."""
    student, teachers = (
        timm_conv(),
        [
            timm.create_model("test_resnet", num_classes=0),  # DINO-like
            timm.create_model("test_vit", num_classes=7, img_size=16, patch_size=8),
        ],
    )
    dims = [feature_dims(m)[-1] for m in teachers]
    loss = CE() + FitNet(feature_dims(student)[-1], dims, layer=-1)
    refuse_pairing([student], teachers, loss)
    assert (
        PeerModule([student], loss, teachers).train()(pixels(4, 32), labels(4))["loss"].isfinite()
    )
    with pytest.raises(ValueError, match=r"teacher 0: num_classes=0.*no logits, which KD reads"):
        refuse_pairing([student], teachers[:1], KD())
    with pytest.raises(ValueError, match=r"different numbers of classes: .*'teacher 0': 7"):
        refuse_pairing([student], teachers[1:], KD())
    wide = [timm_conv(), timm.create_model("test_resnet", num_classes=CLASSES)]
    assert PeerModule([student], KD(), wide).train()(pixels(4, 32), labels(4))["loss"].isfinite()


def test_a_peer_that_cannot_learn_is_refused():
    with pytest.raises(ValueError, match=r"network b \(Net\) has no trainable parameter"):
        refuse_pairing([Net(1), Net(2).requires_grad_(False)], [], SMKD())


def test_maps_of_a_vit_that_takes_other_sizes_than_its_own():
    """Patches of 8 px in a picture of 32 x 24, for a network that was made for 16 x 16."""
    model = timm_vit(16, dynamic_img_size=True).eval()
    x = torch.randn(2, 3, 32, 24)
    logits, (last,) = with_features(model, x)
    assert last.shape[-2:] == (4, 3)
    torch.testing.assert_close(logits, model(x))


@pytest.mark.parametrize("module", ["kd_plugins.data", "kd_plugins.train", "kd_plugins.models"])
def test_small_picture_resnets_are_known_to_timm_after_any_import(module):
    """No import for its side effect alone in user code."""
    code = f"import {module}, timm\nassert timm.is_model('resnet18_cifar')"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": PYTHONPATH}
    )


def test_names_that_are_no_networks():
    """The error names what was expected, and the nearest name."""
    with pytest.raises(ValueError, match=r"resnet99: expected a timm name; .*did you mean resnet"):
        make_model("resnet99", 3)
    with pytest.raises(ValueError, match=r"gone/a: expected a timm name, NAME=FILE or a folder"):
        make_teacher("gone/a", 3)
