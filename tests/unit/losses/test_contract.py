"""What every registered loss must keep, with inputs built from what it reads: a new loss is covered once registered."""

import contextlib
import copy
import dataclasses
import inspect
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from kd_plugins import (
    CE,
    MKD,
    SMKD,
    BootSoft,
    LabelSmoothing,
    Loss,
    LowEntropy,
    Mutual,
    MyLC,
    Sum,
    create_loss,
    list_losses,
    register_loss,
)
from kd_plugins.losses import loss_class
from kd_plugins.losses import registry as registry_module
from kd_plugins.losses.state import KeepsPrecision, Progress

B, C, T, STUDENT_DIM, TEACHER_DIM = 8, 4, 2, 6, 5
ARGUMENTS = {  # required by constructors, by parameter name, for c classes
    "transition": lambda c: 0.8 * torch.eye(c) + 0.2 / c,
    "labels": lambda c: torch.randn(16, c).softmax(1),
    "heads": lambda c: [torch.nn.Linear(TEACHER_DIM, c) for _ in range(T)],
}
every = pytest.mark.parametrize("name", list_losses())


SIZES = {  # what bind fills in, for c classes
    "num_samples": lambda c: 16,
    "num_classes": lambda c: c,
    "feature_dims": lambda c: [[STUDENT_DIM]] * 2,
    "teacher_feature_dims": lambda c: [[TEACHER_DIM]] * T,
}


def required(cls):
    parameters = inspect.signature(cls).parameters.values()
    open_ = {"heads", *(p.name for p in parameters if p.default is p.empty)}
    return [p.name for p in parameters if p.name in open_ and p.kind != p.VAR_KEYWORD]


def make(name, classes=C, progress=0.7, **kwargs):
    torch.manual_seed(0)
    cls = loss_class(name)
    loss = create_loss(name, **{p: ARGUMENTS[p](classes) for p in required(cls)} | kwargs)
    loss.bind(**{size: known(classes) for size, known in SIZES.items()})
    if progress is not None:
        loss.set_progress(progress)
    return loss


@dataclasses.dataclass
class Batch:
    """Inputs of one call. ``loss(*batch)`` is ``batch(loss)``, which also fixes whatever a loss draws at random."""

    logits: list[Tensor]
    target: Tensor
    extra: dict

    def __call__(self, loss):
        torch.manual_seed(0)
        return loss(
            tuple(self.logits) if loss.num_peers > 1 else self.logits[0], self.target, **self.extra
        )

    def map(self, fn):
        """fn on every floating tensor; the results are new leaves that want a gradient where ours did."""

        def leaf(t):
            if not isinstance(t, Tensor) or not t.is_floating_point():
                return t
            return fn(t.detach()).clone().requires_grad_(t.requires_grad)

        return Batch(*(tree_map(leaf, getattr(self, f.name)) for f in dataclasses.fields(self)))

    def take(self, order):
        """The samples in this order."""
        extra = dict(self.extra)
        for k, v in extra.items():
            several = isinstance(v, list | tuple)
            extra[k] = (
                [f[order] for f in v] if several else v[:, order] if k == "teacher" else v[order]
            )
        return Batch(
            [z.detach()[order].requires_grad_() for z in self.logits], self.target[order], extra
        )

    def replace(self, **fields):
        return dataclasses.replace(self, **fields)


