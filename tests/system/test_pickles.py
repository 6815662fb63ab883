"""Files that would run code: weights, checkpoints, caches and data are never unpickled."""

import ast
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers.tiny import (
    CLASSES,
    Net,
    StopAt,
    hard,
    plain,
    to_tensor,
    trainer,
    view,
    vit,
)
from timm.task import resume_task_checkpoint

from kd_plugins import MyLC, find_suspects, predict_probs
from kd_plugins.audit.dynamics import read_dynamics, summarise
from kd_plugins.data import ImageView, cache_teachers
from kd_plugins.models import export, make_model, make_teacher
from kd_plugins.train.timm import StatefulClassificationTask


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


FORMS = {  # all the ways that torch and numpy write one
    "pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil, protocol=2)),
    "torch": lambda evil, path: torch.save({"state_dict": {"weight": evil}}, path),
    "old torch": lambda evil, path: torch.save(
        {"x": evil}, path, _use_new_zipfile_serialization=False
    ),
    "objects": lambda evil, path: path.write_bytes(npy(np.array([evil], object))),
}
forms = pytest.mark.parametrize("form", FORMS)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def poison(tmp_path):
    """poison(form, path) writes what must never run; in the end nothing of it has."""
    marker = tmp_path / "it has run"

    def write(form, path):
        FORMS[form](Evil(marker), path)
        return path

    yield write
    assert not marker.exists()


def test_the_poison_works(tmp_path):
    for k, form in enumerate(FORMS):
        marker, path = tmp_path / str(k), tmp_path / "file"
        FORMS[form](Evil(marker), path)
        if form == "objects":
            np.load(path, allow_pickle=True)
        elif form == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert marker.is_dir(), form


@forms
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors", "npz"])
def test_weights_that_would_run(tmp_path, poison, form, suffix):
    """The error names the file and says what was expected."""
    path = poison(form, tmp_path / f"teacher.{suffix}")
    name = "test_vit" if suffix == "npz" else "test_resnet"  # which alone reads numpy's archives
    expected = "expected safetensors, or a pickle of tensors"
    with pytest.raises(ValueError, match=expected) as raised:
        make_teacher(f"{name}={path}", CLASSES)
    assert str(path) in str(raised.value)


@forms
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "x.pth"])
def test_folders_that_would_run(tmp_path, poison, form, name):
    """Of a teacher, of a network that learns, of one that predicts."""
    folder = export(timm.create_model("test_resnet", num_classes=CLASSES), tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    poison(form, folder / name)
    for read in (
        lambda: make_teacher(folder, CLASSES),
        lambda: make_model(f"local-dir:{folder}", CLASSES),
        lambda: predict_probs(folder, view(16)),
        lambda: trainer(tmp_path / "run", [f"local-dir:{folder}", Net()]),
    ):
        with pytest.raises(
            ValueError, match=rf"weights of local-dir:{folder} are not read: expected safetensors"
        ):
            read()


def test_weights_that_do_not_fit_say_so(tmp_path):
    """Not every error is of a pickle."""
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        make_teacher(f"test_resnet={tmp_path / 'other.pth'}", CLASSES)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with the checkpoint of its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    hard(folder, [StopAt(2)]).train()
    return folder


@forms
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "scaler.pt",
    ],
)
def test_checkpoints_that_would_run(stopped, tmp_path, poison, form, name):
    """What is no archive of torch is refused by name; what is one is refused by torch."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    checkpoint = tmp_path / "checkpoint-2"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    poison(form, checkpoint / name)
    run = hard(tmp_path)
    if name == "scaler.pt":  # which a CPU has not
        run.accelerator.native_amp, run.accelerator.scaler = True, torch.amp.GradScaler("cpu")
    expected = rf"{name} is damaged|[Ww]eights.only|deserializing header"
    with pytest.raises(Exception, match=expected) as raised:
        run.train(resume_from_checkpoint=True)
    assert str(checkpoint) in "".join([str(raised.value), *getattr(raised.value, "__notes__", [])])


@pytest.mark.parametrize("name", ["run.json", "trainer_state.json"])
def test_damaged_checkpoints_are_named(tmp_path, name):
    hard(tmp_path, [StopAt(2)]).train()
    (tmp_path / "checkpoint-2" / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be resumed: {name} is damaged"):
        hard(tmp_path).train(str(tmp_path / "checkpoint-2"))


def test_arguments_in_a_checkpoint_are_not_read(tmp_path, poison):
    """training_args.bin is a pickle that the Trainer writes for its user; a run that goes on asks
    its own."""
    hard(tmp_path, [StopAt(2)]).train()
    poison("pickle", tmp_path / "checkpoint-2" / "training_args.bin")
    run = hard(tmp_path, [StopAt(4)])
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4


@forms
def test_state_of_a_loss_that_would_run(tmp_path, poison, form):
    """In a stock Trainer and in timm's loop, where the loss has a file or an entry of its own."""
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    plain(tmp_path, MyLC(window=20), vit(), **saving).train()
    poison(form, tmp_path / "checkpoint-3" / "loss.safetensors")
    with pytest.raises(Exception, match=r"loss\.safetensors is damaged|deserializing header"):
        plain(tmp_path, MyLC(window=20), vit(), max_steps=3).train(str(tmp_path / "checkpoint-3"))
    task = StatefulClassificationTask(Net(), MyLC(window=20), verbose=False)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        resume_task_checkpoint(task, str(poison(form, tmp_path / "last.pth.tar")))


