"""The demo and WebVision."""

import json

import numpy as np
import pytest
from helpers.cards import card_accuracy, loaded_by_card, predictor
from helpers.recipes import recipe_of, start
from PIL import Image

from kd_plugins.data import load_webvision


def open_picture(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_webvision_mini(tmp_path, monkeypatch, capsys):
    """The demo writes a table, pictures and networks. A second start trains nothing."""
    argv = [
        "webvision_mini.py",
        "--models",
        "test_resnet",
        "test_efficientnet",
        "--num_train_epochs",
        1,
        "--output_dir",
        tmp_path,
    ]
    start(monkeypatch, *argv)
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in ("cross-entropy", "SMKD-P + MyLC", "truncated GCE"))
    assert "train_memorised" in out
    assert (tmp_path / "pictures" / "curves.png").stat().st_size > 10_000
    assert "labels are suspected\n" in out and "of all wrong labels are among them" in out
    assert (tmp_path / "pictures" / "suspects.html").stat().st_size > 100_000
    assert (tmp_path / "pictures" / "suspects.png").stat().st_size > 10_000
    assert (tmp_path / "smkd-42" / "peer_b" / "model.safetensors").exists()
    figures = json.loads((tmp_path / "smkd-42" / "results.json").read_text())
    assert figures["eval_train_noise_rate"] == pytest.approx(0.4, abs=0.001)

    rows = load_webvision(tmp_path / "data-42", "val", classes=None)
    folder = tmp_path / "smkd-42" / "peer_b"
    named = card_accuracy(folder, "_b", of="eval_val_accuracy")
    predict = predictor(next(loaded_by_card(folder)))
    right = [predict(open_picture(row["image"])) == row["label"] for row in rows]
    assert np.mean(right) == pytest.approx(named, abs=0.005)

    start(monkeypatch, *argv)
    again = capsys.readouterr().out
    assert again.count("done before") == 3 and "train_runtime" not in again
    argv[argv.index("--num_train_epochs") + 1] = 2
    with pytest.raises(ValueError, match=r"holds a run with {'num_train_epochs': 1\.0}, asked"):
        start(monkeypatch, *argv)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--seeds", 0], "--seeds 0: expected at least 1"),
        (["--models", "resnet99", "x"], "resnet99: expected a timm name, NAME=FILE"),
    ],
)
def test_webvision_mini_refuses(more, match, tmp_path, monkeypatch):
    with pytest.raises((SystemExit, ValueError), match=match):
        start(monkeypatch, "webvision_mini.py", "--output_dir", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [["--data_dir", "w"], ["--data_dir=w"], ["--data_di", "w"]], ids=str
)
def test_webvision_mini_takes_the_papers_schedule_with_data(given, tmp_path, monkeypatch):
    recipe = recipe_of(
        monkeypatch,
        "webvision_mini.py",
        "--output_dir",
        tmp_path,
        "--models",
        "test_resnet",
        *given,
    )

    def run(s, args, root, method):
        raise RuntimeError(f"{root}, {args.num_train_epochs:g} epochs")

    monkeypatch.setitem(recipe["main"].__globals__, "run", run)
    with pytest.raises(RuntimeError, match="w, 100 epochs"):
        recipe["main"]()


def test_webvision_mini_that_cannot_start_does_not_take_the_folder(tmp_path, monkeypatch):
    """One network cannot teach itself. The folder stays free for the corrected command."""
    argv = [
        "webvision_mini.py",
        "--output_dir",
        tmp_path,
        "--num_train_epochs",
        1,
        "--models",
        "test_resnet",
    ]
    with pytest.raises(ValueError, match="there is one network: pass at least two"):
        start(monkeypatch, *argv)
    assert not list(tmp_path.rglob("settings.json"))
