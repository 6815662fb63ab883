"""What every loss keeps of values, gradients and state, with inputs as the hosted module feeds
them."""

import contextlib
import copy
import inspect
import math
import pickle

import pytest
import torch
from helpers.contract import (
    B,
    C,
    batch_for,
    every,
    hosted,
    learns_from_logits,
    leaves,
    make,
    pair,
)
from helpers.networks import pixels
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kd_plugins import SMKD, list_losses
from kd_plugins.losses import loss_class
from kd_plugins.losses.state import KeepsPrecision, Progress


@every
def test_finite_scalar_with_a_gradient_for_every_input(name):
    loss = make(name)
    x = batch_for(loss)
    value = x(loss)
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    value.backward()
    groups = [[z] for z in x.logits] if learns_from_logits(make(name)) else []
    if maps := x.extra.get("features"):  # of which a loss may read some
        groups += maps if loss.num_peers > 1 else [maps]
    for group in groups:
        grads = [leaf.grad for leaf in group if leaf.grad is not None]
        assert grads and all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    for n, p in loss.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n


@every
def test_one_hot_target_is_index_target(name):
    (a, x), (b, _) = pair(name), pair(name)
    onehot = torch.nn.functional.one_hot(x.target, C)
    torch.testing.assert_close(x.replace(target=onehot.double())(b), x(a), rtol=0, atol=0)


@every
def test_order_of_samples_is_irrelevant(name):
    (a, x), (b, _) = pair(name), pair(name)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(x.take(order)(b), x(a))


@every
def test_a_constant_on_a_row_of_logits_changes_nothing(name):
    (a, x), (b, _) = pair(name), pair(name)
    shifted = x.replace(
        logits=[z + torch.linspace(-50, 50, B, dtype=z.dtype)[:, None] for z in x.logits]
    )
    if "teacher" in x.extra:
        shifted.extra = x.extra | {"teacher": x.extra["teacher"] + 7.0}
    torch.testing.assert_close(shifted(b), x(a))


class HoldsConstants(TorchFunctionMode):
    """Records what autograd takes as a constant (what ``detach`` and ``no_grad`` give), then
    repeats it."""

    def __init__(self):
        super().__init__()
        self.record, self.replay = [], None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or (
            torch.is_grad_enabled() and getattr(func, "__name__", "") != "detach"
        ):
            return result
        if self.replay is None:
            self.record.append(result.detach().clone())
            return result
        constant = next(self.replay)
        return result.copy_(constant) if args and result is args[0] else constant.clone()

    def again(self):
        self.replay = iter(self.record)
        return self


@every
def test_gradient_is_the_slope_of_the_value(name):
    """In float64, along random directions, with all that is detached held where it was."""
    loss, x = pair(name)
    value = x(copy.deepcopy(loss))
    grads = torch.autograd.grad(value, leaves(x), allow_unused=True)
    hold = HoldsConstants()
    with hold:
        assert x(copy.deepcopy(loss)) == value

    def at(leaf, step):
        with torch.no_grad():
            leaf += step
        with hold.again():
            moved = x(copy.deepcopy(loss)).item()
        with torch.no_grad():
            leaf -= step
        return moved

    h = 1e-6
    for leaf, grad in zip(leaves(x), grads, strict=True):
        grad = torch.zeros_like(leaf) if grad is None else grad
        for _ in range(3):
            way = torch.randn_like(leaf)
            slope = (at(leaf, h * way) - at(leaf, -h * way)) / (2 * h)
            assert (grad * way).sum().item() == pytest.approx(slope, abs=1e-7, rel=1e-5)


@every
def test_reductions_agree(name):
    values = {}
    for reduction in ("none", "mean", "sum"):
        loss, x = pair(name, reduction=reduction)
        values[reduction] = x(loss)
    none, mean, total = values["none"], values["mean"], values["sum"]
    assert mean.shape == total.shape == ()
    if none.dim() == 0:  # a loss on the whole batch
        assert none == mean == total
    else:
        assert none.shape == (B,)
        torch.testing.assert_close([none.mean(), none.sum()], [mean, total])


EXTREMES = {  # logits [B, C] -> logits [B, C]
    "x1e4": lambda z: z * 1e4,
    "uniform": torch.zeros_like,
    "certain": lambda z: torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype) * 1e4,
    "impossible": lambda z: (
        torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype) * -1e4
    ),
    "mixture": lambda z: (
        z * torch.tensor([0.0, 1e4, 1.0, -1e4] * z.shape[-2], dtype=z.dtype)[: z.shape[-2], None]
    ),
}


@every
@pytest.mark.filterwarnings("ignore:DMI on a batch:UserWarning")  # its determinant is zero
@pytest.mark.parametrize("shape", [(B, C), (1, 2)], ids=str)
def test_extremes_are_finite(name, shape):
    """Value, gradient and state, for students and teachers; twice, for the second step reads the
    first's state."""
    b, classes = shape
    for label, change in EXTREMES.items():
        loss = make(name, classes)
        x = batch_for(loss, b, classes)
        x.logits = [change(z.detach()).requires_grad_() for z in x.logits]
        if "teacher" in x.extra:
            x.extra["teacher"] = change(x.extra["teacher"])
        for _ in range(2):
            value = x(loss)
            value.backward()
        assert value.isfinite(), label
        assert all(z.grad is None or z.grad.isfinite().all() for z in leaves(x)), label
        assert all(
            t.isfinite().all() for t in loss.state_dict().values() if t.is_floating_point()
        ), label
        assert all(s.isfinite() for s in loss.stats.values()), label


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_the_same_numbers_in_float32(name, dtype):
    """Also inside autocast, whose log_softmax on the CPU would otherwise stay in bfloat16."""
    x = batch_for(make(name)).map(lambda t: t.to(dtype))
    full = x.map(lambda t: t.float())
    expected = full(make(name))
    assert expected.dtype == torch.float32
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            for inputs in (x, full):
                value = inputs(make(name))
                assert value.dtype == torch.float32 and torch.equal(value, expected)
    value.backward()
    x(make(name)).backward()
    for low, high in zip(leaves(x), leaves(full), strict=True):
        assert (low.grad is None) == (high.grad is None)
        if low.grad is not None:
            assert low.grad.dtype == dtype
            torch.testing.assert_close(low.grad, high.grad.to(dtype))


