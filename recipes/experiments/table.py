"""A table of a paper as options of a recipe, for tables.py."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]  # of a recipe: a list is several values, a dict is NAME=VALUE pairs
Figures = dict[tuple[str, str], float]  # of a row and a column, in per cent


@dataclass(frozen=True)
class Table:
    """Options of a recipe.

    A cell runs `base`, its column, its row, its own options and its budget together. Later ones
    win.
    """

    title: str
    rows: dict[str, Options]
    columns: dict[str, Options]
    base: Options
    recipe: str = "cifar100_noise.py"
    paper: Figures = field(default_factory=dict)  # as far as they could be read
    note: str = ""
    metric: str = "eval_accuracy"  # mean over the networks
    only: dict[str, list[str]] = field(default_factory=dict)  # rows that have some columns only
    cells: dict[tuple[str, str], Options] = field(default_factory=dict)  # options of one cell


def figures(columns: Iterable[str], rows: dict[str, list[float | None]]) -> Figures:
    """A paper's figures, row by row. None: it has none there."""
    return {
        (row, column): value
        for row, values in rows.items()
        for column, value in zip(columns, values, strict=True)
        if value is not None
    }