def batch_for(loss, b=B, classes=C, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    scale = torch.tensor([0.3, 1.0, 3.0, 6.0] * b, dtype=dtype)[
        :b, None
    ]  # unsure and sure rows: selectors see both
    extra = {
        "teacher": draw(T, b, classes) * 2,
        "features": draw(b, STUDENT_DIM, 3, 3),
        "teacher_features": tuple(draw(b, TEACHER_DIM, 3, 3) for _ in range(T)),
        "index": torch.arange(b).roll(1) + 3,
    }
    extra = {k: v for k, v in extra.items() if k in loss.required_inputs}
    peers = loss.num_peers
    if "features" in extra and loss.num_peers > 1:
        extra["features"] = tuple(draw(b, STUDENT_DIM, 3, 3).requires_grad_() for _ in range(peers))
    elif "features" in extra:
        extra["features"].requires_grad_()
    logits = [(draw(b, classes) * scale).requires_grad_() for _ in range(peers)]
    target = torch.arange(b).roll(3) % classes
    target[-1] = logits[0][
        -1
    ].argmax()  # a sure row that agrees with its label: what prunes or selects keeps something
    return Batch(logits, target, extra)


def pair(name, **kwargs):
    """The loss (its parameters too) and a batch in float64; its own buffers stay as they are."""
    loss = make(name, **kwargs).double()
    return loss, batch_for(loss, dtype=torch.float64)


def leaves(x):
    features = x.extra.get("features", ())
    return [*x.logits, *([features] if isinstance(features, Tensor) else features)]


# --------------------------------------------------------------------------------------------------- value and gradient


@every
def test_finite_scalar_with_a_gradient_for_every_input(name):
    loss = make(name)
    x = batch_for(loss)
    value = x(loss)
    assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    value.backward()
    for leaf in leaves(x)[
        0 if loss.num_peers > 1 or "features" not in x.extra else 1 :
    ]:  # a term on features may ignore the logits
        assert leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
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
    """Records what autograd takes as a constant (what ``detach`` and ``no_grad`` give), then repeats it."""

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
    """gradcheck in float64, with a fresh copy at each point and all that is detached held where it was."""
    loss, x = pair(name)
    value = x(copy.deepcopy(loss))
    grads = torch.autograd.grad(value, leaves(x), allow_unused=True)
    hold = HoldsConstants()
    with hold:
        assert x(copy.deepcopy(loss)) == value

    def at(leaf, i, step):
        with torch.no_grad():
            leaf.view(-1)[i] += step
        with hold.again():
            moved = x(copy.deepcopy(loss)).item()
        with torch.no_grad():
            leaf.view(-1)[i] -= step
        return moved

    h = 1e-6
    for leaf, grad in zip(leaves(x), grads, strict=True):
        some = range(0, leaf.numel(), max(1, leaf.numel() // 32))
        slope = torch.tensor(
            [(at(leaf, i, h) - at(leaf, i, -h)) / (2 * h) for i in some], dtype=torch.float64
        )
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(grad.reshape(-1)[list(some)], slope, atol=1e-7, rtol=1e-5)


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
@pytest.mark.filterwarnings(
    "ignore:DMI on a batch:UserWarning"
)  # of one sample: its determinant is zero, and it says so
@pytest.mark.parametrize("shape", [(B, C), (1, C), (B, 2), (1, 2)], ids=str)
def test_extremes_are_finite(name, shape):
    """Value, gradient and state, for students and teachers; twice, for the second step reads the first's state."""
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
    taught = [
        t for t in (x.extra.get("teacher"), *x.extra.get("teacher_features", ())) if t is not None
    ]
    soft = torch.nn.functional.one_hot(x.target, C).double()
    for t in (*taught, soft):
        t.requires_grad_()
    x.replace(target=soft.detach())(loss).backward()
    assert all(t.grad is None for t in taught)


@every
def test_inputs_are_left_as_they_were(name):
    loss, x = pair(name)
    before = x.map(torch.clone)
    x(loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(before), strict=True))
    assert torch.equal(x.target, before.target)


# --------------------------------------------------------------------------------------------------- state and progress


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


@every
@pytest.mark.parametrize("progress", [-0.01, 1.01, 50, math.nan])
def test_progress_is_a_share(name, progress):
    with pytest.raises(ValueError, match=f"progress={progress}"):
        make(name).set_progress(progress)


@every
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_own_buffers_keep_their_precision(name, cast):
    loss = make(name)
    ours = [m for m in loss.modules() if type(m).__module__.startswith("kd_plugins")]
    before = [b.dtype for m in ours for b in m.buffers(recurse=False)]
    getattr(loss, cast)()
    assert [b.dtype for m in ours for b in m.buffers(recurse=False)] == before
    assert all(isinstance(m, KeepsPrecision) for m in ours if list(m.buffers(recurse=False)))
    if not list(loss.parameters()):
        assert torch.equal(*(batch_for(loss)(x) for x in (loss, make(name))))


# ------------------------------------------------------------------------------------------------------ what is refused


@every
def test_typos_raise(name):
    kwargs = {p: ARGUMENTS[p](C) for p in required(loss_class(name))}
    for typo in ("epz", "redcution", "num_class"):
        with pytest.raises(TypeError, match=typo):
            create_loss(name, **kwargs, **{typo: 1})
    with pytest.raises(ValueError, match=r"reduction='men'.*'mean', 'sum', 'none'"):
        create_loss(name, **kwargs, reduction="men")


@every
def test_exactly_what_it_reads(name):
    loss, x = pair(name)
    with pytest.raises(TypeError, match=r"ignore \['nonsense'\]"):
        x.replace(extra=x.extra | {"nonsense": 1})(loss)
    for key in loss.required_inputs:
        for extra in ({k: v for k, v in x.extra.items() if k != key}, x.extra | {key: None}):
            with pytest.raises(TypeError, match=rf"missing \['{key}'\]"):
                x.replace(extra=extra)(loss)


@every
def test_shape_errors_name_the_shapes(name):
    loss, x = pair(name)
    for target, shapes in [
        (x.target[1:], ("[8]", "[8, 4]", "[7]")),
        (torch.zeros(8, 5), ("[8]", "[8, 4]", "[8, 5]")),
    ]:
        with pytest.raises(ValueError, match=".*".join(map(re.escape, shapes))):
            x.replace(target=target)(loss)
    with pytest.raises(ValueError, match=r"\[8, 4, 1\]"):
        x.replace(logits=[z.unsqueeze(-1) for z in x.logits])(loss)
    with pytest.raises(ValueError, match=r"C >= 2.*\[8, 1\]"):
        x.replace(logits=[z[:, :1] for z in x.logits])(loss)
    with pytest.raises(ValueError, match=r"num_classes=5.*\[8, 4\]"):
        loss.num_classes = 5
        x(loss)
    assert make(name, num_classes=C).num_classes == C
    loss.num_classes = C
    if "teacher" in x.extra:
        for wrong in (
            x.extra["teacher"][:, :1],
            x.extra["teacher"][:, :, :3],
        ):  # the first would broadcast in silence
            with pytest.raises(ValueError, match=re.escape(str(list(wrong.shape)))):
                x.replace(extra=x.extra | {"teacher": wrong})(loss)


@every
def test_one_network_or_several(name):
    loss, x = pair(name)
    y, z = x.target, x.logits[0]
    if loss.num_peers == 1:
        with pytest.raises(TypeError, match=r"\(\[8, 4\], \[8, 4\]\)"):
            loss((z, z), y, **x.extra)
        return
    for wrong in (z, (z,)):
        with pytest.raises(ValueError, match=r"at least two.*\[8, 4\]"):
            loss(wrong, y, **x.extra)
    with pytest.raises(ValueError, match=r"one shape.*\[8, 4\], \[8, 3\]"):
        loss((z, z[:, :3]), y, **x.extra)


@every
@pytest.mark.parametrize("label", [C, -1, -100, 255])
def test_a_label_outside_the_classes_is_named(name, label):
    loss, x = pair(name)
    target = x.target.clone()
    target[5] = label
    with pytest.raises(ValueError, match=rf"label {label} at position 5.* 4 classes"):
        x.replace(target=target)(loss)


@every
def test_types_and_empty_batches(name):
    loss, x = pair(name)
    for k in range(len(x.logits)):
        with pytest.raises(TypeError, match="int64"):
            x.replace(logits=[z.long() if j == k else z for j, z in enumerate(x.logits)])(loss)
    with pytest.raises(TypeError, match="float32"):
        x.replace(target=x.target.float())(loss)
    empty = x.take(torch.arange(0))
    with pytest.raises(ValueError, match=r"empty.*\[0, 4\]"):
        empty(loss)


@every
@pytest.mark.parametrize("soft", [False, True])
def test_nan_is_refused_and_not_remembered(name, soft):
    """On the CPU; one such batch must not stay in a running mean for the rest of training."""
    loss, x = pair(name)
    if soft:
        x = x.replace(target=torch.rand(B, C, dtype=torch.float64).softmax(-1))
    x(loss)
    for k in range(len(x.logits)):
        logits = [z.detach().clone() for z in x.logits]
        logits[k][2, 1] = math.nan
        if "features" in loss.required_inputs:
            x.extra["features"] = tree_map(
                lambda f: f.detach().index_fill(0, torch.tensor(2), math.nan), x.extra["features"]
            )
        with pytest.raises(ValueError, match="NaN"):
            x.replace(logits=logits)(loss)
    assert all(t.isfinite().all() for t in loss.state_dict().values() if t.is_floating_point())


@every
def test_nan_in_a_distribution_is_refused(name):
    loss, x = pair(name)
    target = torch.rand(B, C, dtype=torch.float64).softmax(-1)
    if x.replace(target=target)(pair(name)[0]) == x(pair(name)[0]):
        return  # a loss that never looks at the target
    target[1, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        x.replace(target=target)(loss)


# ---------------------------------------------------------------------------------------------- compilation and devices


@every
def test_compiles_whole_and_once_for_all_of_training(name):
    """One graph over a schedule of 11 steps: values, gradients and state as in eager mode."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, inner = make(name), make(name)
    compiled = torch.compile(inner, fullgraph=True, backend=counter)
    scheduled = any(isinstance(m, Progress) for m in eager.modules())
    for step in range(11 if scheduled else 3):
        x = batch_for(eager)
        x.logits = [(z.detach() * (1 + step / 4)).requires_grad_() for z in x.logits]
        results = []
        for loss, call in ((eager, eager), (inner, compiled)):
            loss.set_progress(step / 10)
            value = x(call)
            grads = torch.autograd.grad(value, leaves(x), allow_unused=True)
            results.append((value, [g for g in grads if g is not None]))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1
    torch.testing.assert_close(inner.state_dict(), eager.state_dict())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "build",
    [
        lambda: 0.5 * MyLC() + create_loss("proselflc") + CE(),
        lambda: 0.5 * MKD() + SMKD(MyLC()),
        lambda: Mutual(0.5 * MyLC() + CE(), LowEntropy()),
        lambda: SMKD(MyLC(detach=False), num_peers=3, normalize="batch"),
    ],
)
def test_what_is_put_together_compiles_once(build):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    inner, eager = build(), build()
    compiled = torch.compile(inner, fullgraph=True, backend=counter)
    for step in range(4):
        x = batch_for(eager)
        inner.set_progress(step / 3), eager.set_progress(step / 3)
        torch.testing.assert_close(x(compiled), x(eager))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_inductor_compiles_smkd_with_mylc():
    torch._dynamo.reset()
    eager, inner = SMKD(MyLC(window=32), b2=-6), SMKD(MyLC(window=32), b2=-6)
    compiled = torch.compile(inner, fullgraph=True)
    for progress in (0.1, 0.9):
        x = batch_for(eager)
        for loss in (eager, inner):
            loss.set_progress(progress)
        ours, theirs = compiled(x.logits, x.target), eager(x.logits, x.target)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(v, x.logits) for v in (ours, theirs)))
    torch.testing.assert_close(inner.state_dict(), eager.state_dict())
    torch._dynamo.reset()


class NoTransfer(TorchDispatchMode):
    """Refuses a copy between devices; what waits for a value on the host is refused by FakeTensorMode itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            constant = source.device.type == "cpu" and source.dim() == 0
            assert source.device == result.device or constant, f"{source.device} -> {result.device}"
        assert name != "_linalg_check_errors" and not (kwargs or {}).get("check_errors"), (
            f"{name} waits for the device"
        )
        return result


@contextlib.contextmanager
def on_a_fake_accelerator(loss):
    """The loss and all new tensors on a 'cuda' device that computes shapes only, and so cannot answer with a number."""
    with FakeTensorMode(), NoTransfer():
        for module in loss.modules():
            for table in (module._buffers, module._parameters):
                for key, t in table.items():
                    if t is not None:
                        fake = torch.empty(t.shape, dtype=t.dtype, device="cuda:0")
                        table[key] = (
                            torch.nn.Parameter(fake) if table is module._parameters else fake
                        )
        yield lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda:0").requires_grad_(
            t.requires_grad
        )


@every
def test_never_waits_for_the_device(name):
    """No ``.item()``, ``nonzero()``, boolean index, branch on a tensor, copy to the host; seen without a GPU."""
    for soft in (False, True):
        loss = make(name)
        x = batch_for(loss)
        if soft:
            x.target = torch.nn.functional.one_hot(x.target, C).float()
        with on_a_fake_accelerator(loss) as move:
            x = Batch(
                *(tree_map(lambda t: move(t), getattr(x, f)) for f in ("logits", "target", "extra"))
            )
            loss.set_progress(0.5)
            value = loss(
                tuple(x.logits) if loss.num_peers > 1 else x.logits[0], x.target, **x.extra
            )
            assert value.device.type == "cuda" and value.shape == () and value.requires_grad


@pytest.mark.parametrize(
    "waits",
    [
        lambda z: z if z.sum() > 0 else -z,
        lambda z: z * z.sum().item(),
        lambda z: z[z > 0],
        lambda z: (z > 0).nonzero(),
        lambda z: z.detach().cpu(),
        lambda z: z.sum().detach().to("cpu"),
        lambda z: z + torch.arange(3.0).to(z.device),
        lambda z: torch.linalg.inv(z[:2, :2]),
    ],
)
def test_the_fake_accelerator_sees_who_waits(waits):
    class Waits(Loss):
        def per_sample(self, logits, target):
            return (waits if waiting else torch.relu)(logits)

    loss = Waits(reduction="none")
    with on_a_fake_accelerator(loss) as move:
        z, y = move(torch.randn(4, 3)), move(torch.zeros(4, dtype=torch.long))
        waiting = False
        assert loss(z, y).device.type == "cuda"
        waiting = True
        with pytest.raises((RuntimeError, AssertionError)):
            loss(z, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every
def test_never_waits_for_a_real_device(name):
    expected, x = pair(name)
    loss = make(name).double().cuda()

    def move(t):
        return t.detach().cuda().requires_grad_(t.requires_grad)

    on_gpu = Batch(*(tree_map(move, getattr(x, f)) for f in ("logits", "target", "extra")))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = on_gpu(loss)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if name != "crd":  # which draws its negatives on the device
        torch.testing.assert_close(value.cpu(), x(expected))


# ------------------------------------------------------------------------------------------- documentation and registry


@every
def test_docstring_says_where_it_comes_from(name):
    doc = inspect.cleandoc(loss_class(name).__doc__)
    assert "\nReferences:" in doc or "\nSource:" in doc


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


def test_a_name_is_taken_once(registry):
    class Other(Loss):
        def per_sample(self, logits, target):
            return logits.sum(-1)

    assert register_loss("mine")(Other) is Other and "mine" in list_losses("m*")
    assert isinstance(create_loss("mine", reduction="sum"), Other)
    register_loss("mine")(Other)  # a notebook cell that runs again
    with pytest.raises(ValueError, match="'ce' is taken by CE"):
        register_loss("ce")(Other)
    with pytest.raises(
        ValueError, match="'ce' is taken"
    ):  # a class of the same name is another class all the same
        register_loss("ce")(type("CE", (CE,), {"__qualname__": "CE"}))
    assert loss_class("ce") is CE


def test_names():
    assert list_losses("boot*") == ["boot_hard", "boot_soft"]
    assert list_losses() == sorted(list_losses()) and list_losses("no such*") == []
    assert repr(create_loss("label_smoothing", eps=0.2)) == "LabelSmoothing(eps=0.2)"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("smdk", "smkd"), ("label_smothing", "label_smoothing"), ("SMKD", "Known are:.*smkd")],
)
def test_an_unknown_name_suggests(typo, meant):
    with pytest.raises(ValueError, match=f"unknown loss '{typo}'.*{meant}"):
        create_loss(typo)


@pytest.mark.parametrize("keyword", ["epoch", "teachers", "idx"])
def test_a_loss_can_read_only_what_callers_supply(keyword):
    namespace = {}
    exec(f"def per_sample(self, logits, target, {keyword}): ...", namespace)
    with pytest.raises(TypeError, match=f"Odd.per_sample asks for .*{keyword}"):
        type("Odd", (Loss,), {"per_sample": namespace["per_sample"]})


def test_what_a_loss_reads_is_its_signature():
    class Both(Loss):
        def per_sample(self, logits, target, teacher, index):
            assert teacher.dim() == 3 and not teacher.requires_grad
            return (logits - teacher[0]).square().sum(-1) + index

    class Heir(Both):
        pass

    assert (
        Both.required_inputs == Heir.required_inputs == {"teacher", "index"}
        and Loss.required_inputs == CE.required_inputs == frozenset()
    )
    z, y, t, i = (
        torch.zeros(2, 3),
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, 3, requires_grad=True),
        torch.tensor([1, 2]),
    )
    assert Both()(z, y, teacher=t, index=i).item() == 3 + 1.5
    assert Both()(z, y, teacher=t[None], index=i).item() == 3 + 1.5
    for wrong in (
        {"teacher": t[:1]},
        {"teacher": t[:, :2]},
        {"index": i[:1]},
        {"index": i[:, None]},
    ):
        with pytest.raises(
            ValueError, match=re.escape(str(list(next(iter(wrong.values())).shape)))
        ):
            Both()(z, y, **{"teacher": t, "index": i} | wrong)


