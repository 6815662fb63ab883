"""A pretrained network in the plain Trainer."""

import json

import pytest
import timm
from helpers.recipes import start

from kd_plugins.models import export


@pytest.mark.parametrize("source", ["folder", "file"])
def test_finetune_mylc(source, tmp_path, pictures, monkeypatch, capsys):
    """A folder with the same classes keeps its head. A file with other classes gets a new head."""
    model = timm.create_model("test_resnet", num_classes=4 if source == "folder" else 7)
    folder = export(model, tmp_path / "pretrained", list("wxyz") if source == "folder" else None)
    given = ["--model", folder, "--prime", "True"]
    if source == "file":
        given = ["--model", f"test_resnet={folder / 'model.safetensors'}"]
    out = tmp_path / "out"
    argv = [
        "--data",
        pictures,
        "--rate",
        0.25,
        "--size",
        32,
        "--num_train_epochs",
        1,
        "--output_dir",
        out,
        *given,
    ]
    start(monkeypatch, "finetune_mylc.py", *argv)
    assert ("before training" in capsys.readouterr().out) == (source == "folder")
    assert 0 <= json.loads((out / "results.json").read_text())["eval_accuracy"] <= 1
    assert next(out.glob("checkpoint-*/loss.safetensors"))
    assert (out / "pictures" / "curves.png").exists()
    timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)


def test_weights_that_are_not_there(tmp_path, pictures, monkeypatch):
    argv = ["--data", pictures, "--model", f"test_resnet={tmp_path / 'gone.safetensors'}"]
    with pytest.raises(FileNotFoundError, match=r"there is no file \S*gone.safetensors"):
        start(monkeypatch, "finetune_mylc.py", *argv, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
