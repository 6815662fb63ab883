"""Draw the picture of docs/frozen-features.md from the tables of that page.

    python recipes/experiments/draw_gains.py docs/frozen-features.md docs/frozen-gains.png

So the picture says what the tables say. The table of tuned settings and the shares of memorised
labels stay out, and so do methods with figures in fewer than three columns.
"""

import re
import sys
from pathlib import Path
from statistics import fmean

from kd_plugins.audit.gains import draw_gains

ORDER = [
    *("as it is", "symmetric 20%", "symmetric 40%", "symmetric 60%", "symmetric 80%", "pair 40%"),
    *("memorising: symmetric 40%", "memorising: pair 40%"),
    *("50,000 pictures", "10,000 pictures", "10,000, symmetric 20%", "within superclasses 40%"),
    "labels that people gave, 40% wrong",
]


def read_tables(text: str) -> dict[str, dict[str, list[float]]]:
    """method -> column -> [accuracy] of every table whose first column is `method`."""
    found: dict[str, dict[str, list[float]]] = {}
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif cells[0] == "method":
            header = cells
        elif "chosen" not in header:  # tuned settings: the same columns once more
            for column, cell in zip(header, cells, strict=False):
                if column in ORDER and (mean := re.match(r"[\d.]+", cell)):
                    method = found.setdefault(cells[0].strip("`"), {})
                    method[column] = [float(mean[0]) / 100]
    return found


def main(page: str, picture: str) -> None:
    found = read_tables(Path(page).read_text())
    gains = {m: [v[c][0] - found["ce"][c][0] for c in v] for m, v in found.items() if len(v) > 2}
    best_first = sorted(gains, key=lambda method: -fmean(gains[method]))
    draw_gains({m: {c: found[m].get(c, []) for c in ORDER} for m in best_first}, picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
