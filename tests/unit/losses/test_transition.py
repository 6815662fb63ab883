"""Loss correction: by hand, against loops, what public code gets wrong; estimators on data whose
T is known."""

import copy
import math
import types

import numpy as np
import pytest
import torch
from helpers import reference as naive

from kd_plugins import (
    CE,
    BackwardCorrection,
    ForwardCorrection,
    TRevision,
    create_loss,
    estimate_transition,
)
from kd_plugins.audit.estimate_transition import anchor, dual_t, predict
from kd_plugins.losses.transition import LEAST

T3 = [
    [0.8, 0.2, 0.0],
    [0.0, 0.5, 0.5],
    [0.0, 0.0, 1.0],
]  # its inverse by hand: [1.25 -.5 .25] [0 2 -1] [0 0 1]
P = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]
Y = [1, 2]
T4 = [[0.6, 0.3, 0.1, 0.0], [0.1, 0.7, 0.1, 0.1], [0.2, 0.0, 0.6, 0.2], [0.3, 0.1, 0.0, 0.6]]
EVERY = [ForwardCorrection, BackwardCorrection, TRevision, lambda T: TRevision(T, revise=False)]
IDS = ["forward", "backward", "stage3", "stage2"]
every = pytest.mark.parametrize("make", EVERY, ids=IDS)


def case(rows=P, labels=Y):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_(), torch.tensor(labels)


def symmetric(c, rate):
    return (1 - rate - rate / (c - 1)) * torch.eye(c, dtype=torch.float64) + rate / (c - 1)


# ------------------------------------------------------------------------------------------ by hand


def test_forward_by_hand():
    """(p T)_1 = .7 · .2 + .2 · .5 = .24 and (p T)_2 = .3 · .5 + .6 = .75; (T p)_1, the
    transposed form, would be .15."""
    z, y = case()
    assert ForwardCorrection(T3, reduction="none")(z, y).tolist() == pytest.approx(
        [-math.log(0.24), -math.log(0.75)]
    )


def test_backward_by_hand():
    """A row of the inverse per label: 2 (-log .2) - (-log .1), then -log p of class 0 with 1.25,
    -.5, .25."""
    z, y = case(labels=[1, 0])
    loss = BackwardCorrection(T3, reduction="none")
    expected = [
        -2 * math.log(0.2) + math.log(0.1),
        -1.25 * math.log(0.1) + 0.5 * math.log(0.3) - 0.25 * math.log(0.6),
    ]
    assert loss(z, y).tolist() == pytest.approx(expected)
    assert BackwardCorrection(T3)(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([1])) > 0
    assert BackwardCorrection(T3)(torch.tensor([[0.0, 9.0, 0.0]]), torch.tensor([1])) < 0


@pytest.mark.parametrize("revise", [True, False])
def test_revision_by_hand(revise):
    """β = .2/.24 and .6/.75."""
    z, y = case()
    loss = TRevision(T3, revise=revise, reduction="none")
    assert loss(z, y).tolist() == pytest.approx([-0.2 / 0.24 * math.log(0.2), -0.8 * math.log(0.6)])
    assert loss.stats["weight"].item() == pytest.approx((0.2 / 0.24 + 0.8) / 2)


def test_revision_with_a_learned_dT_by_hand():
    """dT_01 = .1 makes (p T')_1 = .31 and leaves (p T')_2; its row then sums to 1.1, and stays
    so."""
    z, y = case()
    loss = TRevision(T3, reduction="none").double()
    with torch.no_grad():
        loss.delta[0, 1] = 0.1
        loss.delta[2, 0] = -0.05
    assert loss(z, y).tolist() == pytest.approx([-0.2 / 0.31 * math.log(0.2), -0.8 * math.log(0.6)])
    assert loss.stats["revision"].item() == pytest.approx(0.1)
    assert (
        loss.matrix.tolist()[0] == pytest.approx([0.8, 0.3, 0.0]) and not loss.matrix.requires_grad
    )
    assert loss.matrix[2, 0].item() == pytest.approx(-0.05)
    assert "revision" not in stage_2(z, y).stats


