"""WebVision 1.0, and ILSVRC's validation set for its classes, as data sets of paths and labels.

Layout under the root (Li et al., "WebVision Database: visual learning and understanding from web
data", arXiv 1708.02862)::

    info/synsets.txt                    line k: `n01440764 tench, Tinca tinca`, class k - 1
    info/train_filelist_<source>.txt    `google/q0001/<id>.jpg 0`: path from the root, 0-based label
    info/val_filelist.txt               `val000001.jpg 0`: name only
    google/qNNNN/  flickr/qNNNN/  val_images_256/ (or val_images/)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features, NamedSplit, Value
from PIL import Image
from pyarrow import csv

SOURCES = ("google", "flickr")
SUFFIXES = (".jpeg", ".jpg", ".png")
LAYOUT = "Expected WebVision's layout: info/synsets.txt and info/*_filelist*.txt under the root"


def load_webvision(
    root: str | os.PathLike,
    split: str = "train",
    *,
    classes: int | Sequence[int] | None = 50,
    sources: Sequence[str] = ("google",),
    synsets: str | os.PathLike | None = None,
) -> Dataset:
    """A `Dataset` with the columns `image` (absolute path) and `label` (`n01440764 tench, ...`).

    If `info/train_cleanlist_<source>.txt` exists (see `write_webvision`), there is a column
    `clean_label`, with -1 for a class that is not among `classes`. Pictures are not opened:
    `ImageView` handles missing and broken ones.

    Args:
        root: WebVision's root. For split="imagenet": the folder with `val/<wnid>/*.JPEG`, or that
            `val`. Its folders may also be called by class index.
        split: "train", "val" or "imagenet".
        classes: the number of classes to keep (50 is Mini-WebVision), or the class indices to keep,
            which become 0, 1, ... in that order, or None for all.
        sources: parts of the training set, of "google" and "flickr".
        synsets: the class list, by default `<root>/info/synsets.txt`. ILSVRC has none: there the
            default is its 1,000 wnids in sorted order, which is the same order.

    Raises:
        FileNotFoundError: a list or a folder is missing.
        ValueError: a malformed line, or a label outside the classes.
    """
    root = Path(os.path.abspath(root))
    if split not in ("train", "val", "imagenet"):
        raise ValueError(f"split {split!r}: expected 'train', 'val' or 'imagenet'")
    if split == "imagenet":
        names, table = _read_imagenet(root, synsets)
    else:
        names = _read_synsets(Path(synsets or root / "info" / "synsets.txt"))
        read = _read_val if split == "val" else _read_train
        table = read(root, (sources,) if isinstance(sources, str) else tuple(sources), len(names))
    if classes is not None:
        names, table = _choose_classes(classes, names, table)
    if not len(table):
        raise ValueError(f"No picture of split {split!r} under {root} is of the wanted classes")
    labels = {name: ClassLabel(names=names) for name in table.column_names[1:]}
    schema = Features({"image": Value("string"), **labels}).arrow_schema
    # 2.4M rows take a second in this way, and a minute through from_dict.
    return Dataset(
        pa.Table.from_arrays(table.columns, schema=schema),
        info=DatasetInfo(dataset_name="webvision"),
        split=NamedSplit("train" if split == "train" else "validation"),
    )


def write_webvision(
    root: str | os.PathLike, train: tuple, val: tuple, names: Sequence[str]
) -> Path:
    """Write pictures in WebVision's layout (JPEG, list files, one query per class) -> root.

    Args:
        root: the folder, created if needed; files of the same name are replaced.
        train: (images, labels) or (images, labels, clean labels). Images are uint8 arrays [H, W] or
            [H, W, 3], or PIL images. Clean labels go to a list of their own.
        val: (images, labels).
        names: the C class names.
    """
    root = Path(root)
    _check_part("train", train, len(names))
    _check_part("val", val, len(names))
    train_paths = [f"google/q{label + 1:04d}/{n + 1:08d}.jpg" for n, label in enumerate(train[1])]
    val_paths = [f"val{n + 1:06d}.jpg" for n in range(len(val[1]))]
    lists = {
        "synsets": [f"n{k + 1:08d} {name}" for k, name in enumerate(names)],
        "queries_synsets_map": [f"{k + 1} {k + 1}" for k in range(len(names))],
        "train_filelist_google": _lines(train_paths, train[1]),
        "val_filelist": _lines(val_paths, val[1]),
    }
    if len(train) > 2:
        lists["train_cleanlist_google"] = _lines(train_paths, train[2])
    (root / "info").mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        text = "".join(line + "\n" for line in lines)
        (root / "info" / f"{name}.txt").write_text(text, encoding="utf-8")
    paths = [*train_paths, *(f"val_images_256/{path}" for path in val_paths)]
    for path, image in zip(paths, [*train[0], *val[0]], strict=True):
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path, quality=95)
    return root


def _check_part(part: str, parts: tuple, num_classes: int) -> None:
    for labels in parts[1:]:
        if len(labels) != len(parts[0]):
            raise ValueError(f"{part}: {len(parts[0])} images, but {len(labels)} labels")
        if bad := [n for n, label in enumerate(labels) if not 0 <= label < num_classes]:
            raise ValueError(
                f"{part}: label {labels[bad[0]]} at position {bad[0]}, but there are {num_classes} "
                "names"
            )


def _lines(paths: Sequence[str], labels: Sequence[int]) -> list[str]:
    return [f"{path} {label}" for path, label in zip(paths, labels, strict=True)]


def _choose_classes(
    classes: int | Sequence[int], names: list[str], table: pa.Table
) -> tuple[list[str], pa.Table]:
    """The names and rows of some classes, numbered 0, 1, ..."""
    wanted = range(classes) if isinstance(classes, int | np.integer) else classes
    kept = [int(k) for k in wanted]
    if not kept or min(kept) < 0 or max(kept) >= len(names) or len(set(kept)) < len(kept):
        raise ValueError(
            f"classes={classes!r}: expected distinct class indices, there are {len(names)} classes"
        )
    table = table.filter(pc.is_in(table["label"], pa.array(kept)))
    for k, name in enumerate(table.column_names[1:], start=1):
        index = pc.index_in(table[name], pa.array(kept)).cast(pa.int64())
        table = table.set_column(k, name, pc.fill_null(index, -1))
    return [names[k] for k in kept], table


def _read_synsets(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"No class list {path}. {LAYOUT}; without the class list labels cannot be checked "
            "(synsets=... reads another one)"
        )
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_val(root: Path, sources: Sequence[str], num_classes: int) -> pa.Table:
    folders = [root / name for name in ("val_images_256", "val_images") if (root / name).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"No folder val_images_256 or val_images under {root}: the pictures of the val split"
        )
    return _read_list(root / "info" / "val_filelist.txt", folders[0], num_classes)


def _read_train(root: Path, sources: Sequence[str], num_classes: int) -> pa.Table:
    """The lists of the training set -> table of absolute path, label[, clean_label]."""
    if not sources or not set(sources) <= set(SOURCES) or len(set(sources)) < len(sources):
        raise ValueError(f"sources={sources!r}: expected distinct ones of {SOURCES}")
    lists = [root / "info" / f"train_filelist_{source}.txt" for source in sources]
    clean = [root / "info" / f"train_cleanlist_{source}.txt" for source in sources]
    tables = [_read_list(path, root, num_classes) for path in lists]
    if any(path.exists() for path in clean):
        for k, path in enumerate(clean):
            true = _read_list(path, root, num_classes)
            if not true["image"].equals(tables[k]["image"]):
                raise ValueError(f"{path} does not list the pictures of {lists[k].name} in order")
            tables[k] = tables[k].append_column("clean_label", true["label"])
    return pa.concat_tables(tables)


def _read_list(path: Path, folder: Path, num_classes: int) -> pa.Table:
    """Lines `<path> <label>` -> table of absolute path (string) and label (int64)."""
    if not path.is_file():
        raise FileNotFoundError(f"No list file {path}. {LAYOUT}, lines `google/q0001/<id>.jpg 0`")
    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=["image", "label"]),
            parse_options=csv.ParseOptions(delimiter=" ", quote_char=False),
            convert_options=csv.ConvertOptions(
                column_types={"image": pa.string(), "label": pa.int64()},
                null_values=[],
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise _bad_line(path, num_classes, str(error)) from None
    low, high = pc.min_max(table["label"]).as_py().values()
    if low < 0 or high >= num_classes or pc.min(pc.binary_length(table["image"])).as_py() == 0:
        raise _bad_line(path, num_classes, f"labels from {low} to {high}")
    paths = pc.binary_join_element_wise(f"{folder}{os.sep}", table["image"], "")
    return table.set_column(0, "image", paths)


def _bad_line(path: Path, num_classes: int, reason: str) -> ValueError:
    """An error that names the first bad line. It reads the list again, slowly."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        name, _, label = line.rstrip("\r").partition(" ")
        if not line.strip():
            continue
        if not name or not label.removeprefix("-").isdecimal():
            why = f"{line.strip()!r}, expected `<path> <label>`"
        elif not 0 <= int(label) < num_classes:
            why = f"label {label}; {num_classes} classes go from 0"
        else:
            continue
        return ValueError(f"{path}, line {number}: {why}")
    reason = reason if any(lines) else "no line in it"
    return ValueError(f"{path}: {reason}; expected lines `<path> <label>`")


