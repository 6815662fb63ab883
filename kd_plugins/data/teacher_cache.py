"""Teacher cache: what frozen teachers say of a training set, computed once, on disk; refused where it would be of something else.

>>> train = cache_teachers(train, [teacher], "runs/cache", student=student)  # doctest: +SKIP
>>> MutualDistillationTrainer(student, 0.1 * CE() + 0.9 * KD(), args, train_dataset=train).train()  # doctest: +SKIP
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..losses.state import in_eval
from ..models.factory import class_count, logits_of
from ..models.inputs import InputAdapter, normalization
from .decode import decode_picture
from .image_view import ImageView
from .randomness import repeated

logger = logging.getLogger(__name__)


PARTS = ("data", "transform", "teachers", "dtype", "classes")


class CachedTeachers(torch.utils.data.Dataset):
    """An :class:`ImageView` whose items also hold ``teacher`` [T, C]; made by :func:`cache_teachers`.

    All else is the view's: ``labels``, ``class_names``, ``set_epoch``, ``broken`` ... Workers open the file by themselves.

    Attributes:
        view: that view.
        teacher_logits: float32 [N, T, C], a memory map.
    """

    def __init__(self, view: ImageView, path: Path) -> None:
        self.view, self.path = view, path
        self.teacher_logits: np.ndarray = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # by position: a broken picture's item is of the next readable row, here and when it was cached
        return self.view[index] | {
            "teacher": torch.from_numpy(np.array(self.teacher_logits[index]))
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith(
            "_"
        ):  # __getitems__, for which a DataLoader asks: the view's would lose the teachers
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.view, name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "teacher_logits"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.teacher_logits = np.load(self.path, mmap_mode="r")


def cache_teachers(
    view: ImageView,
    teachers: Sequence[nn.Module],
    folder: str | os.PathLike,
    *,
    student: nn.Module | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
) -> CachedTeachers:
    """The view with the logits of these teachers, from `folder`, where what is missing is computed first.

    For data whose pixels are the same in every epoch. The files belong to these pictures in this order, this transform,
    these teachers and this dtype; asked for anything else they are refused. Labels may differ. What was computed
    when a run was killed is kept. They take N * T * C * 4 bytes: 5.1 GB for each teacher on ImageNet.

    Teachers run in eval mode, without a gradient, on the device where they are: move them there first. On several processes
    each computes its share (call it after `MutualTrainingArguments(...)`, which starts the process group). A collator that
    changes pixels, as Mixup does, must not follow: the teachers would have seen others.

    Args:
        view: the training data.
        teachers: trained networks, pixels -> logits [B, C]. A network counts as the same if its weights, its buffers, the
            modules it prints and its normalisation are; plain attributes that its forward reads are not seen.
        folder: for this cache alone, seen by all processes; made where needed.
        student: the first network of the Trainer, as whose input the pixels are normalised: they are re-normalised
            (`pretrained_cfg`) and resized for each teacher as the Trainer does it. Without it they are only resized.
        batch_size: of the teachers' forward.
        num_workers: processes that read pictures.
        dtype: of autocast, `torch.bfloat16` for a run with `bf16=True`; none by default.

    Raises:
        ValueError: a transform that draws at random, or a folder with the logits of something else: the error says of what.
        OSError: the folder cannot be written, or too little is free.
    """
    teachers, folder = list(teachers), Path(os.path.abspath(folder))
    if not isinstance(view, ImageView):
        raise TypeError(
            f"the view must be an ImageView, got {type(view).__name__}: choose rows in the data set below it"
        )
    if not teachers:
        raise ValueError("there are no teachers: nothing to cache")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={dtype}: expected torch.bfloat16, torch.float16 or None, which is no autocast"
        )
    rank, world = _processes()
    transform = _fixed_pixels(view)  # all of this first: it is cheap beside reading all pictures
    networks = [
        (t, InputAdapter(t, t if student is None else student).to(_device(t))) for t in teachers
    ]
    with in_eval(*teachers):
        pixels = torch.as_tensor(view[0]["pixel_values"])[None]
        counts = [
            class_count(network[0]) or _logits(*network, pixels, dtype).shape[-1]
            for network in networks
        ]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the teachers have different numbers of classes: {counts}; they cannot teach together"
            )
        shape = (len(view), len(teachers), counts[0])
        key = {
            "transform": transform,
            "teachers": [_identity(teacher, student) for teacher in teachers],
            "dtype": str(dtype),
            "classes": counts[0],
            "hint": _hint(view),
        }
        _refuse_differing(key, world)
        size = int(np.prod(shape)) * 4
        starts = _on_first(
            lambda: _claim(folder, {"data": _fingerprint(view)} | key, shape, batch_size, size),
            world,
        )
        batches: Any = [
            range(start, min(start + batch_size, len(view))) for start in starts[rank::world]
        ]
        loader = torch.utils.data.DataLoader(
            view,
            batch_sampler=batches,
            num_workers=num_workers,
            generator=torch.Generator(),  # the global one stays as it is
        )
        bar = tqdm(
            loader, "teacher logits", leave=False, disable=None if batches and rank == 0 else True
        )
        for rows, batch in zip(batches, bar if batches else (), strict=True):
            said = [_logits(*network, batch["pixel_values"], dtype).cpu() for network in networks]
            _refuse_logits(said, rows, shape, dtype)
            with _named(folder, size):
                _write(folder / "logits.npy", rows.start, torch.stack(said, dim=1).numpy())
                # only now: what is marked as done is on the disk
                _write(folder / "done.npy", rows.start, np.ones(len(rows), np.uint8))
    if world > 1:
        dist.barrier()
    return CachedTeachers(view, folder / "logits.npy")


def _claim(
    folder: Path, key: dict[str, Any], shape: tuple[int, ...], batch_size: int, size: int
) -> list[int]:
    """Find or make the files of this cache, refuse another's; where the batches begin that are not done."""
    path, logits, done = folder / "key.json", folder / "logits.npy", folder / "done.npy"
    with _named(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        known = path.exists()
        if known:
            _refuse_other(folder, _read_key(path), key)
        elif logits.exists():
            raise ValueError(
                f"{folder} has a logits.npy and no key.json: not a teacher cache, or not all of one. Choose another "
                "folder, or delete it"
            )
        if not _is_whole(logits, shape):
            done.unlink(missing_ok=True)
            if (free := shutil.disk_usage(folder).free) < size:
                raise OSError(errno.ENOSPC, f"only {free:,} are free")
        if not known:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(key, indent=1), encoding="utf-8")
            part.replace(path)  # whole or not at all
        if not _is_whole(logits, shape):
            _create(logits, np.float32, shape)
        if not _is_whole(done, shape[:1]):
            _create(done, np.uint8, shape[:1])
        marks = np.load(done)
    starts = [
        start
        for start in range(0, shape[0], batch_size)
        if not marks[start : start + batch_size].all()
    ]
    logger.info(
        "Teacher logits %s take %.1f MB in %s; %d of %d rows are there.",
        list(shape),
        size / 1e6,
        folder,
        int(marks.sum()),
        shape[0],
    )
    return starts


