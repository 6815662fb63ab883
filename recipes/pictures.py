"""What the recipes share: the pictures and labels of a data set, names checked before anything is written, and the results."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import timm
from torchvision import transforms as T

from kd_plugins import Loss, loss_class
from kd_plugins.audit import plots as report


def load(s: Any) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test data of `--data`; `--image` and `--label` that were left open are filled in."""
    data = datasets.load_dataset(s.data)
    test = next((split for split in ("test", "validation") if split in data), None)
    if "train" not in data or test is None:
        raise SystemExit(
            f"--data {s.data}: expected the splits train and test (or validation), got {', '.join(data)}"
        )
    s.image, s.label = (
        column(data["train"], option, getattr(s, option)) for option in ("image", "label")
    )
    return data["train"], data[test]


def column(data: datasets.Dataset, option: str, name: str | None = None) -> str:
    """The column of this name; without one that called image or label, else the only one of its type."""
    kind = {"image": datasets.Image, "label": datasets.ClassLabel}[option]
    fitting = [key for key, feature in data.features.items() if isinstance(feature, kind)]
    found = name or (fitting[0] if len(fitting) == 1 else option)
    if found in fitting:
        return found
    others = ", ".join(
        f"{key} ({feature.dtype})" for key, feature in data.features.items() if key not in fitting
    )
    raise SystemExit(
        f"--{option} {name}: expected the name of one {kind.__name__} column, here {' or '.join(fitting) or 'none'}; "
        f"{others} can be made one: dataset.cast_column(NAME, {kind.__name__}(...))"
    )


def transform(size: int, model, train: bool):
    cfg = timm.data.resolve_data_config(model=model)
    if size <= 64:  # pad 4 and crop, as the papers do on 32 px pictures
        crop = [T.RandomCrop(size, padding=4), T.RandomHorizontalFlip()] if train else []
        return T.Compose(
            [T.Resize((size, size)), *crop, T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])]
        )
    return timm.data.create_transform(**cfg, is_training=train)


def check_networks(option: str, names: list[str], trained: bool = False) -> None:
    """timm names, and for trained networks also folders that export() wrote and NAME=FILE."""
    for name in names:
        path = name.partition("=")[2] or name
        if not (timm.is_model(name) or ":" in name or (trained and Path(path).exists())):
            expected = (
                "a folder that export() wrote, NAME=FILE or a timm name"
                if trained
                else "a timm name"
            )
            raise SystemExit(f"--{option} {name}: expected {expected}; there is no such network")


def check_loss(option: str, name: str) -> type[Loss]:
    try:
        return loss_class(name)
    except ValueError as error:
        raise SystemExit(f"--{option} {name}: {error}") from None


def write_results(s: Any, args: Any, figures: dict[str, Any], run: str | None = None) -> None:
    """results.json with the settings; and pictures of the run, if there was one."""
    figures = {k: v for k, v in figures.items() if not k.endswith(("runtime", "per_second"))}
    Path(args.output_dir, "results.json").write_text(
        json.dumps(vars(s) | {"seed": args.seed} | figures, indent=1)
    )
    report.draw(run or args.output_dir, Path(args.output_dir, "pictures"))
    shown = {
        k: round(v, 4) for k, v in figures.items() if isinstance(v, float) and not math.isnan(v)
    }
    print(json.dumps(shown, indent=1))
