"""What goes wrong on real machines: kills at any moment, full disks, folders that cannot be
written, data that change."""

import json
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
from helpers.processes import child
from helpers.tiny import (
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
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from kd_plugins import DynamicsCallback, MyLC, ProSelfLC, find_suspects, html_page
from kd_plugins.audit.dynamics import read_dynamics
from kd_plugins.data import ImageView
from kd_plugins.train import last_checkpoint
from kd_plugins.train.run_folder import STATE, is_finished

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
