"""Each recipe as a user starts it, with tiny networks on tiny data: to its end, again, and after it was stopped."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from kd_plugins import MutualDistillationTrainer, list_losses, loss_class
from kd_plugins.models import export

RECIPES = Path(__file__).parent.parent / "recipes"


def start(monkeypatch, recipe, *argv):
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, argv)])
    return runpy.run_path(str(RECIPES / recipe), run_name="__main__")


@pytest.fixture
def pictures(tmp_path):
    """A data set of four classes as parquet, in a folder that load_dataset reads like a hub id."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list("wxyz")),
            "coarse_label": datasets.Value("int64"),
        }
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for split, n in (("train", 32), ("test", 8)):
        label = [i % 4 for i in range(n)]
        rows = {"image": list(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)), "label": label}
        rows["coarse_label"] = [k // 2 for k in label]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_webvision_mini(tmp_path, monkeypatch, capsys):
    """The demo: table, pictures and networks come out; a second start trains nothing; other settings are refused."""
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
    assert "| cross-entropy |" in out and "| SMKD-P + MyLC |" in out and "train_memorised" in out
    assert (tmp_path / "pictures" / "curves.png").stat().st_size > 10_000
    assert "labels are suspected, " in out and "of all wrong labels are among them" in out
    assert (tmp_path / "pictures" / "suspects.html").read_text().count("data:image") > 100
    assert (tmp_path / "pictures" / "suspects.png").stat().st_size > 10_000
    assert (tmp_path / "smkd-42" / "peer_b" / "model.safetensors").exists()
    figures = json.loads((tmp_path / "smkd-42" / "results.json").read_text())
    assert figures["eval_train_noise_rate"] == pytest.approx(0.4, abs=0.001)

    start(monkeypatch, *argv)
    again = capsys.readouterr().out
    assert again.count("done before") == 2 and "train_runtime" not in again
    argv[argv.index("--num_train_epochs") + 1] = 2
    with pytest.raises(ValueError, match=r"holds a run with {'epochs': 1\.0}, asked for is {'epochs': 2\.0}"):
        start(monkeypatch, *argv)


METHODS = [
    ["--method", "ce", "--noise", "symmetric"],
    ["--method", "mylc", "--noise", "circular", "--models", "test_resnet"],
    ["--method", "proselflc", "--noise", "pair_flip", "--holdout", "0.25", "--dynamics", "True"],
    [
        "--method",
        "smkd",
        "--refine",
        "label_smoothing",
        "--refine_args",
        "eps=0.2",
        "--loss_args",
        "eta=inf",
        "b2=0",
        "normalize=batch",
    ],
    ["--method", "mkd", "--noise", "none", "--models", "test_resnet", "test_resnet", "test_resnet"],
]


@pytest.mark.parametrize("more", METHODS, ids=[m[1] for m in METHODS])
def test_cifar100_noise(more, tmp_path, pictures, monkeypatch):
    """Any method by name, any noise, one network or several."""
    out = tmp_path / "out"
    models = [] if "--models" in more else ["--models", "test_resnet", "test_efficientnet"]
    fixed = ["--data", pictures, "--output_dir", out, "--num_train_epochs", 1, "--per_device_train_batch_size", 8]
    start(monkeypatch, "cifar100_noise.py", *fixed, *models, *more)
    figures = json.loads((out / "results.json").read_text())
    assert 0 <= figures["eval_accuracy"] <= 1 and figures["method"] == more[1]
    assert len(list((out / "dynamics").glob("*.parquet"))) == ("--dynamics" in more)
    rate = 0.0 if "none" in more else 0.4
    assert figures["train_noise_rate"] == pytest.approx(rate, abs=0.1)  # of a hold-out: about


STAGED = {
    "joint": ["1-joint", "2-soft_labels"],
    "tf_kd_self": ["1-ce", "2-tf_kd_self"],
    "forward_correction": ["1-ce", "2-forward_correction"],
    "backward_correction": ["1-ce", "2-backward_correction"],
    "t_revision": ["1-ce", "2-reweighting", "3-t_revision"],
    "dmi": ["1-ce", "2-dmi"],
}
TAUGHT = {n for n in list_losses() if loss_class(n).reads & {"teacher", "teacher_features"}} - {"tf_kd_self", "pcl"}
OTHERS = [n for n in [*list_losses(), "cdr"] if n not in {m[1] for m in METHODS} | {"soft_labels"} | TAUGHT]


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_by_name(name, tmp_path, pictures, monkeypatch):
    """Also those of several stages, each of which leaves its folder, and those that want features or a table."""
    networks = ["test_resnet"] * (2 if name != "cdr" and loss_class(name).peers else 1)
    argv = ["--data", pictures, "--output_dir", tmp_path / "out", "--num_train_epochs", 1, "--method", name]
    more = ["--estimator", "dual_t"] if name == "backward_correction" else []
    start(monkeypatch, "cifar100_noise.py", *argv, "--models", *networks, "--per_device_train_batch_size", 8, *more)
    assert 0 <= json.loads((tmp_path / "out" / "results.json").read_text())["eval_accuracy"] <= 1
    assert sorted(p.name for p in (tmp_path / "out").glob("[0-9]-*")) == STAGED.get(name, [])
    assert (tmp_path / "out" / "pictures").exists()


def test_what_the_recipe_fills_in_fits_the_method(tmp_path, pictures, monkeypatch):
    """Joint keeps ten epochs of each sample, not as many as there are samples; a known matrix needs no stage before."""
    argv = ["--data", pictures, "--num_train_epochs", 1, "--models", "test_resnet", "--per_device_train_batch_size", 8]
    start(monkeypatch, "cifar100_noise.py", *argv, "--output_dir", tmp_path / "joint", "--method", "joint")
    saved = load_file(next((tmp_path / "joint" / "1-joint").glob("checkpoint-*/model.safetensors")))
    assert saved["criterion.outputs.rows"].shape == (32, 10, 4)
    known = ["--output_dir", tmp_path / "known", "--method", "backward_correction", "--estimator", "known"]
    start(monkeypatch, "cifar100_noise.py", *argv, *known)
    saved = load_file(next((tmp_path / "known").glob("checkpoint-*/model.safetensors")))
    assert saved["criterion.transition"].diagonal().tolist() == pytest.approx([0.6] * 4)
    with pytest.raises(SystemExit, match="--noise none has no known matrix"):
        start(monkeypatch, "cifar100_noise.py", *argv, *known[2:], "--output_dir", tmp_path / "none", "--noise", "none")


def test_stages_continue_where_they_should(tmp_path, pictures, monkeypatch):
    """T-revision goes on with the network of the stage before; a stage that was done is not trained again."""
    argv = ["--data", pictures, "--output_dir", tmp_path / "out", "--method", "t_revision", "--models", "test_resnet"]
    argv += [
        "--stage_epochs",
        1,
        2,
        1,
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        8,
        "--save_total_limit",
        9,
    ]
    start(monkeypatch, "cifar100_noise.py", *argv)
    seen = {
        p.parent.name: sorted(c.name for c in p.parent.glob("checkpoint-*"))
        for p in (tmp_path / "out").glob("*/checkpoint-4")
    }
    assert seen == {
        "1-ce": ["checkpoint-4"],
        "2-reweighting": ["checkpoint-4", "checkpoint-8"],
        "3-t_revision": ["checkpoint-4"],
    }
    weights = [load_file(tmp_path / "out" / c / "model.safetensors")["peers.0.fc.weight"]
               for c in ("1-ce/checkpoint-4", "2-reweighting/checkpoint-8", "3-t_revision/checkpoint-4")]  # fmt: skip
    assert 0 < (weights[2] - weights[1]).abs().max() < 1e-4 < (weights[1] - weights[0]).abs().max()
    correction = load_file(tmp_path / "out" / "3-t_revision" / "checkpoint-4" / "model.safetensors")["criterion.delta"]
    assert 0 < correction.abs().max() < 1e-4
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/checkpoint-*/model.safetensors")}
    results = (tmp_path / "out" / "results.json").read_text()
    start(monkeypatch, "cifar100_noise.py", *argv)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (tmp_path / "out" / "results.json").read_text() == results


@pytest.mark.parametrize(("more", "match"), [
    (["--method", "joint", "--models", "test_resnet", "test_resnet"], "joint takes 2 stages, for one network"),
    (["--method", "dmi", "--models", "test_resnet", "--stage_epochs", 1], r"\[1.0\]: dmi has 2 stages, \[.ce., .dmi.\]"),
])  # fmt: skip
def test_stages_that_do_not_fit_are_refused(more, match, tmp_path, pictures, monkeypatch):
    with pytest.raises(SystemExit, match=match):
        start(monkeypatch, "cifar100_noise.py", "--data", pictures, "--output_dir", tmp_path / "out", *more)


def test_cifar100_noise_on_part_of_the_data(tmp_path, pictures, monkeypatch):
    """The first classes; rows that a column names, with the test pictures of their classes; labels of a column; a size."""
    rows = datasets.load_dataset(str(pictures))
    given = [(k + i % 2) % 3 for i, k in enumerate(rows["train"]["label"])]
    train = rows["train"].add_column("exact", [k < 2 for k in rows["train"]["label"]]).add_column("human", given)
    other = tmp_path / "other"
    other.mkdir()
    train.to_parquet(other / "train-00000-of-00001.parquet")
    blank = {"exact": [True] * 8, "human": rows["test"]["label"]}
    test = rows["test"].add_column("exact", blank["exact"]).add_column("human", blank["human"])
    test.to_parquet(other / "test-00000-of-00001.parquet")

    seen = []
    original = MutualDistillationTrainer.__init__

    def watch(self, models, loss, args, **kwargs):
        seen.append((kwargs["train_dataset"], kwargs["eval_dataset"]))
        original(self, models, loss, args, **kwargs)

    monkeypatch.setattr(MutualDistillationTrainer, "__init__", watch)
    argv = ["--data", other, "--models", "test_resnet", "--num_train_epochs", 1, "--method", "ce"]
    parts = ["--classes", 3, "--output_dir", tmp_path / "classes", "--size", 24, "--augment", "False"]
    start(monkeypatch, "cifar100_noise.py", *argv, *parts)
    train, test = seen.pop()
    assert (train.num_classes, len(train), len(test)) == (3, 24, 6) and train[0]["pixel_values"].shape == (3, 24, 24)
    train.set_epoch(1)
    before = train[0]["pixel_values"]
    train.set_epoch(2)
    assert before.equal(train[0]["pixel_values"])

    human = ["--where", "exact", "--noise", "human", "--output_dir", tmp_path / "human"]
    start(monkeypatch, "cifar100_noise.py", *argv, *human)
    train, test = seen.pop()
    assert (train.num_classes, len(train), len(test)) == (4, 16, 4) and set(test.labels) == {0, 1}
    kept = [i for i, k in enumerate(rows["train"]["label"]) if k < 2]
    assert train.labels.tolist() == [given[i] for i in kept] and set(train.clean_labels) == {0, 1}
    with pytest.raises(SystemExit, match="--classes 5: expected 2 to 4"):
        start(monkeypatch, "cifar100_noise.py", *argv, "--classes", 5, "--output_dir", tmp_path / "five")


def test_cifar100_noise_refuses_unknown_noise(tmp_path, pictures, monkeypatch):
    with pytest.raises(SystemExit, match="--noise salt: expected symmetric"):
        start(monkeypatch, "cifar100_noise.py", "--data", pictures, "--noise", "salt", "--output_dir", tmp_path)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_finetune_mylc(source, tmp_path, pictures, monkeypatch, capsys):
    """From a local folder (same classes: head kept, r primed) and from a file (other classes: new head)."""
    model = timm.create_model("test_resnet", num_classes=4 if source == "folder" else 7)
    folder = export(model, tmp_path / "pretrained", list("wxyz") if source == "folder" else None)
    given = ["--model", folder, "--prime", "True"]
    if source == "file":
        given = ["--model", "test_resnet", "--weights", folder / "model.safetensors", "--weights_classes", 7]
    out = tmp_path / "out"
    argv = ["--data", pictures, "--rate", 0.25, "--size", 32, "--num_train_epochs", 1, "--output_dir", out, *given]
    start(monkeypatch, "finetune_mylc.py", *argv)
    assert ("before training" in capsys.readouterr().out) == (source == "folder")
    assert 0 <= json.loads((out / "results.json").read_text())["eval_accuracy"] <= 1
    assert next(out.glob("checkpoint-*/loss.safetensors"))
    assert (out / "pictures" / "curves.png").exists()
    timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)


