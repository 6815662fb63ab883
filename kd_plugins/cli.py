"""The command ``kd-plugins``: list the losses, train, find suspects, correct them, draw a run.

``--help`` and ``list`` import neither transformers nor datasets.
"""

from __future__ import annotations

import difflib
import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .cli_options import (
    BACKBONE,
    ApplySettings,
    DataSettings,
    SuspectSettings,
    TrainSettings,
)
from .losses import Loss, create_loss, list_losses, loss_class
from .losses.registry import summarise_loss

HELP = """\
usage: kd-plugins COMMAND ...

Train image classifiers on labels that are partly wrong, and find these labels.

  list [PATTERN]                 the losses by name; the whole description of one
  train DATA --models NAME ...   train one network, or several that teach each other
  suspects DATA                  the labels that are probably wrong: table, page, pictures
  apply DECISIONS DATA --out FOLDER
                                 the data without the labels that you found wrong
  report RUN ...                 draw the curves of runs, also of one that is still going

`kd-plugins COMMAND --help` describes a command. DATA is a hub id, a folder (a folder for each
class, or Parquet files) or a Parquet file.
"""
TRAIN = "kd-plugins train DATA --models NAME [NAME ...] --loss NAME [options]"
SUSPECTS = "kd-plugins suspects DATA [--backbone NAME | --dynamics FOLDER | ...] [options]"
APPLY = "kd-plugins apply DECISIONS.csv DATA --out FOLDER [options]"
MANY, ODD = 0.4, 0.05  # shares of suspects and of odd pairs above which their source is doubted
DEFAULTS = {"output_dir": "runs/train", "report_to": "none", "save_total_limit": 2}
DEFAULTS |= {"eval_strategy": "epoch", "save_strategy": "epoch"}


def list_command(argv: Sequence[str]) -> None:
    """``kd-plugins list [PATTERN]``."""
    pattern = argv[0] if argv else "*"
    if pattern in ("-h", "--help"):
        print("usage: kd-plugins list [PATTERN]\n\nThe losses whose name matches a shell pattern.")
        print("A name without * shows its call and its whole description.")
        return
    if len(argv) > 1 or not (names := list_losses(pattern)):
        raise _refusal(f"list {' '.join(argv)}: no loss has this name", pattern, list_losses())
    if names == [pattern]:
        cls = loss_class(pattern)
        print(f"{cls.__name__}{_signature(cls)}\n\n{inspect.getdoc(cls)}")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for loss in map(summarise_loss, names):
        others = ", ".join(loss.inputs[2:])
        peers = "peers" if "peer" in loss.inputs[0] else "one network"
        reads = f"{peers}{', ' * bool(others)}{others}"
        line = f"{loss.name:20} {loss.formula} [{reads}]"
        print(line if len(line) <= width else f"{line[: width - 1]}…")


def train_command(argv: Sequence[str]) -> None:
    """``kd-plugins train``: train, evaluate, export."""
    from . import train as kd

    kinds = (TrainSettings, kd.MutualTrainingArguments)
    s, args = kd.parse_settings(*kinds, defaults=DEFAULTS, args=_data_first(argv), usage=TRAIN)
    s.models = s.models or ["resnet18"] * loss_class(s.loss).num_peers
    loss = make_loss(s.loss, s.loss_args, len(s.models))
    models, train, evaluation = _networks_and_views(s, args)
    trainer = kd.MutualDistillationTrainer(
        *(models, loss, args),
        teachers=s.teachers,
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=[kd.DynamicsCallback()] if s.dynamics else [],
    )
    settings = {key: value for key, value in vars(s).items() if key != "max_broken"}
    kd.claim_folder(args, **settings)  # not before all of it could be made
    trainer.train(resume_from_checkpoint=True)
    figures = trainer.evaluate()
    trainer.save_state()
    trainer.save_metrics("eval", figures)
    paths = trainer.export()
    if trainer.is_world_process_zero():
        accuracy = {key: value for key, value in figures.items() if "accuracy" in key}
        print(*(f"{key}: {value:.4f}" for key, value in sorted(accuracy.items())), sep="\n")
        print(*paths, sep="\n")


