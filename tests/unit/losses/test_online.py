"""Peers on equal terms: mutual KL, ensembles as teachers, small-loss samples; by hand, against
loops, limits, schedules."""

import itertools
import math

import pytest
import torch
from helpers import reference as naive
from helpers.contract import batch_for, make
from helpers.devices import on_a_fake_accelerator

from kd_plugins import (
    CE,
    DML,
    KDCL,
    MKD,
    S2E,
    CoTeaching,
    CoTeachingPlus,
    Mutual,
    S2ESchedule,
    SmallLoss,
    create_loss,
)
from kd_plugins.losses.functional import Prediction, simplex_qp
from kd_plugins.losses.online import RULES

LN2, LN5 = math.log(2), math.log(5)


def log64(rows):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


def batch(num_peers, b=6, c=4, scale=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    zs = [torch.randn(b, c, generator=g, dtype=torch.float64) * scale for _ in range(num_peers)]
    return [z.requires_grad_() for z in zs], torch.arange(b) % c


def check_against(loss, zs, y, expected):
    """Value, and gradient by differences of ``expected(zs)``; whatever it holds constant, it
    holds by itself."""
    value = loss(zs, y)
    assert value.item() == pytest.approx(expected([z.tolist() for z in zs]), abs=1e-7)
    grads = torch.autograd.grad(value, zs)
    for grad, slope in zip(grads, naive.slope(expected, [z.tolist() for z in zs]), strict=True):
        torch.testing.assert_close(
            grad, torch.tensor(slope, dtype=torch.float64), atol=1e-6, rtol=1e-5
        )


def ces(rows, y):
    """Cross-entropies of one peer's rows of logits with classes or distributions."""
    qs = [naive.onehot(t, len(rows[0])) if isinstance(t, int) else t for t in y]
    return [naive.cross_entropy(q, naive.softmax(row)) for q, row in zip(qs, rows, strict=True)]


def kl(p, q):
    return naive.cross_entropy(p, q) - naive.entropy(p)


# ---------------------------------------------------------------------------------------------- DML


def test_dml_by_hand():
    """KL(b‖a) = 0.8 ln(8/5) + 0.2 ln(2/5), KL(a‖b) = 0.5 ln(5/8) + 0.5 ln(5/2); on the second
    sample they agree."""
    a, b = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]], [[0.8, 0.1, 0.1], [0.2, 0.4, 0.4]]
    ce_a, ce_b = (LN2 + LN5) / 2, (LN5 - 2 * LN2 + LN5) / 2
    to_a, to_b = (
        0.8 * (3 * LN2 - LN5) + 0.2 * (LN2 - LN5),
        0.5 * (LN5 - 3 * LN2) + 0.5 * (LN5 - LN2),
    )
    loss = DML()
    value = loss((log64(a), log64(b)), torch.tensor([0, 0]))
    assert value.item() == pytest.approx(ce_a + ce_b + (to_a + to_b) / 2)
    expected = {"own_a": ce_a, "own_b": ce_b, "taught_a": to_a / 2, "taught_b": to_b / 2}
    assert {k: v.item() for k, v in loss.stats.items()} == pytest.approx(expected)


@pytest.mark.parametrize("num_peers", [2, 3])
def test_dml_against_loops(num_peers):
    zs, y = batch(num_peers)
    consts = [[naive.softmax(row) for row in z.tolist()] for z in zs]

    def expected(zs, mean=True):
        total = 0.0
        for k, rows in enumerate(zs):
            for i, row in enumerate(rows):
                p, others = naive.softmax(row), [consts[j][i] for j in range(num_peers) if j != k]
                total -= math.log(p[y[i]]) / len(rows)
                total += sum(kl(o, p) for o in others) / (len(others) if mean else 1) / len(rows)
        return total

    check_against(DML(num_peers=num_peers), zs, y, expected)
    if num_peers == 3:  # the authors' code sums over the peers
        assert (
            abs(DML(num_peers=3)(zs, y).item() - expected([z.tolist() for z in zs], mean=False))
            > 0.1
        )


@pytest.mark.parametrize("num_peers", [2, 3, 4])
def test_gradient_of_dml(num_peers):
    """Of CE, p_k - q, and of the peers, mean_j (p_k - p_j)."""
    zs, y = batch(num_peers)
    ps = [z.detach().softmax(-1) for z in zs]
    for k, grad in enumerate(torch.autograd.grad(DML(num_peers=num_peers)(zs, y), zs)):
        others = torch.stack([p for j, p in enumerate(ps) if j != k]).mean(0)
        own = ps[k] - torch.nn.functional.one_hot(y, 4)
        torch.testing.assert_close(grad, (own + ps[k] - others) / len(y))


