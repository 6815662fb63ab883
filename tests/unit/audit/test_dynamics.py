"""Training dynamics: the values, each visit stored once after a kill, and the summary."""

import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers import reference as naive
from helpers.processes import launch, leave
from helpers.tiny import (
    CLASSES,
    ROWS,
    Net,
    arguments,
    difference,
    hard,
    jitter,
    logged,
    state,
    trainer,
    view,
)
from transformers import TrainerCallback

from kd_plugins import CE, SMKD, LabelSmoothing, Mutual, MyLC, SelectAll, SelectNone
from kd_plugins.audit.dynamics import read_dynamics, summarise
from kd_plugins.models import PeerModule
from kd_plugins.train import DynamicsCallback
from kd_plugins.train.dynamics_writer import DynamicsWriter, batch_figures

COLUMNS = ["epoch", "step", "index", "label"]


def peer(name, selects=True):
    return [
        f"pred_{name}",
        f"conf_{name}",
        f"p_label_{name}",
        *([f"selected_{name}"] if selects else []),
    ]


def visits(folder):
    """All rows, sorted for a comparison."""
    table = read_dynamics(folder).data.table
    return table.sort_by([(name, "ascending") for name in ("step", "index")]).combine_chunks()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


class Watcher(TrainerCallback):
    """Records each micro-batch: labels, index and the logits of each peer, as lists."""

    def __init__(self):
        self.batches = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        for network in model.peers:
            network.register_forward_hook(
                lambda module, _, z: self.batches[-1]["logits"].append(z.detach().tolist())
            )

    def begin(self, module, args, inputs):
        batch = {
            "index": inputs["index"].tolist(),
            "labels": inputs["labels"].tolist(),
            "logits": [],
        }
        self.batches.append(batch)


