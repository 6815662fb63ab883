"""Robust losses: by hand, value and gradient against loops in Python, limits, pruning over
epochs, determinants."""

import itertools
import math
import warnings

import pytest
import torch
from helpers import reference as naive
from helpers.processes import on_ranks

from kd_plugins import APL, CE, DMI, GCE, MAE, MKD, NCE, NFL, RCE, SCE, TruncatedGCE, create_loss
from kd_plugins.losses.functional import as_probs

P = [
    [0.25, 0.5, 0.25],
    [0.64, 0.2, 0.16],
]  # two samples, three classes; p_y = 1/4 and 4/25, their roots 1/2 and 2/5
Y = [0, 2]
CLAMP = math.log(1e-4)  # what the authors' code of SCE and APL has for log 0


def case(rows=P, labels=Y):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_(), torch.tensor(labels)


def gradient(loss, z, y, **extra):
    return torch.autograd.grad(loss(z, y, **extra), z)[0]


# ------------------------------------------------------------------------------------------ by hand

LN2, LN5 = math.log(2), math.log(5)


@pytest.mark.parametrize(
    ("loss", "first", "second"),
    [
        (MAE(), 0.75, 0.84),
        (GCE(q=0.5), 1.0, 1.2),  # (1 - 1/2) / (1/2) and (1 - 2/5) / (1/2)
        (RCE(), 3.0, 3.36),  # 4 · 0.75 and 4 · 0.84
        (RCE(log_zero=CLAMP), 9.210340 * 0.75, 9.210340 * 0.84),
        (SCE(), 12 * LN2 + 0.3, 12 * (LN5 - LN2) + 0.336),  # 6 ln 4 and 6 ln(25/4)
        (SCE(alpha=0.1, beta=1.0), 0.2 * LN2 + 3, 0.2 * (LN5 - LN2) + 3.36),
        (
            NCE(),
            2 / 5,
            2 * (LN5 - LN2) / (5 * LN5 - 6 * LN2),
        ),  # ln 4 / (ln 4 + ln 2 + ln 4); 0.64 = 16/25, 0.2 = 1/5
        (NFL(gamma=1.0), 1.5 / 3.5, None),  # 3/4 · 2 ln 2 of (3/4 · 2 + 1/2 · 1 + 3/4 · 2) ln 2
        (
            NFL(),
            math.sqrt(3) / (2 * math.sqrt(3) + math.sqrt(0.5)),
            None,
        ),  # √(3/4) · 2 of (√(3/4) · 4 + √(1/2)) ln 2
        (APL(), 10 * 2 / 5 + 0.1 * 3, None),
        (
            APL("nfl", MAE(), alpha=2, beta=3),
            2 * math.sqrt(3) / (2 * math.sqrt(3) + math.sqrt(0.5)) + 3 * 0.75,
            None,
        ),
    ],
    ids=repr,
)
def test_by_hand(loss, first, second):
    z, y = case()
    assert loss(z[:1], y[:1]).item() == pytest.approx(first, rel=1e-6)
    if second is not None:
        assert loss(z, y).item() == pytest.approx((first + second) / 2, rel=1e-6)


WEIGHTS = [2.0, 9.0, 0.5]  # of the labels 0 and 2: 2 and 1/2, together 5/2


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (MAE, (2 * 0.75 + 0.5 * 0.84) / 2.5),
        (lambda **w: GCE(q=0.5, **w), (2 * 1.0 + 0.5 * 1.2) / 2.5),
        (RCE, (2 * 3.0 + 0.5 * 3.36) / 2.5),
        (SCE, (2 * (12 * LN2 + 0.3) + 0.5 * (12 * (LN5 - LN2) + 0.336)) / 2.5),
        (NCE, (2 * 2 / 5 + 0.5 * 2 * (LN5 - LN2) / (5 * LN5 - 6 * LN2)) / 2.5),
        (lambda **w: APL("ce", "mae", 2, 3, **w), (2 * (4 * LN2 + 2.25) + 0.5 * 6.185163) / 2.5),
    ],
)
def test_class_weights_by_hand(make, expected):
    z, y = case()
    assert make(weight=WEIGHTS)(z, y).item() == pytest.approx(expected, rel=1e-6)
    both = make(weight=WEIGHTS, reduction="sum")(z, y).item()
    assert both == pytest.approx(2.5 * expected, rel=1e-6)
    assert make(weight=[3.0] * 3)(z, y).item() == pytest.approx(make()(z, y).item())


