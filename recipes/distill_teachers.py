"""Distil one or several teachers into a student, by logits and by features, with labels revised and data selected.

    accelerate launch -q recipes/distill_teachers.py --data uoft-cs/cifar100 --label fine_label --preset camkd \\
        --student resnet10_cifar --teachers runs/teachers/0/peer_a runs/teachers/1/peer_a --bf16

`--teachers` are folders that export() wrote, `NAME=FILE` for weights of a timm architecture, or timm names (pretrained). With
`--train_teachers True` they are architectures that are trained first, on the same data, each into `output_dir/teachers/K` (and with
`--student none` nothing else is); `--teacher_rates 0 0 0.4` gives the third wrong labels to learn from. `--terms` is any sum of
registered losses; `--revise 0.8` revises the teachers' logits (LabelRevision), `--keep 0.8` distils on the 80% of the training data
of least influence on the loss of the held-out part (Data Selection). `--cache True` computes the teachers' logits once; it takes
`--augment False`. A killed run goes on when the same command is given again. Expected: recipes/README.md.
"""

import copy
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
from pictures import check_loss, check_networks, load, transform, write_results
from transformers import set_seed

import kd_plugins.models  # noqa: F401  makes resnet18_cifar and its sisters known to timm
from kd_plugins import (
    CE,
    KD,
    LabelRevision,
    MutualDistillationTrainer,
    MutualTrainingArguments,
    Selected,
    create_loss,
    loss_class,
)
from kd_plugins.audit import influence_scores, select_lowest
from kd_plugins.data import ImageView, cache_teachers, noisy_view, symmetric
from kd_plugins.models import feature_dims, make_teacher
from kd_plugins.train import claim_folder, parse_settings, run_main

# The schedule of CA-MKD's public code, which is CRD's: 240 epochs, a tenth of the learning rate at 150, 180 and 210.
SCHEDULE = {
    "num_train_epochs": 240,
    "per_device_train_batch_size": 64,
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "optim_args": "momentum=0.9,nesterov=True",
    "milestones": [150 / 240, 180 / 240, 210 / 240],
    "lr_decay": 0.1,
}
PRESETS = {  # weights as published; of Label Revision + Data Selection only the formula is: weights and share are ours
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
    "lr": {"terms": "ce + kd", "revise": 0.8},
    "lr_ds": {"terms": "ce + kd", "revise": 0.8, "keep": 0.8},
}

DEFAULTS = {
    "output_dir": "runs/distill_teachers",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}


@dataclass
class Settings:
    data: str = field(default="uoft-cs/cifar100", metadata={"help": "hub id or folder"})
    image: str | None = field(
        default=None, metadata={"help": "column; the one that holds pictures"}
    )
    label: str | None = field(
        default=None, metadata={"help": "column of classes; label, or the only one"}
    )
    preset: str = field(
        default="", metadata={"help": f"terms and schedule of a paper: {', '.join(PRESETS)}"}
    )
    student: str = field(
        default="resnet10_cifar", metadata={"help": "timm name, or none: teachers only"}
    )
    teachers: list[str] = field(
        default_factory=list, metadata={"help": "folders, NAME=FILE, or timm names"}
    )
    train_teachers: bool = field(
        default=False, metadata={"help": "teachers are architectures: train them first"}
    )
    teacher_rates: list[float] = field(
        default_factory=list, metadata={"help": "share of wrong labels each is taught"}
    )
    teacher_epochs: float = field(default=0.0, metadata={"help": "num_train_epochs if 0"})
    terms: str = field(
        default="ce + camkd", metadata={"help": "a sum of registered losses with weights"}
    )
    revise: float = field(
        default=0.0, metadata={"help": "eta of Label Revision on every term on logits; 0 is off"}
    )
    keep: float = field(
        default=1.0, metadata={"help": "share of the training data to distil on (Data Selection)"}
    )
    holdout: float = field(
        default=0.1, metadata={"help": "share of the training data to measure influence on"}
    )
    cache: bool = field(
        default=False, metadata={"help": "compute the teachers' logits once, into output_dir/cache"}
    )
    augment: bool = field(default=True, metadata={"help": "random crops and flips"})


