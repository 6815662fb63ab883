"""CE against nn.CrossEntropyLoss in float64, value and gradient; class weights in mutual losses."""

import pytest
import torch
from torch import nn

from kd_plugins import CE, MKD, SMKD, LabelSmoothing, LowEntropy, Mutual, MyLC, SelectAll

B, C = 7, 5
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
weights = pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])


def logits(scale=3.0):
    return (scale * torch.randn(B, C, dtype=torch.float64)).requires_grad_()


def labels(kind):
    """Indices, their one-hot rows, or distributions with some zeros."""
    index = torch.tensor([0, 1, 2, 3, 4, 1, 1])
    if kind == "index":
        return index
    if kind == "one-hot":
        return nn.functional.one_hot(index, C).double()
    soft = torch.rand(B, C, dtype=torch.float64)
    soft[:, 1] = 0.0
    return soft / soft.sum(1, keepdim=True)


def same(ours, theirs, z):
    """Values, and the gradients of their sums."""
    torch.testing.assert_close(ours, theirs)
    values = (ours.sum(), theirs.sum())
    grads = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in values]
    torch.testing.assert_close(*grads)


@reductions
@smoothings
@weights
def test_indices(weight, smoothing, reduction):
    z, y = logits(), labels("index")
    how = {"reduction": reduction, "label_smoothing": smoothing}
    same(CE(weight=weight, **how)(z, y), nn.CrossEntropyLoss(weight, **how)(z, y), z)


@reductions
@smoothings
@pytest.mark.parametrize("kind", ["one-hot", "soft"])
def test_distributions(kind, smoothing, reduction):
    z, y = logits(), labels(kind)
    how = {"reduction": reduction, "label_smoothing": smoothing}
    same(CE(**how)(z, y), nn.CrossEntropyLoss(**how)(z, y), z)


@reductions
@smoothings
@pytest.mark.parametrize("kind", ["one-hot", "soft"])
def test_distributions_with_weights(kind, smoothing, reduction):
    """The same sums. The mean divides by the weights of the batch, as for indices, not by B."""
    z, y = logits(), labels(kind)
    how = {"reduction": reduction, "label_smoothing": smoothing}
    theirs = nn.CrossEntropyLoss(WEIGHT, **how)(z, y)
    if reduction == "mean":
        theirs = theirs * B / (y @ WEIGHT).sum()
    same(CE(weight=WEIGHT, **how)(z, y), theirs, z)


def test_extreme_logits_and_second_derivatives():
    z, y = logits(1e4), labels("index")
    same(CE()(z, y), nn.CrossEntropyLoss()(z, y), z)
    z = logits()
    hessians = []
    for loss in (CE(weight=WEIGHT), nn.CrossEntropyLoss(WEIGHT)):
        (grad,) = torch.autograd.grad(loss(z, y), z, create_graph=True)
        hessians.append(torch.autograd.grad(grad.square().sum(), z)[0])
    torch.testing.assert_close(*hessians)


def test_a_batch_without_weight_is_zero():
    """nn.CrossEntropyLoss divides 0 by 0 there."""
    z, y = logits(), torch.full((B,), 2)
    value = CE(weight=WEIGHT)(z, y)
    value.backward()
    assert value.item() == 0.0 and not z.grad.any()
    assert nn.CrossEntropyLoss(WEIGHT)(z, y).isnan()


# ------------------------------------------------------------------------- class weights of peers


def weighted(q, z):
    """-Σ_c w_c q_c log p_c, [B]."""
    return nn.CrossEntropyLoss(WEIGHT, reduction="none")(z, q)


@pytest.mark.parametrize("kind", ["index", "soft"])
@reductions
def test_mutual_all(kind, reduction):
    """Each peer's own label and its peer's, in which every class has its weight."""
    zs, y = [logits(), logits()], labels(kind)
    rows = labels("one-hot") if kind == "index" else y
    q = 0.7 * rows + 0.3 / C
    total = sum(weighted(q, z) for z in zs) + sum(weighted(q, z) for z in zs)
    if reduction != "none":
        total = total.sum()
    if reduction == "mean":
        total = total / (rows @ WEIGHT).sum()
    loss = Mutual(LabelSmoothing(0.3), SelectAll(), weight=WEIGHT, reduction=reduction)
    for z in zs:
        same(loss(zs, y), total, z)


def test_weights_given_to_either_are_the_same():
    zs, y = [logits(), logits()], labels("index")
    inner = Mutual(LabelSmoothing(0.3, weight=WEIGHT), SelectAll())
    outer = Mutual(LabelSmoothing(0.3), SelectAll(), weight=WEIGHT)
    assert torch.equal(inner(zs, y), outer(zs, y))
    with pytest.raises(ValueError, match="class weights are given twice"):
        SMKD(MyLC(weight=WEIGHT), weight=WEIGHT)


@pytest.mark.parametrize("make", [SMKD, MKD], ids=["smkd", "mkd"])
def test_equal_weights_change_nothing(make):
    zs, y = [logits(), logits()], labels("index")
    plain, even = make(), make(weight=[2.0] * C)
    for loss in (plain, even):
        loss.set_progress(0.6)
    same(even(zs, y), plain(zs, y), zs[0])


def test_smkd_by_loops():
    """MyLC with b1 = 0 trusts by half of the certainty; what is taught is a constant."""
    zs, y = [logits(), logits()], labels("index")
    loss = SMKD(MyLC(b1=0.0), eta=2.0, b2=0.0, weight=WEIGHT, reduction="sum")
    chi = LowEntropy(2.0, 0.0).threshold(C)
    ps = [z.detach().softmax(1) for z in zs]
    entropies = [-(p * p.log()).sum(1) for p in ps]
    certainties = [1 - h / torch.tensor(C).log() for h in entropies]
    eps = [0.5 * certainty[:, None] for certainty in certainties]
    q = [(1 - e) * labels("one-hot") + e * p for e, p in zip(eps, ps, strict=True)]
    expected = 0.0
    for k, j in ((0, 1), (1, 0)):
        taught = weighted(q[j], zs[k]) * (entropies[j] < chi)
        expected = expected + (weighted(q[k], zs[k]) + taught).sum()
    assert 0 < sum((h < chi).sum() for h in entropies) < 2 * B
    same(loss(zs, y), expected, zs[0])
