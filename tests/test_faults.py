"""What goes wrong on real machines: kills at any moment, full disks, folders that cannot be written, data that change."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
from _tiny import difference, hard, rows, state, to_tensor, trainer, view
from safetensors.torch import load_file

from kd_plugins import DynamicsCallback
from kd_plugins.data import ImageView
from kd_plugins.dynamics import read_dynamics
from kd_plugins.trainer import last_checkpoint

STEPS = 60
fork = multiprocessing.get_context("fork")  # what is imported stays imported: a start takes no seconds


def train(folder):
    run = hard(folder, callbacks=[DynamicsCallback()], max_steps=STEPS, save_total_limit=3)
    run.train(resume_from_checkpoint=True)
    run.save_model(str(folder / "end"))


def child(work, *args):
    """A process of its own, that is told nothing of its parent's death or life."""

    def quiet():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        work(*args)

    process = fork.Process(target=quiet)
    process.start()
    return process


def step_of(folder):
    found = last_checkpoint(folder)
    return int(found.rsplit("-", 1)[1]) if found else 0


def visits(folder):
    return sorted(tuple(row.items()) for row in read_dynamics(folder / "dynamics").to_list())


def test_twenty_kills_and_nothing_lost(tmp_path):
    """SIGKILL at random moments, many of them while a checkpoint is being written; weights and dynamics end bit-equal."""
    quiet, often = tmp_path / "quiet", tmp_path / "often"
    process = child(train, quiet)
    process.join()
    assert process.exitcode == 0
    dice, half_written = random.Random(0), 0
    for kill in range(20):
        before = step_of(often)
        assert before < STEPS, f"it came to its end before kill {kill}"
        process = child(train, often)
        at_once = (
            kill % 2 == 0
        )  # as soon as the folder of the next checkpoint is there; else some time after it is whole
        deadline = time.monotonic() + 60
        while not (often / f"checkpoint-{before + 2}").exists() if at_once else step_of(often) == before:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.0005)
        time.sleep(0.0 if at_once else dice.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        half_written += any(not (p / "trainer_state.json").exists() for p in often.glob("checkpoint-*"))
    assert half_written > 0  # some kills hit what they were meant to
    process = child(train, often)
    process.join()
    assert process.exitcode == 0
    ends = [load_file(folder / "end" / "model.safetensors") for folder in (quiet, often)]
    assert difference(*ends) == 0.0
    assert visits(often) == visits(quiet)
    assert not list(often.rglob("*.part"))


def test_a_full_disk_loses_nothing(tmp_path):
    """The run ends with the system's own words; when there is room again it goes on to the same weights."""
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
    assert "File too large" in errors.read_text() or "No space" in errors.read_text(), errors.read_text()
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
    hard(tmp_path, max_steps=4).train()
    other = view(40) if change == "fewer rows" else ImageView(rows(wrong=0.6), to_tensor, clean="clean")
    match = "48 rows, now 40" if change == "fewer rows" else "other labels in as many rows"
    with pytest.raises(ValueError, match=rf"checkpoint-4 was trained on other data: {match}"):
        trainer(tmp_path, train=other).train(resume_from_checkpoint=True)
    run = hard(tmp_path, max_steps=6)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert set(json.loads((tmp_path / "checkpoint-6" / "training_data.json").read_text())) == {"rows", "labels"}
