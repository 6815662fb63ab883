"""Pictures and tables of runs, from the log of the Trainer (`trainer_state.json`).

A run is a folder with trainer_state.json or checkpoint-*/, such a file, or a list of log_history
entries. It may still be going. `runs` is one run, or a dict from names to runs. The pictures need
matplotlib: pip install kd-plugins[recipes].

    python -m kd_plugins.audit.plots RUN [RUN ...]      draws into RUN/pictures of the first run
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from .tables import markdown, mean_std, methods

__all__ = ["curves", "draw", "markdown", "mean_std", "methods", "read", "selection"]

Log = list[dict[str, Any]]
Run = str | Path | Sequence[Mapping[str, Any]]

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#555555"
DASHES = ("-", ":", "-.")  # of the peers' accuracy
EARLIER = {"chi": "threshold", "r": "mean_certainty"}  # log keys of earlier versions


class _Panel(NamedTuple):
    """Which quantities share a picture: log key -> (label, line style). A colour is a peer."""

    title: str
    unit: str
    lines: dict[str, tuple[str, str]]


SELECTED = _Panel(
    "Selected knowledge",
    "share of samples",
    {"selected": ("{}, share of batch", "-"), "right": ("{}, right of these", "--")},
)
DETAILS = (
    _Panel("Threshold", "entropy [nats]", {"threshold": ("χ(t)", "-")}),
    _Panel(
        "Certainty and trust",
        "share",
        {"mean_certainty": ("r of {}", "-"), "eps": ("ε of {}", "--")},
    ),
    _Panel("Loss", "loss [nats]", {"own": ("own, {}", "-"), "taught": ("taught, {}", "--")}),
)
Styles = Mapping[str, tuple[str, dict[str, Any]]]  # log key -> label and properties of the line
MEMORISATION: Styles = {
    "accuracy_clean_part": ("right, of clean labels", {"linewidth": 2}),
    "memorised": ("memorised, of wrong labels", {"linewidth": 2, "linestyle": "--"}),
    "corrected": ("corrected, of wrong labels", {"linewidth": 2, "linestyle": ":"}),
}


def read(run: Run) -> Log:
    """The log_history of a run. In a folder, the state with the most steps is read.

    Raises:
        FileNotFoundError: there is no readable state.
        ValueError: a file is JSON, but not the state of a Trainer.
    """
    if not isinstance(run, str | Path):
        return _renamed(run)
    path = Path(run)
    folders = [path, *path.glob("checkpoint-*")]
    files = [path] if path.is_file() else [folder / "trainer_state.json" for folder in folders]
    states = []
    for file in files:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue  # missing, being written just now, or cut off when the run was killed
        log = state.get("log_history") if isinstance(state, dict) else None
        if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            raise ValueError(
                f"{file}: expected the state of a Trainer, with log_history; this is other "
                "JSON, so there is nothing to draw"
            )
        states.append((state.get("global_step", 0), log))
    if not states:
        raise FileNotFoundError(
            f"{path}: expected a readable trainer_state.json, here or in checkpoint-*/; found none"
        )
    return _renamed(max(states, key=lambda state: state[0])[1])


def draw(runs: Run | Mapping[str, Run], folder: str | Path) -> list[Path]:
    """Draw every picture that the logs have data for.

    These are curves.png, and for each run that selects samples selection.png, with the name of the
    run in it if `runs` is a dict.
    """
    folder, logs, paths = Path(folder), _logs(runs), []
    if any(_keys(log, _accuracy_key(log)) for log in logs.values()):
        paths.append(curves(logs, folder / "curves.png"))
    for name, log in logs.items():
        if any(entry.get(key) for key in _keys(log, "selected") for entry in log):
            slug = re.sub(r"\W+", "-", name).strip("-").lower()
            file = f"selection-{slug}.png" if isinstance(runs, Mapping) else "selection.png"
            paths.append(selection(log, folder / file))
    return paths


def curves(runs: Run | Mapping[str, Run], path: str | Path) -> Path:
    """Draw test accuracy against epoch: one colour per run, peers thin, their mean thick.

    If the logs have figures of memorisation, they are drawn beside it.
    """
    logs = _logs(runs)
    noisy = any(_prefix(log, "memorised") for log in logs.values())
    fig = _figure(11 if noisy else 6.5, 4.4)
    axes = fig.subplots(1, 1 + noisy, squeeze=False)[0]
    _draw_accuracy(axes[0], logs)
    fig.legend(loc="outside upper center", ncols=min(3, len(logs)), frameon=False, fontsize=11)
    if noisy:
        for log, colour in zip(logs.values(), cycle(COLOURS), strict=False):
            for key, (_, style) in MEMORISATION.items():
                _line(axes[1], log, _prefix(log, "memorised") + key, color=colour, **style)
        _axis(axes[1], "Training labels", "share of samples")
        _legend(axes[1], -0.14, 2, MEMORISATION)
    return _save(fig, path)


def selection(run: Run, path: str | Path, num_classes: int | None = None) -> Path:
    """Draw how much of the batch each peer teaches, and how many of these targets are right.

    Below: the threshold χ(t) in nats (with its maximum ln C, given num_classes), certainty and
    trust, and the terms of the loss.
    """
    log = read(run)
    details = [panel for panel in DETAILS if any(_keys(log, key) for key in panel.lines)]
    fig = _figure(9, 4.2 + 2.9 * bool(details))
    heights = [1.35, 1] if details else [1]
    grid = fig.add_gridspec(len(heights), max(1, len(details)), height_ratios=heights)
    peers = [key.removeprefix("selected_") for key in _keys(log, "selected")]
    others = reversed(peers) if len(peers) == 2 else ["others"] * len(peers)
    names = {peer: f"{peer} → {other}" for peer, other in zip(peers, others, strict=True)}
    _draw_panel(fig.add_subplot(grid[0, :]), log, SELECTED, names)
    for column, panel in enumerate(details):
        _draw_panel(fig.add_subplot(grid[1, column]), log, panel, {}, num_classes)
    return _save(fig, path)


# ------------------------------------------------------------------------------------- the logs


def _renamed(log: Iterable[Mapping[str, Any]]) -> Log:
    """A copy of the log, with the keys of earlier versions under their present names."""

    def now(key: str) -> str:
        stem = key.partition("_")[0]
        return key.replace(stem, EARLIER[stem], 1) if stem in EARLIER else key

    return [{now(key): value for key, value in entry.items()} for entry in log]


def _logs(runs: Run | Mapping[str, Run]) -> dict[str, Log]:
    if isinstance(runs, Mapping):
        return {str(name): read(run) for name, run in runs.items()}
    return {Path(runs).name if isinstance(runs, str | Path) else "run": read(runs)}


def _prefix(log: Log, key: str) -> str:
    """`eval_` or `eval_<name>_`, under which a figure was logged; "" if it was not.

    Of several evaluation sets, the first that is not the training set is preferred.
    """
    matches = [re.fullmatch(rf"(eval_(?:.+_)?){key}", name) for entry in log for name in entry]
    found = dict.fromkeys(match[1] for match in matches if match)  # in the order of the log
    return min(found, key=lambda p: (p != "eval_", p.startswith("eval_train")), default="")


def _accuracy_key(log: Log) -> str:
    return _prefix(log, "accuracy") + "accuracy"


def _keys(log: Log, stem: str) -> list[str]:
    """`stem` or `stem_<peer>`, wherever a finite value was logged."""
    keys = {key for entry in log for key in entry if key == stem or key.startswith(f"{stem}_")}
    return sorted(key for key in keys if any(map(math.isfinite, _series(log, key)[1])))


def _series(log: Log, key: str) -> tuple[list[float], list[float]]:
    """Epochs (steps if there are none) and values of one figure."""
    entries = [entry for entry in log if isinstance(entry.get(key), int | float)]
    epochs = [float(entry.get("epoch") or entry.get("step") or 0) for entry in entries]
    return epochs, [float(entry[key]) for entry in entries]


# ---------------------------------------------------------------------------------- the pictures


def _draw_accuracy(ax: Any, logs: Mapping[str, Log]) -> None:
    """Accuracy of all runs: mean, peers and ensemble. The legend of the figure names the runs."""
    stems = {name: _accuracy_key(log) for name, log in logs.items()}
    keys = [(stems[name], key) for name, log in logs.items() for key in _keys(log, stems[name])]
    suffixes = {key.removeprefix(stem) for stem, key in keys} - {"", "_ensemble"}
    peers = sorted(peer for peer in suffixes if not peer.startswith("_clean_part"))
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "": ("mean over peers", {"linewidth": 2.8, "zorder": 3})
    }
    for peer, dash in zip(peers, cycle(DASHES), strict=False):
        styles[peer] = (f"peer {peer[1:]}", {"linewidth": 1, "linestyle": dash})
    styles["_ensemble"] = ("ensemble", {"linewidth": 1.6, "linestyle": "--"})
    for (name, log), colour in zip(logs.items(), cycle(COLOURS), strict=False):
        for suffix, (_, style) in styles.items():
            _line(ax, log, stems[name] + suffix, color=colour, **style)
        last = [y for y in _series(log, stems[name])[1] if math.isfinite(y)][-1:]
        label = f"{name}: {last[0]:.1%}" if last else name
        ax.plot([], [], color=colour, linewidth=2.8, label=label)
    _axis(ax, "Accuracy", "test accuracy")
    if peers:
        _legend(ax, -0.14, 2, styles)


def _draw_panel(
    ax: Any, log: Log, panel: _Panel, names: Mapping[str, str], num_classes: int | None = None
) -> None:
    """Draw quantities, which differ in line style, of peers, which differ in colour."""
    found = {
        key: (key.removeprefix(stem).lstrip("_"), *line)
        for stem, line in panel.lines.items()
        for key in _keys(log, stem)
    }
    peers = sorted({peer for peer, _, _ in found.values()})
    colours = dict(zip(peers, [GREY] if peers == [""] else cycle(COLOURS), strict=False))
    for key, (peer, label, dash) in found.items():
        label = label.format(names.get(peer, peer or "the model"))
        _line(ax, log, key, color=colours[peer], linestyle=dash, linewidth=2, label=label)
    if num_classes and "threshold" in panel.lines:
        ceiling = {"label": f"ln {num_classes}", "color": GREY, "linewidth": 1, "linestyle": ":"}
        ax.axhline(math.log(num_classes), **ceiling)
    _axis(ax, panel.title, panel.unit)
    _legend(ax, -0.15 if panel is SELECTED else -0.24, 4 if panel is SELECTED else 2)


def _line(ax: Any, log: Log, key: str, **style: Any) -> None:
    """Draw one figure against epoch, with NaN as a gap, as means over a few of many entries."""
    x, y = _series(log, key)
    size = math.ceil(len(x) / 80)
    if size > 1:
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        finite = [[value for value in y[part] if math.isfinite(value)] for part in parts]
        x, y = [fmean(x[part]) for part in parts], [fmean(v) if v else math.nan for v in finite]
    if x:
        ax.plot(x, y, marker="o" if len(x) < 3 else None, markersize=4, **style)


def _figure(width: float, height: float) -> Any:
    """A figure outside pyplot's global state, so that it needs no display and no lock."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install kd-plugins[recipes]") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _axis(ax: Any, title: str, unit: str) -> None:
    """Title, unit and grid. Anything but nats is a fraction, shown in per cent."""
    from matplotlib.ticker import PercentFormatter

    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set(xlabel="epoch", ylabel=unit)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.02)
    ax.set_ylim(0, None if "nats" in unit else 1.02)
    if "nats" not in unit:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _legend(ax: Any, below: float, columns: int, styles: Styles | None = None) -> None:
    """A legend below the axes (in heights of these), of the styles or of the drawn lines."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, label=label, **style) for label, style in (styles or {}).values()
    ]
    if handles := handles or ax.get_legend_handles_labels()[0]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, below)}
        ax.legend(handles=handles, ncols=columns, frameon=False, fontsize=9, **place)


def _save(fig: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    return path


# ----------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None, prog: str = "python -m kd_plugins.audit.plots") -> None:
    """Draw the pictures of the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw the pictures of runs, which may still be going, into RUN/pictures of the "
        "first one.",
    )
    what = "a folder with trainer_state.json or checkpoint-*/, or such a file"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    runs = parser.parse_args(argv).runs
    first, names = Path(runs[0]), [Path(run).resolve().name for run in runs]
    try:
        named = dict(zip(names if len(set(names)) == len(names) else runs, runs, strict=True))
        folder = (first if first.is_dir() else first.parent) / "pictures"
        drawn = draw(named if len(runs) > 1 else runs[0], folder)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print("\n".join(map(str, drawn)) or "nothing to draw: the log has no accuracy or selection yet")


if __name__ == "__main__":
    main()
