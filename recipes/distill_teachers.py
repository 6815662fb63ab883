"""Distil one or several teachers into a student, on logits and on features.

    accelerate launch -q recipes/distill_teachers.py --data uoft-cs/cifar100 --label fine_label \\
        --preset camkd --student resnet10_cifar --bf16 \\
        --teachers runs/teachers/0/peer_a runs/teachers/1/peer_a

`--teachers` are folders that export() wrote, `NAME=FILE` for weights of a timm architecture, or
timm names (pretrained). With `--train_teachers True` they are architectures, which are trained
first on the same data, each in `output_dir/teachers/K`; `--teacher_rates 0 0 0.4` gives the third
one wrong labels, and `--student none` stops after the teachers.

`--terms` is a sum of registered losses. `--standardize 2` standardises the logits that they soften,
and softens them at T = 2 (logit standardisation). `--revise 0.8` corrects the teachers' logits
(Label Revision). `--keep 0.8` distils on the 80% of the training data with the least influence on
the loss of the held-out part (Data Selection). `--cache True` computes the teachers' logits once
and needs `--augment False`. Run a killed command again: it continues. Expected: recipes/README.md.
"""

import copy
import json
from dataclasses import dataclass
from functools import reduce
from inspect import signature
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.hf_argparser import HfArg

import kd_plugins as kd

DEFAULTS = {"output_dir": "runs/distill_teachers", "report_to": "none", "save_total_limit": 2}
DEFAULTS |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
# CA-MKD's public code, as CRD's: 240 epochs, a tenth of the learning rate at 150, 180 and 210
SCHEDULE = {"num_train_epochs": 240, "milestones": [150 / 240, 180 / 240, 210 / 240]}
SCHEDULE |= {"per_device_train_batch_size": 64, "learning_rate": 0.05, "lr_decay": 0.1}
SCHEDULE |= {"weight_decay": 5e-4, "optim_args": "momentum=0.9,nesterov=True"}
PRESETS = {  # weights as published; of lr and lr_ds they are ours, as is the share to keep
    "kd": {"terms": "0.1*ce + 0.9*kd"},
    "aver": {"terms": "ce + aver"},
    "ebkd": {"terms": "ce + ebkd"},
    "aekd": {"terms": "ce + aekd"},
    "camkd": {"terms": "ce + camkd + 50*camkd_features"},
    "camkd_logits": {"terms": "ce + camkd"},
    "fitnet": {"terms": "ce + 100*fitnet"},
    "at": {"terms": "ce + 1000*at"},
    "vid": {"terms": "ce + vid"},
    "crd": {"terms": "ce + 0.8*crd"},
    "dkd": {"terms": "ce + dkd"},
    "dist": {"terms": "ce + 2*dist"},
    "nkd": {"terms": "ce + nkd"},
    "wttm": {"terms": "ce + 3*wttm"},
    "kd_standardized": {"terms": "0.1*ce + 9*kd", "standardize": 2.0},
    "rkd": {"terms": "ce + rkd"},
    "sp": {"terms": "ce + 3000*sp"},
    "pkt": {"terms": "ce + 30000*pkt"},
    "lr": {"terms": "ce + kd", "revise": 0.8},
    "lr_ds": {"terms": "ce + kd", "revise": 0.8, "keep": 0.8},
}


@dataclass
class Settings:
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(default=None, help="column of classes, if there are several")
    preset: str = HfArg(default="", help=f"terms and schedule of a paper: {', '.join(PRESETS)}")
    student: str = HfArg(default="resnet10_cifar", help="timm name, or none: teachers only")
    teachers: list[str] = HfArg(default_factory=list, help="folders, NAME=FILE, or timm names")
    train_teachers: bool = HfArg(default=False, help="train the teachers first")
    teacher_rates: list[float] = HfArg(default_factory=list, help="share of wrong labels of each")
    teacher_epochs: float = HfArg(default=0.0, help="0: num_train_epochs")
    terms: str = HfArg(default="ce + camkd", help="a sum of registered losses with weights")
    beta: float = HfArg(default=8.0, help="of dkd: 8, 6 or 2 by pair; see its description")
    gamma: float = HfArg(default=0.1, help="of wttm: 0.1 to 0.4 by pair; see its description")
    standardize: float = HfArg(default=0.0, help="T of standardised logits; 0 is off")
    revise: float = HfArg(default=0.0, help="eta of Label Revision; 0 is off")
    keep: float = HfArg(default=1.0, help="share of the training data to distil on")
    holdout: float = HfArg(default=0.1, help="share of the training data to measure influence on")
    cache: bool = HfArg(default=False, help="compute the teachers' logits once")
    augment: bool = HfArg(default=True, help="crop and flip")


