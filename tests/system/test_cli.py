"""The command ``kd-plugins``: from pictures in folders to networks, suspects and curves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from kd_plugins import cli, list_losses
from kd_plugins.audit.tables import methods

ROOT = Path(__file__).parents[2]
NAMES = ["cat", "dog", "owl"]
SETTINGS = {
    "models": ["test_resnet", "test_resnet"],
    "loss": "smkd",
    "loss_args": {"eta": 2, "refine": {"loss": "mylc", "b1": 10}},
    "num_train_epochs": 2,
    "learning_rate": "1e-2",  # as YAML reads 1e-2
    "per_device_train_batch_size": 8,
    "dynamics": True,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder per class, twenty pictures of 16 px in each; the brightest channel tells the
    class."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("pictures")
    for k, name in enumerate(NAMES):
        (folder / name).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 90, (16, 16, 3))
            pixels[..., k] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run whose settings come from YAML, but for one that the command line gives."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | {"data": str(pictures), "output_dir": "unused"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        cli.main(["train", "--config", str(config), "--output_dir", str(folder / "out")])
    return folder / "out"


def refused(capsys, *argv):
    """The line on stderr of a command that is refused."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(word) for word in argv])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "usage:" not in err
    return err.strip().splitlines()[-1]  # after the progress bars of datasets


def test_entry_point_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"kd-plugins": "kd_plugins.cli:main"}


def test_answers_without_transformers():
    """As a process. What takes seconds to import is not imported."""
    code = (
        "import sys, runpy\n"
        "for word in ('--help', 'list'):\n"
        "    sys.argv = ['kd-plugins', word]\n"
        "    runpy.run_module('kd_plugins', run_name='__main__')\n"
        "heavy = {'transformers', 'datasets', 'timm', 'accelerate'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    words = ["list", "train", "suspects", "report", *list_losses()]
    assert all(re.search(rf"^\s*{word}\s", done.stdout, re.MULTILINE) for word in words)


def test_list(capsys):
    cli.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    table = methods().splitlines()[2:]
    assert len(lines) == len(table)
    for line, row in zip(lines, table, strict=True):  # the same source as the table of the README
        name, formula, inputs, _ = row.removeprefix("| ").split(" | ", 3)
        assert line.startswith(name.strip("`")) and formula in line
        assert line.endswith("]") and all(x in line for x in inputs.split(", ")[2:])
    cli.main(["list", "boot*"])
    assert [x.split()[0] for x in capsys.readouterr().out.splitlines()] == [
        "boot_hard",
        "boot_soft",
    ]
    cli.main(["list", "gce"])
    out = capsys.readouterr().out
    assert out.startswith("GCE(q=0.7, *, num_classes=None, reduction='mean', weight=None)")
    assert "References:" in out and "in (0, 1]" in out


def test_run_from_yaml(run, pictures, capsys):
    """The command line wins; the exported network reaches by itself what its card says."""
    settings = json.loads((run / "settings.json").read_text())
    assert settings["models"] == SETTINGS["models"] and settings["learning_rate"] == 0.01
    assert json.loads(settings["loss_args"]) == SETTINGS["loss_args"]
    card = (run / "peer_a" / "README.md").read_text(encoding="utf-8")
    assert "b1=10" in card
    stated = float(re.search(r"\| eval_accuracy_a \| ([\d.]+) \|", card)[1])

    network = timm.create_model(f"local-dir:{run / 'peer_a'}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == NAMES
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    held_out = held_out_rows(pictures)
    assert len(held_out) == 6 and {label for _, label in held_out} == {0, 1, 2}
    with torch.no_grad():
        hits = [network(transform(p)[None]).argmax().item() == y for p, y in held_out]
    assert np.mean(hits) == pytest.approx(stated, abs=1e-4)
    assert json.loads((run / "eval_results.json").read_text())["eval_accuracy_a"] == pytest.approx(
        stated, abs=1e-4
    )


def held_out_rows(pictures):
    from kd_plugins.data import hold_out

    rows = datasets.load_dataset(str(pictures), split="train")
    kept, out = hold_out(np.array(rows["label"]), seed=42)
    assert not set(kept) & set(out) and len(kept) + len(out) == len(rows)
    return [(rows[int(i)]["image"].convert("RGB"), rows[int(i)]["label"]) for i in out]


def test_train_from_flags_as_a_process(pictures, tmp_path, monkeypatch, capsys):
    """With a split for validation; started again, there is nothing left to train."""
    for split in ("train", "test"):
        shutil.copytree(pictures, tmp_path / "data" / split)
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}
    argv = [
        "train",
        "data",
        "--models",
        "test_resnet",
        "--loss",
        "gce",
        "--loss-args",
        '{"q": 0.5}',
    ]
    argv += ["--num-train-epochs", "1", "--per_device_train_batch_size", "8", "--no_augment"]
    argv += ["--use_cpu", "--output_dir", "out"]
    command = [sys.executable, "-m", "kd_plugins", *argv]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 pictures to train on; validation: 60, the split test" in done.stdout
    assert done.stdout.rstrip().endswith("out/peer_a")
    assert "GCE(q=0.5" in (tmp_path / "out" / "peer_a" / "README.md").read_text()
    assert not (tmp_path / "out" / "dynamics").exists()

    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "out" / "peer_a" / "model.safetensors").read_bytes()
    cli.main(argv)
    assert (tmp_path / "out" / "peer_a" / "model.safetensors").read_bytes() == before
    assert "holds a run with" in refused(capsys, *argv, "--loss_args", '{"q": 0.6}')


