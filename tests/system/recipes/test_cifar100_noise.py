"""Any method, any noise."""

import json

import datasets
import pytest
from helpers.recipes import recipe_of, start
from safetensors.torch import load_file

from kd_plugins import MutualDistillationTrainer, list_losses, loss_class

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
    """Methods by name, with every kind of noise, with one network and with several."""
    out = tmp_path / "out"
    models = [] if "--models" in more else ["--models", "test_resnet", "test_efficientnet"]
    fixed = [
        "--data",
        pictures,
        "--output_dir",
        out,
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        8,
    ]
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


TAUGHT = {
    n for n in list_losses() if loss_class(n).required_inputs & {"teacher", "teacher_features"}
} - {
    "tf_kd_self",
    "pcl",
}


OTHERS = [
    n
    for n in [*list_losses(), "cdr"]
    if n not in {m[1] for m in METHODS} | {"soft_labels"} | TAUGHT
]
# one that has stages, two views, a callback, a table, peers, maps, or needs the noise
TRAINED = [*STAGED, "cdr", "co_teaching", "divide_mix", "elr", "ffl"]


def command(name, pictures, folder):
    networks = ["test_resnet"] * (2 if name != "cdr" and loss_class(name).num_peers > 1 else 1)
    argv = ["--data", pictures, "--output_dir", folder, "--num_train_epochs", 1, "--method", name]
    argv += ["--models", *networks, "--per_device_train_batch_size", 8]
    return [*argv, "--estimator", "dual_t"] if name == "backward_correction" else argv


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_can_be_made_by_name(name, tmp_path, pictures, monkeypatch):
    recipe = recipe_of(monkeypatch, "cifar100_noise.py", *command(name, pictures, tmp_path / "out"))
    s, _, stages = recipe["options"]()
    assert s.method == name and len(stages) == max(len(STAGED.get(name, [])), 1)


@pytest.mark.parametrize("name", TRAINED)
def test_methods_train_by_name(name, tmp_path, pictures, monkeypatch):
    """Methods of several stages leave a folder per stage."""
    start(monkeypatch, "cifar100_noise.py", *command(name, pictures, tmp_path / "out"))
    assert 0 <= json.loads((tmp_path / "out" / "results.json").read_text())["eval_accuracy"] <= 1
    assert sorted(p.name for p in (tmp_path / "out").glob("[0-9]-*")) == STAGED.get(name, [])
    assert (tmp_path / "out" / "pictures").exists()


def test_what_the_recipe_fills_in_fits_the_method(tmp_path, pictures, monkeypatch):
    """Joint keeps ten epochs of each sample. A known matrix needs no first stage."""
    argv = [
        "--data",
        pictures,
        "--num_train_epochs",
        1,
        "--models",
        "test_resnet",
        "--per_device_train_batch_size",
        8,
    ]
    start(
        monkeypatch,
        "cifar100_noise.py",
        *argv,
        "--output_dir",
        tmp_path / "joint",
        "--method",
        "joint",
    )
    saved = load_file(next((tmp_path / "joint" / "1-joint").glob("checkpoint-*/model.safetensors")))
    assert saved["criterion.outputs.rows"].shape == (32, 10, 4)
    known = [
        "--output_dir",
        tmp_path / "known",
        "--method",
        "backward_correction",
        "--estimator",
        "known",
    ]
    start(monkeypatch, "cifar100_noise.py", *argv, *known)
    saved = load_file(next((tmp_path / "known").glob("checkpoint-*/model.safetensors")))
    assert saved["criterion.transition"].diagonal().tolist() == pytest.approx([0.6] * 4)
    with pytest.raises(SystemExit, match="--noise none has no known matrix"):
        start(
            monkeypatch,
            "cifar100_noise.py",
            *argv,
            *known[2:],
            "--output_dir",
            tmp_path / "none",
            "--noise",
            "none",
        )


