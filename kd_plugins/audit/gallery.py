"""Suspects as pictures: a contact sheet and an HTML page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from hashlib import blake2b, sha256
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from ..data.image_view import _KINDS, ImageView, _decode
from ..data.noise import column_array
from .suspects import refuse_other_rows, refuse_row_numbers


def contact_sheet(
    suspects: Dataset,
    dataset: Any,
    path: str | Path,
    *,
    count: int = 40,
    columns: int = 8,
    image: str = "image",
    label: str | None = "label",
) -> Path:
    """The first suspects as one PNG: thumbnail, score, given label struck out, proposed label. Needs matplotlib, for its font.

    Args:
        suspects: :func:`find_suspects`.
        dataset: where their rows are: a `Dataset`, an `ImageView`, or a sequence of dict rows. A picture that cannot be
            read is a grey box.
        path: of the PNG.
        count: how many suspects.
        columns: how many beside each other.
        image: column of pictures, as in `ImageView`.
        label: column of the doubted labels, which must be those of the suspects: else the pictures
            are of other rows. An `ImageView` is compared by the labels that it has. None where
            the rows have no labels: nothing is compared.
    """
    rows, picture_of = _first(suspects, count), _pictures(suspects, dataset, image, label)
    side, pad, line = 176, 14, 23
    plain, bold, head = _font(16), _font(16, "-Bold"), _font(22, "-Bold")
    lines = -(-len(rows) // columns)
    sheet = Image.new(
        "RGB", (columns * (side + pad) + pad, 58 + lines * (side + 2 * line + 2 * pad)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    title = f"{len(rows)} of {len(suspects)} labels that are probably wrong, most suspicious first"
    draw.text((pad, 16), _shorten(title, head, sheet.width - 2 * pad), font=head, fill=INK)
    for k, row in enumerate(tqdm(rows, "thumbnails", leave=False, disable=None)):
        x, y = pad + k % columns * (side + pad), 58 + k // columns * (side + 2 * line + 2 * pad)
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=HOLLOW)
        picture = picture_of(row["index"])
        if picture is None:
            draw.text(
                (x + side / 2, y + side / 2), "no picture", font=plain, fill=SOFT, anchor="mm"
            )
        else:
            thumbnail = _fit(picture, side, enlarge=True)
            sheet.paste(
                thumbnail, (x + (side - thumbnail.width) // 2, y + (side - thumbnail.height) // 2)
            )
        y += side + 5
        score = f"{row['score']:.3f}"
        room = side - plain.getlength(score) - 8
        given, proposed = (
            _shorten(row["given"], plain, room),
            _shorten(f"→ {row['better']}", bold, side),
        )
        draw.text((x, y), given, font=plain, fill=GIVEN)
        draw.line((x, y + 11, x + plain.getlength(given), y + 11), fill=GIVEN)
        draw.text((x + side, y), score, font=plain, fill=SOFT, anchor="ra")
        draw.text((x, y + line), proposed, font=bold, fill=PROPOSED)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def html_page(
    suspects: Dataset,
    dataset: Any,
    path: str | Path,
    *,
    count: int = 500,
    image: str = "image",
    label: str | None = "label",
    title: str = "Labels that are probably wrong",
) -> Path:
    """The first suspects as one HTML file that opens from disk: to filter, to sort, to decide on, decisions as CSV.

    The file holds the thumbnails (96 px, about 4 KB each) and loads nothing; its policy forbids it to. What comes from
    the data is shown as text only. Arguments as of :func:`contact_sheet`.
    """
    rows, picture_of = _first(suspects, count), _pictures(suspects, dataset, image, label)
    names = {
        row[key]: row[name]
        for row in rows
        for key, name in (("label", "given"), ("proposed", "better"))
    }
    data = [
        [
            row["index"],
            row["label"],
            row["proposed"],
            *(round(row[k], 4) for k in ("score", "p_label", "p_proposed")),
        ]
        for row in rows
    ]
    key = "kd_plugins/" + blake2b(json.dumps([title, data]).encode(), digest_size=8).hexdigest()
    for entry, row in zip(data, tqdm(rows, "thumbnails", leave=False, disable=None), strict=True):
        entry.append(_data_uri(picture_of(row["index"])))
    page = files("kd_plugins.audit").joinpath("gallery.html").read_text(encoding="utf-8")
    style, script = (_digest(page, tag) for tag in ("style", "script"))
    fill = {
        # nothing but this style, this script and pictures within the file: an error in the escaping would run nothing
        "POLICY": f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'",
        "TITLE": escape(title),
        # no "<" can end the element that holds it; all beyond ASCII is escaped
        "DATA": json.dumps(
            {"key": key, "names": names, "rows": data}, separators=(",", ":")
        ).replace("<", "\\u003c"),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = re.sub(
        "@(POLICY|TITLE|DATA)@", lambda match: fill[match[1]], page
    )  # in one pass: a title may hold "@DATA@"
    path.write_text(page, encoding="utf-8")
    return path


INK, SOFT, HOLLOW, GIVEN, PROPOSED = "#1d2127", "#5c6470", "#e7e9ed", "#ae4a00", "#00619a"


def _first(suspects: Dataset, count: int) -> list[dict[str, Any]]:
    """The first suspects as rows, with the names of their classes under `given` and `better`."""
    if count < 1:
        raise ValueError(f"count={count}: expected at least 1 suspect to show")
    doubted = np.flatnonzero(column_array(suspects, "label") != column_array(suspects, "proposed"))[
        :count
    ]
    rows: Any = suspects.select(doubted).with_format(None).to_list()
    for row in rows:
        for key, name in (("label", "given"), ("proposed", "better")):
            row[name] = " ".join(str(row.get(f"{key}_name", row[key])).split())
    return rows


def _pictures(
    suspects: Dataset, dataset: Any, image: str, label: str | None
) -> Callable[[int], Image.Image | None]:
    """Row of the data set -> its picture in RGB, None if it cannot be read."""
    if label is None:
        refuse_row_numbers(column_array(suspects, "index"), len(dataset))
    else:
        refuse_other_rows(suspects, *_labels(dataset, label))
    value_of: Callable[[int], Any]
    if isinstance(dataset, ImageView):
        value_of = lambda row: dataset._values([row])[0]  # noqa: E731
    elif isinstance(dataset, Dataset):
        if image not in dataset.column_names:
            raise ValueError(f"No column {image!r}; there are {dataset.column_names}.")
        table = dataset.with_format("arrow", columns=[image])  # not decoded
        value_of = lambda row: table[row][image][0].as_py()  # noqa: E731
    else:
        value_of = lambda row: dataset[row][image]  # noqa: E731

    def picture_of(row: int) -> Image.Image | None:
        value = value_of(row)
        if not isinstance(value, _KINDS):
            raise TypeError(
                f"Column {image!r} holds {type(value).__name__}: expected picture, path or array."
            )
        try:
            return _decode(value)
        except Exception:  # as in ImageView: PIL's plugins raise nearly anything on broken files
            return None

    return picture_of


def _labels(dataset: Any, label: str) -> tuple[np.ndarray, str]:
    """The labels of all rows [N], and where they are from."""
    if isinstance(dataset, ImageView):
        return dataset.labels, "the view"
    name = f"column {label!r}"
    if isinstance(dataset, Dataset):
        return column_array(dataset, label), name
    if len(dataset) and label not in dataset[0]:
        raise ValueError(
            f"the rows have no {name}: name the column of labels, or say label=None to show the "
            "pictures without comparing"
        )
    return np.array([row[label] for row in dataset]), name


def _fit(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    scale = side / max(picture.size)
    scale = scale if enlarge else min(scale, 1.0)
    width, height = (max(1, round(scale * n)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _data_uri(picture: Image.Image | None) -> str | None:
    """A thumbnail as JPEG or PNG, whichever is smaller."""
    if picture is None:
        return None
    thumbnail = _fit(picture, 96)
    thumbnail.info = {}  # a colour profile may be larger than the picture
    encoded = {}
    for kind, settings in (("jpeg", {"quality": 82}), ("png", {"optimize": True})):
        thumbnail.save(buffer := BytesIO(), kind, **settings)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def _digest(page: str, tag: str) -> str:
    """The hash by which a policy allows the content of the bare element `tag`."""
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"


def _font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the contact sheet needs matplotlib: pip install kd-plugins[recipes]"
        ) from error
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{style}.ttf")), size
    )


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    text = text[:200]  # measuring is slow
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"
