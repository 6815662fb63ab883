"""RKD, SP and PKT: by hand, against loops, invariances, coinciding samples, masks, in training."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import Staged, difference, state, trainer

from kd_plugins import CE, PKT, RKD, SP, MaskedLoss

TERMS = [RKD, SP, PKT]
each_term = pytest.mark.parametrize("term", TERMS, ids=lambda t: t.__name__)


def maps(*channels, b=5, side=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, d, side, side, generator=g, dtype=torch.float64) for d in channels]


def call(loss, student, *teachers, **extra):
    """The loss of one map of the student and one of each teacher."""
    z = torch.zeros(len(student), 3, dtype=torch.float64)
    y = torch.zeros(len(student), dtype=torch.int64)
    return loss(z, y, features=[student], teacher_features=[[t] for t in teachers], **extra)


def vectors(rows):
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------ by hand


def test_rkd_by_hand():
    """Distances 1, 1 and 2 on a line, and 3, 4 and 5 in a right angle, with means 4/3 and 4."""
    line, right = vectors([[0.0], [1.0], [2.0]]), vectors([[0.0, 3.0], [0.0, 0.0], [4.0, 0.0]])
    squares = (0.75 - 0.75) ** 2 + (1.5 - 1.25) ** 2 + (0.75 - 1.0) ** 2
    value = call(RKD(distance=2.0, angle=0.0), line, right).item()
    assert value == pytest.approx(2 * 2 * (squares / 2) / 9, abs=1e-12)  # each pair twice, of 9
    # the cosines at the ends are 1 against 3/5 and 4/5, in the middle -1 against 0; twice of 27
    angles = [0.5 * 0.4**2, 0.5 * 1.0**2, 0.5 * 0.2**2]
    value = call(RKD(distance=0.0, angle=3.0), line, right).item()
    assert value == pytest.approx(3 * 2 * sum(angles) / 27, abs=1e-12)


def test_hubers_loss_is_linear_beyond_one():
    """The cosine -1 against 1 at the middle of three: 2 - 1/2, not 4/2."""
    line, turned = vectors([[-1.0], [0.0], [1.0]]), vectors([[1.0], [0.0], [2.0]])
    value = call(RKD(distance=0.0, angle=1.0), line, turned).item()
    # at the first 1 against -1, at the middle -1 against 1, at the last 1 against 1
    assert value == pytest.approx(2 * (1.5 + 1.5 + 0.0) / 27, abs=1e-12)


def test_sp_by_hand():
    """F Fᵀ = [[1, 1], [1, 2]], and the identity."""
    student, teacher = vectors([[1.0, 0.0], [1.0, 1.0]]), vectors([[5.0, 0.0], [0.0, 2.0]])
    rows = [[1 / math.sqrt(2)] * 2, [1 / math.sqrt(5), 2 / math.sqrt(5)]]
    squares = [
        [(a - b) ** 2 for a, b in zip(r, e, strict=True)]
        for r, e in zip(rows, [[1, 0], [0, 1]], strict=True)
    ]
    assert call(SP(), student, teacher).item() == pytest.approx(sum(map(sum, squares)) / 4)


def test_pkt_by_hand():
    """Cosines 0 and 1: (1, 1/2) / 1.5 of the student against (1, 1) / 2."""
    student, teacher = vectors([[3.0, 0.0], [0.0, 2.0]]), vectors([[1.0, 1.0], [2.0, 2.0]])
    row = 0.5 * math.log(0.5 * 1.5) + 0.5 * math.log(0.5 * 3)
    assert call(PKT(), student, teacher).item() == pytest.approx(row / 2, abs=1e-12)


# ---------------------------------------------------------------------- value and gradient by loops


def norm(v):
    return math.sqrt(sum(x * x for x in v))


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def minus(u, v):
    return [a - b for a, b in zip(u, v, strict=True)]


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def pooled(f):
    """Nested lists [B][D][h][w] -> [B][D]."""
    return [[sum(map(sum, rows)) / (len(rows) * len(rows[0])) for rows in m] for m in f]


def rkd(student, teacher):
    b = len(student)

    def distances(f):
        d = [[norm(minus(f[j], f[i])) for j in range(b)] for i in range(b)]
        mean = sum(map(sum, d)) / (b * (b - 1))
        return [[x / mean for x in row] for row in d]

    def cosine(f, i, j, k):
        u, v = minus(f[j], f[i]), minus(f[k], f[i])
        return dot(u, v) / (norm(u) * norm(v)) if i not in (j, k) else 0.0

    s, t = pooled(student), pooled(teacher)
    d_s, d_t = distances(s), distances(t)
    pairs = sum(huber(d_s[i][j] - d_t[i][j]) for i in range(b) for j in range(b))
    triples = sum(
        huber(cosine(s, i, j, k) - cosine(t, i, j, k))
        for i in range(b)
        for j in range(b)
        for k in range(b)
    )
    return 25 * pairs / b**2 + 50 * triples / b**3


def sp(student, teacher):
    def rows(f):
        flat = [[x for rows in m for row in rows for x in row] for m in f]
        a = [[dot(u, v) for v in flat] for u in flat]
        return [[x / norm(row) for x in row] for row in a]

    pairs = zip(rows(student), rows(teacher), strict=True)
    return sum(dot(minus(u, v), minus(u, v)) for u, v in pairs) / len(student) ** 2


def pkt(student, teacher):
    def near(f):
        k = [[0.5 + 0.5 * dot(u, v) / (norm(u) * norm(v)) for v in f] for u in f]
        return [[x / sum(row) for x in row] for row in k]

    total = 0.0
    for p, q in zip(near(pooled(student)), near(pooled(teacher)), strict=True):
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return total / len(student) ** 2


def slope(f, x, h=1e-5):
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        ends = []
        for step in (h, -h):
            moved = x.detach().clone()
            moved.view(-1)[i] += step
            ends.append(f(moved.tolist()))
        grad.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    return grad


@pytest.mark.parametrize(("term", "loops"), [(RKD, rkd), (SP, sp), (PKT, pkt)])
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_value_and_gradient_against_loops(term, loops, num_teachers):
    """A mean over teachers, whose maps have other channels and other sizes."""
    (student,) = maps(3)
    teachers = [maps(4, side=3, seed=1)[0], maps(2, side=1, seed=2)[0]][:num_teachers]

    def expected(f):
        return sum(loops(f, t.tolist()) for t in teachers) / num_teachers

    student.requires_grad_()
    loss = term()
    value = call(loss, student, *teachers)
    value.backward()
    assert value.item() == pytest.approx(expected(student.tolist()), rel=1e-10)
    torch.testing.assert_close(student.grad, slope(expected, student), atol=1e-7, rtol=1e-5)
    for k, teacher in enumerate(teachers):
        assert loss.stats[f"teacher_{k}"].item() == pytest.approx(
            call(term(), student, teacher).item()
        )


@each_term
def test_gradcheck(term):
    (student,), (teacher,) = maps(3, b=4), maps(4, b=4, seed=1)
    assert torch.autograd.gradcheck(lambda f: call(term(), f, teacher), student.requires_grad_())


# ------------------------------------------------------------------------------------------- limits


@each_term
def test_a_network_with_itself_is_zero(term):
    (f,) = maps(3)
    value = call(term(), f.requires_grad_(), f.detach())
    assert value.item() == 0.0
    assert torch.autograd.grad(value, f)[0].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("term", "changes"),
    [
        (RKD, ["scaled", "turned", "shifted"]),
        (SP, ["scaled", "turned"]),
        (PKT, ["scaled", "turned"]),
    ],
)
def test_what_changes_nothing(term, changes):
    """A student that is the teacher but for scale and rotation pays nothing; for RKD also a
    shift."""
    f = vectors(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).tolist())
    turn = torch.linalg.qr(vectors(torch.randn(4, 4, generator=torch.manual_seed(4)).tolist()))[0]
    changed = {"scaled": 7 * f, "turned": f @ turn, "shifted": f + 3}
    for name, student in changed.items():
        zero = abs(call(term(), student, f).item()) < 1e-12
        assert zero is (name in changes), name
    assert call(term(), f.relu(), f) > 1e-4


def test_vectors_are_maps_of_one_position():
    f, t = (vectors(torch.randn(5, 4, generator=torch.manual_seed(k)).tolist()) for k in (0, 1))
    for term in TERMS:
        assert call(term(), f, t) == call(term(), f[..., None, None], t[..., None, None])


def test_sp_pools_nothing():
    """RKD and PKT see means over positions only; SP the whole map."""
    f, t = maps(3)[0], maps(4, seed=1)[0]
    same = f.mean((2, 3), keepdim=True).expand_as(f).contiguous()
    for term in TERMS:
        value, flat = call(term(), f, t), call(term(), same, t)
        assert torch.allclose(value, flat) is (term is not SP)


@each_term
def test_the_layer(term):
    a, b = maps(3, 2), maps(4, 5, seed=1)
    z, y = torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    for layer in (-1, -2):
        loss = term(layer=layer)
        assert loss.layers == (layer,)
        value = loss(z, y, features=a, teacher_features=[b])
        assert value == call(term(), a[layer], b[layer])


# -------------------------------------------------------------------------- what public code breaks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_term
def test_small_and_degenerate_batches(term, dtype):
    """One sample, equal samples, zero vectors, opposite ones: no NaN, no gradient of 1e9."""
    (teacher,) = maps(4, b=4, seed=1)
    f = torch.randn(4, 3, generator=torch.manual_seed(2), dtype=torch.float64)
    cases = {
        "one": (f[:1], teacher[:1]),
        "equal": (f[:1].expand(4, 3), teacher),
        "two equal": (f[[0, 0, 1, 2]], teacher),
        "zero": (torch.zeros(4, 3), teacher),
        "one zero": (f * torch.tensor([[0.0], [1], [1], [1]]), teacher),
        "opposite": (torch.cat([f[:2], -f[:2]]), teacher),
        "equal teacher": (f, teacher[:1].expand(4, 4, 2, 2)),
    }
    for name, (student, taught) in cases.items():
        student = student.to(dtype).clone().requires_grad_()
        value = call(term(), student, taught.to(dtype))
        (grad,) = torch.autograd.grad(value, student)
        assert value.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e4, name
        if name == "one":
            assert value.item() == 0.0 and not grad.any()
        if name == "zero":
            assert not grad.any()


def test_rkd_of_two_is_zero():
    f, t = maps(3, b=2)[0], maps(4, b=2, seed=1)[0]
    assert call(RKD(), f, t).item() == pytest.approx(0.0, abs=1e-15)


def test_rkd_far_from_the_origin():
    """Float32 at an offset of 1,000: |a|² + |b|² - 2ab would be wrong by per cents."""
    f, t = maps(8, side=1)[0], maps(8, side=1, seed=1)[0]
    far = (f + 1000).float().requires_grad_()
    expected = call(RKD(), far.detach().double(), t)
    torch.testing.assert_close(call(RKD(), far, t.float()).double(), expected, rtol=1e-4, atol=0)
    flat = far.detach().flatten(1)
    naive = (flat**2).sum(1)[:, None] + (flat**2).sum(1) - 2 * flat @ flat.T
    assert (
        naive.clamp_min(0).sqrt() - torch.cdist(flat.double(), flat.double())
    ).abs().max() > 0.01


def test_pkt_is_the_authors_value():
    """The batch mean of torch's KL divided by B, with their 1e-7 in norms and logarithms."""
    f, t = (pooled_of(maps(d, b=8, seed=k)[0]) for k, d in enumerate((3, 4)))

    def near(x):
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        k = (x @ x.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    p, q = near(f), near(t)
    theirs = (q * ((q + 1e-7) / (p + 1e-7)).log()).mean()
    assert call(PKT(), f, t).item() == pytest.approx(theirs.item(), rel=1e-4)
    batchmean = F.kl_div(p.log(), q, reduction="batchmean")
    assert call(PKT(), f, t).item() == pytest.approx(batchmean.item() / 8, rel=1e-4)


def pooled_of(f):
    return f.mean((2, 3))


# -------------------------------------------------------------------------------- batches and masks


@each_term
def test_halves_of_a_batch_are_not_the_batch(term):
    """Two processes, or two accumulation steps, compare within their own halves."""
    f, t = maps(3, b=8)[0], maps(4, b=8, seed=1)[0]
    halves = [call(term(), f[k], t[k]) for k in (slice(4), slice(4, 8))]
    assert not torch.allclose(sum(halves) / 2, call(term(), f, t), rtol=0.02)


@each_term
def test_a_mask_chooses_whose_relations_are_taught(term):
    """Row i of a kept sample, against the whole batch. A dropped sample is still compared with."""
    f, t = maps(3, b=6)[0].requires_grad_(), maps(4, b=6, seed=1)[0]
    mask = [True, False, True, True, False, False]
    each = call(term(reduction="none"), f, t)
    value = call(MaskedLoss(mask, term()), f, t, index=torch.arange(6))
    torch.testing.assert_close(value, each[[0, 2, 3]].sum() / 6)
    (grad,) = torch.autograd.grad(value, f)
    assert (grad[[1, 4, 5]].abs().amax((1, 2, 3)) > 0).all()
    nothing = call(MaskedLoss([False] * 6, term()), f, t, index=torch.arange(6))
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, f)[0].any()


