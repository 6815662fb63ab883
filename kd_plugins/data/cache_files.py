"""The files of a cache of what networks return. What was written before a kill is kept."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

ANOTHER = "Choose another folder, or delete it"


class CacheFiles:
    """`key.json`, an array of what networks return and `done.npy` (uint8 [N]) in one folder.

    A row of `done.npy` is 0 until it is computed, then 1; or 2 where the picture cannot be read and
    the row is that of the next readable one.

    Args:
        folder: for this cache alone.
        kind: "teacher" for `logits.npy`, "feature" for `features.npy`; both float32.
        shape: (N, T, C) or (N, D).
    """

    def __init__(self, folder: Path, kind: str, shape: tuple[int, ...]) -> None:
        self.folder, self.kind, self.shape = folder, kind, shape
        self.size = int(np.prod(shape)) * 4
        self.key, self.done = folder / "key.json", folder / "done.npy"
        self.values = folder / {"teacher": "logits.npy", "feature": "features.npy"}[kind]

    def claim(self, key: dict[str, Any], batch_size: int) -> list[int]:
        """Create the files, or check that those in the folder have this key.

        Returns:
            The first rows of the batches that are not done.

        Raises:
            ValueError: the folder holds something else. OSError: no space, or not writable.
        """
        with self._named_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self.key.exists()
            if known:
                self._refuse_other(self._read_key(), key)
            elif self.values.exists():
                raise ValueError(
                    f"{self.folder} has a {self.values.name} and no key.json: it is not a "
                    f"{self.kind} cache, or not all of one. {ANOTHER}"
                )
            if not _is_whole(self.values, self.shape):
                self.done.unlink(missing_ok=True)
                if (free := shutil.disk_usage(self.folder).free) < self.size:
                    raise OSError(errno.ENOSPC, f"only {free:,} are free")
            if not known:
                part = self.key.with_suffix(".part")
                part.write_text(json.dumps(key, indent=1), encoding="utf-8")
                part.replace(self.key)  # whole or not at all
            for path, dtype, shape in (
                (self.values, np.float32, self.shape),
                (self.done, np.uint8, self.shape[:1]),
            ):
                if not _is_whole(path, shape):
                    _create(path, dtype, shape)
            done = np.load(self.done)
        logger.info(
            f"{self.values.name} {list(self.shape)} takes {self.size / 1e6:.1f} MB in "
            f"{self.folder}; {np.count_nonzero(done)} of {len(done)} rows are there."
        )
        starts = range(0, len(done), batch_size)
        return [start for start in starts if not done[start : start + batch_size].all()]

    def write(self, start: int, values: np.ndarray, replaced: np.ndarray) -> None:
        """Store the values of the rows from `start` on, and which of them belong to another row."""
        with self._named_errors():
            _write(self.values, start, values)
            # After the values are on the disk: what is marked as done is there.
            _write(self.done, start, np.where(replaced, 2, 1).astype(np.uint8))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"the {self.kind} cache in {self.folder} takes {self.size:,} bytes and cannot be "
                f"written: {error.strerror or error}",
            ) from error

    def _refuse_other(self, saved: dict[str, Any], current: dict[str, Any]) -> None:
        other = [part for part in key_parts(current) if saved.get(part) != current[part]]
        if "data" in other and "transform" in other:
            other.remove("transform")  # its hash is of other pictures, and tells nothing
        if other:
            shown = [*other, *(["hint"] if "transform" in other else [])]
            raise ValueError(
                f"the {self.kind} cache in {self.folder} differs in {', '.join(other)}: it was "
                f"made for { ({part: saved.get(part) for part in shown}) }, asked for is "
                f"{ ({part: current[part] for part in shown}) }. Its {self.values.stem} are not "
                f"those of these networks for these pixels. {ANOTHER}"
            )

    def _read_key(self) -> dict[str, Any]:
        try:
            return json.loads(self.key.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self.key} is not the key of a {self.kind} cache ({error}), so it is unknown "
                f"whose {self.values.stem} are beside it. {ANOTHER}"
            ) from error


def key_parts(key: dict[str, Any]) -> list[str]:
    """The parts of a key that must be the same. The hint only explains a difference."""
    return [part for part in key if part != "hint"]


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:  # np.load would accept an archive too
        return np.lib.format.open_memmap(path, mode="r").shape == shape
    except (OSError, ValueError, EOFError):  # missing, or cut short
        return False


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    part = path.with_suffix(".part")
    np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape).flush()
    part.replace(path)


def _write(path: Path, start: int, values: np.ndarray) -> None:
    """Write rows from `start` on, down to the disk.

    Not through a memory map: on a full disk that is a bus error and not an OSError.
    """
    stored: Any = np.load(path, mmap_mode="r")
    with open(path, "r+b") as file:
        file.seek(stored.offset + start * stored[:1].nbytes)
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())
