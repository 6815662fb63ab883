"""Compare methods on frozen features: every method, noise and seed in seconds a run, on a CPU.

    python recipes/train_heads.py --data ethz/food101 --backbone resnet50 --side 224 \\
        --methods ce gce smkd smkd:eta=1 --noise symmetric:0.4 pair_flip:0.4 --seeds 0 1 2

The features of a pretrained timm network are computed once and kept in `--features`. Each run
trains heads of one hidden layer on them: one, or two where the method teaches peers. Runs are
written to `output_dir/results.jsonl` as they end; those that are there are not repeated. At the end
stand two tables (`results.md`), test accuracy in per cent at the last epoch, mean ± deviation over
the seeds, and what each method gains over cross-entropy on the same seed; and a picture of these
gains (`results.png`). A pair counts as the mean of its two networks.

`--methods all` takes every loss that needs no teacher and no feature maps. Methods that need the
noise rate (Co-teaching, JoCoR) or the transition matrix are told the true one.
docs/frozen-features.md has figures.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from transformers import PrinterCallback, set_seed
from transformers.hf_argparser import HfArg

import kd_plugins as kd
from kd_plugins.audit.gains import draw_gains
from kd_plugins.audit.plots import markdown, mean_std
from kd_plugins.data import FeatureView
from kd_plugins.models import feature_head

DEFAULTS = {"output_dir": "runs/heads", "report_to": "none", "save_strategy": "no"}
DEFAULTS |= {"logging_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch"}
DEFAULTS |= {"optim_args": None, "learning_rate": 1e-3, "weight_decay": 0.0}
DEFAULTS |= {"num_train_epochs": 30, "per_device_train_batch_size": 256}
DEFAULTS |= {"per_device_eval_batch_size": 1024, "dataloader_pin_memory": False}


@dataclass
class Settings:
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(default=None, help="column of classes, if there are several")
    where: str | None = HfArg(default=None, help="train only on rows where this column is true")
    backbone: str = HfArg(default="tf_efficientnet_lite0", help="timm name, or NAME=FILE")
    side: int = HfArg(default=96, help="side of the pictures in px")
    features: str = HfArg(default="runs/features", help="folder for the features of these data")
    methods: list[str] = HfArg(default_factory=lambda: ["all"], help="NAME, or NAME:q=0.7,k=2")
    noise: list[str] = HfArg(default_factory=lambda: ["symmetric:0.4"], help="NAME:RATE or COLUMN")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="of noise, weights, order")
    hidden: int = HfArg(default=128, help="width of the hidden layer")
    dropout: float = HfArg(default=0.5, help="before the last layer")
    holdout: bool = HfArg(default=False, help="evaluate on a tenth of the noisy training data")


def make_loss(method: str, rate: float, transition) -> kd.Loss:
    """The loss that `NAME:argument=value,...` names; of smkd, MyLC's arguments too."""
    name, _, text = method.partition(":")
    own = kd.train.parse_pairs("methods", text.split(",") if text else [])
    if name in ("co_teaching", "co_teaching_plus", "jocor"):
        own = {"forget": rate} | own
    elif name in ("forward_correction", "backward_correction"):
        own = {"transition": torch.as_tensor(transition)} | own
    elif name in ("mylc", "smkd") and own.get("rho") == "auto":
        own |= {"noise_rate": rate}
    if name == "smkd":
        inner = {key: own.pop(key) for key in ("rho", "b1", "noise_rate") if key in own}
        own["refine"] = kd.MyLC(**inner)
    return kd.create_loss(name, **own)


def every_method() -> list[str]:
    """All losses that a head can train with: labels and rows, but no maps and no teachers."""
    later = ("soft_labels", "t_revision", "dmi")  # stages of longer methods
    names = [name for name in kd.list_losses() if name not in later]
    return [name for name in names if kd.loss_class(name).required_inputs <= {"index"}]


def cached(s: Settings, split: str, rows) -> FeatureView:
    """The features of a split, with its clean labels."""
    columns = {"image": s.image, "label": s.label, "clean": s.label}
    folder = Path(s.features, split)
    view = kd.audit.frozen_features(rows, s.backbone, folder, side=s.side, **columns)
    if broken := int(view.stand_in.sum()):
        print(f"{broken} of {len(view)} pictures of {split} cannot be read; the next ones stand in")
    return view


