"""Are pictures of no class, and copies with another label, found? Both are planted.

    python recipes/experiments/plant_pictures.py --data CIFAR100_SMALL --label label \\
        --others FOOD101_10CLS --backbone NAME=FILE --shrink 32 --seeds 1 2 3

For each seed, `--planted` pictures of the other data set get random labels, and as many pictures
of the data set are copied with another label, in each of five ways. Measured are AUROC of `outlier`
and its precision among as many pictures as were planted, and the share of the copies that
`near_duplicates` finds. The pairs that were not planted are counted too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageOps
from sklearn.metrics import roc_auc_score
from transformers.hf_argparser import HfArg

import kd_plugins as kd
from kd_plugins.audit import frozen_features, near_duplicates
from kd_plugins.audit.tables import markdown, mean_std


@dataclass
class Settings:
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    others: str = HfArg(default="ethz/food101", help="data whose pictures belong to no class")
    split: str = "train"
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(default=None, help="column of labels, if there are several")
    backbone: str = "tf_efficientnet_lite0"
    side: int = 96
    shrink: int = HfArg(default=0, help="pixels to which the others are resized; 0 leaves them")
    features: str = HfArg(default="runs/features", help="folder for the features of the data")
    planted: int = 100
    seeds: list[int] = HfArg(default_factory=lambda: [1, 2, 3])
    output_dir: str = "runs/planted"


def compressed(picture: Image.Image, quality: int = 75) -> Image.Image:
    picture.save(buffer := BytesIO(), "jpeg", quality=quality)
    return Image.open(buffer).convert("RGB")


def shifted(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture)
    return Image.fromarray(np.concatenate([pixels[:, :1], pixels[:, :-1]], axis=1))


def smaller(picture: Image.Image) -> Image.Image:
    return picture.resize([round(0.9 * n) for n in picture.size], Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 90": lambda picture: compressed(picture, 90),
    "JPEG, quality 75": compressed,
    "shifted by a pixel": shifted,
    "mirrored": ImageOps.mirror,
    "nine tenths of the size": smaller,
}


def features_of(pictures: list[Image.Image], s: Settings, name: str) -> np.ndarray:
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(1)})
    columns = {"image": pictures, "label": [0] * len(pictures)}
    rows = datasets.Dataset.from_dict(columns, features=kinds)
    view = frozen_features(rows, s.backbone, Path(s.output_dir, name), side=s.side)
    return np.array(view.features)


def run(s: Settings, rows, others, view, seed: int) -> dict[str, float]:
    """The figures for one seed."""
    rng = np.random.default_rng(seed)
    pictures = [others[int(k)]["image"].convert("RGB") for k in drawn(rng, others, s)]
    if s.shrink:
        size = (s.shrink, s.shrink)
        pictures = [picture.resize(size, Image.Resampling.BICUBIC) for picture in pictures]
    copied = drawn(rng, rows, s)
    originals = [rows[int(k)][s.image].convert("RGB") for k in copied]
    pictures += [make(picture) for make in COPIES.values() for picture in originals]
    added = features_of(pictures, s, f"{Path(s.data).name}-{seed}")
    foreign, copies = added[: s.planted], added[s.planted :].reshape(len(COPIES), s.planted, -1)

    labels = np.append(view.labels, rng.integers(0, view.num_classes, s.planted))
    noise = estimated(np.concatenate([view.features, foreign]), labels, view.num_classes)
    planted = np.arange(len(labels)) >= len(view)
    top = np.argsort(-noise.outlier)[: s.planted]
    figures = {"AUROC": roc_auc_score(planted, noise.outlier), "precision": planted[top].mean()}

    other_labels = (view.labels[copied] + 1) % view.num_classes
    for name, part in zip(COPIES, copies, strict=True):
        noise = estimated(
            np.concatenate([view.features, part]),
            np.append(view.labels, other_labels),
            view.num_classes,
        )
        pairs = near_duplicates(noise)
        found = set(zip(pairs["index"], pairs["other"], strict=True))
        right = sum((int(k), len(view) + i) in found for i, k in enumerate(copied))
        figures[name] = right / s.planted
        own = {pair for pair in found if pair[1] < len(view)}
    return figures | {"pairs of the data": len(own)}


def drawn(rng: np.random.Generator, rows, s: Settings) -> np.ndarray:
    return rng.choice(len(rows), s.planted, replace=False)


def estimated(features: np.ndarray, labels: np.ndarray, classes: int) -> kd.audit.LabelNoise:
    """The neighbours and outliers; they do not depend on probabilities, which are even here."""
    probs = np.full((len(labels), classes), 1 / classes, np.float32)
    return kd.estimate_label_noise(labels, probs, features, draws=0)


def main() -> None:
    (s,) = kd.train.parse_settings(Settings, defaults={})
    rows, s.image, s.label = kd.data.load_rows(s.data, s.split, s.image, s.label)
    columns = {"image": s.image, "label": s.label}
    view = frozen_features(rows, s.backbone, s.features, side=s.side, **columns)
    others, image, _ = kd.data.load_rows(s.others, s.split, None, None)
    others = others.rename_column(image, "image") if image != "image" else others
    runs = [run(s, rows, others, view, seed) for seed in s.seeds]
    table = []
    for name in runs[0]:
        values = [figures[name] for figures in runs]
        scale = (1.0, 3) if name == "AUROC" else (1.0, 1) if "pairs" in name else (100.0, 1)
        table.append([name, mean_std(values, *scale)])
    print(markdown(["", f"{len(runs)} seeds"], table))


if __name__ == "__main__":
    kd.train.run_main(main)
