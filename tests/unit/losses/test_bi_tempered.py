"""Bi-tempered logistic loss: by hand, against bisection in Python, the published gradient,
limits."""

import math

import pytest
import torch
from helpers import reference as naive

from kd_plugins import CE, BiTempered
from kd_plugins.losses.bi_tempered import tempered_log_softmax

PAIRS = [(0.8, 1.2), (0.0, 4.0), (1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.9, 1.05)]
ROWS = [[0.3, -1.0, 0.5, 0.0], [5.0, 0.0, -20.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-3.0, 9.0, 2.0, 1.0]]
Q = [[1, 0, 0, 0], [0, 1, 0, 0], [0.2, 0.3, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]]


def log_t(x, t):
    return math.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)


def exp_t(x, t):
    return math.exp(x) if t == 1 else max(0.0, 1 + (1 - t) * x) ** (1 / (1 - t))


def probabilities(row, t):
    """g by bisection: Σ p falls from C or more at max z to at most 1 at max z - log_t(1/C)."""
    low, high = max(row), max(row) - log_t(1 / len(row), t)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(exp_t(z - middle, t) for z in row) > 1:
            low = middle
        else:
            high = middle
    return [exp_t(z - low, t) for z in row]


def loop(row, q, t1, t2):
    total = 0.0
    for a, p in zip(q, probabilities(row, t2), strict=True):
        total += a * (log_t(a, t1) - log_t(p, t1)) if a else 0.0
        total -= (a ** (2 - t1) - p ** (2 - t1)) / (2 - t1)
    return total


@pytest.mark.parametrize(
    ("t1", "expected"),  # p = 1/4 each, label 0
    [
        (0.5, 1 - (1 - 4 / 8) / 1.5),  # log_t1(1/4) = -1; p^1.5 = 1/8
        (0.0, 3 / 4 - (1 - 4 / 16) / 2),  # log_t1 x = x - 1; p² = 1/16
        (1.0, math.log(4)),
    ],
)
@pytest.mark.parametrize("t2", [1.0, 1.5, 4.0])
def test_by_hand(t1, t2, expected):
    """Equal logits are a uniform p at any t2."""
    value = BiTempered(t1, t2)(torch.full((1, 4), 7.0), torch.tensor([0]))
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("t1", "t2"), PAIRS)
def test_against_loops(t1, t2):
    """Value, and gradient by differences, for labels and distributions."""
    z = torch.tensor(ROWS, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(Q, dtype=torch.float64)
    loss = BiTempered(t1, t2, reduction="none")(z, q)
    assert loss.tolist() == pytest.approx(
        [loop(r, q, t1, t2) for r, q in zip(ROWS, Q, strict=True)]
    )

    def total(zs):
        return sum(loop(row, q, t1, t2) for row, q in zip(zs[0], Q, strict=True))

    (grad,) = torch.autograd.grad(loss.sum(), z)
    slope = torch.tensor(naive.slope(total, [ROWS])[0], dtype=torch.float64)
    torch.testing.assert_close(grad, slope, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("t1", "t2"), PAIRS)
def test_the_published_gradient(t1, t2):
    """(p - q) p^(t2-t1) - e/Σe Σ (p - q) p^(t2-t1) with e = p^t2."""
    z = torch.tensor(ROWS, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(Q, dtype=torch.float64)
    (grad,) = torch.autograd.grad(BiTempered(t1, t2, reduction="sum")(z, q), z)
    p = tempered_log_softmax(z.detach(), t2).exp()
    pull, escort = (p - q) * p ** (t2 - t1), p**t2
    share = escort / escort.sum(-1, keepdim=True)
    torch.testing.assert_close(grad, pull - share * pull.sum(-1, keepdim=True))


def test_it_is_cross_entropy_at_one_and_near_it():
    z = torch.tensor(ROWS, dtype=torch.float64)
    y = torch.tensor([0, 3, 1, 2])
    torch.testing.assert_close(BiTempered(1.0, 1.0)(z, y), CE()(z, y))
    torch.testing.assert_close(BiTempered(1 - 1e-7, 1 + 1e-7)(z, y), CE()(z, y), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t1", [0.0, 0.5, 0.8])
def test_it_is_bounded(t1):
    """The loss of a certain wrong prediction is 1 / (1 - t1)."""
    z = torch.tensor([[1e4, 0.0, 0.0]])
    value = BiTempered(t1, 1.0)(z, torch.tensor([2])).item()
    assert value == pytest.approx(1 / (1 - t1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1.0001, 1.05, 1.2, 2.0, 4.0])
def test_probabilities_sum_to_one(t, dtype):
    """The steps suffice for any number of classes and any logits."""
    for classes in (2, 100, 20_000):
        for scale in (0.0, 1.0, 30.0, 1e4):
            p = tempered_log_softmax(torch.randn(4, classes, dtype=dtype) * scale, t).exp()
            rounding = 20 * torch.finfo(dtype).eps
            torch.testing.assert_close(p.sum(-1), p.new_ones(4), atol=rounding, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"t1": 1.2}, r"t1=1\.2"), ({"t2": 0.9}, r"t2=0\.9.*p = 0 exactly")]
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BiTempered(**kwargs)
