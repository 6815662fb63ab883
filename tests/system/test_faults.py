"""What goes wrong on real machines: kills at any moment, full disks, folders that cannot be
written, data that change."""

import ast
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers.processes import child
from helpers.tiny import (
    CLASSES,
    Net,
    StopAt,
    difference,
    hard,
    jitter,
    plain,
    resnet,
    rows,
    state,
    to_tensor,
    trainer,
    view,
    vit,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.task import resume_task_checkpoint
from tqdm.auto import tqdm

from kd_plugins import DynamicsCallback, MyLC, ProSelfLC, find_suspects, html_page, predict_probs
from kd_plugins.audit.dynamics import read_dynamics, summarise
from kd_plugins.data import ImageView, cache_teachers
from kd_plugins.models import export, make_model, make_teacher
from kd_plugins.train import last_checkpoint
from kd_plugins.train.run_folder import STATE, is_finished
from kd_plugins.train.timm import StatefulClassificationTask

STEPS = 60


def mutual(folder):
    run = hard(folder, callbacks=[DynamicsCallback()], max_steps=STEPS, save_total_limit=3)
    run.train(resume_from_checkpoint=True)
    run.save_model(str(folder / "end"))


def stock(folder):
    """A plain Trainer that keeps one checkpoint, and a loss with state in a file of its own."""
    loss, model = MyLC(window=20) + ProSelfLC(), resnet()
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    data = ImageView(rows(), jitter)
    run = plain(folder, loss, model, data, max_steps=STEPS, logging_steps=20, **settings)
    run.train(resume_from_checkpoint=last_checkpoint(folder))
    run.save_model(str(folder / "end"))
    save_file(loss.state_dict(), folder / "end" / "loss.safetensors")


def step_of(folder):
    """The step of the newest checkpoint that was written to its end."""
    return max((int(p.name[11:]) for p in folder.glob("checkpoint-*") if is_finished(p)), default=0)


def visits(folder):
    return sorted(tuple(row.items()) for row in read_dynamics(folder / "dynamics").to_list())


def test_a_killed_process_keeps_no_lock_of_the_next():
    """tqdm's is one for all forks, once a bar was made before them."""

    def killed():
        with tqdm.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    list(tqdm([], disable=False))
    for work, code in [(killed, -signal.SIGKILL), (lambda: list(tqdm([], disable=False)), 0)]:
        process = child(work)
        process.join()
        assert process.exitcode == code


@pytest.mark.parametrize("train", [mutual, stock])
def test_ten_kills_and_nothing_lost(tmp_path, train):
    """SIGKILL at random moments, many of them while a checkpoint is being written: each time there
    is one to go on from; weights, state of the loss and dynamics end bit-equal."""
    quiet, often = tmp_path / "quiet", tmp_path / "often"
    process = child(train, quiet)
    process.join()
    assert process.exitcode == 0
    dice, half_written, reached = random.Random(0), 0, 0
    for kill in range(10):
        before = step_of(often)
        assert reached <= before < STEPS, f"{reached} -> {before} before kill {kill}"
        reached = before
        process = child(train, often)
        # As soon as the folder of the next checkpoint is there; else some time after it is whole.
        at_once, following = kill % 2 == 0, often / f"checkpoint-{before + 2}"
        while not following.exists() if at_once else step_of(often) == before:
            assert process.is_alive()
            time.sleep(0.0005 if at_once else 0.005)
        time.sleep(0.0 if at_once else dice.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        half_written += any(not (p / STATE).exists() for p in often.glob("checkpoint-*"))
        found = last_checkpoint(often)
        assert found == (str(often / f"checkpoint-{step_of(often)}") if step_of(often) else None)
    assert half_written > 0  # some kills hit what they were meant to
    process = child(train, often)
    process.join()
    assert process.exitcode == 0
    for name in ["model.safetensors"] + ["loss.safetensors"] * (train is stock):
        ends = [load_file(folder / "end" / name) for folder in (quiet, often)]
        assert difference(*ends) == 0.0
    if train is mutual:
        assert visits(often) == visits(quiet)
    assert not list(often.rglob("*.part"))


def test_a_full_disk_loses_nothing(tmp_path):
    """The run ends with the system's own words; when there is room again it goes on to the same
    weights."""
    whole, short = tmp_path / "whole", tmp_path / "short"

    def cramped(folder, errors):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = hard(folder, max_steps=12)
        run.add_callback(Fill(5))
        try:
            run.train()
        except Exception as error:
            errors.write_text(f"{type(error).__name__}: {error}")
            raise SystemExit(3) from error

    run = hard(whole, max_steps=12)
    run.train()
    errors = tmp_path / "error.txt"
    process = child(cramped, short, errors)
    process.join()
    assert process.exitcode == 3
    assert "File too large" in errors.read_text() or "No space" in errors.read_text(), (
        errors.read_text()
    )
    assert step_of(short) == 4  # the one before
    again = hard(short, max_steps=12)
    again.train(resume_from_checkpoint=True)
    assert difference(state(again.model), state(run.model)) == 0.0


class Fill:
    """From this step on no file can grow beyond some bytes, as on a disk that is full."""

    def __new__(cls, step):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))

        return Callback()


def test_a_folder_that_cannot_be_written(tmp_path):
    """Said before anything is trained."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        trainer(tmp_path / "file" / "run", save_strategy="epoch").train()


@pytest.mark.parametrize("change", ["fewer rows", "other labels"])
def test_data_that_changed_under_a_resumed_run(tmp_path, change):
    """Refused with what differs; the same data go on."""
    hard(tmp_path, [StopAt(4)]).train()
    other = (
        view(40) if change == "fewer rows" else ImageView(rows(wrong=0.6), to_tensor, clean="clean")
    )
    match = "data.rows was 48 and is now 40" if change == "fewer rows" else r"data\.labels was"
    with pytest.raises(ValueError, match=rf"checkpoint-4 belongs to another run: .*{match}"):
        trainer(tmp_path, train=other).train(resume_from_checkpoint=True)
    run = hard(tmp_path, [StopAt(6)])
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    saved = json.loads((tmp_path / "checkpoint-6" / "run.json").read_text())["run"]
    assert {"data.rows", "data.labels"} <= set(saved)  # these rows name no classes


# ---------------------------------------------------------------------------------------- pickles


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


# ------------------------------------------------------------------------------------------ pages


def test_file_names_do_not_reach_the_page(tmp_path):
    """Readable or broken; names of classes, which do, are in the tests of the suspects."""
    name = "<script>alert(1)</script>".replace("/", "\u2215") + '"onerror=x.png'
    Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / f"broken{name}").write_bytes(b"\x89PNG broken")
    data = [
        {"image": str(tmp_path / part), "label": k}
        for k, part in enumerate((name, f"broken{name}"))
    ]
    suspects = find_suspects([0, 1], np.array([[0.1, 0.9], [0.8, 0.2]]))
    text = html_page(suspects, data, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("data:image/") == 1 and '"rows":[[' in text
    assert not [
        part for part in ("alert", "onerror", "broken", "\\u2215", tmp_path.name) if part in text
    ]
