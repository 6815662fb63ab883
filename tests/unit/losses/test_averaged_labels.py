"""ELR, SELC and SAT: by hand, against loops over epochs, limits, one table on two processes,
resume."""

import math

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks
from helpers.tiny import CLASSES, ROWS, Net, StopAt, difference, state, trainer

from kd_plugins import CE, ELR, SAT, SELC, Mutual, SelectNone, SoftLabels

P = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]
LN2 = math.log(2)


def logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


def started(cls, n=4, progress=0.5, **kwargs):
    loss = cls(n, 3, **{"reduction": "none"} | kwargs)
    loss.set_progress(progress)
    return loss


# ----------------------------------------------------------------------------------------- by hand


def test_elr_by_hand():
    """beta = 1/2: t is p/2 after the first visit, 3p/4 after the second. Σ p² is 3/8 and 33/50."""
    loss = started(ELR, lambda_=2.0, beta=0.5)
    y, i = torch.tensor([0, 2]), torch.tensor([3, 1])
    own = [LN2, math.log(10)]
    for share in (1 / 2, 3 / 4):
        value = loss(logits(P), y, index=i)
        expected = [
            ce + 2 * math.log(1 - share * squares)
            for ce, squares in zip(own, (3 / 8, 33 / 50), strict=True)
        ]
        assert value.tolist() == pytest.approx(expected, abs=1e-6)
    assert loss.averages.rows[[0, 2]].tolist() == [[0, 0, 0]] * 2
    assert loss.averages.rows[3].tolist() == pytest.approx([0.375, 0.1875, 0.1875])


def test_elr_is_finite_where_it_would_be_minus_infinity():
    """t = p = one-hot: 1 - t·p is at least 2e-4 by the clip, and the clipped p has no gradient."""
    loss = started(ELR, lambda_=1.0, beta=0.0)
    z = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    value = loss(z, torch.tensor([0]), index=torch.tensor([0]))
    clipped, rest = 1 - 1e-4, 1e-4
    total = clipped + 2 * rest
    expected = math.log(1 - (clipped**2 + 2 * rest**2) / total)
    assert value.item() == pytest.approx(expected, rel=1e-3) and expected > math.log(2e-4)
    value.sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_selc_by_hand():
    """alpha = 1/2, label 2 and p = (1/2, 1/4, 1/4): s is (2, 1, 5)/8, then (6, 3, 7)/16."""
    loss = started(SELC, alpha=0.5)
    y, i = torch.tensor([2]), torch.tensor([1])
    for s in ([2 / 8, 1 / 8, 5 / 8], [6 / 16, 3 / 16, 7 / 16]):
        value = loss(logits(P[:1]), y, index=i)
        assert value.tolist() == pytest.approx([naive.cross_entropy(s, P[0])])
        assert loss.averages.rows[1].tolist() == pytest.approx(s)
        assert loss.stats["changed"] == 0
    loss(logits(P[:1]), y, index=i)
    assert loss.stats["changed"] == 1  # (14, 7, 11)/32


def test_sat_by_hand():
    """The weights are max s: 5/8 and 13/20, divided by their mean."""
    loss = started(SAT, alpha=0.5)
    y, i = torch.tensor([2, 1]), torch.tensor([1, 0])
    value = loss(logits(P), y, index=i)
    labels = [[1 / 4, 1 / 8, 5 / 8], [1 / 20, 9 / 10, 1 / 20]]
    mean = (5 / 8 + 9 / 10) / 2
    expected = [max(s) / mean * naive.cross_entropy(s, p) for s, p in zip(labels, P, strict=True)]
    assert value.tolist() == pytest.approx(expected)


# ------------------------------------------------------- against loops over epochs, in Python


def elr_loop(p, q, t, lam, beta):
    """One visit of one sample: its loss, and t is changed in place."""
    clipped = [min(max(x, 1e-4), 1 - 1e-4) for x in p]
    t[:] = [beta * a + (1 - beta) * x / sum(clipped) for a, x in zip(t, clipped, strict=True)]
    agreement = sum(a * x for a, x in zip(t, clipped, strict=True))
    return naive.cross_entropy(q, p) + lam * math.log(1 - agreement)


def selc_loop(p, q, s, alpha, active):
    if active:
        s[:] = [alpha * a + (1 - alpha) * x for a, x in zip(s or q, p, strict=True)]
    return naive.cross_entropy(s or q, p)


@pytest.mark.parametrize("name", ["elr", "selc", "sat"])
def test_against_loops(name):
    n, epochs, size = 7, 6, 3
    z = torch.randn(epochs, n, 3, dtype=torch.float64) * 3
    y = torch.arange(n) % 3
    loss = {
        "elr": lambda: started(ELR, n, lambda_=3.0, beta=0.7),
        "selc": lambda: started(SELC, n, alpha=0.8, begin=0.5),
        "sat": lambda: started(SAT, n, alpha=0.8, begin=0.5),
    }[name]()
    rows = [[0.0] * 3 if name == "elr" else [] for _ in range(n)]
    for e in range(epochs):
        loss.set_progress(e / epochs)
        for i in torch.randperm(n).split(size):
            expected = []
            for k in i.tolist():
                p, q = naive.softmax(z[e, k].tolist()), naive.onehot(k % 3, 3)
                if name == "elr":
                    expected += [elr_loop(p, q, rows[k], 3.0, 0.7)]
                else:
                    expected += [selc_loop(p, q, rows[k], 0.8, e >= 3)]
            if name == "sat":
                w = [max(rows[k] or [1.0]) for k in i.tolist()]
                expected = [x * v * len(w) / sum(w) for x, v in zip(expected, w, strict=True)]
            value = loss(z[e, i], y[i], index=i)
            assert value.tolist() == pytest.approx(expected, abs=1e-5), (e, i)
    assert loss.averages.rows.tolist() == [pytest.approx(row, abs=1e-6) for row in rows]
    if name == "selc":
        torch.testing.assert_close(SoftLabels(loss.soft_labels()).labels.rows, loss.averages.rows)


