"""Two backbones learn from doubtful labels: plain cross-entropy against SMKD-P + MyLC, same seeds, on Mini-WebVision.

    accelerate launch -q recipes/webvision_mini.py                                    # embedded: digits, 40% wrong labels
    accelerate launch -q recipes/webvision_mini.py --seeds 3                          # the table of the README
    accelerate launch -q recipes/webvision_mini.py --data_dir WEBVISION --imagenet_dir ILSVRC --bf16 --dataloader_num_workers 8

Without --data_dir, scikit-learn's handwritten digits are written out in WebVision's layout with 40% symmetric label noise,
and two small timm backbones of different kind train on them for a few minutes on two CPU cores. With it, the paper's
setting (Google part, 50 classes, ResNet-50 twice, 320 px resized, 299 cropped, batch 32, 100 epochs; it publishes no
learning rate). Expected on the digits, three seeds: ensemble 92.6 ± 1.7 against 88.2 ± 0.3 per cent, see README.md.
A killed run goes on where it stopped; finished parts are not run again.
"""

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from pictures import check_networks
from torchvision import transforms as T
from transformers import set_seed

from kd_plugins import (
    CE,
    SMKD,
    DynamicsCallback,
    Mutual,
    MutualDistillationTrainer,
    MutualTrainingArguments,
    MyLC,
    Nothing,
    contact_sheet,
    find_suspects,
    html_page,
)
from kd_plugins.audit import plots as report
from kd_plugins.data import ImageView, corrupt, load_webvision, symmetric, write_webvision
from kd_plugins.train import claim_folder, parse_settings, run_main

NOISE = 0.4  # share of wrong labels in the embedded data
ETA, B2, B1 = (
    2.0,
    -6.0,
    10.0,
)  # confidence threshold (paper: eta 1 to 4), its tightening, steepness of MyLC's trust

METHODS = {"ce": "cross-entropy", "smkd": "SMKD-P + MyLC"}
COMMON = dict(
    per_device_train_batch_size=32,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=1,
    logging_steps=100,
    report_to="none",
)
DIGITS = dict(
    models=["resnet10t", "mobilenetv3_small_050"],
    num_train_epochs=24,
    learning_rate=0.02,
    logging_strategy="epoch",
    output_dir="runs/digits",
)
WEBVISION = dict(
    models=["resnet50"] * 2,
    num_train_epochs=100,
    learning_rate=0.01,
    output_dir="runs/webvision_mini",
)


@dataclass
class Settings:
    models: list[str] = field(
        default_factory=lambda: DIGITS["models"], metadata={"help": "two timm names"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "root of WebVision 1.0; none: the embedded digits"}
    )
    imagenet_dir: str | None = field(
        default=None, metadata={"help": "root of ILSVRC: test on its validation set too"}
    )
    seeds: int = field(default=1, metadata={"help": "runs of each method, from --seed on"})


def digits(root: Path, seed: int) -> Path:
    """scikit-learn's 1,797 digits in WebVision's layout; the labels of the training part are 40% wrong."""
    if not root.exists():
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        x = (
            (x.reshape(-1, 8, 8) * 15.9).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
        )  # 32 px
        # 1,344 for training: whole batches; BatchNorm over a last batch of three would unsettle the networks
        x, x_val, y, y_val = train_test_split(x, y, test_size=453, stratify=y, random_state=0)
        part = root.with_name(
            root.name + ".part"
        )  # a killed run leaves no half data set under the real name
        given = corrupt(y, symmetric(10, NOISE), seed=seed)
        write_webvision(part, (x, given, y), (x_val, y_val), [f"digit {k}" for k in range(10)])
        part.rename(root)
    return root


def views(s: Settings, root: Path, mean, std, seed: int) -> tuple[ImageView, dict[str, ImageView]]:
    """Training data with seeded augmentation, and what is evaluated on after each epoch."""
    if s.data_dir is None:
        mean = std = 0.5  # grey strokes, not photographs
    last = [T.ToTensor(), T.Normalize(mean, std)]
    if s.data_dir is None:
        train, clean = load_webvision(root, classes=None), "clean_label"
        augment = plain = T.Compose(
            last
        )  # random crops alone would keep a network from memorising these easy pictures
        # the training data with its clean labels: how many wrong ones were learned by heart
        sets = {"val": load_webvision(root, "val", classes=None), "train": train}
    else:
        train, sets, clean = load_webvision(root), {"val": load_webvision(root, "val")}, None
        if s.imagenet_dir:
            sets["imagenet"] = load_webvision(
                s.imagenet_dir, "imagenet", synsets=Path(root, "info", "synsets.txt")
            )
        augment = T.Compose([T.Resize(320), T.RandomCrop(299), T.RandomHorizontalFlip(), *last])
        plain = T.Compose([T.Resize(320), T.CenterCrop(299), *last])
    evals = {
        name: ImageView(part, plain, clean=clean if name == "train" else None)
        for name, part in sets.items()
    }
    return ImageView(train, augment, seed=seed, clean=clean), evals