def test_class_weights_of_a_truncated_loss():
    """The values per sample of the test below, .2 and 1, weigh 3 and 1; both have label 0 and 1."""
    loss = TruncatedGCE(2, q=0.5, k=0.25, start=0.5, weight=[3.0, 1.0])
    loss.set_progress(0.5)
    z = torch.tensor([[0.81, 0.19], [0.96, 0.04]], dtype=torch.float64).log()
    value = loss(z, torch.tensor([0, 1]), index=torch.arange(2))
    assert value.item() == pytest.approx((3 * 0.2 + 1 * 1.0) / 4)


def test_class_weights_are_those_of_cross_entropy():
    z, y = spread(soft=False)
    w = torch.tensor([0.5, 2.0, 1.0, 3.0])
    expected = torch.nn.functional.cross_entropy(z, y, weight=w.double())
    for loss in (SCE(1.0, 0.0, weight=w), APL("ce", "mae", 1, 0, weight=w)):
        torch.testing.assert_close(loss(z, y), expected)
    with pytest.raises(TypeError, match=r"DMI .*class weights"):
        DMI(weight=w)(z, y)


def test_dmi_by_hand():
    """U = [[.8, .2], [.3, .7]], det = .56 - .06; with class 0 twice U = [[1.2, .8], [.3, .7]],
    det = .84 - .24."""
    z, y = case([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]], [0, 1, 0])
    assert DMI()(z[:2], y[:2]).item() == pytest.approx(-math.log(0.501), abs=1e-12)
    assert DMI()(z, y).item() == pytest.approx(-math.log(0.601), abs=1e-12)
    assert DMI(eps=0)(z, y).item() == pytest.approx(-math.log(0.6), abs=1e-12)
    assert DMI()(z, 1 - y).item() == pytest.approx(
        -math.log(0.601), abs=1e-12
    )  # of a determinant below 0


# ---------------------------------------------------------------------- value and gradient by loops


def power(q):
    return lambda label, p, const: sum(a * (1 - b**q) / q for a, b in zip(label, p, strict=True))


def reverse(log_zero):
    def loss(label, p, const):
        return -sum(
            b * (max(math.log(a), log_zero) if a > 0 else log_zero)
            for a, b in zip(label, p, strict=True)
        )

    return loss


def normalised(gamma, detach=True):
    """(1 - p)^gamma is held where ``const`` is, unless told otherwise."""

    def loss(label, p, const):
        focal = [
            (1 - c) ** gamma * math.log(b) for b, c in zip(p, const if detach else p, strict=True)
        ]
        return sum(a * f for a, f in zip(label, focal, strict=True)) / sum(focal)

    return loss


def plus(u, f, v, g):
    return lambda label, p, const: u * f(label, p, const) + v * g(label, p, const)


def cross_entropy(label, p, const):
    return naive.cross_entropy(label, p)


CASES = [
    (MAE(), power(1)),
    (GCE(), power(0.7)),
    (GCE(q=0.1), power(0.1)),
    (RCE(), reverse(-4)),
    (RCE(log_zero=-1.5), reverse(-1.5)),
    (SCE(alpha=0.3, beta=2), plus(0.3, cross_entropy, 2, reverse(-4))),
    (NCE(), normalised(0)),
    (NFL(), normalised(0.5)),
    (NFL(gamma=2), normalised(2)),
    (APL(), plus(10, normalised(0), 0.1, reverse(-4))),
    (APL("nfl", "mae", 2, 3), plus(2, normalised(0.5), 3, power(1))),
]


def spread(soft, samples=5, classes=4):
    scale = torch.tensor([0.3, 1, 2, 4, 8], dtype=torch.float64)[:samples, None]
    z = (torch.randn(samples, classes, dtype=torch.float64) * scale).requires_grad_()
    y = (torch.randn(samples, classes, dtype=torch.float64) * 2).softmax(
        -1
    )  # some mass below exp(-4), some above
    return z, y if soft else torch.tensor([0, 3, 1, 2, 2])[:samples]