def stage_2(z, y):
    loss = TRevision(T3, revise=False)
    loss(z, y)
    assert not list(loss.parameters()) and torch.equal(loss.matrix, loss.transition)
    return loss


# ---------------------------------------------------------------------- value and gradient by loops


def mix(T, p, k):
    return sum(p[i] * T[i][k] for i in range(len(p)))


def inverted(T):
    """Gauss-Jordan with pivots, in Python floats."""
    n = len(T)
    rows = [list(row) + naive.onehot(i, n) for i, row in enumerate(T)]
    for c in range(n):
        best = max(range(c, n), key=lambda r: abs(rows[r][c]))
        rows[c], rows[best] = rows[best], rows[c]
        rows[c] = [x / rows[c][c] for x in rows[c]]
        for r in range(n):
            if r != c:
                rows[r] = [x - rows[r][c] * y for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[n:] for row in rows]


def by_loops(kind, T, q, p, held):
    """One sample; ``held``: p where β is a constant."""
    n = range(len(p))
    if kind == "forward":
        return -sum(q[k] * math.log(mix(T, p, k)) for k in n)
    if kind == "backward":
        U = inverted(T)
        return -sum(q[j] * U[j][k] * math.log(p[k]) for j in n for k in n)
    weight = held if kind == "stage2" else p
    return -sum(q[k] * weight[k] / mix(T, weight, k) * math.log(p[k]) for k in n)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize(("make", "kind"), list(zip(EVERY, IDS, strict=True)), ids=IDS)
def test_value_and_gradient_against_loops(make, kind, soft):
    z = (
        torch.randn(5, 4, dtype=torch.float64) * torch.tensor([[0.3], [1], [2], [3], [4]])
    ).requires_grad_()
    y = torch.rand(5, 4, dtype=torch.float64).softmax(-1) if soft else torch.tensor([0, 3, 1, 2, 2])
    qs = y.tolist() if soft else [naive.onehot(i, 4) for i in y.tolist()]
    loss = make(T4).double()
    T = loss.transition.double().tolist()
    if kind == "stage3":
        torch.nn.init.uniform_(loss.delta, 0.0, 0.1)
        T = loss.matrix.tolist()
    held = [naive.softmax(row) for row in z.tolist()]

    def expected(args):  # logits, and the matrix
        total = 0.0
        for row, q, h in zip(args[0], qs, held, strict=True):
            total += by_loops(kind, args[1], q, naive.softmax(row), h) / 5
        return total

    value = loss(z, y)
    value.backward()
    assert value.item() == pytest.approx(expected([z.tolist(), T]), abs=1e-6)
    slope, slope_T = naive.slope(expected, [z.tolist(), T])
    torch.testing.assert_close(z.grad, torch.tensor(slope).double(), atol=2e-6, rtol=1e-5)
    if kind == "stage3":
        torch.testing.assert_close(
            loss.delta.grad, torch.tensor(slope_T).double(), atol=2e-6, rtol=1e-5
        )
        assert (loss.delta.grad <= 0).all()  # what the docstring says: descent only makes T' grow


# ------------------------------------------------------------------------------ limits and theorems


@every
def test_without_noise_all_are_cross_entropy(make):
    z, y = (torch.randn(16, 5) * 5).requires_grad_(), torch.arange(16) % 5
    ours, ce = make(np.eye(5)), torch.nn.functional.cross_entropy(z, y)
    value = ours(z, y)
    torch.testing.assert_close(value, ce, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(v, z)[0] for v in (value, ce)), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "T", [symmetric(4, 0.6), torch.tensor(T4, dtype=torch.float64)], ids=["symmetric", "other"]
)
def test_backward_is_unbiased(T):
    """Σ_j T_yj L(z, j) = CE(z, y), for every clean label y and any prediction."""
    z = torch.randn(7, 4, dtype=torch.float64) * 3
    noisy = BackwardCorrection(T, reduction="none")
    forward = ForwardCorrection(T, reduction="none")
    for y in range(4):
        clean = CE(reduction="none")(z, torch.full((7,), y))
        mean = sum(T[y, j] * noisy(z, torch.full((7,), j)) for j in range(4))
        torch.testing.assert_close(mean, clean, atol=1e-5, rtol=1e-6)
        assert (
            sum(T[y, j] * forward(z, torch.full((7,), j)) for j in range(4)) - clean
        ).abs().max() > 0.1


