"""Checks of arguments and batches. Errors name value, expectation and consequence."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Collection, Iterable, Sequence, Sized
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")

MASS_TOLERANCE = 0.01  # of the sum of a target's row: bfloat16 rounds to 2^-9 of each entry
LEAVE_OUT = "to leave samples out: keep = target != -100; loss(logits[keep], target[keep])"


# --------------------------------------------------------------------------------------- arguments


def check(ok: bool, name: str, value: V, expected: str, why: str = "") -> V:
    """Return ``value`` if it is right.

    Args:
        ok: whether it is right.
        name: of the argument.
        value: of the argument.
        expected: what would have been right, after "expected".
        why: what would have happened, or what the value is used for.

    Raises:
        ValueError: ``name=value: expected <expected>; <why>``.

    >>> check(False, "eps", 2.0, "a weight in [0, 1]", "the label would count negatively")
    Traceback (most recent call last):
    ValueError: eps=2.0: expected a weight in [0, 1]; the label would count negatively
    """
    if not ok:
        raise ValueError(f"{name}={value!r}: expected {expected}" + (f"; {why}" if why else ""))
    return value


def number(name: str, value: Any, why: str = "") -> Any:
    """A finite number. NaN, infinity, booleans and strings are refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    return check(math.isfinite(value), name, value, "a finite number", why)


def positive(name: str, value: Any, why: str = "") -> Any:
    """A finite number above 0."""
    return _within(name, value, lambda x: x > 0, "a finite number above 0", why)


def non_negative(name: str, value: Any, why: str = "") -> Any:
    """A finite number, 0 or more."""
    return _within(name, value, lambda x: x >= 0, "a finite number, 0 or more", why)


def fraction(
    name: str, value: Any, why: str = "", *, with_zero: bool = True, with_one: bool = True
) -> Any:
    """A number in [0, 1]; ``with_zero=False`` and ``with_one=False`` exclude the ends."""
    interval = f"{'[' if with_zero else '('}0, 1{']' if with_one else ')'}"

    def inside(x: float) -> bool:
        return (x >= 0 if with_zero else x > 0) and (x <= 1 if with_one else x < 1)

    return _within(name, value, inside, f"a number in {interval}", why)


def count(name: str, value: Any, why: str = "", *, least: int = 1) -> int:
    """An integer of at least ``least``, as ``int``."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}={value!r}: expected an integer, got {type(value).__name__}"
        ) from None
    check(whole >= least, name, value, f"an integer of at least {least}", why)
    return whole


def one_of(name: str, value: V, allowed: Collection[V], why: str = "") -> V:
    """One of a few values."""
    return check(value in allowed, name, value, f"one of {tuple(allowed)}", why)


def same_length(why: str = "", **sequences: Sized) -> None:
    """Sequences of one length, given by name: ``same_length(heads=heads, teacher_dims=dims)``."""
    lengths = {name: len(sequence) for name, sequence in sequences.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{n} of {name}" for name, n in lengths.items())
        raise ValueError(f"got {shown}: expected as many of each" + (f"; {why}" if why else ""))


def class_weights(weight: Any, num_classes: int | None) -> Tensor:
    """Class weights as a tensor [C] in float32."""
    weight = torch.as_tensor(weight, dtype=torch.float32).detach()
    if weight.dim() != 1 or num_classes not in (None, len(weight)):
        raise ValueError(
            f"weight: expected a number per class, [{num_classes or 'C'}], got {list(weight.shape)}"
        )
    if not (torch.isfinite(weight) & (weight >= 0)).all() or not weight.any():
        raise ValueError(
            f"weight={weight.tolist()[:10]}: expected finite numbers, 0 or more and not all 0; a "
            "negative weight would maximise the loss of its class"
        )
    return weight


def _within(name: str, value: Any, inside: Any, expected: str, why: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")
    return check(math.isfinite(value) and inside(value), name, value, expected, why)


def unknown_argument(cls: type, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that a constructor does not have. It suggests the nearest name.

    Args:
        cls: whose constructor was called.
        name: the keyword that it does not have.
        known: keywords that every constructor of this kind has.
    """
    own = [p.name for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD]
    names = list(dict.fromkeys([*own, *known]))
    only = own if len(own) == 1 and len(name) <= len(own[0]) + 1 else []  # p for q
    meant = difflib.get_close_matches(name, names, n=1) or only
    hint = f"; did you mean {meant[0]}?" if meant else f"; it has {', '.join(names)}"
    if name == "ignore_index":
        hint = f"; {LEAVE_OUT}"
    return TypeError(f"{cls.__name__} has no argument {name!r}{hint}")


# ----------------------------------------------------------------------------------------- batches


def logits(name: str, value: Any, num_peers: int, num_classes: int | None) -> list[Tensor]:
    """The logits of each network, in a list, if loss ``name`` can take them."""
    peers = _one_network(name, value) if num_peers == 1 else _peers(name, value, num_peers)
    shape = shape_of(peers[0])
    if peers[0].dim() > 2:
        raise ValueError(
            f"{name} expects logits [B, C], got {shape}. For logits [B, C, ...] with labels "
            "[B, ...], each position is a sample: loss(logits.movedim(1, -1).flatten(0, -2), "
            "target.flatten())"
        )
    if peers[0].dim() != 2 or peers[0].shape[1] < 2:
        raise ValueError(f"{name} expects logits [B, C] with C >= 2, got {shape}")
    if integers := [z.dtype for z in peers if not z.is_floating_point()]:
        raise TypeError(
            f"{name} expects floating-point logits, got {integers[0]}: pass logits, not classes"
        )
    if len(peers[0]) == 0:
        raise ValueError(f"{name}: the batch is empty, got logits {shape}: its mean would be NaN")
    if num_classes not in (None, peers[0].shape[1]):
        raise ValueError(f"{name} was made for num_classes={num_classes}, got logits {shape}")
    return peers


