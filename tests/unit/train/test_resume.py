"""What a checkpoint belongs to, and what it has to hold: a run goes on from its own, whole or not
at all."""

import json
import logging
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset
from helpers.tiny import (
    CLASSES,
    ROWS,
    Net,
    StopAt,
    difference,
    hard,
    jitter,
    plain,
    rows,
    state,
    to_tensor,
    trainer,
    view,
    vit,
)

from kd_plugins import CE, GCE, KD, SMKD, ForwardCorrection, MaskedLoss, MyLC, ProSelfLC
from kd_plugins.data import ImageView
from kd_plugins.train import last_checkpoint
from kd_plugins.train.run_folder import faults

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "run.json",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted: a checkpoint every two of its twelve steps."""
    run = hard(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def copied(whole, folder, *steps):
    for step in steps:
        name = f"checkpoint-{step}"
        shutil.copytree(f"{whole.args.output_dir}/{name}", folder / name)
    return folder


# ------------------------------------------------------------------ the checkpoint of another run


def masked(first):
    return CE() + MaskedLoss(torch.arange(ROWS) >= first, GCE())


def distilled(seed):
    return {"models": Net(1), "loss": CE() + KD(), "hf": {"teachers": [Net(seed)]}}


def corrected(share):
    rest = (1 - share) / (CLASSES - 1)
    matrix = torch.full((CLASSES, CLASSES), rest).fill_diagonal_(share)
    return {"models": Net(1), "loss": ForwardCorrection(matrix)}


def hf_dataset(seed):
    """Of datasets, with a transform that makes pixels and labels."""
    data = rows(ROWS, seed=seed)
    columns = {"n": list(range(ROWS)), "label": [row["label"] for row in data]}
    made = Dataset.from_dict(columns).cast_column("label", ClassLabel(CLASSES))

    def transform(batch):
        pixels = [to_tensor(data[n]["image"]) for n in batch["n"]]
        return {"pixel_values": pixels, "labels": batch["label"]}

    return made.with_transform(transform)


def refined(loss, eta=1.5):
    return {"loss": SMKD(loss, eta=eta, normalize="batch")}


def single(loss):
    return {"models": Net(1), "loss": loss}


OTHER = {  # how the run was made, how it is made now, and what the message names
    "loss": (
        lambda: refined(MyLC(window=ROWS)),
        lambda: refined(ProSelfLC()),
        r"loss\.refine\.0 was MyLC\(.*is now ProSelfLC\(",
    ),
    "argument": (
        lambda: refined(MyLC(window=ROWS)),
        lambda: refined(MyLC(window=ROWS), 2.0),
        r"loss\.select was .*eta=1\.5.*eta=2\.0",
    ),
    "argument of a part": (
        lambda: refined(MyLC(window=ROWS)),
        lambda: refined(MyLC(window=ROWS + 1)),
        r"loss\.refine\.0 was MyLC\(.*window=48.*is now MyLC\(.*window=49",
    ),
    "weights of a sum": (
        lambda: single(CE() + 0.5 * GCE()),
        lambda: single(CE() + 0.6 * GCE()),
        r"weights=\[1\.0, 0\.5\].*weights=\[1\.0, 0\.6\]",
    ),
    "matrix": (lambda: corrected(0.8), lambda: corrected(0.7), r"loss\.transition was"),
    "mask": (
        lambda: single(masked(3)),
        lambda: single(masked(4)),
        r"run: loss\.terms\.1\.mask was",
    ),
    "network": (dict, lambda: {"models": [Net(1), vit()]}, "network b was Net and is now ViTForI"),
    "size of a network": (
        dict,
        lambda: {"models": [Net(1, bn=True), Net(2)]},
        r"network a\.shapes was",
    ),
    "teacher": (lambda: distilled(3), lambda: distilled(4), r"teacher 0\.weights was"),
    "epochs": (dict, lambda: {"num_train_epochs": 3}, "num_train_epochs was 2 and is now 3"),
    "steps": (dict, lambda: {"max_steps": 20}, "max_steps was -1 and is now 20"),
    "learning rate": (dict, lambda: {"learning_rate": 0.01}, r"learning_rate was 0\.05 and"),
    "schedule": (
        dict,
        lambda: {"lr_scheduler_type": "cosine"},
        "lr_scheduler_type was constant_with_warmup and is now cosine",
    ),
    "milestones": (dict, lambda: {"milestones": [0.7]}, r"milestones was \[0\.5\] and"),
    "batch": (dict, lambda: {"per_device_train_batch_size": 4}, "batch was 8 and is now 4"),
    "seed": (dict, lambda: {"seed": 7}, "seed was 42 and is now 7"),
    "optimizer of a network": (
        dict,
        lambda: {"hf": {"optim_per_peer": [{"lr": 0.1}, {}]}},
        r"optim_per_peer was \[\{\}, \{\}\]",
    ),
    "labels of a plain data set": (
        lambda: {"train": hf_dataset(0)},
        lambda: {"train": hf_dataset(1)},
        r"run: data\.labels was",
    ),
    "fewer rows": (dict, lambda: {"train": view(40)}, r"data\.rows was 48 and is now 40"),
    "other labels": (dict, lambda: {"train": view(wrong=0.6)}, r"data\.labels was"),
}


@pytest.mark.parametrize("case", OTHER)
def test_the_checkpoint_of_another_run_is_refused_by_name(case, tmp_path):
    made, now, named = OTHER[case]
    hf = made().get("hf", {}) | {"callbacks": [StopAt(1)]}
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **made() | saving | {"hf": hf}).train()
    for resume in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=named) as raised:
            trainer(tmp_path, **now()).train(resume_from_checkpoint=resume)
        assert str(tmp_path / "checkpoint-1") in str(raised.value)
    hf["callbacks"] = [StopAt(2)]
    again = trainer(tmp_path, **made() | {"hf": hf})  # what it began with goes on
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_what_may_differ(tmp_path):
    """How a batch is cut, how often is logged and saved; and what was removed on purpose."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, hf={"callbacks": [StopAt(1)]}, **saving).train()
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 3}
    run = trainer(tmp_path, save_strategy="no", per_device_eval_batch_size=3, **cut)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 12
    (tmp_path / "checkpoint-1" / "run.json").unlink()
    run = trainer(tmp_path, num_train_epochs=3)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 18


