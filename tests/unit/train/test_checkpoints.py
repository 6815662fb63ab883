"""A run that goes on from a checkpoint is the run that was not interrupted, bit by bit."""

import signal
from pathlib import Path

import pytest
import torch
from helpers.processes import child
from helpers.tiny import Killed, Net, Recorder, difference, hard, state, trainer, view
from safetensors.torch import load_file

from kd_plugins import CE
from kd_plugins.train import last_checkpoint

STEPS = 12  # two epochs of six batches of eight


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    torch.manual_seed(1)
    run = hard(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def equal(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert difference(state(resumed.model), state(whole.model)) == 0
    momentum = [
        s["momentum_buffer"]
        for run in (resumed, whole)
        for s in run.optimizer.state_dict()["state"].values()
    ]
    half = len(momentum) // 2
    assert half > 0
    assert all(torch.equal(a, b) for a, b in zip(momentum[:half], momentum[half:], strict=True))


@pytest.mark.parametrize(("step", "workers"), [(4, 0), (6, 0), (10, 0), (4, 2)])
def test_resume_is_bit_equal(whole, tmp_path, step, workers):
    """In the middle of an epoch, at its end, in the middle of the next: weights, BatchNorm, r,
    momentum."""
    torch.manual_seed(99)
    run = hard(tmp_path, save_strategy="no", dataloader_num_workers=workers)
    run.train(f"{whole.args.output_dir}/checkpoint-{step}")
    equal(run, whole)
    assert whole.model.criterion.refine[0].r > 0


def test_run_depends_on_every_source_of_chance(whole, tmp_path):
    """Else bit-equality would be easy."""
    run = hard(tmp_path, save_strategy="no", seed=5)
    run.train()
    assert difference(state(run.model), state(whole.model)) > 0
    item = [run.train_dataset[0]["pixel_values"] for run.train_dataset.seed in range(4)]
    assert len({x.sum().item() for x in item}) > 1


def test_killed_run_resumes_bit_equal(whole, tmp_path):
    killed = child(lambda: hard(tmp_path, [Killed()]).train())
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    run = hard(tmp_path)
    run.train(resume_from_checkpoint=True)
    equal(run, whole)


def test_resume_takes_the_last_complete_checkpoint(whole, tmp_path):
    """A kill while a checkpoint is written leaves one without its last file, the Trainer's
    state."""
    assert last_checkpoint(tmp_path) is None
    run = hard(tmp_path)
    run.train(resume_from_checkpoint=True)  # nothing there: from the start
    equal(run, whole)
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    seen = Recorder()
    run = hard(tmp_path, [seen], save_strategy="no")
    run.train(resume_from_checkpoint=True)
    equal(run, whole)
    assert len(seen.batches) == 4


def test_best_model_restores_both_peers(tmp_path):
    run = hard(
        tmp_path,
        evaluate=view(20),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=0.02,
    )
    run.train()
    losses = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    best = tmp_path / f"checkpoint-{6 * (1 + losses.index(max(losses)))}"
    other = tmp_path / f"checkpoint-{6 * (1 + losses.index(min(losses)))}"
    assert Path(run.state.best_model_checkpoint) == best != other
    saved, left = (load_file(path / "model.safetensors") for path in (best, other))
    now = run.model.state_dict()
    assert difference(now, saved) == 0
    for part in ("peers.0.", "peers.1.", "criterion."):
        assert any(
            (now[name] - left[name]).abs().max() > 0 for name in now if name.startswith(part)
        ), part


def test_a_finished_run_comes_back_with_its_best_model(tmp_path):
    """A job that was killed between its last step and its evaluation runs again."""

    def run():
        again = hard(
            tmp_path,
            evaluate=view(20),
            max_steps=12,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=True,
            learning_rate=0.02,
        )
        again.train(resume_from_checkpoint=True)
        return again

    first = run()
    assert not first.state.best_model_checkpoint.endswith("-12")  # else this could not fail
    assert difference(first.model.state_dict(), run().model.state_dict()) == 0


def test_tied_weights_are_saved_and_resumed(tmp_path):
    """safetensors refuses tensors that share memory."""

    def run():
        network = Net(1)
        network.again = network.fc
        data = {"train": view(20), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return trainer(tmp_path, [network], CE(), **data)

    first = run()
    first.train()
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(first.model.state_dict(), again.model.state_dict()) == 0
    network = again.peers[0]
    assert network.again.weight is network.fc.weight


def test_channels_last_networks_are_saved_and_resumed(tmp_path):
    """safetensors refuses a strided weight."""

    def make(**kwargs):
        models = [Net(1).to(memory_format=torch.channels_last), Net(2)]
        return trainer(tmp_path, models, num_train_epochs=1, **kwargs)

    run = make(save_strategy="steps", save_steps=3)
    assert not run.peers[0].conv.weight.is_contiguous()
    run.train()
    again = make()
    again.train(str(tmp_path / "checkpoint-3"))
    assert not again.peers[0].conv.weight.is_contiguous()
    assert difference(state(run.model), state(again.model)) == 0
