"""The options of the commands of ``kd-plugins``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BACKBONE = "tf_efficientnet_lite0"  # of suspects, where no other source is named


MAX_BROKEN = (
    "largest share of pictures that cannot be read, such as 0.05; by default 0.01, of fewer than "
    "500 pictures five (or a tenth)"
)


def _help(text: str, **metadata: Any) -> dict[str, Any]:
    return {"help": text} | metadata


@dataclass
class DataSettings:
    """Where the pictures are."""

    data: str = field(default="", metadata=_help("the data, if it is not the first word"))
    image: str | None = field(
        default=None, metadata=_help("column of pictures, if there are several")
    )
    label: str | None = field(
        default=None, metadata=_help("column of classes, if there are several")
    )


@dataclass
class TrainSettings(DataSettings):
    """What ``kd-plugins train`` takes beside ``MutualTrainingArguments``."""

    models: list[str] = field(
        default_factory=list,
        metadata=_help(
            "timm names, NAME=FILE of weights, hf-hub:ID or local-dir:PATH; by default resnet18, "
            "two of them where the loss is for peers"
        ),
    )
    loss: str = field(default="smkd", metadata=_help("a name that kd-plugins list shows"))
    loss_args: str = field(default="{}", metadata=_help("""its arguments as JSON, '{"eta": 2}'"""))
    teachers: list[str] = field(
        default_factory=list,
        metadata=_help("trained networks: folders of an export, or timm names"),
    )
    pretrained: bool = field(default=False, metadata=_help("start from timm's pretrained weights"))
    augment: bool = field(default=True, metadata=_help("crop and flip the training pictures"))
    max_broken: float | None = field(default=None, metadata=_help(MAX_BROKEN))
    dynamics: bool = field(
        default=False, metadata=_help("keep the training dynamics in output_dir/dynamics")
    )


@dataclass
class SuspectSettings(DataSettings):
    """What ``kd-plugins suspects`` takes."""

    backbone: str | None = field(
        default=None,
        metadata=_help(
            "pretrained timm network, or NAME=FILE, whose frozen features are used; without "
            f"another source {BACKBONE}"
        ),
    )
    side: int = field(default=96, metadata=_help("pixels of its input"))
    networks: list[str] = field(
        default_factory=list, metadata=_help("instead: folders that an export wrote")
    )
    dynamics: str | None = field(
        default=None, metadata=_help("instead: folder that train --dynamics wrote")
    )
    probs: str | None = field(
        default=None, metadata=_help("instead: out-of-sample probabilities [N, C], an .npy file")
    )
    zero_shot: str | None = field(
        default=None,
        metadata=_help(
            "instead, or beside --backbone or --probs: CLIP or SigLIP, a hub id or a folder"
        ),
    )
    cache: str | None = field(
        default=None, metadata=_help("folder of features and folds; by default OUTPUT/cache")
    )
    split: str = field(
        default="train", metadata=_help("the split in which to look; with dynamics the trained one")
    )
    output: str = field(
        default="runs/suspects", metadata=_help("folder to write", aliases=["--output_dir"])
    )
    count: int = field(default=5000, metadata=_help("suspects on the page"))
    all_rows: bool = field(
        default=False,
        metadata=_help("rank all labels in the tables, also where no other class is more probable"),
    )
    max_broken: float | None = field(default=None, metadata=_help(MAX_BROKEN))
    batch_size: int = field(default=256, metadata=_help("pictures in a batch"))
    num_workers: int = field(default=0, metadata=_help("processes that read pictures"))


@dataclass
class ApplySettings(DataSettings):
    """What ``kd-plugins apply`` takes."""

    decisions: str = field(default="", metadata=_help("the CSV file, if it is not the first word"))
    out: str = field(default="", metadata=_help("folder to write; it must not exist"))
    how: str = field(
        default="correct", metadata=_help("what to do with wrong labels: correct, drop or weight")
    )
    weight: float = field(default=0.1, metadata=_help("of wrong rows, with --how weight"))
    split: str = field(default="train", metadata=_help("where the suspects were found"))
