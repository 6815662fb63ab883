"""MaskedLoss: values by hand, its state, and what it refuses."""

import math

import pytest
import torch
from helpers import contract
from helpers import reference as naive
from torch import nn

from kd_plugins import CE, DML, GCE, SMKD, BootSoft, Loss, MaskedLoss, MyLC


class Hint(Loss):
    """A term that reads features only."""

    def per_sample(self, logits, target, features, teacher_features):
        (student,), ((teacher,), *_) = features, teacher_features
        return (student.mean((1, 2, 3)) - teacher.mean((1, 2, 3))).square()


class Taught(Loss):
    """A term that reads the teachers' logits."""

    def per_sample(self, logits, target, teacher):
        return (logits.softmax(-1) - teacher.softmax(-1)).square().sum(-1).mean(0)


class Whole(Loss):
    def per_sample(self, logits, target):
        return logits.softmax(-1).mean(0).square().sum()


TERMS = {
    "ce": CE,
    "state": lambda: MyLC(window=32),
    "teacher": Taught,
    "features": Hint,
    "sum": lambda: 0.5 * GCE() + 2 * Taught(),
    "peers": DML,
}


@pytest.mark.parametrize("normalize", ["batch", "selected"])
@pytest.mark.parametrize("name", TERMS)
def test_a_mask_that_keeps_everything_is_the_term(name, normalize):
    loss, term = MaskedLoss([True] * 16, TERMS[name](), normalize=normalize), TERMS[name]()
    x = contract.batch_for(loss)
    alone = x.replace(extra={k: v for k, v in x.extra.items() if k in term.required_inputs})
    values = x(loss), alone(term)
    assert torch.equal(*values) and loss.stats["kept"] == 1.0
    grads = [torch.autograd.grad(value, contract.leaves(x), allow_unused=True) for value in values]
    torch.testing.assert_close(*([g for g in gs if g is not None] for gs in grads), rtol=0, atol=0)
    assert term.stats.items() <= loss.stats.items()


@pytest.mark.parametrize("normalize", ["batch", "selected"])
@pytest.mark.parametrize("name", TERMS)
def test_a_mask_that_keeps_nothing_is_a_zero_with_a_gradient(name, normalize):
    loss = MaskedLoss([False] * 16, TERMS[name](), normalize=normalize)
    x = contract.batch_for(loss)
    value = x(loss)
    value.backward()
    assert value.item() == 0.0 and loss.stats["kept"] == 0.0
    grads = [leaf.grad for leaf in contract.leaves(x) if leaf.grad is not None]
    assert grads and not any(g.any() for g in grads)


def test_the_term_by_hand():
    """Of rows 4, 0 and 2, rows 4 and 2 are kept: (ln 2 + ln 5) / 3 per batch, / 2 per kept row."""
    z = (
        torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]], dtype=torch.float64)
        .log()
        .requires_grad_()
    )
    y, index = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2])
    mask = torch.tensor([False, True, True, False, True])
    total = math.log(2) + math.log(5)
    for normalize, divisor in (("batch", 3), ("selected", 2)):
        loss = MaskedLoss(mask, CE(), normalize=normalize)
        assert loss(z, y, index=index).item() == pytest.approx(total / divisor, abs=1e-12)
        assert loss.stats["kept"].item() == pytest.approx(2 / 3)
        (grad,) = torch.autograd.grad(loss(z, y, index=index), z)
        rows = [[-0.5, 0.3, 0.2], [0.0, 0.0, 0.0], [0.2, -0.8, 0.6]]
        torch.testing.assert_close(
            grad, torch.tensor(rows, dtype=torch.float64) / divisor, rtol=0, atol=1e-12
        )
        none = MaskedLoss(
            mask, CE(reduction="none"), normalize=normalize
        )  # the term's reduction is not dropped
        assert none(z, y, index=index).tolist() == pytest.approx(
            [math.log(2) * 3 / divisor, 0.0, math.log(5) * 3 / divisor], abs=1e-12
        )
    assert MaskedLoss(mask, CE(reduction="none"), reduction="sum")(
        z, y, index=index
    ).item() == pytest.approx(total)