def test_priming_the_loss_again_is_no_other_run(tmp_path):
    """r is state, not an argument: a script that primes before training does so before resuming."""

    def make(**kwargs):
        models, loss = [Net(1), Net(2)], SMKD(MyLC(window=ROWS), eta=1.5)
        run = trainer(tmp_path, models, loss, **kwargs)
        loss.prime(models, run.get_train_dataloader())
        return run

    make(save_strategy="steps", save_steps=1, hf={"callbacks": [StopAt(1)]}).train()
    make().train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------ missing and damaged files


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    """One bit of what is in the file: its length and its table of contents stay."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"missing": lambda path: path.unlink(), "damaged": shorten}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES[:-1])
def test_a_named_checkpoint_with_a_bad_file_is_refused_by_name(whole, tmp_path, name, damage):
    copied(whole, tmp_path, 8)
    DAMAGE[damage](tmp_path / "checkpoint-8" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-8 cannot be resumed: {name} is {damage}"):
        hard(tmp_path).train(str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES[:-1])
def test_an_older_checkpoint_is_taken_and_the_log_says_so(whole, tmp_path, caplog, name, damage):
    copied(whole, tmp_path, 8, 10)
    DAMAGE[damage](tmp_path / "checkpoint-10" / name)
    run = hard(tmp_path, save_strategy="no")
    with caplog.at_level(logging.WARNING):
        run.train(resume_from_checkpoint=True)
    [message] = [r.getMessage() for r in caplog.records if r.name.endswith("run_folder")]
    why = "it was not written to its end" if name == "trainer_state.json" else f"{name} is {damage}"
    assert f"checkpoint-10 cannot be resumed: {why}" in message
    assert message.endswith(f"Going on from {tmp_path / 'checkpoint-8'} instead")
    assert difference(state(run.model), state(whole.model)) == 0


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_flipped_bit_is_found(whole, tmp_path, name):
    folder = copied(whole, tmp_path, 8) / "checkpoint-8"
    flip(folder / name)
    [found] = faults(folder)
    assert found.startswith(f"{name} is damaged")


def test_nothing_is_trained_anew_over_a_damaged_run(whole, tmp_path):
    """The only checkpoint is damaged: it is not written over without a word."""
    copied(whole, tmp_path, 8)
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    with pytest.raises(
        ValueError, match=r"optimizer\.pt is missing.*No older checkpoint is complete"
    ):
        hard(tmp_path).train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-2").exists()


def test_only_an_unfinished_checkpoint_means_from_the_start(tmp_path, caplog):
    (tmp_path / "checkpoint-2").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) is None
    assert "checkpoint-2" in caplog.text
    assert "training starts anew" in caplog.text


def test_every_process_has_to_have_written_its_part(whole, tmp_path):
    """Of two processes each writes the state of its random numbers."""
    copied(whole, tmp_path, 8, 10)
    for step in (8, 10):
        folder = tmp_path / f"checkpoint-{step}"
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert content["files"] == ["rng_state.pth"]
        content["files"] = ["rng_state_0.pth", "rng_state_1.pth"]
        (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
        shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "rng_state_1.pth").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


# ------------------------------------------------------------------------------- a plain HF Trainer


def stock(folder, loss=None, callbacks=(), **kwargs):
    loss = MyLC(window=ROWS) if loss is None else loss
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 4} | kwargs
    return plain(
        folder, loss, train=ImageView(rows(), jitter), callbacks=list(callbacks), **settings
    )


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"loss": MyLC(window=ROWS + 1)}, "loss was MyLC.*window=48.*is now MyLC.*window=49"),
        ({"loss": GCE()}, "loss was MyLC.*is now GCE"),
        ({"num_train_epochs": 3}, "num_train_epochs was 2 and is now 3"),
        ({"seed": 1}, "seed was 42 and is now 1"),
    ],
)
def test_stock_trainer_refuses_the_checkpoint_of_another_run(tmp_path, now, named):
    stock(tmp_path, callbacks=[StopAt(4)]).train()
    with pytest.raises(ValueError, match=named):
        stock(tmp_path, **now).train(last_checkpoint(tmp_path))
    run = stock(tmp_path)
    run.train(last_checkpoint(tmp_path))
    assert run.state.global_step == 12


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "loss.safetensors"]
)
def test_stock_trainer_does_not_go_on_without_a_file(tmp_path, name, damage):
    """Today's Trainer takes a missing optimizer for a new one."""
    stock(tmp_path, callbacks=[StopAt(4)]).train()
    DAMAGE[damage](tmp_path / "checkpoint-4" / name)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    if damage == "missing":
        with pytest.raises(ValueError, match=f"checkpoint-4 cannot be resumed: {name} is missing"):
            stock(tmp_path).train(str(tmp_path / "checkpoint-4"))


