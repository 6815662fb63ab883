"""How pictures were prepared for each network, and what is said where nobody can tell."""

import copy
import json
import logging

import numpy as np
import pytest
import timm
import torch
from helpers.tiny import CLASSES, Net, vit
from PIL import Image
from torchvision import transforms as T
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from kd_plugins import CE
from kd_plugins.data import ImageView
from kd_plugins.models import PeerModule, export
from kd_plugins.models.input_config import batch_range, input_configs, normalization_of
from kd_plugins.models.inputs import InputAdapter

HALF, OTHER = ((0.5,) * 3, (0.25,) * 3), ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
VIEW = {"input_size": (3, 20, 20), "mean": (0.9, 0.1, 0.4), "std": (0.1, 0.3, 0.15)}
GIVEN = VIEW | {"crop_pct": 0.8, "interpolation": "bicubic"}


class View:
    def __init__(self, config):
        self.config = config

    def input_config(self):
        return self.config


def with_cfg(model, cfg):
    model.pretrained_cfg = dict(zip(("mean", "std"), cfg, strict=True))
    return model


def adapters(*models):
    return [InputAdapter(model, models[0]) for model in models]


def normalised(raw, config):
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ("mean", "std"))
    return (raw - mean) / std


def as_given(found):
    """As it comes back from JSON, whose lists were tuples."""
    values = {name: found[name] for name in GIVEN}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@pytest.mark.parametrize("of_bytes", [False, True])
def test_recorded_is_what_each_network_saw(of_bytes):
    """Pictures normalised by the recorded config are the pixels that the adapter hands over."""
    nets = adapters(with_cfg(Net(), HALF), with_cfg(Net(), OTHER), Net(), vit())
    raw = torch.randint(256, (4, 3, 20, 20), dtype=torch.uint8)
    view = {"input_size": (3, 20, 20)} if of_bytes else VIEW
    batch = raw if of_bytes else normalised(raw / 255, VIEW)
    configs = input_configs(nets, {"evaluation": View(view)}, {"evaluation": batch_range(batch)})
    for adapter, config in zip(nets[:3], configs[:3], strict=True):
        expected = normalised(raw / 255, config)
        torch.testing.assert_close(adapter(batch), expected, rtol=1e-4, atol=1e-4)
        assert config["input_size"] == (3, 20, 20)
    assert configs[3]["input_size"] == (3, 8, 8) and configs[3]["interpolation"] == "bilinear"


def test_the_first_view_that_knows_is_believed():
    net = adapters(with_cfg(Net(), HALF))
    train = VIEW | {"input_size": (3, 16, 16)}
    assert input_configs(net, {"evaluation": View(VIEW), "training": View(train)}, {}) == [VIEW]
    assert input_configs(net, {"evaluation": View(None), "training": View(train)}, {}) == [train]
    assert input_configs(net, {"evaluation": None, "training": [1]}, {}) == [None]
    assert input_configs(net, {"evaluation": View(VIEW)}, {}, train) == [train]


def test_a_view_that_cannot_say(caplog):
    """The size is that of the first batch; the rest cannot be checked, and the log says so."""
    caplog.set_level(logging.WARNING)
    nets = adapters(with_cfg(Net(), HALF), with_cfg(Net(), OTHER))
    batch = batch_range(torch.rand(4, 3, 20, 28) * 2 - 1)
    a, b = input_configs(nets, {"evaluation": None, "training": [1]}, {"training": batch})
    assert a == {"input_size": (3, 20, 28), "mean": HALF[0], "std": HALF[1]}
    assert b["mean"] == pytest.approx(OTHER[0]) and b["std"] == pytest.approx(OTHER[1])
    assert "the training data do not say how they prepare their pictures" in caplog.text
    assert "input_config=" in caplog.text
    unknown = adapters(Net())
    assert input_configs(unknown, {"training": None}, {"training": batch}) == [
        {"input_size": (3, 20, 28)}
    ]


