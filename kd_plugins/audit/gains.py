"""A picture of results: which method gains where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill

CLIP = 10.0  # points at which a colour is full; one method that fails must not pale the others


def draw_gains(
    results: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    reference: str = "ce",
) -> Path:
    """Draw a table whose colours say how much each method gains over the reference.

    A cell shows the difference of the two means in points, and the row of the reference its own
    mean in per cent. Purple is a gain and orange a loss, in full colour from 10 points on. Without
    the reference, or in a column that it lacks, cells show means in per cent and have no colour.

    Args:
        results: row -> column -> shares in [0, 1], such as method -> noise -> accuracies, one for
            each seed. The first row is on top. A list may be empty or missing.
        path: the picture to write.
        reference: the row to compare with.
    """
    from matplotlib.figure import Figure

    rows = list(results)
    columns = list(dict.fromkeys(column for found in results.values() for column in found))
    means = {row: {c: fmean(v) for c, v in found.items() if v} for row, found in results.items()}
    base = means.get(reference, {})
    figure = Figure(figsize=(0.8 * len(columns) + 2, 0.24 * len(rows) + 1.2), dpi=120)
    panel = figure.subplots()
    gains = [[_gain(means[row], base, column) for column in columns] for row in rows]
    panel.imshow(gains, cmap="PuOr", vmin=-CLIP, vmax=CLIP, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if column not in means[row]:
                continue
            compared = row != reference and column in base
            text = f"{gains[y][x]:+.1f}" if compared else f"{100 * means[row][column]:.1f}"
            full = compared and abs(gains[y][x]) > 0.7 * CLIP
            panel.text(x, y, text, ha="center", va="center", color="white" if full else "black")
    panel.set(xticks=range(len(columns)), yticks=range(len(rows)), yticklabels=rows)
    titles = [fill(column, 11, break_long_words=False) for column in columns]
    panel.set_xticklabels(titles, size="small")
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    return Path(path)


def _gain(own: Mapping[str, float], base: Mapping[str, float], column: str) -> float:
    """Points above the reference; NaN, which has no colour, if there is nothing to compare."""
    return 100 * (own[column] - base[column]) if column in own and column in base else math.nan