@pytest.mark.parametrize("num_peers", [2, 3])
def test_equal_peers_teach_nothing(num_peers):
    (z, *_), y = batch(1)
    same = [z + 10.0 * k for k in range(num_peers)]
    plain = num_peers * CE()(z, y)
    for loss in (DML(num_peers=num_peers), *(KDCL(rule, num_peers=num_peers) for rule in RULES)):
        torch.testing.assert_close(loss(same, y), plain)
        torch.testing.assert_close(loss.stats["taught_a"], torch.zeros((), dtype=torch.float64))


def test_dml_and_mkd_are_one_family():
    zs, y = batch(3)
    torch.testing.assert_close(DML(num_peers=3)(zs, y), 2 * MKD(eps=0.5, num_peers=3)(zs, y))


# --------------------------------------------------------------------------------------------- KDCL


def test_ensembles_by_hand():
    """Two samples, three classes: a is right on the first, b on the second."""
    a, b = torch.tensor([[3.0, 0, 1], [0, 2, 0]]), torch.tensor([[1.0, 2, 0], [0, 1, 4]])
    q = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    assert KDCL("naive").ensemble((a, b), q).tolist() == [[3, 0, 1], [0, 1, 4]]
    # less the label's logit: a [0, -3, -2] and [0, 2, 0], b [0, 1, -1] and [-4, -3, 0]
    assert KDCL("minlogit").ensemble((a, b), q).tolist() == [[0, -3, -2], [-4, -3, 0]]
    assert KDCL("general").ensemble((a, b), q).tolist() == [[2, 1, 0.5], [0, 1.5, 2]]
    # linear: a on the first and b on the second sample leave nothing for the other to better
    torch.testing.assert_close(
        KDCL("linear").ensemble((a, b), q), torch.tensor([[3.0, 0, 1], [0, 1, 4]])
    )
    # in between: classes 1 and 2 of [0, 2x, 2 - 2x] tie at x = 1/2
    a, b = torch.tensor([[0.0, 2, 0]]), torch.tensor([[0.0, 0, 2]])
    torch.testing.assert_close(KDCL("linear").ensemble((a, b), q[:1]), torch.tensor([[0.0, 1, 1]]))
    assert KDCL("linear").ensemble((a, b), torch.tensor([[0.0, 1, 0]])).tolist() == [[0, 2, 0]]
    # soft labels: the expected logit is taken off, 0.5 · 2 and 0.5 · 4
    soft, a, b = (
        torch.tensor([[0.5, 0.5, 0]]),
        torch.tensor([[0.0, 2, 5]]),
        torch.tensor([[4.0, 0, 6]]),
    )
    assert KDCL("minlogit").ensemble((a, b), soft).tolist() == [[-1, -2, 4]]


def best_on_a_grid(zs, q, parts):
    """The smallest cross-entropy of any mixture of one sample's logits [K][C] on a grid of the
    simplex."""
    k, best = len(zs), math.inf
    for cut in itertools.combinations(range(parts + k - 1), k - 1):
        ends = (-1, *cut, parts + k - 1)
        w = [(v - u - 1) / parts for u, v in itertools.pairwise(ends)]
        mixed = [sum(a * z[c] for a, z in zip(w, zs, strict=True)) for c in range(len(q))]
        best = min(best, naive.cross_entropy(q, naive.softmax(mixed)))
    return best


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("num_peers", "parts", "scale"),
    [(2, 2000, 2), (2, 2000, 50), (3, 60, 2), (4, 24, 1), (5, 14, 1)],
)
def test_the_linear_rule_finds_the_best_mixture(num_peers, parts, scale, soft):
    """No point of a fine grid is better by 1e-4, and what is found is a mixture: weights of at
    least 0 that sum to 1."""
    zs, y = batch(num_peers, b=8, c=8, scale=scale, seed=num_peers)
    zs, q = torch.stack(zs).detach().float(), torch.nn.functional.one_hot(y, 8).float()
    q = 0.7 * q + 0.3 * torch.randn(8, 8).softmax(-1) if soft else q
    mixed = KDCL("linear", num_peers=num_peers).ensemble(zs, q)
    ours, single = (-(q * z.double().log_softmax(-1)).sum(-1) for z in (mixed, zs))
    grid = [best_on_a_grid([z[i].tolist() for z in zs], q[i].tolist(), parts) for i in range(8)]
    assert all(x <= g + 1e-4 for x, g in zip(ours.tolist(), grid, strict=True))
    w = torch.linalg.lstsq(zs.permute(1, 2, 0), mixed[:, :, None]).solution[..., 0]
    assert w.min() > -1e-4 and torch.allclose(w.sum(-1), torch.ones(8), atol=1e-4)
    assert (single.amin(0) - ours > 1e-3).any()  # there was more to find than the naive rule's


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_kdcl_against_loops(rule, num_peers, temperature):
    zs, y = batch(num_peers)
    loss = KDCL(rule, temperature, alpha=0.7, num_peers=num_peers)
    rows = [z.tolist() for z in zs]
    loops = {
        "naive": lambda i: min((z[i] for z in rows), key=lambda row: ces([row], [y[i].item()])[0]),
        "minlogit": lambda i: [min(z[i][c] - z[i][y[i]] for z in rows) for c in range(4)],
        "general": lambda i: [sum(z[i][c] for z in rows) / num_peers for c in range(4)],
        "linear": lambda i: loss.ensemble(zs, torch.nn.functional.one_hot(y, 4))[
            i
        ].tolist(),  # see the test above
    }
    taught = [naive.softmax([z / temperature for z in loops[rule](i)]) for i in range(len(y))]

    def expected(zs):
        total = 0.0
        for z in zs:
            total += sum(ces(z, y.tolist())) / len(y)
            for t, row in zip(taught, z, strict=True):
                total += (
                    0.7
                    * temperature**2
                    * kl(t, naive.softmax([x / temperature for x in row]))
                    / len(y)
                )
        return total

    check_against(loss, zs, y, expected)


