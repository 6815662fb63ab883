"""Names of earlier versions still import, with a warning that names the new place."""

from importlib import import_module

import pytest

from kd_plugins._moved import MODULES, NAMES


@pytest.mark.parametrize(
    ("package", "old"), [(package, old) for package, names in NAMES.items() for old in names]
)
def test_an_old_name_is_the_new_object(package, old):
    module, new = NAMES[package][old]
    with pytest.warns(DeprecationWarning, match=new):
        found = getattr(import_module(package), old)
    assert found is getattr(import_module(f"kd_plugins.{module}"), new)


@pytest.mark.parametrize("name", ["dynamics", "gradients", "report", "suspects", "trainer"])
def test_an_old_module_has_the_new_names(name, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, f"kd_plugins.{name}", raising=False)
    with pytest.warns(DeprecationWarning, match=MODULES[name]):
        old = import_module(f"kd_plugins.{name}")
    new = import_module(f"kd_plugins.{MODULES[name]}")
    public = [n for n in getattr(new, "__all__", vars(new)) if not n.startswith("_")]
    assert public and all(getattr(old, n) is getattr(new, n) for n in public)