def run(s: Settings, args: MutualTrainingArguments, root: Path, method: str) -> dict:
    """One training; its figures, from disk if it has been run to its end before."""
    done = Path(args.output_dir, "results.json")
    settings = {"models": s.models, "data": s.data_dir, "method": method, "smkd": [ETA, B2, B1]}
    if done.exists():
        claim_folder(args, **settings)
        print(f"{method}, seed {args.seed}: done before, see {done}")
        return json.loads(done.read_text())
    set_seed(args.seed)
    networks = [timm.create_model(name, num_classes=50 if s.data_dir else 10) for name in s.models]
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
    cfg = timm.data.resolve_data_config(model=networks[0])
    train, evals = views(s, root, cfg["mean"], cfg["std"], args.seed)
    loss = (
        Mutual(CE(), Nothing())
        if method == "ce"
        else SMKD(MyLC(b1=B1, window=len(train)), eta=ETA, b2=B2)
    )
    print(
        f"\n{method}, seed {args.seed}: {len(train)} pictures, {train.num_classes} classes, {' and '.join(s.models)}"
    )
    callbacks = (
        [DynamicsCallback()] if method == "smkd" else []
    )  # what was said of each sample, for suspects()
    data = {"train_dataset": train, "eval_dataset": evals}
    trainer = MutualDistillationTrainer(networks, loss, args, callbacks=callbacks, **data)
    claim_folder(args, **settings)  # not before all of it could be made
    trainer.train(resume_from_checkpoint=True)
    figures: dict = {}
    for log in trainer.state.log_history:  # the last figure of each kind, as the papers report
        figures |= {k: v for k, v in log.items() if k.startswith("eval_")}
    trainer.save_state()
    trainer.export()
    if trainer.is_world_process_zero():
        done.write_text(json.dumps(figures, indent=1))
    return figures


def suspects(folder: Path, dynamics: Path, s: Settings, root: Path) -> list[Path]:
    """The labels that are probably wrong, as a table, as pictures, and as a page to go through."""
    train = load_webvision(root) if s.data_dir else load_webvision(root, classes=None)
    names = [
        name.partition(" ")[2] or name for name in train.features["label"].names
    ]  # without n01440764
    found = find_suspects(dynamics=dynamics, class_names=names)
    text = f"{len(found)} of {len(train)} labels are suspected"
    if not s.data_dir:
        wrong = np.asarray(train["label"]) != np.asarray(train["clean_label"])
        hits = wrong[found["index"]]
        text += f", {hits.mean():.0%} of them are wrong ({hits[:100].mean():.0%} of the first hundred), "
        text += f"{hits.sum() / wrong.sum():.0%} of all wrong labels are among them"
    print(f"\n{text}")
    found.to_csv(folder / "suspects.csv")
    return [
        folder / "suspects.csv",
        contact_sheet(found, train, folder / "suspects.png"),
        html_page(found, train, folder / "suspects.html"),
    ]


def main() -> None:
    def defaults(given):
        return COMMON | (WEBVISION if given.data_dir else DIGITS)

    s, args = parse_settings(Settings, MutualTrainingArguments, defaults=defaults)
    if s.seeds < 1:
        raise SystemExit(f"--seeds {s.seeds}: expected at least 1; there would be no run to show")
    check_networks("models", s.models)
    folder, results = Path(args.output_dir), {}
    for seed in range(args.seed, args.seed + s.seeds):
        with args.main_process_first():
            root = Path(s.data_dir) if s.data_dir else digits(folder / f"data-{seed}", seed)
        for method in METHODS:
            one = copy.copy(args)
            one.seed, one.output_dir = seed, str(folder / f"{method}-{seed}")
            results.setdefault(method, []).append(run(s, one, root, method))
    if args.process_index:
        return

    last = results["smkd"][-1]
    wanted = re.compile(r"eval_(?!train)\w+_accuracy(_[ab]|_ensemble)?|eval_train_memorised")
    columns = {k.removeprefix("eval_"): k for k in last if wanted.fullmatch(k)}
    rows = [
        [METHODS[m], *(report.mean_std([r[k] for r in runs]) for k in columns.values())]
        for m, runs in results.items()
    ]
    pictures = report.draw(
        {name: folder / f"{m}-{args.seed}" for m, name in METHODS.items()}, folder / "pictures"
    )
    print(
        f"\nPer cent, last epoch, {s.seeds} seed(s); networks a = {s.models[0]}, b = {s.models[1]}\n"
    )
    print(report.markdown(["method", *columns], rows))
    data = Path(s.data_dir) if s.data_dir else folder / f"data-{args.seed}"
    listed = suspects(folder / "pictures", folder / f"smkd-{args.seed}" / "dynamics", s, data)
    print("\nPictures:", *pictures, *listed, sep="\n  ")
    print(f"Networks, for timm and transformers: {folder}/smkd-{args.seed}/peer_a and peer_b")


if __name__ == "__main__":
    run_main(main)
