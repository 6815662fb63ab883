"""Two networks learn from doubtful labels with three losses, from the same initial weights.

    accelerate launch -q recipes/webvision_mini.py              # digits, 40% of the labels wrong
    accelerate launch -q recipes/webvision_mini.py --seeds 3    # the table in docs/results.md
    accelerate launch -q recipes/webvision_mini.py --data_dir WEBVISION --imagenet_dir ILSVRC --bf16

Without `--data_dir`, scikit-learn's handwritten digits are written in WebVision's layout with 40%
symmetric label noise. Two tiny timm networks train on them with cross-entropy, with SMKD-P + MyLC,
and each by itself with truncated GCE, half a minute each on a CPU core. With it, the setting is the
paper's: Google part, 50 classes, two ResNet-50, 299 px crops of 320 px, batch 32, 100 epochs; the
paper publishes no learning rate. docs/results.md has the figures that are expected on the digits.
Run a killed command again: it continues where it stopped, and finished parts are not trained again.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torchvision import transforms as T
from transformers import set_seed
from transformers.hf_argparser import HfArg

import kd_plugins as kd
from kd_plugins.audit import plots

METHODS = {
    "ce": ("cross-entropy", lambda: kd.Mutual(kd.CE(), kd.SelectNone())),
    "smkd": ("SMKD-P + MyLC", lambda: kd.SMKD(kd.MyLC(b1=10), eta=2, b2=-6)),
    "truncated_gce": ("truncated GCE", lambda: kd.Mutual(kd.TruncatedGCE(), kd.SelectNone())),
}
DEFAULTS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
DEFAULTS |= {"save_total_limit": 1, "logging_steps": 100, "report_to": "none"}
DIGITS = {"models": ["test_resnet", "test_efficientnet"], "output_dir": "runs/digits"}
DIGITS |= {"num_train_epochs": 30, "learning_rate": 0.05, "logging_strategy": "epoch"}
DIGITS |= {"per_device_train_batch_size": 64}
WEBVISION = {"models": ["resnet50"] * 2, "output_dir": "runs/webvision_mini"}
WEBVISION |= {"num_train_epochs": 100, "learning_rate": 0.01, "methods": ["ce", "smkd"]}
WEBVISION |= {"per_device_train_batch_size": 32}


@dataclass
class Settings:
    models: list[str] = HfArg(default_factory=lambda: DIGITS["models"], help="two timm names")
    data_dir: str | None = HfArg(default=None, help="root of WebVision 1.0; default: digits")
    imagenet_dir: str | None = HfArg(default=None, help="root of ILSVRC, for a second test set")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help=", ".join(METHODS))
    seeds: int = HfArg(default=1, help="runs of each method, from --seed on")


def digits(root: Path, seed: int) -> Path:
    """1,797 digits of 16 px in WebVision's layout; 40% of the training labels are wrong."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not root.exists():
        x, y = load_digits(return_X_y=True)
        x = (x.reshape(-1, 8, 8) * 15.9).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
        # 1,344 for training: whole batches; BatchNorm over a last batch of 3 unsettles a network
        x, x_val, y, y_val = train_test_split(x, y, test_size=453, stratify=y, random_state=0)
        given = kd.data.corrupt(y, kd.data.symmetric(10, 0.4), seed=seed)
        part = root.with_name(root.name + ".part")  # a killed run leaves no half data set
        names = [f"digit {k}" for k in range(10)]
        kd.data.write_webvision(part, (x, given, y), (x_val, y_val), names)
        part.rename(root)
    return root


def digit_views(root: Path, seed: int) -> tuple[kd.ImageView, dict]:
    """Training data, and what is evaluated: the training data too, for memorised labels."""
    # without random crops, which keep a network from memorising the digits
    plain = T.Compose([T.ToTensor(), T.Normalize(0.5, 0.5)])
    rows, val = (kd.load_webvision(root, split, classes=None) for split in ("train", "val"))
    train, fit = (kd.ImageView(rows, plain, seed=seed, clean="clean_label") for _ in range(2))
    return train, {"val": kd.ImageView(val, plain), "train": fit}


def webvision_views(s: Settings, model, seed: int) -> tuple[kd.ImageView, dict]:
    """Training data with seeded augmentation, and what is evaluated."""
    cfg = timm.data.resolve_data_config(model=model)
    last = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])]
    crops = T.Compose([T.Resize(320), T.RandomCrop(299), T.RandomHorizontalFlip(), *last])
    plain = T.Compose([T.Resize(320), T.CenterCrop(299), *last])
    evals = {"val": kd.ImageView(kd.load_webvision(s.data_dir, "val"), plain)}
    if s.imagenet_dir:
        synsets = Path(s.data_dir, "info", "synsets.txt")
        rows = kd.load_webvision(s.imagenet_dir, "imagenet", synsets=synsets)
        evals["imagenet"] = kd.ImageView(rows, plain)
    return kd.ImageView(kd.load_webvision(s.data_dir), crops, seed=seed), evals


