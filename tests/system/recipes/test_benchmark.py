"""What the library costs."""

import json

import pytest
import torch
from helpers.recipes import RECIPES, start


def test_rows_that_the_benchmark_has_not(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"--rows \['lost'\]: .*import kd_plugins; noisy view"):
        start(
            monkeypatch,
            "experiments/benchmark.py",
            "--rows",
            "import",
            "lost",
            "--output",
            tmp_path / "b.json",
        )
    assert "import" not in capsys.readouterr().out


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Rows are chosen by part of their name. The JSON has figures, goals, hardware and versions."""
    rows = ["loss alone [128, 100], eager", "AEKD", "noisy view"]
    start(
        monkeypatch,
        "experiments/benchmark.py",
        "--quick",
        "--rows",
        *rows,
        "--output",
        tmp_path / "b.json",
    )
    out = json.loads((tmp_path / "b.json").read_text())
    assert (
        len(out["rows"]) == 4
        and {"torch", "timm", "kd-plugins"} <= set(out["versions"])
        and out["device"]
    )
    assert all(row["figure"] > 0 and row["goal"] > 0 for row in out["rows"].values())
    assert capsys.readouterr().out.count("| loss alone") == 1


def test_rows_of_the_benchmark_that_want_a_gpu(monkeypatch):
    """The parts that run without a GPU; every loss has a call."""
    monkeypatch.syspath_prepend(RECIPES / "experiments")
    from costs_of_losses import every_loss, peak_memory
    from costs_of_training import two_peers_on_one

    assert two_peers_on_one("eager", True)[0] > 0
    # each refined label and the sum of them is written down: one [B, C] each
    assert 1 <= peak_memory(64, 2000, torch.float32)[0] < 2
    assert 1 <= peak_memory(64, 2000, torch.bfloat16)[0] < 2
    values = []
    for _, loss, call in every_loss():
        loss.set_progress(0.5)
        values.append(call(loss))
    assert len(values) > 30 and all(value.isfinite() for value in values)


def test_rows_by_the_thousand(monkeypatch, capsys):
    argv = ["--rows", 1000, "--classes", 4, "--width", 64, "--epochs", 60]
    start(monkeypatch, "experiments/millions_of_rows.py", *argv)
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines()[:3]] == ["folds", "noise", "suspects"]
    assert "200 labels are wrong, estimated" in out