def make_loss(name: str, text: str, peers: int) -> Loss:
    """The loss ``name`` with arguments in JSON. ``{"loss": NAME, ...}`` in there is a loss too."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise SystemExit(
            f"""--loss_args {text}: expected JSON such as '{{"eta": 2}}': {error}"""
        ) from None
    if not isinstance(given, dict):
        raise SystemExit(f"--loss_args {text}: expected names and values in braces")
    for key, value in given.items():
        if isinstance(value, dict) and "loss" in value:
            part = dict(value)
            given[key] = create_loss(part.pop("loss"), **part)
    cls = loss_class(name)
    if peers > 1 and cls.num_peers > 1 and "num_peers" in inspect.signature(cls).parameters:
        given.setdefault("num_peers", peers)
    return create_loss(name, **given)


def _networks_and_views(s: TrainSettings, args: Any) -> tuple[list[Any], Any, Any]:
    """The networks, and views of the training and the validation data, which hold bytes."""
    from transformers import set_seed

    from . import data as kd
    from .models import make_model

    splits = kd.load_data(_named_data(s))
    rows, image, label = kd.load_rows(splits, "train", s.image, s.label)
    _warn_of_weights(rows)
    held = next((split for split in ("validation", "test") if split in splits), None)
    columns: dict[str, Any] = {"image": image, "label": label, "max_broken": s.max_broken}
    views = loss_class(s.loss).views
    train: Any = kd.ImageView(rows, _unchanged, seed=args.seed, views=views, **columns)
    columns["class_names"] = train.class_names
    evaluation: Any = kd.ImageView(splits[held] if held else rows, _unchanged, **columns)
    set_seed(args.seed)
    models = [make_model(name, train.num_classes, pretrained=s.pretrained) for name in s.models]
    size = kd.own_side(train)
    train.transform = kd.picture_transform(models[0], size, s.augment, as_bytes=True)
    evaluation.transform = kd.picture_transform(models[0], size, as_bytes=True)
    how = f"the split {held}" if held else "a tenth of the split train, held out"
    train.name, evaluation.name = f"{s.data}, the split train", f"{s.data}, {how}"  # for the cards
    if held is None:  # of the same view, so that a row keeps its number
        kept, out = kd.hold_out(train.labels, args.seed)
        train, evaluation = kd.SubsetView(train, kept), kd.SubsetView(evaluation, out)
    if args.process_index == 0:
        print(f"columns: {image} (pictures), {label} ({train.num_classes} classes)")
        height, width = evaluation[0]["pixel_values"].shape[-2:]
        print(f"pictures go in at {height} x {width} px, {'their own' if size else 'scaled'} size")
        print(f"{len(train)} pictures to train on; validation: {len(evaluation)}, {how}")
    return models, train, evaluation


def _warn_of_weights(rows: Any) -> None:
    if {"weight", "given_label"} <= set(rows.column_names):
        warnings.warn(
            "the data have a column weight, of kd-plugins apply --how weight, and train does not "
            "use it: wrong labels count in full. Apply the decisions with --how correct or drop, "
            'or train in Python with a WeightedRandomSampler, see "Apply your decisions" in the '
            "documentation",
            stacklevel=2,
        )


def suspects_command(argv: Sequence[str]) -> None:
    """``kd-plugins suspects``: find and show the labels that are probably wrong."""
    from . import audit, data
    from .audit.gallery_rows import doubted
    from .train import parse_settings

    (s,) = parse_settings(SuspectSettings, defaults={}, args=_data_first(argv), usage=SUSPECTS)
    frozen = [source for source in (s.backbone, s.probs) if source]
    others = [source for source in (s.networks, s.dynamics, frozen or s.zero_shot) if source]
    if len(others) > 1 or len(frozen) > 1:
        raise SystemExit(
            "expected one of --networks, --dynamics, --probs and --backbone, or none of them; "
            "--zero-shot goes with the last two"
        )
    rows, image, label = data.load_rows(_named_data(s), s.split, s.image, s.label)
    columns: dict[str, Any] = {"image": image, "label": label}
    with_files = partial(audit.with_files, dataset=rows, image=image, folder=s.data)
    suspects, left_out, paths = _suspects(s, rows, with_files, **columns)
    suspects, decided = audit.without_decided(suspects, rows)
    if decided:
        print(f"{decided:,} more are not shown: somebody has decided on them before.")
    paths += audit.write_suspects(with_files(suspects), rows, s.output, count=s.count, **columns)
    number, known = len(doubted(suspects)), len(rows) - len(left_out)
    why = "another class is more probable"
    print(f"{number:,} of {known:,} labels are suspected, {why}:", *paths, sep="\n")
    if number > MANY * known:
        print(
            f"These are {number / known:.0%}: the labels are as bad as that, or what predicted the "
            "classes has learned too little. Then train longer, or use --backbone."
        )


def _suspects(
    s: SuspectSettings, rows: Any, with_files: Any, **columns: Any
) -> tuple[Any, Any, list[Any]]:
    """The suspects, the rows that are left out, and the files about the noise."""
    from . import audit, data, models

    networks = [models.make_teacher(folder, None) for folder in s.networks]
    columns["max_broken"] = s.max_broken
    view = data.plain_view(rows, networks[0] if networks else None, **columns)
    names, loading = view.class_names, {"batch_size": s.batch_size, "num_workers": s.num_workers}
    find = partial(audit.find_suspects, class_names=names, all_rows=s.all_rows)
    if s.dynamics:
        summary = audit.summarise(s.dynamics, len(rows))
        why = "no network was trained on them (train may have held them out)"
        return find(dynamics=summary), _say_left_out(summary["p_label"], view, why), []
    if networks:
        probs = audit.predict_probs(networks, view, **loading)
        left_out = _say_left_out(probs[:, 0], view, "they cannot be read")
        return find(view.labels, probs), left_out, []
    noise = _noise(s, rows, side=s.side, **columns, **loading)
    why = "they cannot be read" if s.probs is None else "their probabilities are NaN"
    left_out = _say_left_out(noise.p_wrong, view, why)
    print(audit.noise_summary(noise, names))
    if not s.all_rows:
        print("This counts small doubts about all labels too; --all_rows ranks all of them.")
    paths = audit.write_noise(noise, names, s.output)
    if noise.near is not None:
        pairs = audit.near_duplicates(noise, class_names=names)
        outliers = audit.farthest(noise, names)
        paths += audit.write_oddities(with_files(pairs), with_files(outliers), s.output)
        print(f"{len(pairs)} pairs of nearly the same picture have different labels.")
        if len(pairs) > ODD * len(rows):
            print("These are so many that the features probably do not tell pictures apart.")
    return find(noise=noise), left_out, paths


def _say_left_out(probs: Any, view: Any, why: str, shown: int = 5) -> list[int]:
    """The rows whose probabilities [N] are NaN, the first of which are named."""
    import numpy as np

    rows = np.flatnonzero(np.isnan(probs)).tolist()
    if rows:
        print(f"{len(rows):,} of {len(view):,} pictures are left out, {why}:")
        print(*(f"  {view.pictures.row_name(row)}" for row in rows[:shown]), sep="\n")
        print("  ...\n" * (len(rows) > shown), end="")
    return rows


def _noise(s: SuspectSettings, rows: Any, **options: Any) -> Any:
    """How probable it is that each label is wrong, from the sources that are no training."""
    from . import audit

    backbone = s.backbone or (None if s.probs or s.zero_shot else BACKBONE)
    options["probs"] = _stored_probs(s.probs) if s.probs else None
    cache = s.cache or f"{s.output}/cache"
    return audit.noise_of_pictures(rows, backbone, cache, zero_shot=s.zero_shot, **options)


def _stored_probs(path: str) -> Any:
    import numpy as np

    if not Path(path).is_file():
        raise SystemExit(f"--probs {path}: expected a file that numpy.save wrote, floats [N, C]")
    return np.load(path, mmap_mode="r")


def apply_command(argv: Sequence[str]) -> None:
    """``kd-plugins apply``: write the data without the labels that were decided to be wrong."""
    from . import audit, data
    from .train import parse_settings

    given = list(argv)
    if given and not given[0].startswith("-"):
        given = [*_data_first(given[1:]), "--decisions", given[0]]
    (s,) = parse_settings(ApplySettings, defaults={}, args=given, usage=APPLY)
    if not s.decisions or not s.out:
        raise SystemExit(f"expected {APPLY}")
    splits = data.load_data(_named_data(s))
    _, image, label = data.load_rows(splits, s.split, s.image, s.label)
    how: dict[str, Any] = {"split": s.split, "how": s.how, "weight": s.weight}
    how |= {"image": image, "label": label}
    done = audit.write_corrected(splits, s.decisions, s.out, **how, source=s.data)
    print(
        f"{done['changed']} labels are wrong; {done['before']} rows, now {done['after']}: {s.out}"
    )


def report_command(argv: Sequence[str]) -> None:
    """``kd-plugins report``: :func:`kd_plugins.audit.plots.main`."""
    from .audit import plots

    plots.main(argv, prog="kd-plugins report")


COMMANDS = {
    "list": list_command,
    "train": train_command,
    "suspects": suspects_command,
    "apply": apply_command,
    "report": report_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. A user's error is one line on stderr, and exit code 2."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command not in COMMANDS:
        raise _refusal(f"there is no command {command}", command, list(COMMANDS))
    elif command in ("train", "suspects", "apply"):
        from .train import run_main

        run_main(lambda: COMMANDS[command](rest))
    else:
        COMMANDS[command](rest)


def _refusal(message: str, name: str, known: list[str]) -> SystemExit:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(known)}"
    print(f"kd-plugins: {message}{hint}", file=sys.stderr)
    return SystemExit(2)


def _signature(cls: type) -> str:
    """The call, with the arguments that every loss has written out."""
    own, every = (inspect.signature(c).parameters.values() for c in (cls, Loss))
    named = {p.name: p for p in (*own, *every) if p.kind != p.VAR_KEYWORD}
    parameters = [p.replace(annotation=p.empty) for p in named.values()]
    return str(inspect.Signature(sorted(parameters, key=lambda p: p.kind)))


def _unchanged(picture: Any) -> Any:
    """Until the networks are there, whose transform it will be."""
    return picture


def _data_first(argv: Sequence[str]) -> list[str]:
    """``DATA --models ...`` as ``--data DATA --models ...``."""
    return ["--data", *argv] if argv and not argv[0].startswith("-") else list(argv)


def _named_data(s: DataSettings) -> str:
    if not s.data:
        raise SystemExit("expected DATA first: a hub id, a folder or a Parquet file")
    return s.data