# -------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("layer", [-1, -2])
def test_trained_and_resumed(layer, tmp_path):
    """All three at once, with two teachers of other widths: the same weights from a checkpoint
    on."""
    teachers = [Staged((3, 4, 5), seed=5), Staged((2, 2, 4), seed=6)]

    def run(**saving):
        loss = CE() + RKD(layer=layer) + 3000 * SP(layer=layer) + 3000 * PKT(layer=layer)
        return trainer(
            tmp_path, Staged(seed=1), loss, hf={"teachers": teachers}, learning_rate=1e-4, **saving
        )

    first = run(save_strategy="steps", save_steps=7)
    start = state(first.model)
    first.train()
    assert difference(state(first.model), start) > 1e-4
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert difference(state(again.model), state(first.model)) == 0.0


@each_term
def test_refuses(term):
    f = maps(3)[0]
    with pytest.raises(ValueError, match=f"{term.__name__}: teacher_features is empty"):
        call(term(), f)
    for wrong in (f[:3], f[:, 0, 0, 0], f[:, :, 0]):
        with pytest.raises(ValueError, match=rf"{term.__name__}: expected a map \[5, D, h, w\]"):
            call(term(), f, wrong)
    for make in (lambda: RKD(distance=-1.0), lambda: RKD(angle=math.nan)):
        with pytest.raises(ValueError, match=r"distance=-1.0|angle=nan"):
            make()