def by_loops(per_sample, z, y):
    """Mean of per_sample(label, p, p held) over nested lists, and its slope in the same nesting."""
    labels, const = (
        as_probs(y, z.shape[1], z.dtype).tolist(),
        [naive.softmax(row) for row in z.tolist()],
    )

    def value(zs):
        rows = zip(labels, zs[0], const, strict=True)
        return sum(per_sample(label, naive.softmax(row), c) for label, row, c in rows) / len(labels)

    return value([z.tolist()]), torch.tensor(naive.slope(value, [z.tolist()])[0], dtype=z.dtype)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize(
    ("loss", "per_sample"),
    CASES,
    ids=lambda x: repr(x).replace("\n", "") if hasattr(x, "reads") else "",
)
def test_value_and_gradient_against_loops(loss, per_sample, soft):
    z, y = spread(soft)
    value, slope = by_loops(per_sample, z, y)
    assert loss(z, y).item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(gradient(loss, z, y), slope, atol=1e-9, rtol=1e-6)


def test_the_focal_factors_are_constants():
    """The equations alone would differentiate (1 - p)^gamma, in the numerator and in the
    denominator."""
    z, y = spread(soft=False)
    _, attached = by_loops(normalised(0.5, detach=False), z, y)
    assert (gradient(NFL(), z, y) - attached).abs().max() > 1e-3


def determinant(m):
    """Sum over permutations; its sign from the number of inversions."""
    n, total = len(m), 0.0
    for order in itertools.permutations(range(n)):
        inversions = sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
        total += (-1) ** inversions * math.prod(m[i][order[i]] for i in range(n))
    return total


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize("eps", [1e-3, 0.0, 0.5])
def test_dmi_against_loops(eps, soft):
    z = torch.randn(7, 3, dtype=torch.float64).requires_grad_()
    y = (
        torch.randn(7, 3, dtype=torch.float64).softmax(-1)
        if soft
        else torch.tensor([0, 1, 2, 2, 1, 2, 0])
    )
    labels = as_probs(y, 3, z.dtype).tolist()

    def value(zs):
        ps = [naive.softmax(row) for row in zs[0]]
        u = [
            [sum(q[i] * p[j] for q, p in zip(labels, ps, strict=True)) for j in range(3)]
            for i in range(3)
        ]
        return -math.log(abs(determinant(u)) + eps)

    assert DMI(eps)(z, y).item() == pytest.approx(value([z.tolist()]), abs=1e-10)
    slope = torch.tensor(naive.slope(value, [z.tolist()])[0], dtype=z.dtype)
    torch.testing.assert_close(gradient(DMI(eps), z, y), slope, atol=1e-7, rtol=1e-5)


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize(
    ("ours", "theirs", "tol"),
    [
        (GCE(q=1e-9), CE(), 1e-7),
        (GCE(q=1.0), MAE(), 0),
        (NFL(gamma=0.0), NCE(), 0),
        (SCE(alpha=0.7, beta=0.2), 0.7 * CE() + 0.2 * RCE(), 1e-12),
        (SCE(alpha=0.7, beta=0.2, log_zero=CLAMP), 0.7 * CE() + 0.2 * RCE(log_zero=CLAMP), 1e-12),
        (APL("nce", "mae", 10, 1), 10 * NCE() + 1 * MAE(), 1e-12),
        (
            APL(NFL(gamma=2), RCE(log_zero=CLAMP), 50, 0.1),
            50 * NFL(gamma=2) + 0.1 * RCE(log_zero=CLAMP),
            1e-12,
        ),
        (APL("ce", "gce", 0.5, 0.0), 0.5 * CE(), 1e-12),
        (APL(GCE(q=0.3), SCE(), 0.0, 2), 2 * SCE(), 1e-12),
        (APL("ce", "rce", 6, 0.1), SCE(), 1e-12),
    ],
    ids=lambda x: type(x).__name__,
)
def test_limits(ours, theirs, tol, soft):
    z, y = spread(soft)
    torch.testing.assert_close(ours(z, y), theirs(z, y), atol=tol, rtol=tol)
    torch.testing.assert_close(gradient(ours, z, y), gradient(theirs, z, y), atol=tol, rtol=tol)


@pytest.mark.parametrize("log_zero", [-4.0, CLAMP])
def test_rce_of_a_hard_label_is_mae_to_scale(log_zero):
    z, y = spread(soft=False)
    torch.testing.assert_close(RCE(log_zero)(z, y), -log_zero * MAE()(z, y))


@pytest.mark.parametrize(
    ("loss", "constant"), [(MAE(), 3), (RCE(), 12), (NCE(), 1), (NFL(), 1)], ids=repr
)
def test_what_makes_them_robust_is_that_the_sum_over_labels_is_constant(loss, constant):
    """Symmetric noise then changes the risk by a factor and a constant; cross-entropy's sum has
    no bound."""
    z, _ = spread(soft=False)
    total = sum(loss(z, torch.full((5,), label)) for label in range(4))
    assert total.item() == pytest.approx(constant)