def test_general_weights_are_fitted_on_held_out_data():
    """K = 2: the best weight of a is (C_bb - C_ab) / (C_aa - 2 C_ab + C_bb), here inside (0, 1)."""
    (a, b), y = batch(2, b=40)
    a = a + 1.5 * torch.nn.functional.one_hot(y, 4)
    errors = [
        [
            [p - q for p, q in zip(naive.softmax(row), naive.onehot(t, 4), strict=True)]
            for row, t in zip(z.tolist(), y.tolist(), strict=True)
        ]
        for z in (a, b)
    ]
    c = [
        [
            sum(u * v for r, s in zip(e, f, strict=True) for u, v in zip(r, s, strict=True))
            for f in errors
        ]
        for e in errors
    ]
    weight = (c[1][1] - c[0][1]) / (c[0][0] - 2 * c[0][1] + c[1][1])
    assert 0.55 < weight < 0.95
    loss = KDCL("general")
    assert loss.weights.tolist() == [0.5, 0.5]
    for target in (y, torch.nn.functional.one_hot(y, 4)):
        assert loss.fit(torch.stack([a, b]), target).tolist() == pytest.approx(
            [weight, 1 - weight], abs=1e-6
        )
    torch.testing.assert_close(loss.ensemble((a, b), y), weight * a + (1 - weight) * b)
    fresh = KDCL("general")
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.weights, loss.weights) and not fresh.weights.requires_grad
    assert KDCL("naive").state_dict() == {}
    right, wrong = (
        a + 6.0 * torch.nn.functional.one_hot(y, 4),
        -8.0 * torch.nn.functional.one_hot(y, 4),
    )
    assert loss.fit((right, wrong), y).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_compiles_whole_and_never_waits(rule, num_peers):
    loss = make("kdcl", rule=rule, num_peers=num_peers)
    x = batch_for(loss)
    if num_peers == 2:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        value = x(compiled)
        torch.testing.assert_close(value, x(loss))
        torch.testing.assert_close(*(torch.autograd.grad(v, x.logits) for v in (value, x(loss))))
        torch._dynamo.reset()
    with on_a_fake_accelerator(loss) as move:
        value = loss(tuple(move(z) for z in x.logits), move(x.target))
        assert value.device.type == "cuda" and value.shape == () and value.requires_grad


@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_extremes(rule, num_peers):
    zs, y = batch(num_peers)
    scales = torch.tensor([1e4, 0.0, 1.0, -1e4, 1e4, 1e-4])[:, None]
    zs = [(z.detach().float() * scales).requires_grad_() for z in zs]
    value = KDCL(rule, num_peers=num_peers)(zs, y)
    assert value.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(value, zs))


# --------------------------------------------------------------------------------------- simplex_qp


def on_the_grid(gram, cap, parts):
    k = len(gram)
    cuts = torch.tensor(list(itertools.combinations(range(parts + k - 1), k - 1)))
    ends = torch.cat(
        [torch.full((len(cuts), 1), -1), cuts, torch.full((len(cuts), 1), parts + k - 1)], 1
    )
    a = (ends.diff() - 1).double() / parts
    a = a[(a <= cap + 1e-12).all(1)]
    return ((a @ gram) * a).sum(1).min().item()


