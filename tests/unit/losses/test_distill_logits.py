"""DKD, DIST, NKD, WTTM and standardised logits: by hand, against loops, limits, batches, in
training."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import reference as naive
from helpers.tiny import Net, difference, state, trainer, view

from kd_plugins import (
    AEKD,
    AVER,
    CAMKD,
    CE,
    DIST,
    DKD,
    EBKD,
    KD,
    NKD,
    WTTM,
    LabelRevision,
    MaskedLoss,
)
from kd_plugins.data import cache_teachers

TERMS = [DKD, DIST, NKD, WTTM]
each_term = pytest.mark.parametrize("term", TERMS, ids=lambda t: t.__name__)


def batch(num_teachers=1, b=5, c=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(b, c, generator=g, dtype=torch.float64) * 2
    teacher = torch.randn(num_teachers, b, c, generator=g, dtype=torch.float64) * 3
    return z.requires_grad_(), torch.arange(b) % c, teacher


def at(rows, t=1.0):
    """Logits whose softmax at temperature t is ``rows``."""
    return t * torch.tensor(rows, dtype=torch.float64).log()


# ------------------------------------------------------------------------------------------ by hand


def test_dkd_by_hand():
    """T = 2, label 0. b = (1/2, 1/2) and (1/4, 3/4); h = (1/2, 1/2) and (2/3, 1/3)."""
    z, teacher = at([[0.25, 0.5, 0.25]], 2), at([[0.5, 0.25, 0.25]], 2)
    tckd = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    nckd = 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
    loss = DKD(temperature=2.0, alpha=3.0, beta=5.0)
    value = loss(z, torch.tensor([0]), teacher=teacher)
    assert value.item() == pytest.approx(4 * (3 * tckd + 5 * nckd), abs=1e-12)
    assert loss.stats["tckd"].item() == pytest.approx(4 * tckd)
    assert loss.stats["nckd"].item() == pytest.approx(4 * nckd)


def test_nkd_by_hand():
    """T = 1: -1/2 ln 1/4 - gamma (1/2 ln 2/3 + 1/2 ln 1/3)."""
    z, teacher = at([[0.25, 0.5, 0.25]]), at([[0.5, 0.25, 0.25]])
    value = NKD(temperature=1.0, gamma=2.0)(z, torch.tensor([0]), teacher=teacher)
    assert value.item() == pytest.approx(math.log(2) + math.log(4.5), abs=1e-12)


def test_dist_by_hand():
    """Rows correlate by 1/2 and -1. Columns of two samples by a sign: -1, -1, and 0 without
    spread."""
    third = 1 / 3
    z = at([[third + 0.1, third, third - 0.1], [third - 0.1, third + 0.1, third]])
    teacher = at([[third + 0.1, third - 0.1, third], [third + 0.2, third - 0.2, third]])
    loss = DIST(temperature=1.0, beta=2.0, gamma=3.0, eps=1e-12)
    value = loss(z, torch.tensor([0, 1]), teacher=teacher)
    assert loss.stats["inter"].item() == pytest.approx((0.5 + 2) / 2)
    assert loss.stats["intra"].item() == pytest.approx((2 + 2 + 1) / 3)
    assert value.item() == pytest.approx(2 * 1.25 + 3 * 5 / 3)


def test_wttm_by_hand():
    """gamma = 1/2 on (1/4, 1/4, 1/2): U = 1 + sqrt(1/2), q = (1/2, 1/2, sqrt(1/2)) / U."""
    root = math.sqrt(0.5)
    u = 1 + root
    student = [0.25, 0.5, 0.25]
    kl = sum(q / u * math.log(q / u / p) for q, p in zip([0.5, 0.5, root], student, strict=True))
    loss = WTTM(gamma=0.5)
    value = loss(at([student]), torch.tensor([0]), teacher=at([[0.25, 0.25, 0.5]]))
    assert value.item() == pytest.approx(u * kl, abs=1e-12)
    assert loss.stats["smoothness"].item() == pytest.approx(u)


def test_standardised_by_hand():
    """(3, 5, 7) and (0, 0, 3) become (-1, 0, 1) and (-1, -1, 2) / sqrt 3."""
    z, teacher = torch.tensor([[3.0, 5.0, 7.0]]).double(), torch.tensor([[0.0, 0.0, 3.0]]).double()
    p = naive.softmax([-0.5, 0.0, 0.5])
    t = naive.softmax([x / math.sqrt(3) / 2 for x in (-1, -1, 2)])
    expected = 4 * sum(a * math.log(a / b) for a, b in zip(t, p, strict=True))
    loss = KD(temperature=2.0, standardize=True)
    assert loss(z, torch.tensor([0]), teacher=teacher).item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------- value and gradient by loops


def soft(row, t, standardize):
    if standardize:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))
        row = [(z - mean) / (1e-7 + deviation) for z in row]
    return naive.softmax([z / t for z in row])


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def pearson(a, b):
    a, b = ([x - sum(v) / len(v) for x in v] for v in (a, b))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norms + 1e-8)


def without(p, y):
    rest = [x for c, x in enumerate(p) if c != y]
    return [x / sum(rest) for x in rest]


def dkd(ps, ts, raw_s, raw_t, labels, t):
    total = 0.0
    for p, q, y in zip(ps, ts, labels, strict=True):
        total += kl([q[y], 1 - q[y]], [p[y], 1 - p[y]]) + 8 * kl(without(q, y), without(p, y))
    return t * t * total / len(ps)


def nkd(ps, ts, raw_s, raw_t, labels, t):
    total = 0.0
    for p, q, own, trust, y in zip(ps, ts, raw_s, raw_t, labels, strict=True):
        total -= naive.softmax(trust)[y] * math.log(naive.softmax(own)[y])
        total += 3.5 * t * t * naive.cross_entropy(without(q, y), without(p, y))
    return total / len(ps)


def dist(ps, ts, raw_s, raw_t, labels, t):
    inter = sum(1 - pearson(p, q) for p, q in zip(ps, ts, strict=True)) / len(ps)
    columns = list(zip(zip(*ps, strict=True), zip(*ts, strict=True), strict=True))
    intra = sum(1 - pearson(a, b) for a, b in columns) / len(columns)
    return t * t * (inter + intra)


def wttm(ps, ts, raw_s, raw_t, labels, t):
    total = 0.0
    for p, q in zip(ps, ts, strict=True):
        power = [x**0.1 for x in q]
        total += sum(power) * kl([x / sum(power) for x in power], p)
    return total / len(ps)


def revised(p, q, eta):
    b = eta / (max(p) - sum(x * y for x, y in zip(p, q, strict=True)) + 1)
    return [b * x + (1 - b) * y for x, y in zip(p, q, strict=True)]


CASES = {  # name -> loss at T, the loops, and T
    "dkd": (lambda s: DKD(3.0, standardize=s), dkd, 3.0),
    "nkd": (lambda s: NKD(2.0, standardize=s), nkd, 2.0),
    "dist": (lambda s: DIST(3.0, standardize=s), dist, 3.0),
    "wttm": (lambda s: WTTM(), wttm, 1.0),
    "kd": (
        lambda s: KD(3.0, s),
        lambda ps, ts, *_: 9 * sum(map(kl, ts, ps)) / len(ps),
        3.0,
    ),
}


@pytest.mark.parametrize("labels", ["indices", "distributions"])
@pytest.mark.parametrize("revise", [False, True], ids=["", "revised"])
@pytest.mark.parametrize("standardize", [False, True], ids=["", "standardised"])
@pytest.mark.parametrize("num_teachers", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_against_loops(name, num_teachers, standardize, revise, labels):
    """A mean over teachers; a distribution counts by its largest class; Label Revision first."""
    make, loops, t = CASES[name]
    if revise and name.startswith("nkd"):
        pytest.skip("a revision would change nothing, and is refused")
    standardize = standardize and name != "wttm"
    z, y, teacher = batch(num_teachers)
    if labels == "distributions":
        target = torch.rand(5, 4, dtype=torch.float64, generator=torch.manual_seed(1)).softmax(-1)
        qs, hard = target.tolist(), target.argmax(-1).tolist()
    else:
        target, hard = y, y.tolist()
        qs = [naive.onehot(k, 4) for k in hard]
    taught = [[soft(row, t, standardize) for row in rows] for rows in teacher.tolist()]
    if revise:
        taught = [[revised(p, q, 0.7) for p, q in zip(ps, qs, strict=True)] for ps in taught]

    def expected(zs):
        ps = [soft(row, t, standardize) for row in zs[0]]
        each = [
            loops(ps, ts, zs[0], raw, hard, t)
            for ts, raw in zip(taught, teacher.tolist(), strict=True)
        ]
        return sum(each) / num_teachers

    loss = LabelRevision(make(standardize), eta=0.7) if revise else make(standardize)
    value = loss(z, target, teacher=teacher)
    value.backward()
    assert value.item() == pytest.approx(expected([z.tolist()]), rel=1e-9)
    slope = torch.tensor(naive.slope(expected, [z.tolist()])[0]).double()
    torch.testing.assert_close(z.grad, slope, atol=1e-6, rtol=1e-5)


def test_a_revision_that_would_change_nothing_is_refused():
    z, y, teacher = batch(1)
    term = NKD()
    q, lesson = torch.eye(4)[y].double(), term.soften(teacher)
    revised = LabelRevision(eta=0.7).revise(lesson, q)
    assert (revised - lesson).abs().max() > 0.1
    kept = term.learn(z, q, teacher, lesson)
    torch.testing.assert_close(term.learn(z, q, teacher, revised), kept)
    with pytest.raises(ValueError, match=r"NKD.*it would change nothing"):
        LabelRevision(term)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, standardize):
    z, y, teacher = batch(2)
    loss = CASES[name][0](standardize and name != "wttm")
    assert torch.autograd.gradcheck(lambda x: loss(x, y, teacher=teacher), z)


# ------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("standardize", [False, True])
def test_kd_is_its_two_parts(standardize):
    """T² KL = TCKD + (1 - p_y of the teacher) NCKD, per sample: the paper's identity."""
    z, y, teacher = batch(1, b=7, c=5)
    how = {"standardize": standardize, "reduction": "none"}
    tckd = DKD(beta=0.0, **how)(z, y, teacher=teacher)
    nckd = DKD(alpha=0.0, beta=1.0, **how)(z, y, teacher=teacher)
    rest = 1 - KD(**how).soften(teacher[0]).exp()[range(7), y]
    whole = KD(**how)(z, y, teacher=teacher)
    torch.testing.assert_close(whole, tckd + rest * nckd)
    assert (whole - tckd - nckd).abs().max() > 0.1


