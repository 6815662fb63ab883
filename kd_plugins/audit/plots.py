"""Pictures and tables of runs, drawn from the Trainer's own log (`trainer_state.json`); a run may still be going.

A run is a folder with trainer_state.json or checkpoint-*/, such a file, or a list of log_history dicts. `runs` is one
run or a dict name -> run. Needs matplotlib: pip install kd-plugins[recipes].

    python -m kd_plugins.audit.plots RUN [RUN ...]     draws into the folder of the first, whenever you like
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Log = list[dict[str, Any]]


Run = str | Path | Sequence[Mapping[str, Any]]


# Okabe & Ito's palette: told apart by colour-blind readers too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


GREY = "#555555"


THIN = ("-", ":", "-.")


def read(run: Run) -> Log:
    """The log_history of a run; of several states in a folder the one that got furthest."""
    if not isinstance(run, (str, Path)):
        return [dict(entry) for entry in run]
    path = Path(run)
    files = (
        [path]
        if path.is_file()
        else [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
    )
    states = []
    for file in files:
        try:
            states.append((file, json.loads(file.read_text(encoding="utf-8"))))
        except (FileNotFoundError, ValueError):
            continue  # not there, being written at this moment, or cut off when the run was killed
    if not states:
        raise FileNotFoundError(
            f"{path}: expected a readable trainer_state.json, here or in checkpoint-*/; found none"
        )
    for file, state in states:
        log = state.get("log_history") if isinstance(state, dict) else None
        if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
            raise ValueError(
                f"{file}: expected the state of a Trainer, with log_history, a list of entries; this "
                "is other JSON, and there is nothing to draw in it"
            )
    return max((state for _, state in states), key=lambda state: state.get("global_step", 0))[
        "log_history"
    ]


def curves(runs: Run | Mapping[str, Run], path: str | Path) -> Path:
    """Test accuracy against epoch, one colour per run: mean over peers thick, each peer thin, ensemble dashed.

    Beside it, where the log has them, what became of the training set's clean and wrong labels.
    """
    logs = _logs(runs)
    accuracy = {name: _prefix(log, "accuracy") + "accuracy" for name, log in logs.items()}
    noisy = {name: _prefix(log, "memorised") for name, log in logs.items()}
    peers = sorted(
        {key[len(accuracy[n]) :] for n, log in logs.items() for key in _keys(log, accuracy[n])}
    )
    peers = [
        peer
        for peer in peers
        if peer not in ("", "_ensemble") and not peer.startswith("_clean_part")
    ]
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "": ("mean over peers", {"linewidth": 2.8, "zorder": 3})
    }
    styles |= {
        p: (f"peer {p[1:]}", {"linewidth": 1, "linestyle": dash})
        for p, dash in zip(peers, cycle(THIN), strict=False)
    }
    styles |= {"_ensemble": ("ensemble", {"linewidth": 1.6, "linestyle": "--"})}

    fig = _figure(11 if any(noisy.values()) else 6.5, 4.4)
    axes = fig.subplots(1, 2 if any(noisy.values()) else 1, squeeze=False)[0]
    for (name, log), colour in zip(logs.items(), cycle(COLOURS), strict=False):
        for suffix, (_, style) in styles.items():
            _line(axes[0], log, accuracy[name] + suffix, color=colour, **style)
        last = [y for y in _series(log, accuracy[name])[1] if math.isfinite(y)][-1:]
        axes[0].plot(
            [], [], color=colour, linewidth=2.8, label=f"{name}: {last[0]:.1%}" if last else name
        )
        for stem, (_, style) in _NOISY.items() if noisy[name] else ():
            _line(axes[1], log, noisy[name] + stem, color=colour, **style)
    fig.legend(loc="outside upper center", ncols=min(3, len(logs)), frameon=False, fontsize=11)
    _share_axis(axes[0], "test accuracy", "Accuracy")
    if peers:
        _legend(axes[0], -0.14, 2, styles)
    if any(noisy.values()):
        _share_axis(axes[1], "share of samples", "Training labels")
        _legend(axes[1], -0.14, 2, _NOISY)
    return _save(fig, path)


def selection(run: Run, path: str | Path, num_classes: int | None = None) -> Path:
    """Which knowledge is passed on: share of the batch that each peer teaches, and how many of those targets are right.

    Below: the threshold χ(t) in nats (and its ceiling ln C, given num_classes), certainty and trust, loss terms.
    """
    log = read(run)
    below = [panel for panel in _BELOW if any(_keys(log, stem) for stem in panel["stems"])]
    fig = _figure(9, 4.2 + 2.9 * bool(below))
    grid = fig.add_gridspec(
        2 if below else 1, max(1, len(below)), height_ratios=[1.35, 1] if below else None
    )
    top = fig.add_subplot(grid[0, :])
    peers = [key.removeprefix("selected_") for key in _keys(log, "selected")]
    to = {peer: f"{peer} → {other}" for peer, other in zip(peers, reversed(peers), strict=True)}
    to = to if len(peers) == 2 else {peer: f"{peer} → others" for peer in peers}
    _stems(
        top,
        log,
        {"selected": ("{}, share of batch", "-"), "right": ("{}, right of these", "--")},
        to,
    )
    _share_axis(top, "share of samples", "Selected knowledge")
    _legend(top, -0.15, 4)
    for column, panel in enumerate(below):
        ax = fig.add_subplot(grid[1, column])
        _stems(ax, log, panel["stems"])
        if panel["title"] == "Threshold" and num_classes:
            ax.axhline(
                math.log(num_classes),
                color=GREY,
                linewidth=1,
                linestyle=":",
                label=f"ln {num_classes}",
            )
        if panel["unit"] is None:
            _share_axis(ax, "share", panel["title"])
        else:
            _axis(ax, panel["unit"], panel["title"])
            ax.set_ylim(bottom=0)
        _legend(ax, -0.24, 2)
    return _save(fig, path)


def draw(runs: Run | Mapping[str, Run], folder: str | Path) -> list[Path]:
    """All pictures that the logs have figures for: curves.png, and selection[-<run>].png for each run that selects."""
    folder, logs, paths = Path(folder), _logs(runs), []
    if any(_finite(log, f"{_prefix(log, 'accuracy')}accuracy") for log in logs.values()):
        paths.append(curves(logs, folder / "curves.png"))
    for name, log in logs.items():
        if any(
            entry.get(key) for key in _keys(log, "selected") for entry in log
        ):  # somebody taught somebody
            suffix = (
                "-" + re.sub(r"\W+", "-", name).strip("-").lower()
                if isinstance(runs, Mapping)
                else ""
            )
            paths.append(selection(log, folder / f"selection{suffix}.png"))
    return paths


def mean_std(values: Iterable[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± sample deviation (n - 1) in per cent; one value has no deviation.

    >>> mean_std([0.846, 0.850, 0.854]), mean_std([0.85])
    ('85.0 ± 0.4', '85.0')
    """
    scaled = [scale * value for value in values]
    return f"{fmean(scaled):.{digits}f}" + (
        f" ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    )


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table.

    >>> print(markdown(["method", "accuracy"], [["CE", 72.8]]))
    | method | accuracy |
    |---|---|
    | CE | 72.8 |
    """
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


# What is drawn how. Peers share a line style per quantity and differ in colour.
_NOISY: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy_clean_part": ("right, of clean labels", {"linewidth": 2}),
    "memorised": ("memorised, of wrong labels", {"linewidth": 2, "linestyle": "--"}),
    "corrected": ("corrected, of wrong labels", {"linewidth": 2, "linestyle": ":"}),
}


_BELOW: tuple[dict[str, Any], ...] = (
    {"title": "Threshold", "unit": "entropy [nats]", "stems": {"chi": ("χ(t)", "-")}},
    {
        "title": "Certainty and trust",
        "unit": None,
        "stems": {"r": ("r of {}", "-"), "eps": ("ε of {}", "--")},
    },
    {
        "title": "Loss",
        "unit": "loss [nats]",
        "stems": {"own": ("own, {}", "-"), "taught": ("taught, {}", "--")},
    },
)


def _logs(runs: Run | Mapping[str, Run]) -> dict[str, Log]:
    if isinstance(runs, Mapping):
        return {str(name): read(run) for name, run in runs.items()}
    return {Path(runs).name if isinstance(runs, (str, Path)) else "run": read(runs)}


def _prefix(log: Log, key: str) -> str:
    """`eval_`, or `eval_<name>_` with named data sets: accuracy of the one not trained on, memorisation of any."""
    found = {
        m[1]: None
        for entry in log
        for k in entry
        if (m := re.fullmatch(rf"(eval_(?:.+_)?){key}", k))
    }
    wanted = sorted(found, key=lambda prefix: (prefix != "eval_", prefix.startswith("eval_train")))
    return wanted[0] if wanted else ""


def _keys(log: Log, stem: str) -> list[str]:
    """`stem` or `stem_<peer>`, where at least one finite value was logged."""
    keys = sorted(
        {k for entry in log for k in entry if k == stem or re.fullmatch(rf"{stem}_.+", k)}
    )
    return [key for key in keys if _finite(log, key)]


def _finite(log: Log, key: str) -> bool:
    return any(math.isfinite(y) for y in _series(log, key)[1])


def _series(log: Log, key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log if isinstance(entry.get(key), (int, float))]
    return [float(e.get("epoch") or e.get("step") or 0) for e in entries], [
        float(e[key]) for e in entries
    ]


def _line(ax: Any, log: Log, key: str, **style: Any) -> None:
    """Draw one quantity against epoch, NaN as a gap."""
    x, y = _series(log, key)
    size = math.ceil(
        len(x) / 80
    )  # hundreds of log entries are a carpet, not a curve: means over a few of them
    if size > 1:
        chunks = [range(i, min(i + size, len(x))) for i in range(0, len(x), size)]
        means = [[y[i] for i in chunk if math.isfinite(y[i])] for chunk in chunks]
        x, y = (
            [fmean(x[i] for i in chunk) for chunk in chunks],
            [fmean(m) if m else math.nan for m in means],
        )
    if x:
        ax.plot(x, y, marker="o" if len(x) < 3 else None, markersize=4, **style)


def _stems(
    ax: Any, log: Log, stems: Mapping[str, tuple[str, str]], names: Mapping[str, str] | None = None
) -> None:
    """Quantities that differ in line style, of peers that differ in colour."""
    peers = sorted(
        {key.removeprefix(stem).lstrip("_") for stem in stems for key in _keys(log, stem)}
    )
    colours = dict(zip(peers, [GREY] if peers == [""] else cycle(COLOURS), strict=False))
    for stem, (label, dash) in stems.items():
        for key in _keys(log, stem):
            peer = key.removeprefix(stem).lstrip("_")
            name = label.format((names or {}).get(peer, peer or "the model"))
            _line(ax, log, key, color=colours[peer], linestyle=dash, linewidth=2, label=name)


def _figure(width: float, height: float) -> Any:
    """A figure of its own, outside pyplot's global state: safe in threads and without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install kd-plugins[recipes]") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _axis(ax: Any, unit: str, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set_xlabel("epoch")
    ax.set_ylabel(unit)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.02)


