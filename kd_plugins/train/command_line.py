"""What scripts share: options, errors of one line, and the results of a run."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import time
import traceback
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..audit.plots import draw
from ..data.decode import BrokenPictures

PACKAGE = str(Path(__file__).parents[1])
EXPECTED = (ValueError, TypeError, FileNotFoundError, FloatingPointError, BrokenPictures)


COMMON = {  # the training arguments that --help shows; --help_all shows the other hundred too
    "output_dir": "folder of the run",
    "num_train_epochs": "passes over the training data",
    "max_steps": "number of optimizer steps; if positive, num_train_epochs is ignored",
    "learning_rate": "initial learning rate",
    "per_device_train_batch_size": "pictures in a batch, on each device",
    "gradient_accumulation_steps": "batches to an optimizer step",
    "optim": "optimizer, as transformers names it: sgd, adamw_torch ...",
    "optim_args": "its other settings",
    "lr_scheduler_type": "the default is cut at the milestones; constant, cosine, linear ...",
    "weight_decay": "of all weights",
    "seed": "of weights, order and augmentation",
    "bf16": "mixed precision",
    "dataloader_num_workers": "processes that read pictures",
    "report_to": "wandb, tensorboard ... or none",
}


class _Help(ArgumentDefaultsHelpFormatter):
    """The first name of an option, its meaning, and its default if there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40)

    def _format_action_invocation(self, action: Action) -> str:
        values: dict[Any, str] = {0: "", "?": "", "+": " VALUE ..."}
        return action.option_strings[0] + values.get(action.nargs, " VALUE")

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, "", "{}", [], False, SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(message)  # argparse would print 200 options before it


def parse_settings(
    *kinds: type,
    defaults: Mapping[str, Any] | Callable[[Namespace], Mapping[str, Any]],
    args: Sequence[str] | None = None,
    usage: str | None = None,
) -> tuple[Any, ...]:
    """Dataclasses filled from the command line, one of each kind.

    ``--config FILE`` reads options from a YAML file. The command line wins over the file.

    Args:
        kinds: dataclasses, such as ``MutualTrainingArguments``.
        defaults: values of options that are not given, or a function of those that are.
        args: the command line; that of the process by default.
        usage: the first line of ``--help``.

    Raises:
        SystemExit: an unknown option or a bad value, in one line.
    """
    given = list(sys.argv[1:] if args is None else args)
    parser = _make_parser(kinds, usage or "%(prog)s [options]", "--help_all" in given)
    given = _with_config(given, {action.dest for action in parser._actions})
    if callable(defaults):
        defaults = defaults(parser.parse_known_args(given)[0])
    parser.set_defaults(**defaults)
    try:
        *settings, rest = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if rest:
        hint = _did_you_mean(rest[0], parser._option_string_actions)
        raise SystemExit(f"{' '.join(rest)}: there is no such option{hint}")
    return tuple(settings)


def _make_parser(kinds: Sequence[type], usage: str, show_all: bool) -> _Parser:
    parser = _Parser(kinds, usage=usage, formatter_class=_Help)  # type: ignore[arg-type]
    training = {
        f.name for kind in kinds if issubclass(kind, TrainingArguments) for f in fields(kind)
    }
    for action in parser._actions:
        known = COMMON.get(action.dest) if action.dest in training else action.help
        action.help = known or (action.help if show_all else SUPPRESS)
        if action.option_strings[0].startswith("--no_") and known:
            action.help = f"switch off --{action.dest}"
    more = "show every training argument" if training else SUPPRESS
    parser.add_argument("--help_all", action="help", help=more)
    parser.add_argument("--config", default=SUPPRESS, help="YAML file of these options")
    return parser


