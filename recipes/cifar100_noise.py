"""Train on CIFAR-100, or any image data set, with any label noise and any method by name; one network or several.

    accelerate launch -q recipes/cifar100_noise.py --data uoft-cs/cifar100 --label fine_label \\
        --method smkd --refine mylc --loss_args eta=2 b2=-6 --models resnet34_cifar resnet34_cifar \\
        --noise symmetric --rate 0.4 --num_train_epochs 100 --bf16

`--method` is any name of `kd_plugins.list_losses()`, or `cdr`. What a loss needs to know of data and networks is filled in, and
the share of samples that co-teaching forgets, or of gradients that CDR drops, is `--rate`, as in their papers. Some methods take
several stages, each in a folder of its own: see `STAGES`; `--stage_epochs 4 8` shares the epochs out.

`--data` is a hub id or a folder (parquet, or one folder per class). On two processes without a GPU:
`torchrun --nproc_per_node 2 recipes/cifar100_noise.py ...`. A killed run goes on from its last complete checkpoint when the
same command is given again. Expected: on 10,000 pictures, two small networks and 12 epochs 14.0 ± 0.5 (MyLC) against 13.9 ± 0.3
per cent (cross-entropy), and why no more: recipes/README.md.
"""

import contextlib
import copy
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from pictures import check_loss, check_networks, load, transform, write_results
from transformers import set_seed

import kd_plugins.models  # noqa: F401  makes resnet18_cifar and its sisters known to timm
from kd_plugins import (
    DynamicsCallback,
    Mutual,
    MutualDistillationTrainer,
    MutualTrainingArguments,
    Nothing,
    create_loss,
    estimate_transition,
    loss_class,
)
from kd_plugins.data import (
    ImageView,
    asymmetric,
    circular,
    noise_report,
    noisy_view,
    pair_flip,
    symmetric,
)
from kd_plugins.train import CDRCallback, claim_folder, parse_settings, run_main

# Methods that are more than one training with one loss, and then for one network. Each stage: (loss, "new" or "same" network,
# training arguments of the authors' code).
STAGES: dict[str, list] = {
    "cdr": [("ce", "new", {})],  # with CDRCallback
    "joint": [
        ("joint", "new", {}),
        ("soft_labels", "new", {}),
    ],  # then on the labels that joint arrived at
    "tf_kd_self": [
        ("ce", "new", {}),
        ("tf_kd_self", "new", {}),
    ],  # taught by its own first training
    "forward_correction": [
        ("ce", "new", {}),
        ("forward_correction", "new", {}),
    ],  # ce estimates the transition matrix
    "backward_correction": [("ce", "new", {}), ("backward_correction", "new", {})],
    "t_revision": [
        ("ce", "new", {}),
        ("reweighting", "same", {}),  # t_revision with the matrix as estimated
        ("t_revision", "same", {"learning_rate": 5e-7, "optim": "adamw_torch", "optim_args": None}),
    ],
    "dmi": [("ce", "new", {}), ("dmi", "same", {"learning_rate": 1e-6})],
}