def test_another_experiment_does_not_go_on_from_these_checkpoints(tmp_path, pictures, monkeypatch):
    """The default folder is the same for every method: smkd after ce would start, and end, with ce's weights."""
    argv = ["--data", pictures, "--models", "test_resnet", "--num_train_epochs", 1, "--output_dir", tmp_path / "out"]
    start(monkeypatch, "cifar100_noise.py", *argv, "--method", "ce")
    with pytest.raises(ValueError, match=r"holds a run with {'method': 'ce'}, asked for is {'method': 'mylc'}"):
        start(monkeypatch, "cifar100_noise.py", *argv, "--method", "mylc")
    start(monkeypatch, "cifar100_noise.py", *argv, "--method", "ce")


def distil(monkeypatch, folder, pictures, *more):
    argv = ["--data", pictures, "--student", "test_resnet", "--num_train_epochs", 1, "--per_device_train_batch_size", 7]
    start(monkeypatch, "distill_teachers.py", *argv, "--holdout", 0.125, "--output_dir", folder, *more)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    """As export() writes them, of different kind."""
    folder = tmp_path_factory.mktemp("teachers")
    return [export(timm.create_model(name, num_classes=4), folder / name) for name in ("test_resnet", "test_convnext")]


TERMS = [
    ["--preset", "kd", "--teacher_epochs", "1"],
    ["--preset", "camkd"],
    ["--preset", "lr_ds"],
    ["--preset", "crd"],
    ["--terms", "ce + 0.5*aekd + 100*fitnet + 1000*at + vid", "--keep", "0.5"],
    ["--terms", "ce + ebkd", "--cache", "True", "--augment", "False"],
]