def test_label_noise_changes_dmi_by_a_constant():
    """The joint distribution under noise is Tᵀ U, and its determinant det T det U."""
    z, transition = (
        torch.randn(9, 3, dtype=torch.float64).requires_grad_(),
        torch.rand(3, 3).double().softmax(-1),
    )
    y = as_probs(torch.tensor([0, 1, 2] * 3), 3, torch.float64)
    clean, noisy, shift = (
        DMI(eps=0)(z, y),
        DMI(eps=0)(z, y @ transition),
        math.log(abs(determinant(transition.tolist()))),
    )
    assert noisy.item() == pytest.approx(clean.item() - shift)
    torch.testing.assert_close(gradient(DMI(eps=0), z, y @ transition), gradient(DMI(eps=0), z, y))


# --------------------------------------------------------------------------------- edges of numbers


def test_gce_has_no_gradient_where_p_is_zero():
    """(1 - p^q) / q of a softmax gives 0 · inf there: NaN in every public version without a
    clamp."""
    z, y = torch.tensor([[1e4, 0.0]], requires_grad=True), torch.tensor([1])
    assert GCE()(z, y).item() == pytest.approx(1 / 0.7)
    assert torch.equal(gradient(GCE(), z, y), torch.zeros(1, 2))
    (wrong,) = torch.autograd.grad(((1 - z.softmax(-1)[0, 1] ** 0.7) / 0.7), z)
    assert wrong.isnan().any()


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (GCE(), lambda p: -(p**0.7)),
        (CE(), lambda p: -1.0),
        (SCE(6, 0), lambda p: -6.0),
        (RCE(), lambda p: -4 * p),
    ],
    ids=["gce", "ce", "sce", "rce"],
)
def test_no_clamp_stops_the_gradient_of_a_small_probability(loss, slope):
    """With p clamped at 1e-7, as in the public code, all of them are 0 here."""
    p = 1e-9
    z, y = (
        torch.tensor([[0.0, math.log(p)]], dtype=torch.float64, requires_grad=True),
        torch.tensor([1]),
    )
    assert gradient(loss, z, y)[0, 1].item() == pytest.approx(slope(p), rel=1e-6)


def test_a_mass_below_the_floor_counts_as_none():
    z = torch.tensor([[0.0, 0.0]])
    assert RCE()(z, torch.tensor([[0.99, 0.01]])).item() == pytest.approx(
        0.5 * (4 - math.log(0.99))
    )
    assert RCE(log_zero=CLAMP)(z, torch.tensor([[0.99, 0.01]])).item() == pytest.approx(
        -0.5 * math.log(0.99 * 0.01)
    )


# ------------------------------------------------------------------------------------------ pruning


