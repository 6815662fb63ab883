"""Distillation from teachers: KD, AVER, EBKD, CA-MKD, AEKD, Label Revision; by hand, against
loops, limits, bad teachers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import reference as naive
from helpers.contract import batch_for
from helpers.devices import on_a_fake_accelerator
from torch._dynamo.testing import CompileCounterWithBackend

from kd_plugins import AEKD, AVER, CAMKD, CE, EBKD, KD, LabelRevision

LN2, LN3 = math.log(2), math.log(3)
TERMS = [KD, AVER, EBKD, CAMKD, AEKD]
P = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]  # the student of the examples: two samples, three classes
each_term = pytest.mark.parametrize("term", TERMS, ids=lambda t: t.__name__)


def at(rows, t=1.0):
    """Logits whose softmax at temperature t is ``rows``."""
    return (t * torch.tensor(rows, dtype=torch.float64).log()).requires_grad_()


def batch(num_teachers, b=5, c=4, scale=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (
        torch.randn(b, c, generator=g, dtype=torch.float64)
        * torch.tensor([[0.3], [1], [2], [4], [8]])[:b]
    )
    teacher = torch.randn(num_teachers, b, c, generator=g, dtype=torch.float64) * scale
    return z.requires_grad_(), torch.arange(b) % c, teacher


def weights_of(loss, z, y, teacher):
    loss(z, y, teacher=teacher)
    return torch.stack([loss.stats[f"weight_{k}"] for k in range(len(teacher))])


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def soft(row, t):
    return naive.softmax([z / t for z in row])


# ------------------------------------------------------------------------------------------ by hand


def test_kd_by_hand():
    """T = 2: 4 KL of the teacher to the student, where both are read at T."""
    teacher = [[0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]]
    by_hand = [4 * 0.25 * LN2, 4 / 3 * (math.log(1 / 0.3) * 2 + math.log(1 / 2.4))]
    value = KD(temperature=2.0, reduction="none")(
        at(P, 2), torch.tensor([0, 1]), teacher=at(teacher, 2)
    )
    assert value.tolist() == pytest.approx(by_hand, abs=1e-12)
    both = KD(temperature=2.0)(
        at(P, 2), torch.tensor([0, 1]), teacher=torch.stack([at(teacher, 2), at(P, 2)])
    )
    assert both.item() == pytest.approx(
        sum(by_hand) / 4, abs=1e-12
    )  # the second teacher is the student itself


def test_ebkd_by_hand():
    """Entropies 1.5 ln 2, ln 2 and ln 3 at T = 1; the label plays no part."""
    teacher = torch.stack([at([[0.5, 0.25, 0.25]]), at([[0.5, 0.5, 1e-30]]), at([[1 / 3] * 3])])
    total = 2.5 * LN2 + LN3
    expected = [(1 - h / total) / 2 for h in (1.5 * LN2, LN2, LN3)]
    for y in (0, 2):
        assert weights_of(EBKD(), at(P[:1]), torch.tensor([y]), teacher).tolist() == pytest.approx(
            expected, abs=1e-12
        )


def test_camkd_by_hand():
    """exp(cross-entropy) is 1/p_y: 2, 4 and 4, of which the shares are .2, .4 and .4."""
    teacher = torch.stack(
        [at([[0.5, 0.25, 0.25]]), at([[0.25, 0.5, 0.25]]), at([[0.25, 0.05, 0.7]])]
    )
    weights = weights_of(CAMKD(), at(P[:1]), torch.tensor([0]), teacher)
    assert weights.tolist() == pytest.approx([0.4, 0.3, 0.3], abs=1e-12)
    soft_label = torch.tensor(
        [[0.5, 0.5, 0.0]], dtype=torch.float64
    )  # of the first two: ln 8 / 2 both
    weights = weights_of(CAMKD(), at(P[:1]), soft_label, teacher[:2])
    assert weights.tolist() == pytest.approx([0.5, 0.5], abs=1e-12)


@pytest.mark.parametrize(
    ("cap", "expected"), [(1.0, [0.75, 0.25]), (0.6, [0.6, 0.4]), (0.2, [0.5, 0.5])]
)
def test_aekd_by_hand(cap, expected):
    """Two teachers that pull a uniform student apart, by .1 and by .3: at 3 : 1 they cancel."""
    third = 1 / 3
    teacher = torch.stack(
        [at([[third + 0.1, third - 0.1, third]], 5), at([[third - 0.3, third + 0.3, third]], 5)]
    )
    loss = AEKD(temperature=5.0, cap=cap)
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert weights_of(loss, z, torch.tensor([0]), teacher).tolist() == pytest.approx(
        expected, abs=1e-7
    )
    if cap == 1.0:
        assert (
            torch.autograd.grad(loss(z, torch.tensor([0]), teacher=teacher), z)[0].abs().max()
            < 1e-6
        )


def test_label_revision_by_hand():
    """p = (.6, .3, .1) and class 1: b = .9 / 1.3; class 0: b = .9."""
    p = [[0.6, 0.3, 0.1]]
    for y, expected in [(1, [0.54 / 1.3, 0.67 / 1.3, 0.09 / 1.3]), (0, [0.64, 0.27, 0.09])]:
        loss = LabelRevision(eta=0.9, temperature=2.0)
        q = F.one_hot(torch.tensor([y]), 3).double()
        assert loss.revise(at([p]), q).exp().flatten().tolist() == pytest.approx(
            expected, abs=1e-12
        )
        value = loss(at(P[:1], 2), torch.tensor([y]), teacher=at(p, 2))
        assert value.item() == pytest.approx(4 * kl(expected, P[0]), abs=1e-12)
        assert loss.stats["revised"].item() == y and loss.stats["weight_0"].item() == 1.0


# ---------------------------------------------------------------------- value and gradient by loops


def smallest_mixture(gram, cap):
    """Moves weight between two teachers at a time until none of it helps."""
    n = len(gram)
    a = [1 / n] * n
    for _ in range(3000):
        for i, j in itertools.combinations(range(n), 2):
            slopes = [sum(g * w for g, w in zip(gram[k], a, strict=True)) for k in (i, j)]
            step = (slopes[1] - slopes[0]) / (gram[i][i] + gram[j][j] - 2 * gram[i][j])
            step = max(-a[i], a[j] - cap, min(step, a[j], cap - a[i]))
            a[i], a[j] = a[i] + step, a[j] - step
    return a


def revised(p, q, eta, apply_to):
    top = max(range(len(p)), key=p.__getitem__)
    if apply_to == "wrong" and top == max(range(len(q)), key=q.__getitem__):
        return p
    b = eta / (max(p) - sum(x * y for x, y in zip(p, q, strict=True)) + 1)
    return [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]


def weighed(kind, student, teacher, taught, qs, cap=0.6):
    """[K][B] from logits of student and teachers and what is taught [K][B][C] (of AEKD, student
    at temperature T)."""
    k, b = len(teacher), len(qs)
    if k == 1:
        return [[1.0] * b]
    if kind in ("kd", "aver"):
        return [[1 / k] * b] * k
    if kind == "aekd":
        d = [
            [sum(student[i][c] - rows[i][c] for i in range(b)) / b for c in range(len(qs[0]))]
            for rows in taught
        ]
        gram = [[sum(x * y for x, y in zip(u, v, strict=True)) for v in d] for u in d]
        return [[a] * b for a in smallest_mixture(gram, max(cap, 1 / k))]
    rows = [[naive.softmax(row) for row in rows] for rows in teacher]
    if kind == "ebkd":
        bad = [[naive.entropy(p) for p in ps] for ps in rows]
    else:
        bad = [
            [math.exp(naive.cross_entropy(q, p)) for q, p in zip(qs, ps, strict=True)]
            for ps in rows
        ]
    totals = [sum(column) for column in zip(*bad, strict=True)]
    return [[(1 - x / s) / (k - 1) for x, s in zip(row, totals, strict=True)] for row in bad]


CASES = [
    ("kd", lambda t: KD(t), lambda k: 1),
    ("aver", lambda t: AVER(t), lambda k: 1),
    ("ebkd", lambda t: EBKD(t), lambda k: 1),
    ("ebkd", lambda t: EBKD(t, scale="code"), lambda k: (k - 1) / k if k > 1 else 1),
    ("camkd", lambda t: CAMKD(t), lambda k: 1),
    ("camkd", lambda t: CAMKD(t, scale="code"), lambda k: 1 / k),
    ("aekd", lambda t: AEKD(t), lambda k: 1),
]


@pytest.mark.parametrize("labels", ["indices", "distributions"])
@pytest.mark.parametrize("revise", [None, "all", "wrong"])
@pytest.mark.parametrize("num_teachers", [1, 2, 3])
@pytest.mark.parametrize(("kind", "make", "factor"), CASES)
def test_value_and_gradient_against_loops(kind, make, factor, num_teachers, revise, labels):
    z, y, teacher = batch(num_teachers)
    y = torch.rand(5, 4, dtype=torch.float64).softmax(-1) if labels == "distributions" else y
    qs = y.tolist() if labels == "distributions" else [naive.onehot(k, 4) for k in y.tolist()]
    t, eta = 3.0, 0.7
    taught = [[soft(row, t) for row in rows] for rows in teacher.tolist()]
    wrong = [
        p.index(max(p)) != q.index(max(q)) for ps in taught for p, q in zip(ps, qs, strict=True)
    ]
    if revise:
        taught = [
            [revised(p, q, eta, revise) for p, q in zip(ps, qs, strict=True)] for ps in taught
        ]
    weights = weighed(kind, [soft(row, t) for row in z.tolist()], teacher.tolist(), taught, qs)

    def expected(zs):
        return sum(
            factor(num_teachers) * weights[k][i] * t * t * kl(taught[k][i], soft(row, t)) / 5
            for k in range(num_teachers)
            for i, row in enumerate(zs[0])
        )

    loss = make(t) if revise is None else LabelRevision(make(t), eta=eta, apply_to=revise)
    value = loss(z, y, teacher=teacher)
    value.backward()
    assert value.item() == pytest.approx(expected([z.tolist()]), abs=1e-6)
    slope = torch.tensor(naive.slope(expected, [z.tolist()])[0]).double()
    torch.testing.assert_close(z.grad, slope, atol=1e-6, rtol=1e-5)
    for k, row in enumerate(weights):
        assert loss.stats[f"weight_{k}"].item() == pytest.approx(sum(row) / 5, abs=1e-6)
    assert f"weight_{num_teachers}" not in loss.stats
    if revise:
        assert loss.stats["revised"].item() == pytest.approx(sum(wrong) / len(wrong))


def test_the_gradient_of_kd_is_known():
    z, y, teacher = batch(1)
    (grad,) = torch.autograd.grad(KD(temperature=5.0)(z, y, teacher=teacher), z)
    torch.testing.assert_close(
        grad, 5.0 * ((z / 5).softmax(-1) - (teacher[0] / 5).softmax(-1)) / 5
    )  # T (p - p_t) / B


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_teachers", [2, 3, 4])
@each_term
def test_equal_teachers_are_one(term, num_teachers, dtype):
    z, y, teacher = batch(1)
    z = z.detach().to(dtype).requires_grad_()
    several = teacher.to(dtype).repeat(num_teachers, 1, 1)
    loss, one = term(3.0), KD(3.0)(z, y, teacher=several[0])
    value = loss(z, y, teacher=several)
    torch.testing.assert_close(value, one)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(one, z))
    for k in range(num_teachers):
        assert loss.stats[f"weight_{k}"].item() == pytest.approx(1 / num_teachers, abs=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        AVER,
        EBKD,
        CAMKD,
        AEKD,
        lambda: EBKD(scale="code"),
        lambda: CAMKD(scale="code"),
        lambda: AEKD(cap=0.01),
    ],
)
@pytest.mark.parametrize("rows", [None, 0.0, 1e4], ids=["usual", "uniform", "certain"])
def test_one_teacher_is_kd_to_the_bit(make, rows):
    """(1 - 1) / (1 - 1) in the code of CA-MKD, and 1 - 1 in that of EBKD."""
    z, y, teacher = batch(1)
    teacher = teacher if rows is None else rows * F.one_hot(y, 4)[None].double()
    loss = make()
    for t in (teacher, teacher[0]):
        assert torch.equal(loss(z, y, teacher=t), KD()(z, y, teacher=t))
        assert loss.stats["weight_0"].item() == 1.0


def test_at_high_temperature_it_matches_logits():
    """T² KL -> ‖centred z_t - centred z‖² / 2C."""
    z, y, teacher = batch(1)
    gap = (teacher[0] - teacher[0].mean(-1, keepdim=True)) - (z - z.mean(-1, keepdim=True))
    expected = gap.square().sum(-1).mean() / (2 * 4)
    far, near = (KD(temperature=t)(z, y, teacher=teacher) for t in (1e5, 10.0))
    torch.testing.assert_close(far, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(far, z), torch.autograd.grad(expected, z), rtol=1e-3, atol=1e-4
    )
    assert (near / expected - 1).abs() > 0.02


def test_the_papers_cross_entropy_is_the_same_up_to_temperature():
    """Equation 3 of CA-MKD: Σ_k w_k H(softmax(z_k / T), softmax(z / T)), the gradient of CAMKD /
    T²."""
    z, y, teacher = batch(3)
    t, q = 4.0, F.one_hot(y, 4).double()
    bad = torch.stack([F.cross_entropy(z_k, q, reduction="none") for z_k in teacher])
    w = (1 - bad.softmax(0)) / 2
    printed = (w * -((teacher / t).softmax(-1) * (z / t).log_softmax(-1)).sum(-1)).sum(0).mean()
    (ours,) = torch.autograd.grad((1 / t**2 * CAMKD(t))(z, y, teacher=teacher), z)
    torch.testing.assert_close(ours, torch.autograd.grad(printed, z)[0])


def test_who_counts_more():
    """A sure teacher for EBKD, one that knows the label for CA-MKD, per sample."""
    sure_wrong, unsure_right = at([[0.9, 0.05, 0.05]]), at([[0.3, 0.4, 0.3]])
    teacher, y = torch.stack([sure_wrong, unsure_right]), torch.tensor([1])
    assert (
        weights_of(EBKD(), at(P[:1]), y, teacher)[0]
        > 0.5
        > weights_of(CAMKD(), at(P[:1]), y, teacher)[0]
    )
    two = torch.cat([teacher, teacher.flip(0)], 1)  # the other way round in a second sample
    for loss in (EBKD(), CAMKD()):
        assert weights_of(loss, at(P), torch.tensor([1, 1]), two).tolist() == pytest.approx(
            [0.5, 0.5]
        )
        alone = [loss(at([p]), y, teacher=two[:, i : i + 1]) for i, p in enumerate(P)]
        torch.testing.assert_close(loss(at(P), torch.tensor([1, 1]), teacher=two), sum(alone) / 2)


def test_temperature_is_not_in_the_weights():
    z, y, teacher = batch(3)
    for term in (EBKD, CAMKD):
        cold, hot = (weights_of(term(t), z, y, teacher) for t in (1.0, 20.0))
        torch.testing.assert_close(cold, hot, rtol=0, atol=0)


# ---------------------------------------------------------------------- what public code gets wrong


def test_scales_of_the_code():
    z, y, teacher = batch(3)
    for term, factor in ((EBKD, 2 / 3), (CAMKD, 1 / 3)):
        paper, code = term()(z, y, teacher=teacher), term(scale="code")(z, y, teacher=teacher)
        torch.testing.assert_close(code, factor * paper)
    h = torch.special.entr(teacher.softmax(-1)).sum(-1)
    each = torch.stack([KD(reduction="none")(z, y, teacher=t) for t in teacher])
    theirs = ((1 - h / h.sum(0)) * each).sum() / (
        5 * 3
    )  # a mean over N K of weights that sum to K - 1
    torch.testing.assert_close(EBKD(scale="code")(z, y, teacher=teacher), theirs)
    assert ((1 - h / h.sum(0)).sum(0) - 2).abs().max() < 1e-12


EXTREME = {
    "certain": torch.tensor([[1e4, 0.0, 0.0]]).repeat(2, 3, 1),
    "one of them certain": torch.stack([torch.tensor([[1e4, 0.0, 0.0]] * 3), torch.eye(3)]),
    "underflowing": torch.tensor([[[200.0, 0.0, 0.0]], [[0.0, 0.0, 150.0]]]).repeat(1, 3, 1),
    "uniform": torch.zeros(2, 3, 3),
    "impossible": torch.tensor([[[-1e4, 0.0, 0.0]], [[0.0, -1e4, 0.0]]]).repeat(1, 3, 1),
}


@pytest.mark.parametrize("revise", [False, True])
@pytest.mark.parametrize("kind", EXTREME)
@each_term
def test_extreme_teachers(term, kind, revise):
    """0 log 0 where a probability underflows, 0 / 0 where no teacher has doubt; the weights sum
    to 1 all the same."""
    y, teacher = torch.tensor([0, 1, 2]), EXTREME[kind]
    naive_entropy = -(teacher.softmax(-1) * teacher.softmax(-1).log()).sum(-1)  # as in public code
    if kind in ("certain", "underflowing"):
        assert naive_entropy.isnan().all()
    for student in (torch.zeros(3, 3), torch.eye(3) * 1e4, teacher[0], teacher[1] * 1e3):
        z = student.clone().requires_grad_()
        loss = LabelRevision(term()) if revise else term()
        value = loss(z, y, teacher=teacher)
        value.backward()
        assert value.isfinite() and value >= -1e-5 and z.grad.isfinite().all()
        weights = torch.stack([loss.stats["weight_0"], loss.stats["weight_1"]])
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-6) and (weights >= 0).all()


def test_teachers_without_doubt_count_alike():
    weights = weights_of(EBKD(), torch.randn(3, 3), torch.tensor([0, 1, 2]), EXTREME["certain"])
    assert weights.tolist() == [0.5, 0.5]
    weights = weights_of(
        EBKD(), torch.randn(3, 3), torch.tensor([0, 1, 2]), EXTREME["one of them certain"]
    )
    assert weights.tolist() == [1.0, 0.0]


def test_exp_of_a_large_cross_entropy():
    """exp(1e4) is inf and inf / inf NaN: the teacher that is sure of another class does not
    count."""
    teacher = torch.tensor([[[0.0, 1e4, 0.0]], [[0.0, 1e3, 0.0]], [[1.0, 0.0, 0.0]]])
    weights = weights_of(CAMKD(), torch.zeros(1, 3), torch.tensor([0]), teacher)
    assert weights.tolist() == [0.0, 0.5, 0.5]


@each_term
def test_weights_are_per_sample_and_sum_to_one(term):
    z, y, teacher = batch(4, scale=6.0)
    seen = []

    class Watched(term):
        def weights(self, *args):
            seen.append(super().weights(*args))
            return seen[-1]

    loss = Watched()
    losses = torch.stack([KD(reduction="none")(z, y, teacher=t) for t in teacher])
    value = loss(z, y, teacher=teacher)
    (weight,) = seen
    assert weight.shape == (4, 5) and not weight.requires_grad
    torch.testing.assert_close(weight.sum(0), torch.ones(5, dtype=torch.float64), atol=1e-7, rtol=0)
    assert (weight.std(1) > 0).any() == (term in (EBKD, CAMKD))
    torch.testing.assert_close(value, (weight * losses).sum(0).mean())


def test_a_new_weighing_is_one_method():
    """Its weights are constants even where it reads the student, and it may be revised like the
    others."""

    class Nearest(KD):
        def weights(self, student, target, teacher, taught):
            return torch.softmax(-(taught.exp() - student.exp()).square().sum(-1), 0)

    z, y, teacher = batch(3)
    loss = Nearest()
    value = loss(z, y, teacher=teacher)
    gap = ((teacher / 4).softmax(-1) - (z.detach() / 4).softmax(-1)).square().sum(-1)
    w = torch.softmax(-gap, 0)
    each = torch.stack([KD(reduction="none")(z, y, teacher=t) for t in teacher])
    expected = (w * each).sum(0).mean()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))
    assert LabelRevision(Nearest())(z, y, teacher=teacher).isfinite()


# --------------------------------------------------------------------------------------------- AEKD


def directions(z, y, teacher, t):
    """Batch mean of the gradient of each KD_k by the student's logits, by autograd: [K, C]."""
    return torch.stack([torch.autograd.grad(KD(t)(z, y, teacher=k), z)[0].sum(0) for k in teacher])