def test_nkd_has_the_gradient_of_dkds_second_part():
    """And of cross-entropy times the teacher's trust. At equality the gradient of the second is
    0."""
    z, y, teacher = batch(1)
    (ours,) = torch.autograd.grad(NKD(temperature=2.0, gamma=3.0)(z, y, teacher=teacher), z)
    others = DKD(temperature=2.0, alpha=0.0, beta=3.0)(z, y, teacher=teacher)
    trust = teacher[0].softmax(-1)[range(5), y]
    own = (trust * F.cross_entropy(z, y, reduction="none")).mean()
    torch.testing.assert_close(ours, torch.autograd.grad(others + own, z)[0])


def test_a_sure_teacher_silences_kd_and_not_dkd():
    """What DKD is for: where p_y is nearly 1, KD says nothing of how the others rank."""
    y = torch.tensor([0])
    teacher = torch.tensor([[40.0, 8.0, 4.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[40.0, 0.0, 4.0, 8.0]], dtype=torch.float64)
    plain, decoupled = (term(z, y, teacher=teacher).item() for term in (KD(), DKD()))
    assert plain < 0.1 and decoupled > 100 * plain


@pytest.mark.parametrize("mix", [1.0, 0.6, 0.1])
def test_dist_is_zero_for_what_varies_alike(mix):
    """p = mix p_t + (1 - mix) / C is affine in rows and in columns. KD sees a difference."""
    _, y, teacher = batch(1)
    p = mix * (teacher[0] / 4).softmax(-1) + (1 - mix) / 4
    z = 4 * p.log()
    assert DIST()(z, y, teacher=teacher).item() == pytest.approx(0.0, abs=1e-4)
    assert (KD()(z, y, teacher=teacher).item() > 0.01) is (mix < 1.0)
    worst = DIST(temperature=1.0)((1 - p).log(), y, teacher=p.log())
    assert worst.item() == pytest.approx(4.0, abs=1e-3)  # both correlations are -1


def test_wttm_at_power_one_is_kd():
    z, y, teacher = batch(2)
    values = [term(z, y, teacher=teacher) for term in (WTTM(gamma=1.0), KD(temperature=1.0))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, z) for v in values))