def _one_network(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    hint = ""
    if isinstance(value, list | tuple):
        hint = "; Mutual(loss, SelectNone()) trains several networks side by side"
    elif hasattr(value, "logits"):
        hint = ": pass its .logits; the plain Trainer takes as_compute_loss_func(loss)"
    raise TypeError(f"{name} expects a tensor of logits [B, C], got {shape_of(value)}{hint}")


def _peers(name: str, value: Any, num_peers: int) -> list[Tensor]:
    if isinstance(value, Tensor) or len(value) < 2:
        raise ValueError(
            f"{name} teaches peers: expected a tuple of at least two logits [B, C], "
            f"got {shape_of(value)}"
        )
    if len(value) != num_peers:
        raise ValueError(f"{name} was made for num_peers={num_peers}, got {len(value)} logits")
    if len({z.shape for z in value}) > 1:
        raise ValueError(
            f"{name}: all peers must have logits of one shape [B, C], got {shape_of(value)}"
        )
    return list(value)


def target(name: str, value: Tensor, logits: Tensor) -> Tensor:
    """Class indices [B] as int64, or distributions [B, C] as they are, if they fit the logits.

    The values are checked on the CPU only: to read them from an accelerator, the host would wait.
    """
    _is_tensor(name, "target", value)
    if value.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"{name}: target must be class indices [{len(logits)}] or distributions "
            f"{list(logits.shape)}, got {list(value.shape)}"
        )
    indices = value.dim() == 1
    if indices and (value.is_floating_point() or value.dtype == torch.bool):
        raise TypeError(
            f"{name}: class indices must be integers, got {value.dtype}"
            + (
                "; use target.long() if False and True are classes 0 and 1"
                * (not value.is_floating_point())
            )
        )
    value = value.long() if indices else value
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        (_refuse_labels if indices else _refuse_mass)(name, value, logits.shape[1])
    return value


def _is_tensor(name: str, what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name}: {what} must be a tensor, got {kind}: torch.as_tensor({what})")


def _refuse_labels(name: str, labels: Tensor, num_classes: int) -> None:
    low, high = (int(label) for label in labels.aminmax())
    if low < 0 or high >= num_classes:
        wrong = (labels < 0) | (labels >= num_classes)
        raise ValueError(
            f"{name}: label {labels[wrong][0].item()} at position {wrong.nonzero()[0].item()} is "
            f"outside the {num_classes} classes 0 to {num_classes - 1}"
            + (f"; {LEAVE_OUT}" if low == -100 else "")
        )


def _refuse_mass(name: str, rows: Tensor, num_classes: int) -> None:
    mass = rows.sum(-1, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
    wrong = (mass - 1.0).abs() > MASS_TOLERANCE  # False for NaN, which is refused with the loss
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: row {row} of the target sums to {mass[row].item():.4g}: expected a "
            "distribution over classes, which sums to 1. Divide each row by its sum; a multi-label "
            "target would weigh its samples by their number of labels"
        )


def inputs(name: str, given: dict[str, Any], required: frozenset[str], logits: Tensor) -> None:
    """Refuse a call that lacks what a loss requires, or brings what it would ignore."""
    if missing := required - {key for key, value in given.items() if value is not None}:
        call = ", ".join(f"{key}=..." for key in sorted(missing))
        raise TypeError(
            f"{name} reads {sorted(required)}: missing {sorted(missing)}; call "
            f"loss(logits, target, {call})"
        )
    if unknown := set(given) - required:
        reads = sorted(required) or "logits and target only"
        raise TypeError(f"{name} reads {reads}: it would ignore {sorted(unknown)}")
    teacher, index = given.get("teacher"), given.get("index")
    for what, value in (("teacher", teacher), ("index", index)):
        if value is not None:
            _is_tensor(name, what, value)
    if teacher is not None and (teacher.dim() not in (2, 3) or teacher.shape[-2:] != logits.shape):
        raise ValueError(
            f"{name}: teacher must be logits [T, B, C] or [B, C] for {shape_of(logits)}, "
            f"got {shape_of(teacher)}"
        )
    if index is not None and index.shape != logits.shape[:1]:
        raise ValueError(f"{name}: index must be positions [{len(logits)}], got {shape_of(index)}")


def refuse_nan(name: str, losses: Tensor) -> None:
    """Refuse losses [B], or of a whole batch, that are NaN."""
    nan = torch.isnan(losses)
    if nan.any():
        where = nan.nonzero().flatten().tolist()[:5] if losses.dim() else "the whole batch"
        raise ValueError(
            f"{name} is NaN for samples {where}: the logits or the target contain NaN. One step on "
            "it would make every weight NaN; look at the learning rate and the input"
        )


def shape_of(value: Any) -> str:
    """The shape of a tensor, or of each tensor of a sequence, for an error."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "(" + ", ".join(map(shape_of, value)) + ")"
    return type(value).__name__