@pytest.mark.parametrize("make", EVERY[:2], ids=IDS[:2])
def test_on_noisy_labels_the_least_loss_is_at_the_clean_posterior(make):
    """Labels follow η T; cross-entropy would end at η T, these end at η."""
    T, eta = (
        torch.tensor(T4, dtype=torch.float64),
        torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64),
    )
    for loss, end in ((make(T), eta), (CE(), eta @ T)):
        z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [z], lr=0.5, max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14
        )

        def closure(z=z, loss=loss, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(z, eta @ T)
            value.backward()
            return value.detach()

        optimizer.step(closure)
        torch.testing.assert_close(z.detach().softmax(-1), end, atol=1e-5, rtol=0)


def test_reweighting_makes_noisy_labels_clean():
    """At the clean posterior, the mean of β CE over the noisy labels is the clean cross-entropy:
    that is why β."""
    T, eta = (
        torch.tensor(T4, dtype=torch.float64),
        torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64),
    )
    value = TRevision(T, revise=False)(eta.log(), eta @ T)
    assert value.item() == pytest.approx(naive.entropy(eta[0].tolist()), abs=1e-6)


# ------------------------------------------------------------------------------ bugs of public code


def test_dT_is_added_once_and_not_again_for_every_sample():
    """Per sample as if alone; the form that adds inside the loop over samples has T + 3 dT at
    the third."""
    z, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 2, 3])
    loss = TRevision(T4, reduction="none").double()
    torch.nn.init.uniform_(loss.delta, 0.0, 0.1)
    together = loss(z, y)
    alone = torch.cat([loss(z[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    T, p = loss.transition.double(), z.softmax(-1)
    wrong = []
    for i in range(3):
        T = T + loss.delta.detach()
        wrong.append(-p[i, y[i]] / (p[i] @ T)[y[i]] * p[i, y[i]].log())
    assert (
        together[0].item() == pytest.approx(wrong[0].item())
        and (together[1:] - torch.stack(wrong[1:])).abs().min() > 1e-3
    )


def test_dT_learns_in_stage_3():
    """A detached β gives dT no gradient at all; and here the network gets another one than in
    stage 2."""
    z, y = case()
    loss, before = TRevision(T3), TRevision(T3, revise=False)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-7)
    value = loss(z, y)
    (live,), (held,) = (
        torch.autograd.grad(value, z, retain_graph=True),
        torch.autograd.grad(before(z, y), z),
    )
    assert value.item() == pytest.approx(before(z, y).item()) and (live - held).abs().max() > 1e-2
    value.backward()
    assert (loss.delta.grad[:, 1:] < 0).all() and (
        loss.delta.grad[:, 0] == 0
    ).all()  # no sample has label 0
    optimizer.step()
    assert loss.matrix.sub(loss.transition)[:, 1:].amin() > 4e-7  # zero entries of T learn too
    assert loss(z, y) < value


def test_forward_without_an_epsilon_is_not_finite_and_with_a_clip_does_not_learn():
    """p_y and the mass sent to y both underflow."""
    z, y = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True), torch.tensor([1])
    T = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.9, 0.1], [0.1, 0.1, 0.8]])
    p = z.softmax(-1)
    assert (p @ T)[0, 1].log().isinf()
    for wrong in (-((p @ T)[0, 1] + 1e-12).log(), -(p.clamp(1e-7, 1 - 1e-7) @ T)[0, 1].log()):
        assert torch.autograd.grad(wrong, z, retain_graph=True)[0].abs().max() == 0
    value = ForwardCorrection(T)(z, y)
    assert value.item() == pytest.approx(200 - math.log(0.9), rel=1e-6)
    (grad,) = torch.autograd.grad(value, z)
    assert grad[0].tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)