def test_the_objective_of_the_paper():
    """CE on all samples plus distillation on the kept ones, computed by hand."""
    loss = 0.7 * CE() + 2 * MaskedLoss(contract.MASK, Taught())
    x = contract.batch_for(loss, dtype=torch.float64)
    assert loss.required_inputs == {"teacher", "index"}
    z, t = x.logits[0], x.extra["teacher"]
    expected = 0.0
    for i, (row, y) in enumerate(zip(z.tolist(), x.target.tolist(), strict=True)):
        p = naive.softmax(row)
        expected -= 0.7 * math.log(p[y]) / len(z)
        if contract.MASK[x.extra["index"][i]]:
            for k in range(len(t)):
                q = naive.softmax(t[k, i].tolist())
                expected += (
                    2 * sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / len(t) / len(z)
                )
    assert x(loss).item() == pytest.approx(expected, abs=1e-12)
    kept = sum(contract.MASK[i] for i in x.extra["index"]) / len(z)
    assert loss.stats["maskedloss_1_kept"].item() == pytest.approx(kept) and 0 < kept < 1


def test_halves_of_a_batch_are_the_batch():
    """So for two processes or accumulation steps; not with normalize="selected"."""
    whole = {n: MaskedLoss(contract.MASK, GCE(), normalize=n) for n in ("batch", "selected")}
    x = contract.batch_for(whole["batch"], dtype=torch.float64)
    halves = x.take([0, 1, 2, 3]), x.take([4, 5, 6, 7])
    mean = {n: sum(half(loss) for half in halves) / 2 for n, loss in whole.items()}
    torch.testing.assert_close(mean["batch"], x(whole["batch"]))
    assert (mean["selected"] - x(whole["selected"])).abs() > 1e-3


def test_state_of_the_term_sees_the_whole_batch():
    """r and progress belong to the term and do not depend on the mask."""
    loss, term = MaskedLoss([False] * 16, MyLC(window=32)), MyLC(window=32)
    x = contract.batch_for(loss)
    x(loss), term(x.logits[0], x.target)
    assert loss.term.r == term.r and loss.term.r > 0
    loss.eval()
    x(loss)
    assert loss.term.r == term.r
    follows = MaskedLoss(contract.MASK, SMKD())
    follows.set_progress(0.5)
    assert contract.batch_for(follows)(follows).isfinite() and "threshold" in follows.stats


def test_the_mask_is_in_the_checkpoint():
    saved, fresh = MaskedLoss(contract.MASK, CE()), MaskedLoss([True] * 16, CE())
    fresh.load_state_dict(saved.state_dict())
    assert fresh.mask.rows.tolist() == contract.MASK and fresh.mask.rows.dtype == torch.bool
    x = contract.batch_for(saved)
    assert x(fresh) == x(saved) != x(MaskedLoss([True] * 16, CE()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        MaskedLoss([True] * 15, CE()).load_state_dict(saved.state_dict())


def test_the_caller_may_reuse_the_mask():
    mask = torch.tensor(contract.MASK)
    loss = MaskedLoss(mask, CE())
    mask.fill_(True)
    assert loss.mask.rows.tolist() == contract.MASK


def test_what_it_refuses():
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for index in ([0, 16], [-1, 0]):
        wrong = next(i for i in index if not 0 <= i < 16)
        with pytest.raises(
            ValueError, match=f"index {wrong} is outside the table of num_samples=16"
        ):
            MaskedLoss(contract.MASK, CE())(z, y, index=torch.tensor(index))
    with pytest.raises(TypeError, match="Whole is one number for the whole batch"):
        MaskedLoss(contract.MASK, Whole())(z, y, index=y)
    for mask in ([0, 3, 5], [1.0, 0.0], torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask: expected a boolean per training sample"):
            MaskedLoss(mask, CE())
    for term in (nn.CrossEntropyLoss(), CE):
        with pytest.raises(TypeError, match="term: expected a loss"):
            MaskedLoss(contract.MASK, term)
    with pytest.raises(ValueError, match="normalize='all'"):
        MaskedLoss(contract.MASK, CE(), normalize="all")
    with pytest.raises(ValueError, match="num_classes=4"):  # as the term was made
        MaskedLoss(contract.MASK, BootSoft(num_classes=4))(z, y, index=y)


def test_a_log_names_it_in_full():
    assert repr(MaskedLoss(contract.MASK, BootSoft(eps=0.3), normalize="selected")).startswith(
        "MaskedLoss(\n  normalize=selected"
    )
    assert "BootSoft(eps=0.3, detach=False)" in repr(MaskedLoss(contract.MASK, BootSoft(eps=0.3)))
