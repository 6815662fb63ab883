"""What the module that hosts networks and loss hands to whom."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.networks import FromTeachers, labels, pixels, timm_conv, timm_vit
from helpers.tiny import CLASSES, Net, difference, state, vit

from kd_plugins import CE, KD, SMKD, FitNet, Loss, Mutual, MyLC, SelectAll
from kd_plugins.models import PeerModule, feature_dims, with_features
from kd_plugins.train.checks import refuse_pairing


class ByIndex(Loss):
    """Cross-entropy weighted by the position in the data set."""

    def per_sample(self, logits, target, index):
        return -(target * logits.log_softmax(-1)).sum(-1) * index


def test_train_returns_the_loss_alone_and_eval_plain_cross_entropy():
    """Whatever else is in the output is gathered into the predictions; and eval_loss must
    compare across methods."""
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


def test_soft_labels_in_evaluation():
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
    """All layers where one but the last is asked for; in the teacher's own size; teachers get no
    gradient, stay in eval."""
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
    """Of teachers only what the loss reads is compared: maps of any width, logits of as many
    classes."""
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