@pytest.mark.parametrize("cap", [1.0, 0.6, 0.5])
@pytest.mark.parametrize(("k", "parts"), [(2, 1000), (3, 200), (4, 60), (5, 20)])
def test_no_grid_point_is_better(k, parts, cap):
    """Random Gram matrices of every rank, also with equal rows and of tiny scale; parts is a
    multiple of 10: caps are on it."""
    found = []
    for trial in range(20):
        x = torch.randn(k, 1 + trial % 5, dtype=torch.float64) + (trial % 3)
        if trial % 4 == 0:
            x[-1] = x[0]
        gram = x @ x.T * (1e-12 if trial % 2 else 1e6)
        a = simplex_qp(gram, cap)
        assert a.sum().item() == pytest.approx(1, abs=1e-6) and a.min() >= 0 and a.max() <= cap
        scale = gram.diagonal().max().item()
        assert (a @ gram @ a).item() <= on_the_grid(gram, cap, parts) + 1e-7 * scale
        torch.testing.assert_close(simplex_qp(gram * 1e3, cap), a)
        order = torch.randperm(k)
        if trial % 4:
            g = gram + scale * 1e-3 * torch.eye(k)  # one minimiser only
            torch.testing.assert_close(
                simplex_qp(g[order][:, order], cap), simplex_qp(g, cap)[order], atol=1e-6, rtol=0
            )
        found.append(a)
    found = torch.stack(found)
    assert (found == cap).any() and (cap * (k - 1) < 1 or (found < 1e-9).any())
    assert cap * k == 1 or ((found > 1e-3) & (found < cap - 1e-3)).any()


@pytest.mark.parametrize(
    ("gram", "cap", "expected"),
    [
        ([[1, 0], [0, 3]], 1.0, [0.75, 0.25]),  # inverse to the squared lengths
        ([[1, 0], [0, 3]], 0.6, [0.6, 0.4]),
        ([[1, 0], [0, 3]], 0.5, [0.5, 0.5]),
        ([[1, 2], [2, 9]], 1.0, [1.0, 0.0]),  # the second only adds length
        ([[1, 0, 0], [0, 2, 0], [0, 0, 4]], 1.0, [4 / 7, 2 / 7, 1 / 7]),
        ([[1, 0, 0], [0, 2, 0], [0, 0, 4]], 0.5, [0.5, 1 / 3, 1 / 6]),
        ([[1, -1], [-1, 1]], 1.0, [0.5, 0.5]),  # opposite vectors
        ([[5, 5, 5], [5, 5, 5], [5, 5, 5]], 1.0, [1 / 3, 1 / 3, 1 / 3]),  # equal ones
        ([[1, 1, 0], [1, 1, 0], [0, 0, 1]], 1.0, [0.25, 0.25, 0.5]),  # two of three
        ([[0, 0, 0, 0]] * 4, 1.0, [0.25] * 4),
        ([[0, 0, 0, 0]] * 4, 0.25, [0.25] * 4),
        ([[0, 0], [0, 1]], 1.0, [1.0, 0.0]),
        ([[2]], 1.0, [1.0]),
    ],
)
def test_simplex_qp_by_hand(gram, cap, expected):
    for dtype in (torch.float32, torch.float64):
        a = simplex_qp(torch.tensor(gram, dtype=dtype), cap)
        assert a.dtype == dtype and a.tolist() == pytest.approx(expected, abs=1e-6)


def test_simplex_qp_refuses():
    with pytest.raises(ValueError, match=r"cap=0.3.*3 weights.*1/3"):
        simplex_qp(torch.eye(3), cap=0.3)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        simplex_qp(torch.zeros(2, 3))


def test_simplex_qp_compiles_and_never_waits():
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: simplex_qp(g, 0.6), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(3, 5)
        torch.testing.assert_close(compiled(x @ x.T), simplex_qp(x @ x.T, 0.6))
    torch._dynamo.reset()
    with on_a_fake_accelerator(CE()) as move:
        gram = move(torch.eye(4, requires_grad=True))
        weights = simplex_qp(gram, 0.6)
        assert weights.device.type == "cuda" and weights.shape == (4,) and not weights.requires_grad


# ---------------------------------------------------------------------------------------- SmallLoss


def select_at(select, progress, z, q):
    if select.progress is not None:
        select.progress.set(progress)
    return select(Prediction.of(z), q).tolist()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("forget", "ramp"), [(0.2, 0.05), (0.45, 0.5), (0.8, 1.0), (0.3, 0.0)])
