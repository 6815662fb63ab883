"""Tf-KD: by hand, against loops in Python, against the authors' form, limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import reference as naive

from kd_plugins import CE, TfKDReg, TfKDSelf

P = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]
Y = [0, 2]
CE_BY_HAND = [math.log(2), math.log(10)]


def logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def batch(classes=4):
    z = (
        torch.randn(5, classes, dtype=torch.float64) * torch.tensor([[0.3], [1], [2], [4], [8]])
    ).requires_grad_()
    return z, torch.tensor([0, 3, 1, 2, 2])


# ------------------------------------------------------------------------------------------ by hand


def test_softmaxed_by_hand():
    """p_d = .8 on the label, .1 on the others; at T = .1 the teacher is softmax(8, 1, 1)."""
    e7 = math.exp(7)
    right, wrong = e7 / (e7 + 2), 1 / (e7 + 2)
    teachers = [[right, wrong, wrong], [wrong, wrong, right]]
    loss = TfKDReg(alpha=0.25, temperature=0.1, multiplier=3.0, correct=0.8, reduction="none")
    kls = [divergence(t, p) for t, p in zip(teachers, P, strict=True)]
    expected = [0.75 * ce + 0.25 * 3 * k for ce, k in zip(CE_BY_HAND, kls, strict=True)]
    assert loss(logits(P), torch.tensor(Y)).tolist() == pytest.approx(expected, abs=1e-12)
    assert loss.stats["kl"].item() == pytest.approx(sum(kls) / 2)


def test_direct_by_hand():
    """T = 2: square roots, normalised, of (.8, .1, .1) and of p."""
    roots = [math.sqrt(0.8), math.sqrt(0.1), math.sqrt(0.1)]
    teacher = [r / sum(roots) for r in roots]
    student = [math.sqrt(0.5), 0.5, 0.5]
    student = [s / sum(student) for s in student]
    loss = TfKDReg(alpha=0.25, temperature=2.0, correct=0.8, virtual="direct")
    expected = 0.75 * math.log(2) + 0.25 * divergence(teacher, student)
    assert loss(logits(P[:1]), torch.tensor([0])).item() == pytest.approx(expected, abs=1e-12)


def test_self_by_hand():
    """T = 2, teacher uniform: 4 KL(u ‖ square roots of p, normalised)."""
    student = [math.sqrt(0.5), 0.5, 0.5]
    student = [s / sum(student) for s in student]
    loss = TfKDSelf(alpha=0.25, temperature=2.0, multiplier=3.0)
    expected = 0.75 * math.log(2) + 0.25 * 3 * 4 * divergence([1 / 3] * 3, student)
    value = loss(logits(P[:1]), torch.tensor([0]), teacher=torch.zeros(1, 3, dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- value and gradient by loops


def virtual(q, correct, t, kind):
    c = len(q)
    p_d = [a * correct + (1 - a) * (1 - correct) / (c - 1) for a in q]
    return naive.softmax(
        [a / t for a in p_d] if kind == "softmaxed" else [math.log(a) / t for a in p_d]
    )


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "distributions"])
@pytest.mark.parametrize("kl_reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("kind", ["softmaxed", "direct", "self"])
def test_value_and_gradient_against_loops(kind, kl_reduction, soft):
    z, y = batch()
    y = torch.rand(5, 4, dtype=torch.float64).softmax(-1) if soft else y
    qs = y.tolist() if soft else [naive.onehot(k, 4) for k in y.tolist()]
    teacher = torch.randn(5, 4, dtype=torch.float64) * 3
    t, m, alpha, share = 3.0, 2.0, 0.6, 1 if kl_reduction == "batchmean" else 4

    def expected(zs):
        total = 0.0
        for row, q, master in zip(zs[0], qs, teacher.tolist(), strict=True):
            p, soft_p = naive.softmax(row), naive.softmax([a / t for a in row])
            if kind == "self":
                k = t * t * divergence(naive.softmax([a / t for a in master]), soft_p)
            else:
                k = divergence(virtual(q, 0.9, t, kind), p if kind == "softmaxed" else soft_p)
            total += ((1 - alpha) * naive.cross_entropy(q, p) + alpha * m * k / share) / 5
        return total

    how = {"alpha": alpha, "temperature": t, "multiplier": m, "kl_reduction": kl_reduction}
    own = kind == "self"
    value = (
        TfKDSelf(**how)(z, y, teacher=teacher)
        if own
        else TfKDReg(correct=0.9, virtual=kind, **how)(z, y)
    )
    value.backward()
    assert value.item() == pytest.approx(expected([z.tolist()]), abs=1e-10)
    torch.testing.assert_close(
        z.grad, torch.tensor(naive.slope(expected, [z.tolist()])[0]).double(), atol=1e-7, rtol=1e-5
    )


# ---------------------------------------------------------------------- as the authors' code has it


def test_the_published_setting_is_the_default():
    """ResNet-18 on CIFAR-100: alpha .1, T 20, multiplier 100 on a KL that is averaged over
    samples and 100 classes."""
    z, y = torch.randn(6, 100, dtype=torch.float64) * 3, torch.arange(6)
    p_d = torch.full((6, 100), 0.01 / 99, dtype=torch.float64)
    p_d[torch.arange(6), y] = 0.99
    with pytest.warns(UserWarning, match="batchmean"):  # torch's own warning of this very mean
        mean = F.kl_div(z.log_softmax(-1), (p_d / 20).softmax(-1), reduction="mean")
    expected = 0.9 * F.cross_entropy(z, y) + 0.1 * 100 * mean
    torch.testing.assert_close(TfKDReg()(z, y), expected)
    torch.testing.assert_close(TfKDReg(multiplier=100, kl_reduction="mean")(z, y), expected)
    assert (TfKDReg(multiplier=100)(z, y) - expected).abs() > 1  # batch mean with their multiplier


def test_the_softmaxed_teacher_is_nearly_uniform():
    """Softmax of probabilities over T = 20: the label has e^(.98 / 20) = 1.05 times the mass of
    another class."""
    z, y = torch.zeros(1, 10, dtype=torch.float64), torch.tensor([3])
    value = TfKDReg(alpha=1.0)(z, y).item()
    assert 0 < value < 1e-3
    p_d = [0.99 if k == 3 else 0.01 / 9 for k in range(10)]
    assert value == pytest.approx(
        divergence(naive.softmax([a / 20 for a in p_d]), [0.1] * 10), abs=1e-12
    )
    assert divergence(p_d, [0.1] * 10) > 2  # what p_d itself would give


def test_the_virtual_teacher_has_no_factor_and_no_student_temperature():
    z, y = batch()
    p_d = 0.99 * F.one_hot(y, 4) + 0.01 / 3 * (1 - F.one_hot(y, 4).double())
    teacher = (p_d / 20).softmax(-1)
    ours = TfKDReg(alpha=1.0)(z, y)
    torch.testing.assert_close(ours, F.kl_div(z.log_softmax(-1), teacher, reduction="batchmean"))
    for wrong in (400 * ours, F.kl_div((z / 20).log_softmax(-1), teacher, reduction="batchmean")):
        assert (wrong - ours).abs() > 0.1


def test_self_is_hintons_loss_with_a_batch_mean():
    z, y = batch()
    teacher = torch.randn(5, 4, dtype=torch.float64) * 4
    kl = F.kl_div((z / 20).log_softmax(-1), (teacher / 20).softmax(-1), reduction="batchmean")
    for how, factor in ((None, 1), ({"kl_reduction": "mean"}, 1 / 4)):
        ours = TfKDSelf(**(how or {}))(z, y, teacher=teacher)
        torch.testing.assert_close(ours, 0.1 * F.cross_entropy(z, y) + 0.9 * 400 * kl * factor)


# ------------------------------------------------------------------------------------------- limits


def test_direct_at_temperature_one_is_label_smoothing():
    """On the other classes only, eps/(C - 1), up to the constant entropy of p_d."""
    z, y = batch()
    p_d = 0.9 * F.one_hot(y, 4) + 0.1 / 3 * (1 - F.one_hot(y, 4).double())
    ours = TfKDReg(alpha=1.0, temperature=1.0, correct=0.9, virtual="direct")(z, y)
    smoothed = -(p_d * z.log_softmax(-1)).sum(-1).mean()
    assert smoothed.item() - ours.item() == pytest.approx(naive.entropy([0.9, *[0.1 / 3] * 3]))
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(smoothed, z))


def test_a_teacher_that_is_certain():
    """correct = 1 has ln 0 in it; at T = 1 it is cross-entropy."""
    z, y = batch()
    for virtual_teacher in ("softmaxed", "direct"):
        value = TfKDReg(alpha=0.5, correct=1.0, virtual=virtual_teacher)(z, y)
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()
    loss = TfKDReg(alpha=0.7, temperature=1.0, correct=1.0, virtual="direct")
    torch.testing.assert_close(loss(z, y), CE()(z, y))


def test_without_alpha_it_is_cross_entropy():
    z, y = batch()
    torch.testing.assert_close(TfKDReg(alpha=0.0)(z, y), CE()(z, y))
    torch.testing.assert_close(TfKDSelf(alpha=0.0)(z, y, teacher=torch.randn(5, 4)), CE()(z, y))


def test_a_teacher_that_agrees_teaches_nothing():
    z, y = batch()
    value = TfKDSelf(alpha=1.0)(z, y, teacher=z.detach() + 5)
    assert value.item() == pytest.approx(0.0, abs=1e-9)
    assert torch.autograd.grad(value, z)[0].abs().max() < 1e-9


def test_of_several_teachers_it_is_the_mean():
    z, y = batch()
    first, second = torch.randn(2, 5, 4, dtype=torch.float64) * 3
    loss = TfKDSelf(temperature=2.0)
    both = loss(z, y, teacher=torch.stack([first, second]))
    torch.testing.assert_close(both, (loss(z, y, teacher=first) + loss(z, y, teacher=second)) / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TfKDReg(alpha=1.5), "alpha=1.5"),
        (lambda: TfKDSelf(alpha=-0.5), "alpha=-0.5"),
        (lambda: TfKDReg(temperature=0.0), "temperature=0.0"),
        (lambda: TfKDSelf(temperature=math.nan), "temperature=nan"),
        (lambda: TfKDReg(correct=0.0), "correct=0.0"),
        (lambda: TfKDReg(correct=1.01), "correct=1.01"),
        (lambda: TfKDReg(virtual="soft"), "virtual='soft'.*'softmaxed', 'direct'"),
        (lambda: TfKDSelf(kl_reduction="sum"), "kl_reduction='sum'.*'batchmean', 'mean'"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
