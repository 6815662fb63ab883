"""Train on CIFAR-100, or any image data set, with any label noise and any method by name.

    accelerate launch -q recipes/cifar100_noise.py --data uoft-cs/cifar100 --label fine_label \\
        --method smkd --refine mylc --loss_args eta=2 b2=-6 normalize=selected \\
        --models resnet34_cifar resnet34_cifar --noise symmetric --rate 0.4 --bf16

`--method` is a name from `kd_plugins.list_losses()`, or `cdr`. Methods of several stages
(`kd_plugins.train.STAGES`) train one network, each stage in its own folder; `--stage_epochs 4 8`
gives their lengths.
Co-teaching and JoCoR forget, and CDR drops, the share `--rate`, as in their papers. With
`--method co_teaching --loss_args forget=null` nothing has to be known; the log has a `noise_rate`.

`--data` is a hub id or a folder (parquet, or one folder per class). Run a killed command again: it
continues from its last complete checkpoint. Expected with 10,000 pictures, two small networks and
12 epochs: 14.0 ± 0.5 (MyLC) and 13.9 ± 0.3 per cent (cross-entropy). recipes/README.md says why.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from transformers import set_seed
from transformers.hf_argparser import HfArg

import kd_plugins as kd

DEFAULTS = {"output_dir": "runs/cifar100_noise", "report_to": "none", "save_total_limit": 2}
DEFAULTS |= {"eval_strategy": "epoch", "save_strategy": "epoch"}


@dataclass
class Settings:
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(default=None, help="column of classes, if there are several")
    classes: int = HfArg(default=0, help="keep only the first classes, so many")
    where: str | None = HfArg(default=None, help="train only on rows where this column is true")
    augment: bool = HfArg(default=True, help="crop and flip")
    flip: bool = HfArg(default=True, help="False: crop only, for digits and letters")
    size: int = HfArg(default=0, help="side in px; 0: as they are, above 64 what the model expects")
    method: str = HfArg(default="smkd", help="any of kd_plugins.list_losses(), or cdr")
    refine: str = HfArg(default="mylc", help="label modification inside smkd")
    loss_args: list[str] = HfArg(default_factory=list, help="of the method: eta=2 b2=-6")
    refine_args: list[str] = HfArg(default_factory=list, help="of the modification: b1=10")
    models: list[str] = HfArg(default_factory=lambda: ["resnet34_cifar"] * 2, help="timm names")
    noise: str = HfArg(default="symmetric", help="or pair_flip, circular, cifar10, none, COLUMN")
    rate: float | None = HfArg(
        default=None, help="share of wrong labels; 0.4; none: 0; COLUMN: its own"
    )
    stage_epochs: list[float] = HfArg(default_factory=list, help="num_train_epochs of each stage")
    estimator: str = HfArg(default="anchor", help="of the transition matrix; dual_t, or known")
    dynamics: bool = HfArg(default=False, help="write output_dir/dynamics for find_wrong_labels.py")
    holdout: float = HfArg(default=0.0, help="evaluate on this share of the noisy training data")


def make_loss(s: Settings, name: str, known: dict):
    """A loss by name; the Trainer fills in the sizes of data and networks."""
    given = name == s.method or (name, s.method) == ("ce", "cdr")
    own = kd.train.parse_pairs("loss_args", s.loss_args) if given else {}
    if name == "smkd":
        refine_args = kd.train.parse_pairs("refine_args", s.refine_args)
        own["refine"] = kd.create_loss(s.refine, **refine_args)
    elif name in ("co_teaching", "co_teaching_plus", "jocor"):
        own = {"forget": s.rate} | own
    elif name == "reweighting":
        name, own = "t_revision", {"revise": False}
    own |= {key: known[key] for key in signature(kd.loss_class(name)).parameters if key in known}
    if kd.loss_class(name).num_peers > 1 and len(s.models) > 2:
        own["num_peers"] = len(s.models)
    loss = kd.create_loss(name, **own)
    alone = loss.num_peers > 1 or len(s.models) == 1
    return loss if alone else kd.Mutual(loss, kd.SelectNone(), num_peers=len(s.models))


def options() -> tuple[Settings, kd.MutualTrainingArguments, list]:
    """Settings, arguments and stages. What cannot work is refused before anything is written."""
    s, args = kd.train.parse_settings(Settings, kd.MutualTrainingArguments, defaults=DEFAULTS)
    if s.rate is None and s.noise in kd.data.NOISE:  # that of a column is counted
        s.rate = 0.0 if s.noise == "none" else 0.4
    if s.method != "smkd" and (s.refine_args or s.refine != "mylc"):
        given = " ".join([s.refine, *s.refine_args])
        raise SystemExit(f"--refine {given}: {s.method} takes no refine and would ignore it")
    if s.estimator not in ("anchor", "dual_t", "known"):
        raise SystemExit(f"--estimator {s.estimator}: expected anchor, dual_t or known")
    if s.estimator == "known" and s.noise not in kd.data.NOISE[:-1]:
        raise SystemExit(f"--estimator known: --noise {s.noise} has no known matrix; use anchor")
    stages = kd.train.stages_of(s.method, s.stage_epochs, s.estimator == "known")
    if len(stages) > 1 and len(s.models) > 1:
        raise SystemExit(
            f"{s.method} takes {len(stages)} stages, for one network: give one --models"
        )
    # a mistyped option of a late stage ends the run here, not after the first stage
    example = {"transition": torch.eye(2), "labels": torch.full((1, 2), 0.5)}
    make_loss(s, "ce" if s.method == "cdr" else s.method, example)
    return s, args, stages


def load(s: Settings, args) -> tuple:
    """Training data, test data, the training data without augmentation, and the noise."""
    train, test, s.image, s.label = kd.data.load_pictures(
        s.data, s.image, s.label, classes=s.classes, where=s.where
    )
    noise = kd.data.noise_by_name(train, s.noise, s.rate or 0.0, s.label)
    # before the hold-out: a view of a split would copy the pictures
    train = kd.data.noisy_view(train, noise, seed=args.seed, label=s.label, noisy="given_label")
    classes = train.features[s.label].num_classes
    report = kd.data.noise_report(train[s.label], train["given_label"], classes)
    s.rate = report.rate if s.rate is None else s.rate
    if args.process_index == 0:
        print(report)
    if s.holdout > 0:  # the same rows for every seed; their labels are the given ones
        train, test = train.train_test_split(s.holdout, seed=0).values()

    columns = {"image": s.image, "label": "given_label", "clean": s.label}
    size = s.size or kd.data.own_side(kd.data.plain_view(train, None, **columns))
    example = kd.models.make_model(s.models[0], classes)
    views = 1 if s.method == "cdr" else kd.loss_class(s.method).views
    how = {"augment": s.augment, "flip": s.flip, "seed": args.seed, "views": views}
    train_view = kd.data.training_view(train, example, size, **how, **columns)
    fit = kd.data.plain_view(train, example, size, **columns)
    columns = {"image": s.image, "label": "given_label" if s.holdout else s.label}
    return train_view, kd.data.plain_view(test, example, size, **columns), fit, noise


def main() -> dict:
    s, args, stages = options()
    train, test, fit, noise = load(s, args)
    known = {"transition": noise} if s.estimator == "known" else {}
    teachers: list = []
    for number, stage in enumerate(stages):
        if stage.new:
            set_seed(args.seed + number)
            models = [kd.models.make_model(name, train.num_classes) for name in s.models]
            models = [model.to(memory_format=torch.channels_last) for model in models]
        callbacks: list = [kd.CDRCallback(s.rate)] if s.method == "cdr" else []
        callbacks += [kd.DynamicsCallback()] if s.dynamics else []
        loss, own = make_loss(s, stage.name, known), kd.train.arguments_of(stages, number, args)
        data = {"train_dataset": train, "eval_dataset": test, "callbacks": callbacks}
        trainer = kd.MutualDistillationTrainer(models, loss, own, teachers=teachers, **data)
        kd.train.claim_folder(args, **vars(s))  # not before all of it could be made
        trainer.train(resume_from_checkpoint=True)
        for following in stages[number + 1 : number + 2]:
            found = kd.train.hand_over(following, trainer, fit, known, s.estimator)
            teachers = found.pop("teachers", [])
            if "transition" in found and args.process_index == 0:
                print(f"noise rate by it: {kd.estimate_noise_rate(found['transition']):.1%}")
            known |= found

    figures = trainer.evaluate(test) | trainer.evaluate(fit, metric_key_prefix="train")
    trainer.save_state()
    trainer.export(args.output_dir)
    if trainer.is_world_process_zero():
        kd.train.write_results(s, args, figures, own.output_dir)
    return figures


if __name__ == "__main__":
    kd.train.run_main(main)