def _with_config(args: list[str], known: set[str]) -> list[str]:
    """The options of the file that ``--config`` names, followed by the others."""
    first = _Parser([], add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    given, args = first.parse_known_args(args)
    if given.config is None:
        return args
    try:
        settings = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemExit(f"--config {given.config} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise SystemExit(f"--config {given.config}: expected lines such as learning_rate: 0.1")
    for name in settings:
        if name not in known:
            hint = _did_you_mean(str(name), known)
            raise SystemExit(f"--config {given.config}: there is no option {name}{hint}")
    return [text for item in settings.items() for text in _option(*item)] + args


def _option(name: str, value: Any) -> list[str]:
    """A setting of a YAML file, as it is written on the command line. null is the default."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    value = json.dumps(value) if isinstance(value, dict) else value
    return [] if value is None else [f"--{name}={value}"]


def parse_pairs(option: str, texts: Sequence[str]) -> dict[str, Any]:
    """The value of an option that holds NAME=VALUE pairs. A value is JSON, infinite, or text.

    >>> parse_pairs("loss_args", ["eta=inf", "b2=-6", "normalize=batch"])
    {'eta': inf, 'b2': -6, 'normalize': 'batch'}
    """
    pairs: dict[str, Any] = {}
    for key, equals, text in (text.partition("=") for text in texts):
        if not equals:
            raise SystemExit(f"--{option} {key}: expected NAME=VALUE")
        try:
            pairs[key] = float(text) if text in ("inf", "-inf") else json.loads(text)
        except ValueError:
            pairs[key] = text
    return pairs


def parse_terms(option: str, text: str) -> list[tuple[float, str]]:
    """Weights and names of the losses in a sum that an option holds. A weight of 1 may be left out.

    >>> parse_terms("terms", "ce + 50*camkd_features")
    [(1.0, 'ce'), (50.0, 'camkd_features')]
    """
    terms = [term.rpartition("*") for term in text.split("+")]
    try:
        return [(float(weight or 1), name.strip()) for weight, _, name in terms]
    except ValueError as error:
        raise SystemExit(f"--{option} {text}: expected WEIGHT*NAME + NAME ...: {error}") from None


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def run_main(main: Callable[[], Any]) -> None:
    """Run the ``main`` of a script. An error of its user is one line on stderr and exit code 2.

    Such errors are ``SystemExit("message")`` and the errors that kd_plugins itself raises; all
    others keep their traceback. Of several processes the first prints the line. torchrun and
    ``accelerate launch`` on several GPUs show it once more at the end of their own report;
    ``accelerate launch -q`` of one process adds nothing.
    """
    try:
        main()
    except (SystemExit, *EXPECTED) as error:
        line = _line_of(error)
        if line is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            details = {"py_callstack": line, "timestamp": str(int(time.time()))}
            message = {"message": {"message": line, "extraInfo": details}}
            Path(report).write_text(json.dumps(message), encoding="utf-8")
        raise SystemExit(2) from error


def write_results(
    settings: Any, args: TrainingArguments, figures: Mapping[str, Any], run: Any = None
) -> None:
    """Write ``results.json`` and pictures into ``args.output_dir``, and print the figures.

    Args:
        settings: the dataclass of the script; it is written beside the figures.
        args: the training arguments, which name the folder and the seed.
        figures: what the evaluation returned. Times are left out.
        run: the folder with the log to draw, if it is not ``args.output_dir``.
    """
    figures = {k: v for k, v in figures.items() if not k.endswith(("runtime", "per_second"))}
    folder = Path(str(args.output_dir))
    results = vars(settings) | {"seed": args.seed} | figures
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(run or folder, folder / "pictures")
    finite = {k: v for k, v in figures.items() if isinstance(v, float) and not math.isnan(v)}
    print(json.dumps({k: round(v, 4) for k, v in finite.items()}, indent=1))


def _line_of(error: BaseException) -> str | None:
    """The message for the user; None if the error is a bug or not an error."""
    if isinstance(error, SystemExit):
        text = error.code if isinstance(error.code, str) else None
    elif isinstance(error, BrokenPictures):  # a worker of a DataLoader adds its traceback
        text = str(error).splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        text = str(error) if frames and frames[-1].filename.startswith(PACKAGE) else None
    return " ".join(text.split()) if text else None
