"""What tables.py publishes of its cells: figures as parquet, tables as text, and pictures."""

import json
import math
from pathlib import Path
from statistics import fmean

import pandas as pd
from table import Table
from tables_of_papers import TABLES

from kd_plugins.audit import plots as report

Values = dict[tuple[str, str], list[float]]  # (row, column): a figure of each seed


def slug(text: str) -> str:
    """A name for a folder."""
    return "-".join(
        "".join(c if c.isalnum() else " " for c in text.lower().replace("+", " plus ")).split()
    )


def tidy(name: str, budget: str, cells: list) -> pd.DataFrame:
    """One row for each figure of each finished cell."""
    table, rows = TABLES[name], []
    for cell in cells:
        if not cell.row or not cell.done.exists():
            continue
        path = cell.folder / "clock.json"
        clock = json.loads(path.read_text()) if path.exists() else {}
        for metric, value in json.loads(cell.done.read_text()).items():
            if metric.startswith(("eval_", "train_")) and type(value) in (int, float):
                known = table.paper if metric == table.metric else {}
                paper = known.get((cell.row, cell.column), math.nan)
                rows.append(
                    {
                        "table": name,
                        "budget": budget,
                        "row": cell.row,
                        "column": cell.column,
                        "seed": cell.seed,
                        "metric": metric,
                        "value": float(value),
                        "paper": paper / 100,
                        **{key: clock.get(key) for key in ("seconds", "jobs", "device")},
                        "command": " ".join(clock.get("command", [])),
                    }
                )
    return pd.DataFrame(rows)


def grid_of(budget: str, table: Table, values: Values) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text, in per cent; the difference to the paper at full budget only."""

    def text(row: str, column: str) -> str:
        figures, paper = values.get((row, column)), table.paper.get((row, column))
        if figures is None:
            return ""
        gap = f", {100 * fmean(figures) - paper:+.1f}" if paper and budget == "full" else ""
        return report.mean_std(figures) + (f" (paper {paper:.2f}{gap})" if paper else "")

    rows, columns = shown(table, values)
    return ["", *columns], [[row, *(text(row, column) for column in columns)] for row in rows]


def shown(table: Table, values: Values) -> tuple[list[str], list[str]]:
    """The rows and the columns that have a figure, in the table's order."""
    rows, columns = {row for row, _ in values}, {column for _, column in values}
    return [row for row in table.rows if row in rows], [
        column for column in table.columns if column in columns
    ]


def latex(header: list[str], rows: list[list[str]], caption: str) -> str:
    signs = str.maketrans({"%": r"\%", "_": r"\_", "±": r"$\pm$", "×": r"$\times$"})
    head, *body = [" & ".join(cells).translate(signs) + r" \\" for cells in (header, *rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption.translate(signs)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def picture(budget: str, table: Table, values: Values, path: Path, caption: str) -> None:
    """Every seed a dot, the mean a bar, the paper's figure a diamond."""
    from matplotlib.figure import Figure

    rows, columns = shown(table, values)
    paper = table.paper if budget == "full" else {}
    fig = Figure(
        figsize=(8.5, 1.6 + 0.17 * len(rows) * (len(columns) + 1)), dpi=150, layout="constrained"
    )
    ax = fig.add_subplot()
    for k, column in enumerate(columns):
        colour = report.COLOURS[k % len(report.COLOURS)]
        bar = {"color": colour, "marker": "|", "linestyle": ""}
        bar |= {"markersize": 10, "markeredgewidth": 3}
        ax.plot([], [], **bar, label=column)
        for y, row in enumerate(reversed(rows)):
            at = y + (len(columns) - 1 - 2 * k) / (2 * len(columns) + 1)
            if figures := [100 * value for value in values.get((row, column), [])]:
                ax.plot(figures, [at] * len(figures), ".", color=colour, alpha=0.5)
                ax.plot(fmean(figures), at, **bar)
            if (row, column) in paper:
                ax.plot(
                    paper[row, column], at, "D", color=colour, markerfacecolor="none", markersize=5
                )
    if paper:
        ax.plot(
            [], [], "D", color=report.GREY, markerfacecolor="none", markersize=5, label="the paper"
        )
    ax.set_yticks(range(len(rows)), reversed(rows))
    ax.set_xlabel(
        f"{'mean over networks, ' * (table.metric == 'eval_accuracy')}top-1 test accuracy [%]"
    )
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(caption, loc="left", fontsize=9, wrap=True)
    fig.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    fig.savefig(path)


def publish(name: str, budget: str, cells: list, root: Path, rest: list[str]) -> None:
    table = TABLES[name]
    figures = tidy(name, budget, cells)
    if figures.empty:
        return
    part = root / "results.parquet.part"
    figures.to_parquet(part, index=False)
    part.replace(root / "results.parquet")
    values = {
        key: list(v)
        for key, v in figures[figures.metric == table.metric].groupby(["row", "column"]).value
    }
    seeds = ", ".join(map(str, sorted(set(figures.seed))))
    caption = (
        f"{table.title}. Budget {budget}{': ' + ' '.join(rest) if rest else ''}; seeds {seeds}; "
        "last epoch, per cent, mean ± deviation."
        f"{' Not comparable with the paper.' if budget != 'full' else ''}"
    )
    header, rows = grid_of(budget, table, values)
    text = f"{caption}\n\n{report.markdown(header, rows)}\n" + (
        f"\n{table.note}\n" if table.note else ""
    )
    (root / "table.md").write_text(text, encoding="utf-8")
    (root / "table.tex").write_text(latex(header, rows, caption), encoding="utf-8")
    picture(budget, table, values, root / "table.png", caption)
    written = [root / name for name in ("results.parquet", "table.md", "table.tex", "table.png")]
    for row in table.rows:
        first = [
            c
            for c in cells
            if c.row == row and c.seed == 0 and (c.folder / "trainer_state.json").exists()
        ]
        if len(first) > 1:
            written.append(
                report.curves({c.column: c.folder for c in first}, root / f"curves-{slug(row)}.png")
            )
    print(f"\n{text}")
    print("Written:", *written, sep="\n  ")