@pytest.mark.parametrize("cap", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_aekd_against_autograd_and_a_grid(seed, cap):
    z, y, teacher = batch(3, seed=seed, scale=1 + 2 * seed)
    d = directions(z, y, teacher, 4.0)
    gram = d @ d.T
    weights = weights_of(AEKD(cap=cap), z, y, teacher)

    def length(w):
        return (w @ gram @ w).item()

    n = 200
    grid = [
        torch.tensor([i, j, n - i - j]).double() / n
        for i in range(n + 1)
        for j in range(n + 1 - i)
        if max(i, j, n - i - j) <= cap * n
    ]
    best = min(grid, key=length)
    assert length(weights) <= length(best) * (1 + 1e-6)
    assert (
        weights.sum().item() == pytest.approx(1.0, abs=1e-7)
        and weights.max() <= cap + 1e-7
        and weights.min() >= 0
    )
    nearby = [w for w in grid if length(w) <= length(best) + 1e-3 * gram.diagonal().max()]
    assert min((w - weights).abs().max() for w in nearby) < 2 / n


def test_aekd_looks_at_the_mean_over_the_batch():
    """Not at all gradients of the batch side by side, whose shortest mixture is another one."""
    z, y, teacher = batch(2)
    weights = weights_of(AEKD(cap=1.0), z, y, teacher)

    def shortest(d):  # of two
        a, b = d
        return ((b - a) @ b / (b - a).square().sum()).clamp(0, 1).item()

    side_by_side = torch.stack(
        [torch.autograd.grad(KD()(z, y, teacher=k), z)[0].flatten() for k in teacher]
    )
    assert weights[0].item() == pytest.approx(shortest(directions(z, y, teacher, 4.0)), abs=1e-6)
    assert abs(weights[0].item() - shortest(side_by_side)) > 0.05


def test_aekd_takes_its_weights_as_constants():
    z, y, teacher = batch(3)
    loss = AEKD()
    value = loss(z, y, teacher=teacher)
    weights = [loss.stats[f"weight_{k}"] for k in range(3)]
    expected = sum(w * KD()(z, y, teacher=t) for w, t in zip(weights, teacher, strict=True))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_aekd_on_small_gradients(size):
    """A student that has nearly learned: an absolute tolerance of 1e-6 would leave the weights
    where they began."""
    third = 1 / 3
    rows = [
        [third + 0.1 * size, third - 0.1 * size, third],
        [third - 0.15 * size, third + 0.15 * size, third],
    ]
    weights = weights_of(
        AEKD(cap=1.0), torch.zeros(1, 3).double(), torch.tensor([0]), at([[r] for r in rows], 4)
    )
    assert weights.tolist() == pytest.approx([0.6, 0.4], abs=1e-6)


def test_aekd_of_a_student_that_agrees():
    z, y, _ = batch(1)
    teacher = z.detach().repeat(3, 1, 1)
    assert weights_of(AEKD(), z, y, teacher).tolist() == pytest.approx([1 / 3] * 3, abs=1e-7)


# ----------------------------------------------------------------------------------- Label Revision


def rows_of_all_kinds():
    g = torch.Generator().manual_seed(0)
    z = (
        torch.randn(3, 400, 7, generator=g)
        * torch.tensor([0.0, 0.01, 1.0, 10.0, 1e4]).repeat(80)[:, None]
    )
    z[:, ::7, 3] = 1e4
    return z, torch.arange(400) % 7


@pytest.mark.parametrize("eta", [0.01, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("apply_to", ["all", "wrong"])
def test_the_label_leads(eta, apply_to):
    """In float32: by 1 - eta, and no more where the teacher is wrong; "wrong" only promises the
    largest place."""
    z, y = rows_of_all_kinds()
    q = F.one_hot(y, 7).float()
    loss = LabelRevision(eta=eta, apply_to=apply_to)
    before = (z / 4).log_softmax(-1)
    after, p = loss.revise(before, q), before.exp()
    new = after.exp()
    torch.testing.assert_close(new.sum(-1), torch.ones(3, 400))
    assert torch.equal(new.argmax(-1), y.expand(3, 400))
    lead = (new * q).sum(-1) - (new - 2 * q).amax(-1)
    wrong = p.argmax(-1) != y
    assert 0.2 < wrong.float().mean() < 0.95
    torch.testing.assert_close(
        lead[wrong], torch.full_like(lead[wrong], 1 - eta), atol=2e-6, rtol=0
    )
    if apply_to == "all":
        assert (lead >= 1 - eta - 2e-6).all() and (lead > 0).all()
    else:
        assert torch.equal(after[~wrong], before[~wrong]) and not torch.equal(after, before)
    assert loss.stats["revised"].item() == pytest.approx(wrong.float().mean().item())


def just_enough(p, y):
    """The least share of the label in (1 - m) p + m y at which no other class is larger, by
    bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        m = (low + high) / 2
        mixed = [(1 - m) * x + m * (c == y) for c, x in enumerate(p)]
        low, high = (low, m) if mixed[y] >= max(mixed) else (m, high)
    return [(1 - high) * x + high * (c == y) for c, x in enumerate(p)]


def test_towards_one_it_mixes_just_enough():
    """Where the teacher is wrong, as other corrections of wrong teachers do; where it is right,
    it is left alone."""
    g = torch.Generator().manual_seed(1)
    p = (torch.randn(2, 40, 5, generator=g, dtype=torch.float64) * 2).softmax(-1)
    y = torch.arange(40) % 5
    new = LabelRevision(eta=1 - 1e-9).revise(p.log(), F.one_hot(y, 5).double()).exp()
    wrong = p.argmax(-1) != y
    for k, i in itertools.product(range(2), range(40)):
        expected = just_enough(p[k, i].tolist(), y[i].item())
        assert new[k, i].tolist() == pytest.approx(expected, abs=1e-8)
        assert wrong[k, i] or expected == pytest.approx(p[k, i].tolist(), abs=1e-12)
    assert wrong.any() and not wrong.all()


@each_term
def test_towards_one_right_teachers_are_as_they_were_and_towards_zero_the_label_is_taught(term):
    z, y, teacher = batch(2, scale=1.0)
    right = teacher + 6.0 * F.one_hot(y, 4)
    torch.testing.assert_close(
        LabelRevision(term(), eta=1 - 1e-9)(z, y, teacher=right), term()(z, y, teacher=right)
    )
    label = 16 * F.cross_entropy(z / 4, y)
    torch.testing.assert_close(LabelRevision(term(), eta=1e-12)(z, y, teacher=teacher), label)


@pytest.mark.parametrize("eta", [0.1, 0.8])
@each_term
def test_a_perfect_teacher_is_left_alone(term, eta):
    """One that is right with "wrong", to the bit; one that is certain of the label in both
    cases."""
    z, y, teacher = batch(3, scale=1.0)
    right = teacher + 6.0 * F.one_hot(y, 4)
    loss = LabelRevision(term(), eta=eta, apply_to="wrong")
    assert (
        torch.equal(loss(z, y, teacher=right), term()(z, y, teacher=right))
        and loss.stats["revised"] == 0
    )
    assert LabelRevision(term(), eta=eta)(z, y, teacher=right) != term()(z, y, teacher=right)
    certain = 1e4 * F.one_hot(y, 4).double().repeat(3, 1, 1)
    torch.testing.assert_close(
        LabelRevision(term(), eta=eta)(z, y, teacher=certain),
        term()(z, y, teacher=certain),
        atol=1e-6,
        rtol=1e-7,
    )


def test_what_teachers_said_weighs_them():
    """EBKD and CA-MKD by the teachers as they are; AEKD by the gradients of what is taught."""
    z, y, teacher = batch(3)
    for term in (EBKD, CAMKD):
        plain, after = (
            weights_of(loss, z, y, teacher) for loss in (term(), LabelRevision(term(), eta=0.1))
        )
        torch.testing.assert_close(plain, after, rtol=0, atol=0)
    revision = LabelRevision(eta=0.5)
    as_logits = 4 * revision.revise((teacher / 4).log_softmax(-1), F.one_hot(y, 4).double())
    expected = weights_of(AEKD(), z, y, as_logits)
    torch.testing.assert_close(
        weights_of(LabelRevision(AEKD(), eta=0.5), z, y, teacher), expected, atol=1e-6, rtol=0
    )
    assert (weights_of(AEKD(), z, y, teacher) - expected).abs().max() > 0.02


def test_for_soft_labels():
    """q = (.5, .5, 0) on p = (.2, .3, .5): p_y = .25, b = .8 / 1.25; the target's class is the
    one it weighs most."""
    q = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    new = LabelRevision(eta=0.8).revise(at([[[0.2, 0.3, 0.5]]]), q).exp().flatten()
    assert new.tolist() == pytest.approx([0.308, 0.372, 0.32], abs=1e-12)  # b = .64
    q = torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64)
    log_p = at([[[0.6, 0.2, 0.2]]])
    assert torch.equal(LabelRevision(apply_to="wrong").revise(log_p, q), log_p)


def test_the_term_brings_its_own():
    loss = LabelRevision(CAMKD(temperature=2.0, num_classes=4, reduction="none"), eta=0.6)
    assert (loss.num_classes, loss.reduction) == (4, "none")
    z, y, teacher = batch(2)
    assert loss(z, y, teacher=teacher).shape == (5,)
    with pytest.raises(ValueError, match="num_classes=4"):
        loss(z[:, :3], y % 3, teacher=teacher[:, :, :3])
    kd = LabelRevision(temperature=3.0)
    assert type(kd.term) is KD and kd.term.temperature == 3.0
    assert (LabelRevision().term.temperature, LabelRevision().eta, LabelRevision().apply_to) == (
        4.0,
        0.8,
        "all",
    )
    torch.testing.assert_close(
        kd(z, y, teacher=teacher), LabelRevision(AVER(3.0))(z, y, teacher=teacher)
    )
    assert kd(z, y, teacher=teacher) != LabelRevision()(z, y, teacher=teacher)


# ------------------------------------------------------------------------------------------- in use


def test_a_whole_objective_is_a_sum():
    z, y, teacher = batch(2)
    total = 0.1 * CE() + 0.9 * KD(temperature=4) + LabelRevision(CAMKD())
    expected = (
        0.1 * CE()(z, y)
        + 0.9 * KD()(z, y, teacher=teacher)
        + LabelRevision(CAMKD())(z, y, teacher=teacher)
    )
    torch.testing.assert_close(total(z, y, teacher=teacher), expected)
    assert total.required_inputs == {"teacher"}
    for key in ("kd_1_weight_1", "labelrevision_2_weight_0", "labelrevision_2_revised"):
        assert key in total.stats


@pytest.mark.parametrize("apply_to", ["all", "wrong"])
@each_term
def test_revision_of_any_term_compiles_and_never_waits(term, apply_to):
    """The contract tests see the term of default only."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    eager, inner = (LabelRevision(term(), apply_to=apply_to) for _ in range(2))
    compiled = torch.compile(inner, fullgraph=True, backend=counter)
    x = batch_for(eager)
    for _ in range(3):
        torch.testing.assert_close(x(compiled), x(eager))
    assert counter.frame_count == 1
    torch._dynamo.reset()
    with on_a_fake_accelerator(eager) as move:
        value = eager(move(x.logits[0]), move(x.target), teacher=move(x.extra["teacher"]))
        assert value.device.type == "cuda"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KD(temperature=0.0), ValueError, "temperature=0.0"),
        (lambda: CAMKD(temperature=math.inf), ValueError, "temperature=inf"),
        (lambda: AVER(temperature=math.nan), ValueError, "temperature=nan"),
        (lambda: EBKD(scale="authors"), ValueError, "scale='authors'.*'paper', 'code'"),
        (lambda: CAMKD(scale="K"), ValueError, "scale='K'.*'paper', 'code'"),
        (lambda: AEKD(cap=0.0), ValueError, "cap=0.0"),
        (lambda: AEKD(cap=1.5), ValueError, "cap=1.5"),
        (lambda: AEKD(cap=math.nan), ValueError, "cap=nan"),
        (lambda: LabelRevision(eta=1.0), ValueError, "eta=1.0"),
        (lambda: LabelRevision(eta=0.0), ValueError, "eta=0.0"),
        (lambda: LabelRevision(eta=math.nan), ValueError, "eta=nan"),
        (lambda: LabelRevision(temperature=-1.0), ValueError, "temperature=-1.0"),
        (lambda: LabelRevision(apply_to="right"), ValueError, "apply_to='right'.*'all', 'wrong'"),
        (
            lambda: LabelRevision(CAMKD(), temperature=2.0),
            ValueError,
            r"temperature=2.0: CAMKD.*ignored",
        ),
        (lambda: LabelRevision(CE()), TypeError, "term=CE"),
        (lambda: LabelRevision(0.5 * KD()), TypeError, "term=Sum"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
