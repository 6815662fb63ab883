"""Distil one or several teachers into a student, on logits and on features.

    python recipes/cifar100_noise.py --data uoft-cs/cifar100 --label fine_label --noise none \\
        --method ce --models resnet34_cifar --holdout 0.1 --output_dir runs/teacher --bf16
    accelerate launch -q recipes/distill_teachers.py --data uoft-cs/cifar100 --label fine_label \\
        --preset camkd --student resnet10_cifar --teachers runs/teacher/peer_a resnet50 --bf16

`--teachers` are folders that export() wrote, `NAME=FILE` for weights of a timm architecture, or
timm names (pretrained). cifar100_noise.py trains and exports them; with `--holdout 0.1` they do not
see the part that is held out here.

`--terms` is a sum of registered losses. `--standardize 2` standardises the logits that they soften,
and softens them at T = 2 (logit standardisation). `--revise 0.8` corrects the teachers' logits
(Label Revision). `--keep 0.8` distils on the 80% of the training data with the least influence on
the loss of the held-out part (Data Selection). `--cache True` computes the teachers' logits once
and needs `--augment False`. Run a killed command again: it continues. Expected: recipes/README.md.
"""

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
from kd_plugins.data import own_side, plain_view, training_view

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
    student: str = HfArg(default="resnet10_cifar", help="timm name")
    teachers: list[str] = HfArg(default_factory=list, help="folders, NAME=FILE, or timm names")
    terms: str = HfArg(default="ce + camkd", help="a sum of registered losses with weights")
    beta: float = HfArg(default=8.0, help="of dkd: 8, 6 or 2 by pair; see its description")
    gamma: float = HfArg(default=0.1, help="of wttm: 0.1 to 0.4 by pair; see its description")
    standardize: float = HfArg(default=0.0, help="T of standardised logits; 0 is off")
    revise: float = HfArg(default=0.0, help="eta of Label Revision; 0 is off")
    keep: float = HfArg(default=1.0, help="share of the training data to distil on")
    holdout: float = HfArg(default=0.1, help="share of the training data to measure influence on")
    cache: bool = HfArg(default=False, help="compute the teachers' logits once")
    augment: bool = HfArg(default=True, help="crop and flip")


def options() -> tuple[Settings, kd.MutualTrainingArguments]:
    """Settings and arguments. What cannot work is refused before anything is read or written."""

    def defaults(given):
        if given.preset and given.preset not in PRESETS:
            raise SystemExit(f"--preset {given.preset}: expected one of {', '.join(PRESETS)}")
        return DEFAULTS | (SCHEDULE | PRESETS[given.preset] if given.preset else {})

    s, args = kd.train.parse_settings(Settings, kd.MutualTrainingArguments, defaults=defaults)
    reads = read_by(s)
    if not 0.0 < s.holdout < 1.0:
        raise SystemExit(f"--holdout {s.holdout}: expected a share in (0, 1)")
    if s.cache and (reads != {"teacher"} or s.augment):
        raise SystemExit(
            f"--cache True --augment {s.augment} --terms {s.terms}: expected --augment False and "
            f"terms on the teachers' logits (they read {sorted(reads)})"
        )
    if (reads or s.keep < 1.0) and not s.teachers:
        raise SystemExit(f"--terms {s.terms} --keep {s.keep}: expected --teachers to learn from")
    return s, args


def read_by(s: Settings) -> set[str]:
    """What the terms read of the teachers: logits, feature maps, both or nothing."""
    names = [name for _, name in kd.train.parse_terms("terms", s.terms)]
    inputs = set().union(*(kd.loss_class(name).required_inputs for name in names))
    return inputs & {"teacher", "teacher_features"}


def make_loss(s: Settings, teachers: list, mask):
    """The sum of the terms, revised and selected as asked."""
    terms = []
    for weight, name in kd.train.parse_terms("terms", s.terms):
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


def select(s: Settings, args, teachers: list, parts: list, size: int):
    """The rows to keep: those of least influence on the held-out loss, mean over the teachers."""

    def scores_of(teacher):
        """On pictures as this teacher knows them."""
        views = [plain_view(rows, teacher, size, image=s.image, label=s.label) for rows in parts]
        workers = {"num_workers": args.dataloader_num_workers}
        loaders = [DataLoader(view, args.eval_batch_size, **workers) for view in views]
        return kd.influence_scores(teacher, *loaders)

    scores = torch.stack([scores_of(teacher) for teacher in teachers]).mean(0)
    np.save(Path(args.output_dir, "influence.npy"), scores.numpy())
    return kd.select_lowest(scores, s.keep)


def main() -> dict:
    s, args = options()
    train, test, s.image, s.label = kd.data.load_pictures(s.data, s.image, s.label)
    classes = train.features[s.label].num_classes
    # the same part for every seed, as in cifar100_noise.py: no teacher may have seen it
    train, held = train.train_test_split(s.holdout, seed=0).values()
    teachers = [kd.models.make_teacher(name, classes).to(args.device) for name in s.teachers]
    set_seed(args.seed)
    student = kd.models.make_model(s.student, classes).to(memory_format=torch.channels_last)
    kd.train.claim_folder(args, **vars(s))

    columns = {"image": s.image, "label": s.label}
    size = own_side(plain_view(train, None, **columns))
    train_view = training_view(train, student, size, s.augment, seed=args.seed, **columns)
    test_view = plain_view(test, student, size, **columns)
    mask = None
    if s.keep < 1.0:
        mask = select(s, args, teachers, [train, held], size)
    loss = make_loss(s, teachers, mask)
    if s.cache:
        how = {"batch_size": args.eval_batch_size, "num_workers": args.dataloader_num_workers}
        how["dtype"] = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        folder = Path(args.output_dir, "cache")
        train_view = kd.cache_teachers(train_view, teachers, folder, student=student, **how)
    taught = {"teachers": [] if s.cache or not read_by(s) else teachers}
    data = {"train_dataset": train_view, "eval_dataset": test_view}
    trainer = kd.MutualDistillationTrainer(student, loss, args, **taught, **data)
    trainer.train(resume_from_checkpoint=True)
    figures = trainer.evaluate()
    trainer.save_state()
    trainer.export()
    if trainer.is_world_process_zero():
        kd.train.write_results(s, args, figures)
    return figures


if __name__ == "__main__":
    kd.train.run_main(main)