def terms_of(s: Settings) -> list[tuple[float, str]]:
    """Weight and name of each term."""
    pairs = [text.rpartition("*") for text in s.terms.split("+")]
    try:
        return [(float(weight or 1), name.strip()) for weight, _, name in pairs]
    except ValueError as error:
        raise SystemExit(f"--terms {s.terms}: expected WEIGHT*NAME + NAME ...: {error}") from None


def make_loss(s: Settings, teachers: list, mask):
    """The sum of the terms, revised and selected as asked."""
    terms = []
    for weight, name in terms_of(s):
        # the published weights, 1 and 50, go with the scale of the authors' code
        own: dict = {"scale": "code"} if name.startswith("camkd") else {}
        if name == "camkd_features":
            own["heads"] = [teacher.forward_head for teacher in teachers]
        if name == "dkd":
            own |= {"beta": s.beta, "warmup": 1 / 12}  # of 240 epochs 20, as published
        if name == "wttm":
            own["gamma"] = s.gamma
        if s.standardize and "standardize" in signature(kd.loss_class(name)).parameters:
            own |= {"standardize": True, "temperature": s.standardize}
        term = kd.create_loss(name, **own)
        if s.revise and isinstance(term, kd.KD):
            term = kd.LabelRevision(term, eta=s.revise)
        if mask is not None and name != "ce":
            term = kd.MaskedLoss(mask, term)
        terms.append(weight * term)
    return reduce(add, terms)


def make_views(s: Settings, args, model, rows: dict, label: str) -> dict:
    """The data of a Trainer: training rows with augmentation, test rows without."""
    size = min(rows["test"][0][s.image].size)
    crops = kd.data.picture_transform(model, size, s.augment)
    plain = kd.data.picture_transform(model, size)
    train = kd.ImageView(rows["train"], crops, seed=args.seed, image=s.image, label=label)
    test = kd.ImageView(rows["test"], plain, image=s.image, label=s.label)
    return {"train_dataset": train, "eval_dataset": test}


def train_teacher(s: Settings, args, k: int, rows: dict, classes: int) -> str:
    """Train teacher k with cross-entropy, on wrong labels if asked; the folder of the network."""
    stage, name = copy.copy(args), s.teachers[k]
    stage.output_dir = str(Path(args.output_dir, "teachers", str(k)))
    stage.num_train_epochs = s.teacher_epochs or args.num_train_epochs
    rate = s.teacher_rates[k] if s.teacher_rates else 0.0
    known = {"data": s.data, "holdout": s.holdout, "augment": s.augment}
    kd.train.claim_folder(stage, teacher=name, rate=rate, **known)
    folder = Path(stage.output_dir, "peer_a")
    if (folder / "README.md").exists():  # export writes it last
        return str(folder)
    noise = kd.data.symmetric(classes, rate)
    noisy = {"seed": args.seed + k, "label": s.label, "noisy": "given_label"}
    rows = rows | {"train": kd.noisy_view(rows["train"], noise, **noisy)}
    set_seed(args.seed + 1 + k)
    model = kd.models.make_model(name, classes)
    views = make_views(s, args, model, rows, "given_label")
    trainer = kd.MutualDistillationTrainer(model, kd.CE(), stage, **views)
    trainer.train(resume_from_checkpoint=True)
    figures = {"teacher": name, "rate": rate} | trainer.evaluate()
    if trainer.is_world_process_zero():
        shown = f"{rate:.0%} of its labels wrong: accuracy {figures['eval_accuracy']:.4f}"
        print(f"teacher {k}, {name}, {shown}")
        Path(stage.output_dir, "results.json").write_text(json.dumps(figures, indent=1))
    trainer.export()
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def influence(s: Settings, args, teachers: list, student, rows: dict):
    """Keep the rows of least influence on the held-out loss; mean over the teachers."""
    plain = kd.data.picture_transform(student, min(rows["test"][0][s.image].size))
    views = [kd.ImageView(rows[k], plain, image=s.image, label=s.label) for k in ("train", "held")]
    workers = {"num_workers": args.dataloader_num_workers}
    loaders = [DataLoader(view, args.eval_batch_size, **workers) for view in views]
    scores = torch.stack([kd.influence_scores(t, *loaders) for t in teachers]).mean(0)
    np.save(Path(args.output_dir, "influence.npy"), scores.numpy())
    return kd.select_lowest(scores, s.keep)


