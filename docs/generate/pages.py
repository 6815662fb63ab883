"""A mkdocs hook: the API reference from the registry and the docstrings, and the recipes' page."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from docstrings import typeset
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FAMILIES = {  # module of kd_plugins.losses -> title; a module that is not here has its own name
    "refined": "Corrected labels",
    "self_trust": "Corrected labels, by trust in the network",
    "robust": "Robust losses",
    "bi_tempered": "Robust losses, with two temperatures",
    "transition": "Transition matrices",
    "sample_memory": "Memory of each sample",
    "averaged_labels": "Predictions averaged over time",
    "curriculum": "Curricula",
    "dmi": "Mutual information",
    "teacher_free": "Teacher-free distillation",
    "distill": "Teachers, on logits",
    "distill_logits": "Teachers, on logits: DKD, DIST, NKD, WTTM",
    "distill_features": "Teachers, on features",
    "distill_relations": "Teachers, on relations of samples",
    "distill_camkd": "Teachers, CA-MKD",
    "distill_contrast": "Teachers, by contrast",
    "mutual": "Selective mutual distillation",
    "co_teaching": "Co-teaching",
    "jocor": "Joint training",
    "mixing": "Mixtures of pictures",
    "online": "Mutual learning",
    "online_features": "Mutual learning, on features",
}
FLOORS = {
    "train": "Trainer and callbacks",
    "train.timm": "Tasks for timm's script",
    "audit": "Wrong labels, metrics, plots",
    "audit.plots": "Pictures of runs",
    "data": "Data",
    "models": "Networks",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and put the API reference into the navigation."""
    pages = api_pages()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted((ROOT / "recipes").rglob("*")):
        if path.suffix in {".py", ".md"}:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, content=as_on_site(path.read_text("utf-8"))))
    reference = [*pages]
    config.nav = [{"API reference": reference} if "API reference" in e else e for e in config.nav]
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return as_on_site(markdown)


def as_on_site(text: str) -> str:
    """Links between docs/ and recipes/, as links between pages of the site."""
    return text.replace("](../docs/", "](../").replace("](../recipes/", "](recipes/")


# --------------------------------------------------------------------------------- API reference


def api_pages() -> dict[str, str]:
    """Path -> Markdown of every page of the reference."""
    from kd_plugins.losses import list_losses, loss_class

    families = defaultdict(list)
    for name in list_losses():
        families[loss_class(name).__module__.rpartition(".")[2]].append(name)
    known = [family for family in FAMILIES if family in families]
    pages = {"api/index.md": index_page()}
    for family in [*known, *sorted(set(families) - set(FAMILIES))]:
        pages[f"api/losses/{family}.md"] = family_page(family, families[family])
    pages["api/losses/base.md"] = base_page()
    for floor, title in FLOORS.items():
        pages[f"api/{floor.replace('.', '-')}.md"] = floor_page(f"kd_plugins.{floor}", title)
    return pages


def index_page() -> str:
    """The registered losses as a table, each with a link to its entry."""
    from kd_plugins.audit.tables import methods
    from kd_plugins.losses import loss_class

    def link(match: re.Match[str]) -> str:
        family = loss_class(match[1]).__module__.rpartition(".")[2]
        return f"| [`{match[1]}`](losses/{family}.md#{match[1]})"

    table = re.sub(r"^\| `(\w+)`", link, methods(), flags=re.MULTILINE)
    return (
        "---\ntitle: Losses by name\nhide: [toc]\n---\n\n# Losses by name\n\n"
        "`create_loss(name, **arguments)` makes any of them, and `list_losses()` lists them. "
        "The names link to the parameters and the origin of each default. Each loss also takes "
        "`num_classes`, `reduction` and `weight`: see [`Loss`][kd_plugins.losses.Loss]. This "
        "table and all entries are generated from the docstrings.\n\n"
        f'<div class="methods" markdown>\n\n{formatted(table)}\n\n</div>\n'
    )


def formatted(table: str) -> str:
    """The formulas, which are in the second column, as HTML."""
    rows = []
    for line in table.splitlines():
        cells = line.split(" | ")
        rows.append(" | ".join([cells[0], typeset(cells[1]), *cells[2:]]) if cells[1:] else line)
    return "\n".join(rows)


def family_page(family: str, names: list[str]) -> str:
    """One entry per loss: the call, what it reads, and the docstring."""
    return "\n\n".join([f"# {title_of(family)}", *(loss_entry(name) for name in names)])


def title_of(family: str) -> str:
    return FAMILIES.get(family, family.replace("_", " ").capitalize())


def loss_entry(name: str) -> str:
    from kd_plugins.losses import loss_class

    cls = loss_class(name)
    inputs = ["logits of each network" if cls.num_peers > 1 else "logits", "target"]
    inputs += [f"`{key}`" for key in sorted(cls.required_inputs)]
    return (
        f"## {name} {{ #{name} }}\n\n"
        f"```python\n{call_of(cls)}\n```\n\n"
        f'By name: `create_loss("{name}", ...)`. Reads: {", ".join(inputs)}.\n\n'
        f"::: kd_plugins.losses.{cls.__name__}\n"
        "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        "      heading_level: 3\n"
    )


def call_of(cls: type) -> str:
    """``Name(argument=default, ...)``, without the arguments that every loss takes."""
    from kd_plugins.losses.base import LossArguments

    shown = []
    for p in inspect.signature(cls).parameters.values():
        if p.kind != p.VAR_KEYWORD and p.name not in LossArguments.__annotations__:
            shown.append(p.name if p.default is p.empty else f"{p.name}={short(p.default)}")
    line = f"{cls.__name__}({', '.join(shown)})"
    if len(line) <= 80:
        return line
    return "\n".join([f"{cls.__name__}(", *(f"    {argument}," for argument in shown), ")"])


def short(default: Any) -> str:
    """The default as Python writes it; of long fractions four digits."""
    text = repr(default)
    return f"{default:.4g}" if isinstance(default, float) and len(text) > 8 else text


def base_page() -> str:
    """What the losses share, and the parts they are made of."""
    from kd_plugins import losses

    registered = {losses.loss_class(name).__name__ for name in losses.list_losses()}
    first = ["Loss", "Sum", "Refined", "Mutual"]
    others = [name for name in losses.__all__ if name not in registered and name not in first]
    entries = [f"::: kd_plugins.losses.{name}" for name in [*first, *others]]
    return "\n\n".join(["# Shared parts", *entries])


def floor_page(module: str, title: str) -> str:
    """The public names of a part of the package."""
    names = getattr(importlib.import_module(module), "__all__", None) or [
        name
        for name, value in vars(importlib.import_module(module)).items()
        if getattr(value, "__module__", None) == module and not name.startswith("_")
    ]
    return "\n\n".join([f"# {title}", *(f"::: {module}.{name}" for name in names)])