def test_small_loss_against_loops(forget, ramp, exponent):
    z = torch.randn(23, 4, dtype=torch.float64)
    y = [i % 4 for i in range(23)]
    q = torch.nn.functional.one_hot(torch.tensor(y), 4).double()
    losses, select, counts = ces(z.tolist(), y), SmallLoss(forget, ramp, exponent), []
    for t in (0.0, 0.01, 0.025, 0.0499, 0.0501, 0.3, 0.77, 1.0):
        rate = forget * (min((t / ramp) ** exponent, 1.0) if ramp else 1.0)
        k = int((1 - rate) * 23 + 1e-9)
        smallest = sorted(range(23), key=lambda i: losses[i])[:k]
        assert select_at(select, t, z, q) == [i in smallest for i in range(23)]
        assert select.stats["keep"].item() == pytest.approx(1 - rate, abs=1e-6)
        counts.append(k)
    assert counts == sorted(counts, reverse=True) and counts[-1] == int(23 * (1 - forget))


def test_the_ramp_has_no_jump():
    """The authors' code rises to forget^exponent and jumps to forget; here exponent 2 ends where
    exponent 1 does."""
    z, q = torch.zeros(2, 3), torch.zeros(2, 3)
    for exponent in (0.5, 1.0, 2.0):
        select, seen = SmallLoss(0.5, 0.1, exponent), []
        for t in torch.linspace(0, 0.2, 2001).tolist():
            select_at(select, t, z, q)
            seen.append(select.stats["keep"].item())
        steps = [a - b for a, b in itertools.pairwise(seen)]
        assert seen[0] == 1.0 and seen[-1] == 0.5 and min(steps) >= 0
        if exponent >= 1:
            assert max(steps) < 0.5 * exponent * 0.0011


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k_is_what_decimal_numbers_make_it(dtype):
    """int((1 - 0.9) 10) is 0 in floating point, where one sample should be kept; 1 - 0.2 in
    float32 times 10 may be below 8."""
    for percent in (0, 1, 5, 7, 10, 20, 30, 40, 45, 50, 60, 70, 80, 90, 99):
        select = SmallLoss(forget=percent / 100, ramp=0.05)
        for b in (1, 2, 5, 10, 20, 50, 100, 128, 1000, 4096):
            losses = torch.zeros(b, dtype=dtype)
            if select.progress is not None:
                select.progress.set(0.7)
            assert select.count(losses).item() == (100 - percent) * b // 100, (percent, b)


@pytest.mark.parametrize("b", [1, 2, 3, 7, 128])
def test_forget_nothing_keeps_everything(b):
    z = torch.randn(b, 3)
    assert all(SmallLoss(forget=0)(Prediction.of(z), z.softmax(-1)).tolist())
    select = SmallLoss(forget=0.9)
    assert all(select_at(select, 0.0, z, z.softmax(-1)))
    with pytest.raises(RuntimeError, match=r"SmallLoss.*set_progress"):
        SmallLoss(forget=0.9)(Prediction.of(z), z.softmax(-1))


def test_equal_losses_in_order_and_none_at_all():
    labels = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    same = Prediction.of(torch.zeros(4, 3)), labels
    assert SmallLoss(0.5, ramp=0)(*same).tolist() == [True, True, False, False]
    assert SmallLoss(0.8, ramp=0)(*same).tolist() == [False] * 4  # int(0.2 · 4) = 0


def test_a_schedule_of_ones_own():
    select = SmallLoss(keep=lambda t: 1 - 0.5 * t)
    z = torch.randn(8, 3)
    assert [sum(select_at(select, t, z, z.softmax(-1))) for t in (0.0, 0.5, 1.0)] == [8, 6, 4]
    assert select.stats["keep"].item() == 0.5


# ---------------------------------------------------------------------------------------------- S2E


def s2e_loop(epoch, alpha, beta, horizon):
    total = 0.0
    for i, (b1, b2, b3, b4) in enumerate(beta):
        decay = math.exp(-b2 * epoch**b1) if i in (0, 1) else 1 / (1 + b2 * epoch) ** b1
        growth = (
            (epoch / horizon) ** b4
            if i in (0, 2)
            else math.log(1 + epoch**b4) / math.log(1 + horizon**b4)
        )
        total += alpha[i] * (decay + b3 * growth)
    return min(max(total, 0.0), 1.0)


@pytest.mark.parametrize("horizon", [10.0, 200.0])
def test_s2e_schedule_against_loops(horizon):
    alpha = (0.1, 0.2, 0.3, 0.4)
    beta = ((0.5, 0.3, 0.1, 2.0), (0.7, 0.5, 0.3, 0.5), (0.4, 0.9, 0.2, 1.5), (0.9, 0.8, 0.4, 0.7))
    weights = [
        alpha,
        *(tuple(float(i == j) for j in range(4)) for i in range(4)),
    ]  # and each function alone
    seen = set()
    for w in weights:
        schedule = S2ESchedule(w, beta, horizon)
        for t in (0.0, 0.005, 0.1, 0.5, 1.0):
            expected = s2e_loop(t * horizon, w, beta, horizon)
            assert schedule(torch.tensor(t, dtype=torch.float64)).item() == pytest.approx(
                expected, abs=1e-12
            )
            seen.add(round(expected, 6))
    assert len(seen) > 15


