"""`ImageView.input_config` says what the transform does: size, normalisation, crop."""

import random

import numpy as np
import pytest
import timm
import torch
from helpers.tiny import to_tensor
from PIL import Image

from kd_plugins.data import ImageView

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def view(transform, size=(48, 40), n=2, mode="RGB", broken=()):
    rng = np.random.default_rng(0)
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    rows = [{"image": rng.integers(0, 256, shape, dtype=np.uint8), "label": 0} for _ in range(n)]
    for row in broken:
        rows[row]["image"] = b""
    return ImageView(rows, transform, max_broken=0.1)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "picture"),
    [
        (32, 0.875, (32, 32)),
        (32, 1.0, (32, 32)),
        (96, 0.9, (120, 90)),
        (224, 0.875, (90, 120)),
        (224, 0.95, (500, 375)),
        (224, 1.0, (64, 64)),
        (8, 1.0, (8, 8)),
    ],
)
def test_a_timm_transform_is_described_so_that_timm_makes_the_same(
    size, crop_pct, picture, interpolation, mode
):
    mean, std = IMAGENET if interpolation == "bicubic" else HALF
    made = dict(
        input_size=(3, size, size),
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        crop_mode=mode,
        interpolation=interpolation,
    )
    data = view(timm.data.create_transform(**made), picture)
    config = data.input_config()
    assert config["input_size"] == (3, size, size) and config["interpolation"] == interpolation
    assert config["mean"] == pytest.approx(mean, abs=2e-6)
    assert config["std"] == pytest.approx(std, abs=2e-6)
    assert config["crop_pct"] == pytest.approx(crop_pct, abs=1 / size)
    again = timm.data.create_transform(**config)
    rng = np.random.default_rng(1)
    for width, height in (picture, picture[::-1]):
        random_picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        torch.testing.assert_close(again(random_picture), data.transform(random_picture))


def test_a_timm_network_reads_it():
    made = dict(input_size=(3, 48, 48), crop_pct=0.9, mean=HALF[0], std=HALF[1])
    model = timm.create_model("test_resnet")
    config = view(timm.data.create_transform(**made)).input_config()
    model.pretrained_cfg.update(config)
    resolved = timm.data.resolve_data_config(model=model)
    assert {name: resolved[name] for name in made} == made


def test_a_target_that_is_not_square():
    made = timm.data.create_transform((3, 32, 64), crop_pct=0.9, interpolation="bilinear")
    config = view(made, (100, 80)).input_config()
    assert config["input_size"] == (3, 32, 64) and config["crop_pct"] == 0.9


def test_without_normalisation():
    made = timm.data.create_transform((3, 32, 32), crop_pct=0.9, normalize=False)
    config = view(made).input_config()
    assert "mean" not in config and "std" not in config
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 0.9


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_callables(mode):
    config = view(to_tensor, (12, 10), mode=mode).input_config()
    assert config["input_size"] == (3, 10, 12) and config["crop_pct"] == 1
    assert config["interpolation"] == "bicubic"
    # (x / 128 - 1) = (x / 255 - mean) / std
    assert config["mean"] == pytest.approx([128 / 255] * 3, abs=1e-6) == config["std"]


def test_one_channel():
    def grey(picture):
        return torch.from_numpy(np.array(picture.convert("L"))).float()[None] / 255

    config = view(grey).input_config()
    assert config["input_size"] == (1, 40, 48) and (config["mean"], config["std"]) == ((0,), (1,))


def standardised(picture):
    pixels = to_tensor(picture)
    return (pixels - pixels.mean()) / pixels.std()


def failing(picture):
    raise RuntimeError


@pytest.mark.parametrize(
    "transform",
    [
        timm.data.create_transform((3, 32, 32), is_training=True),
        timm.data.create_transform((3, 32, 32), is_training=True, scale=(1, 1), ratio=(1, 1)),
        lambda p: to_tensor(p).flip(-1) if random.random() < 0.01 else to_tensor(p),
        lambda p: to_tensor(p) + 0.1 * torch.randn(3, 1, 1),
        lambda p: to_tensor(p) * np.random.rand(),
        lambda p: (to_tensor(p) + 1) ** 2,
        standardised,
        failing,
        lambda p: -to_tensor(p),
        lambda p: to_tensor(p).flip(0),
        lambda p: to_tensor(p).flip(-1),
        lambda p: to_tensor(p).mean(0, keepdim=True).expand(3, -1, -1),
        lambda p: to_tensor(p)[:, :20, :20],
        lambda p: to_tensor(p).permute(1, 2, 0),
        lambda p: to_tensor(p).mean((1, 2)),
        lambda p: 255 - torch.from_numpy(np.array(p)).permute(2, 0, 1),
        lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1).long(),
    ],
)
def test_what_the_terms_cannot_describe_is_none(transform):
    assert view(transform).input_config() is None


def test_nothing_is_disturbed():
    def state():
        numbers = torch.get_rng_state().tolist(), random.getstate()
        return *numbers, np.random.get_state()[1].tolist()

    data = view(timm.data.create_transform((3, 32, 32)), n=4, broken=[0, 1])
    data.set_epoch(3)
    before = state()
    assert data.input_config()["input_size"] == (3, 32, 32)
    assert state() == before and data.broken() == [] and int(data._epoch) == 3
    assert view(to_tensor, n=1, broken=[0]).input_config() is None
