"""A griffe extension: what the docstrings leave to the reader's eye becomes Markdown."""

from __future__ import annotations

import importlib
import re
from functools import cache
from html import escape
from typing import Any

import griffe

END = r"(?:\.(?: ([A-Z].*))?)?$"  # the full stop, and a sentence after it
FORMULA = re.compile(r"[,:]?\s((?:L(?:_\w+)?|q~) = .*?)" + END, re.DOTALL)
IN_WORDS = re.compile(r"[,:] (.* = .*?)" + END, re.DOTALL)
BEGINS = re.compile(r"([^.\n]* = .*?)\.(?:\s|$)", re.DOTALL)
SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*\n(?: {5,}.*\n)*)", re.MULTILINE)
GREEK = dict(alpha="α", beta="β", gamma="γ", eps="ε", rho="ρ", chi="χ", eta="η", tau="τ")


class Docstrings(griffe.Extension):
    """Roles become links, doctests code blocks, the formula of a registered loss is set apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = one_argument_each(obj.docstring.value)
        if obj.is_class and any("register_loss" in str(d.value) for d in obj.decorators):
            text = set_formula_apart(text)
        obj.docstring.value = "\n".join(fenced(link_roles(text, obj.path).split("\n")))


def one_argument_each(text: str) -> str:
    """``eta, b2: the threshold`` describes two arguments; each gets a line of its own."""

    def split(match: re.Match[str]) -> str:
        return "".join(f"    {name}: {match[2]}" for name in match[1].split(", "))

    return SEVERAL.sub(split, text + "\n").removesuffix("\n")


def set_formula_apart(text: str) -> str:
    """The formula of the first paragraph, or the first of the second, in a block of its own."""
    first, gap, rest = text.partition("\n\n")
    if match := FORMULA.search(first) or IN_WORDS.search(first):
        return f"{first[: match.start()]}.\n\n{block(match[1])}\n\n{match[2] or ''}{gap}{rest}"
    if match := BEGINS.match(rest):
        return f"{first}{gap}{block(match[1])}\n\n{rest[match.end() :]}"
    return text


def block(formula: str) -> str:
    return f'<p class="formula">{typeset(" ".join(formula.split()))}</p>'


def typeset(formula: str) -> str:
    """Plain text such as Σ_k w_k log p_k^q -> HTML with subscripts and Greek letters."""
    text = escape(formula, quote=False)
    text = re.sub(r"_\{([^}]*)\}|_([^\W_]+(?:[≠=,]\w)?)", r"<sub>\1\2</sub>", text)
    text = re.sub(r"\^\{([^}]*)\}|\^(\w+)", r"<sup>\1\2</sup>", text)
    text = re.sub(r"(\w)~", "\\1\u0303", text)
    names = "|".join(GREEK)
    return re.sub(rf"(?<![^\W_])({names})(?![^\W_])", lambda match: GREEK[match[1]], text)


def link_roles(text: str, path: str) -> str:
    """:class:`Mutual` -> a link to its entry if the site has one, else code.

    Args:
        text: a docstring.
        path: of the object that has it, for names such as :meth:`bind`.
    """

    def link(match: re.Match[str]) -> str:
        target = match[1].lstrip("~")
        short = match[1] != target or target.startswith("kd_plugins.")
        shown = target.rpartition(".")[2] if short else target
        first, dot, rest = target.rpartition("kd_plugins.")[2].partition(".")
        last = target.rpartition(".")[2]
        known = entries()
        for name in (last, first):
            if name in known:
                anchor = known[name] + (dot + rest if name == first != last else "")
                break
        else:
            anchor = f"{path}.{target}"
        return f'<autoref identifier="{anchor}" optional><code>{escape(shown)}</code></autoref>'

    text = re.sub(r":\w+:`([^`]+)`", link, text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return text.replace("docs/unconfirmed.md", "[not confirmed][what-could-not-be-confirmed]")


@cache
def entries() -> dict[str, str]:
    """Public name -> anchor of its entry. The anchor of a registered loss is that name."""
    from kd_plugins import losses

    known = {}
    for floor in ("models", "data", "audit", "train", "losses"):
        module = importlib.import_module(f"kd_plugins.{floor}")
        known |= {name: f"kd_plugins.{floor}.{name}" for name in module.__all__}
    return known | {losses.loss_class(name).__name__: name for name in losses.list_losses()}


def fenced(lines: list[str]) -> list[str]:
    """Doctests as code blocks; a block ends at an empty line."""
    out: list[str] = []
    inside = ""
    for line in [*lines, ""]:
        indent = line[: len(line) - len(line.lstrip())]
        if not inside and line.lstrip().startswith(">>>"):
            inside = "code"
            out += ["", indent + "```pycon"]
            margin = indent
        elif inside and not line.strip():
            out += [margin + "```"]
            inside = ""
        out.append(re.sub(r"\s+# doctest:.*", "", line) if inside else line)
    return out[:-1]