def test_wttm_weighs_smooth_teachers_more():
    """U is 1 for a certain teacher and C^(1 - gamma) for one without preference."""
    y = torch.tensor([0])
    for teacher, u in ((900 * torch.eye(4)[:1], 1.0), (torch.zeros(1, 4), 4**0.9)):
        loss = WTTM()
        loss(torch.zeros(1, 4).double(), y, teacher=teacher.double())
        assert loss.stats["smoothness"].item() == pytest.approx(u)


@pytest.mark.parametrize("term", [KD, AVER, EBKD, CAMKD, AEKD, DKD, DIST, NKD])
def test_standardised_terms_are_those_of_standardised_logits(term):
    """The weights of EBKD and CA-MKD are of the teachers as they are, and so is NKD's trust."""
    z, y, teacher = batch(3 if term not in (EBKD, CAMKD, NKD) else 1)

    def standard(x):
        return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))

    own = 0.0
    if term is NKD:  # the label's part, at T = 1 and without standardisation, is apart
        own = [
            NKD(gamma=0.0)(x, y, teacher=t)
            for x, t in ((z, teacher), (standard(z), standard(teacher)))
        ]
        own = own[0] - own[1]
    expected = term()(standard(z), y, teacher=standard(teacher)) + own
    value = term(standardize=True)(z, y, teacher=teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("term", [KD, DKD, DIST])
def test_standardised_it_is_blind_to_shift_and_scale(term):
    """Of the student's and of the teachers' logits. So the gradient is orthogonal to both
    changes."""
    z, y, teacher = batch(2)
    loss = term(standardize=True)
    value = loss(z, y, teacher=teacher)
    torch.testing.assert_close(
        loss(5 * z + 3, y, teacher=0.2 * teacher - 1), value, rtol=1e-5, atol=0
    )
    (grad,) = torch.autograd.grad(value, z)
    spread = z - z.mean(-1, keepdim=True)
    assert grad.sum(-1).abs().max() < 1e-9
    assert (grad * spread).sum(-1).abs().max() < 1e-6 < grad.norm()
    assert term()(5 * z, y, teacher=teacher) != term()(z, y, teacher=teacher)


# ----------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "loss", [DIST(), KD(2.0, standardize=True), DKD(standardize=True)], ids=str
)
def test_equal_logits_of_a_student_make_no_gradient(loss, dtype):
    """A head that starts at zero. The authors' code has 1e7 of rounding errors here."""
    _, y, teacher = batch(1, c=7)
    for constant in (0.0, 0.1, 1234.5):
        z = torch.full((5, 7), constant, dtype=dtype, requires_grad=True)
        value = loss(z, y, teacher=teacher.to(dtype))
        (grad,) = torch.autograd.grad(value, z)
        assert value.isfinite() and grad.abs().max() < 10
    z = (torch.eye(7, dtype=dtype)[:5] * 1e-3).requires_grad_()  # a little spread is spread
    assert torch.autograd.grad(loss(z, y, teacher=teacher.to(dtype)), z)[0].abs().max() > 0


