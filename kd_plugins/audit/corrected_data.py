"""Write a data set after decisions, beside files that tell what was changed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import Dataset

from ..data.labels import column_array
from ..data.parquet_files import write_parquet
from .corrections import apply_decisions
from .decisions import NO_CLASS, changes_of, data_signature, read_decisions
from .file_names import file_names


def write_corrected(
    splits: Mapping[str, Dataset],
    decisions: str | Path,
    folder: str | Path,
    *,
    split: str = "train",
    how: str = "correct",
    weight: float = 0.1,
    label: str = "label",
    source: str = "",
    image: str = "image",
) -> dict[str, int]:
    """Apply decisions to one split, and write all splits as Parquet, complete or not at all.

    Beside the data are ``changes.csv`` (row, file, label before and after, decision),
    ``provenance.json`` (which decisions, which data, how) and a copy of the decisions.

    Args:
        splits: the splits of the data set.
        decisions: the CSV file of the page.
        folder: the folder to create.
        split: the split in which the suspects were found.
        how, weight, label: see :func:`apply_decisions`.
        source: where the data come from, for ``provenance.json``; files below it are given
            relative to it.
        image: the column of pictures, whose files are named.

    Returns:
        The number of rows ``before`` and ``after``, and of those ``changed``, by name.

    Raises:
        ValueError: the folder exists and is not empty; and what :func:`apply_decisions` raises.
    """
    folder = Path(folder)
    _refuse_full(folder)
    table, rows = read_decisions(decisions), splits[split]
    settings: dict[str, Any] = {"how": how, "weight": weight, "label": label}
    applied = apply_decisions(rows, table, **settings)
    # `load_dataset` expects the same columns in all splits.
    others = {
        name: apply_decisions(part, table.select([]), **settings)
        for name, part in splits.items()
        if name != split and label in part.column_names
    }
    part = folder.with_name(f"{folder.name}.{uuid4().hex}.part")
    try:
        write_parquet({**splits, **others, split: applied}, part)
        lines, files = _lines(rows, table, how, label), None
        if image in rows.column_names:
            files = file_names(rows, [line[0] for line in lines], image, source or None)
        _write_changes(lines, files, part / "changes.csv")
        figures = {"before": len(rows), "after": len(applied), "changed": len(lines)}
        told: dict[str, Any] = {"data": source, "split": split, "label": label, "how": how}
        told |= {"weight": weight} if how == "weight" else {}
        told |= {"data_before": _signature(rows, label), "data_after": _signature(applied, label)}
        _write_provenance(part, decisions, told | figures)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return figures


def _refuse_full(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name a new folder, so that nothing is mixed up")


def _write_provenance(folder: Path, decisions: str | Path, told: dict[str, Any]) -> None:
    """Write which decisions were applied, and ``told``."""
    content = Path(decisions).read_bytes()
    (folder / "decisions.csv").write_bytes(content)
    by = {"decisions": Path(decisions).name, "decisions_sha256": sha256(content).hexdigest()}
    whole = {"kd_plugins": version("kd-plugins")} | by | told
    (folder / "provenance.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


def _lines(rows: Dataset, decisions: Dataset, how: str, label: str) -> list[list[Any]]:
    """Row, label and name before and after, decision and what was done, of each change."""
    names = getattr(rows.features[label], "names", None)
    decided = dict(zip(decisions["index"][:], decisions["decision"][:], strict=True))
    changes = changes_of(decisions, rows, label)
    lines: list[list[Any]] = []
    for row, given, new in zip(*(values.tolist() for values in changes), strict=True):
        done = {"correct": "corrected", "drop": "dropped", "weight": "weighted"}[how]
        to = ["", ""]
        if new != NO_CLASS:
            to = [new, names[new] if names else ""]
        elif how == "correct":
            done = "dropped"
        before = [row, given, names[given] if names else ""]
        lines.append([*before, *to, decided[row], done])
    return lines


def _write_changes(lines: list[list[Any]], files: Any, path: Path) -> None:
    """Write a line for each row that was changed, with the file of its picture if there is one."""
    head = ["row", "from", "from_name", "to", "to_name", "decision", "done"]
    if files is not None:
        head.insert(1, "file")
        for line, file in zip(lines, files.to_pylist(), strict=True):
            line.insert(1, file)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *lines])


def _signature(rows: Dataset, label: str) -> str:
    return data_signature(len(rows), column_array(rows, label))
