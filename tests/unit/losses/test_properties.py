"""Any input a batch can be: a finite figure with finite gradients, or an error that says what is
wrong with it."""

import numpy as np
import pytest
import torch
from helpers.contract import batch_for, leaves, make
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_plugins import list_losses

DTYPES = {
    "float32": 1e4,
    "float64": 1e4,
    "bfloat16": 1e4,
    "float16": 3e4,
}  # and the largest logit tried in them
PATTERNS = ("random", "uniform", "certain", "one class for all", "two alike", "huge", "tiny")
TARGETS = ("index", "one-hot", "soft", "with zeros", "uniform")


@st.composite
def inputs(draw):
    """Batch size, classes, dtype, what the logits of each peer look like, what the target is,
    progress, mode, a seed."""
    pattern = st.sampled_from(PATTERNS)
    return {
        "b": draw(st.integers(1, 12)),
        "classes": draw(st.integers(2, 30)),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "patterns": [draw(pattern), draw(pattern)],
        "target": draw(st.sampled_from(TARGETS)),
        "progress": draw(st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0.0, 1.0)),
        "train": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def logits_like(pattern, shape, largest, generator):
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    if pattern == "uniform":
        z = torch.zeros(shape) + z[:, :1]
    elif pattern == "certain":
        z = largest * torch.nn.functional.one_hot(z.argmax(-1), shape[-1])
    elif pattern == "one class for all":
        z = torch.zeros(shape)
        z[:, 0] = largest
    elif pattern == "two alike":
        z = z - 50.0
        z[:, :2] = 50.0
    return z * {"huge": largest / 6, "tiny": 1e-30}.get(pattern, 1.0)


def targets_like(kind, b, classes, generator):
    index = torch.randint(classes, (b,), generator=generator)
    soft = torch.rand(b, classes, generator=generator)
    if kind == "with zeros":
        soft = soft * (torch.rand(b, classes, generator=generator) < 0.5)
        soft[range(b), index] += 0.1
    soft = torch.full_like(soft, 1.0) if kind == "uniform" else soft
    onehot = torch.nn.functional.one_hot(index, classes).float()
    return {"index": index, "one-hot": onehot}.get(kind, soft / soft.sum(-1, keepdim=True))


@pytest.mark.filterwarnings(
    "ignore:DMI on a batch:UserWarning"
)  # smaller than the classes: its determinant is zero
@pytest.mark.parametrize("name", list_losses())
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(case=inputs())
def test_any_batch_gives_finite_figures(name, case):
    """Twelve of them for each loss, twice each: the second call reads the first's state."""
    b, classes, dtype = case["b"], case["classes"], getattr(torch, case["dtype"])
    generator = torch.Generator().manual_seed(case["seed"])
    loss = make(name, classes, progress=case["progress"])
    loss.train(case["train"])
    x = batch_for(loss, b, classes)
    largest = DTYPES[case["dtype"]]
    patterns = (case["patterns"] * len(x.logits))[: len(x.logits)]
    x.logits = [
        logits_like(p, (b, classes), largest, generator).to(dtype).requires_grad_()
        for p in patterns
    ]
    if "teacher" in x.extra:
        drawn = [logits_like(p, (b, classes), largest, generator) for p in case["patterns"]]
        x.extra["teacher"] = torch.stack(drawn).to(dtype)
    x.target = targets_like(case["target"], b, classes, generator)
    for _ in range(2):
        value = x(loss)
        assert value.dtype in (torch.float32, torch.float64) and value.isfinite(), (value, patterns)
        if value.requires_grad:
            value.backward()
    for leaf in leaves(x):
        assert leaf.grad is None or leaf.grad.isfinite().all(), patterns
    assert all(t.isfinite().all() for t in loss.state_dict().values() if t.is_floating_point())
    assert all(np.isfinite(float(s)) for s in loss.stats.values())


@st.composite
def nonsense(draw):
    """Something that no batch can be, and a word of the error that says so."""
    b, classes = draw(st.integers(2, 9)), draw(st.integers(3, 12))
    z, y = torch.zeros(b, classes), torch.zeros(b, dtype=torch.int64)
    bad = {
        "outside": lambda: (z, y + draw(st.integers(classes, 999))),
        "outside the": lambda: (z, y - draw(st.integers(1, 99))),
        "integers": lambda: (z, y.float()),
        "target": lambda: (z, y[: draw(st.integers(0, b - 1))]),
        "NaN": lambda: (
            z.index_put((torch.tensor(draw(st.integers(0, b - 1))),), torch.tensor(torch.nan)),
            y,
        ),
        "empty": lambda: (z[:0], y[:0]),
        "logits": lambda: (draw(st.sampled_from([z[0], z[None], z[:, :1], z.long()])), y),
    }
    word = draw(st.sampled_from(sorted(bad)))
    return word, bad[word]()


@pytest.mark.parametrize("name", ["ce", "kd", "smkd", "joint"])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=nonsense())
def test_nonsense_is_refused_in_words(name, case):
    """By the base class, with an error of ours, not with whatever an operator of torch says."""
    word, (z, y) = case
    loss = make(name, max(3, z.shape[-1]))
    x = batch_for(loss, max(2, len(z)), max(3, z.shape[-1]))
    with pytest.raises((ValueError, TypeError), match=word.split()[0]):
        loss((z,) * len(x.logits) if loss.num_peers > 1 else z, y, **x.extra)
