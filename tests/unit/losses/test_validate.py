"""Each check of an argument: what it takes at its edges, what it refuses, and in which words."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_plugins import CE, GCE, SMKD
from kd_plugins.losses import validate

MINUS = -5e-324  # the largest number below 0
ABOVE_ONE = math.nextafter(1.0, 2.0)
BELOW_ONE = math.nextafter(1.0, 0.0)
Z = torch.zeros(3, 4)


def says(message):
    """The whole text of an error."""
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    ("check", "values"),
    [
        (validate.number, [0, -1e308, 1e308, Fraction(1, 3), np.float32(0.5), np.int64(2)]),
        (validate.positive, [5e-324, 1, 1e308]),
        (validate.non_negative, [0, -0.0, 5e-324, 1e308]),
        (validate.fraction, [0, -0.0, 1, 1.0, 0.5]),
        (validate.count, [1, 2**40, np.int64(3)]),
    ],
)
def test_what_is_right_is_returned_as_it_is(check, values):
    for value in values:
        assert check("x", value) == value


@pytest.mark.parametrize("value", [True, "1", None, [1.0], 1j, torch.tensor(1.0)])
@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (validate.number, "a number"),
        (validate.positive, "a finite number above 0"),
        (validate.non_negative, "a finite number, 0 or more"),
        (validate.fraction, "a number in [0, 1]"),
    ],
)
def test_what_is_no_number(check, expected, value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=says(f"x={value!r}: expected {expected}, got {kind}")):
        check("x", value, "why")


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        *[(validate.number, v, "a finite number") for v in (math.nan, math.inf, -math.inf)],
        *[
            (validate.positive, v, "a finite number above 0")
            for v in (0, -0.0, MINUS, math.nan, math.inf)
        ],
        *[
            (validate.non_negative, v, "a finite number, 0 or more")
            for v in (MINUS, math.nan, math.inf)
        ],
        *[(validate.fraction, v, "a number in [0, 1]") for v in (MINUS, ABOVE_ONE, math.nan)],
        *[(validate.count, v, "an integer of at least 1") for v in (0, -1)],
    ],
)
def test_what_is_out_of_range(check, value, expected):
    with pytest.raises(ValueError, match=says(f"x={value!r}: expected {expected}; it would fail")):
        check("x", value, "it would fail")
    with pytest.raises(ValueError, match=says(f"x={value!r}: expected {expected}")):
        check("x", value)


@pytest.mark.parametrize(
    ("zero", "one", "interval"),
    [(False, True, "(0, 1]"), (True, False, "[0, 1)"), (False, False, "(0, 1)")],
)
def test_a_fraction_without_its_ends(zero, one, interval):
    ends = {"with_zero": zero, "with_one": one}
    for value, taken in ((0.0, zero), (1.0, one), (5e-324, True), (BELOW_ONE, True)):
        if taken:
            assert validate.fraction("x", value, **ends) == value
            continue
        message = f"x={value}: expected a number in {interval}"
        with pytest.raises(ValueError, match=says(message)):
            validate.fraction("x", value, **ends)


def test_a_count_is_an_int_and_has_a_least():
    whole = validate.count("n", np.int64(2), least=2)
    assert whole == 2 and type(whole) is int
    message = "n=1: expected an integer of at least 2; one is alone"
    with pytest.raises(ValueError, match=says(message)):
        validate.count("n", 1, "one is alone", least=2)
    for value in (2.0, "2", None):
        message = f"n={value!r}: expected an integer, got {type(value).__name__}"
        with pytest.raises(TypeError, match=says(message)):
            validate.count("n", value)


def test_one_of_a_few():
    assert validate.one_of("way", "a", ("a", "b")) == "a"
    message = "way='c': expected one of ('a', 'b'); no other exists"
    with pytest.raises(ValueError, match=says(message)):
        validate.one_of("way", "c", ("a", "b"), "no other exists")


def test_sequences_of_one_length():
    validate.same_length(a=[], b="")
    validate.same_length(a=[1], b="x", c=(0,))
    message = "got 2 of heads, 1 of dims: expected as many of each; each head has one"
    with pytest.raises(ValueError, match=says(message)):
        validate.same_length("each head has one", heads=[1, 2], dims=[3])


def test_class_weights():
    for given in ([0.0, 2.0], torch.tensor([0, 2]), np.array([0.0, 2.0])):
        weight = validate.class_weights(given, 2)
        assert weight.dtype == torch.float32 and weight.tolist() == [0.0, 2.0]
    parameter = torch.ones(2, requires_grad=True)
    assert not validate.class_weights(parameter, None).requires_grad
    for given, wanted, shape in (([1.0], 2, 2), ([[1.0, 2.0]], 2, 2), (1.0, None, "C")):
        got = list(torch.as_tensor(given).shape)
        message = f"weight: expected a number per class, [{shape}], got {got}"
        with pytest.raises(ValueError, match=says(message)):
            validate.class_weights(given, wanted)
    for given in ([1.0, -1.0], [1.0, math.inf], [1.0, math.nan], [0.0, 0.0]):
        message = re.escape(f"weight={given}: expected finite numbers, 0 or more and not all 0; ")
        with pytest.raises(ValueError, match=message + "a negative weight would maximise"):
            validate.class_weights(given, None)


@pytest.mark.parametrize(
    ("cls", "name", "hint"),
    [
        (SMKD, "etaa", "did you mean eta?"),
        (GCE, "reductoin", "did you mean reduction?"),
        (GCE, "p", "did you mean q?"),  # its only argument
        (GCE, "label_smoothing", "it has q, num_classes, reduction, weight"),  # nothing is near
        (
            SMKD,
            "xyz",
            "it has refine, eta, b2, normalize, num_peers, num_classes, reduction, weight",
        ),
    ],
)
def test_an_unknown_argument_suggests(cls, name, hint):
    with pytest.raises(TypeError, match=says(f"{cls.__name__} has no argument {name!r}; {hint}")):
        cls(**{name: 1})


# ------------------------------------------------------------------------------------------ batches


def test_logits_of_one_network():
    assert validate.logits("Own", Z, 1, 4)[0] is Z
    two = "Own expects a tensor of logits [B, C], got ([3, 4], [3, 4]); "
    for value, error, message in [
        (
            (Z, Z),
            TypeError,
            two + "Mutual(loss, SelectNone()) trains several networks side by side",
        ),
        (None, TypeError, "Own expects a tensor of logits [B, C], got NoneType"),
        (Z[0], ValueError, "Own expects logits [B, C] with C >= 2, got [4]"),
        (Z[:, :1], ValueError, "Own expects logits [B, C] with C >= 2, got [3, 1]"),
        (
            Z.long(),
            TypeError,
            "Own expects floating-point logits, got torch.int64: pass logits, not classes",
        ),
        (
            Z[:0],
            ValueError,
            "Own: the batch is empty, got logits [0, 4]: its mean would be NaN",
        ),
    ]:
        with pytest.raises(error, match=says(message)):
            validate.logits("Own", value, 1, None)
    with pytest.raises(ValueError, match=says("Own was made for num_classes=5, got logits [3, 4]")):
        validate.logits("Own", Z, 1, 5)


def test_logits_of_peers():
    assert validate.logits("Peers", (Z, Z), 2, None) == [Z, Z]
    alone = "Peers teaches peers: expected a tuple of at least two logits [B, C], got "
    shapes = "Peers: all peers must have logits of one shape [B, C], got ([3, 4], [3, 3])"
    for value, message in [
        (Z, alone + "[3, 4]"),
        ((Z,), alone + "([3, 4])"),
        ((Z, Z, Z), "Peers was made for num_peers=2, got 3 logits"),
        ((Z, Z[:, :3]), shapes),
    ]:
        with pytest.raises(ValueError, match=says(message)):
            validate.logits("Peers", value, 2, None)


def test_targets():
    for kind in (torch.uint8, torch.int16, torch.int64):
        target = validate.target("Own", torch.tensor([0, 3, 1], dtype=kind), Z)
        assert target.dtype == torch.int64 and target.tolist() == [0, 3, 1]
    rows = torch.full((3, 4), 0.25)
    edge = rows * torch.tensor([[1.0], [1.0099], [0.9901]])
    assert validate.target("Own", rows, Z) is rows and validate.target("Own", edge, Z) is edge
    shape = "Own: target must be class indices [3] or distributions [3, 4], got "
    whole = "Own: class indices must be integers, got "
    for value, error, message in [
        (torch.zeros(2).long(), ValueError, shape + "[2]"),
        (torch.zeros(3, 1), ValueError, shape + "[3, 1]"),
        (torch.zeros(3), TypeError, whole + "torch.float32"),
        (
            torch.zeros(3).bool(),
            TypeError,
            whole + "torch.bool; use target.long() if False and True are classes 0 and 1",
        ),
        (
            torch.tensor([0, 4, 9]),
            ValueError,
            "Own: label 4 at position 1 is outside the 4 classes 0 to 3",
        ),
        (
            torch.tensor([0, 1, -1]),
            ValueError,
            "Own: label -1 at position 2 is outside the 4 classes 0 to 3",
        ),
    ]:
        with pytest.raises(error, match=says(message)):
            validate.target("Own", value, Z)


@pytest.mark.parametrize("mass", [0.0, 0.989, 1.011, 2.0, -1.0, math.inf])
def test_rows_that_are_no_distribution(mass):
    rows = torch.full((3, 4), 0.25)
    rows[1] *= mass
    with pytest.raises(ValueError, match=r"^Own: row 1 of the target sums to .*: expected a dist"):
        validate.target("Own", rows, Z)


def test_other_inputs():
    reads = frozenset({"teacher", "index"})
    teacher, index = torch.zeros(2, 3, 4), torch.arange(3)
    for logits in (teacher, teacher[0]):
        validate.inputs("Own", {"teacher": logits, "index": index}, reads, Z)
    validate.inputs("Own", {}, frozenset(), Z)
    needs = "Own reads ['index', 'teacher']: "
    shape = "Own: teacher must be logits [T, B, C] or [B, C] for [3, 4], got "
    for given, error, message in [
        (
            {"teacher": teacher, "index": None},
            TypeError,
            needs + "missing ['index']; call loss(logits, target, index=...)",
        ),
        (
            {},
            TypeError,
            needs
            + "missing ['index', 'teacher']; call loss(logits, target, index=..., teacher=...)",
        ),
        (
            {"teacher": teacher, "index": index, "idx": 0},
            TypeError,
            needs + "it would ignore ['idx']",
        ),
        ({"teacher": teacher[:, :1], "index": index}, ValueError, shape + "[2, 1, 4]"),
        ({"teacher": teacher[0, 0], "index": index}, ValueError, shape + "[4]"),
        (
            {"teacher": teacher, "index": index[:2]},
            ValueError,
            "Own: index must be positions [3], got [2]",
        ),
    ]:
        with pytest.raises(error, match=says(message)):
            validate.inputs("Own", given, reads, Z)
    message = "Own reads logits and target only: it would ignore ['teacher']"
    with pytest.raises(TypeError, match=says(message)):
        validate.inputs("Own", {"teacher": teacher}, frozenset(), Z)


def test_losses_that_are_nan():
    validate.refuse_nan("Own", torch.tensor([0.0, math.inf]))
    with pytest.raises(ValueError, match=r"^Own is NaN for samples \[1, 3\]: the logits or the"):
        validate.refuse_nan("Own", torch.tensor([0.0, math.nan, 1.0, math.nan]))
    with pytest.raises(ValueError, match=r"^Own is NaN for samples the whole batch: "):
        validate.refuse_nan("Own", torch.tensor(math.nan))


def test_shapes_in_an_error():
    assert validate.shape_of(Z) == "[3, 4]"
    assert validate.shape_of([Z, [Z[0], "ab"]]) == "([3, 4], ([4], str))"
    assert validate.shape_of(CE()) == "CE"


def told(*args, **kwargs):
    """The code in the message of the error."""
    with pytest.raises((TypeError, ValueError)) as caught:
        CE(**kwargs)(*args)
    return re.search(r"(keep = .*|loss\(logits\..*)", str(caught.value))[1]


def test_messages_say_how_to_call_with_pixels_and_with_samples_left_out():
    """The code in the message gives what nn.CrossEntropyLoss gives."""
    names = {"loss": CE(), "logits": torch.randn(2, 4, 3, 5), "target": torch.arange(30) % 4}
    names["target"] = names["target"].view(2, 3, 5)
    exec("value = " + told(names["logits"], names["target"]), names)
    assert names["value"].item() == pytest.approx(
        F.cross_entropy(names["logits"], names["target"]).item()
    )
    names |= {"logits": torch.randn(4, 3), "target": torch.tensor([0, -100, 2, 1])}
    for recipe in (told(names["logits"], names["target"]), told(ignore_index=-100)):
        exec(recipe.replace("; loss", "; value = loss"), names)
        assert names["value"].item() == pytest.approx(
            F.cross_entropy(names["logits"], names["target"]).item()
        )