DEFAULTS = {
    "output_dir": "runs/cifar100_noise",
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
    classes: int = field(default=0, metadata={"help": "keep the first so many classes only"})
    where: str | None = field(
        default=None,
        metadata={
            "help": "train only on the rows where this column is true, and test on the "
            "classes that they have"
        },
    )
    augment: bool = field(
        default=True, metadata={"help": "crop and flip; without, a short run learns by heart too"}
    )
    size: int = field(default=0, metadata={"help": "side of the pictures in px; as they are if 0"})
    method: str = field(
        default="smkd", metadata={"help": "any of kd_plugins.list_losses(), or cdr"}
    )
    refine: str = field(default="mylc", metadata={"help": "label modification inside smkd"})
    loss_args: list[str] = field(
        default_factory=list, metadata={"help": "of the method: eta=2 b2=-6"}
    )
    refine_args: list[str] = field(
        default_factory=list, metadata={"help": "of the label modification: b1=10"}
    )
    models: list[str] = field(
        default_factory=lambda: ["resnet34_cifar"] * 2, metadata={"help": "timm names, or one"}
    )
    noise: str = field(
        default="symmetric",
        metadata={
            "help": "symmetric, pair_flip, asymmetric (next class), circular "
            "(within coarse_label), none, or a column with given labels"
        },
    )
    rate: float | None = field(
        default=None, metadata={"help": "share of wrong labels; 0.4, with --noise none 0"}
    )
    stage_epochs: list[float] = field(
        default_factory=list,
        metadata={
            "help": "of each stage of a method of several; num_train_epochs each if not given"
        },
    )
    estimator: str = field(
        default="anchor",
        metadata={
            "help": "of the transition matrix: anchor, dual_t, or known, which takes "
            "that of --noise and needs no stage"
        },
    )
    dynamics: bool = field(
        default=False,
        metadata={
            "help": "keep what each network said of each sample, visit by visit: "
            "output_dir/dynamics, for find_wrong_labels.py"
        },
    )
    holdout: float = field(
        default=0.0,
        metadata={
            "help": "share of the noisy training data to evaluate on instead of the "
            "test data: hyperparameters are chosen there"
        },
    )


def make_loss(s: Settings, name: str, models, **known):
    """A method by name; what depends on data (num_samples ...) and networks (feature_dims ...) is filled in."""

    def value(text):
        for read in (json.loads, float):  # float reads inf
            with contextlib.suppress(ValueError):
                return read(text)
        return text

    def make(name, pairs, **known):
        wants = inspect.signature(loss_class(name)).parameters
        given = {k: value(v) for k, v in (pair.split("=", 1) for pair in pairs)}
        return create_loss(name, **{k: v for k, v in known.items() if k in wants} | given)

    if loss_class(name).peers and len(models) > 1:
        known |= {
            "num_peers": len(models),
            "feature_dims": [getattr(m, "num_features", None) for m in models],
        }
    own = s.loss_args if name == s.method else []  # not of the stages before
    if "refine" in inspect.signature(loss_class(name)).parameters:
        known["refine"] = make(s.refine, s.refine_args, **known)
    loss = make(name, own, forget=s.rate, **known)
    return (
        loss if loss.peers or len(models) == 1 else Mutual(loss, Nothing(), num_peers=len(models))
    )


def make_noise(s: Settings, train):
    classes = train.features[s.label].num_classes
    if s.noise == "circular":
        pairs = dict(zip(train[s.label], train["coarse_label"], strict=True))
        return circular([pairs[c] for c in range(classes)], s.rate)
    if s.noise in train.column_names:
        return s.noise
    makers = {
        "symmetric": symmetric,
        "pair_flip": pair_flip,
        "asymmetric": lambda c, r: asymmetric(c, r, {i: (i + 1) % c for i in range(c)}),
    }
    if s.noise not in makers:
        expected = f"{', '.join(makers)}, circular, none or one of {train.column_names}"
        raise SystemExit(f"--noise {s.noise}: expected {expected}")
    return makers[s.noise](classes, s.rate)


def first_classes(data, label: str, count: int):
    """The rows of the first classes, and no other names in the label column."""
    names = data.features[label].names
    if not 1 < count <= len(names):
        raise SystemExit(f"--classes {count}: expected 2 to {len(names)}, as many as there are")
    data = data.filter(
        lambda labels: [y < count for y in labels], input_columns=label, batched=True
    )
    return data.cast_column(label, datasets.ClassLabel(names=names[:count]))


def options() -> tuple[Settings, MutualTrainingArguments, list]:
    """Settings, arguments and stages; what does not go together is refused before anything is read or written."""
    s, args = parse_settings(Settings, MutualTrainingArguments, defaults=DEFAULTS)
    if s.rate is None:
        s.rate = 0.0 if s.noise == "none" else 0.4
    loss = check_loss("method", "ce" if s.method == "cdr" else s.method)
    given = [("loss_args", s.method, loss, s.loss_args)]
    if "refine" in inspect.signature(loss).parameters:
        given.append(("refine_args", s.refine, check_loss("refine", s.refine), s.refine_args))
    elif s.refine_args or s.refine != Settings.refine:
        asked = " ".join([s.refine, *s.refine_args])
        raise SystemExit(f"--refine {asked}: {s.method} takes no refine and would ignore it")
    for option, name, cls, pairs in given:
        takes = [key for key in inspect.signature(cls).parameters if key != "base"]
        if wrong := [pair for pair in pairs if "=" not in pair or pair.split("=")[0] not in takes]:
            raise SystemExit(
                f"--{option} {' '.join(wrong)}: expected NAME=VALUE, NAME of {name}: {', '.join(takes)}"
            )
    check_networks("models", s.models)

    stages = STAGES.get(s.method, [(s.method, "new", {})])
    if s.estimator == "known" and s.method.endswith("_correction"):
        stages = stages[-1:]
    if s.estimator not in ("anchor", "dual_t", "known"):
        raise SystemExit(f"--estimator {s.estimator}: expected anchor, dual_t or known")
    if len(stages) > 1 and len(s.models) > 1:
        raise SystemExit(
            f"{s.method} takes {len(stages)} stages, for one network: give one --models"
        )
    epochs = s.stage_epochs or [args.num_train_epochs] * len(stages)
    if len(epochs) != len(stages):
        names = [name for name, *_ in stages]
        raise SystemExit(f"--stage_epochs {epochs}: {s.method} has {len(stages)} stages, {names}")
    stages = [
        (*stage, {**more, "num_train_epochs": e})
        for (*stage, more), e in zip(stages, epochs, strict=True)
    ]
    return s, args, stages


def main() -> dict:
    s, args, stages = options()
    set_seed(args.seed)
    train, test = load(s)
    if s.classes:
        train, test = (first_classes(part, s.label, s.classes) for part in (train, test))
    if s.where:
        train = train.select(np.flatnonzero(train.with_format("numpy")[s.where][:]))
        taught = np.unique(train.with_format("numpy")[s.label][:])
        test = test.select(np.flatnonzero(np.isin(test.with_format("numpy")[s.label][:], taught)))
    given = s.label
    if s.noise != "none":
        noise = make_noise(
            s, train
        )  # before the hold-out: a view of a split would copy the pictures
        train = noisy_view(train, noise, seed=args.seed, label=s.label, noisy="given_label")
        given = "given_label"
        if args.process_index == 0:
            classes = train.features[s.label].num_classes
            print(noise_report(np.asarray(train[s.label]), np.asarray(train[given]), classes))
    if s.holdout > 0:
        parts = train.train_test_split(s.holdout, seed=args.seed)
        train, test = parts["train"], parts["test"]

    classes = train.features[s.label].num_classes
    size = s.size or min(train[0][s.image].size)
    example = timm.create_model(s.models[0], num_classes=classes)
    plain = transform(size, example, False)
    crops = transform(size, example, s.augment)
    train_view = ImageView(train, crops, seed=args.seed, image=s.image, label=given, clean=s.label)
    label = (
        given if s.holdout > 0 else s.label
    )  # chosen on given labels: nobody has clean ones to choose with
    test_view = ImageView(test, plain, image=s.image, label=label)
    fit = ImageView(
        train, plain, image=s.image, label=given, clean=s.label
    )  # the training data without augmentation

    known = {"window": len(train), "num_samples": len(train), "num_classes": classes}
    if s.estimator == "known":
        if s.noise == "none" or s.noise in train.column_names:
            raise SystemExit(
                f"--estimator known: --noise {s.noise} has no known matrix; use anchor or dual_t"
            )
        known["transition"] = torch.from_numpy(np.asarray(noise))

    teachers: list = []
    for number, (name, network, settings) in enumerate(stages):
        stage = copy.copy(args)
        for key, value in settings.items():
            setattr(stage, key, value)
        if len(stages) > 1:
            stage.output_dir = str(Path(args.output_dir, f"{number + 1}-{name}"))
        if network == "new":
            set_seed(args.seed + number)
            models = [timm.create_model(name, num_classes=classes) for name in s.models]
            models = [m.to(memory_format=torch.channels_last) for m in models]
        if name == "reweighting":
            loss = create_loss("t_revision", transition=known["transition"], revise=False)
        else:
            loss = make_loss(s, name, models, **known)
        callbacks: list = [CDRCallback(s.rate)] if s.method == "cdr" else []
        callbacks += [DynamicsCallback()] if s.dynamics else []
        views = {"train_dataset": train_view, "eval_dataset": test_view}
        trainer = MutualDistillationTrainer(
            models, loss, stage, teachers=teachers, callbacks=callbacks, **views
        )
        claim_folder(args, **vars(s))  # not before all of it could be made
        trainer.train(resume_from_checkpoint=True)

        following = (
            stages[number + 1][0] if number + 1 < len(stages) else None
        )  # what the next stage needs of this one
        if following == "soft_labels":
            known["labels"] = loss.soft_labels().cpu()
        elif following == "tf_kd_self":
            teachers = trainer.peers
        elif following is not None and following != "dmi" and "transition" not in known:
            loader = torch.utils.data.DataLoader(
                fit, args.eval_batch_size, num_workers=args.dataloader_num_workers
            )
            known["transition"] = estimate_transition(models[0], loader, method=s.estimator)

    figures = trainer.evaluate(test_view) | trainer.evaluate(fit, metric_key_prefix="train")
    trainer.save_state()
    trainer.export(args.output_dir)
    if trainer.is_world_process_zero():
        write_results(s, args, figures, stage.output_dir)
    return figures


if __name__ == "__main__":
    run_main(main)