def run(s: Settings, args, method: str, transition, data, test, seed: int) -> dict:
    """Train the heads of one method; its figures."""
    args.seed = seed
    set_seed(seed)
    wrong = float((data.labels != data.clean_labels).mean())
    loss = make_loss(method, wrong, transition)
    sizes = data.features.shape[1], data.num_classes
    heads = [feature_head(*sizes, s.hidden, s.dropout) for _ in range(loss.num_peers)]
    trainer = kd.MutualDistillationTrainer(heads, loss, args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)  # one line a run is enough
    trainer.train()
    figures = trainer.evaluate(test) | trainer.evaluate(data, metric_key_prefix="train")
    names = ["eval_accuracy", "eval_accuracy_ensemble", "train_memorised", "train_corrected"]
    return {"wrong": wrong} | {name: figures[name] for name in names if name in figures}


def with_noise(s: Settings, train, clean, test, name: str, seed: int) -> tuple:
    """The true transition matrix, the features with wrong labels, what they are evaluated on."""
    kind, _, rate = name.partition(":")
    noise = kd.data.noise_by_name(train, kind, float(rate or 0), s.label)
    noisy = kd.data.noisy_view(train, noise, seed=seed, label=s.label, noisy="given")
    data = clean.with_labels(noisy.with_format("numpy")["given"][:])
    if isinstance(noise, str):  # a column of given labels: its matrix is counted
        noise = kd.data.noise_report(data.clean_labels, data.labels, data.num_classes).transition
    if s.holdout:  # its labels are the given ones: nobody has clean labels to choose with
        kept, out = kd.data.hold_out(data.labels, seed)
        test = FeatureView(data.features[out], data.labels[out], class_names=data.class_names)
        columns = data.features[kept], data.labels[kept], data.clean_labels[kept]
        data = FeatureView(*columns, data.class_names)
    return noise, data, test


def over(own: list[float], base: list[float]) -> str:
    """The gain of each seed, mean ± deviation, and how many of them gain."""
    gains = [a - b for a, b in zip(own, base, strict=True)]
    return f"{mean_std(gains)} ({sum(gain > 0 for gain in gains)} of {len(gains)})"


def report(rows: list[dict], noises: list[str], folder: Path) -> None:
    """Tables and a picture: a row is a method, the best one first, and a column a noise."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        columns = found.setdefault(row["method"], {noise: [] for noise in noises})
        columns[row["noise"]].append(row["eval_accuracy"])
    best_first = sorted(found, key=lambda method: -fmean(map(fmean, found[method].values())))
    found = {method: found[method] for method in best_first}
    cells = [[method, *map(mean_std, columns.values())] for method, columns in found.items()]
    text = markdown(["method", *noises], cells)
    if len(found) > 1 and (base := found.get("ce")):  # runs of a seed share the noise
        cells = [
            [method, *(over(columns[noise], base[noise]) for noise in noises)]
            for method, columns in found.items()
            if method != "ce"
        ]
        text += "\n\n" + markdown(["points over ce, seed by seed", *noises], cells)
    (folder / "results.md").write_text(text + "\n")
    draw_gains(found, folder / "results.png")
    print(text)


def main() -> None:
    s, args = kd.train.parse_settings(Settings, kd.MutualTrainingArguments, defaults=DEFAULTS)
    methods = [m for name in s.methods for m in (every_method() if name == "all" else [name])]
    for method in methods:  # a mistyped one is refused before the features are computed
        make_loss(method, 0.1, torch.eye(2))
    for name in s.noise:
        if name in kd.data.NOISE[:-1]:
            raise SystemExit(f"--noise {name}: expected {name}:RATE; no label would be wrong")
    train, test, s.image, s.label = kd.data.load_pictures(s.data, s.image, s.label, where=s.where)
    clean, test = cached(s, "train", train), cached(s, "test", test)
    may_grow = ("methods", "noise", "seeds")
    kd.train.claim_folder(args, **{k: v for k, v in vars(s).items() if k not in may_grow})

    log = Path(args.output_dir, "results.jsonl")
    done = {(row["noise"], row["seed"], row["method"]): row for row in kd.train.read_results(log)}
    todo = list(product(s.noise, s.seeds, methods))
    for number, key in enumerate(todo, start=1):
        if key in done:
            continue
        name, seed, method = key
        transition, data, unseen = with_noise(s, train, clean, test, name, seed)
        row = {"method": method, "noise": name, "seed": seed}
        row |= run(s, args, method, transition, data, unseen, seed)
        kd.train.append_result(log, row)
        done[key] = row
        print(f"{number}/{len(todo)} {name} {method} seed {seed}: {row['eval_accuracy']:.1%}")
    report([done[key] for key in todo], s.noise, Path(args.output_dir))


if __name__ == "__main__":
    kd.train.run_main(main)
