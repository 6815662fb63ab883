"""MentorNet's predefined curricula: the moving percentile and the weights by hand, their
gradient, the phases of training."""

import math

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks

from kd_plugins import CE, MentorNet

LOSSES = [0.1, 0.4, 0.7, 1.0, 3.0]  # cross-entropies of five samples with label 0, two classes


def logits(losses=LOSSES):
    p = torch.tensor(losses, dtype=torch.float64).neg().exp()
    return torch.stack([p.log(), (1 - p).log()], dim=1).requires_grad_()


def run(loss, losses=LOSSES):
    return loss(logits(losses), torch.zeros(len(losses), dtype=torch.long))


def at(progress, **kwargs):
    loss = MentorNet(**kwargs)
    loss.set_progress(progress)
    return loss


# ------------------------------------------------------------------------------------------ by hand


def test_moving_percentile_by_hand():
    """Of five losses the 75th percentile is the fourth, 1.0: m = .5, .75, .875; this batch is
    counted before it is judged."""
    loss = MentorNet("self_paced", reduction="none")
    kept = {0.5: 2, 0.75: 3, 0.875: 3}
    for m, n in kept.items():
        value = run(loss)
        assert loss.moving_percentile.item() == loss.stats["percentile"].item() == pytest.approx(m)
        assert value.tolist() == pytest.approx([*LOSSES[:n], *[0] * (5 - n)])
        assert loss.stats["kept"].item() == pytest.approx(n / 5)


@pytest.mark.parametrize(
    ("percentile", "n", "expected"),
    [
        (0.75, 5, 1.0),
        (0.7, 5, 1.0),
        (0.6, 5, 0.7),  # ranks 3, 2.8, 2.4 of 0 to 4
        (0.0, 5, 0.1),
        (1.0, 5, 3.0),
        (0.75, 4, 0.7),
        (0.75, 1, 0.1),  # ranks 0, 4, 2.25 of 0 to 3, 0
    ],
)
def test_the_percentile_is_the_nearest_loss(percentile, n, expected):
    loss = MentorNet("self_paced", percentile=percentile, decay=0.0)
    run(loss, LOSSES[:n][::-1])
    assert loss.moving_percentile.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gamma", "weights"),
    [(1.0, [1, 1, 0.8, 0.5, 0]), (0.5, [1, 1, 0.6, 0, 0]), (10, [1, 1, 0.98, 0.95, 0.75])],
)
def test_linear_by_hand(gamma, weights):
    """m = .5: the excess is -.4, -.1, .2, .5, 2.5."""
    loss = MentorNet("linear", gamma=gamma, reduction="none")
    assert run(loss).tolist() == pytest.approx(
        [v * x for v, x in zip(weights, LOSSES, strict=True)]
    )
    assert loss.stats["kept"].item() == pytest.approx(sum(weights) / 5)


@pytest.mark.parametrize(
    ("progress", "weights"),
    [
        (0.0, [1] * 5),
        (0.17, [1] * 5),
        (0.18, [1] * 5),
        (0.181, [1, 1, 0, 0, 0]),
        (0.5, [1, 1, 0, 0, 0]),
        (0.899, [1, 1, 0, 0, 0]),
        (0.9, [1, 1, 0.8, 0.5, 0]),
        (1.0, [1, 1, 0.8, 0.5, 0]),
    ],
)
def test_predefined_by_hand(progress, weights):
    value = run(at(progress, reduction="none"))
    assert value.tolist() == pytest.approx([v * x for v, x in zip(weights, LOSSES, strict=True)])


def test_the_mean_is_over_the_batch():
    assert run(MentorNet("self_paced")).item() == pytest.approx(0.5 / 5)  # not 0.5 / 2


def test_m_moves_in_the_burn_in_too():
    loss = at(0.0)
    run(loss)
    assert loss.moving_percentile.item() == pytest.approx(0.5)


def test_eval_judges_by_the_m_of_training():
    loss = MentorNet("self_paced", reduction="none")
    run(loss)
    loss.eval()
    for _ in range(2):
        assert run(loss, [0.45, 0.55, 9.0]).tolist() == pytest.approx([0.45, 0, 0])
    assert loss.moving_percentile.item() == pytest.approx(0.5)


def test_on_the_edge_a_sample_counts():
    loss = MentorNet("self_paced", decay=0.0, percentile=0.5, reduction="none")
    z = torch.zeros(3, 2)  # all at ln 2, and m at ln 2
    assert loss(z, torch.zeros(3, dtype=torch.long)).tolist() == pytest.approx([math.log(2)] * 3)


