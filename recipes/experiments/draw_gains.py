"""Draw the pictures of docs/frozen-features.md from the tables of that page.

    python recipes/experiments/draw_gains.py docs/frozen-features.md docs

So the pictures say what the tables say. Methods with figures in at most half of the columns stay
out, and so do the tables of tuned settings and the shares of memorised labels.
"""

import re
import sys
from pathlib import Path
from statistics import fmean

from kd_plugins.audit.gains import draw_gains

NOISE = ["symmetric 20%", "symmetric 40%", "symmetric 60%", "symmetric 80%", "pair 40%"]
MEMORISING = ["memorising: symmetric 40%", "memorising: pair 40%"]
COLUMNS = {  # of the picture of each data set, by a word of the heading above its tables
    "Food-101": ["as it is", *NOISE, *MEMORISING],
    "CIFAR-100": [*NOISE, "within superclasses 40%", "labels that people gave", *MEMORISING],
}


def read_tables(text: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """data set -> method -> column -> [accuracy] of every table whose first column is `method`."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {data: {} for data in COLUMNS}
    data, header = "", []
    for line in text.splitlines():
        if line.startswith("### "):
            data = next((data for data in COLUMNS if data in line), "")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif cells[0] == "method":
            header = cells
        elif data and "chosen" not in header:  # tuned settings: the same columns once more
            for column, cell in zip(header, cells, strict=False):
                if column in COLUMNS[data] and (mean := re.match(r"[\d.]+", cell)):
                    method = found[data].setdefault(cells[0].strip("`"), {})
                    method[column] = [float(mean[0]) / 100]
    return found


def main(page: str, folder: str) -> None:
    for data, found in read_tables(Path(page).read_text()).items():
        columns, base = COLUMNS[data], found["ce"]
        shown = {m: v for m, v in found.items() if len(v) > len(columns) / 2}
        gains = {m: fmean(v[c][0] - base[c][0] for c in v) for m, v in shown.items()}
        best_first = sorted(shown, key=lambda method: -gains[method])
        rows = {m: {c: shown[m].get(c, []) for c in columns} for m in best_first}
        draw_gains(rows, Path(folder, f"frozen-gains-{data.lower()}.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
