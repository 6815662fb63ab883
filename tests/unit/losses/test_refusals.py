"""What every loss refuses, and in which words."""

import math
import re

import pytest
import torch
from helpers.contract import CASES, B, C, every, make, pair
from torch.utils._pytree import tree_map


@every
def test_typos_raise(name):
    for typo in ("epz", "redcution", "num_class"):
        with pytest.raises(TypeError, match=typo):
            CASES[name](C, **{typo: 1})
    with pytest.raises(ValueError, match=r"reduction='men'.*'mean', 'sum', 'none'"):
        CASES[name](C, reduction="men")


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
def test_arrays_are_no_tensors(name):
    loss, x = pair(name)
    with pytest.raises(TypeError, match=r"target must be a tensor, got ndarray: torch\.as_tensor"):
        x.replace(target=x.target.numpy())(loss)
    for key in {"teacher", "index"} & set(x.extra):
        with pytest.raises(TypeError, match=f"{key} must be a tensor, got list"):
            x.replace(extra=x.extra | {key: x.extra[key].tolist()})(loss)


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
        teacher = x.extra["teacher"]
        for wrong in (teacher[:, :1], teacher[:, :, :3]):  # the first would broadcast in silence
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
        loss((z, z[:, :3], *x.logits[2:]), y, **x.extra)


@every
def test_a_label_outside_the_classes_is_named(name):
    loss, x = pair(name)
    for label in (C, -1, -100, 255):
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
