"""Wrong labels with frozen features: kd-plugins beside cleanlab, on data with known errors.

    python recipes/experiments/rank_labels.py --data CIFAR100_SMALL --backbone NAME=FILE \\
        --noise symmetric:0.4 pair_flip:0.4 --seeds 0 1 2 --output_dir runs/rank

Noise is put on the column `--label`, or read from a column (`--noise noisy_label --where
noise_is_instance_exact`). Four rankings are measured on the same features:

- kd-plugins: `out_of_sample` and `estimate_label_noise` with their defaults.
- self-confidence: the same probabilities, ranked by 1 - p of the given label, which is also
  cleanlab's default (`get_label_quality_scores`).
- cleanlab, same probabilities: what `find_label_issues` names.
- cleanlab, its own practice: `cross_val_predict` of a scaled LogisticRegression, five folds.

Each run is a line of `results.jsonl`; runs that are there are not repeated. Needs cleanlab.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers.hf_argparser import HfArg

import kd_plugins as kd
from kd_plugins.audit.tables import markdown, mean_std
from kd_plugins.data import corrupt
from kd_plugins.data.labels import column_array

COLUMNS = ("auroc", "precision", "named", "right", "found")
HEADER = ("AUROC", "precision at the errors", "named wrong", "of these wrong", "of all found")


@dataclass
class Settings:
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    split: str = "train"
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(default=None, help="column of the true labels")
    where: str | None = HfArg(default=None, help="measure only the rows where this column is true")
    backbone: str = "tf_efficientnet_lite0"
    side: int = 96
    features: str = HfArg(default="runs/features", help="folder for the features of these data")
    noise: list[str] = HfArg(default_factory=lambda: ["symmetric:0.4"], help="NAME:RATE or COLUMN")
    pairs: list[str] = HfArg(
        default_factory=list, help="FROM:TO class numbers of the noise map:RATE"
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="of noise, folds and heads")
    practice: bool = HfArg(default=True, help="also logistic regression, cleanlab's own practice")
    output_dir: str = "runs/rank"


def measured(wrong: np.ndarray, score: np.ndarray, named: np.ndarray) -> dict[str, float]:
    """How well a score (higher is more suspicious) and the named rows find the wrong labels."""
    total = int(wrong.sum())
    top = np.argsort(-score, kind="stable")[:total]
    hits = int(wrong[named].sum())
    figures = (wrong[top].mean(), len(named), hits / max(1, len(named)), hits / total)
    return dict(zip(COLUMNS, map(float, (roc_auc_score(wrong, score), *figures)), strict=True))


def with_cleanlab(labels: np.ndarray, probs: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    named = find_label_issues(labels, probs, return_indices_ranked_by="self_confidence", n_jobs=1)
    return measured(wrong, -get_label_quality_scores(labels, probs), named)


def reliability(noise: kd.audit.LabelNoise, wrong: np.ndarray) -> dict[str, list]:
    """For ten bins of p_wrong: how many labels, mean p_wrong, share that is wrong."""
    bins = np.minimum((noise.p_wrong * 10).astype(int), 9)
    sizes = np.bincount(bins, minlength=10)
    means = [np.bincount(bins, x, 10) / np.maximum(sizes, 1) for x in (noise.p_wrong, wrong)]
    return {"sizes": sizes.tolist(), "said": means[0].tolist(), "are": means[1].tolist()}


def run(s: Settings, view, rows, true: np.ndarray, keep: np.ndarray, noise: str, seed: int) -> dict:
    """All rankings for one noise and one seed."""
    labels = noisy_labels(s, rows, true, noise, seed)
    wrong, n, classes = (labels != true)[keep], np.arange(len(true)), view.num_classes
    cache = Path(s.output_dir, "folds", f"{noise.replace(':', '-')}-{seed}")
    folds = [3 * seed, 3 * seed + 1, 3 * seed + 2]
    probs = kd.out_of_sample(view.features, labels, classes, seeds=folds, folder=cache)
    found = kd.estimate_label_noise(labels, probs, view.features, seed=seed)
    named = np.flatnonzero((found.proposed != labels)[keep])
    doubted = np.flatnonzero((probs.argmax(1) != labels)[keep])
    results = {
        "kd-plugins": measured(wrong, found.p_wrong[keep], named),
        "self-confidence": measured(wrong, (1 - probs[n, labels])[keep], doubted),
        "cleanlab, same probabilities": with_cleanlab(labels[keep], probs[keep], wrong),
    }
    if s.practice:
        head = make_pipeline(StandardScaler(), LogisticRegression())
        split = StratifiedKFold(5, shuffle=True, random_state=seed)
        own = cross_val_predict(head, view.features, labels, cv=split, method="predict_proba")
        results["cleanlab, its own practice"] = with_cleanlab(labels[keep], own[keep], wrong)
    kept = kd.audit.LabelNoise(
        *(x[keep] for x in (found.labels, found.p_wrong, found.proposed, found.p_proposed)),
        found.transition,
        found.draws,
    )
    counted = {"errors": int(wrong.sum()), "rows": len(wrong), "count": kept.count()}
    return {"results": results, **counted, "reliability": reliability(kept, wrong)}


def noisy_labels(s: Settings, rows, true: np.ndarray, noise: str, seed: int) -> np.ndarray:
    name, _, rate = noise.partition(":")
    if not rate:
        return column_array(rows, name)
    if name == "map":
        pairs = {int(a): int(b) for a, b in (pair.split(":") for pair in s.pairs)}
        return corrupt(true, kd.data.asymmetric(int(true.max()) + 1, float(rate), pairs), seed)
    return corrupt(true, kd.data.noise_by_name(rows, name, float(rate), s.label), seed)


def tables(lines: list[dict]) -> str:
    """Per noise: mean ± deviation over the seeds, then counts, then the reliability."""
    text = []
    for noise in dict.fromkeys(line["noise"] for line in lines):
        own = [line for line in lines if line["noise"] == noise]
        rows = []
        for by in own[0]["results"]:
            values = {c: [line["results"][by][c] for line in own] for c in COLUMNS}
            shares = [mean_std(values[c]) for c in ("precision", "right", "found")]
            auroc = mean_std(values["auroc"], 1.0, 3)
            rows.append([by, auroc, shares[0], round(fmean(values["named"])), *shares[1:]])
        counts = "; ".join(
            "{} wrong, estimate {:.0f} ({:.0f} to {:.0f})".format(line["errors"], *line["count"])
            for line in own
        )
        said, are, sizes = binned(own)
        error = float((sizes * np.abs(said - are)).sum() / sizes.sum())
        bins = markdown(["", *range(1, 11)], [["said", *said.round(2)], ["are", *are.round(2)]])
        text += [f"### {noise}", markdown(["by", *HEADER], rows), counts]
        text += [f"Calibration error {error:.3f}:", bins]
    return "\n\n".join(text)


def draw_reliability(lines: list[dict], path: Path) -> None:
    """What share of the labels is wrong, against what the score says. A line for each noise."""
    figure = Figure(figsize=(5, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1)
    for noise in dict.fromkeys(line["noise"] for line in lines):
        said, are, sizes = binned([line for line in lines if line["noise"] == noise])
        axes.plot(said[sizes > 20], are[sizes > 20], marker="o", markersize=4, label=noise)
    axes.set(xlabel="probability that the label is wrong", ylabel="share of labels that are wrong")
    axes.legend(frameon=False)
    figure.savefig(path)


def binned(lines: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean p_wrong, share of wrong labels and number of labels in ten bins, over all seeds."""
    sizes = np.array([line["reliability"]["sizes"] for line in lines])
    said, are = (
        (sizes * [line["reliability"][key] for line in lines]).sum(0) / np.maximum(sizes.sum(0), 1)
        for key in ("said", "are")
    )
    return said, are, sizes.sum(0)


def main() -> None:
    (s,) = kd.train.parse_settings(Settings, defaults={})
    rows, s.image, s.label = kd.data.load_rows(s.data, s.split, s.image, s.label)
    columns = {"image": s.image, "label": s.label}
    view = kd.audit.frozen_features(rows, s.backbone, s.features, side=s.side, **columns)
    keep = np.array(rows[s.where]) if s.where else np.ones(len(rows), bool)
    path = Path(s.output_dir, "results.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for noise in s.noise:
        for seed in s.seeds:
            if any((line["noise"], line["seed"]) == (noise, seed) for line in lines):
                continue
            done = {"noise": noise, "seed": seed}
            done |= run(s, view, rows, view.labels, keep, noise, seed)
            lines.append(done)
            with path.open("a") as file:
                file.write(json.dumps(done) + "\n")
    Path(s.output_dir, "results.md").write_text(tables(lines) + "\n")
    draw_reliability(lines, Path(s.output_dir, "reliability.png"))
    print(tables(lines))


if __name__ == "__main__":
    kd.train.run_main(main)