def run(s: Settings, args: kd.MutualTrainingArguments, root: Path, method: str) -> dict:
    """Train one pair of networks; its figures, from disk if it was trained before."""
    title, make_loss = METHODS[method]
    loss, done = make_loss(), Path(args.output_dir, "results.json")
    settings = {"models": s.models, "data": s.data_dir, "loss": repr(loss)}
    if done.exists():
        kd.train.claim_folder(args, **settings)
        print(f"{title}, seed {args.seed}: done before, see {done}")
        return json.loads(done.read_text())
    set_seed(args.seed)
    networks = [kd.models.make_model(name, 50 if s.data_dir else 10) for name in s.models]
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
    if s.data_dir:
        train, evals = webvision_views(s, networks[0], args.seed)
    else:
        train, evals = digit_views(root, args.seed)
    print(f"\n{title}, seed {args.seed}: {len(train)} pictures, {' and '.join(s.models)}")
    callbacks = [kd.DynamicsCallback()] if method == s.methods[-1] else []  # for suspects()
    data = {"train_dataset": train, "eval_dataset": evals, "callbacks": callbacks}
    trainer = kd.MutualDistillationTrainer(networks, loss, args, **data)
    kd.train.claim_folder(args, **settings)  # not before all of it could be made
    trainer.train(resume_from_checkpoint=True)
    figures: dict = {}
    for log in trainer.state.log_history:  # the last figure of each kind, as the papers report
        figures |= {k: v for k, v in log.items() if k.startswith("eval_")}
    trainer.save_state()
    trainer.export()
    if trainer.is_world_process_zero():
        done.write_text(json.dumps(figures, indent=1))
    return figures


def suspects(dynamics: Path, root: Path, classes: int | None, folder: Path) -> list[Path]:
    """The labels that are probably wrong: a table, pictures, and a page to go through."""
    train = kd.load_webvision(root, classes=classes)
    names = [name.partition(" ")[2] or name for name in train.features["label"].names]
    found = kd.find_suspects(dynamics=dynamics, class_names=names)  # names without n01440764
    print(f"\n{len(found)} of {len(train)} labels are suspected")
    if "clean_label" in train.column_names:
        wrong = np.asarray(train["label"]) != np.asarray(train["clean_label"])
        hits = wrong[found["index"]]
        print(
            f"{hits.mean():.0%} of them are wrong ({hits[:100].mean():.0%} of the first hundred), "
            f"{hits.sum() / wrong.sum():.0%} of all wrong labels are among them"
        )
    return kd.audit.write_suspects(found, train, folder)


def main() -> None:
    def defaults(given):
        return DEFAULTS | (WEBVISION if given.data_dir else DIGITS)

    s, args = kd.train.parse_settings(Settings, kd.MutualTrainingArguments, defaults=defaults)
    if s.seeds < 1:
        raise SystemExit(f"--seeds {s.seeds}: expected at least 1; there would be no run to show")
    if unknown := [method for method in s.methods if method not in METHODS]:
        raise SystemExit(f"--methods {unknown[0]}: expected some of {', '.join(METHODS)}")
    for name in s.models:
        kd.models.make_model(name, 2)  # a mistyped name is refused before the data are written
    folder, results = Path(args.output_dir), {method: [] for method in s.methods}
    for seed in range(args.seed, args.seed + s.seeds):
        with args.main_process_first():
            root = Path(s.data_dir) if s.data_dir else digits(folder / f"data-{seed}", seed)
        for method in s.methods:
            one = copy.copy(args)
            one.seed, one.output_dir = seed, str(folder / f"{method}-{seed}")
            results[method].append(run(s, one, root, method))
    if args.process_index == 0:
        report(s, folder, args.seed, results)


def report(s: Settings, folder: Path, seed: int, results: dict[str, list[dict]]) -> None:
    """The table, and pictures of the first seed."""
    wanted = re.compile(r"eval_(?!train)\w+_accuracy(_[ab]|_ensemble)?|eval_train_memorised")
    keys = [key for key in results[s.methods[-1]][-1] if wanted.fullmatch(key)]
    rows = [
        [METHODS[method][0], *(plots.mean_std([run[key] for run in runs]) for key in keys)]
        for method, runs in results.items()
    ]
    print(f"\nPer cent, last epoch, {s.seeds} seed(s); networks a and b: {', '.join(s.models)}\n")
    print(plots.markdown(["method", *(key.removeprefix("eval_") for key in keys)], rows))
    runs = {METHODS[method][0]: folder / f"{method}-{seed}" for method in s.methods}
    paths = plots.draw(runs, folder / "pictures")
    last = folder / f"{s.methods[-1]}-{seed}"
    if (last / "dynamics").exists():
        root, classes = (s.data_dir, 50) if s.data_dir else (folder / f"data-{seed}", None)
        paths += suspects(last / "dynamics", root, classes, folder / "pictures")
    print("\nPictures:", *paths, sep="\n  ")
    print(f"Networks, for timm and transformers: {last}/peer_a and peer_b")


if __name__ == "__main__":
    kd.train.run_main(main)
