"""Markdown tables of results and of the registered losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from ..losses.registry import list_losses, summarise_loss


def mean_std(values: Iterable[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± sample standard deviation (n - 1), in per cent. One value has no deviation.

    >>> mean_std([0.846, 0.850, 0.854]), mean_std([0.85])
    ('85.0 ± 0.4', '85.0')
    """
    scaled = [scale * value for value in values]
    deviation = f" ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{fmean(scaled):.{digits}f}{deviation}"


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table.

    >>> print(markdown(["method", "accuracy"], [["CE", 72.8]]))
    | method | accuracy |
    |---|---|
    | CE | 72.8 |
    """
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def methods() -> str:
    """The registered losses as a Markdown table, from their docstrings. The README contains it."""
    summaries = map(summarise_loss, list_losses())
    rows = [(f"`{s.name}`", s.formula, ", ".join(s.inputs), s.source) for s in summaries]
    return markdown(["name", "what it computes", "reads", "source"], rows)


def write_methods(path: Path) -> None:
    """Write the table of methods into a README, between the comments that mark its place."""
    start = "<!-- methods: python -m kd_plugins.audit.plots README.md -->\n"
    end = "<!-- /methods -->"
    text = path.read_text(encoding="utf-8")
    if start not in text or end not in text.partition(start)[2]:
        raise ValueError(f"{path} has no place for the table: expected {start.strip()} and {end}")
    head, _, rest = text.partition(start)
    path.write_text(
        f"{head}{start}\n{methods()}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8"
    )
