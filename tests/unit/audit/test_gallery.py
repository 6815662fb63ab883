"""The contact sheet and the HTML page: what they show, and what they refuse."""

import base64
import json
import re
from html import unescape
from html.parser import HTMLParser
from io import BytesIO

import datasets
import numpy as np
import pytest
from helpers.suspects import BROKEN, HOSTILE, odd_suspects
from helpers.tiny import to_tensor
from PIL import Image

from kd_plugins import contact_sheet, html_page
from kd_plugins.data import ImageView


@pytest.fixture(scope="module")
def odd():
    return odd_suspects()


@pytest.mark.parametrize("source", ["dataset", "view", "rows"])
def test_contact_sheet(odd, source, tmp_path):
    data, suspects = odd
    table = [
        {"image": row["image"]["bytes"], "label": row["label"]}
        for row in data.cast_column("image", datasets.Image(decode=False))
    ]
    source = {"dataset": data, "view": ImageView(data, to_tensor, max_broken=1), "rows": table}[
        source
    ]
    path = contact_sheet(suspects, source, tmp_path / "new" / "sheet.png", count=9, columns=3)
    sheet = np.array(Image.open(path).convert("RGB"))
    assert sheet.shape == (58 + 3 * 250, 3 * 190 + 14, 3)
    ranked = [row["index"] for row in suspects][:8]  # the other two are not suspected
    for k in range(9):
        x, y = 14 + k % 3 * 190, 58 + k // 3 * 250
        tile, text = sheet[y : y + 176, x : x + 176], sheet[y + 180 : y + 230, x : x + 176]
        if k == 8:
            assert (sheet[y : y + 250, x : x + 176] == 255).all()
        elif ranked[k] == BROKEN:
            assert (tile == (0xE7, 0xE9, 0xED)).all(-1).mean() > 0.95
        else:
            assert tile.std() > 5
        assert k == 8 or text.std() > 5
    assert len(set(sheet[58 : 58 + 176].mean((0, 2)).round(3))) > 100  # three different pictures


class Addresses(HTMLParser):
    """The addresses and scripts in the attributes of a page."""

    @classmethod
    def of(cls, text):
        parser = cls()
        parser.found = []
        parser.feed(text)
        return parser.found

    def handle_starttag(self, tag, attrs):
        self.found += [
            v
            for k, v in attrs
            if k in ("src", "href", "srcset", "action", "data") or k.startswith("on")
        ]


def page_of(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    )


def test_page_holds_all_and_loads_nothing(odd, tmp_path):
    data, suspects = odd
    path = html_page(suspects, data, tmp_path / "new" / "page.html", title=HOSTILE[0] + "@DATA@")
    text, page = page_of(path)
    assert text.isascii() and Addresses.of(text) == [
        "data:,"
    ]  # the icon, which browsers would request
    ways = [
        "url(",
        "@import",
        "fetch",
        "XMLHttp",
        "WebSocket",
        "innerHTML",
        "insertAdjacent",
        "document.write",
        "eval",
        "import(",
    ]
    assert [way for way in ways if way in text] == []
    assert [row[:3] for row in page["rows"]] == [
        [r["index"], r["label"], r["proposed"]] for r in suspects
    ][:8]
    assert [row[3] for row in page["rows"]] == pytest.approx(suspects["score"][:8], abs=1e-4)
    assert page["names"] == {str(k): " ".join(name.split()) for k, name in enumerate(HOSTILE)}
    assert "small" not in page
    for (index, *_), content in zip(page["rows"], page["pictures"], strict=True):
        if index == BROKEN:
            assert content is None
            continue
        picture = Image.open(BytesIO(base64.b64decode(content)))
        assert picture.format == "WEBP" and picture.mode == "RGB"
        assert max(picture.size) == (32 if index == 1 else 8 if index == 6 else 96)  # not enlarged
        assert len(content) < 15_000
        assert not {"icc_profile", "transparency"} & picture.info.keys()

    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text
    title = re.findall(r"<(?:title|h1)>(.*?)</", text)
    assert [unescape(t) for t in title] == [HOSTILE[0] + "@DATA@"] * 2
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert (
        "default-src 'none'; img-src data:; " in policy
        and "unsafe" not in policy
        and policy.count("'sha256-") == 2
    )


def test_page_shows_neighbours(odd, tmp_path):
    """The first four, with their given labels; those that are suspects are on the page already."""
    data, suspects = odd
    near = [[(k + step) % 10 for step in range(1, 6)] for k in suspects["index"]]
    suspects = suspects.add_column("neighbours", near)
    _, page = page_of(html_page(suspects, data, tmp_path / "page.html"))
    assert [row[6] for row in page["rows"]] == [rows[:4] for rows in near[:8]]
    others = {k for rows in near[:8] for k in rows[:4]} - {row[0] for row in page["rows"]}
    assert others and page["small"].keys() == set(map(str, others))
    for row, (label, content) in page["small"].items():
        assert label == int(row) % 6
        assert (content is None) == (int(row) == BROKEN)
    outside = suspects.remove_columns("neighbours").add_column("neighbours", [[10]] * 10)
    with pytest.raises(ValueError, match="row 10, the data set 10 rows"):
        html_page(outside, data, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pages_and_sheets_that_cannot_be_drawn(odd, tmp_path):
    data, suspects = odd
    for draw in (html_page, contact_sheet):
        with pytest.raises(ValueError, match="the suspects have row 9, the data set 9 rows"):
            draw(suspects, data.select(range(9)), tmp_path / "x")
        with pytest.raises(ValueError, match=r"no column 'img'; there are \['image', 'label'\]"):
            draw(suspects, data, tmp_path / "x", image="img")
        with pytest.raises(TypeError, match="column 'label' holds int"):
            draw(suspects, data, tmp_path / "x", image="label")
        twice = datasets.concatenate_datasets(
            [suspects, suspects.map(lambda row: {"proposed": (row["proposed"] + 1) % 6})]
        )
        with pytest.raises(ValueError, match="two proposals"):
            draw(twice, data, tmp_path / "x")
        with pytest.raises(ValueError, match="count=0"):
            draw(suspects, data, tmp_path / "x", count=0)
        assert draw(suspects.select([]), data, tmp_path / "none").stat().st_size > 100
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("draw", [html_page, contact_sheet])
def test_pages_and_sheets_of_other_rows_are_refused(odd, tmp_path, draw):
    """Other rows, as a data set, a view or a list, and another column of labels."""
    data, suspects = odd
    order = data.select([1, 0, *range(2, 10)])
    plain = [{"image": None, "label": y} for y in order["label"]]
    message = (
        "row [01] has label [01] in .*, and [01] among the suspects: they belong to other data"
    )
    for other in (order, ImageView(order, to_tensor, max_broken=1), plain):
        with pytest.raises(ValueError, match=message):
            draw(suspects, other, tmp_path / "x")
    renamed = data.add_column("noisy", np.roll(data["label"], 1)).rename_column("label", "given")
    with pytest.raises(ValueError, match="no column 'label'"):
        draw(suspects, renamed, tmp_path / "x")
    with pytest.raises(ValueError, match="in column 'noisy'"):
        draw(suspects, renamed, tmp_path / "x", label="noisy")
    bare = [{"image": None}] * 10
    with pytest.raises(ValueError, match="row 0 has no 'label'"):
        draw(suspects, bare, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for rows_, label in ((renamed, "given"), (bare, None)):
        assert draw(suspects, rows_, tmp_path / "page", label=label).stat().st_size > 100