def _read_key(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not the key of a teacher cache ({error}): nobody knows whose logits lie beside it. Choose "
            "another folder, or delete it"
        ) from error


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        return (
            np.lib.format.open_memmap(path, mode="r").shape == shape
        )  # np.load would take an archive too
    except (OSError, ValueError, EOFError):  # there is none, or it was cut short
        return False


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    part = path.with_suffix(".part")
    np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape).flush()
    part.replace(path)


def _write(path: Path, start: int, values: np.ndarray) -> None:
    """Rows from `start` on, down to the disk. Not through a map: on a full disk that would be a bus error, no OSError."""
    stored: Any = np.load(path, mmap_mode="r")
    with open(path, "r+b") as file:
        file.seek(stored.offset + start * stored[:1].nbytes)
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _named(folder: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the teacher cache in {folder} takes {size:,} bytes and cannot be written: "
            f"{error.strerror or error}",
        ) from error


def _refuse_other(folder: Path, made: dict[str, Any], asked: dict[str, Any]) -> None:
    other = [part for part in PARTS if made.get(part) != asked[part]]
    if "data" in other and "transform" in other:
        other.remove("transform")  # its pixels are of other pictures: nothing is known of it
    if other:
        shown = [*other, *(["hint"] if "transform" in other else [])]
        raise ValueError(
            f"the teacher cache in {folder} differs in {', '.join(other)}: it was made for "
            f"{ ({part: made.get(part) for part in shown}) }, asked for is { ({part: asked[part] for part in shown}) }. "
            "Its logits would not be what these teachers say of these pixels. Choose another folder, or delete "
            "it"
        )