def test_s2e_schedule_by_hand():
    """f_1 at epoch 4 of 16 with b = (0.5, ln 2, 0.5, 0.5): 2^-2 + 0.5 · 0.5; f_4 with (1, 1,
    0.5, 1): 1/5 + 0.5 ln 5 / ln 17."""
    for i, b, expected in [
        (0, (0.5, LN2, 0.5, 0.5), 0.5),
        (3, (1, 1, 0.5, 1), 0.2 + 0.5 * LN5 / math.log(17)),
    ]:
        schedule = S2ESchedule([float(i == j) for j in range(4)], [b] * 4, horizon=16)
        assert schedule(torch.tensor(0.25)).item() == pytest.approx(expected)


def test_s2e_schedule_is_a_share():
    high, low = S2ESchedule(beta=((0.1, 0, 2, 1),) * 4), S2ESchedule()
    assert (
        high(torch.tensor(1.0)) == 1.0
        and S2ESchedule(beta=((1, 9, 0, 1),) * 4)(torch.tensor(1.0)) < 1e-3
    )
    seen = low(
        torch.linspace(0, 1, 201, dtype=torch.float64)
    ).tolist()  # the default: falls, fast at first, to 0.8
    assert seen[0] == 1 and seen[10] < 0.86 and min(seen) > 0.79 and seen[-1] < 0.81


def test_s2e_is_co_teaching_on_a_schedule():
    zs, y = batch(2, b=20)
    ours, theirs = S2E(keep=lambda t: 1 - 0.3 * t), CoTeaching(forget=0.3, ramp=1.0)
    for t in (0.0, 0.4, 1.0):
        ours.set_progress(t), theirs.set_progress(t)
        torch.testing.assert_close(ours(zs, y), theirs(zs, y))
    assert "S2ESchedule(alpha=(0.25, 0.25, 0.25, 0.25)" in repr(S2E())


# -------------------------------------------------------------------------------------- Co-teaching


