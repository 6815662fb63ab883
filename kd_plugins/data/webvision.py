"""WebVision 1.0 (and ILSVRC's validation set for the same classes) from disk, as an HF Dataset of paths and labels.

Layout under the root (Li et al., "WebVision Database", arXiv 1708.02862)::

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


def load_webvision(
    root: str | os.PathLike,
    split: str = "train",
    *,
    classes: int | Sequence[int] | None = 50,
    sources: Sequence[str] = ("google",),
    synsets: str | os.PathLike | None = None,
) -> Dataset:
    """A Dataset with columns `image` (absolute path) and `label` (ClassLabel, names like `n01440764 tench, ...`).

    A column `clean_label` is added where `info/train_cleanlist_<source>.txt` exists (see `write_webvision`); -1 there
    means a class that is not among `classes`. Pictures are not opened: `ImageView` deals with missing and broken ones.

    Args:
        root: WebVision's root; for split="imagenet" the folder that holds `val/<wnid>/*.JPEG`, or that `val` itself
            (a folder per class index instead of per wnid is fine too).
        split: "train", "val" or "imagenet".
        classes: the first so many classes (50 is Mini-WebVision), a sequence of class indices (they become
            0, 1, ... in that order), or None for all.
        sources: parts of the training set, of "google" and "flickr".
        synsets: the class list, by default `<root>/info/synsets.txt`. ILSVRC has none: without it, "imagenet" takes
            1,000 wnid folders in sorted order, which is the same order.

    Raises:
        FileNotFoundError: a list file or folder is not there. ValueError: a malformed line, a label outside.
    """
    root = Path(os.path.abspath(root))
    if split not in ("train", "val", "imagenet"):
        raise ValueError(f"split {split!r}: expected 'train', 'val' or 'imagenet'.")
    if split == "imagenet":
        names, table = _read_imagenet(root, synsets)
    else:
        names = _read_synsets(Path(synsets or root / "info" / "synsets.txt"))
        table = _read_lists(
            root, split, (sources,) if isinstance(sources, str) else tuple(sources), len(names)
        )
    if classes is not None:
        kept = (
            list(range(classes))
            if isinstance(classes, int | np.integer)
            else [int(c) for c in classes]
        )
        if not kept or min(kept) < 0 or max(kept) >= len(names) or len(set(kept)) < len(kept):
            raise ValueError(
                f"classes={classes!r}: expected distinct class indices, there are {len(names)} classes."
            )
        names = [names[c] for c in kept]
        table = table.filter(pc.is_in(table["label"], pa.array(kept)))
        for k, name in enumerate(table.column_names[1:], start=1):
            index = pc.index_in(table[name], pa.array(kept)).cast(pa.int64())
            table = table.set_column(k, name, pc.fill_null(index, -1))
    if not len(table):
        raise ValueError(f"No picture of split {split!r} under {root} is of the wanted classes.")
    labels = {name: ClassLabel(names=names) for name in table.column_names[1:]}
    features = Features({"image": Value("string"), **labels})
    # `Dataset(pa.Table)` takes the columns as they are: 2.4M rows in about a second, from_dict would need a minute.
    table = pa.Table.from_arrays(table.columns, schema=features.arrow_schema)
    info = DatasetInfo(dataset_name="webvision")
    return Dataset(
        table, info=info, split=NamedSplit("train" if split == "train" else "validation")
    )


def write_webvision(
    root: str | os.PathLike, train: tuple, val: tuple, names: Sequence[str]
) -> Path:
    """Write pictures as WebVision has them (JPEG, list files, one query per class) -> root.

    Args:
        root: folder to write to, made where needed; files of the same name are replaced.
        train: (images, labels) or (images, labels, clean labels). Images are uint8 arrays [H, W] or [H, W, 3], or PIL
            images; wrong labels are simply what the list file says, the clean ones go to a list file beside it.
        val: (images, labels).
        names: the C class names.
    """
    root = Path(root)
    (root / "info").mkdir(parents=True, exist_ok=True)
    (root / "val_images_256").mkdir(exist_ok=True)
    for part, parts in (("train", train), ("val", val)):
        for values in parts[1:]:
            if len(values) != len(parts[0]):
                raise ValueError(f"{part}: {len(parts[0])} images, but {len(values)} labels.")
            for n, value in enumerate(values):
                if not 0 <= value < len(names):
                    raise ValueError(
                        f"{part}: label {value} at position {n}, but there are {len(names)} names."
                    )
    synsets = [f"n{k + 1:08d} {name}" for k, name in enumerate(names)]
    queries = [f"{k + 1} {k + 1}" for k in range(len(names))]
    train_paths = [f"google/q{label + 1:04d}/{n + 1:08d}.jpg" for n, label in enumerate(train[1])]
    val_paths = [f"val{n + 1:06d}.jpg" for n in range(len(val[1]))]
    lists = {
        "synsets": synsets,
        "queries_synsets_map": queries,
        "val_filelist": _lines(val_paths, val[1]),
    }
    for name, labels in zip(("filelist", "cleanlist"), train[1:], strict=False):
        lists[f"train_{name}_google"] = _lines(train_paths, labels)
    for name, lines in lists.items():
        (root / "info" / f"{name}.txt").write_text(
            "".join(line + "\n" for line in lines), encoding="utf-8"
        )
    for k in set(train[1]):
        (root / "google" / f"q{k + 1:04d}").mkdir(parents=True, exist_ok=True)
    paths = [root / path for path in train_paths] + [
        root / "val_images_256" / path for path in val_paths
    ]
    for path, image in zip(paths, [*train[0], *val[0]], strict=True):
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        image.save(path, quality=95)
    return root


def _lines(paths: Sequence[str], labels: Sequence[int]) -> list[str]:
    return [f"{path} {label}" for path, label in zip(paths, labels, strict=True)]


def _read_synsets(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"No class list {path}. Expected WebVision's layout: info/synsets.txt and info/*_filelist*.txt under the "
            "root. It names the classes; without it labels could not be checked. (synsets=... points elsewhere.)"
        )
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_lists(root: Path, split: str, sources: Sequence[str], num_classes: int) -> pa.Table:
    """The list files of a split -> table of absolute path, label[, clean_label]."""
    if split == "val":
        folder = next((f for f in ("val_images_256", "val_images") if (root / f).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(
                f"No folder val_images_256 or val_images under {root}: the pictures of the val split."
            )
        return _read_list(root / "info" / "val_filelist.txt", root / folder, num_classes)
    if not sources or not set(sources) <= set(SOURCES) or len(set(sources)) < len(sources):
        raise ValueError(f"sources={sources!r}: expected distinct ones of {SOURCES}.")
    tables = [
        _read_list(root / "info" / f"train_filelist_{s}.txt", root, num_classes) for s in sources
    ]
    clean = [root / "info" / f"train_cleanlist_{s}.txt" for s in sources]
    if any(path.exists() for path in clean):
        for k, path in enumerate(clean):
            true = _read_list(path, root, num_classes)
            if not true["image"].equals(tables[k]["image"]):
                raise ValueError(
                    f"{path} does not list the pictures of train_filelist_{sources[k]}.txt in their order."
                )
            tables[k] = tables[k].append_column("clean_label", true["label"])
    return pa.concat_tables(tables)


def _read_list(path: Path, folder: Path, num_classes: int) -> pa.Table:
    """Lines of `<path> <label>` -> table of absolute path (string) and label (int64)."""
    if not path.is_file():
        raise FileNotFoundError(
            f"No list file {path}. Expected WebVision's layout: info/train_filelist_google.txt, "
            "info/train_filelist_flickr.txt and info/val_filelist.txt under the root, lines like "
            "`google/q0001/<id>.jpg 0`."
        )
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
    low_high = pc.min_max(table["label"]).as_py()
    if (
        low_high["min"] < 0
        or low_high["max"] >= num_classes
        or pc.min(pc.binary_length(table["image"])).as_py() == 0
    ):
        raise _bad_line(path, num_classes, f"labels from {low_high['min']} to {low_high['max']}")
    return table.set_column(
        0, "image", pc.binary_join_element_wise(f"{folder}{os.sep}", table["image"], "")
    )


def _bad_line(path: Path, num_classes: int, reason: str) -> ValueError:
    """The error that names the first bad line: a second, slow reading that only happens when the fast one failed."""
    number = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            name, _, label = line.rstrip("\r\n").partition(" ")
            if not line.strip():
                continue
            if not name or not label.removeprefix("-").isdecimal():
                return ValueError(
                    f"{path}, line {number}: {line.strip()!r}, expected `<path> <label>`."
                )
            if not 0 <= int(label) < num_classes:
                return ValueError(
                    f"{path}, line {number}: label {label}; {num_classes} classes go from 0."
                )
    return ValueError(
        f"{path}: {'no line in it' if not number else reason}; expected lines `<path> <label>`."
    )


def _read_imagenet(root: Path, synsets: str | os.PathLike | None) -> tuple[list[str], pa.Table]:
    """ILSVRC's validation folders -> class names, table of path and label."""
    root = root / "val" if (root / "val").is_dir() else root
    folders = (
        sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []
    )
    indexed = bool(folders) and all(name.isdecimal() for name in folders)
    if not indexed:
        folders = [name for name in folders if name[0] == "n" and name[1:].isdecimal()]
    if not folders:
        raise FileNotFoundError(
            f"No class folders in {root}. Expected val/<wnid>/*.JPEG (or a folder per class index): a flat "
            "val/ must be sorted into folders first."
        )
    if synsets is not None:
        names = _read_synsets(Path(synsets))
    elif len(folders) == 1000:
        names = [f"class {k}" for k in range(1000)] if indexed else folders
    else:
        raise ValueError(
            f"{len(folders)} class folders in {root}: fewer than 1,000 need synsets=<.../info/synsets.txt>."
        )
    number = {name.split()[0]: k for k, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for name in folders:
        label = int(name) if indexed else number.get(name, -1)
        if not 0 <= label < len(names):
            raise ValueError(f"Folder {name} in {root} is none of the {len(names)} classes.")
        files = sorted(e.path for e in os.scandir(root / name) if e.name.lower().endswith(SUFFIXES))
        paths += files
        labels += [label] * len(files)
    return names, pa.table(
        {"image": pa.array(paths, pa.string()), "label": pa.array(labels, pa.int64())}
    )