class Stop(TrainerCallback):
    """Stops the run like a power cut, but as an exception that the test can catch."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------------ the values


def test_every_micro_batch_once_with_the_figures_of_a_plain_loop(tmp_path):
    """44 rows, micro-batches of four, two per step, one in the last step. a is surer than b."""
    seen, loss = Watcher(), SMKD(CE(), eta=1.5, b2=0)
    run = trainer(
        tmp_path,
        [Net(1, scale=2), Net(2, scale=0.5)],
        loss,
        view(44, clean=False),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        hf={"callbacks": [seen, DynamicsCallback()]},
    )
    run.train()
    want = []
    for number, batch in enumerate(seen.batches):
        epoch, j = divmod(number, 11)
        for i, (index, y) in enumerate(zip(batch["index"], batch["labels"], strict=True)):
            row = {"epoch": epoch, "step": 6 * epoch + j // 2 + 1, "index": index, "label": y}
            for name, logits in zip("ab", batch["logits"], strict=True):
                p = naive.softmax(logits[i])
                row |= {
                    f"pred_{name}": p.index(max(p)),
                    f"conf_{name}": max(p),
                    f"p_label_{name}": p[y],
                }
                row[f"selected_{name}"] = naive.entropy(p) < math.log(CLASSES) / 1.5
            want.append(row)
    got = read_dynamics(tmp_path / "dynamics")
    assert len(got) == len(want) == 88
    assert got.column_names == [*COLUMNS, *peer("a"), *peer("b")]
    assert {
        name: feature.dtype for name, feature in got.features.items() if not name.endswith("b")
    } == {
        "epoch": "int16",
        "step": "int32",
        "index": "int32",
        "label": "int16",
        "pred_a": "int16",
        "conf_a": "float16",
        "p_label_a": "float16",
        "selected_a": "bool",
    }
    got = sorted(got, key=lambda row: (row["step"], row["index"]))
    for ours, theirs in zip(
        got, sorted(want, key=lambda row: (row["step"], row["index"])), strict=True
    ):
        for name, value in theirs.items():
            assert ours[name] == (
                pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
            ), name
    taught = {name: [row[f"selected_{name}"] for row in got] for name in "ab"}
    assert sum(taught["a"]) > 1.5 * sum(taught["b"]) > 0  # fails if the peers are swapped
    for step, shares in enumerate(logged(run, "selected_a", "selected_b"), start=1):
        rows = [row for row in got if row["step"] == step]
        assert shares == pytest.approx(
            [np.mean([row[f"selected_{name}"] for row in rows]) for name in "ab"]
        )


def test_one_network(tmp_path):
    run = trainer(
        tmp_path,
        Net(1),
        LabelSmoothing(0.2),
        num_train_epochs=1,
        hf={"callbacks": [DynamicsCallback()]},
    )
    run.train()
    got = read_dynamics(tmp_path / "dynamics")
    assert got.column_names == [*COLUMNS, *peer("a", selects=False)]
    assert sorted(got["index"]) == list(range(ROWS))
    labels = run.train_dataset.labels
    assert all(row["label"] == labels[row["index"]] for row in got)
    assert "selected" not in summarise(got)


def test_soft_targets_count_as_their_largest_class(tmp_path):
    def collate(items):
        batch = torch.utils.data.default_collate(items)
        own = torch.nn.functional.one_hot(batch["labels"], CLASSES).float()
        return batch | {"labels": 0.7 * own + 0.3 * own.flip(0)}

    folder = tmp_path / "elsewhere"
    hf = {"callbacks": [DynamicsCallback(folder)], "data_collator": collate}
    run = trainer(tmp_path, Net(1), CE(), view(clean=False), num_train_epochs=1, hf=hf)
    run.train()
    labels = run.train_dataset.labels
    assert all(row["label"] == labels[row["index"]] for row in read_dynamics(folder))
    assert not (tmp_path / "dynamics").exists()


def figures(logits, labels, selection=None):
    """What the callback keeps of these logits."""
    return batch_figures(logits, labels, torch.arange(len(labels)), selection)


def test_extreme_logits():
    """Probabilities stay in [0, 1] in float16, NaN stays NaN, and many classes need int32."""
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    seen = figures([z], torch.tensor([0, 1, 1, 2]))
    conf, p_label = seen["conf"][:, 0], seen["p_label"][:, 0]
    assert conf.dtype == p_label.dtype == torch.float16
    assert conf[0] == p_label[0] == 1
    assert conf[1].item() == pytest.approx(1 / 3, rel=1e-3)
    assert 0 < p_label[2] < 2e-4 < 0.999 < conf[2] <= 1
    assert conf[3].isnan() and p_label[3].isnan()
    wide = torch.zeros(1, 40_000)
    wide[0, 39_999] = 1
    seen = figures([wide], torch.tensor([39_998]))
    assert (seen["pred"].item(), seen["label"].item()) == (39_999, 39_998)


def test_a_sum_selects_what_any_of_its_terms_selects():
    z = [torch.tensor([[9.0, 0, 0], [0, 0, 0]]), torch.zeros(2, CLASSES)]  # a is sure of sample 0
    y = torch.zeros(2, dtype=torch.long)
    sure = [[True, False], [False, False]]
    for select, selected in ((SelectNone(), sure), (SelectAll(), [[True, True]] * 2)):
        terms = SMKD(CE(), eta=1.5, b2=0), Mutual(CE(), select)
        for loss in (terms[0] + 0.5 * terms[1], terms[1] + 0.5 * terms[0]):
            loss(z, y)
            assert figures(z, y, loss.selection)["selected"].tolist() == selected


def test_training_is_the_same_to_the_last_bit(tmp_path):
    bare = hard(tmp_path / "bare")
    bare.train()
    kept = hard(tmp_path / "kept", [DynamicsCallback()])
    kept.train()
    assert difference(state(bare.model), state(kept.model)) == 0
    assert logged(bare, "loss", "selected_a") == logged(kept, "loss", "selected_a")
    assert len(read_dynamics(tmp_path / "kept" / "dynamics")) == 2 * ROWS


def test_nothing_waits_for_the_device_in_a_step(tmp_path):
    """Reading a meta tensor fails. Only every hundredth batch is brought to the host."""
    writer, meta = DynamicsWriter(tmp_path, 0, 0, clean=True), torch.device("meta")
    labels, logits = (
        torch.zeros(8, dtype=torch.long, device=meta),
        [torch.zeros(8, CLASSES, device=meta)] * 2,
    )
    mask = torch.ones(8, dtype=torch.bool, device=meta)
    selection = [(mask, labels)] * 2
    for step in range(99):
        writer.add(step, batch_figures(logits, labels, labels, selection))
    with pytest.raises(NotImplementedError, match="meta"):
        writer.add(99, batch_figures(logits, labels, labels, selection))


def test_compiled_is_eager_and_compiles_once(tmp_path):
    loss = {
        "loss": SMKD(MyLC(window=ROWS), eta=1.5, b2=0, normalize="batch"),
        "train": view(clean=False),
    }
    trainer(
        tmp_path / "eager", **loss, num_train_epochs=1, hf={"callbacks": [DynamicsCallback()]}
    ).train()
    torch._dynamo.reset()
    loss["loss"] = SMKD(MyLC(window=ROWS), eta=1.5, b2=0, normalize="batch")
    compiled = trainer(
        tmp_path / "compiled",
        **loss,
        num_train_epochs=1,
        torch_compile=True,
        torch_compile_backend="eager",
        hf={"callbacks": [DynamicsCallback()]},
    )
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.train()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    ours, theirs = (
        visits(tmp_path / name / "dynamics").to_pydict() for name in ("compiled", "eager")
    )
    assert ours["index"] == theirs["index"] and ours["selected_b"] == theirs["selected_b"]
    assert np.allclose(ours["conf_b"], theirs["conf_b"], atol=2e-3)


def test_bf16(tmp_path):
    """The logits are bfloat16; their softmax is float32."""
    for name, bf16 in (("full", False), ("half", True)):
        run = trainer(
            tmp_path / name,
            num_train_epochs=1,
            bf16=bf16,
            learning_rate=1e-6,
            hf={"callbacks": [DynamicsCallback()]},
        )
        run.train()
    full, half = (visits(tmp_path / name / "dynamics").to_pydict() for name in ("full", "half"))
    assert full["index"] != sorted(full["index"])
    conf = {
        row[:2]: row[2] for row in zip(full["step"], full["index"], full["conf_b"], strict=True)
    }
    both = [
        (conf[s, i], c) for s, i, c in zip(half["step"], half["index"], half["conf_b"], strict=True)
    ]
    assert 0 < max(abs(a - b) for a, b in both) < 0.03
    fine = np.array([c for c in half["conf_b"] if c > 0.5], np.float32)
    assert (fine.astype(np.float32).view(np.uint32) & 0xFFFF).any()  # more bits than a bfloat16 has


# ----------------------------------------------------------------------------- kills and resumes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The visits of an undisturbed run: two epochs of six steps, a checkpoint every two."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("whole")
    hard(folder, [DynamicsCallback()]).train()
    assert files(folder / "dynamics") == [
        f"step-{step:08d}-rank-0.parquet" for step in (2, 4, 6, 8, 10, 12)
    ]
    table = visits(folder / "dynamics")
    assert sorted(table["index"].to_pylist()) == sorted([*range(ROWS)] * 2)
    return table


@pytest.mark.parametrize("step", [1, 7, 9])
def test_every_visit_is_there_once_after_a_kill_and_a_resume(whole, tmp_path, step):
    """Before the first checkpoint, right after an epoch, and one step after a checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        hard(tmp_path, [Stop(step), DynamicsCallback(max_rows=5)]).train()
    assert files(tmp_path / "dynamics") == [
        f"step-{s:08d}-rank-0.parquet" for s in range(1, step + 1)
    ]
    torch.manual_seed(99)
    hard(tmp_path, [DynamicsCallback()]).train(resume_from_checkpoint=True)
    assert visits(tmp_path / "dynamics").equals(whole)


