"""Markdown tables of results and of the registered losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """The registered losses as a Markdown table, from their docstrings. The docs contain it."""
    summaries = map(summarise_loss, list_losses())
    rows = [(f"`{s.name}`", s.formula, ", ".join(s.inputs), s.source) for s in summaries]
    return markdown(["name", "what it computes", "reads", "source"], rows)