def believed(*p_y):
    """Logits [B, 2] whose p_0 are these."""
    p = torch.tensor(p_y, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log().requires_grad_(), torch.zeros(
        len(p_y), dtype=torch.long
    )


def visit(loss, progress, *p_y, index=None):
    """Value per sample, then the gradient's largest entry per sample, of one training step."""
    loss.set_progress(progress)
    z, y = believed(*p_y)
    each = loss(z, y, index=torch.arange(len(p_y)) if index is None else torch.tensor(index))
    return each.tolist(), torch.autograd.grad(each.sum(), z)[0].abs().amax(1).tolist()


def make(num_samples=2, q=0.5, k=0.25, start=0.5, refresh=3, reduction="none", **how):
    """L_q(k) = (1 - 1/2) / (1/2) = 1."""
    return TruncatedGCE(
        num_samples, q=q, k=k, start=start, refresh=refresh, reduction=reduction, **how
    )


def test_a_sample_that_is_not_believed_is_pruned_by_hand():
    """L_.5(.81) = .2, L_.5(.04) = 1.6: above L_.5(.25) = 1."""
    loss = make()
    values, grads = visit(loss, 0.49, 0.81, 0.04)
    assert values == pytest.approx([0.2, 1.6]) and min(grads) > 0 and loss.stats["kept"] == 1
    assert loss.visits.rows.tolist() == [0, 0]
    values, grads = visit(loss, 0.5, 0.81, 0.04)
    assert (
        values == pytest.approx([0.2, 1.0])
        and grads[0] > 0
        and grads[1] == 0
        and loss.stats["kept"] == 0.5
    )
    assert loss.weights.rows.tolist() == [1, 0] and loss.visits.rows.tolist() == [1, 1]


def test_the_mean_is_over_the_whole_batch():
    """Not over what is kept, which would be .2."""
    loss = make(reduction="mean")
    loss.set_progress(1.0)
    z, y = believed(0.81, 0.04)
    value = loss(z, y, index=torch.arange(2))
    assert value.item() == pytest.approx((0.2 + 1.0) / 2)
    (grad,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(grad[:1], gradient(GCE(q=0.5), *believed(0.81)) / 2)


def test_exactly_k_is_pruned():
    loss = make(1, q=1.0, k=0.5)
    values, grads = visit(loss, 1.0, 0.5)
    assert values == [0.5] and grads == [0] and loss.stats["kept"] == 0


def test_a_decision_stands_until_the_next_and_can_be_reversed():
    """Refreshed every third visit: at visits 0, 3, 6. Between them neither believing nor
    doubting changes anything."""
    loss, kept = make(), []
    for p in [
        (0.81, 0.04),
        (0.04, 0.81),
        (0.04, 0.81),
        (0.04, 0.81),
        (0.81, 0.81),
        (0.81, 0.81),
        (0.81, 0.81),
    ]:
        visit(loss, 0.9, *p)
        kept.append(loss.weights.rows.tolist())
    assert kept == [[1, 0]] * 3 + [[0, 1]] * 3 + [[1, 1]]


def test_the_clock_of_each_sample_is_its_own():
    loss = make(3)
    visit(loss, 0.9, 0.04, index=[2])
    visit(loss, 0.9, 0.04, 0.81, index=[0, 2])
    assert loss.weights.rows.tolist() == [0, 1, 0] and loss.visits.rows.tolist() == [1, 0, 2]


def test_pruning_starts_at_epoch_40_of_120():
    loss = make(start=1 / 3)
    visit(loss, 39 / 120, 0.04)
    assert loss.weights.rows.all()
    visit(loss, 40 / 120, 0.04)
    assert loss.weights.rows.tolist() == [0, 1]
    assert TruncatedGCE(2).start == 1 / 3 and TruncatedGCE(2).refresh == 10


def test_eval_uses_the_weights_and_leaves_them():
    loss = make()
    visit(loss, 0.9, 0.81, 0.04)
    loss.eval()
    for _ in range(4):
        values, _ = visit(loss, 0.9, 0.04, 0.81)  # 1.6 and pruned
        assert values == pytest.approx([1.6, 1.0])
    assert loss.weights.rows.tolist() == [1, 0] and loss.visits.rows.tolist() == [1, 1]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
def test_without_a_threshold_it_is_gce(soft):
    """Value and gradient, also after a visit at which p_y underflowed to 0, which is no reason
    to prune at k = 0."""
    z, y = spread(soft)
    loss, index = TruncatedGCE(5, k=0.0, start=0.0), torch.arange(5)
    loss.set_progress(1.0)
    for scale in (1e4, 1.0):
        scaled = (z.detach() * scale).requires_grad_()
        torch.testing.assert_close(loss(scaled, y, index=index), GCE()(scaled, y))
        torch.testing.assert_close(
            gradient(loss, scaled, y, index=index), gradient(GCE(), scaled, y)
        )


def test_before_the_start_it_is_gce():
    z, y = spread(soft=False)
    loss = TruncatedGCE(5)
    loss.set_progress(0.3)
    assert torch.equal(loss(z, y, index=torch.arange(5)), GCE()(z, y))


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
def test_many_epochs_against_loops(soft):
    """12 epochs in another order each, with batches of 3 and a short last one."""
    n, epochs, q, k, refresh = 7, 12, 0.7, 0.4, 3
    loss = TruncatedGCE(n, q=q, k=k, start=0.25, refresh=refresh, reduction="none")
    kept, visits, limit, changes = [1] * n, [0] * n, (1 - k**q) / q, 0
    labels = (torch.randn(n, 3).double() * 2).softmax(-1) if soft else torch.randint(3, (n,))
    for epoch in range(epochs):
        loss.set_progress(epoch / epochs)
        for index in torch.randperm(n).split(3):
            z = torch.randn(len(index), 3, dtype=torch.float64) * 2
            expected = []
            for i, row, label in zip(
                index.tolist(), z.tolist(), as_probs(labels[index], 3).tolist(), strict=True
            ):
                each = power(q)(label, naive.softmax(row), None)
                if epoch >= 3:
                    if visits[i] % refresh == 0:
                        changes += kept[i] != (each < limit)
                        kept[i] = int(each < limit)
                    visits[i] += 1
                expected.append(each if kept[i] else limit)
            assert loss(z, labels[index], index=index).tolist() == pytest.approx(expected, abs=1e-6)
            assert loss.stats["kept"].item() == pytest.approx(
                sum(kept[i] for i in index.tolist()) / len(index)
            )
    assert loss.weights.rows.tolist() == kept and loss.visits.rows.tolist() == visits == [9] * n
    assert changes > n  # samples did leave and return


def test_what_is_not_a_number_is_no_visit():
    loss = make()
    loss.set_progress(0.9)
    z, y = believed(0.81, 0.81)
    with pytest.raises(ValueError, match="NaN"):
        loss(torch.where(torch.tensor([[True], [False]]), math.nan, z), y, index=torch.arange(2))
    assert loss.weights.rows.tolist() == [1, 1] and loss.visits.rows.tolist() == [0, 1]


def test_a_pruned_sample_does_not_hide_that_it_is_not_a_number():
    loss = make(1)
    visit(loss, 0.9, 0.04)
    with pytest.raises(ValueError, match="NaN"):
        visit(loss, 0.9, math.nan)


def test_an_index_outside_the_table_is_named():
    with pytest.raises(ValueError, match=r"index 2 .*num_samples=2"):
        visit(make(2), 0.9, 0.5, index=[2])


INDEX = [  # samples of rank 0 and of rank 1 in each step; sample 3 is once seen by both
    ([0, 1, 2], [3]),
    ([4], [5, 6, 7]),
    ([3, 0], [1, 3]),
    ([4, 5, 6], [2, 7]),
    ([0, 2, 4], [1, 3, 5]),
    ([6, 7], [0, 1, 2, 3]),
]
WORKER = """
from kd_plugins import TruncatedGCE
loss = TruncatedGCE(8, start=0.1, refresh=2, reduction="none")
for step, batch in enumerate(steps):
    z, index = (mine(parts) for parts in batch)
    loss.train().set_progress(step / 10)
    each = loss(z.requires_grad_(), torch.zeros(len(z), dtype=torch.long), index=index)
    each.sum().backward()
    seen.append([each.tolist(), loss.weights.rows.tolist(), loss.visits.rows.tolist()])
    if rank == 0:  # evaluation on one process only: it must not wait for the others
        loss.eval()(z, torch.zeros(len(z), dtype=torch.long), index=index)
"""


def test_two_processes_prune_the_same(tmp_path):
    """One table on both, equal to that of one process on the joined batch, and so are the
    values."""
    batches = [
        [[torch.randn(len(i), 3) * 2 for i in both], [torch.tensor(i) for i in both]]
        for both in INDEX
    ]
    results = on_ranks(WORKER, batches, tmp_path)
    for first, second, single in zip(*results, strict=True):
        assert first[1:] == second[1:] == single[1:]
        assert first[0] + second[0] == pytest.approx(single[0], abs=1e-6)
    _, weights, visits = results[0][-1]
    assert 0 < sum(weights) < 8 and visits == [3] * 8  # of sample 3 once where both saw it


# ---------------------------------------------------------------------------------------------- APL


@pytest.mark.parametrize("active", ["nce", "nfl", "ce", "gce"])
@pytest.mark.parametrize("passive", ["rce", "mae", "sce"])
def test_a_pair_is_its_weighted_sum(active, passive):
    z, y = spread(soft=False)
    a, b = create_loss(active), create_loss(passive)
    for pair in (
        APL(active, passive, 3, 0.2),
        APL(a, passive, 3, 0.2),
        APL(active, b, alpha=3, beta=0.2),
    ):
        torch.testing.assert_close(pair(z, y), 3 * a(z, y) + 0.2 * b(z, y))
        torch.testing.assert_close(
            gradient(pair, z, y), 3 * gradient(a, z, y) + 0.2 * gradient(b, z, y)
        )


@pytest.mark.parametrize("active", ["nce", "nfl", "gce"])
def test_alpha_counts(active):
    """The public pairs with GCE ignore it."""
    z, y = spread(soft=False)
    one, three = (APL(active, "mae", alpha, 1)(z, y) for alpha in (1, 3))
    torch.testing.assert_close(three - one, 2 * create_loss(active)(z, y))


def test_apl_hands_its_parts_what_they_read():
    loss = APL("nce", TruncatedGCE(5, start=0.1), 1, 1)
    z, y = spread(soft=False)
    assert loss.required_inputs == {"index"}
    loss.set_progress(0.05)
    value = loss(z, y, index=torch.arange(5))
    torch.testing.assert_close(value, NCE()(z, y) + GCE()(z, y))
    assert set(loss.stats) == {"nce_0", "truncatedgce_1", "truncatedgce_1_kept"}


def test_apl_keeps_what_it_and_its_parts_were_made_with():
    z, y = spread(soft=False)
    none = APL(reduction="none")(z, y)
    assert none.shape == (5,)
    inherits = APL(NCE(reduction="sum"), RCE(reduction="sum"))
    assert inherits(z, y).item() == pytest.approx(none.sum().item())
    for pair in (APL(num_classes=7), APL(NCE(num_classes=7))):
        with pytest.raises(ValueError, match="num_classes=7"):
            pair(z, y)


# ---------------------------------------------------------------------------------------------- DMI

SINGULAR = {  # label [B], p [B, C]
    "a class is missing": (
        [0, 0, 1, 1],
        [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.7, 0.2], [0.2, 0.3, 0.5]],
    ),
    "equal rows": ([0, 1, 2], [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]),
    "equal but for rounding": (
        [0, 0, 0, 1, 1, 1, 2],
        [
            [0.1, 0.2, 0.7],
            [0.3, 0.6, 0.1],
            [0.7, 0.1, 0.2],
            [0.7, 0.1, 0.2],
            [0.3, 0.6, 0.1],
            [0.1, 0.2, 0.7],
            [0.2, 0.5, 0.3],
        ],
    ),
    "a class is never predicted": ([0, 1, 2], [[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.5, 0.5, 0.0]]),
    "uniform": ([0, 1, 2, 0], [[1 / 3] * 3] * 4),
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_without_a_determinant_there_is_a_value_and_no_gradient(kind, eps):
    labels, p = SINGULAR[kind]
    z, y = case(p, labels)
    value = DMI(eps)(z, y)
    assert value.item() == pytest.approx(-math.log(eps) if eps else 708.396, abs=1e-3)
    (grad,) = torch.autograd.grad(value, z)
    assert torch.equal(grad, torch.zeros_like(z))


def test_rounding_alone_makes_a_determinant():
    """What the third of these is for: a last pivot of 1e-17 and not 0, and so an inverse of
    1e17."""
    labels, p = SINGULAR["equal but for rounding"]
    u = as_probs(torch.tensor(labels), 3, torch.float64).T @ torch.tensor(p, dtype=torch.float64)
    assert 0 < torch.linalg.det(u).abs() < 1e-15


@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_a_class_that_is_hardly_predicted_has_its_gradient(eps):
    """U = [[1, 2e-30], [1, 1e-30]] is small in one column and not singular: -log 1e-30, and d/dz
    = 2, -1 there."""
    rows = [[0.0, math.log(2e-30)], [0.0, math.log(1e-30)]]
    z, y = torch.tensor(rows, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1])
    value = DMI(eps)(z, y)
    assert value.item() == pytest.approx(-math.log(1e-30 + eps))
    (grad,) = torch.autograd.grad(value, z)
    share = 1e-30 / (1e-30 + eps)
    assert grad[:, 1].tolist() == pytest.approx([-2 * share, 1 * share])


def test_a_class_of_a_few_samples_among_many_has_its_gradient():
    y = torch.tensor([0] * 5000 + [1] * 5000 + [2])
    z = (as_probs(y, 3, torch.float64) * 3).requires_grad_()
    a, b = math.exp(3) / (math.exp(3) + 2), 1 / (math.exp(3) + 2)
    expected = math.log(5000 * 5000 * determinant([[a, b, b], [b, a, b], [b, b, a]]))
    assert DMI(eps=0)(z, y).item() == pytest.approx(-expected)
    assert gradient(DMI(eps=0), z, y)[-1].abs().max() > 0.05


@pytest.mark.parametrize(("per_class", "strength"), [(100, 20.0), (1, 2.0), (1, 1e-5)])
def test_a_hundred_classes_do_not_leave_the_range_of_numbers(per_class, strength):
    """det U is 1e200, 1e-121 and 1e-693. float32 knows none: inf and 0 in the authors' code.

    Of the last, float32 would not know the logarithm either: 1e-7 stands beside 1e-2 there."""
    y = torch.arange(100).repeat(per_class)
    z = (as_probs(y, 100) * strength).requires_grad_()
    top = math.exp(strength) / (math.exp(strength) + 99)
    low = (1 - top) / 99
    # eigenvalues of per_class · ((top - low) I + low 1 1ᵀ)
    log_det = 100 * math.log(per_class) + 99 * math.log(top - low) + math.log(top + 99 * low)
    assert not 1e-38 < math.exp(log_det) < 1e38
    loss = DMI(eps=0)(z, y)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-log_det, rel=1e-5)
    assert (
        gradient(DMI(eps=0), z, y).isfinite().all()
        and gradient(DMI(eps=0), z, y).abs().max() > 1e-12
    )