def test_what_a_loss_is_handed():
    """Full precision in any autocast, teachers as constants, the student's own features as they are."""

    class Reads(Loss):
        def per_sample(self, logits, target, teacher, features, teacher_features):
            (features,), taught = features, [f for (f,) in teacher_features]  # lists of maps
            assert {t.dtype for t in (logits, target, teacher, features, *taught)} == {
                torch.float32
            }
            assert not any(t.requires_grad for t in (teacher, *taught)) and features.requires_grad
            return (logits @ torch.eye(3) + teacher[0] + features + taught[1]).sum(-1)

    t = torch.full((2, 3), 1 + 2**-7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = Reads()(
            t * 1,
            torch.zeros(2, dtype=torch.long),
            teacher=t * 1,
            features=t * 1,
            teacher_features=(t, t * 1),
        )
    assert value.dtype == torch.float32 and value.item() == 12 * (1 + 2**-7)
    value.backward()
    assert torch.equal(
        t.grad, torch.ones_like(t)
    )  # logits and features, half of the batch mean each


def test_autocast_does_not_reach_into_a_loss():
    class Transfers(Loss):
        def per_sample(self, logits, target):
            return (logits @ torch.full((3, 3), 1 / 3)).sum(-1)

    z, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Transfers()(z, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, Transfers()(z, y))


def test_importing_costs_no_more_than_torch():
    code = "import sys, kd_plugins; print(*sorted({'transformers', 'datasets', 'timm', 'evaluate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# ----------------------------------------------------------------------------------------------------------------- sums


def inputs():
    return torch.randn(6, C), torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("weights", [(0.1, 0.9), (2, 3), (-1, 0.5)])
def test_a_sum_is_its_terms(weights):
    z, y = inputs()
    u, v = weights
    a, b = LabelSmoothing(eps=0.2), BootSoft(eps=0.3)
    total = u * a + v * b
    torch.testing.assert_close(total(z, y), u * a(z, y) + v * b(z, y))
    torch.testing.assert_close((a + b)(z, y), a(z, y) + b(z, y))
    assert total.stats["labelsmoothing_0"].item() == pytest.approx(a(z, y).item())
    assert total.stats["bootsoft_1"].item() == pytest.approx(b(z, y).item())


def test_sums_flatten():
    nested = 2 * (0.5 * CE() + LabelSmoothing()) + BootSoft() + 3.0 * (4 * CE())
    assert isinstance(nested, Sum) and nested.weights == [1.0, 2.0, 1.0, 12.0]
    assert [type(t) for t in nested.terms] == [CE, LabelSmoothing, BootSoft, CE]


def test_a_sum_of_mutual_losses():
    x = batch_for(MKD())
    a, b = MKD(eps=0.2), SMKD(CE(), b2=0)
    total = 0.5 * a + 2 * b
    assert total.num_peers == 2
    torch.testing.assert_close(x(total), 0.5 * x(a) + 2 * x(b))


def test_a_sum_hands_each_term_what_it_reads_and_state_and_progress():
    class Matches(Loss):
        def per_sample(self, logits, target, teacher):
            return (logits - teacher[0]).square().sum(-1)

    z, y = inputs()
    t = torch.randn(6, C)
    total = 0.5 * CE() + 0.25 * Matches() + create_loss("proselflc") + MyLC()
    assert total.required_inputs == {"teacher"}
    total.set_progress(0.5)
    alone = create_loss("proselflc")
    alone.set_progress(0.5)
    expected = 0.5 * CE()(z, y) + 0.25 * Matches()(z, y, teacher=t) + alone(z, y) + MyLC()(z, y)
    torch.testing.assert_close(total(z, y, teacher=t), expected)
    assert total.state_dict()["terms.3.running.count"] == 6
    with pytest.raises(TypeError, match=r"missing.*teacher"):
        total(z, y)


def test_a_sum_keeps_what_its_terms_were_made_with():
    """A reduction or a number of classes given to a term must not be dropped in silence."""
    z, y = inputs()
    a, b = CE(reduction="sum"), LabelSmoothing(reduction="sum")
    torch.testing.assert_close((0.5 * a + b)(z, y), 0.5 * a(z, y) + b(z, y))
    with pytest.raises(ValueError, match="reduction"):
        CE(reduction="sum") + CE()
    with pytest.raises(ValueError, match="num_classes=7"):
        (CE() + CE(num_classes=7))(z, y)


@pytest.mark.parametrize(
    "build", [lambda: CE() + MKD(), lambda: 0.1 * SMKD() + 0.9 * (CE() + CE())]
)
def test_one_network_and_several_do_not_add(build):
    with pytest.raises(TypeError, match="cannot be added"):
        build()


@pytest.mark.parametrize(
    "build", [lambda: True * CE(), lambda: "2" * CE(), lambda: CE() + 1, lambda: [1] * CE()]
)
def test_weights_are_numbers(build):
    with pytest.raises(TypeError):
        build()
