"""The documentation: its code runs, its site builds, its links work, it has every loss."""

import inspect
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kd_plugins import list_losses
from kd_plugins.losses import loss_class
from kd_plugins.losses.base import LossArguments

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```python(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
WRITTEN = sorted((ROOT / "docs").glob("*.md"))
PAGES = [page for page in WRITTEN if FENCE.search(page.read_text(encoding="utf-8"))]
TOOLS = ("mkdocs", "material", "mkdocstrings_handlers")
MISSING = [name for name in TOOLS if find_spec(name) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("default", r"error:.* is now kd_plugins:DeprecationWarning")
def test_code_runs_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    """A page needs nothing from another page. Code that needs a file of the reader's says so."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if "of yours" in match[1]:
            continue
        line = text[: match.start()].count("\n") + 2
        code = compile("\n" * (line - 1) + match[2], str(page), "exec")
        exec(code, names)


def test_loops_over_a_view_tell_the_epoch():
    """Without set_epoch every epoch has the augmentation of the first."""
    blocks = [match[2] for page in PAGES for match in FENCE.finditer(page.read_text("utf-8"))]
    loops = [block for block in blocks if ".backward()" in block and "pixel_values" in block]
    assert loops and all("train.set_epoch(epoch)" in block for block in loops)


def test_pages_have_code():
    assert len(PAGES) >= 5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed: pip install kd-plugins[docs]")
    folder = tmp_path_factory.mktemp("site")
    # proxies that lead nowhere: the build must not need a network
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(folder): Page(path) for path in folder.rglob("*.html")}


class Page(HTMLParser):
    """What a page of the site contains: anchors, links, and what a browser loads with it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.anchors, self.links, self.loaded = path, set(), [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(attrs["href"])
        if tag != "a" and attrs.get("src"):
            self.loaded.append(attrs["src"])


def test_nothing_is_loaded_from_another_host(site):
    loaded = {(str(name), url) for name, page in site.items() for url in page.loaded}
    assert not {(name, url) for name, url in loaded if urlsplit(url).netloc}
    folder = next(iter(site.values())).path.parents[0]
    folder = next(p for p in [folder, *folder.parents] if (p / "search").is_dir())
    for sheet in folder.rglob("*.css"):
        outside = r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)]*"
        assert not re.findall(outside, sheet.read_text(encoding="utf-8")), sheet


def test_links_within_the_site_lead_somewhere(site):
    pages = {page.path.resolve(): page for page in site.values()}
    broken = []
    for name, page in site.items():
        if name.name == "404.html":
            continue  # its links are those of the server's root
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            target = target / "index.html" if target.is_dir() else target
            anchors = pages[target.resolve()].anchors if target.resolve() in pages else None
            if not target.exists() or (
                parts.fragment and anchors is not None and unquote(parts.fragment) not in anchors
            ):
                broken.append((str(name), link))
    assert not broken


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_has_an_entry(site, name):
    """Its call, its formula, and a description of every argument of its own."""
    cls = loss_class(name)
    family = cls.__module__.rpartition(".")[2]
    page = site[Path("api", "losses", family, "index.html")]
    assert f'<h2 id="{name}">' in page.text
    entry = page.text.split(f'<h2 id="{name}">')[1].split("<h2 id=")[0]
    assert f'create_loss("{name}"' in unescape(re.sub(r"<[^>]+>", "", entry))
    assert 'class="formula"' in entry
    parameters = inspect.signature(cls).parameters.values()
    own = {p.name for p in parameters if p.kind != p.VAR_KEYWORD} - set(
        LossArguments.__annotations__
    )
    table = entry.split("Parameters:")[1] if own else ""
    assert f'href="losses/{family}/#{name}"' in site[Path("api", "index.html")].text
    missing = {p for p in own if f"<code>{p}</code>" not in table}
    assert not missing
