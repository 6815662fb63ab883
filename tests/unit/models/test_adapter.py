"""Each network sees its own normalisation and size."""

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import FromTeachers, labels, pixels, timm_vit, with_cfg
from helpers.tiny import CLASSES, SIZE, Net, vit
from torch import nn
from transformers import AutoModelForImageClassification

from kd_plugins import CE, Mutual, SelectAll
from kd_plugins.models import PeerModule, export
from kd_plugins.models.input_config import warn_of_inputs
from kd_plugins.models.inputs import normalization


def test_each_peer_sees_its_own_normalisation():
    """The pixels come as the first peer wants them; handed on as they are, the second sees wrong
    contrast."""
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
    """As floats that were normalised for it; x / 255 where it does not tell; other channels than
    it knows are refused."""
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
    """ConvNeXt's config names an image_size that the network does not need; a wrapped ViT needs
    one it does not name."""
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
    """bf16_full_eval casts the weights and leaves the batch: without a cast here the convolution
    refuses it."""
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


def test_a_teacher_that_names_the_students_normalisation_beside_other_data_is_warned_of(caplog):
    def network(mean, std):
        made = nn.Linear(1, 1)
        made.pretrained_cfg = {"mean": (mean,) * 3, "std": (std,) * 3}
        return made

    student, teacher, other = network(0.4, 0.2), network(0.4, 0.2), network(0.3, 0.2)
    given = ((0.5,) * 3, (0.5,) * 3)
    warn_of_inputs([other, teacher], student, given)
    (record,) = caplog.records
    assert "teacher 1 names mean and std ((0.4, 0.4, 0.4)" in record.message
    caplog.clear()
    warn_of_inputs([teacher], student, None)  # the data do not say theirs
    warn_of_inputs([teacher], student, normalization(student))
    assert not caplog.records
