"""What scripts share: options, errors of one line, and the results of a run."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from ..audit.plots import draw

PACKAGE = str(Path(__file__).parents[1])
EXPECTED = (ValueError, TypeError, FileNotFoundError, FloatingPointError)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(message)  # argparse would print 200 options before it


def parse_settings(
    *kinds: type, defaults: Mapping[str, Any] | Callable[[Namespace], Mapping[str, Any]]
) -> tuple[Any, ...]:
    """Dataclasses filled from the command line, one of each kind.

    Args:
        kinds: dataclasses, such as ``MutualTrainingArguments``.
        defaults: values of options that are not given, or a function of those that are.

    Raises:
        SystemExit: an unknown option or a bad value, in one line.
    """
    parser = _Parser(kinds)  # type: ignore[arg-type]
    parser.set_defaults(
        **(defaults(parser.parse_known_args()[0]) if callable(defaults) else defaults)
    )
    try:
        *settings, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if rest:
        close = difflib.get_close_matches(rest[0], parser._option_string_actions, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SystemExit(f"{' '.join(rest)}: there is no such option{hint}")
    return tuple(settings)


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
        settings: dataclass of the script; kept beside the figures.
        args: for the folder and the seed.
        figures: what was evaluated. Times are left out.
        run: folder with the log that is drawn, if it is another one.
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
    else:
        frames = traceback.extract_tb(error.__traceback__)
        text = str(error) if frames and frames[-1].filename.startswith(PACKAGE) else None
    return " ".join(text.split()) if text else None