CONTRADICTIONS = {
    "values": (VIEW, torch.rand(2, 3, 20, 20) * 9, r"pixels would lie between .* not 0 and 1"),
    "size": (VIEW, torch.rand(2, 3, 9, 20), r"\(3, 9, 20\), not \(3, 20, 20\)"),
    "bytes": (VIEW, torch.zeros(2, 3, 20, 20, dtype=torch.uint8), "bytes, not floats"),
    "floats": ({"input_size": (3, 20, 20)}, torch.rand(2, 3, 20, 20), "floats, not bytes"),
    "of the network": (None, torch.rand(2, 3, 20, 20) * 9, "pixels would lie between"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_contradictions(kind, caplog):
    """Refused for the evaluation, whose accuracy would not be reached; a warning for training."""
    config, pixels, message = CONTRADICTIONS[kind]
    nets, batch = adapters(with_cfg(Net(), HALF)), batch_range(pixels)
    with pytest.raises(ValueError, match=message):
        input_configs(nets, {"evaluation": View(config)}, {"evaluation": batch})
    with caplog.at_level(logging.WARNING):
        input_configs(nets, {"training": View(config)}, {"training": batch})
    assert "the first training batch does not fit" in caplog.text


def test_export_writes_it_for_timm(tmp_path):
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    before = copy.deepcopy(model.pretrained_cfg)
    export(model, tmp_path, ["a", "b", "c"], GIVEN)
    assert model.pretrained_cfg == before
    alone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for found in (
        timm.data.resolve_data_config({}, model=alone),
        timm.data.resolve_data_config({}, model=alone, use_test_size=True),
        AutoImageProcessor.from_pretrained(tmp_path).data_config,
    ):
        assert as_given(found) == GIVEN


def test_export_writes_it_for_transformers(tmp_path):
    """In preprocessor_config.json; of a timm network in transformers in its own config."""
    model = vit()
    before = model.config.to_dict()
    export(model, tmp_path / "vit", ["a", "b", "c"], GIVEN)
    assert model.config.to_dict() == before
    processor = AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert tuple(processor.image_mean) == GIVEN["mean"]
    assert tuple(processor.image_std) == GIVEN["std"]
    assert processor.size["shortest_edge"] == 25 and processor.crop_size["height"] == 20
    assert AutoConfig.from_pretrained(tmp_path / "vit").id2label == {0: "a", 1: "b", 2: "c"}

    export(vit(), tmp_path / "spare", ["a", "b"])  # two names for three outputs
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "spare")
    assert again.config.num_labels == 3

    export(timm.create_model("test_resnet", num_classes=CLASSES), tmp_path / "timm")
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "timm")
    export(wrapped, tmp_path / "wrapped", None, GIVEN)
    found = AutoImageProcessor.from_pretrained(tmp_path / "wrapped").data_config
    assert as_given(found) == GIVEN


@pytest.mark.parametrize(("resize", "picture"), [(70, (160, 100)), ((48, 64), (160, 100))])
def test_rectangles_reach_the_network_as_in_training(tmp_path, resize, picture):
    """The processor sees of a picture what the transform saw: the middle, or all of it."""
    crop = [T.CenterCrop((48, 64))] if resize == 70 else []
    scale = [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
    transform = T.Compose([T.Resize(resize), *crop, *scale])
    columns = np.linspace(0, 255, picture[0])[None, :, None]
    image = Image.fromarray(np.broadcast_to(columns, (*picture[::-1], 3)).astype(np.uint8))
    view = ImageView([{"image": image, "label": 0}], transform)
    export(Net(), tmp_path, None, view.input_config())
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    found = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, transform(image), rtol=0, atol=0.02)  # a grey level: 0.008


def test_an_export_leaves_nothing_of_the_one_before(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    export(vit(), tmp_path, None, GIVEN | {"interpolation": "lanczos"})
    assert json.loads(path.read_text())["resample"] == 1  # as PIL counts them
    export(vit(), tmp_path)
    assert not path.exists()


def test_a_teacher_sees_what_it_was_exported_with(tmp_path):
    """The config of a fresh student says nothing about the data; what the view says counts."""
    teacher = timm.create_model("test_resnet", num_classes=CLASSES)
    folder = export(teacher, tmp_path, None, GIVEN)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    student, other = timm.create_model("test_resnet", num_classes=CLASSES), with_cfg(Net(), OTHER)
    assert normalization_of([View(None), View(VIEW)], []) == (VIEW["mean"], VIEW["std"])
    hosted = PeerModule([student], CE(), [again, other], (VIEW["mean"], VIEW["std"]))
    raw = torch.rand(4, 3, 20, 20)
    seen = normalised(raw, VIEW)
    for adapter, network in zip(hosted.inputs, (None, VIEW, other.pretrained_cfg), strict=True):
        expected = seen if network is None else normalised(raw, network)
        torch.testing.assert_close(adapter(seen), expected, rtol=1e-4, atol=1e-4)


def test_networks_that_expect_other_pixels_than_the_data_say(caplog):
    networks = [with_cfg(Net(), HALF), with_cfg(Net(), OTHER)]
    assert normalization_of([View(None), [1]], networks) is None
    assert "floats are taken as normalised for the first network, mean and std" in caplog.text
    caplog.clear()
    assert normalization_of([View(None)], [networks[0], Net()]) is None
    assert normalization_of([View({"input_size": (3, 8, 8)})], [networks[0]] * 2) is None
    bytes_view = View({"input_size": (3, 8, 8)})  # each network normalises bytes for itself
    assert normalization_of([View(None), bytes_view], networks) is None
    assert not caplog.text
