"""Joint and SoftLabels: by hand, against the algorithm as published (a ring refreshed after each
epoch), what is stored."""

import math

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks
from helpers.tiny import CLASSES, ROWS, Net, trainer

from kd_plugins import Joint, Mutual, SelectNone, SoftLabels

LN2, LN3 = math.log(2), math.log(3)
P = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]  # two samples, three classes; their mean is .3, .525, .175
H = [1.5 * LN2, -(0.2 * math.log(0.1) + 0.8 * math.log(0.8))]
balance = -LN3 - (math.log(0.3) + math.log(0.525) + math.log(0.175)) / 3


def logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


def joint(n=4, progress=0.0, **kwargs):
    loss = Joint(n, 3, **kwargs)
    loss.set_progress(progress)
    return loss


def balance_of(ps):
    """KL(u ‖ mean p) by loops."""
    c, n = len(ps[0]), len(ps)
    return sum(math.log(1 / c / (sum(p[k] for p in ps) / n)) / c for k in range(c))


# ------------------------------------------------------------------------------------------ by hand


def test_before_begin_by_hand():
    """The given labels 0 and 2: ln 2 and ln 10; the batch term on every sample."""
    loss = joint(reduction="none")
    value = loss(logits(P), torch.tensor([0, 2]), index=torch.tensor([3, 1]))
    expected = [ce + 1.2 * balance + 0.8 * h for ce, h in zip([LN2, math.log(10)], H, strict=True)]
    assert balance == pytest.approx(0.0985, abs=5e-5)
    assert value.tolist() == pytest.approx(expected, abs=1e-12)
    stats = {k: v.item() for k, v in loss.stats.items()}
    assert stats == pytest.approx({"balance": balance, "entropy": sum(H) / 2, "changed": 0.0})


@pytest.mark.parametrize(
    ("hard", "labels"),
    [(False, [[0.3, 0.525, 0.175], [0.5, 0.25, 0.25]]), (True, [[0, 1, 0], [1, 0, 0]])],
)
def test_after_begin_by_hand(hard, labels):
    """Sample 1 was seen twice, with both rows of P; sample 2 once, with the first; sample 0
    never and keeps its label."""
    loss = joint(alpha=0.0, beta=0.0, hard=hard, reduction="none")
    y = torch.tensor([2, 2, 0])
    loss(logits([P[0], P[0]]), y[:2], index=torch.tensor([1, 2]))
    loss(logits([P[1]]), y[:1], index=torch.tensor([1]))
    loss.set_progress(0.5)
    now = [[0.2, 0.2, 0.6]] * 3
    value = loss(logits(now), y, index=torch.tensor([1, 2, 0]))
    expected = [naive.cross_entropy(q, now[0]) for q in (*labels, [1, 0, 0])]
    assert value.tolist() == pytest.approx(expected, abs=1e-6)
    assert loss.stats["changed"].item() == pytest.approx(2 / 3)
    assert loss.visits.rows.tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize(("progress", "label"), [(69 / 200, 2), (70 / 200, 0), (1.0, 0)])
def test_labels_change_after_70_epochs_of_200(progress, label):
    """begin itself included, though progress is kept in single precision."""
    loss = joint(alpha=0.0, beta=0.0)
    z, y, i = logits([[1 - 2e-9, 1e-9, 1e-9]]), torch.tensor([2]), torch.tensor([0])
    loss(z, y, index=i)
    loss.set_progress(progress)
    value = loss(logits([P[0]]), y, index=i).item()
    assert value == pytest.approx(-math.log(P[0][label]), abs=1e-6)


# --------------------------------------------------------------- against the algorithm as published


