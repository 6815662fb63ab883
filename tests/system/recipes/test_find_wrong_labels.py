"""The recipe that finds wrong labels, from networks and from training dynamics."""

import json

import datasets
import numpy as np
import pytest
import timm
from helpers.recipes import start
from helpers.suspects import FEATURES, NAMES
from helpers.tiny import rows

from kd_plugins.audit import summarise
from kd_plugins.models import export


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
    start(monkeypatch, "find_wrong_labels.py", *argv, "--clean", "clean", "--dynamics", "given")
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

    start(monkeypatch, "find_wrong_labels.py", *argv, "--output_dir", tmp_path / "unknown")
    assert (
        "AUROC" not in capsys.readouterr().out and (tmp_path / "unknown" / "suspects.csv").exists()
    )
    for wrong, words in (
        ([*argv[:6], "--dynamics", "other"], "among the suspects: they belong to other data"),
        (argv[:6], "give --networks"),
    ):
        with pytest.raises((SystemExit, ValueError), match=words):
            start(monkeypatch, "find_wrong_labels.py", *wrong)


def test_suspects_of_other_rows_are_refused(tmp_path, pictures, monkeypatch):
    """The dynamics belong to the rows and labels of the run. Other rows or labels are refused."""
    run = tmp_path / "run"
    argv = ["--data", pictures, "--models", "test_resnet", "--method", "ce", "--dynamics", "True"]
    argv += ["--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--noise", "pair_flip"]
    start(monkeypatch, "cifar100_noise.py", *argv, "--output_dir", run)
    known = summarise(run / "dynamics")
    rows = datasets.load_dataset(str(pictures), split="train")
    given = rows.add_column("given", known["label"], feature=rows.features["label"])
    others = {
        "same": (given, "given", None),
        "column": (
            given,
            "label",
            r"row \d+ has label \d in column 'label', and \d among the suspects",
        ),
        "order": (
            given.select(range(31, -1, -1)),
            "given",
            r"row \d+ has label \d in column 'given', and \d among",
        ),
        "fewer": (
            given.select(range(20)),
            "given",
            r"have row \d+, the data set 20 rows",
        ),
    }
    for name, (data, label, refused) in others.items():
        folder = tmp_path / name
        folder.mkdir()
        data.to_parquet(folder / "train-00000-of-00001.parquet")
        argv = ["--data", folder, "--label", label, "--dynamics", run / "dynamics"]
        argv += ["--output_dir", tmp_path / f"suspects-{name}"]
        if refused:
            with pytest.raises(ValueError, match=refused):
                start(monkeypatch, "find_wrong_labels.py", *argv)
        else:
            start(monkeypatch, "find_wrong_labels.py", *argv)
        assert (tmp_path / f"suspects-{name}").exists() == (not refused)


def test_suspects_among_labels_that_are_all_right(
    tmp_path, pictures, two_teachers, monkeypatch, capsys
):
    """Without wrong labels nothing is measured, but the files are written."""
    argv = ["--data", pictures, "--clean", "label", "--output_dir", tmp_path / "out", "--networks"]
    start(monkeypatch, "find_wrong_labels.py", *argv, two_teachers[0])
    out = capsys.readouterr().out
    assert (
        "--clean label: 0 of 32 labels are wrong; nothing to measure" in out and "AUROC" not in out
    )
    assert (tmp_path / "out" / "suspects.csv").exists()
    with pytest.raises(
        ValueError, match=r"gone: expected a timm name, NAME=FILE or a folder that export\(\) wrote"
    ):
        start(monkeypatch, "find_wrong_labels.py", *argv, tmp_path / "gone")