def test_co_teaching_by_hand():
    """forget = 0.5 of two: a finds sample 0 easy and b learns it, b finds sample 1 easy and a
    learns it."""
    a, b = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]], [[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]
    loss = CoTeaching(forget=0.5, ramp=0.0)
    value = loss((log64(a), log64(b)), torch.tensor([0, 0])).item()
    assert value == pytest.approx(
        LN5 + 2 * LN2
    )  # -ln 0.2 of a, -ln 0.25 of b; its own choice would give ln 2 - ln 0.8
    stats = {k: v.item() for k, v in loss.stats.items()}
    assert stats == pytest.approx(
        {
            "own_a": (LN2 + LN5) / 2,
            "own_b": (2 * LN2 + LN5 - 2 * LN2) / 2,
            "selected_a": 0.5,
            "selected_b": 0.5,
            "taught_a": LN5,
            "taught_b": 2 * LN2,
            "keep": 0.5,
        }
    )


def easiest(losses, k, among=None):
    return sorted(range(len(losses)) if among is None else among, key=lambda i: losses[i])[:k]


@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize(("progress", "k"), [(0.0, 10), (0.02, 8), (0.04, 6), (0.9, 6)])
def test_co_teaching_against_loops(num_peers, progress, k):
    zs, y = batch(num_peers, b=10)
    chosen = [easiest(ces(z.tolist(), y.tolist()), k) for z in zs]
    assert (
        k == 10 or len(set(map(frozenset, chosen))) == num_peers
    )  # or the test would not see who chose

    def expected(zs, twice=False):
        total = 0.0
        for n, rows in enumerate(zs):
            losses = ces(rows, y.tolist())
            total += sum(sum(losses[i] for i in c) / k for j, c in enumerate(chosen) if j != n)
        return total / k if twice else total

    loss = CoTeaching(forget=0.4, num_peers=num_peers)
    loss.set_progress(progress)
    check_against(loss, zs, y, expected)
    assert (
        abs(loss(zs, y).item() - expected([z.tolist() for z in zs], twice=True)) > 0.1
    )  # the code's second division


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_forget_nothing_is_cross_entropy_of_each(progress):
    zs, y = batch(2, b=9)
    plain = CE()(zs[0], y) + CE()(zs[1], y)
    plus = CoTeachingPlus(forget=0.0, start=1.0)
    for loss in (CoTeaching(forget=0.0), S2E(keep=torch.ones_like), plus):
        loss.set_progress(progress)
        if loss is not plus or progress == 0.0:
            torch.testing.assert_close(loss(zs, y), plain)
            torch.testing.assert_close(
                *(torch.autograd.grad(v, zs, retain_graph=True) for v in (loss(zs, y), plain))
            )


def test_a_batch_too_small_to_choose_from():
    """int(0.8 · 1) = 0 samples: a zero that has a gradient, where the authors' code is NaN."""
    zs, y = batch(2, b=1)
    value = CoTeaching(forget=0.2, ramp=0)(zs, y)
    assert value.item() == 0 and all((g == 0).all() for g in torch.autograd.grad(value, zs))


def test_soft_labels_choose_and_teach():
    zs, _ = batch(2, b=6)
    q = torch.randn(6, 4, dtype=torch.float64).softmax(-1)
    a, b = (ces(z.tolist(), q.tolist()) for z in zs)
    expected = sum(a[i] for i in easiest(b, 3)) / 3 + sum(b[i] for i in easiest(a, 3)) / 3
    assert CoTeaching(forget=0.5, ramp=0)(zs, q).item() == pytest.approx(expected)


# ------------------------------------------------------------------------------------- Co-teaching+


def test_co_teaching_plus_by_hand():
    """Four samples of class 0; they disagree on 0, 1 and 3. forget 1/2 of three keeps one: a's
    easiest is 0, b's is 3."""
    a = [[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.9, 0.05, 0.05], [0.2, 0.4, 0.4]]
    b = [[0.1, 0.8, 0.1], [0.25, 0.5, 0.25], [0.98, 0.01, 0.01], [0.5, 0.25, 0.25]]
    loss = CoTeachingPlus(forget=0.5, ramp=0, start=0)
    assert loss((log64(a), log64(b)), torch.zeros(4, dtype=torch.long)).item() == pytest.approx(
        LN5 + LN5 + LN2
    )
    expected = {
        "disagree": 0.75,
        "keep": 0.5,
        "selected_a": 0.25,
        "selected_b": 0.25,
        "taught_a": LN5,
        "taught_b": LN2 + LN5,
    }
    assert {k: loss.stats[k].item() for k in expected} == pytest.approx(expected)
    assert set(loss.stats) == {*expected, "own_a", "own_b"}


def plus_loop(zs, consts, y, keep, active, double=False, drop_first=False, over_batch=False):
    """The value with the selection of ``consts``; the switches are the errors of the authors'
    code."""

    def losses(rows):
        return ces([naive.softmax(row) for row in rows] if double else rows, y)

    among = [
        i
        for i in range(len(y))
        if not active
        or consts[0][i].index(max(consts[0][i])) != consts[1][i].index(max(consts[1][i]))
    ]
    among = [i for i in among if not (drop_first and i == 0)] or list(range(len(y)))
    agreed = len(among) == len(y) and active
    k = len(y) if agreed else int(keep * len(among) + 1e-9) or len(among)
    total = 0.0
    for own, other in ((0, 1), (1, 0)):
        mine = losses(zs[own])
        total += sum(mine[i] for i in easiest(losses(consts[other]), k, among)) / (
            len(y) if over_batch else k
        )
    return total


@pytest.mark.parametrize("progress", [0.01, 0.09, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_co_teaching_plus_against_loops(progress, seed):
    zs, y = batch(2, b=12, scale=1.0, seed=seed)
    with torch.no_grad():
        zs[1] += zs[0] * 0.7  # they agree on some
        zs[0][0] = torch.tensor([3.0, 2.9, 0, 0])  # and not on the first, which both find easy
        zs[1][0] = torch.tensor([2.9, 3.0, 0, 0])
    consts, labels = [z.tolist() for z in zs], y.tolist()
    keep, active = 1 - 0.4 * min(progress / 0.05, 1), progress >= 0.1
    loss = CoTeachingPlus(forget=0.4, start=0.1)
    loss.set_progress(progress)

    def expected(zs, **wrong):
        return plus_loop(zs, consts, labels, keep, active, **wrong)

    check_against(loss, zs, y, expected)
    value = loss(zs, y).item()
    assert 0 < loss.stats["disagree"].item() < 1
    if active:
        for wrong in ("double", "drop_first", "over_batch"):
            assert abs(value - expected(consts, **{wrong: True})) > 0.01, wrong


def test_co_teaching_plus_takes_class_weights():
    torch.manual_seed(0)
    zs = [torch.randn(8, 3, requires_grad=True) for _ in range(2)]
    y, weight = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.tensor([1.0, 5.0, 0.0])
    loss = CoTeachingPlus(forget=0.0, weight=weight)
    loss.set_progress(0.0)
    value = loss(zs, y)
    expected = sum(torch.nn.functional.cross_entropy(z, y, weight=weight) for z in zs)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(not z.grad[y == 2].any() and z.grad[y == 1].any() for z in zs)


def test_co_teaching_plus_is_co_teaching_until_it_starts():
    zs, y = batch(2, b=10)
    plus, plain = CoTeachingPlus(forget=0.4, start=0.025), CoTeaching(forget=0.4)
    differs = []
    for t in (0.0, 0.02, 0.0249, 0.025, 0.3):
        plus.set_progress(t), plain.set_progress(t)
        differs.append((plus(zs, y) - plain(zs, y)).abs().item() > 1e-9)
    assert differs == [False, False, False, True, True]
    assert CoTeachingPlus(forget=0, start=0)(zs, y).isfinite()  # no schedule: asks for no progress


def test_where_all_agree_both_learn_from_all():
    (a, _), y = batch(2, b=10)
    zs = [a, (a * 0.5).detach().requires_grad_()]
    loss = CoTeachingPlus(forget=0.5, ramp=0, start=0)
    torch.testing.assert_close(loss(zs, y), CE()(zs[0], y) + CE()(zs[1], y))
    assert loss.stats["disagree"] == 0 and loss.stats["selected_a"] == 1


def test_the_only_disagreement_is_learnt_from():
    """int(0.5 · 1) = 0 of one: it is taken all the same; also where it stands first in the
    batch."""
    (a, _), y = batch(2, b=10)
    for i in (0, 7):
        b = a.detach() * 0.5
        b[i] = -b[i]
        zs = [a, b.requires_grad_()]
        loss = CoTeachingPlus(forget=0.5, ramp=0, start=0)
        only = [z[i : i + 1] for z in zs]
        torch.testing.assert_close(
            loss(zs, y), CE()(only[0], y[i : i + 1]) + CE()(only[1], y[i : i + 1])
        )
        assert loss.stats["disagree"].item() == pytest.approx(0.1)


def test_co_teaching_plus_shows_its_selection():
    zs, y = batch(2, b=10)
    loss = CoTeachingPlus(forget=0.5, ramp=0, start=0)
    loss(zs, y)
    assert isinstance(loss, Mutual)
    for (mask, label), name in zip(loss.selection, "ab", strict=True):
        assert mask.float().mean() == loss.stats[f"selected_{name}"] and torch.equal(
            label.argmax(-1), y
        )


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DML(num_peers=1), "num_peers=1"),
        (lambda: KDCL(rule="mean"), r"rule='mean'.*'naive', 'linear', 'minlogit', 'general'"),
        (lambda: KDCL(temperature=0), "temperature=0"),
        (lambda: KDCL().fit(torch.zeros(2, 3, 4), torch.zeros(3)), "rule='naive'"),
        (
            lambda: KDCL("general").fit(torch.zeros(3, 5, 4), torch.zeros(5)),
            r"\[2, N, C\].*\[3, 5, 4\]",
        ),
        (lambda: KDCL("general").fit(torch.zeros(2, 5, 4), torch.zeros(4)), r"\[2, 5, 4\].*\[4\]"),
        (lambda: KDCL("general").fit(torch.zeros(2, 0, 4), torch.zeros(0)), r"N > 0"),
        (lambda: SmallLoss(forget=1.0), "forget=1.0"),
        (lambda: SmallLoss(forget=-0.1), "forget=-0.1"),
        (lambda: CoTeaching(ramp=10), "ramp=10.*epochs"),
        (lambda: CoTeaching(exponent=0), "exponent=0"),
        (lambda: CoTeachingPlus(start=5), "start=5.*epochs"),
        (lambda: SmallLoss(forget=0.4, keep=S2ESchedule()), "forget=0.4.*ignored"),
        (lambda: SmallLoss(exponent=2.0, keep=S2ESchedule()), "exponent=2.0.*ignored"),
        (lambda: S2ESchedule(alpha=(0.5, 0.5)), r"alpha=\(0.5, 0.5\)"),
        (lambda: S2ESchedule(alpha=(0.5, 0.7, -0.2, 0)), "0 or more"),
        (lambda: S2ESchedule(alpha=(0.5, 0.5, 0.5, 0.5)), "sum 1"),
        (lambda: S2ESchedule(beta=((1, 1, 1),) * 4), "b1, b2, b3, b4"),
        (lambda: S2ESchedule(beta=((1, 1, -1, 1),) * 4), "0 or more"),
        (lambda: S2ESchedule(horizon=0), "horizon=0"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["dml", "kdcl", "mkd", "co_teaching", "co_teaching_plus", "s2e"])
def test_wrong_number_of_peers(name):
    zs, y = batch(3)
    loss = create_loss(name)
    loss.set_progress(0.5)
    with pytest.raises(ValueError, match=r"num_peers=2.*got 3"):
        loss(zs, y)