@pytest.mark.parametrize("more", TERMS, ids=lambda m: m[1])
def test_distill_teachers(more, tmp_path, pictures, two_teachers, monkeypatch):
    figures = distil(monkeypatch, tmp_path / "out", pictures, "--teachers", *two_teachers, *more)
    assert 0 <= figures["eval_accuracy"] <= 1
    assert (tmp_path / "out" / "influence.npy").exists() == ("lr_ds" in more or "--keep" in more)
    assert (tmp_path / "out" / "cache").exists() == ("--cache" in more)
    saved = next((tmp_path / "out").glob("checkpoint-*/model.safetensors"))
    assert not any("teacher" in key for key in load_file(saved))


def test_distill_teachers_that_are_trained_first(tmp_path, pictures, monkeypatch, capsys):
    """Each on its own labels; a second start trains none of them again."""
    more = ["--teachers", "test_resnet", "test_efficientnet", "--train_teachers", "True", "--teacher_rates", 0, 0.5]
    distil(monkeypatch, tmp_path / "out", pictures, *more, "--terms", "ce + camkd")
    out = capsys.readouterr().out
    assert "teacher 0, test_resnet, 0% of its labels wrong" in out and "teacher 1, test_efficientnet, 50%" in out
    before = (tmp_path / "out" / "teachers" / "1" / "peer_a" / "model.safetensors").stat().st_mtime_ns
    distil(monkeypatch, tmp_path / "out", pictures, *more, "--terms", "ce + camkd")
    assert "teacher 0," not in capsys.readouterr().out
    assert (tmp_path / "out" / "teachers" / "1" / "peer_a" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(("more", "match"), [
    (["--preset", "best"], "--preset best: expected one of kd, aver"),
    (["--teachers", "a", "b", "--teacher_rates", 0.4], r"teacher_rates \[0.4\]: expected one for each of 2"),
    (["--holdout", 0], r"--holdout 0.0: expected a share"),
])  # fmt: skip
def test_distill_teachers_refuses(more, match, tmp_path, pictures, monkeypatch):
    with pytest.raises(SystemExit, match=match):
        distil(monkeypatch, tmp_path / "out", pictures, *more)


def test_benchmark(tmp_path, monkeypatch, capsys):
    """Rows by part of their name; figure, goal, hardware and versions as JSON."""
    rows = ["loss alone [128, 100], eager", "AEKD", "noisy view"]
    start(monkeypatch, "benchmark.py", "--quick", "--rows", *rows, "--output", tmp_path / "b.json")
    out = json.loads((tmp_path / "b.json").read_text())
    assert len(out["rows"]) == 3 and {"torch", "timm", "kd-plugins"} <= set(out["versions"]) and out["device"]
    assert all(row["figure"] > 0 and row["goal"] > 0 for row in out["rows"].values())
    assert out["rows"]["noisy view, 2.4 million rows"]["figure"] < 20
    assert capsys.readouterr().out.count("| loss alone") == 1


def test_rows_of_the_benchmark_that_want_a_gpu():
    """What runs here of them: two networks cost more than one, and every loss has its call."""
    benchmark = runpy.run_path(str(RECIPES / "benchmark.py"))
    assert benchmark["two_peers_on_one"]("eager", True)[0] > 1
    assert 1 <= benchmark["peak_memory"](64, 2000, torch.float32)[0] < 1.25
    assert 1 <= benchmark["peak_memory"](64, 2000, torch.bfloat16)[0] < 1.25
    values = []
    for _, loss, call in benchmark["every_loss"]():
        loss.set_progress(0.5)
        values.append(call(loss))
    assert len(values) > 30 and all(value.isfinite() for value in values)
