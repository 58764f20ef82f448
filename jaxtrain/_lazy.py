"""Imports what a package offers when it is first used, so that a run does not wait for the rest."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the functions `__getattr__` and `__dir__` of a package.

    Args:
      package: its name.
      modules: its modules that are imported by need, and the names that each one gives the package.
    """
    sources = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        owner = sys.modules[package]
        if name in sources:
            value = getattr(importlib.import_module(f"{package}.{sources[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            text = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=owner)
        setattr(owner, name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules, *sources})