def _read_imagenet(root: Path, synsets: str | os.PathLike | None) -> tuple[list[str], pa.Table]:
    """ILSVRC's validation folders -> class names, table of path and label."""
    root = root / "val" if (root / "val").is_dir() else root
    folders = sorted(path.name for path in root.glob("*") if path.is_dir())
    indexed = bool(folders) and all(name.isdecimal() for name in folders)
    if not indexed:
        folders = [name for name in folders if name[0] == "n" and name[1:].isdecimal()]
    if not folders:
        raise FileNotFoundError(
            f"No class folders in {root}. Expected val/<wnid>/*.JPEG (or a folder per class "
            "index): sort a flat val/ into folders first"
        )
    if synsets is not None:
        names = _read_synsets(Path(synsets))
    elif len(folders) == 1000:
        names = [str(k) for k in range(1000)] if indexed else folders
    else:
        raise ValueError(
            f"{len(folders)} class folders in {root}: fewer than 1,000 need "
            "synsets=<.../info/synsets.txt>"
        )
    number = {name.split()[0]: k for k, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for name in folders:
        label = int(name) if indexed else number.get(name, -1)
        if not 0 <= label < len(names):
            raise ValueError(f"Folder {name} in {root} is none of the {len(names)} classes")
        files = sorted(e.path for e in os.scandir(root / name) if e.name.lower().endswith(SUFFIXES))
        paths += files
        labels += [label] * len(files)
    columns = {"image": pa.array(paths, pa.string()), "label": pa.array(labels, pa.int64())}
    return names, pa.table(columns)