# ------------------------------------------------------------------------------------------ numbers

MATRICES = {
    "identity": torch.eye(3),
    "pair": torch.eye(3) * 0.6 + torch.eye(3).roll(1, 1) * 0.4,
    "dense": symmetric(3, 0.5),
    "triangle": torch.tensor(T3),
    "swap": torch.eye(3).roll(1, 1),  # zeros on the diagonal
    "never": torch.tensor(
        [[1.0, 0, 0], [0.5, 0.5, 0], [1.0, 0, 0]]
    ),  # label 2 is never given; singular
}


@every
@pytest.mark.parametrize("T", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
def test_zeros_in_T_and_in_p_are_finite(make, T, soft):
    """Also the gradient of dT, small enough that Adam can square it in float32."""
    if make is BackwardCorrection and torch.linalg.det(T) == 0:
        return
    rows = torch.cat(
        [torch.eye(3) * s for s in (1e4, -1e4, 30, 60, 75, 85, 95, 110)] + [torch.zeros(1, 3)]
    )
    for y in range(3):
        z = rows.clone().requires_grad_()
        target = torch.full((len(z),), y)
        target = torch.nn.functional.one_hot(target, 3) * 0.9 + 0.1 / 3 if soft else target
        loss = make(T)
        value = loss(z, target)
        value.backward()
        assert value.isfinite() and z.grad.isfinite().all()
        if (
            T.diagonal().min() > 0 or make is ForwardCorrection
        ):  # else β is unbounded, by its definition
            assert z.grad.abs().max() < 10
        for p in loss.parameters():
            assert p.grad.square().isfinite().all()


def test_forward_is_exact_where_a_clip_would_start():
    """T sends class 0 to label 1 with 1e-3, and p_0 is 1e-13: 16 ln 10, where log(... + 1e-12)
    is 12 ln 10."""
    T = torch.tensor([[0.999, 0.001, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    z = torch.tensor([[-13 * math.log(10), -500.0, 0.0]])
    assert ForwardCorrection(T)(z, torch.tensor([1])).item() == pytest.approx(
        16 * math.log(10), rel=1e-6
    )


def test_a_weight_is_bounded_and_fades_with_its_denominator():
    """Never above 1 / T_yy; below a denominator of 1e-12 it falls with p_y, without a jump."""
    loss = TRevision(torch.eye(2), revise=False, reduction="none")
    for gap in (20.0, 27.0, 28.0, 30.0, 40.0):
        loss(torch.tensor([[gap, 0.0]]), torch.tensor([1]))
        assert loss.stats["weight"].item() == pytest.approx(
            min(1.0, math.exp(-gap) / LEAST), rel=1e-4
        )
    below = TRevision(T3)
    with torch.no_grad():
        below.delta[2] = -2.0  # as no descent on this loss would
    below(torch.tensor([[0.0, 5.0, 5.0]]), torch.tensor([1]))
    assert 0 < below.stats["weight"].item() <= 2.0


def test_the_inverse_is_taken_in_float64():
    """ε = 1e-5: in float32, .5 + ε is off by 3e-8, and the inverse, 1 / (4 ε) and so on, by a
    few thousandths."""
    e = 1e-5
    loss = BackwardCorrection([[0.5 + e, 0.5 - e], [0.5 - e, 0.5 + e]])
    assert loss.inverse[0, 0].item() == pytest.approx((0.5 + e) / (2 * e), rel=1e-6)
    assert loss.inverse.dtype == loss.transition.dtype == torch.float32


# --------------------------------------------------------------------------------- object and state


def test_T_may_come_as_anything_and_is_a_copy():
    given = np.array(T3, dtype=np.float32)
    losses = [
        ForwardCorrection(t)
        for t in (given, T3, torch.tensor(T3, dtype=torch.float16).double(), torch.tensor(T3))
    ]
    given[:] = 0
    for loss in losses:
        assert loss.transition.dtype == torch.float32 and loss.num_classes == 3
        torch.testing.assert_close(loss.transition, torch.tensor(T3), atol=1e-3, rtol=0)
    assert isinstance(create_loss("t_revision", transition=T3), TRevision)
    with pytest.raises(ValueError, match=r"num_classes=3.*\[2, 4\]"):
        losses[0](torch.zeros(2, 4), torch.tensor([0, 1]))


def test_a_checkpoint_holds_the_matrices():
    """Into a loss that was made with another T; the inverse comes along, and so does what dT has
    learned."""
    z, y = case()
    for make in EVERY[:3]:
        loss, other = make(T3), make(symmetric(3, 0.3))
        for p in loss.parameters():
            torch.nn.init.uniform_(p, 0.0, 0.1)
        assert other(z, y) != loss(z, y)
        other.load_state_dict(loss.state_dict())
        assert other(z, y) == copy.deepcopy(loss)(z, y) == loss(z, y)
    assert set(TRevision(T3, revise=False).state_dict()) == {"transition"}


@every
def test_what_is_not_a_transition_matrix_is_refused(make):
    for wrong, message in [
        ([[0.9, 0.1], [0.3, 0.6]], r"row 1 sums to 0\.9, expected 1.*another noise$"),
        (
            [[0.9, 0.4], [0.1, 0.6]],
            r"row [01] sums to (1\.3|0\.7), .*columns sum to 1.*transition\.T",
        ),
        ([[1.1, -0.1], [0.0, 1.0]], r"transition\[0, 1\]=-0\.1"),
        ([[0.5, 0.5], [math.nan, 0.5]], r"transition\[1, 0\]=nan"),
        ([[0.5, 0.5], [math.inf, 0.5]], r"row 1 sums to inf"),
        ([[0.5, 0.5]], r"\[C, C\].*\[1, 2\]"),
        ([[1.0]], r"C >= 2.*\[1, 1\]"),
        ([0.5, 0.5], r"\[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(wrong)
    make([[0.9, 0.1005], [0.3, 0.6995]])  # rounded to three digits
    for cls in (ForwardCorrection, BackwardCorrection, TRevision):
        with pytest.raises(ValueError, match=r"num_classes=4.*\[3, 3\]"):
            cls(T3, num_classes=4)


@pytest.mark.parametrize("T", [torch.full((3, 3), 1 / 3), [[0.5 + 1e-8, 0.5 - 1e-8], [0.5, 0.5]]])
def test_backward_refuses_what_it_cannot_invert(T):
    with pytest.raises(
        ValueError, match=r"condition number is (inf|\d\.?\d*e\+\d+), expected at most 1e\+06"
    ):
        BackwardCorrection(T)
    ForwardCorrection(T)


# --------------------------------------------------------------------------------------- estimators


def world(T, n=4000, sharp=10.0, seed=0):
    """Clean posteriors η [N, C] and noisy labels [N] under T."""
    g = torch.Generator().manual_seed(seed)
    eta = (torch.randn(n, len(T), generator=g, dtype=torch.float64) * sharp).softmax(-1)
    clean = torch.multinomial(eta, 1, generator=g)[:, 0]
    return eta, torch.multinomial(T[clean], 1, generator=g)[:, 0]


def error(estimate, T):
    return (estimate - T).abs().sum().item()


@pytest.mark.parametrize(
    "T", [symmetric(4, 0.5), torch.tensor(T4, dtype=torch.float64)], ids=["symmetric", "other"]
)
def test_anchor_is_exact_on_a_perfect_posterior_with_anchor_points(T):
    eta, _ = world(T)
    eta[torch.tensor([7, 77, 777, 3777])] = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]]
    assert torch.equal(anchor(eta @ T), torch.eye(4, dtype=torch.float64) @ T)
    assert error(anchor((eta @ T)[:7]), T) > 0.01  # without them it is not


def test_anchor_by_hand():
    """Columns are looked at, whole rows are taken; the transposed or column-wise form gives
    another matrix."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.6, 0.0, 0.4]])
    assert anchor(probs).tolist() == probs[[3, 2, 1]].tolist()
    assert (
        anchor(probs, 1.0).tolist() == probs[[0, 0, 3]].tolist()
    )  # only the largest of each class falls
    assert (
        anchor(probs, 0.5).tolist() == probs[[2, 1, 0]].tolist()
    )  # index ceil(1.5) = 2 of the sorted, and above


@pytest.mark.parametrize("n", [1, 2, 33, 34, 35, 100, 101, 300])
def test_the_filter_is_numpys_higher_percentile(n):
    probs = torch.randn(n, 3, dtype=torch.float64).softmax(-1)
    estimate = anchor(probs, 0.97)
    for i in range(3):
        limit = np.percentile(probs[:, i].numpy(), 97, method="higher")
        kept = [row for row in probs.tolist() if row[i] < limit] or probs.tolist()
        assert estimate[i].tolist() == max(kept, key=lambda row: row[i])


def test_a_filter_that_leaves_nothing_leaves_the_largest():
    constant = torch.full((5, 2), 0.5)
    assert anchor(constant, 0.97).tolist() == [[0.5, 0.5]] * 2
    ties = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    assert anchor(ties, 0.5)[0].tolist() == ties[3].tolist()
    one = torch.tensor([[0.3, 0.7]])
    assert anchor(one, 0.97).tolist() == one.tolist() * 2


def test_dual_t_by_hand():
    """T_club = [[.8 .2] [.3 .7]]; two are predicted 0 (labels 0, 1), two 1 (labels 1, 1):
    T_spade = [[.5 .5] [0 1]]."""
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.4, 0.6], [0.3, 0.7]])
    expected = [[0.8 * 0.5, 0.8 * 0.5 + 0.2], [0.3 * 0.5, 0.3 * 0.5 + 0.7]]
    for i, row in enumerate(dual_t(probs, torch.tensor([0, 1, 1, 1]), quantile=None).tolist()):
        assert row == pytest.approx(expected[i])
    few = dual_t(
        probs, torch.tensor([0, 1, 1, 1])
    )  # 97%: the surest of each class falls, T_club = [[.6 .4] [.4 .6]]
    assert few[0].tolist() == pytest.approx([0.3, 0.7])


def test_a_class_that_is_never_predicted_keeps_its_mass():
    """Zeros instead, as in public code: the rows of T would lose the last class, and label 2
    would cost -log 0."""
    probs = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3]])
    labels = torch.tensor([0, 1, 0])
    T = dual_t(probs, labels, None)
    torch.testing.assert_close(T.sum(1), torch.ones(3))
    assert T[:, 2].tolist() == pytest.approx([0.2, 0.3, 0.3])
    club, spade = anchor(probs), torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
    assert ((club @ spade).sum(1) < 0.9).all() and (club @ spade)[:, 2].max() == 0
    value = ForwardCorrection(T)(torch.tensor([[5.0, 0.0, -5.0]]), torch.tensor([2]))
    assert value.item() < 2


@pytest.mark.parametrize("quantile", [None, 0.97])
def test_dual_t_is_nearer_than_anchor_on_a_posterior_that_is_too_sure(quantile):
    """Measured over five seeds: 2.5 to 3.0 for anchor, 0.4 to 0.7 for dual_t, as summed absolute
    errors."""
    T = torch.tensor(T4, dtype=torch.float64)
    for seed in (0, 1):
        eta, labels = world(T, seed=seed)
        noise = torch.randn(
            eta.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        probs = (2.5 * (eta @ T + 1e-6).log() + 0.6 * noise).softmax(-1)
        dual = dual_t(probs, labels, quantile)
        torch.testing.assert_close(dual.sum(1), torch.ones(4, dtype=torch.float64))
        assert error(dual, T) < 1.0 and error(dual, T) < 0.5 * error(anchor(probs, quantile), T)


class Tiny(torch.nn.Module):
    def __init__(self, as_output=False):
        super().__init__()
        self.norm, self.drop, self.head = (
            torch.nn.BatchNorm1d(5),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(5, 3),
        )
        self.as_output = as_output

    def forward(self, x):
        logits = self.head(self.drop(self.norm(x)))
        return types.SimpleNamespace(logits=logits) if self.as_output else logits


def batches(kind="tuples"):
    data = [(torch.randn(n, 5), torch.arange(n) % 3) for n in (4, 4, 1)]
    loader = [
        {"pixel_values": x, "labels": y} if kind == "dictionaries" else (x, y, "more")
        for x, y in data
    ]
    return loader, torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["tuples", "dictionaries"])
@pytest.mark.parametrize("as_output", [True, False])
def test_predict(capfd, training, kind, as_output):
    model = Tiny(as_output).train(training)
    model.norm.eval()  # frozen, whatever the rest does
    before = copy.deepcopy(model.state_dict())
    loader, x, y = batches(kind)
    probs, labels = predict(model, loader)
    assert [m.training for m in (model, model.norm, model.drop)] == [training, False, training]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert probs.dtype == torch.float32 and not probs.requires_grad and torch.equal(labels, y)
    with torch.no_grad():
        torch.testing.assert_close(probs, model.head(model.norm(x)).softmax(-1))
    assert capfd.readouterr() == ("", "")  # no bar in a log file


def test_predict_is_in_full_precision_also_for_a_half_model():
    loader, *_ = batches()
    probs, _ = predict(Tiny().bfloat16(), [(x.bfloat16(), y) for x, y, _ in loader])
    assert probs.dtype == torch.float32 and (probs.sum(1) - 1).abs().max() < 1e-6


def test_predict_restores_the_mode_after_an_error_and_wants_data():
    model = Tiny().train()
    for loader, wrong in (([{"images": torch.zeros(1, 5)}], KeyError), ([], ValueError)):
        with pytest.raises(wrong, match=r"pixel_values|no batch"):
            predict(model, loader)
        assert all(m.training for m in model.modules())


def test_estimate_transition_composes():
    """Each method with its own default quantile, and with the one that is given; what it returns
    is what a loss takes."""
    model = Tiny()
    loader = [(torch.randn(50, 5), torch.randint(3, (50,))) for _ in range(4)]
    probs, labels = predict(model, loader)
    assert torch.equal(estimate_transition(model, loader), anchor(probs))
    assert torch.equal(estimate_transition(model, loader, quantile=0.9), anchor(probs, 0.9))
    assert torch.equal(estimate_transition(model, loader, "dual_t"), dual_t(probs, labels, 0.97))
    assert torch.equal(
        estimate_transition(model, loader, "dual_t", quantile=None), dual_t(probs, labels, None)
    )
    assert (
        len(
            {
                m.sum(0)[0].item()
                for m in (anchor(probs), anchor(probs, 0.97), dual_t(probs, labels, None))
            }
        )
        == 3
    )
    T = estimate_transition(model, loader, "dual_t")
    assert T.dtype == torch.float32
    for make in EVERY:
        assert make(T)(torch.zeros(1, 3), torch.tensor([0])).isfinite()
    with pytest.raises(ValueError, match=r"method='dual'.*'anchor', 'dual_t'"):
        estimate_transition(model, loader, "dual")
    with pytest.raises(TypeError, match="quantil"):
        estimate_transition(model, loader, quantil=0.9)


def test_estimators_refuse():
    probs = torch.full((4, 2), 0.5)
    for wrong, message in [
        (torch.randn(4, 2), "not logits"),
        (torch.full((4, 2), math.nan), "sum to 1"),
        (torch.full((4, 2), 0.7), "sum to 1"),
        (torch.zeros(0, 2), r"\[0, 2\]"),
        (torch.ones(4), r"\[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            anchor(wrong)
    for quantile in (0.0, 97, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"quantile={quantile}"):
            anchor(probs, quantile)
    for labels, message in [
        (torch.tensor([0, 1, 0]), r"integers \[4\].*\[3\]"),
        (torch.zeros(0, dtype=torch.long), r"\[0\]"),
        (torch.zeros(4, 2), r"float32 \[4, 2\]"),
        (torch.zeros(4), "float32"),
        (torch.tensor([0, 1, 2, 0]), "0 to 1.*got 0 to 2"),
        (torch.tensor([0, 1, -1, 0]), "got -1 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            dual_t(probs, labels)