# ----------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize("curriculum", ["self_paced", "linear"])
def test_value_and_gradient_against_loops(curriculum, soft):
    z = (torch.randn(6, 4, dtype=torch.float64) * 1.5).requires_grad_()
    y = (
        torch.rand(6, 4, dtype=torch.float64).softmax(-1)
        if soft
        else torch.tensor([0, 3, 1, 2, 2, 0])
    )
    qs = y.tolist() if soft else [naive.onehot(k, 4) for k in y.tolist()]
    losses = [
        naive.cross_entropy(q, naive.softmax(row)) for q, row in zip(qs, z.tolist(), strict=True)
    ]
    m = 0.8 * sorted(losses)[4]  # .75 of 0 to 5 is 3.75
    vs = [
        float(x <= m) if curriculum == "self_paced" else min(1.0, max(0.0, 1 - (x - m) / 2))
        for x in losses
    ]
    assert 0 < sum(vs) < 6

    def expected(zs):
        return (
            sum(
                v * naive.cross_entropy(q, naive.softmax(row))
                for v, q, row in zip(vs, qs, zs[0], strict=True)
            )
            / 6
        )

    value = MentorNet(curriculum, decay=0.2, gamma=2.0)(z, y)
    value.backward()
    assert value.item() == pytest.approx(expected([z.tolist()]), abs=1e-6)
    torch.testing.assert_close(
        z.grad, torch.tensor(naive.slope(expected, [z.tolist()])[0]).double(), atol=1e-6, rtol=1e-5
    )


def test_the_weights_carry_no_gradient():
    """v (p - q) / B exactly; what the public code's stop_gradient failed to do (its result was
    dropped) gives another."""
    loss, z, y = MentorNet("linear"), logits(), torch.zeros(5, dtype=torch.long)
    (grad,) = torch.autograd.grad(loss(z, y), z)
    v = torch.tensor([1, 1, 0.8, 0.5, 0], dtype=torch.float64)[:, None]
    bare = (z.softmax(-1) - torch.tensor([1.0, 0.0])) / 5
    torch.testing.assert_close(grad, v * bare)
    ce = torch.nn.functional.cross_entropy(z, y, reduction="none")
    (attached,) = torch.autograd.grad(((1 - (ce - 0.5)).clamp(0, 1) * ce).mean(), z)
    assert (attached - grad).abs().max() > 0.01
    assert not loss.weights(ce.detach()).requires_grad and not loss.moving_percentile.requires_grad


# ------------------------------------------------------------------------------------ limits, state


def test_in_the_burn_in_it_is_cross_entropy():
    z, y = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 3, 1, 2, 2, 0])
    ours, ce = at(0.1)(z, y), CE()(z, y)
    torch.testing.assert_close(ours, ce)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(ce, z))


def test_the_share_that_counts_is_the_percentile_once_the_loss_stands_still():
    loss = MentorNet("self_paced", percentile=0.7)
    losses = torch.linspace(0.01, 3, 101).tolist()
    for _ in range(60):
        run(loss, losses)
    assert loss.stats["kept"].item() == pytest.approx(0.7, abs=0.011)


def test_only_the_predefined_curriculum_asks_for_progress():
    run(MentorNet("self_paced")), run(MentorNet("linear"))
    with pytest.raises(RuntimeError, match="set_progress"):
        run(MentorNet())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_does_not_stay_in_m(bad):
    loss = MentorNet("self_paced")
    run(loss)
    z = logits().detach()
    z[2:, 1] = bad
    with pytest.raises(ValueError, match="NaN"):
        loss(z, torch.zeros(5, dtype=torch.long))
    assert loss.moving_percentile.item() == pytest.approx(0.5)
    run(loss)
    assert loss.moving_percentile.item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"curriculum": "pd"}, "curriculum='pd'.*'predefined', 'self_paced', 'linear'"),
        ({"percentile": 75}, "percentile=75"),
        ({"percentile": math.nan}, "percentile=nan"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"gamma": 0.0}, "gamma=0.0"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MentorNet(**kwargs)


# ------------------------------------------------------------------------------------ two processes

SIZES = [(3, 1), (2, 4), (4, 4), (1, 2)]  # samples of rank 0 and of rank 1 in each step
WORKER = """
from kd_plugins import MentorNet
loss = MentorNet("linear", reduction="none")
for parts in steps:
    z = mine(parts).requires_grad_()
    y = torch.zeros(len(z), dtype=torch.long)
    loss.train()
    values = loss(z, y)
    values.sum().backward()
    seen.append([loss.moving_percentile.item(), values.tolist()])
    if rank == 0:  # evaluation on one process only: it must not wait for the others
        loss.eval()(z, y)
"""


def test_two_processes_hold_one_percentile(tmp_path):
    """Of the joined batch, whatever the sizes of its parts; and so the weights are those of one
    process."""
    results = on_ranks(
        WORKER,
        [[torch.randn(n, 3) * s for n, s in zip(sizes, (1, 3), strict=True)] for sizes in SIZES],
        tmp_path,
    )
    for (m, first), (other, second), (single, both) in zip(*results, strict=True):
        assert m == other == pytest.approx(single, abs=1e-6) != 0
        assert first + second == pytest.approx(both, abs=1e-6)