@pytest.mark.parametrize("revise", [False, True], ids=["", "revised"])
@each_term
def test_certain_teachers_and_students(term, revise):
    """p_y and 1 - p_y underflow: in float32 the logarithm of either is infinite."""
    if revise and term is NKD:
        pytest.skip("a revision would change nothing, and is refused")
    y = torch.tensor([0, 1, 2])
    certain = 1e3 * torch.eye(4)[:3]
    for teacher in (certain, certain.roll(1, 0), -certain):
        for z in (certain, certain.roll(1, 0), -certain):
            z = z.clone().requires_grad_()
            loss = LabelRevision(term(1.0) if term is not WTTM else WTTM()) if revise else term()
            value = loss(z, y, teacher=teacher)
            assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


def test_dkd_where_a_probability_underflows():
    """In float32 as in float64, which is far from underflow."""
    teacher = torch.tensor([[120.0, 3.0, 0.0]])
    z, y = torch.tensor([[3.0, 0.0, 130.0]]), torch.tensor([0])
    low = DKD(temperature=1.0)(z, y, teacher=teacher)
    high = DKD(temperature=1.0)(z.double(), y, teacher=teacher.double())
    assert high > 100 and low.item() == pytest.approx(high.item(), rel=1e-5)


# ------------------------------------------------------------------------- schedule, batches, masks


