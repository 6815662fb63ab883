"""An exported network gives the accuracy that its card names, loaded by the code of its card."""

import numpy as np
import pytest
import torch
from helpers.cards import card_accuracy, loaded_by_card, predictor
from helpers.tiny import trainer, vit
from PIL import Image
from torchvision import transforms
from transformers import ResNetConfig, ResNetForImageClassification, pipeline

from kd_plugins import CE, SMKD
from kd_plugins.data import ImageView
from kd_plugins.models import make_model

MEAN, STD = (0.9, 0.1, 0.4), (0.1, 0.3, 0.15)  # nobody's default
SIZE, CLASSES = 24, 3


def pictures(n, seed):
    """Dark, medium and bright pictures: another mean or std and the classes are taken for
    others."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    level = 70 + 45 * labels + rng.normal(0, 14, n)
    pixels = level[:, None, None, None] + rng.normal(0, 25, (n, SIZE, SIZE, 3))
    arrays = pixels.clip(0, 255).astype(np.uint8)
    return [{"image": a, "label": int(y)} for a, y in zip(arrays, labels, strict=True)]


def view(n, seed, of_bytes):
    steps = [transforms.PILToTensor()]
    if not of_bytes:
        steps = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return ImageView(pictures(n, seed), transforms.Compose(steps))


def timm_conv():
    return make_model("resnet10t", CLASSES, channels=(8, 8, 8, 8))


def timm_vit():
    torch.manual_seed(1)
    return make_model("test_vit", CLASSES, img_size=16, patch_size=8)


def hf_vit():
    return vit(CLASSES, image_size=16, patch_size=8)


def hf_conv():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))


def trained(folder, models, of_bytes=False):
    loss = SMKD(CE(), eta=1, b2=0) if len(models) > 1 else CE()
    settings = {"per_device_train_batch_size": 16, "num_train_epochs": 6, "logging_steps": 50}
    settings |= {"optim": "adamw_torch", "optim_args": None, "learning_rate": 0.008}
    train, test = view(192, 0, of_bytes), view(60, 1, of_bytes)
    run = trainer(folder, models, loss, train, test, **settings)
    run.train()
    run.evaluate()
    return run


def accuracy(predict, name=int):
    rows = pictures(60, 1)
    right = [predict(Image.fromarray(row["image"])) == name(row["label"]) for row in rows]
    return np.mean(right)


RUNS = {
    "timm": ([timm_conv], False),
    "transformers": ([hf_conv], False),
    "transformers, bytes": ([hf_conv], True),
    "two input sizes": ([timm_conv, timm_vit], False),
    "two input sizes, bytes": ([timm_conv, timm_vit], True),
    "transformers beside timm": ([timm_conv, hf_vit], False),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_accuracy_of_the_card(kind, tmp_path):
    """The normalisation is not what any network comes with, and a ViT sees another size."""
    makers, of_bytes = RUNS[kind]
    run = trained(tmp_path, [make() for make in makers], of_bytes)
    folders = run.export()
    for k, folder in enumerate(folders):
        expected = card_accuracy(folder, f"_{'ab'[k]}" if len(folders) > 1 else "")
        assert expected > 0.75
        ways = [accuracy(predictor(names)) for names in loaded_by_card(folder)]
        assert len(ways) == (2 if makers[k] in (timm_conv, timm_vit) else 1)
        classify = pipeline("image-classification", model=str(folder))
        ways.append(accuracy(lambda picture: classify(picture)[0]["label"], str))  # noqa: B023
        assert ways == pytest.approx([expected] * len(ways), abs=0.005)
