"""What was found about the noise of the labels: in words, as a table and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from .ranking import LabelNoise

LARGEST = 40  # classes whose names the picture shows
FARTHEST = 100  # pictures in the table of outliers
# A confusion stands out: times the middle one of all, as a share of the class, in pictures
STANDS_OUT, SHARE, PICTURES = 2.0, 0.01, 3
FLAT = "No two classes are confused more often than others."


def noise_summary(noise: LabelNoise, names: Sequence[str], pairs: int = 5) -> str:
    """How many labels are probably wrong, and the confusions that stand out from all others.

    These are at least twice as frequent as the middle one, 1% of the true class, and three
    pictures. If there are none, the text says so.

    Args:
        noise: the result of `estimate_label_noise`.
        names: of the classes.
        pairs: how many confusions to name.
    """
    value, low, high = noise.count()
    known = int(np.isfinite(noise.p_wrong).sum())
    lines = [
        f"About {value:,.0f} of {known:,} labels are wrong, {value / known:.1%} "
        f"(90% interval {low:,.0f} to {high:,.0f}, if the model of the noise is right)."
    ]
    found = _standing_out(noise, pairs)
    lines += [f"  {share:.1%} of {names[i]} are labelled {names[j]}" for i, j, share in found]
    lines += [] if found else [f"  {FLAT}"]
    return "\n".join(lines)


def _standing_out(noise: LabelNoise, count: int) -> list[tuple[int, int, float]]:
    """The worst pairs, as far as they are confused more often than others."""
    least = _least(noise)
    return [pair for pair in noise.worst_pairs(count) if pair[2] >= least[pair[0]]]


def _least(noise: LabelNoise) -> np.ndarray:
    """For each true class i the smallest T[i, j] that stands out [C].

    It is measured against the lower median of T off the diagonal: with pair noise among three
    classes, half of all pairs are confused.
    """
    off = noise.transition[~np.eye(len(noise.transition), dtype=bool)]
    middle = float(np.partition(off, k := len(off) // 2 - 1)[k])
    return np.maximum(max(STANDS_OUT * middle, SHARE), PICTURES / np.maximum(_sizes(noise), 1))


def _sizes(noise: LabelNoise) -> np.ndarray:
    """How many known labels each class was given to [C]."""
    known = noise.labels[np.isfinite(noise.p_wrong)]
    return np.bincount(known, minlength=len(noise.transition))


def write_noise(noise: LabelNoise, names: Sequence[str], folder: str | Path) -> list[Path]:
    """Write `classes.csv`, and `noise.png` if there is matplotlib. Returns the paths.

    The table has a row for each class: how many labels it was given to, how many of these are
    probably wrong, with a 90% interval, and the true class that is most often behind them. This is
    empty if no class is so more often than others. The picture is T, the worst pairs named below
    it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "classes.csv"]
    sizes = _sizes(noise)
    off = noise.transition * (1 - np.eye(len(names)))
    least = _least(noise)
    true_sizes = np.bincount(noise.proposed[np.isfinite(noise.p_wrong)], minlength=len(names))
    behind = (true_sizes[:, None] * off).argmax(0)  # by number: a rare class has few pictures
    mostly = [names[k] if off[k, j] >= least[k] else "" for j, k in enumerate(behind)]
    with open(paths[0], "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "labels", "wrong", "low", "high", "mostly"])
        for k, figures in enumerate(noise.count_by_class()):
            row = [round(figure, 1) for figure in figures]
            table.writerow([names[k], sizes[k], *row, mostly[k]])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return paths
    figure = Figure(figsize=(8, 8.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    dark = max(off.max(), 2 * least.min())  # where all are alike, all are pale
    shown = axes.imshow(off, cmap="Blues", vmin=0, vmax=dark)
    axes.set(xlabel="given label", ylabel="true class", title="Share of each class labelled wrong")
    if len(names) <= LARGEST:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.colorbar(shown, ax=axes, shrink=0.7)
    worst = [f"{names[i]} → {names[j]}: {p:.1%}" for i, j, p in _standing_out(noise, 8)] or [FLAT]
    figure.supxlabel("\n".join("      ".join(worst[k : k + 2]) for k in (0, 2, 4, 6)), fontsize=10)
    paths.append(folder / "noise.png")
    figure.savefig(paths[1])
    return paths


def farthest(noise: LabelNoise, names: Sequence[str], count: int = FARTHEST) -> Dataset:
    """The pictures that are farthest from all classes, the farthest first.

    There always are such pictures, also where each belongs to a class. The columns are `index` (the
    row in the data), `label`, `label_name` and `outlier`.
    """
    outlier = np.zeros(0) if noise.outlier is None else noise.outlier
    rows = np.argsort(-outlier, kind="stable")[:count]
    rows = rows[np.isfinite(outlier[rows])]
    labels = noise.labels[rows]
    columns = {"index": rows, "label": labels, "label_name": [names[k] for k in labels]}
    return Dataset.from_dict(columns | {"outlier": outlier[rows].round(5)})


def write_oddities(pairs: Dataset, outliers: Dataset, folder: str | Path) -> list[Path]:
    """Write `duplicates.csv` and `outliers.csv`, with a header even if there are none.

    Args:
        pairs: the result of :func:`near_duplicates`.
        outliers: the result of :func:`farthest`.
        folder: where to write; created if needed.

    Returns:
        The paths.
    """
    paths = [Path(folder, "duplicates.csv"), Path(folder, "outliers.csv")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for table, path in zip((pairs, outliers), paths, strict=True):
        table.to_pandas().to_csv(path, index=False)  # type: ignore[union-attr]
    return paths