def terms_of(s: Settings) -> list[tuple[float, str]]:
    """Weight and name of each term."""
    pairs = [text.rpartition("*") for text in s.terms.split("+")]
    try:
        return [(float(weight or 1), name.strip()) for weight, _, name in pairs]
    except ValueError as error:
        raise SystemExit(f"--terms {s.terms}: expected WEIGHT*NAME + NAME ...: {error}") from None


def make_loss(s: Settings, student, teachers, samples: int, mask=None):
    """The sum of the terms; dimensions, heads and rows are filled in, terms are revised and selected as asked."""
    known = {
        "student_dim": student.num_features,
        "teacher_dims": [t.num_features for t in teachers],
        "heads": [t.forward_head for t in teachers],
        "num_samples": samples,
    }
    total = None
    for weight, name in terms_of(s):
        wants = inspect.signature(loss_class(name)).parameters
        given = {k: v for k, v in known.items() if k in wants}
        if (
            wants.get("layer") and wants["layer"].default == -2
        ):  # a hint is taken before the last map
            given |= {
                "student_dim": feature_dims(student)[-2],
                "teacher_dims": [feature_dims(t)[-2] for t in teachers],
            }
        if name.startswith("camkd"):  # the published weights, 1 and 50, go with the authors' scale
            given["scale"] = "code"
        term = create_loss(name, **given)
        if s.revise and isinstance(term, KD):
            term = LabelRevision(term, eta=s.revise)
        if mask is not None and name != "ce":
            term = Selected(mask, term)
        term = weight * term
        total = term if total is None else total + term
    return total


def train_teacher(
    s: Settings, args, k: int, name: str, train, test, classes: int, size: int
) -> str:
    """Cross-entropy on the training data, some of its labels made wrong if asked; the folder of the network."""
    stage = copy.copy(args)
    stage.output_dir = str(Path(args.output_dir, "teachers", str(k)))
    stage.num_train_epochs = s.teacher_epochs or args.num_train_epochs
    rate = s.teacher_rates[k] if s.teacher_rates else 0.0
    claim_folder(stage, data=s.data, teacher=name, rate=rate, holdout=s.holdout, augment=s.augment)
    folder = Path(stage.output_dir, "peer_a")
    if (folder / "README.md").exists():  # export writes it last
        return str(folder)
    if rate:
        train = noisy_view(
            train, symmetric(classes, rate), seed=args.seed + k, label=s.label, noisy="given_label"
        )
    set_seed(args.seed + 1 + k)
    model = timm.create_model(name, num_classes=classes)
    label = "given_label" if rate else s.label
    view = ImageView(
        train, transform(size, model, s.augment), seed=args.seed, image=s.image, label=label
    )
    test_view = ImageView(test, transform(size, model, False), image=s.image, label=s.label)
    trainer = MutualDistillationTrainer(
        model, CE(), stage, train_dataset=view, eval_dataset=test_view
    )
    trainer.train(resume_from_checkpoint=True)
    figures = trainer.evaluate(test_view)
    if trainer.is_world_process_zero():
        print(
            f"teacher {k}, {name}, {rate:.0%} of its labels wrong: accuracy {figures['eval_accuracy']:.4f}"
        )
        figures = {"teacher": name, "rate": rate} | figures
        Path(stage.output_dir, "results.json").write_text(json.dumps(figures, indent=1))
    trainer.export()
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def options() -> tuple[Settings, MutualTrainingArguments]:
    """Settings and arguments; what does not go together is refused before anything is read or written."""

    def defaults(given):
        if given.preset and given.preset not in PRESETS:
            raise SystemExit(f"--preset {given.preset}: expected one of {', '.join(PRESETS)}")
        return DEFAULTS | (SCHEDULE | PRESETS[given.preset] if given.preset else {})

    s, args = parse_settings(Settings, MutualTrainingArguments, defaults=defaults)
    if s.teacher_rates and len(s.teacher_rates) != len(s.teachers):
        raise SystemExit(
            f"--teacher_rates {s.teacher_rates}: expected one for each of {len(s.teachers)} teachers"
        )
    if not s.train_teachers and (s.teacher_rates or s.teacher_epochs or s.student == "none"):
        raise SystemExit(
            f"--teacher_rates {s.teacher_rates} --teacher_epochs {s.teacher_epochs:g} --student {s.student}: expected "
            "--train_teachers True beside rates, epochs or no student; no teacher would be trained"
        )
    if not 0.0 < s.holdout < 1.0:
        raise SystemExit(
            f"--holdout {s.holdout}: expected a share in (0, 1); all methods then train on the same rest"
        )
    reads = {
        key
        for _, name in terms_of(s)
        for key in check_loss("terms", name).reads
        if key.startswith("teacher")
    }
    if s.cache and (reads != {"teacher"} or s.augment):
        raise SystemExit(
            f"--cache True --augment {s.augment} --terms {s.terms}: expected --augment False and terms on the "
            f"teachers' logits, these read {sorted(reads)}; what is cached would not be used"
        )
    if (reads or s.keep < 1.0) and not s.teachers and s.student != "none":
        raise SystemExit(
            f"--terms {s.terms} --keep {s.keep:g}: expected --teachers to learn from, got none"
        )
    check_networks("student", [s.student] if s.student != "none" else [])
    return s, args


