"""Sizes of data and networks, which may be known only after a loss has been made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from .state import KeepsPrecision


@dataclass(frozen=True)
class Sizes:
    """What :meth:`Loss.bind` knows of data and networks; None is unknown."""

    num_samples: int | None = None
    num_classes: int | None = None
    num_rows: int | None = None
    feature_dims: Sequence[Sequence[int]] | None = None  # per network, of each of its maps
    teacher_feature_dims: Sequence[Sequence[int]] | None = None


class NeedsSizes(KeepsPrecision):
    """A module that :meth:`bind` tells the sizes that its constructor was not given.

    Attributes:
        needs: sizes without which it cannot run: attribute -> the argument of :meth:`bind`.
    """

    needs: Mapping[str, str] = {}

    def __init__(self) -> None:
        super().__init__()
        self._built = False

    def bind(
        self,
        num_samples: int | None = None,
        num_classes: int | None = None,
        feature_dims: Sequence[Sequence[int]] | None = None,
        teacher_feature_dims: Sequence[Sequence[int]] | None = None,
        num_rows: int | None = None,
    ) -> Self:
        """Fill in what the constructor left open, here and in all parts; returns the loss.

        Args:
            num_samples: rows that an ``index`` can name, usually those of the training data.
            num_classes: C.
            feature_dims: for each network the channels of its maps (``models.feature_dims``).
            teacher_feature_dims: the same for each teacher.
            num_rows: rows of the training data, if they are a part of ``num_samples``.

        Raises:
            ValueError: a size contradicts one that the loss was made for.
        """
        num_rows = num_samples if num_rows is None else num_rows
        sizes = Sizes(num_samples, num_classes, num_rows, feature_dims, teacher_feature_dims)
        self.take_sizes(sizes)
        return self

    def take_sizes(self, sizes: Sizes) -> None:
        """What :meth:`bind` does. A loss with more sizes calls :meth:`settle` for them first."""
        self.settle("num_samples", sizes.num_samples)
        self.settle("num_classes", sizes.num_classes)
        for part in _parts_of(self):
            part.take_sizes(sizes)
        self.complete()

    def settle(self, name: str, value: Any) -> None:
        """Set the attribute ``name``, if it is one of ``needs`` and open; refuse another value."""
        own = getattr(self, name, None)
        if value is None or own == value:
            return
        if own is not None:
            raise ValueError(
                f"{type(self).__name__} was made for {name}={own}, and the data or the networks "
                f"have {name}={value}"
            )
        if name in self.needs:
            setattr(self, name, value)

    def require_sizes(self) -> None:
        """Raise if some of ``needs`` are still open."""
        if missing := [name for name in self.needs if getattr(self, name) is None]:
            call = ", ".join(f"{argument}=..." for argument in {self.needs[n]: 0 for n in missing})
            raise RuntimeError(
                f"{type(self).__name__} does not know {' and '.join(missing)}: call "
                f"loss.bind({call}), as MutualDistillationTrainer does, or make the loss with it"
            )

    def complete(self) -> None:
        """Call :meth:`build` once all of ``needs`` are known. The last line of a constructor."""
        if not self._built and all(getattr(self, name) is not None for name in self.needs):
            self._built = True
            self.build()

    def build(self) -> None:
        """Make the tables and parameters whose sizes are in ``needs``. A subclass writes it."""


def _parts_of(module: nn.Module) -> Iterator[NeedsSizes]:
    """The losses that a loss is made of; not the parts of these."""
    for child in module.children():
        if isinstance(child, NeedsSizes):
            yield child
        else:
            yield from _parts_of(child)