def published(epochs, given, begin, window, hard):
    """Labels of every sample in each epoch, and after the last: refreshed when an epoch is over.

    ``epochs`` holds p of each sample [E][N][C].
    """
    ring, labels, used = [None] * window, [list(q) for q in given], []
    for e, outputs in enumerate(epochs):
        used.append([list(q) for q in labels])
        ring[e % window] = outputs
        if e + 1 >= begin:
            for i in range(len(given)):
                kept = [r[i] for r in ring if r is not None]
                mean = [sum(r[c] for r in kept) / len(kept) for c in range(len(given[0]))]
                labels[i] = naive.onehot(mean.index(max(mean)), len(mean)) if hard else mean
    return used, labels


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("begin", "window"), [(4, 3), (2, 4), (5, 1)]
)  # a full ring, one not yet full, the last epoch alone
def test_labels_are_those_of_the_published_algorithm(hard, begin, window):
    n, epochs, size = 7, 10, 3  # batches of 3, 3 and 1, in another order each epoch
    z = torch.randn(epochs, n, 3, dtype=torch.float64) * 2
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    ps = [[naive.softmax(row) for row in rows] for rows in z.tolist()]
    used, final = published(ps, [naive.onehot(k, 3) for k in y.tolist()], begin, window, hard)
    loss = joint(n, begin=begin / epochs, epochs=window, hard=hard, reduction="none")
    steps = epochs * math.ceil(n / size)
    step = 0
    for e in range(epochs):
        for i in torch.randperm(n).split(size):
            loss.set_progress(step / steps)
            step += 1
            value = loss(z[e, i], y[i], index=i)
            batch = [ps[e][k] for k in i.tolist()]
            expected = [
                naive.cross_entropy(used[e][k], ps[e][k])
                + 1.2 * balance_of(batch)
                + 0.8 * naive.entropy(ps[e][k])
                for k in i.tolist()
            ]
            assert value.tolist() == pytest.approx(expected, abs=1e-5), (e, i)
    assert loss.soft_labels().tolist() == [pytest.approx(row, abs=1e-6) for row in final]


# ------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
def test_value_and_gradient_against_loops(soft):
    z = (
        torch.randn(4, 3, dtype=torch.float64) * torch.tensor([[0.3], [1], [2], [4]])
    ).requires_grad_()
    y = torch.rand(4, 3, dtype=torch.float64).softmax(-1) if soft else torch.tensor([0, 2, 1, 2])
    qs = y.tolist() if soft else [naive.onehot(k, 3) for k in y.tolist()]

    def expected(zs):
        ps = [naive.softmax(row) for row in zs[0]]
        own = (
            sum(
                naive.cross_entropy(q, p) + 0.4 * naive.entropy(p)
                for q, p in zip(qs, ps, strict=True)
            )
            / 4
        )
        return own + 0.7 * balance_of(ps)

    value = joint(alpha=0.7, beta=0.4)(z, y, index=torch.arange(4))
    value.backward()
    assert value.item() == pytest.approx(expected([z.tolist()]), abs=1e-12)
    torch.testing.assert_close(
        z.grad, torch.tensor(naive.slope(expected, [z.tolist()])[0]).double(), atol=1e-8, rtol=1e-6
    )


def test_the_entropy_carries_its_gradient_through_both_factors():
    """d(-Σ p ln p)/dz = -p (ln p + H); with the weight p held constant it vanishes, as Σ p dln p
    = 0."""
    z, p = logits(P), torch.tensor(P, dtype=torch.float64)
    first, second = (
        joint(alpha=0.0, beta=b)(z, torch.tensor([0, 1]), index=torch.tensor([0, 1]))
        for b in (1.0, 0.0)
    )
    (grad,) = torch.autograd.grad(first - second, z)
    expected = -p * (p.log() + torch.tensor(H, dtype=torch.float64)[:, None]) / 2
    torch.testing.assert_close(grad, expected)
    assert expected.abs().max() > 0.05


def test_the_gradient_of_a_label_does_not_reach_what_was_stored():
    loss = joint(progress=0.5)
    z, i = logits(P), torch.tensor([0, 1])
    loss(z, torch.tensor([0, 1]), index=i)
    assert not loss.outputs.rows.requires_grad
    other = logits(P)
    loss(other, torch.tensor([0, 1]), index=i).backward()
    assert z.grad is None and other.grad is not None


