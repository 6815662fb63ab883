"""Losses by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from .base import Loss

_REGISTRY: dict[str, type[Loss]] = {}


L = TypeVar("L", bound=type[Loss])


def register_loss(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss known as ``name``. A name used twice raises."""

    def register(cls: L) -> L:
        known = _REGISTRY.get(name, cls)  # the same class again is a notebook cell that runs twice
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"the loss name {name!r} is taken by {_REGISTRY[name].__name__}; choose another"
            )
        _REGISTRY[name] = cls
        return cls

    return register


def create_loss(name: str, **kwargs: Any) -> Loss:
    """The loss registered as ``name``, made with ``kwargs``: exactly ``cls(**kwargs)``.

    >>> create_loss("label_smoothing", eps=0.2)
    LabelSmoothing(eps=0.2)
    """
    return loss_class(name)(**kwargs)


def loss_class(name: str) -> type[Loss]:
    """The class registered as ``name``."""
    if name not in _REGISTRY:
        import difflib

        names = {cls.__name__.lower(): known for known, cls in _REGISTRY.items()}
        names |= {known: known for known in _REGISTRY}
        close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        close = list(dict.fromkeys(names[match] for match in close))
        raise ValueError(
            f"unknown loss {name!r}"
            + (f": did you mean {' or '.join(close)}?" if close else ".")
            + f" Known are: {', '.join(list_losses())}"
        )
    return _REGISTRY[name]


def list_losses(pattern: str = "*") -> list[str]:
    """Registered names that match a shell pattern, sorted.

    >>> list_losses("boot*")
    ['boot_hard', 'boot_soft']
    """
    return sorted(fnmatch.filter(_REGISTRY, pattern))


class LossSummary(NamedTuple):
    """What the tables of losses show of each."""

    name: str
    formula: str  # the first paragraph of its docstring
    inputs: list[str]
    source: str  # the first reference


def summarise_loss(name: str) -> LossSummary:
    """A registered loss in short, from its docstring and its declared inputs.

    >>> summarise_loss("mae").inputs
    ['logits', 'target']
    """
    cls = loss_class(name)
    doc = " ".join((cls.__doc__ or "").split())
    formula = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    source = doc.split("References: ", maxsplit=1)[-1]
    source = re.split(r"\. | Notes:| >>> ", source, maxsplit=1)[0].rstrip(".")
    logits = "logits of each peer" if cls.num_peers > 1 else "logits"
    return LossSummary(name, formula, [logits, "target", *sorted(cls.required_inputs)], source)
