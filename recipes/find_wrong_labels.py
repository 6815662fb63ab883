"""Find the labels that are probably wrong: as a table, a contact sheet and a page to go through in a browser.

    python recipes/cifar100_noise.py --data FOLDER --noise noisy_label --output_dir runs/pair     # networks that learn the labels
    python recipes/find_wrong_labels.py --data FOLDER --label noisy_label --clean label --networks runs/pair/peer_a runs/pair/peer_b
    python recipes/find_wrong_labels.py --data FOLDER --label noisy_label --dynamics runs/pair/dynamics

`--networks` are folders that export() wrote; probabilities of pictures that they were trained on are in-training ones.
`--dynamics` is a folder of DynamicsCallback. With both, the suspects are those of the dynamics: they remember what the networks
thought before they had learned a wrong label by heart. Rows must be those of the training: `--split` and `--where` as there.

`--clean` names a column of true labels, where there is one: then it is measured how many of the errors are found,
beside cleanlab on the same probabilities (pip install cleanlab), whose ranking is the same and whose choice is not.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from pictures import check_networks, column, transform
from sklearn.metrics import roc_auc_score
from torchvision import transforms as T

from kd_plugins import contact_sheet, find_suspects, html_page, predict_probs
from kd_plugins.audit import plots as report
from kd_plugins.audit.suspects import refuse_other_rows
from kd_plugins.data import ImageView
from kd_plugins.models import make_teacher
from kd_plugins.train import parse_settings, run_main


@dataclass
class Settings:
    data: str = field(default="uoft-cs/cifar100", metadata={"help": "hub id or folder"})
    split: str = "train"
    image: str | None = field(
        default=None, metadata={"help": "column; the one that holds pictures"}
    )
    label: str | None = field(
        default=None, metadata={"help": "the doubted ones; label, or the only classes"}
    )
    clean: str | None = field(
        default=None, metadata={"help": "column of true labels: how many errors are found?"}
    )
    where: str | None = field(
        default=None, metadata={"help": "keep the rows only where this column is true"}
    )
    networks: list[str] = field(
        default_factory=list, metadata={"help": "folders that export() wrote"}
    )
    dynamics: str | None = field(default=None, metadata={"help": "folder of DynamicsCallback"})
    batch_size: int = 256
    num_workers: int = 0
    count: int = field(default=500, metadata={"help": "suspects on the page"})
    output_dir: str = "runs/suspects"


def found(wrong: np.ndarray, score: np.ndarray, named: np.ndarray) -> dict[str, float]:
    """How well a ranking (higher is more suspicious) and the rows it names tell the wrong labels [N]."""
    number = int(wrong.sum())
    top = np.argsort(-score, kind="stable")[:number]
    hits = int(wrong[named].sum())
    return {
        "auroc": float(roc_auc_score(wrong, score)),
        "precision_at_errors": float(wrong[top].mean()),
        "named": len(named),
        "precision": hits / max(len(named), 1),
        "recall": hits / number,
    }


def ours(suspects, wrong: np.ndarray) -> dict[str, float]:
    table = suspects.with_format("numpy")[:]
    wrong, doubted = wrong[table["index"]], table["proposed"] != table["label"]
    return found(wrong, table["score"], np.flatnonzero(doubted))


def cleanlabs(labels: np.ndarray, probs: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    known = ~np.isnan(probs[:, 0])
    labels, probs, wrong = labels[known], probs[known], wrong[known]
    named = find_label_issues(labels, probs, return_indices_ranked_by="self_confidence", n_jobs=1)
    return found(wrong, -get_label_quality_scores(labels, probs), named)


def main() -> dict:
    (s,) = parse_settings(Settings, defaults={})
    if not s.networks and s.dynamics is None:
        raise SystemExit(
            "give --networks (folders that export() wrote), --dynamics (of DynamicsCallback) or both"
        )
    check_networks("networks", s.networks, trained=True)
    data = datasets.load_dataset(s.data, split=s.split)
    s.image, s.label = column(data, "image", s.image), s.label or column(data, "label")
    if s.where:
        data = data.select(np.flatnonzero(data.with_format("numpy")[s.where][:]))

    networks = [make_teacher(folder, None) for folder in s.networks]
    plain = transform(min(data[0][s.image].size), networks[0], False) if networks else T.ToTensor()
    view = ImageView(data, plain, image=s.image, label=s.label, clean=s.clean)
    wrong = None if s.clean is None else view.labels != view.clean_labels
    if wrong is not None and len(np.unique(wrong)) < 2:
        print(
            f"--clean {s.clean}: {wrong.sum()} of {len(wrong)} labels are wrong; nothing to measure"
        )
        wrong = None
    known = {"class_names": view.class_names, "all_rows": True}

    results = {}
    if networks:
        probs = predict_probs(networks, view, batch_size=s.batch_size, num_workers=s.num_workers)
        suspects = find_suspects(view.labels, probs, **known)
        if wrong is not None:
            results["networks"] = ours(suspects, wrong)
            try:
                results["networks, cleanlab"] = cleanlabs(view.labels, probs, wrong)
            except ImportError:
                print("cleanlab is not installed: pip install cleanlab")
    if s.dynamics:
        suspects = find_suspects(dynamics=s.dynamics, **known)
        refuse_other_rows(suspects, view.labels, f"column {s.label!r}")
        if wrong is not None:
            results["training dynamics"] = ours(suspects, wrong)
    doubted = suspects.with_format("numpy")
    suspects = suspects.select(np.flatnonzero(doubted["proposed"][:] != doubted["label"][:]))

    out = Path(s.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    suspects.to_parquet(out / "suspects.parquet")
    suspects.to_csv(out / "suspects.csv")
    contact_sheet(suspects, data, out / "suspects.png", image=s.image, label=s.label)
    page = {"count": s.count, "image": s.image, "label": s.label}
    html_page(suspects, data, out / "suspects.html", **page)
    if wrong is not None:
        header = [
            "by",
            "AUROC",
            f"precision at {wrong.sum()}",
            "named wrong",
            "of these wrong",
            "of all wrong found",
        ]
        rows = [
            [
                by,
                f"{r['auroc']:.3f}",
                *(f"{r[k]:.1%}" if k != "named" else r[k] for k in list(r)[1:]),
            ]
            for by, r in results.items()
        ]
        print(report.markdown(header, rows))
    results_of = vars(s) | {"rows": len(data), "suspects": len(suspects)} | results
    (out / "results.json").write_text(json.dumps(results_of, indent=1))
    print(f"{len(suspects)} of {len(data)} labels are suspected:")
    print(*(out / f"suspects.{kind}" for kind in ("html", "png", "csv", "parquet")), sep="\n")
    return results


if __name__ == "__main__":
    run_main(main)