def test_balance_is_the_papers_divergence_and_has_the_gradient_of_the_codes_form():
    z, y, i = logits(P), torch.tensor([0, 1]), torch.tensor([0, 1])
    loss, ce = joint(alpha=1.0, beta=0.0), joint(alpha=0.0, beta=0.0)
    ours = loss(z, y, index=i) - ce(z, y, index=i)
    theirs = -(torch.softmax(z, -1).mean(0).log() / 3).sum()
    assert theirs.item() - ours.item() == pytest.approx(LN3)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z))
    loss(
        logits([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7]]),
        torch.tensor([0, 0, 0]),
        index=torch.arange(3),
    )
    assert loss.stats["balance"].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_a_class_without_mass_is_finite_and_called_back(scale):
    """The mean is 0 in floats, where ln would be -inf and its gradient NaN."""
    z = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.2, 0.0]]).mul(scale).requires_grad_()
    assert (z.softmax(-1).mean(0) == 0).any() or scale < 1e3
    value = joint()(z, torch.tensor([0, 0]), index=torch.tensor([0, 1]))
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()
    assert (z.grad[:, 1:].sum(0) < 0).all() and z.grad[:, 0].sum() > 0


# -------------------------------------------------------------------------------------------- state


def test_eval_reads_labels_and_stores_nothing():
    loss = joint(alpha=0.0, beta=0.0, progress=0.5)
    y, i = torch.tensor([2]), torch.tensor([0])
    loss(logits(P[:1]), y, index=i)
    loss.eval()
    for _ in range(2):
        value = loss(logits([[0.2, 0.2, 0.6]]), y, index=i).item()
        assert value == pytest.approx(naive.cross_entropy(P[0], [0.2, 0.2, 0.6]), abs=1e-6)
    assert loss.visits.rows.tolist() == [1, 0, 0, 0]