@forms
@pytest.mark.parametrize("name", ["logits.npy", "done.npy", "key.json"])
def test_caches_that_would_run(tmp_path, poison, form, name):
    """Arrays that are none are computed again; a key that is none is refused."""
    data, folder = view(8, clean=False), tmp_path / "cache"
    made = np.array(cache_teachers(data, [Net()], folder).teacher_logits)
    poison(form, folder / name)
    if name == "key.json":
        with pytest.raises(ValueError, match=r"key\.json is not the key of a teacher cache"):
            cache_teachers(data, [Net()], folder)
    else:
        assert np.array_equal(cache_teachers(data, [Net()], folder).teacher_logits, made)


@forms
def test_dynamics_that_would_run(tmp_path, poison, form):
    path = poison(form, tmp_path / "step-00000001-rank-0.parquet")
    for read in (read_dynamics, summarise, lambda folder: find_suspects(dynamics=folder)):
        with pytest.raises(pa.ArrowInvalid, match=f"{path.name}.*parquet"):
            read(tmp_path)


def test_a_column_type_that_would_run(tmp_path, poison):
    """Parquet can name a type that pyarrow used to unpickle."""
    evil = poison("pickle", tmp_path / "evil").read_bytes()
    named = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": evil}
    schema = pa.schema([pa.field("index", pa.int32(), metadata=named)])
    pq.write_table(
        pa.table([pa.array([7], pa.int32())], schema=schema),
        tmp_path / "step-00000001-rank-0.parquet",
    )
    assert read_dynamics(tmp_path)["index"][:] == [7]


def test_data_that_would_run(tmp_path, poison):
    """What the recipes read a data set with, and pictures that are none."""
    evil = poison("pickle", tmp_path / "evil").read_bytes()
    for name in ("train.pkl", "train.npy", "folder.py", "train.tar"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        if name.endswith("tar"):
            with tarfile.open(folder / name, "w") as tar:
                for kind in ("pyd", "pickle", "pth"):
                    member = tarfile.TarInfo(f"a.{kind}")
                    member.size = len(evil)
                    tar.addfile(member, io.BytesIO(evil))
        else:
            (folder / name).write_bytes(evil)
        with pytest.raises(
            Exception,
            match=r"No \(supported\) data files|no longer supported|[Ww]eights.only|pickle",
        ):
            datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="cannot be read"):
        _ = ImageView([{"image": evil, "label": 0}] * 2, to_tensor)[0]


def test_nothing_of_ours_unpickles():
    """Neither by a module for it nor by a switch of torch, numpy and datasets; the recipes
    neither."""
    root = Path(__file__).parents[2]
    sources = [*root.glob("kd_plugins/**/*.py"), *root.glob("recipes/*.py")]
    assert len(sources) > 30
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            called = node.func if isinstance(node, ast.Call) else None
            names += [ast.unparse(called)] if called is not None else []
            names += [k.arg for k in node.keywords if k.arg] if called is not None else []
            bad = {
                "pickle",
                "cloudpickle",
                "dill",
                "joblib",
                "shelve",
                "marshal",
                "torch.load",
                "eval",
                "exec",
                "weights_only",
                "allow_pickle",
                "trust_remote_code",
            } & set(names)
            assert not bad, f"{path.name}:{node.lineno}: {bad}"