def test_as_many_networks_as_the_loss_is_for(pictures, tmp_path, monkeypatch):
    """A loss for one network would otherwise be refused because of a default."""
    made = []
    monkeypatch.setattr(cli, "_networks_and_views", lambda s, args: made.append(s.models) or 1 / 0)
    for loss in ("gce", "smkd", "co_teaching"):
        with pytest.raises(ZeroDivisionError):
            cli.main(["train", str(pictures), "--loss", loss, "--output_dir", str(tmp_path / "x")])
    assert made == [["resnet18"], ["resnet18"] * 2, ["resnet18"] * 2]


def test_train_from_a_file_of_weights(pictures, tmp_path, capsys):
    """Without a network connection; a learning rate of 0 leaves them as they are."""
    weights = timm.create_model("test_resnet", num_classes=5).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    words = ["--models", f"test_resnet={tmp_path / 'w.safetensors'}", "--pretrained", "--max_steps"]
    words += ["1", "--learning_rate", "0", "--loss", "ce", "--use_cpu", "--disable_tqdm", "true"]
    cli.main(["train", str(pictures), *words, "--output_dir", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "columns: image (pictures), label (3 classes)\n" in out
    assert "pictures go in at 16 x 16 px, their own size\n" in out
    trained = load_file(tmp_path / "run" / "peer_a" / "model.safetensors")
    assert torch.equal(trained["conv1.0.weight"], weights["conv1.0.weight"])
    assert len(trained["fc.weight"]) == 3


def test_suspects_and_report(run, pictures, tmp_path, capsys):
    peers = [str(run / f"peer_{k}") for k in "ab"]
    sources = {
        "networks": ["--networks", *peers],
        "dynamics": ["--dynamics", str(run / "dynamics")],
    }
    for name, source in sources.items():
        cli.main(["suspects", str(pictures), *source, "--output", str(tmp_path / name)])
        out = capsys.readouterr().out
        for kind in ("html", "parquet", "csv", "png"):
            assert f"{name}/suspects.{kind}" in out
            assert (tmp_path / name / f"suspects.{kind}").exists()
        known = 60 if name == "networks" else 54  # a tenth was held out for validation
        assert re.search(rf"^\d+ of {known} labels are suspected", out, re.MULTILINE)
        assert (name == "networks") != ("6 of 60 pictures are left out, no network was" in out)
    cli.main(["report", str(run)])
    drawn = capsys.readouterr().out.split()
    assert str(run / "pictures" / "curves.png") in drawn and all(Path(p).exists() for p in drawn)


def test_apply_and_train_on_the_result(pictures, tmp_path, capsys):
    """Decisions on a folder of pictures; the run goes on from the new folder by its name alone."""
    decisions = tmp_path / "decisions.csv"
    lines = ["index,label,proposed,decision,new_label,data", "0,0,1,wrong,1,", "25,1,0,other,,"]
    decisions.write_text("\n".join([*lines, "59,2,1,fine,2,", ""]))
    cli.main(["apply", str(decisions), str(pictures), "--out", str(tmp_path / "better")])
    assert "2 labels are wrong; 60 rows, now 59" in capsys.readouterr().out
    better = datasets.load_dataset(str(tmp_path / "better"))["train"]
    assert np.bincount(better["label"]).tolist() == [19, 20, 20]

    options = {
        "models": "test_resnet",
        "loss": "ce",
        "max_steps": 1,
        "output_dir": tmp_path / "run",
    }
    options |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 8}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    cli.main(["train", str(tmp_path / "better"), *words])
    assert "53 pictures to train on" in capsys.readouterr().out
    # Rows that were decided are not asked about again: rows 0 and 58, before 25 was dropped.
    probs = np.eye(3, dtype=np.float32)[(np.array(better["label"]) + 1) % 3]
    np.save(tmp_path / "probs.npy", probs * 0.7 + 0.1)
    more = ["--probs", str(tmp_path / "probs.npy"), "--all_rows", "--output", str(tmp_path / "s")]
    cli.main(["suspects", str(tmp_path / "better"), *more])
    assert "2 more are not shown: somebody has decided" in capsys.readouterr().out
    table = datasets.Dataset.from_parquet(str(tmp_path / "s" / "suspects.parquet"))
    assert sorted(table["index"][:]) == list(range(1, 58))

    weighted = ["--how", "weight", "--weight", "0.2", "--out", str(tmp_path / "weighted")]
    cli.main(["apply", str(decisions), str(pictures), *weighted])
    rows = datasets.load_dataset(str(tmp_path / "weighted"))["train"]
    assert np.flatnonzero(np.array(rows["weight"]) < 1).tolist() == [0, 25]
    argv = ["train", str(tmp_path / "weighted"), "--models", "test_resnet", "--loss", "ce"]
    argv += ["--max_steps", "1", "--use_cpu", "--output_dir", str(tmp_path / "run-2")]
    with pytest.warns(UserWarning, match="column weight, .* train does not use it: wrong labels"):
        cli.main([*argv, "--disable_tqdm", "true"])
    assert "expected kd-plugins apply DECISIONS.csv DATA" in refused(capsys, "apply", "x.csv")


def test_refusals(pictures, tmp_path, capsys):
    """What cannot work is said in one line, before anything is written."""
    out = ["--output_dir", tmp_path / "out", "--use_cpu"]
    train, networks = ["train", pictures, *out], ["test_resnet"] * 2
    cases = {
        "did you mean train": ["trian", pictures],
        "did you mean smkd": ["list", "smdk"],
        "expected DATA first": ["train", *out],
        "--modls x: there is no such option; did you mean --models": [*train, "--modls", "x"],
        "test_resnt: expected": [*train, "--models", "test_resnt"],
        "unknown loss 'smdk'": [*train, "--loss", "smdk"],
        """expected JSON such as '{"eta": 2}'""": [*train, "--loss_args", "{eta:2}"],
        "GCE has no argument": [*train, "--loss", "gce", "--loss_args", '{"quality": 1}'],
        "teaches peers": [*train, "--models", "test_resnet"],
        "there are 2: pass one network, or": [*train, "--models", *networks, "--loss", "gce"],
        "doesn't contain any data files": ["train", tmp_path, *out],
        "or none of them": ["suspects", pictures, "--dynamics", "a", "--probs", "b"],
        "expected a file": ["suspects", pictures, "--probs", tmp_path / "no.npy"],
        "there is no such network": ["suspects", pictures, "--backbone", "test_resnt"],
        "contains no training dynamics": ["suspects", pictures, "--dynamics", tmp_path],
        "column 'image'": [*train, "--label", "image"],
    }
    for words, argv in cases.items():
        assert words in refused(capsys, *argv), argv
    assert not (tmp_path / "out").exists()


def test_training_with_pictures_that_cannot_be_read(pictures, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    for k in range(3):
        (folder / "cat" / f"{k}.png").write_bytes(b"not a picture")
    argv = ["train", folder, "--output_dir", tmp_path / "out", "--use_cpu"]
    argv += ["--models", "test_resnet", "--loss", "ce", "--max_steps", "8"]
    argv += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "1"]
    line = refused(capsys, *argv, "--max_broken", "0.03")
    assert re.match(r"2 of 60 pictures cannot be read, more than max_broken=3.00%: .*\.png", line)
    cli.main([str(word) for word in argv])  # five may be, and the folder is that of the same run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 0.1", "there is no option learning_rat; did you mean learning_rate"),
        ("learning_rate: fast", "argument --learning_rate"),
        ("- models", "expected lines such as learning_rate: 0.1"),
        ("models: [", "cannot be read"),
    ],
)
def test_refused_config(text, words, pictures, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert words in refused(capsys, "train", pictures, "--config", tmp_path / "run.yaml")
    missing = refused(capsys, "train", pictures, "--config", tmp_path / "no.yaml")
    assert "no.yaml cannot be read" in missing


def test_help_shows_the_common_options(capsys):
    """The other hundred are there for those who ask."""
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as done:
            cli.main(["train", flag])
        assert not done.value.code
        shown[flag] = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE))
    assert {"--models", "--learning_rate", "--config", "--no_augment"} <= shown["--help"]
    assert len(shown["--help"]) < 30 < 100 < len(shown["--help_all"])
