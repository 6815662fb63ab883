"""Show suspects with their pictures: as a contact sheet, or as an HTML page to decide on."""

from __future__ import annotations

import base64
import json
import re
import warnings
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

from ..data.decode import NotAPicture, PictureColumn
from ..data.image_view import ImageView
from ..data.labels import column_array, label_column
from ..losses import validate
from .suspects import refuse_other_rows, refuse_row_numbers

SIDE, PAD, LINE, TOP = 176, 14, 23, 58  # of the contact sheet, in pixels
HEIGHT = SIDE + 2 * LINE + 2 * PAD  # of a suspect on it
INK, SOFT, HOLLOW, GIVEN, PROPOSED = "#1d2127", "#5c6470", "#e7e9ed", "#ae4a00", "#00619a"


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
    """Draw the first suspects as one PNG. The font comes from matplotlib.

    Each suspect is shown as a thumbnail with its score. The given label is struck out; the proposed
    label is blue. A picture that cannot be read is a grey box.

    Args:
        suspects: the result of :func:`find_suspects`.
        dataset: the data in which they were found: a `Dataset`, an `ImageView`, or a sequence of
            dict rows.
        path: the file to write.
        count: how many suspects to show.
        columns: how many of them in a row.
        image: the column of pictures, as in `ImageView`.
        label: the column of doubted labels. They must equal those of the suspects, otherwise the
            pictures would be of other rows. An `ImageView` knows its labels. Use None for rows
            without labels; the rows are then not compared.
    """
    rows, picture_of = _first(suspects, count), _pictures(suspects, dataset, image, label)
    fonts = {"plain": _font(16), "bold": _font(16, "-Bold"), "head": _font(22, "-Bold")}
    lines = -(-len(rows) // columns)
    size = (columns * (SIDE + PAD) + PAD, TOP + lines * HEIGHT)
    sheet = Image.new("RGB", size, "white")
    title = f"{len(rows)} of {len(suspects)} labels that are probably wrong, highest score first"
    title = _shorten(title, fonts["head"], sheet.width - 2 * PAD)
    ImageDraw.Draw(sheet).text((PAD, 16), title, font=fonts["head"], fill=INK)
    for k, row in enumerate(tqdm(rows, "thumbnails", leave=False, disable=None)):
        x, y = PAD + k % columns * (SIDE + PAD), TOP + k // columns * HEIGHT
        _draw_suspect(sheet, x, y, row, picture_of(row["index"]), fonts)
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
    """Write the first suspects as an HTML file, in which you filter, sort and decide.

    It saves the decisions as a CSV file for :func:`correct_labels` and :func:`drop_suspects`. The
    page opens from disk. It contains the thumbnails (96 px, about 4 KB each) and loads nothing; its
    content security policy forbids it to. Text from the data is never read as HTML.

    The arguments are those of :func:`contact_sheet`.
    """
    rows, picture_of = _first(suspects, count), _pictures(suspects, dataset, image, label)
    names = {row["label"]: row["given"] for row in rows}
    names |= {row["proposed"]: row["better"] for row in rows}
    scores = ("score", "p_label", "p_proposed")
    data = [
        [row["index"], row["label"], row["proposed"], *(round(row[k], 4) for k in scores)]
        for row in rows
    ]
    # The browser stores the decisions under this key.
    key = "kd_plugins/" + blake2b(json.dumps([title, data]).encode(), digest_size=8).hexdigest()
    for entry, row in zip(data, tqdm(rows, "thumbnails", leave=False, disable=None), strict=True):
        entry.append(_data_uri(picture_of(row["index"])))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(title, {"key": key, "names": names, "rows": data}), encoding="utf-8")
    return path


def write_suspects(
    suspects: Dataset,
    dataset: Any,
    folder: str | Path,
    *,
    count: int = 500,
    image: str = "image",
    label: str | None = "label",
) -> list[Path]:
    """Write suspects as a table (Parquet and CSV), an HTML page and a contact sheet.

    The arguments are those of :func:`html_page`. Without matplotlib there is no contact sheet, and a
    warning says so. Returns the paths.
    """
    folder = Path(folder)
    columns: dict[str, Any] = {"image": image, "label": label}
    paths = [html_page(suspects, dataset, folder / "suspects.html", count=count, **columns)]
    paths += [folder / "suspects.parquet", folder / "suspects.csv"]
    suspects.to_parquet(paths[1])
    suspects.to_csv(paths[2])
    try:
        paths.append(contact_sheet(suspects, dataset, folder / "suspects.png", **columns))
    except ImportError as error:
        warnings.warn(str(error), stacklevel=2)
    return paths