def _share_axis(ax: Any, unit: str, title: str) -> None:
    from matplotlib.ticker import PercentFormatter

    _axis(ax, unit, title)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _legend(
    ax: Any,
    below: float,
    columns: int,
    styles: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
) -> None:
    """Under the axes, where it covers no line; `below` in heights of the axes; of line styles or of what was drawn."""
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


def methods() -> str:
    """The registered losses as a Markdown table, from their docstrings: what the README shows."""
    from ..losses.registry import list_losses, loss_class

    rows = []
    for name in list_losses():
        cls = loss_class(name)
        doc = " ".join((cls.__doc__ or "").split())
        formula = (cls.__doc__ or "").split("\n\n")[0]
        source = re.split("References: |Source: ", doc, maxsplit=1)[-1]
        source = re.split(r"\. | Notes:| Unsaid| >>> ", source, maxsplit=1)[0].rstrip(".")
        reads = ", ".join(
            ["logits of each peer" if cls.peers else "logits", "target", *sorted(cls.reads)]
        )
        rows.append([f"`{name}`", " ".join(formula.split()), reads, source])
    return markdown(["name", "what it computes", "reads", "source"], rows)


def _write_methods(path: Path) -> None:
    head, start, rest = path.read_text(encoding="utf-8").partition(
        "<!-- methods: python -m kd_plugins.audit.plots README.md -->\n"
    )
    _, end, tail = rest.partition("<!-- /methods -->")
    if not end:
        raise ValueError(
            f"{path} has no place for the table: expected the comments <!-- methods: ... --> and <!-- /methods -->"
        )
    path.write_text(f"{head}{start}\n{methods()}\n\n{end}{tail}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: draw the pictures of the named runs."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_plugins.audit.plots",
        description="Draw the pictures of runs into the folder of the first, RUN/pictures. The runs "
        "may still be going. Given a README.md, write its table of methods instead.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a folder with trainer_state.json or checkpoint-*/, or such a file",
    )
    runs = parser.parse_args(argv).runs
    try:
        if Path(runs[0]).suffix == ".md":
            _write_methods(Path(runs[0]))
            return
        first, names = Path(runs[0]), [Path(run).resolve().name for run in runs]
        named = dict(zip(names if len(set(names)) == len(names) else runs, runs, strict=True))
        folder = (first if first.is_dir() else first.parent) / "pictures"
        drawn = draw(named if len(runs) > 1 else runs[0], folder)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if not drawn:
        print("nothing to draw: no accuracy and no selection is logged yet")
    for path in drawn:
        print(path)


if __name__ == "__main__":
    main()
