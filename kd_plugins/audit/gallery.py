"""Show suspects with their pictures: as a contact sheet, and in all forms at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from .file_names import with_files
from .gallery_page import html_page
from .gallery_rows import doubted, fit, pictures_of, shown_rows

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
    rows, picture_of = shown_rows(suspects, count), pictures_of(suspects, dataset, image, label)
    fonts = {"plain": _font(16), "bold": _font(16, "-Bold"), "head": _font(22, "-Bold")}
    lines = -(-len(rows) // columns)
    size = (columns * (SIDE + PAD) + PAD, TOP + lines * HEIGHT)
    sheet = Image.new("RGB", size, "white")
    number = len(doubted(suspects))
    title = f"{len(rows)} of {number} labels that are probably wrong, highest score first"
    title = _shorten(title, fonts["head"], sheet.width - 2 * PAD)
    ImageDraw.Draw(sheet).text((PAD, 16), title, font=fonts["head"], fill=INK)
    for k, row in enumerate(tqdm(rows, "thumbnails", leave=False, disable=None)):
        x, y = PAD + k % columns * (SIDE + PAD), TOP + k // columns * HEIGHT
        _draw_suspect(sheet, x, y, row, picture_of(row["index"]), fonts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def write_suspects(
    suspects: Dataset,
    dataset: Any,
    folder: str | Path,
    *,
    count: int = 5000,
    image: str = "image",
    label: str | None = "label",
) -> list[Path]:
    """Write suspects as a table (Parquet and CSV), an HTML page and a contact sheet.

    The arguments are those of :func:`html_page`. The table has a column `file` if the pictures have
    one; see :func:`with_files`. Without matplotlib there is no contact sheet, and a warning says
    so. Returns the paths.
    """
    folder = Path(folder)
    columns: dict[str, Any] = {"image": image, "label": label}
    suspects = with_files(suspects, dataset, image)
    paths = [html_page(suspects, dataset, folder / "suspects.html", count=count, **columns)]
    paths += [folder / "suspects.parquet", folder / "suspects.csv"]
    suspects.to_parquet(paths[1])
    suspects.to_csv(paths[2])
    try:
        paths.append(contact_sheet(suspects, dataset, folder / "suspects.png", **columns))
    except ImportError as error:
        warnings.warn(str(error), stacklevel=2)
    return paths


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
        small = fit(picture, SIDE, enlarge=True)
        sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
    y += SIDE + 5
    score = f"{row['score']:.3f}"
    given = _shorten(row["given"], plain, SIDE - plain.getlength(score) - 8)
    draw.text((x, y), given, font=plain, fill=GIVEN)
    draw.line((x, y + 11, x + plain.getlength(given), y + 11), fill=GIVEN)
    draw.text((x + SIDE, y), score, font=plain, fill=SOFT, anchor="ra")
    proposed = _shorten(f"→ {row['better']}", bold, SIDE)
    draw.text((x, y + LINE), proposed, font=bold, fill=PROPOSED)


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
