"""Two gloo processes against one, in one launch: each rank trains, and writes what it holds for
this file to compare."""

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import launch, leave
from helpers.tiny import (
    ROWS,
    Net,
    difference,
    jitter,
    logged,
    plain,
    rows,
    soft,
    state,
    trainer,
    view,
)

from kd_plugins import (
    CE,
    KD,
    SMKD,
    Joint,
    LabelRevision,
    LabelSmoothing,
    LowEntropy,
    MaskedLoss,
    MentorNet,
    Mutual,
    MyLC,
    ProSelfLC,
    TRevision,
    TruncatedGCE,
)
from kd_plugins.data import ImageView
from kd_plugins.models import PeerModule
from kd_plugins.train.run_folder import faults

WORLD = 2
BROKEN = range(1, ROWS, 6)


def mutual(folder, world, refine=None, **kwargs):
    """SMKD-P normalised by the batch, no BatchNorm: 16 rows a step however many processes share
    them."""
    loss = SMKD(refine or MyLC(window=ROWS), eta=1.5, b2=-4, normalize="batch")
    settings = {
        "per_device_train_batch_size": 16 // world,
        "per_device_eval_batch_size": 10,
        "num_train_epochs": 4,
    }
    return trainer(
        folder,
        loss=loss,
        train=view(transform=jitter),
        evaluate=view(26, seed=1),
        **settings | kwargs,
    )


def saving(folder, world, **kwargs):
    """BatchNorm and dropout on each rank: what makes resuming hard. Three steps an epoch, a
    checkpoint after each."""
    models = [Net(1, bn=True, dropout=0.2), Net(2, dropout=0.3)]
    settings = {"per_device_train_batch_size": 16 // world, "num_train_epochs": 3}
    return trainer(folder, models, train=view(transform=jitter), **settings | kwargs)


def accumulated(folder, world):
    settings = {
        "per_device_train_batch_size": 8 // world,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
    }
    return mutual(folder, world, ProSelfLC(b1=4.0), **settings)


def stock(folder, world, train=None):
    """The stock Trainer, accumulating: where a bare loss function gives four times the gradient."""
    settings = {
        "per_device_train_batch_size": 8 // world,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
    }
    return plain(folder, LabelSmoothing(0.2), train=train or view(clean=False), **settings)


def stock_soft(folder, world):
    """As ``stock``, with distributions for labels: the Trainer counts B * C items in a batch."""
    return stock(folder, world, soft(view(clean=False)))


# what each keeps: soft labels, weights over the data, a percentile, a correction, a selection
STATEFUL = {
    "joint": lambda: Joint(
        ROWS, 3, alpha=0.0, begin=0.2, epochs=2
    ),  # alpha: the prior term is over a process's batch
    "truncated_gce": lambda: TruncatedGCE(ROWS, k=0.6, start=0.2, refresh=1),
    "mentornet": lambda: MentorNet("self_paced", percentile=0.6),
    "t_revision": lambda: TRevision(0.7 * torch.eye(3) + 0.1),
    "lr_ds": lambda: CE() + MaskedLoss(torch.arange(ROWS) % 3 > 0, LabelRevision(KD())),
}


def stateful(name, folder, world, **kwargs):
    """One network and a loss with state; a checkpoint after each of the three steps of an epoch."""
    settings = {
        "per_device_train_batch_size": 16 // world,
        "num_train_epochs": 4,
        "learning_rate": 0.02,
    }
    loss = STATEFUL[name]()
    hf = {"teachers": [Net(5), Net(6)]} if "teacher" in loss.required_inputs else {}
    return trainer(folder, [Net(1)], loss, view(transform=jitter), hf=hf, **settings | kwargs)


def result(run):
    logs = [log for log in run.state.log_history if "loss" in log]
    return {"state": state(run.model), "logs": logs, "steps": run.state.global_step}


def broken(folder, world):
    """Each rank meets its own share of the broken pictures."""
    data = rows()
    for row in BROKEN:
        data[row]["image"] = b"no picture"
    train = ImageView(data, jitter, clean="clean", max_broken=0.5)
    return trainer(folder, train=train, num_train_epochs=1, per_device_train_batch_size=16 // world)


# how one step is taken where only rank 0 finds something to teach; of "taught", rank 1 has a loss
# of exactly 0
LONELY = {
    "batch": {"normalize": "batch"},
    "selected": {"normalize": "selected"},
    "taught": {"own": 0.0, "normalize": "selected"},
}


def lonely():
    """Two linear networks, and for each rank pixels and labels: the networks are sure of some rows
    of rank 0, of none of rank 1."""
    torch.manual_seed(3)
    nets = [torch.nn.Linear(5, 3, bias=False).double() for _ in "ab"]
    pixels = [scale * torch.randn(4, 5, dtype=torch.float64) for scale in (4.0, 0.01)]
    return nets, pixels, [torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])]