def test_with_many_classes_eps_drowns_the_gradient():
    """As documented: |det U| = 1e-121 beside 1e-3."""
    y = torch.arange(100)
    z = (as_probs(y, 100) * 2).requires_grad_()
    assert DMI()(z, y).item() == pytest.approx(-math.log(1e-3))
    assert gradient(DMI(), z, y).abs().max() < 1e-30 < 1e-3 < gradient(DMI(eps=0), z, y).abs().max()


def test_a_batch_that_cannot_hold_every_class_is_said_once():
    loss, z = DMI(), torch.randn(2, 3, requires_grad=True)
    with pytest.warns(UserWarning, match=r"2 samples.*all 3 classes.*gradient is exactly zero"):
        value = loss(z, torch.tensor([0, 1]))
    assert torch.equal(torch.autograd.grad(value, z)[0], torch.zeros(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(z, torch.tensor([0, 1]))
        DMI()(torch.randn(3, 3), torch.tensor([0, 1, 2]))
    with pytest.warns(UserWarning, match="2 samples"):
        DMI()(z, torch.tensor([0, 1]))


@pytest.mark.filterwarnings("ignore:DMI on a batch:UserWarning")
@pytest.mark.parametrize("eps", [1e-3, 0.0])
def test_soft_labels_do_not_fill_a_small_batch_either(eps):
    """No row of U is zero then, and its rank is still at most the number of samples."""
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, dtype=torch.float64).softmax(-1)
    assert torch.equal(gradient(DMI(eps), z, y), torch.zeros_like(z))


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GCE(q=0), ValueError, r"q=0: .*q -> 0 is cross-entropy"),
        (lambda: GCE(q=1.1), ValueError, r"q=1.1: .*0 < q <= 1"),
        (lambda: GCE(q=math.nan), ValueError, "q=nan"),
        (lambda: TruncatedGCE(8, q=-0.5), ValueError, "q=-0.5"),
        (lambda: TruncatedGCE(8, k=1.0), ValueError, "k=1.0.*every sample would be pruned"),
        (lambda: TruncatedGCE(8, k=-0.1), ValueError, "k=-0.1"),
        (lambda: TruncatedGCE(8, start=40), ValueError, "start=40.*not an epoch"),
        (lambda: TruncatedGCE(8, refresh=0), ValueError, "refresh=0"),
        (lambda: TruncatedGCE(0), ValueError, "num_samples=0"),
        (lambda: RCE(log_zero=4.0), ValueError, "log_zero=4.0.*below 0"),
        (lambda: SCE(log_zero=0.0), ValueError, "log_zero=0.0"),
        (lambda: SCE(log_zero=-math.inf), ValueError, "log_zero=-inf"),
        (lambda: SCE(alpha=-1.0), ValueError, "alpha=-1.0"),
        (lambda: SCE(beta=math.nan), ValueError, "beta=nan"),
        (lambda: NFL(gamma=-0.5), ValueError, "gamma=-0.5"),
        (lambda: APL(alpha=-1.0), ValueError, "alpha=-1.0"),
        (lambda: APL(beta=math.inf), ValueError, "beta=inf"),
        (lambda: APL("ncee"), ValueError, "unknown loss 'ncee'.*nce"),
        (lambda: APL(NCE), TypeError, "active must be .*NCE"),
        (lambda: APL("nce", None), TypeError, "passive must be .*None"),
        (lambda: APL(MKD()), TypeError, "cannot be added"),
        (
            lambda: APL(NCE(num_classes=3), num_classes=4),
            ValueError,
            "num_classes, here 3 and 4",
        ),
        (lambda: DMI(eps=-1e-3), ValueError, "eps=-0.001"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