def main() -> dict:
    s, args = options()
    check_networks("teachers", s.teachers, trained=not s.train_teachers)
    set_seed(args.seed)
    train, test = load(s)
    classes = train.features[s.label].num_classes
    parts = train.train_test_split(
        s.holdout, seed=0
    )  # the same for every seed: teachers must not have seen it
    train, held_out = parts["train"], parts["test"]
    size = min(train[0][s.image].size)
    claim_folder(args, **vars(s))

    folders = s.teachers
    if s.train_teachers:
        folders = [
            train_teacher(s, args, k, n, train, test, classes, size)
            for k, n in enumerate(s.teachers)
        ]
    if s.student == "none":
        if args.process_index == 0:
            Path(args.output_dir, "results.json").write_text(
                json.dumps(vars(s) | {"seed": args.seed}, indent=1)
            )
        return {}
    set_seed(args.seed)
    student = timm.create_model(s.student, num_classes=classes).to(
        memory_format=torch.channels_last
    )
    teachers = [make_teacher(folder, classes).to(args.device) for folder in folders]

    plain = transform(size, student, False)
    train_view = ImageView(
        train, transform(size, student, s.augment), seed=args.seed, image=s.image, label=s.label
    )
    test_view = ImageView(test, plain, image=s.image, label=s.label)
    mask = None
    if s.keep < 1.0:
        views = [ImageView(part, plain, image=s.image, label=s.label) for part in (train, held_out)]
        loaders = [
            torch.utils.data.DataLoader(
                v, args.eval_batch_size, num_workers=args.dataloader_num_workers
            )
            for v in views
        ]
        scores = torch.stack([influence_scores(t, *loaders) for t in teachers]).mean(
            0
        )  # before the student starts
        mask = select_lowest(scores, s.keep)
        np.save(Path(args.output_dir, "influence.npy"), scores.numpy())
    loss = make_loss(s, student, teachers, len(train), mask)
    if s.cache:
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        how = {
            "batch_size": args.eval_batch_size,
            "num_workers": args.dataloader_num_workers,
            "dtype": dtype,
        }
        train_view = cache_teachers(
            train_view, teachers, Path(args.output_dir, "cache"), student=student, **how
        )
    hosted = teachers if loss.reads & {"teacher", "teacher_features"} and not s.cache else []
    views = {"train_dataset": train_view, "eval_dataset": test_view}
    trainer = MutualDistillationTrainer(student, loss, args, teachers=hosted, **views)
    trainer.train(resume_from_checkpoint=True)
    figures = trainer.evaluate(test_view)
    trainer.save_state()
    trainer.export()
    if trainer.is_world_process_zero():
        write_results(s, args, figures)
    return figures


if __name__ == "__main__":
    run_main(main)
