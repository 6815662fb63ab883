"""Teachers and a student."""

import json

import pytest
from helpers.recipes import recipe_of, start
from safetensors.torch import load_file

from kd_plugins import MutualDistillationTrainer


def distil(monkeypatch, folder, pictures, *more):
    argv = [
        "--data",
        pictures,
        "--student",
        "test_resnet",
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        7,
    ]
    start(
        monkeypatch, "distill_teachers.py", *argv, "--holdout", 0.125, "--output_dir", folder, *more
    )
    return json.loads((folder / "results.json").read_text())


TERMS = [
    ["--preset", "kd"],
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


def test_a_teacher_does_not_see_what_is_held_out(tmp_path, pictures, monkeypatch):
    """cifar100_noise.py trains the teacher; with the same --holdout it sees the student's rows."""
    seen = []
    original = MutualDistillationTrainer.__init__

    def watch(self, *args, **kwargs):
        seen.append(kwargs["train_dataset"])
        original(self, *args, **kwargs)

    monkeypatch.setattr(MutualDistillationTrainer, "__init__", watch)
    argv = ["--data", pictures, "--models", "test_resnet", "--method", "ce", "--noise", "none"]
    argv += ["--holdout", 0.125, "--augment", "False", "--num_train_epochs", 1, "--seed", 7]
    start(monkeypatch, "cifar100_noise.py", *argv, "--output_dir", tmp_path / "teacher")
    more = [
        "--teachers",
        tmp_path / "teacher" / "peer_a",
        "--augment",
        "False",
        "--preset",
        "lr_ds",
    ]
    distil(monkeypatch, tmp_path / "student", pictures, *more)
    teacher, student = seen
    assert len(teacher) == len(student) == 28
    assert all(
        a["pixel_values"].equal(b["pixel_values"]) for a, b in zip(teacher, student, strict=True)
    )


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--preset", "best"], "--preset best: expected one of kd, aver"),
        (["--holdout", 0], r"--holdout 0.0: expected a share"),
        (
            [
                "--terms",
                "ce + fitnet",
                "--teachers",
                "test_resnet",
                "--cache",
                "True",
                "--augment",
                "False",
            ],
            r"--terms ce \+ fitnet: expected .*logits \(they read \['teacher_features'\]\)",
        ),
        (
            ["--terms", "ce + aver", "--teachers", "test_resnet", "--cache", "True"],
            "--cache True --augment True",
        ),
        (
            ["--terms", "ce", "--cache", "True", "--augment", "False"],
            r"--terms ce: expected .* and terms on the teachers' logits \(they read \[\]\)",
        ),
        (
            ["--terms", "ce + kdd", "--teachers", "test_resnet"],
            "unknown loss 'kdd': did you mean kd",
        ),
        (
            ["--terms", "ce + x*kd", "--teachers", "test_resnet"],
            r"--terms ce \+ x\*kd: expected WEIGHT\*NAME",
        ),
        (["--terms", "ce + kd"], r"--terms ce \+ kd --keep 1.0: expected --teachers"),
        (
            ["--teachers", "runs/none"],
            "runs/none: expected a timm name, NAME=FILE or a folder that export",
        ),
        (
            ["--student", "resnet99", "--terms", "ce"],
            "resnet99: expected a timm name, NAME=FILE",
        ),
    ],
)
def test_distill_teachers_refuses(more, match, tmp_path, pictures, monkeypatch):
    """It is refused before it claims the folder, so the corrected command can use the folder."""
    with pytest.raises((SystemExit, ValueError), match=match):
        distil(monkeypatch, tmp_path / "out", pictures, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", [["--preset", "kd"], ["--preset=kd"], ["--pres", "kd"]], ids=str)
def test_a_preset_is_read_however_it_is_written(preset, monkeypatch):
    """A preset sets schedule and terms; explicit options win."""
    recipe = recipe_of(
        monkeypatch, "distill_teachers.py", "--teachers", "x", "--weight_decay", 0.1, *preset
    )
    s, args = recipe["options"]()
    assert (s.terms, args.num_train_epochs, args.lr_decay, args.weight_decay) == (
        "0.1*ce + 0.9*kd",
        240,
        0.1,
        0.1,
    )


def test_a_preset_without_a_name(monkeypatch):
    with pytest.raises(SystemExit, match="--preset: expected one argument"):
        recipe_of(monkeypatch, "distill_teachers.py", "--teachers", "x", "--preset")["options"]()