def test_the_warm_up_grows_and_stays():
    z, y, teacher = batch(1)
    loss, whole = DKD(warmup=1 / 12), DKD()(z, y, teacher=teacher)
    for progress, share in ((0.0, 0.0), (10 / 240, 0.5), (20 / 240, 1.0), (0.9, 1.0)):
        loss.set_progress(progress)
        torch.testing.assert_close(loss(z, y, teacher=teacher), share * whole, rtol=1e-6, atol=0)


@each_term
def test_halves_of_a_batch_are_the_batch_except_for_dist(term):
    """So for two processes or accumulation steps: DIST's correlation over the batch is a local
    one."""
    z, y, teacher = batch(2, b=8)
    whole = term()(z, y, teacher=teacher)
    halves = [term()(z[k], y[k], teacher=teacher[:, k]) for k in (slice(4), slice(4, 8))]
    same = torch.allclose(sum(halves) / 2, whole)
    assert same is (term is not DIST)
    rows = DIST(gamma=0.0)  # its other part is per sample
    halves = [rows(z[k], y[k], teacher=teacher[:, k]) for k in (slice(4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, rows(z, y, teacher=teacher))


@each_term
def test_a_mask_keeps_the_values_of_its_samples(term):
    z, y, teacher = batch(2, b=6)
    mask = [True, False, True, True, False, False]
    revised = [lambda **base: LabelRevision(term(), eta=0.5, **base)] * term.revisable
    for make in [term, *revised]:
        each = make(reduction="none")(z, y, teacher=teacher)
        value = MaskedLoss(mask, make())(z, y, teacher=teacher, index=torch.arange(6))
        torch.testing.assert_close(value, each[[0, 2, 3]].sum() / 6)


# -------------------------------------------------------------------------------------- in training

OBJECTIVES = {
    "all": lambda: CE() + DKD(warmup=0.5) + 2 * DIST() + NKD() + WTTM(),
    "standardised": lambda: 0.1 * CE() + 9 * KD(2.0, standardize=True),
    "selected": lambda: CE() + MaskedLoss([i % 3 > 0 for i in range(48)], LabelRevision(DKD())),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_trained_with_teachers_with_their_cache_and_resumed(name, tmp_path):
    """The same weights in the end, each time."""
    teachers = [Net(5), Net(6)]
    live = trainer(tmp_path / "live", Net(1), OBJECTIVES[name](), hf={"teachers": teachers})
    start = state(live.model)
    live.train()
    trained = state(live.model)
    moved = difference(trained, start)
    assert moved > 1e-3
    cached = cache_teachers(view(), teachers, tmp_path / "cache", student=Net(1))
    saving = {"save_strategy": "steps", "save_steps": 7}
    second = trainer(tmp_path / "run", Net(1), OBJECTIVES[name](), cached, **saving)
    second.train()
    end = state(second.model)
    # Batches of another size round differently, on some processors more than on others.
    assert difference(end, {k: trained[k] for k in end}) < 1e-4 * moved
    again = trainer(tmp_path / "run", Net(1), OBJECTIVES[name](), cached, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    assert difference(state(again.model), end) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DKD(beta=-1.0), "beta=-1.0"),
        (lambda: DKD(alpha=math.nan), "alpha=nan"),
        (lambda: DKD(warmup=20), "warmup=20.*a share of the training"),
        (lambda: NKD(gamma=-1.0), "gamma=-1.0"),
        (lambda: DIST(eps=0.0), "eps=0.0.*0 / 0"),
        (lambda: DIST(temperature=0.0), "temperature=0.0"),
        (lambda: WTTM(gamma=0.0), "gamma=0.0"),
        (lambda: WTTM(gamma=1.5), "gamma=1.5"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