def test_stock_trainer_completes_a_checkpoint_with_the_loss_in_it(tmp_path, monkeypatch):
    """The loss is there before the Trainer's own state, which completes it, and before rotation."""
    from transformers import trainer as hf

    there, save = [], hf.TrainerState.save_to_json
    monkeypatch.setattr(
        hf.TrainerState,
        "save_to_json",
        lambda self, path: (
            there.append(sorted(p.name for p in tmp_path.glob("checkpoint-2/*"))),
            save(self, path),
        ),
    )
    stock(tmp_path, callbacks=[StopAt(2)]).train()
    assert {"loss.safetensors", "run.json", "optimizer.pt", "rng_state.pth"} <= set(there[0])


def test_stock_trainer_resumes_from_a_checkpoint_of_a_run_without_the_callback(tmp_path):
    from kd_plugins.train import ProgressCallback

    run = stock(tmp_path, CE(), callbacks=[StopAt(2)])
    run.remove_callback(ProgressCallback)
    run.train()
    assert not (tmp_path / "checkpoint-2" / "run.json").exists()
    run = stock(tmp_path, CE())
    run.train(last_checkpoint(tmp_path))
    assert run.state.global_step == 12
    assert (tmp_path / "checkpoint-12" / "run.json").exists()


def test_stock_trainer_says_that_callbacks_are_not_restored_from_json(tmp_path):
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True makes new"):
        stock(tmp_path, restore_callback_states_from_checkpoint=True).train()


def test_stock_trainer_reads_the_loss_from_its_own_folder(tmp_path):
    """The callback is not told which checkpoint was named."""
    stock(tmp_path / "first", callbacks=[StopAt(4)]).train()
    with pytest.raises(FileNotFoundError, match="the loss would start with empty state"):
        stock(tmp_path / "second").train(str(tmp_path / "first" / "checkpoint-4"))
    stock(tmp_path / "third", CE(), callbacks=[StopAt(4)]).train()
    run = stock(tmp_path / "fourth", CE())
    run.train(str(tmp_path / "third" / "checkpoint-4"))
    assert run.state.global_step == 12


def test_a_run_that_reached_max_steps_does_not_go_on(tmp_path):
    """In the middle of an epoch the Trainer itself would take one more step."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path, **settings)
    first.train()
    again = trainer(tmp_path, [Net(3), Net(4)], **settings)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == 2
    assert difference(again.model.state_dict(), first.model.state_dict()) == 0
