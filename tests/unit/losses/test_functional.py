"""Primitives: numbers done by hand, a second derivation in Python, and the edges where 0 log 0
stands."""

import math

import pytest
import torch
from helpers import reference as naive
from hypothesis import given
from hypothesis import strategies as st

from kd_plugins.losses import functional as F

P = [[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]  # two samples, three classes
LN2, LN5, LN10 = math.log(2), math.log(5), math.log(10)


def log64(rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_as_probs_of_indices_and_of_distributions():
    expected = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    for dtype in (torch.int32, torch.int64, torch.uint8):
        assert torch.equal(F.as_probs(torch.tensor([2, 0], dtype=dtype), 3), expected)
    assert F.as_probs(torch.tensor([2]), 3, torch.float64).dtype == torch.float64
    soft = torch.tensor(P, dtype=torch.float64)
    assert torch.equal(F.as_probs(soft, 3), soft.float())
    assert torch.equal(F.as_probs(torch.tensor([[0, 1]]), 2), torch.tensor([[0.0, 1.0]]))


def test_entropy_by_hand():
    # 0.5 ln 2 + 2 * 0.25 ln 4 = 1.5 ln 2      0.8 ln(5/4) + 0.2 ln 10
    expected = [1.5 * LN2, 0.8 * (LN5 - 2 * LN2) + 0.2 * LN10]
    assert F.entropy(log64(P)).tolist() == pytest.approx(expected, abs=1e-14)
    assert F.Prediction(log64(P)).entropy.tolist() == pytest.approx(expected, abs=1e-14)


def test_cross_entropy_by_hand():
    q = torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.75, 0.0]], dtype=torch.float64)
    # 2 * 0.5 ln 4                             0.25 ln(5/4) + 0.75 ln 10
    assert F.cross_entropy(log64(P), q).tolist() == pytest.approx(
        [2 * LN2, 0.25 * (LN5 - 2 * LN2) + 0.75 * LN10]
    )


def test_kl_by_hand_and_in_its_direction():
    # KL(P0 || P1) = 0.5 ln(5/8) + 0.5 ln(5/2);  KL(P1 || P0) = 0.8 ln(8/5) + 0.2 ln(2/5)
    a, b = log64(P)
    assert F.kl(a, b).item() == pytest.approx(0.5 * (LN5 - 3 * LN2) + 0.5 * (LN5 - LN2))
    assert F.kl(b, a).item() == pytest.approx(0.8 * (3 * LN2 - LN5) + 0.2 * (LN2 - LN5))
    assert F.kl(a, a).item() == 0.0


def test_a_class_at_probability_zero():
    """0 log 0 = 0, in value and in gradient; mass on an impossible class costs infinity and does
    not cost NaN."""
    z = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf]], requires_grad=True)
    log_p = torch.log_softmax(z, -1)
    assert (
        F.entropy(log_p).tolist()
        == F.Prediction(log_p).entropy.tolist()
        == pytest.approx([LN2, 0.0])
    )
    assert F.cross_entropy(
        log_p, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    ).tolist() == pytest.approx([LN2, 0])
    assert F.cross_entropy(log_p, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])).tolist() == [
        math.inf,
        0.0,
    ]
    uniform = torch.full((2, 3), 1 / 3).log()
    assert F.kl(log_p, uniform).tolist() == pytest.approx([math.log(1.5), math.log(3)])


def test_entropy_is_never_negative_and_never_above_ln_c():
    certain, uniform = torch.tensor([[1e4, 0.0, 0.0]]), torch.zeros(1, 3)
    for z in (certain, uniform, torch.randn(1000, 3) * 30):
        h = F.entropy(torch.log_softmax(z, -1))
        assert (h >= 0).all() and (h <= math.log(3) + 1e-6).all()
    assert F.entropy(torch.log_softmax(certain, -1)).item() == 0.0


@pytest.mark.parametrize(
    ("p", "expected"), [([1 / 3] * 3, 0), ([1.0, 0, 0], 1), ([0.5, 0.5, 0], 1 - LN2 / math.log(3))]
)
def test_certainty(p, expected):
    assert F.certainty(F.entropy(log64([p])), 3).item() == pytest.approx(expected, abs=1e-12)


def test_certainty_stays_in_its_range():
    """Rounding may put H a little above ln C; a trust below 0 would push away from the
    prediction."""
    assert F.certainty(torch.tensor([math.log(3) + 1e-3, -1e-3]), 3).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("x", "b"), [(0.3, 10.0), (-0.5, 6.0), (0.5, 0.0), (0.5, -10.0)])
def test_logistic_of_a_number_and_of_a_tensor(x, b):
    expected = 1 / (1 + math.exp(-b * x))
    assert F.logistic(x, b) == pytest.approx(expected, rel=1e-12)
    assert F.logistic(torch.tensor(x, dtype=torch.float64), b).item() == pytest.approx(
        expected, rel=1e-12
    )


def test_logistic_does_not_overflow():
    assert (F.logistic(1.0, 1e6), F.logistic(-1.0, 1e6)) == (1.0, 0.0)


def test_a_prediction_computes_everything_once():
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    pred = F.Prediction.of(z)
    assert pred.p is pred.p and pred.entropy is pred.entropy
    assert pred.p.tolist() == [pytest.approx(naive.softmax(row)) for row in z.tolist()]
    assert pred.p.requires_grad and pred.entropy.requires_grad and pred.num_classes == 3
    const = pred.constant()
    assert not (const.log_p.requires_grad or const.p.requires_grad or const.entropy.requires_grad)
    assert torch.equal(const.p, pred.p)


logits = st.lists(st.floats(-50, 50), min_size=2, max_size=6)


@given(logits, st.randoms(use_true_random=False))
def test_against_loops(row, random):
    other = [z + random.uniform(-3, 3) for z in row]
    p, q = naive.softmax(row), naive.softmax(other)
    log_p, log_q = (
        torch.log_softmax(torch.tensor(z, dtype=torch.float64), -1) for z in (row, other)
    )
    assert F.entropy(log_p).item() == pytest.approx(naive.entropy(p), abs=1e-9)
    assert F.kl(log_p, log_q).item() == pytest.approx(
        naive.cross_entropy(p, q) - naive.entropy(p), abs=1e-9
    )
    assert F.cross_entropy(log_q, log_p.exp()).item() == pytest.approx(
        naive.cross_entropy(p, q), abs=1e-9
    )
    assert F.certainty(F.entropy(log_p), len(row)).item() == pytest.approx(naive.sure(p), abs=1e-9)
