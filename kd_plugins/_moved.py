"""Names of earlier versions. They still import for one minor version, with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MODULES = {
    "dynamics": "audit",
    "functional": "losses.functional",
    "gradients": "losses.gradients",
    "metrics": "audit.metrics",
    "report": "audit.plots",
    "state": "losses.state",
    "suspects": "audit",
    "timm_tasks": "train.timm",
    "trainer": "train",
}
_LOSSES = {
    "Confident": ("losses", "LowEntropy"),
    "Everything": ("losses", "SelectAll"),
    "Nothing": ("losses", "SelectNone"),
    "Selected": ("losses", "MaskedLoss"),
}
NAMES = {  # by package: old name -> module and new name
    "kd_plugins": _LOSSES,
    "kd_plugins.losses": _LOSSES | {"estimate_transition": ("audit", "estimate_transition")},
    "kd_plugins.models": {"Hosted": ("models", "PeerModule")},
    "kd_plugins.data": {
        "CachedTeachers": ("data", "TeacherCache"),
        "influence_scores": ("audit", "influence_scores"),
        "select_lowest": ("audit", "select_lowest"),
    },
}


def moved_names(package: str) -> Callable[..., Any]:
    """The ``__getattr__`` of a package from which names have moved."""

    def get(name: str, stacklevel: int = 3) -> Any:
        if name not in NAMES[package]:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, new = NAMES[package][name]
        _warn(f"{package}.{name}", f"kd_plugins.{module}.{new}", stacklevel)
        return getattr(import_module(f"kd_plugins.{module}"), new)

    return get


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        moved = name.removeprefix("kd_plugins.") in MODULES and name.startswith("kd_plugins.")
        return ModuleSpec(name, self) if moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = f"kd_plugins.{MODULES[module.__name__.removeprefix('kd_plugins.')]}"
        _warn(module.__name__, new)
        target = import_module(new)
        module.__getattr__ = lambda name: getattr(target, name)  # type: ignore[method-assign]

    def get_code(self, name: str) -> CodeType:
        """For ``python -m`` with an old name."""
        new = f"kd_plugins.{MODULES[name.removeprefix('kd_plugins.')]}"
        _warn(name, new)
        program = f"import runpy; runpy.run_module({new!r}, run_name='__main__')"
        return compile(program, name, "exec")


def _warn(old: str, new: str, stacklevel: int = 3) -> None:
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=stacklevel)


sys.meta_path.append(_MovedModules())