def options() -> tuple[Settings, kd.MutualTrainingArguments]:
    """Settings and arguments. What cannot work is refused before anything is read or written."""

    def defaults(given):
        if given.preset and given.preset not in PRESETS:
            raise SystemExit(f"--preset {given.preset}: expected one of {', '.join(PRESETS)}")
        return DEFAULTS | (SCHEDULE | PRESETS[given.preset] if given.preset else {})

    s, args = kd.train.parse_settings(Settings, kd.MutualTrainingArguments, defaults=defaults)
    reads = set().union(*(kd.loss_class(name).required_inputs for _, name in terms_of(s)))
    reads &= {"teacher", "teacher_features"}
    student, train = s.student != "none", s.train_teachers
    if len(s.teacher_rates) not in (0, len(s.teachers)):
        refuse(s, "one rate for each teacher", "teacher_rates", "teachers")
    if not train and (s.teacher_rates or s.teacher_epochs or not student):
        refuse(s, "--train_teachers True", "teacher_rates", "teacher_epochs", "student")
    if not 0.0 < s.holdout < 1.0:
        refuse(s, "a share in (0, 1)", "holdout")
    if s.cache and (reads != {"teacher"} or s.augment):
        expected = f"--augment False and terms on the teachers' logits (they read {sorted(reads)})"
        refuse(s, expected, "cache", "augment", "terms")
    if (reads or s.keep < 1.0) and student and not s.teachers:
        refuse(s, "--teachers to learn from", "terms", "keep")
    return s, args


def refuse(s: Settings, expected: str, *options: str) -> None:
    given = " ".join(f"--{option} {getattr(s, option)}" for option in options)
    raise SystemExit(f"{given}: expected {expected}")


def main() -> dict:
    s, args = options()
    set_seed(args.seed)
    train, test, s.image, s.label = kd.data.load_pictures(s.data, s.image, s.label)
    classes = train.features[s.label].num_classes
    # the same parts for every seed: no teacher may have seen the held-out one
    train, held = train.train_test_split(s.holdout, seed=0).values()
    rows = {"train": train, "held": held, "test": test}
    known = s.teachers if s.train_teachers else []
    for name in [*known, *([s.student] if s.student != "none" else [])]:
        kd.models.make_model(name, classes)  # a mistyped name is refused before all else
    teachers = [] if s.train_teachers else [kd.models.make_teacher(t, classes) for t in s.teachers]
    kd.train.claim_folder(args, **vars(s))

    if s.train_teachers:
        folders = [train_teacher(s, args, k, rows, classes) for k in range(len(s.teachers))]
        teachers = [kd.models.make_teacher(folder, classes) for folder in folders]
    if s.student == "none":
        if args.process_index == 0:
            results = json.dumps(vars(s) | {"seed": args.seed}, indent=1)
            Path(args.output_dir, "results.json").write_text(results)
        return {}
    teachers = [teacher.to(args.device) for teacher in teachers]
    set_seed(args.seed)
    student = kd.models.make_model(s.student, classes).to(memory_format=torch.channels_last)
    views = make_views(s, args, student, rows, s.label)
    mask = influence(s, args, teachers, student, rows) if s.keep < 1.0 else None
    loss = make_loss(s, teachers, mask)
    if s.cache:
        how = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers}
        how["dtype"] = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        folder, train_view = Path(args.output_dir, "cache"), views["train_dataset"]
        cached = kd.cache_teachers(train_view, teachers, folder, student=student, **how)
        views["train_dataset"] = cached
    if s.cache or not loss.required_inputs & {"teacher", "teacher_features"}:
        teachers = []
    trainer = kd.MutualDistillationTrainer(student, loss, args, teachers=teachers, **views)
    trainer.train(resume_from_checkpoint=True)
    figures = trainer.evaluate()
    trainer.save_state()
    trainer.export()
    if trainer.is_world_process_zero():
        kd.train.write_results(s, args, figures)
    return figures


if __name__ == "__main__":
    kd.train.run_main(main)