def test_a_prediction_that_is_no_number_is_not_a_visit():
    loss = joint(progress=0.5, alpha=0.0, beta=0.0)
    bad = torch.tensor([[math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for _ in range(3):
        with pytest.raises(ValueError, match="NaN"):
            loss(bad, torch.tensor([1, 2]), index=torch.tensor([0, 1]))
    assert loss.visits.rows.tolist() == [0, 3, 0, 0] and loss.outputs.rows.isfinite().all()
    value = loss(logits(P[:1]), torch.tensor([1]), index=torch.tensor([0])).item()
    assert value == pytest.approx(2 * LN2)  # its given label still


def test_samples_without_a_label_are_counted():
    loss = joint(5)
    loss(logits(P), torch.tensor([0, 1]), index=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="3 of 5 samples were not seen in training and"):
        loss.soft_labels()
    labels = loss.soft_labels([0, 1, -100, 2, -100])  # labels of those that were seen do not matter
    assert labels[[0, 1, 3]].argmax(-1).tolist() == [0, 1, 2]
    torch.testing.assert_close(labels[[4, 2]], torch.tensor(P))
    assert SoftLabels(labels).num_samples == 5
    with pytest.raises(ValueError, match="the label -100 of row 1 is none of the 3 classes"):
        loss.soft_labels([0, -100, 0, 2, 0])
    with pytest.raises(ValueError, match=r"expected 5 labels, got \[2\]"):
        loss.soft_labels([0, 1])


def test_peers_learn_labels_of_their_own():
    loss = Mutual(joint(alpha=0.0, beta=0.0), SelectNone())
    loss.set_progress(0.5)
    i, y = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    a, b = (torch.randn(4, 3) for _ in range(2))
    loss((a, b), y, index=i)
    for refine, z in zip(loss.refine, (a, b), strict=True):
        torch.testing.assert_close(refine.soft_labels(), z.softmax(-1))


def test_in_a_trainer_every_sample_is_visited_once_an_epoch(tmp_path):
    loss = Joint(ROWS, CLASSES, begin=0.5, epochs=2)
    run = trainer(tmp_path, [Net(1)], loss, num_train_epochs=3)
    run.train()
    assert loss.visits.rows.unique().tolist() == [3]
    labels = loss.soft_labels()
    assert labels.shape == (ROWS, CLASSES)
    assert run.state.log_history[0]["changed"] == 0 < run.state.log_history[-2]["changed"]
    second = SoftLabels(labels)
    trainer(tmp_path, [Net(2)], second, num_train_epochs=1).train()
    torch.testing.assert_close(second.labels.rows, labels)


# -------------------------------------------------------------------------------------- soft labels


def test_soft_labels_by_hand_whatever_the_target_is():
    loss = SoftLabels([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    z, i = logits(P), torch.tensor([2, 1])
    expected = (0.25 * LN2 + 0.75 * 2 * LN2 + 0.5 * math.log(10) - 0.5 * math.log(0.8)) / 2
    for y in (torch.tensor([0, 1]), torch.tensor([2, 2]), torch.rand(2, 3).softmax(-1)):
        assert loss(z, y, index=i).item() == pytest.approx(expected, abs=1e-12)
    (grad,) = torch.autograd.grad(loss(z, y, index=i), z)
    torch.testing.assert_close(
        grad, (torch.tensor(P) - torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0]])).double() / 2
    )
    loss(z, torch.tensor([0, 1]), index=i)
    assert loss.stats["changed"].item() == 1.0  # argmax 2 and 0


def test_soft_labels_are_a_copy():
    labels = torch.eye(3)
    loss = SoftLabels(labels)
    labels.fill_(1 / 3)
    assert torch.equal(loss.labels.rows, torch.eye(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Joint(0, 3), "num_samples=0"),
        (lambda: joint(epochs=0), "epochs=0"),
        (lambda: joint(begin=1.5), "begin=1.5"),
        (lambda: joint(begin=70), "begin=70.*70 epochs of 200 are 0.35"),
        (lambda: joint(begin=math.nan), "begin=nan"),
        (lambda: SoftLabels(torch.tensor([0, 1])), r"\[N, C\], got \[2\]"),
        (lambda: SoftLabels([[0.5, 0.5], [0.5, 0.49]]), r"row 1: .*a sum of 0.99; 1 of 2"),
        (lambda: SoftLabels([[-0.5, 1.5], [0.5, 0.5]]), r"row 0: .*minimum of -0.5"),
        (lambda: SoftLabels([[1.0, 0.0], [math.nan, 1.0]]), "row 1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_labels_with_rounding_errors_pass():
    SoftLabels([[0.3334, 0.3334, 0.3334], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "loss", [joint(), SoftLabels(torch.eye(3).repeat(2, 1)[:4])], ids=["joint", "soft_labels"]
)
@pytest.mark.parametrize("index", [4, -1])
def test_an_index_outside_the_data_is_named(loss, index):
    """A negative one would take the label of another sample."""
    with pytest.raises(ValueError, match=f"index {index} is outside.*num_samples=4"):
        loss(logits(P), torch.tensor([0, 1]), index=torch.tensor([0, index]))


def test_labels_of_another_number_of_classes():
    with pytest.raises(ValueError, match=r"num_classes=3.*\[2, 4\]"):
        SoftLabels(torch.eye(3))(
            torch.zeros(2, 4), torch.tensor([0, 1]), index=torch.tensor([0, 1])
        )


# ------------------------------------------------------------------------------------ two processes

WORKER = """
from kd_plugins import Joint
loss = Joint(9, 3, begin=0.4, epochs=2)
for s, step in enumerate(steps):
    z, y, i = (mine(parts) for parts in step)
    loss.train()
    loss.set_progress(s / len(steps))
    loss(z.requires_grad_(), y, index=i).backward()
    if rank == 0:  # evaluation on one process only: it must not wait for the others
        loss.eval()(z, y, index=i)
seen = [loss.outputs.rows.tolist(), loss.visits.rows.tolist(), loss.soft_labels().tolist()]
"""


def test_two_processes_hold_one_table(tmp_path):
    """Bit-equal on both and in one process, with parts of unequal size; a sample that both see
    (padding) is one visit."""
    steps = []
    for _ in range(4):
        for index in ([[0, 1, 2], [3, 4]], [[5, 6], [7, 8]], [[3], [3]]):
            index = [torch.tensor(part) for part in index]
            steps.append([[torch.randn(len(i), 3) for i in index], [i % 3 for i in index], index])
    results = on_ranks(WORKER, steps, tmp_path)
    first, second, single = results
    assert first == second == single
    assert first[1] == [4, 4, 4, 8, 4, 4, 4, 4, 4]
