"""The recipe that finds wrong labels, from networks and from training dynamics."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
from helpers.suspects import FEATURES, NAMES
from helpers.tiny import rows

from kd_plugins.models import export


def start(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["find_wrong_labels.py", *map(str, argv)])
    recipe = Path(__file__).parents[2] / "recipes" / "find_wrong_labels.py"
    monkeypatch.syspath_prepend(str(recipe.parent))  # as python does for a script
    return runpy.run_path(str(recipe), run_name="__main__")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:cleanlab")
def test_recipe(tmp_path, monkeypatch, capsys):
    """From networks and dynamics, on some of the rows, with and without true labels."""
    pytest.importorskip("cleanlab")
    table = [row | {"exact": i % 5 != 0} for i, row in enumerate(rows(60, wrong=0.2))]
    features = datasets.Features({**FEATURES, "exact": datasets.Value("bool")})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(table, features=features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    peers = [
        export(timm.create_model("test_resnet", num_classes=3), tmp_path / k, NAMES) for k in "ab"
    ]
    kept = [row for row in table if row["exact"]]
    errors = sum(row["label"] != row["clean"] for row in kept)
    n = np.arange(48)
    label, clean = (np.array([row[k] for row in kept]) for k in ("label", "clean"))
    seen = {
        "index": n,
        "label": label,
        "proposed": clean,
        "p_label": np.where(label == clean, 0.9, 0.2),
        "confidence": n * 0 + 0.8,
    }
    monkeypatch.setattr(
        "kd_plugins.audit.suspects.summarise",
        lambda folder: {"given": seen, "other": seen | {"label": np.roll(label, 1)}}[folder],
    )

    argv = [
        "--data",
        tmp_path / "data",
        "--where",
        "exact",
        "--output_dir",
        tmp_path / "out",
        "--networks",
        *peers,
    ]
    start(monkeypatch, *argv, "--clean", "clean", "--dynamics", "given")
    out = capsys.readouterr().out
    assert f"| by | AUROC | precision at {errors} | named wrong |" in out
    assert f"| training dynamics | 1.000 | 100.0% | {errors} | 100.0% | 100.0% |" in out
    for kind in ("html", "png", "csv", "parquet"):
        assert (
            f"out/suspects.{kind}" in out
            and (tmp_path / "out" / f"suspects.{kind}").stat().st_size > 100
        )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == 48 and results["suspects"] == errors
    assert (
        0 <= results["networks"]["auroc"] <= 1
        and 0 <= results["networks, cleanlab"]["precision"] <= 1
    )
    saved = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "suspects.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert len(saved) == errors and saved["proposed"][:] == [clean[i] for i in saved["index"]]

    start(monkeypatch, *argv, "--output_dir", tmp_path / "unknown")
    assert (
        "AUROC" not in capsys.readouterr().out and (tmp_path / "unknown" / "suspects.csv").exists()
    )
    for wrong, words in (
        ([*argv[:6], "--dynamics", "other"], "among the suspects: they belong to other data"),
        (argv[:6], "give --networks"),
    ):
        with pytest.raises(SystemExit, match="2"):
            start(monkeypatch, *wrong)
        assert words in capsys.readouterr().err