def one_step(hosted, pixels, labels):
    """One step of a network that may be wrapped: its loss, its gradients, and what was selected."""
    loss = hosted(pixel_values=pixels, labels=labels)["loss"]
    loss.backward()
    inner = getattr(hosted, "module", hosted)
    shares = [inner.criterion.stats[f"selected_{k}"].item() for k in "ab"]
    return {
        "loss": loss.item(),
        "grads": [p.grad.clone() for p in inner.parameters()],
        "selected": shares,
    }


def uneven(folder, world, train, **kwargs):
    """33 rows in batches of 8: three batches for the first rank, two for the second."""
    loss = SMKD(MyLC(window=99), eta=1.5, b2=-4, normalize="batch")
    settings = {"per_device_train_batch_size": 16 // world, "num_train_epochs": 1}
    return trainer(folder, loss=loss, train=train, **settings | kwargs)


def primed(batches):
    """r of two networks from one pass over these batches of rows, and how many were counted."""
    data, loss = view(11), SMKD(MyLC(window=100))
    loader = [
        {"pixel_values": torch.stack([data[i]["pixel_values"] for i in batch])} for batch in batches
    ]
    loss.prime([Net(1), Net(2)], loader)
    return [[refine.r.item(), refine.running.count.item()] for refine in loss.refine]


PRIMING = [
    ([[0, 1, 2, 3], [4, 5, 6, 7], [8]], [[9, 10]]),
    ([[0, 1]], []),
]  # rows of the batches of both ranks


def rank_main(folder):
    """What each of the processes does."""
    import logging

    torch.set_num_threads(1)
    rank, out = int(os.environ["RANK"]), {}
    run = mutual(folder / "mutual", WORLD)
    local = []
    run.model.register_forward_hook(
        lambda module, *_: local.append(module.stats.get("own_a")) if module.training else None
    )
    run.train()
    assert run.args.world_size == WORLD
    out["mutual"] = result(run) | {"eval": run.evaluate(), "local": [v.item() for v in local]}
    for make in (accumulated, stock, stock_soft):
        run = make(folder / make.__name__, WORLD)
        run.train()
        out[make.__name__] = result(run)

    run = saving(folder / "saved", WORLD, save_strategy="steps", save_steps=1)
    run.train()
    last = folder / "saved" / "checkpoint-9"
    out["whole"] = result(run) | {"faults": faults(last), "run": (last / "run.json").read_text()}
    for step in (2, 3, 5):
        run = saving(folder / f"resumed{step}", WORLD)
        run.train(str(folder / "saved" / f"checkpoint-{step}"))
        out[f"resumed{step}"] = result(run)

    for name in STATEFUL:
        run = stateful(name, folder / name, WORLD, save_strategy="steps", save_steps=1)
        run.train()
        again = stateful(name, folder / f"{name}_resumed", WORLD)
        again.train(str(folder / name / "checkpoint-7"))
        out[name] = result(run), result(again)

    nets, pixels, labels = lonely()
    for name, how in LONELY.items():
        loss = Mutual(MyLC(window=99), LowEntropy(eta=2, b2=0), **how)
        wrapped = torch.nn.parallel.DistributedDataParallel(PeerModule(copy.deepcopy(nets), loss))
        out[name] = one_step(wrapped, pixels[rank], labels[rank])
    out["primed"] = [primed(batches[rank]) for batches in PRIMING]

    run, seen = uneven(folder / "uneven", WORLD, view(33)), []
    run.model.register_forward_pre_hook(
        lambda *args: seen.append(args[-1]["index"].tolist()), with_kwargs=True
    )
    run.train()
    out["uneven"] = result(run) | {"seen": seen}

    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("kd_plugins.train.trainer").addHandler(handler)
    run = broken(folder / "broken", WORLD)
    run.train()
    out["broken"] = messages, run.train_dataset.broken()
    run.export(folder / "export")
    torch.save(out, folder / f"rank{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks report, from one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    for text in launch(__file__, folder, WORLD):
        assert "find_unused_parameters" not in text
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["peer_a", "peer_b"]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process."""
    run = mutual(tmp_path_factory.mktemp("alone"), 1)
    run.train()
    return run


def test_two_processes_are_one(ranks, alone):
    """On the same global batch: weights within 1e-5, r within 1e-6, and the ranks bit-equal to
    each other."""
    first, second = (rank["mutual"]["state"] for rank in ranks)
    assert difference(first, second) == 0
    assert ranks[0]["mutual"]["steps"] == alone.state.global_step == 12
    one = state(alone.model)
    assert difference(first, one) < 1e-5
    r = [name for name in one if "running.mean" in name]
    assert len(r) == 2
    for name in r:
        assert one[name] > 0.01
        assert first[name] == second[name] == pytest.approx(one[name].item(), abs=1e-6)
        assert first[name.replace("running.mean", "running.count")] == ROWS


def test_logs_are_means_over_the_ranks(ranks, alone):
    names = (
        "loss",
        "own_a",
        "own_b",
        "taught_a",
        "selected_a",
        "selected_b",
        "right_b",
        "mean_certainty_a",
        "threshold",
    )
    logs, local = ranks[0]["mutual"]["logs"], [rank["mutual"]["local"] for rank in ranks]
    single = [log for log in alone.state.log_history if "loss" in log]
    assert len(logs) == len(single) == 12
    for ours, theirs in zip(logs, single, strict=True):
        for name in names:
            assert (name in ours) == (name in theirs)
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert np.allclose([log["own_a"] for log in logs], np.mean(local, axis=0), rtol=1e-4)
    assert np.abs(np.subtract(*local)).max() > 0.05  # the ranks saw different rows
    assert any(0 < selected < 1 for [selected] in logged(alone, "selected_a"))


def test_evaluation_counts_every_row_once(ranks, alone):
    """26 rows in batches of ten do not divide by two processes: padding must not count."""
    metrics = alone.evaluate()
    for rank in ranks:
        for name, value in metrics.items():
            if "accuracy" in name or "memorised" in name or "noise" in name:
                assert rank["mutual"]["eval"][name] == pytest.approx(value, abs=1e-6), name


def test_accumulation_on_two_processes(ranks, tmp_path):
    """2 processes x 2 steps x 4 rows is 1 x 2 x 8 and 1 x 16, also when clipped: within 1e-5."""
    run = accumulated(tmp_path, 1)
    run.train()
    assert difference(ranks[0]["accumulated"]["state"], ranks[1]["accumulated"]["state"]) == 0
    assert difference(ranks[0]["accumulated"]["state"], state(run.model)) < 1e-5
    whole = mutual(tmp_path, 1, ProSelfLC(b1=4.0), max_grad_norm=0.5)
    whole.train()
    assert difference(state(run.model), state(whole.model)) < 1e-5


@pytest.mark.parametrize("make", [stock, stock_soft])
def test_stock_trainer_on_two_processes(make, ranks, tmp_path):
    run = make(tmp_path, 1)
    run.train()
    first, second = (rank[make.__name__] for rank in ranks)
    assert difference(first["state"], second["state"]) == 0
    assert difference(first["state"], state(run.model)) < 1e-5
    ours, theirs = ([log["loss"] for log in logs] for logs in (first["logs"], result(run)["logs"]))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_resume_on_two_processes_is_bit_equal(ranks, step):
    for rank in ranks:
        assert rank["whole"]["steps"] == rank[f"resumed{step}"]["steps"] == 9
    first = ranks[0]
    assert difference(first["whole"]["state"], first[f"resumed{step}"]["state"]) == 0


def test_a_checkpoint_consists_of_the_files_of_both_processes(ranks):
    for rank in ranks:
        assert rank["whole"]["faults"] == []
        content = json.loads(rank["whole"]["run"])
        assert content["files"] == ["rng_state_0.pth", "rng_state_1.pth"]
        assert content["processes"] == 2


@pytest.mark.parametrize("name", STATEFUL)
def test_state_of_losses_on_two_processes(name, ranks, tmp_path):
    """Equal to the last bit on both and after a resume; as one process has it on the same global
    batches; and it moved."""
    (first, again), (second, _) = (rank[name] for rank in ranks)
    assert difference(first["state"], second["state"]) == 0
    assert difference(first["state"], again["state"]) == 0
    run = stateful(name, tmp_path, 1)
    start = state(run.model.criterion)
    run.train()
    assert difference(first["state"], state(run.model)) < 1e-5
    kept = {
        k: v for k, v in state(run.model.criterion).items() if k in run.model.criterion.state_dict()
    }
    assert any(not torch.equal(v, start[k]) for k, v in kept.items()) != (
        name == "lr_ds"
    )  # its mask stays


def test_broken_pictures_of_all_ranks_are_named_once(ranks):
    (messages, seen), (others, also_seen) = (rank["broken"] for rank in ranks)
    assert len(messages) == 1
    assert messages[0].startswith(f"{len(BROKEN)} pictures of the train data")
    assert all(f"row {row}" in messages[0] for row in BROKEN)
    assert others == []
    assert 0 < len(seen) < len(BROKEN) > len(also_seen) > 0


def slopes(nets, pixels, labels, own, normalize):
    """Gradients of both networks on these rows by numpy, given r over all rows: dL/dz = p - q~ for
    each lesson, q~ a constant."""
    weights = [net.weight.detach().numpy() for net in nets]

    def known(x):  # p, 1 - H / ln C
        p = np.exp(x @ np.swapaxes(weights, 1, 2))
        p /= p.sum(-1, keepdims=True)
        return p, 1 + (p * np.log(p)).sum(-1) / np.log(3)

    r = known(torch.cat(lonely()[1]).numpy())[1].mean(-1)
    x, q = pixels.numpy(), np.eye(3)[labels]
    p, certainty = known(x)
    eps = (certainty / (1 + np.exp(-10 * (r - 0.5)))[:, None])[..., None]
    refined, mask = (1 - eps) * q + eps * p, certainty > 1 / 2  # H < ln C / 2
    grads = []
    for k, j in ((0, 1), (1, 0)):
        n = max(mask[j].sum(), 1) if normalize == "selected" else len(x)
        dz = own * (p[k] - refined[k]) / len(x) + mask[j][:, None] * (p[k] - refined[j]) / n
        grads.append(dz.T @ x)
    return grads


@pytest.mark.parametrize("name", LONELY)
def test_empty_selection_on_one_rank(name, ranks):
    """The mean of the two ranks' gradients, by hand: each with its own n_j, where it is not the
    batch; a rank with nothing to learn
    gives zeros and keeps nobody waiting."""
    first, second = (rank[name] for rank in ranks)
    assert all(0 < share < 1 for share in first["selected"]) and second["selected"] == [0, 0]
    assert np.isfinite([first["loss"], second["loss"]]).all() and (second["loss"] == 0) == (
        name == "taught"
    )
    nets, pixels, labels = lonely()
    how = {"own": 1.0} | LONELY[name]
    byhand = [slopes(nets, x, y, **how) for x, y in zip(pixels, labels, strict=True)]
    for ours, theirs, expected in zip(
        first["grads"], second["grads"], np.mean(byhand, axis=0), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.numpy() == pytest.approx(expected, abs=1e-6)  # r is a float32
        assert np.abs(expected).max() > 0.05

    loss = Mutual(MyLC(window=99), LowEntropy(eta=2, b2=0), **LONELY[name])
    alone = one_step(PeerModule(nets, loss), torch.cat(pixels), torch.cat(labels))
    apart = max(
        (a - b).abs().max().item() for a, b in zip(alone["grads"], first["grads"], strict=True)
    )
    assert apart < 1e-6 if name == "batch" else apart > 1e-2  # one process has one n_j for all rows


def test_priming_from_loaders_of_unequal_length(ranks):
    """Three batches on one rank and one on the other, also none: r is over all rows, as one
    process has it on all batches."""
    for n, (mine, others) in enumerate(PRIMING):
        first, second = (rank["primed"][n] for rank in ranks)
        assert first == second
        for ours, theirs in zip(first, primed(mine + others), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
            assert ours[0] > 0.01 and ours[1] == sum(map(len, mine + others))


def test_rows_that_do_not_divide_by_two_processes(ranks, tmp_path):
    """33 rows, three steps of 16 on both: every row is seen, what fills up counts as often as it
    comes, and the ranks are equal;
    one process that is given the same 48 rows in the same order has the same weights and r."""
    first, second = (rank["uneven"] for rank in ranks)
    assert first["steps"] == second["steps"] == 3
    assert difference(first["state"], second["state"]) == 0
    order = [
        i for both in zip(first["seen"], second["seen"], strict=True) for part in both for i in part
    ]
    assert len(order) == 48 and set(order) == set(range(33))
    data = view(33)
    run = uneven(tmp_path, 1, [data[i] for i in order], train_sampling_strategy="sequential")
    run.train()
    assert difference(first["state"], state(run.model)) < 1e-5
    assert [v for name, v in first["state"].items() if name.endswith("running.count")] == [48, 48]


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
