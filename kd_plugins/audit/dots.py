"""A picture of results with several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from .plots import COLOURS


def draw_dots(
    results: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    unit: str = "test accuracy [%]",
    reference: str | None = None,
) -> Path:
    """Draw a panel for each column, with a line for each row and a dot for each seed.

    Args:
        results: row -> column -> shares in [0, 1], such as method -> noise -> accuracies. The first
            row is on top, and may lack no column; a list may be empty.
        path: the picture to write.
        unit: what is measured, in per cent.
        reference: a row, such as ``"ce"``, whose mean is drawn through each panel.
    """
    from matplotlib.figure import Figure

    rows, columns = list(results), list(next(iter(results.values())))
    size = 2.6 * len(columns) + 1.5, 0.22 * len(rows) + 1
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        for height, row in enumerate(reversed(rows)):
            values = [100 * value for value in results[row][column]]
            panel.plot(values, [height] * len(values), "o", color=COLOURS[0], ms=4, alpha=0.7)
        if reference is not None and (known := results.get(reference, {}).get(column)):
            panel.axvline(100 * fmean(known), color=COLOURS[1])
        panel.set(title=column, xlabel=unit, yticks=range(len(rows)), yticklabels=rows[::-1])
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    return Path(path)
