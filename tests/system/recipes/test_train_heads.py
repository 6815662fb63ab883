"""Heads on frozen features."""

import json

import pytest
import timm
import torch
from helpers.recipes import start


def test_train_heads(tmp_path, pictures, monkeypatch, capsys):
    """Features once, then heads by name; a second command trains only what is new."""
    network = timm.create_model("resnet10_cifar")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = f"resnet10_cifar={tmp_path / 'weights.pth'}"
    argv = ["train_heads.py", "--data", pictures, "--backbone", backbone]
    argv += ["--side", 32, "--seeds", 0, 1]
    argv += ["--features", tmp_path / "features", "--output_dir", tmp_path / "run"]
    argv += ["--num_train_epochs", 1, "--use_cpu", "True", "--noise", "symmetric:0.25"]
    start(monkeypatch, *argv, "--methods", "ce", "smkd:rho=auto,eta=1", "co_teaching", "elr")
    out = capsys.readouterr().out
    assert "| method | symmetric:0.25 |" in out
    assert out.count("/8 symmetric:0.25") == 8
    gains = out.split("| points over ce, seed by seed | symmetric:0.25 |")[1]
    assert gains.count(" of 2) |") == 3 and "| ce |" not in gains
    assert (tmp_path / "run" / "results.png").stat().st_size > 5000
    log = tmp_path / "run" / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["wrong"] for row in rows} == {0.25}
    assert {row["method"] for row in rows} == {"ce", "smkd:rho=auto,eta=1", "co_teaching", "elr"}
    log.write_text(log.read_text()[:-20])  # a kill while the last line was written
    start(monkeypatch, *argv, "--methods", "ce", "elr", "gce:q=0.5")
    assert capsys.readouterr().out.count("/6 symmetric:0.25 ") == 3  # and none of the others
    # A column of given labels, whose matrix is counted: 0 -> 0, 1 -> 0, 2 -> 1, 3 -> 1.
    start(monkeypatch, *argv[:-1], "coarse_label", "--methods", "forward_correction")
    assert json.loads(log.read_text().splitlines()[-1])["wrong"] == 0.75
    for words, name in [
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type"),
        (["--optim_args", "weight_decay=0.1"], "optim_args"),
        (["--max_grad_norm", 0.5], "max_grad_norm"),
    ]:  # the results that are there belong to other settings
        with pytest.raises(ValueError, match=f"holds a run with {{'{name}'"):
            start(monkeypatch, *argv, "--methods", "ce", *words)
    with pytest.raises((TypeError, ValueError), match="did you mean q"):
        start(monkeypatch, *argv, "--methods", "gce:p=0.5")
    with pytest.raises(SystemExit, match="--noise symmetric: expected symmetric:RATE"):
        start(monkeypatch, *argv[:-1], "symmetric", "--methods", "ce")