def _first(suspects: Dataset, count: int) -> list[dict[str, Any]]:
    """The first suspects as rows, with the names of their classes under `given` and `better`."""
    validate.count("count", count, "nothing would be shown")
    doubted = column_array(suspects, "label") != column_array(suspects, "proposed")
    shown = suspects.select(np.flatnonzero(doubted)[:count])
    rows: Any = shown.with_format(None).to_list()
    for row in rows:
        for key, name in (("label", "given"), ("proposed", "better")):
            row[name] = " ".join(str(row.get(f"{key}_name", row[key])).split())
    return rows


def _pictures(
    suspects: Dataset, dataset: Any, image: str, label: str | None
) -> Callable[[int], Image.Image | None]:
    """A function from a row to its picture in RGB, or to None if it cannot be read."""
    if label is None:
        refuse_row_numbers(column_array(suspects, "index"), len(dataset))
    else:
        refuse_other_rows(suspects, *_labels(dataset, label))
    column = dataset.pictures if isinstance(dataset, ImageView) else PictureColumn(dataset, image)

    def picture_of(row: int) -> Image.Image | None:
        try:
            return column.picture(row, column.read([row])[0])
        except NotAPicture:
            raise
        except Exception:  # PIL's plugins raise nearly anything for broken files
            return None

    return picture_of


def _labels(dataset: Any, label: str) -> tuple[np.ndarray, str]:
    """The labels of all rows [N], and where they come from."""
    if isinstance(dataset, ImageView):
        return dataset.labels, "the view"
    return label_column(dataset, label), f"column {label!r}"


def _draw_suspect(
    sheet: Image.Image,
    x: int,
    y: int,
    row: dict[str, Any],
    picture: Image.Image | None,
    fonts: dict[str, ImageFont.FreeTypeFont],
) -> None:
    """Draw one suspect with its top left corner at (x, y)."""
    draw, plain, bold = ImageDraw.Draw(sheet), fonts["plain"], fonts["bold"]
    draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill=HOLLOW)
    if picture is None:
        centre = (x + SIDE / 2, y + SIDE / 2)
        draw.text(centre, "no picture", font=plain, fill=SOFT, anchor="mm")
    else:
        small = _fit(picture, SIDE, enlarge=True)
        sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
    y += SIDE + 5
    score = f"{row['score']:.3f}"
    given = _shorten(row["given"], plain, SIDE - plain.getlength(score) - 8)
    draw.text((x, y), given, font=plain, fill=GIVEN)
    draw.line((x, y + 11, x + plain.getlength(given), y + 11), fill=GIVEN)
    draw.text((x + SIDE, y), score, font=plain, fill=SOFT, anchor="ra")
    proposed = _shorten(f"→ {row['better']}", bold, SIDE)
    draw.text((x, y + LINE), proposed, font=bold, fill=PROPOSED)


def _page(title: str, data: dict[str, Any]) -> str:
    """The HTML of the page."""
    page = files("kd_plugins.audit").joinpath("gallery.html").read_text(encoding="utf-8")
    # The policy allows only this style, this script and pictures inside the file. Even if text of
    # the data were read as HTML, nothing in it could run.
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(page, 'style')}; "
        f"script-src {_digest(page, 'script')}; base-uri 'none'; form-action 'none'"
    )
    # Without "<" the data cannot end their element. json escapes all characters beyond ASCII.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    fill = {"POLICY": policy, "TITLE": escape(title), "DATA": text}
    # All in one pass, because the title may contain "@DATA@".
    return re.sub("@(POLICY|TITLE|DATA)@", lambda match: fill[match[1]], page)


def _digest(page: str, tag: str) -> str:
    """The hash with which a policy allows the content of the element `tag` without attributes."""
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"


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


def _fit(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    scale = side / max(picture.size)
    scale = scale if enlarge else min(scale, 1.0)
    width, height = (max(1, round(scale * n)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the contact sheet needs matplotlib: pip install kd-plugins[recipes]"
        ) from error
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{style}.ttf")
    return ImageFont.truetype(str(path), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """The text, or as much of it as fits into the room, with an ellipsis."""
    if font.getlength(text) <= room:
        return text
    text = text[:200]  # measuring is slow
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"
