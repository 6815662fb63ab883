"""Recipes as a user starts them."""

import runpy
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"


def start(monkeypatch, recipe, *argv):
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, argv)])
    monkeypatch.syspath_prepend((RECIPES / recipe).parent)  # as python does for a script
    try:
        return runpy.run_path(str(RECIPES / recipe), run_name="__main__")
    except SystemExit as error:  # a user's error: what was said, after a check of the exit code
        assert error.code == 2
        raise error.__cause__ from None


def recipe_of(monkeypatch, recipe, *argv):
    """The names of a recipe that is not started. It reads this command line."""
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, argv)])
    return runpy.run_path(str(RECIPES / recipe))