def test_stages_continue_where_they_should(tmp_path, pictures, monkeypatch):
    """T-revision continues with the network of stage 2. Finished stages are not repeated."""
    argv = [
        "--data",
        pictures,
        "--output_dir",
        tmp_path / "out",
        "--method",
        "t_revision",
        "--models",
        "test_resnet",
    ]
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
    weights = [
        load_file(tmp_path / "out" / c / "model.safetensors")["peers.0.fc.weight"]
        for c in ("1-ce/checkpoint-4", "2-reweighting/checkpoint-8", "3-t_revision/checkpoint-4")
    ]
    assert 0 < (weights[2] - weights[1]).abs().max() < 1e-4 < (weights[1] - weights[0]).abs().max()
    correction = load_file(
        tmp_path / "out" / "3-t_revision" / "checkpoint-4" / "model.safetensors"
    )["criterion.delta"]
    assert 0 < correction.abs().max() < 1e-4
    before = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/checkpoint-*/model.safetensors")
    }
    results = (tmp_path / "out" / "results.json").read_text()
    start(monkeypatch, "cifar100_noise.py", *argv)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (tmp_path / "out" / "results.json").read_text() == results


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ["--method", "joint", "--models", "test_resnet", "test_resnet"],
            "joint takes 2 stages, for one network",
        ),
        (
            ["--method", "dmi", "--models", "test_resnet", "--stage_epochs", 1],
            r"\[1.0\]: dmi has 2 stages, \[.ce., .dmi.\]",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(more, match, tmp_path, pictures, monkeypatch):
    with pytest.raises((SystemExit, ValueError), match=match):
        start(
            monkeypatch,
            "cifar100_noise.py",
            "--data",
            pictures,
            "--output_dir",
            tmp_path / "out",
            *more,
        )


def test_cifar100_noise_on_part_of_the_data(tmp_path, pictures, monkeypatch):
    """The options --classes, --where, --size, --augment, and --noise with the name of a column."""
    rows = datasets.load_dataset(str(pictures))
    given = [(k + i % 2) % 3 for i, k in enumerate(rows["train"]["label"])]
    train = (
        rows["train"]
        .add_column("exact", [k < 2 for k in rows["train"]["label"]])
        .add_column("human", given)
    )
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
    parts = [
        "--classes",
        3,
        "--output_dir",
        tmp_path / "classes",
        "--size",
        24,
        "--augment",
        "False",
    ]
    start(monkeypatch, "cifar100_noise.py", *argv, *parts)
    train, test = seen.pop()
    assert (train.num_classes, len(train), len(test)) == (3, 24, 6) and train[0][
        "pixel_values"
    ].shape == (3, 24, 24)
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
    with pytest.raises(ValueError, match="classes=5: expected 2 to 4"):
        start(
            monkeypatch,
            "cifar100_noise.py",
            *argv,
            "--classes",
            5,
            "--output_dir",
            tmp_path / "five",
        )


def test_cifar100_noise_refuses_unknown_noise(tmp_path, pictures, monkeypatch):
    with pytest.raises(ValueError, match="noise salt: expected symmetric"):
        start(
            monkeypatch,
            "cifar100_noise.py",
            "--data",
            pictures,
            "--noise",
            "salt",
            "--output_dir",
            tmp_path,
        )


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        (["--noise", "none"], 0.0),
        (["--noise", "none", "--rate", 0.2], 0.2),
        ([], 0.4),
        (["--rate", 0.0], 0.0),
    ],
)
def test_what_co_teaching_forgets(more, rate, monkeypatch):
    """The default is the noise rate, and 0 without noise. An explicit --rate wins."""
    recipe = recipe_of(monkeypatch, "cifar100_noise.py", "--method", "co_teaching", *more)
    s, *_ = recipe["options"]()
    assert recipe["make_loss"](s, "co_teaching", [None, None]).select.forget == s.rate == rate


def test_the_rate_of_given_labels_is_counted(tmp_path, pictures, monkeypatch):
    """The column k // 2 has 24 of 32 labels wrong, and Co-teaching forgets as many."""
    argv = [*command("co_teaching", pictures, tmp_path / "out"), "--noise", "coarse_label"]
    start(monkeypatch, "cifar100_noise.py", *argv)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rate"] == 0.75
    assert "forget=0.75" in (tmp_path / "out" / "peer_a" / "README.md").read_text()


def test_arguments_of_cdr_are_those_of_its_loss(tmp_path, pictures, monkeypatch):
    argv = [*command("cdr", pictures, tmp_path / "out"), "--loss_args", "nonsense=3"]
    with pytest.raises(TypeError, match="CE has no argument 'nonsense'"):
        start(monkeypatch, "cifar100_noise.py", *argv)
