"""The HTML page on which suspects are decided."""

from __future__ import annotations

import base64
import json
import math
import re
from hashlib import blake2b, sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from .decisions import data_signature, refuse_row_numbers
from .gallery_rows import labels_of, pictures_of, shown_rows, thumbnail

SIDE, NEAR = 96, 40  # of thumbnails, and of neighbours, in pixels
NEIGHBOURS = 4  # shown on a card
SCORES = ("score", "p_label", "p_proposed")
PARTS = ("gallery.html", "gallery.css", "gallery_cards.js", "gallery.js")


def html_page(
    suspects: Dataset,
    dataset: Any,
    path: str | Path,
    *,
    count: int = 5000,
    image: str = "image",
    label: str | None = "label",
    title: str = "Labels that are probably wrong",
) -> Path:
    """Write the first suspects as an HTML file, in which you filter, sort and decide.

    It saves the decisions as a CSV file for :func:`apply_decisions`. The page opens from disk. It
    contains the thumbnails (WebP, up to 96 px) and loads nothing; its content security policy
    forbids it to. Text from the data is never read as HTML. It draws only what is on the screen, so
    20,000 suspects are as quick as 200.

    The arguments are those of :func:`contact_sheet`. If the suspects have a column ``neighbours``
    (for each a list of rows of the data set), a card also shows the first four of them. Each
    picture is in the page once. A card names the file of its picture if the suspects have
    the column `file`; see :func:`with_files`.
    """
    picture_of = pictures_of(suspects, dataset, image, label)
    rows = shown_rows(suspects, count)
    labels = None if label is None else labels_of(dataset, label)[0]
    table = [
        [row["index"], row["label"], row["proposed"], *(_rounded(row[k]) for k in SCORES)]
        for row in rows
    ]
    # The browser stores the decisions under this key.
    key = "kd_plugins/" + blake2b(json.dumps([title, table]).encode(), digest_size=8).hexdigest()
    bar = tqdm(rows, "thumbnails", leave=False, disable=None)
    content = {
        "key": key,
        "data": data_signature(len(dataset), labels),
        "names": _class_names(rows, dataset, label),
        "rows": table,
        "files": [row.get("file") for row in rows],
        "pictures": [thumbnail(picture_of(row["index"]), SIDE) for row in bar],
    }
    if labels is not None and "neighbours" in suspects.column_names:
        near = [[int(k) for k in (row["neighbours"] or ())][:NEIGHBOURS] for row in rows]
        for entry, neighbours in zip(table, near, strict=True):
            entry.append(neighbours)
        shown = {k for neighbours in near for k in neighbours}
        refuse_row_numbers(np.array(sorted(shown), np.int64), len(dataset))
        others = sorted(shown - {row["index"] for row in rows})  # those have their thumbnail
        bar = tqdm(others, "neighbours", leave=False, disable=None)
        content["small"] = {k: [int(labels[k]), thumbnail(picture_of(k), NEAR)] for k in bar}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(title, content), encoding="utf-8")
    return path


def _class_names(rows: list[dict[str, Any]], dataset: Any, label: str | None) -> dict[int, str]:
    """The name of each class: those of the data, and those that the suspects give."""
    feature = getattr(dataset, "features", {}).get(label)
    known = getattr(dataset, "class_names", None) or getattr(feature, "names", None) or []
    names = {k: " ".join(str(name).split()) for k, name in enumerate(known)}
    names |= {row["label"]: row["given"] for row in rows}
    return names | {row["proposed"]: row["better"] for row in rows}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)  # JSON has no NaN


def _page(title: str, content: dict[str, Any]) -> str:
    """The HTML of the page."""
    folder = files("kd_plugins.audit")
    page, style, *scripts = (folder.joinpath(name).read_text(encoding="utf-8") for name in PARTS)
    script = "".join(scripts)
    # The policy allows only this style, this script and pictures inside the file. Even if text of
    # the data were read as HTML, nothing in it could run.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; "
        f"script-src {_digest(script)}; base-uri 'none'; form-action 'none'"
    )
    # Without "<" the data cannot end their element. json escapes all characters beyond ASCII.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    fill = {"POLICY": policy, "TITLE": escape(title), "DATA": text}
    fill |= {"STYLE": style, "SCRIPT": script}
    # All in one pass, because the title may contain "@DATA@".
    return re.sub("@(POLICY|TITLE|DATA|STYLE|SCRIPT)@", lambda match: fill[match[1]], page)


def _digest(content: str) -> str:
    """The hash with which a policy allows a script or a style."""
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"