def test_the_gradient_of_elr_is_that_of_the_paper():
    """λ times p_c / (1 - t·p) (t·p - t_c), beside that of cross-entropy; nothing through t."""
    loss = started(ELR, lambda_=3.0, beta=0.6)
    z, y, i = logits(P), torch.tensor([0, 2]), torch.tensor([0, 1])
    (grad,) = torch.autograd.grad(loss(z, y, index=i).sum(), z)
    p, t = torch.tensor(P).double(), 0.4 * torch.tensor(P).double()
    agreement = (t * p).sum(-1, keepdim=True)
    expected = p - torch.eye(3)[y] + 3 * p / (1 - agreement) * (agreement - t)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "loss",
    [
        started(ELR, lambda_=0.0),
        started(SELC, alpha=1.0),
        started(SAT, alpha=1.0),
        started(SELC, progress=0.14),
        started(SAT, progress=0.29),
    ],
    ids=["elr", "selc", "sat", "selc before begin", "sat before begin"],
)
def test_limits_are_cross_entropy(loss):
    z, y, i = logits(P), torch.tensor([0, 2]), torch.tensor([0, 1])
    for _ in range(2):
        torch.testing.assert_close(loss(z, y, index=i), CE(reduction="none")(z, y))


def test_labels_of_samples_that_were_not_seen():
    loss = started(SELC, 5)
    loss(logits(P), torch.tensor([0, 1]), index=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"3 of 5 samples .* after begin=0\.15"):
        loss.soft_labels()
    labels = loss.soft_labels([2, 0, 0, 1, 0])
    assert labels[[0, 1, 3]].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    torch.testing.assert_close(labels[[2, 4]], loss.averages.rows[[2, 4]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ELR(4, 3, lambda_=-1), "lambda_=-1"),
        (lambda: ELR(4, 3, beta=1.0), r"beta=1\.0.*would stay 0"),
        (lambda: SELC(4, 3, alpha=1.5), r"alpha=1\.5"),
        (lambda: SELC(4, 3, begin=30), "begin=30.*30 epochs of 200 are 0.15"),
        (lambda: SAT(0, 3), "num_samples=0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("cls", [ELR, SELC, SAT])
def test_a_prediction_that_is_no_number_is_not_stored(cls):
    loss = started(cls)
    bad = torch.tensor([[math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="NaN"):
        loss(bad, torch.tensor([1, 2]), index=torch.tensor([0, 1]))
    assert loss.averages.rows[0].tolist() == [0, 0, 0] != loss.averages.rows[1].tolist()


WORKER = """
from kd_plugins import create_loss
seen = []
for name in ("elr", "selc", "sat"):
    loss = create_loss(name, num_samples=9, num_classes=3)
    for s, step in enumerate(steps):
        z, y, i = (mine(parts) for parts in step)
        loss.train()
        loss.set_progress(s / len(steps))
        loss(z.requires_grad_(), y, index=i).backward()
        if rank == 0:  # evaluation on one process only: it must not wait for the others
            loss.eval()(z, y, index=i)
    seen.append(loss.averages.rows.tolist())
"""


def test_two_processes_hold_one_table(tmp_path):
    """Bit-equal on both and in one process, with parts of unequal size and a padded sample."""
    steps = []
    for _ in range(4):
        for index in ([[0, 1, 2], [3, 4]], [[5, 6], [7, 8]], [[3], [3]]):
            index = [torch.tensor(part) for part in index]
            steps.append([[torch.randn(len(i), 3) for i in index], [i % 3 for i in index], index])
    first, second, single = on_ranks(WORKER, steps, tmp_path)
    assert first == second == single
    assert all(sum(row) > 0.3 for table in first for row in table)


@pytest.mark.parametrize("cls", [ELR, SELC, SAT])
def test_a_resumed_run_is_bit_equal(cls, tmp_path):
    """Two peers, each with its table; sizes come from the Trainer; stopped within the second
    epoch."""

    def run(folder, callbacks=()):
        begin = {} if cls is ELR else {"begin": 0.3}
        saving = {"save_strategy": "steps", "save_steps": 4}
        loss = Mutual(cls(**begin), SelectNone())
        return trainer(tmp_path / folder, loss=loss, hf={"callbacks": list(callbacks)}, **saving)

    whole, stopped = run("whole"), run("stopped", [StopAt(8)])
    whole.train()
    stopped.train()
    resumed = run("stopped")
    resumed.train(resume_from_checkpoint=True)
    assert difference(state(whole.model), state(resumed.model)) == 0
    table = resumed.model.criterion.refine[1].averages.rows
    assert table.shape == (ROWS, CLASSES) and (table.sum(-1) > 0).all()
    assert not torch.equal(table, resumed.model.criterion.refine[0].averages.rows)


def test_one_network_in_the_trainer(tmp_path):
    loss = SELC(begin=0.5)
    run = trainer(tmp_path, [Net(1)], loss)
    run.train()
    assert loss.soft_labels().sum(-1).tolist() == pytest.approx([1.0] * ROWS)