def _fingerprint(view: ImageView) -> str:
    """Of the image column, row by row: encoded pictures by their bytes, paths by path, size and time of change."""
    digest = blake2b(digest_size=16)
    for value in tqdm(view.pictures, "pictures", len(view), leave=False, disable=None, delay=1.0):
        content = _content(value)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return f"{len(view)} rows, {digest.hexdigest()}"


def _content(value: Any) -> bytes:
    if isinstance(value, dict):  # HF Image
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        try:
            stat = os.stat(value)
        except OSError:
            return f"{value}: missing".encode()
        return f"{value}: {stat.st_size} {stat.st_mtime_ns}".encode()
    try:
        picture = decode_picture(value)
    except Exception:  # the view takes the next readable row
        return b"broken"
    return f"{picture.size}".encode() + picture.tobytes()


def _fixed_pixels(view: ImageView) -> str:
    """Hash of the pixels that the transform makes of some rows; refused where it draws, or makes others in another epoch."""
    digest = blake2b(digest_size=16)
    for row in sorted({round(k * (len(view) - 1) / 15) for k in range(16)}):
        picture = view.readable(row)[1]
        pixels = repeated(lambda picture=picture: view.transform(picture), view.seed, row)  # type: ignore[misc]
        if pixels is None:
            raise ValueError(
                f"the transform draws at random (row {row} of the data): {_hint(view)}. In each epoch it makes "
                "other pixels, and the cached logits would belong to another crop. Take one without randomness, "
                "or give the teachers to the Trainer"
            )
        digest.update(_bytes(pixels))
    return digest.hexdigest()


def _hint(view: ImageView) -> str:
    return " ".join(repr(view.transform).split())[:500]


def _identity(teacher: nn.Module, student: nn.Module | None) -> str:
    digest = blake2b(digest_size=16)
    digest.update(
        re.sub(r" at 0x[0-9a-f]+", "", repr(teacher)).encode()
    )  # an activation is not among the weights
    for name, value in [*teacher.state_dict().items(), *teacher.named_buffers()]:
        digest.update(name.encode())
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    sees = None if student is None else normalization(student)
    return f"{type(teacher).__name__} {digest.hexdigest()}, mean and std {normalization(teacher)}, of the pixels {sees}"


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().flatten()
    return f"{value.dtype} {list(value.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def _logits(
    teacher: nn.Module, adapt: nn.Module, pixels: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """What the teacher says of a batch, as the Trainer has it: float32 [B, C]."""
    parameter, device = next(teacher.parameters(), pixels), _device(teacher)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        return logits_of(teacher(adapt(pixels.to(device)).to(parameter.dtype))).float()


def _refuse_logits(
    said: list[Tensor], rows: range, shape: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    for k, logits in enumerate(said):
        if logits.shape != (len(rows), shape[2]):
            raise ValueError(
                f"teacher {k} gave logits {list(logits.shape)}, expected {[len(rows), shape[2]]}"
            )
        if logits.isnan().any():
            raise ValueError(
                f"teacher {k} said NaN of rows {rows.start} to {rows.stop - 1}: it would be cached for good; look at "
                f"its weights, and at dtype={dtype}"
            )


def _device(teacher: nn.Module) -> torch.device:
    return next(teacher.parameters(), torch.empty(0)).device


def _processes() -> tuple[int, int]:
    """Rank and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but there is no process group yet: each process would compute "
            "all logits, into the same files. Make the training arguments first, which start it"
        )
    return 0, 1


def _refuse_differing(key: dict[str, Any], world: int) -> None:
    keys: list[Any] = [key] * world
    if world > 1:
        dist.all_gather_object(keys, key)
    if other := [part for part in PARTS[1:] if any(k[part] != keys[0][part] for k in keys)]:
        raise ValueError(
            f"the processes differ in {', '.join(other)}: {[{p: k[p] for p in other} for k in keys]}; they would mix "
            "their logits in one cache"
        )


def _on_first(call: Callable[[], Any], world: int) -> Any:
    """What the first process makes of it, for all of them; its error is everybody's, or the others would wait for ever."""
    box: list[Any] = [None, None]
    if world == 1 or dist.get_rank() == 0:
        try:
            box[0] = call()
        except Exception as error:
            if world == 1:
                raise
            box[1] = error
    if world > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