@pytest.mark.parametrize("settings", [{}, {"max_steps": 12}])
def test_a_complete_run_starts_again_and_keeps_its_visits(whole, tmp_path, settings):
    """A job that was killed after its last step, before it exported."""
    torch.manual_seed(1)
    hard(tmp_path, [DynamicsCallback()], **settings).train()
    again = hard(tmp_path, [DynamicsCallback()], **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    assert visits(tmp_path / "dynamics").equals(whole)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_a_kill_right_after_a_checkpoint_leaves_no_hole(whole, tmp_path, strategy):
    """The kill comes after the last file of a checkpoint, before the callbacks' on_save."""
    settings = {
        "save_strategy": strategy,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "metric_for_best_model": "loss",
    }
    settings |= {} if strategy == "best" else {"eval_strategy": "no"}
    run = hard(tmp_path, [DynamicsCallback()], evaluate=view(8), **settings)
    save = run._save_checkpoint

    def dies(*args):
        save(*args)
        raise KeyboardInterrupt

    run._save_checkpoint = dies
    with pytest.raises(KeyboardInterrupt):
        run.train()
    hard(tmp_path, [DynamicsCallback()], evaluate=view(8), **settings).train(
        resume_from_checkpoint=True
    )
    # Evaluations change the random numbers of dropout, so only these columns are equal.
    same = COLUMNS if strategy == "best" else whole.column_names
    assert visits(tmp_path / "dynamics").select(same).equals(whole.select(same))


def test_going_back_drops_what_is_trained_again(whole, tmp_path, caplog):
    """Visits are also removed from the middle of a file, as with other checkpoints."""
    hard(tmp_path, [DynamicsCallback()]).train()
    folder = tmp_path / "dynamics"
    late = [pq.read_table(folder / f"step-{step:08d}-rank-0.parquet") for step in (4, 6, 8)]
    for step in (4, 6):
        (folder / f"step-{step:08d}-rank-0.parquet").unlink()
    pq.write_table(pa.concat_tables(late), folder / "step-00000008-rank-0.parquet")
    assert visits(folder).equals(whole)
    half, stranger = folder / "step-00000004-rank-0.0.part", folder / "notes.txt"
    half.write_bytes(b"PAR1 half")
    stranger.write_text("mine")
    assert len(read_dynamics(folder)) == 2 * ROWS  # the unfinished file is not read

    hard(tmp_path, [DynamicsCallback()], save_strategy="no").train(str(tmp_path / "checkpoint-4"))
    assert visits(folder).equals(whole)
    segments = [f"step-{step:08d}-rank-0.parquet" for step in (2, 4, 6, 12)]
    assert files(folder) == ["notes.txt", *segments]
    [message] = [
        record.getMessage()
        for record in caplog.records
        if record.name == "kd_plugins.train.dynamics_writer"
    ]
    assert "3 segments" in message and "after 4" in message
    torch.testing.assert_close(
        pq.read_table(folder / segments[1])["step"].to_pylist(), [3] * 8 + [4] * 8
    )


def test_files_of_others_are_kept(tmp_path):
    """Only complete and unfinished files of the callback are removed."""
    folder = tmp_path / "dynamics"
    folder.mkdir()
    theirs = ["film.part", "step-1.part", "step-00000001-rank-0.part", "step-x-rank-y.parquet"]
    ours = ["step-00000003-rank-1.0123456789abcdef0123456789abcdef.part"]
    for name in theirs + ours:
        (folder / name).write_bytes(b"PAR1")
    feed(DynamicsCallback(), tmp_path, steps=2)
    assert files(folder) == sorted([*theirs, "step-00000002-rank-0.parquet"])


def rank_main(folder):
    """46 rows, two processes, batches of eight: two rows come twice, to fill the last batch."""
    torch.set_num_threads(1)
    loss = SMKD(MyLC(window=ROWS), eta=1.5, b2=-4, normalize="batch")

    def run(callback, **kwargs):
        settings = {
            "save_strategy": "steps",
            "save_steps": 2,
            "gradient_accumulation_steps": 2,
        } | kwargs
        return trainer(
            folder,
            loss=loss,
            train=view(46, transform=jitter),
            per_device_train_batch_size=4,
            hf={"callbacks": [callback]},
            **settings,
        )

    run(DynamicsCallback()).train()
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        (folder / "dynamics").rename(folder / "first")
        (folder / "dynamics").mkdir()
        for path in (folder / "first").iterdir():
            (folder / "dynamics" / path.name).write_bytes(path.read_bytes())
    torch.distributed.barrier()
    run(DynamicsCallback(), save_strategy="no").train(
        str(folder / "checkpoint-4")
    )  # the middle of the second epoch
    leave()


def test_two_processes(tmp_path):
    launch(__file__, tmp_path)
    first, again = tmp_path / "first", tmp_path / "dynamics"
    assert files(first) == [
        f"step-{step:08d}-rank-{rank}.parquet" for step in (2, 3, 4, 6) for rank in (0, 1)
    ]
    table = visits(first)
    for epoch in (0, 1):
        index = [row["index"] for row in table.to_pylist() if row["epoch"] == epoch]
        assert set(index) == set(range(46))
        assert len(index) == 48  # two samples are visited twice
    per_step = [sum(row["step"] == step for row in table.to_pylist()) for step in range(1, 7)]
    assert per_step == [16] * 6
    ranks = [
        {
            row["index"]
            for row in pq.read_table(first / f"step-00000002-rank-{rank}.parquet").to_pylist()
        }
        for rank in (0, 1)
    ]
    assert len(ranks[0] & ranks[1]) == 0
    assert visits(again).equals(table)
    assert summarise(again)["visits"].sum() == 96


# ------------------------------------------------------------------------------ size and reading


def feed(callback, folder, steps, batch=64, classes=100, seed=0):
    """Give the callback the visits of an imagined run."""
    rng, n = np.random.default_rng(seed), steps * batch
    order, given = rng.permutation(n), rng.integers(0, classes, n)
    hosted = PeerModule([Net(1), Net(2)], Mutual(CE(), SelectAll()))
    args = arguments(folder)
    control, now = (
        type("Control", (), {"should_save": False}),
        type("State", (), {"global_step": 0, "epoch": 0.0}),
    )
    callback.on_train_begin(args, now, control, model=hosted)
    callback.on_epoch_begin(args, now, control)
    for step in range(steps):
        index = torch.from_numpy(order[step * batch : (step + 1) * batch])
        labels = torch.from_numpy(given)[index]
        logits = [
            3 * torch.randn(batch, classes) + 4 * torch.nn.functional.one_hot(labels, classes)
            for _ in "ab"
        ]
        masks = [torch.rand(batch) < 0.4 for _ in "ab"]
        hosted.criterion.selection = [(mask, labels) for mask in masks]
        hosted.last = {"logits": logits, "labels": labels, "index": index}
        now.global_step = step + 1
        callback.on_step_end(args, now, control, model=hosted)
    callback.on_train_end(args, now, control, model=hosted)


def test_under_twenty_bytes_a_visit(tmp_path):
    """Two networks, a hundred classes, 20,032 visits: 12.6 bytes."""
    feed(DynamicsCallback(), tmp_path, steps=313)
    [path] = (tmp_path / "dynamics").iterdir()
    table = read_dynamics(tmp_path / "dynamics")
    assert (
        len(table) == 313 * 64
        and len(set(table["conf_a"])) > 1000
        and len(set(table["pred_b"])) == 100
    )
    assert path.stat().st_size / len(table) < 14


def by_hand(rows, n, peers, first_epoch=0):
    """The summary, computed with loops over dictionaries."""
    out = []
    for i in range(n):
        mine = [row for row in rows if row["index"] == i and row["epoch"] >= first_epoch]
        mine = sorted(
            (row for row in mine if not math.isnan(row["conf_a"])), key=lambda row: row["step"]
        )
        if not mine:
            nan = math.nan
            out.append(
                {
                    "index": i,
                    "label": -1,
                    "visits": 0,
                    "p_label": nan,
                    "proposed": -1,
                    "confidence": nan,
                    "forgetting": nan,
                    "selected": [nan] * len(peers),
                }
            )
            continue
        votes, forgotten = {}, 0
        for k in peers:
            right = [row[f"pred_{k}"] == row["label"] for row in mine]
            forgotten += sum(a and not b for a, b in itertools.pairwise(right))
            for row in mine:
                votes[row[f"pred_{k}"]] = votes.get(row[f"pred_{k}"], 0.0) + row[f"conf_{k}"]
        best = max(sorted(votes), key=lambda c: votes[c])
        count = len(mine) * len(peers)
        out.append(
            {
                "index": i,
                "label": mine[-1]["label"],
                "visits": len(mine),
                "p_label": sum(row[f"p_label_{k}"] for row in mine for k in peers) / count,
                "proposed": best,
                "confidence": votes[best] / count,
                "forgetting": forgotten / len(peers),
                "selected": [sum(row[f"selected_{k}"] for row in mine) / len(mine) for k in peers],
            }
        )
    return out


def invented(n=60, epochs=4, seed=0):
    """Visits of three networks, with repeats in an epoch, NaN, and samples without visits."""
    rng, rows = np.random.default_rng(seed), []
    for epoch in range(epochs):
        order = np.concatenate([rng.permutation(n)[: n - 10], rng.integers(0, n // 2, 8)])
        for place, i in enumerate(order):
            if i % 13 == 5 or (i % 13 == 6 and epoch < 2):  # no visit; no early visit
                continue
            row = {
                "epoch": epoch,
                "step": epoch * 100 + place + 1,
                "index": int(i),
                "label": int(i % 5),
            }
            for k in "abc":
                conf = (
                    math.nan
                    if rng.random() < 0.04 and k == "a"
                    else float(np.float16(rng.integers(1, 4) / 4))
                )
                row |= {f"pred_{k}": int(rng.choice([i % 5, (i + 1) % 5, 4])), f"conf_{k}": conf}
                row |= {
                    f"p_label_{k}": conf and float(np.float16(rng.random())),
                    f"selected_{k}": bool(rng.random() < 0.3),
                }
            rows.append(row)
    return rows


def as_table(rows):
    types = {
        "epoch": pa.int16(),
        "step": pa.int32(),
        "index": pa.int32(),
        "label": pa.int16(),
        "pred": pa.int16(),
    }
    types |= {"conf": pa.float16(), "p_label": pa.float16(), "selected": pa.bool_()}
    return pa.table(
        {
            name: pa.array([row[name] for row in rows], types.get(name, types.get(name[:-2])))
            for name in rows[0]
        }
    )


@pytest.mark.parametrize("first_epoch", [0, 2])
def test_summary_is_what_a_loop_makes_of_the_visits(tmp_path, first_epoch):
    rows = invented()
    want = by_hand(rows, 64, "abc", first_epoch)
    rng = np.random.default_rng(1)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    for epoch in range(4):  # two processes, each with its own files
        part = [row for row in rows if row["epoch"] == epoch]
        for rank in (0, 1):
            pq.write_table(
                as_table(part[rank::2]),
                tmp_path / f"step-{epoch * 100 + 90:08d}-rank-{rank}.parquet",
            )
    for dynamics in (tmp_path, Dataset(as_table(shuffled)), read_dynamics(tmp_path)):
        got = summarise(dynamics, 64, first_epoch)
        for name in want[0]:
            assert got[name].shape == ((64, 3) if name == "selected" else (64,))
            assert np.allclose(got[name], [row[name] for row in want], equal_nan=True, atol=1e-9), (
                name
            )
    assert max(row["forgetting"] for row in want if row["visits"]) > 1 - first_epoch / 4
    assert {row["visits"] for row in want} >= ({0, 1, 2, 3} if first_epoch else {0, 2, 3, 4, 5})
    assert sum(row["proposed"] not in (-1, row["label"]) for row in want) > 5
    assert len(summarise(tmp_path)["index"]) == 60


def test_a_sample_is_forgotten_across_epochs():
    """a is right, wrong, wrong, right, wrong: two events. b is always right. Then a tie."""
    rows = [
        {
            "epoch": e,
            "step": e + 1,
            "index": 0,
            "label": 2,
            "pred_a": p,
            "conf_a": 0.5,
            "p_label_a": 0.25,
            "pred_b": 2,
            "conf_b": 0.5,
            "p_label_b": 0.75,
        }
        for e, p in enumerate([2, 1, 1, 2, 1])
    ]
    got = summarise(Dataset(as_table(rows)))
    assert got["forgetting"].tolist() == [1.0]
    assert (got["proposed"][0], got["confidence"][0], got["p_label"][0]) == (2, 3.5 / 10, 0.5)
    for row in rows:
        row["conf_b"] = 0.125  # class 2: 0.5 + 0.5 + 5 · 0.125; class 1: 1.5
    rows[0]["conf_a"] = rows[3]["conf_a"] = 0.4375
    assert summarise(Dataset(as_table(rows)))["proposed"][0] == 1


# ---------------------------------------------------------------------------------------- errors


def test_batches_without_index(tmp_path):
    bare = [{k: v for k, v in view()[i].items() if k != "index"} for i in range(8)]
    run = trainer(tmp_path, Net(1), CE(), bare, hf={"callbacks": [DynamicsCallback()]})
    with pytest.raises(ValueError, match=r"no index.*ImageView"):
        run.train()
    trainer(tmp_path, Net(1), CE(), bare, num_train_epochs=1).train()  # no callback, no index


def test_refuses_what_it_cannot_read(tmp_path):
    for name in ("step-00000004-rank-0.part", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    for read in (read_dynamics, summarise):
        with pytest.raises(FileNotFoundError, match=r"no training dynamics.*DynamicsCallback"):
            read(tmp_path)
    data = Dataset(as_table(invented()))
    with pytest.raises(ValueError, match=r"num_samples=50.*index 59"):
        summarise(data, num_samples=50)
    with pytest.raises(ValueError, match=r"first_epoch=4: the dynamics end with epoch 3;"):
        summarise(data, first_epoch=4)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