@every
def test_what_is_read_from_teachers_gets_no_gradient(name):
    loss, x = pair(name)
    taught = [t for key, t in x.extra.items() if key.startswith("teacher")]
    tree_map(Tensor.requires_grad_, taught)
    x(loss).backward()
    assert all(t.grad is None for t in tree_leaves(taught))


@every
def test_inputs_are_left_as_they_were(name):
    loss, x = pair(name)
    before = x.map(torch.clone)
    x(loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(before), strict=True))
    assert torch.equal(x.target, before.target)


@every
def test_eval_leaves_state_alone(name):
    loss, x = pair(name)
    x(loss)
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    value = x(loss)
    torch.testing.assert_close(loss.state_dict(), before, rtol=0, atol=0)
    assert x(loss) == value


@every
def test_checkpoint_pickle_and_copy_keep_the_results(name):
    """After two steps; the same state has to give the same third step, in training mode."""
    loss, x = pair(name)
    x(loss).backward()
    x(loss)
    fresh, _ = pair(name)
    fresh.load_state_dict(loss.state_dict())
    copies = [fresh, pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)]
    expected = x(loss)
    for other in copies:
        assert torch.equal(x(other), expected)
        torch.testing.assert_close(other.state_dict(), loss.state_dict(), rtol=0, atol=0)


@every
def test_stats_are_detached_scalars(name):
    loss, x = pair(name)
    x(loss)
    for key, value in loss.stats.items():
        assert value.dim() == 0 and not value.requires_grad, key


@every
def test_progress_is_demanded_where_it_is_read_and_is_not_in_the_checkpoint(name):
    loss, x = pair(name, progress=None)
    assert not any("progress" in key for key in loss.state_dict())
    if not any(isinstance(m, Progress) for m in loss.modules()):
        return
    with pytest.raises(RuntimeError, match="set_progress"):
        x(loss)
    loss.set_progress(0.0)
    start = x(loss)
    loss.set_progress(1.0)
    assert start.isfinite() and x(loss) != start


@pytest.mark.parametrize("progress", [-0.01, 1.01, 50, math.nan])
def test_progress_is_a_share(progress):
    with pytest.raises(ValueError, match=f"progress={progress}"):
        SMKD().set_progress(progress)


@every
def test_own_buffers_keep_their_precision(name):
    for cast in ("bfloat16", "half", "double"):
        loss = make(name)
        ours = [m for m in loss.modules() if type(m).__module__.startswith("kd_plugins")]
        before = [b.dtype for m in ours for b in m.buffers(recurse=False)]
        getattr(loss, cast)()
        assert [b.dtype for m in ours for b in m.buffers(recurse=False)] == before
        assert all(isinstance(m, KeepsPrecision) for m in ours if list(m.buffers(recurse=False)))
        if not list(loss.parameters()):
            assert torch.equal(*(batch_for(loss)(x) for x in (loss, make(name))))


# ---------------------------------------------------------------------------------------- training


@every
def test_it_takes_what_the_hosted_module_feeds(name):
    """The contract tests feed it too: as many tensors, in the same lists, with the same
    channels."""
    host, fed = hosted(name), []
    keep = host.criterion.register_forward_pre_hook
    keep(lambda _, args, kwargs: fed.append((list(args[0]), args[1], kwargs)), with_kwargs=True)
    host(pixels(B), labels=torch.arange(B) % C, index=torch.arange(B))
    ours = batch_for(host.criterion)
    logits = ours.logits if host.criterion.num_peers > 1 else list(ours.logits[0])
    expected = (logits, ours.target, ours.extra)
    assert tree_map(lambda t: t.shape[:2], fed[0]) == tree_map(lambda t: t.shape[:2], expected)


@every
def test_it_trains_in_the_hosted_module(name):
    """Three steps from pixels: every network and every parameter of the loss learns."""
    host = hosted(name)
    before = {key: p.detach().clone() for key, p in host.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(host.parameters(), lr=0.05)
    for step in range(3):
        host.criterion.set_progress(step / 3)
        value = host(pixels(B), labels=torch.arange(B) % C, index=torch.arange(B))["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        host.average()
    assert value.isfinite() and all(s.isfinite() for s in host.stats.values())
    whole = learns_from_logits(make(name))  # else what comes after the map does not learn
    for key, start in before.items():
        p = host.get_parameter(key)
        assert p.isfinite().all(), key
        if whole or key.startswith("criterion.") or ".stages.0." in key:
            assert not torch.equal(p, start), key


@pytest.mark.parametrize("name", list_losses())
def test_docstring_says_where_it_comes_from(name):
    assert "\nReferences:" in inspect.cleandoc(loss_class(name).__doc__)
