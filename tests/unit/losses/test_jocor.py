"""JoCoR: by hand, value and gradient against loops, its limits, what it shows of its selection."""

import math

import pytest
import torch
from helpers import reference as naive

from kd_plugins import CE, JoCoR


def peers(num_peers=2, b=6, c=4):
    g = torch.Generator().manual_seed(num_peers)
    zs = [2 * torch.randn(b, c, generator=g, dtype=torch.float64) for _ in range(num_peers)]
    return [z.requires_grad_() for z in zs], torch.arange(b) % c


def joint(rows, q, lam):
    """The joint loss of one sample from the logits of each peer."""
    ps = [naive.softmax(row) for row in rows]
    own = sum(naive.cross_entropy(q, p) for p in ps)
    apart = sum(naive.cross_entropy(p, r) - naive.entropy(p) for p in ps for r in ps)
    return (1 - lam) * own + lam * apart


def expected(zs, y, lam, k):
    """The mean over the k smallest; k = 0 is 0."""
    samples = zip(zip(*zs, strict=True), y, strict=True)
    each = sorted(joint(rows, naive.onehot(t, len(rows[0])), lam) for rows, t in samples)
    return sum(each[:k]) / max(k, 1)


def test_by_hand():
    """They agree on sample 0: 2 (1 - λ) ln 2. On sample 1, p = (1/5, 4/5) and (4/5, 1/5)."""
    loss = JoCoR(lambda_=0.25, forget=0.0, reduction="none")
    a = torch.tensor([[1.0, 1.0], [1.0, 4.0]]).log()
    b = torch.tensor([[2.0, 2.0], [4.0, 1.0]]).log()
    value = loss((a, b), torch.tensor([0, 1]))
    own, apart = math.log(25 / 4), 2 * (3 / 5) * math.log(4)
    assert value.tolist() == pytest.approx([1.5 * math.log(2), 0.75 * own + 0.25 * apart])


@pytest.mark.parametrize("num_peers", [2, 3])
@pytest.mark.parametrize(("progress", "k"), [(0.0, 6), (0.025, 4), (1.0, 3)])
def test_against_loops(num_peers, progress, k):
    """R(t) is 0, 1/4 and 1/2: int(0.75 · 6) = 4. The gradient runs through both of each pair."""
    zs, y = peers(num_peers)
    loss = JoCoR(lambda_=0.6, forget=0.5, num_peers=num_peers)
    loss.set_progress(progress)
    value = loss(zs, y)
    rows = [z.tolist() for z in zs]
    assert value.item() == pytest.approx(expected(rows, y.tolist(), 0.6, k))
    slope = naive.slope(lambda zs: expected(zs, y.tolist(), 0.6, k), rows)
    for grad, numbers in zip(torch.autograd.grad(value, zs), slope, strict=True):
        torch.testing.assert_close(grad, torch.tensor(numbers).double(), atol=1e-6, rtol=1e-5)


def test_without_agreement_and_forgetting_it_is_the_sum_of_cross_entropies():
    zs, y = peers()
    torch.testing.assert_close(JoCoR(lambda_=0.0, forget=0.0)(zs, y), sum(CE()(z, y) for z in zs))


def test_all_forgotten_is_zero_and_differentiable():
    zs, y = peers(b=1)
    value = JoCoR(forget=0.4, ramp=0)(zs, y)
    value.backward()
    assert value == 0 and zs[0].grad.abs().max() == 0


def test_both_learn_from_one_selection():
    zs, y = peers()
    loss = JoCoR(forget=0.5, ramp=0)
    loss(zs, y)
    (first, target), (second, _) = loss.selection
    assert torch.equal(first, second) and first.sum() == 3 and target.argmax(-1).equal(y)
    assert loss.stats["selected_a"] == loss.stats["selected_b"] == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"lambda_": 1.5}, r"lambda_=1\.5"), ({"num_peers": 1}, "num_peers=1.*nobody to agree")],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        JoCoR(**kwargs)
