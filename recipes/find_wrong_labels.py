"""Find the labels that are probably wrong: a table, a contact sheet and a page for the browser.

    python recipes/cifar100_noise.py --data FOLDER --noise noisy_label --dynamics True \\
        --output_dir runs/pair    # first train networks on the labels
    python recipes/find_wrong_labels.py --data FOLDER --label noisy_label --clean label \\
        --networks runs/pair/peer_a runs/pair/peer_b --dynamics runs/pair/dynamics

`--networks` are folders that export() wrote. Their predictions on their own training pictures know
the labels already. `--dynamics` is a folder of DynamicsCallback: what the networks predicted while
they were trained, before they had memorised a wrong label. With both, the suspects come from the
dynamics. The rows must be those of the training: repeat its `--split` and `--where`.

`--clean` names a column of true labels, if there is one. The recipe then measures how many of the
wrong labels are found, and compares with cleanlab on the same probabilities (pip install cleanlab):
both rank alike and differ in which labels they call wrong.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from sklearn.metrics import roc_auc_score
from transformers.hf_argparser import HfArg

import kd_plugins as kd
from kd_plugins.audit import plots


@dataclass
class Settings:
    data: str = HfArg(default="uoft-cs/cifar100", help="hub id or folder")
    split: str = "train"
    image: str | None = HfArg(default=None, help="column of pictures, if there are several")
    label: str | None = HfArg(
        default=None, help="column of the doubted labels, if there are several"
    )
    clean: str | None = HfArg(default=None, help="column of true labels, to measure what is found")
    where: str | None = HfArg(default=None, help="keep only the rows where this column is true")
    networks: list[str] = HfArg(default_factory=list, help="folders that export() wrote")
    dynamics: str | None = HfArg(default=None, help="folder of DynamicsCallback")
    batch_size: int = 256
    num_workers: int = 0
    count: int = HfArg(default=5000, help="suspects on the page")
    output_dir: str = "runs/suspects"


def measured(wrong: np.ndarray, score: np.ndarray, named: np.ndarray) -> dict[str, float]:
    """How well a ranking (higher is more suspicious) and the named rows find the wrong labels."""
    total, hits = int(wrong.sum()), int(wrong[named].sum())
    top = np.argsort(-score, kind="stable")[:total]
    return {
        "auroc": float(roc_auc_score(wrong, score)),
        "precision_at_errors": float(wrong[top].mean()),
        "named": len(named),
        "precision": hits / max(len(named), 1),
        "recall": hits / total,
    }


def measure_suspects(suspects: datasets.Dataset, wrong: np.ndarray) -> dict[str, float]:
    table = suspects.with_format("numpy")[:]
    named = np.flatnonzero(table["proposed"] != table["label"])
    return measured(wrong[table["index"]], table["score"], named)


def measure_cleanlab(labels: np.ndarray, probs: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    known = ~np.isnan(probs[:, 0])
    labels, probs, wrong = labels[known], probs[known], wrong[known]
    named = find_label_issues(labels, probs, return_indices_ranked_by="self_confidence", n_jobs=1)
    return measured(wrong, -get_label_quality_scores(labels, probs), named)


def rank(s: Settings, networks: list, view: kd.ImageView, wrong: np.ndarray | None) -> tuple:
    """All rows, most suspicious first, and how well each way of finding them works."""
    results, known = {}, {"class_names": view.class_names, "all_rows": True}
    if s.dynamics:
        suspects = kd.find_suspects(dynamics=s.dynamics, **known)
        kd.audit.decisions.refuse_other_rows(suspects, view.labels, f"column {s.label!r}")
    if networks:
        probs = kd.predict_probs(networks, view, batch_size=s.batch_size, num_workers=s.num_workers)
        by_networks = kd.find_suspects(view.labels, probs, **known)
        if wrong is not None:
            results["networks"] = measure_suspects(by_networks, wrong)
            try:
                results["networks, cleanlab"] = measure_cleanlab(view.labels, probs, wrong)
            except ImportError:
                print("cleanlab is not installed: pip install cleanlab")
        suspects = suspects if s.dynamics else by_networks
    if s.dynamics and wrong is not None:
        results["training dynamics"] = measure_suspects(suspects, wrong)
    return suspects, results


def table(results: dict, errors: int) -> str:
    header = ["by", "AUROC", f"precision at {errors}", "named wrong", "of these wrong"]
    rows = []
    for by, r in results.items():
        found = [f"{r[key]:.1%}" for key in ("precision_at_errors", "precision", "recall")]
        rows.append([by, f"{r['auroc']:.3f}", found[0], r["named"], *found[1:]])
    return plots.markdown([*header, "of all wrong found"], rows)


def main() -> dict:
    (s,) = kd.train.parse_settings(Settings, defaults={})
    if not s.networks and s.dynamics is None:
        raise SystemExit("give --networks (folders that export() wrote), --dynamics, or both")
    data, s.image, s.label = kd.data.load_rows(s.data, s.split, s.image, s.label, s.where)
    networks = [kd.models.make_teacher(folder, None) for folder in s.networks]
    columns = {"image": s.image, "label": s.label}
    first = networks[0] if networks else None
    view = kd.data.plain_view(data, first, clean=s.clean, **columns)
    wrong = None if s.clean is None else view.labels != view.clean_labels
    if wrong is not None and len(np.unique(wrong)) < 2:
        print(
            f"--clean {s.clean}: {wrong.sum()} of {len(wrong)} labels are wrong; nothing to measure"
        )
        wrong = None

    suspects, results = rank(s, networks, view, wrong)
    rows = suspects.with_format("numpy")[:]
    suspects = suspects.select(np.flatnonzero(rows["proposed"] != rows["label"]))
    out = Path(s.output_dir)
    paths = kd.audit.write_suspects(suspects, data, out, count=s.count, **columns)
    summary = vars(s) | {"rows": len(data), "suspects": len(suspects)} | results
    (out / "results.json").write_text(json.dumps(summary, indent=1))
    if wrong is not None:
        print(table(results, wrong.sum()))
    print(f"{len(suspects)} of {len(data)} labels are suspected:")
    print(*paths, sep="\n")
    return results


if __name__ == "__main__":
    kd.train.run_main(main)
