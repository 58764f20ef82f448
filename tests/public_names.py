"""The public names of jaxtrain, for the tests of its docstrings and of its reference."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType
from typing import Any

import jaxtrain as jt

MODULES = (
    *("callbacks", "data", "errors", "export"),
    *("losses", "metrics", "models", "optimizers", "parallel", "sweeps"),
)

# Of the modules without `__all__`: what other modules of the package use.
INTERNAL = {
    *("errors.NO_SPACE", "errors.add_recovery_note", "errors.printable", "errors.recovery_notes"),
    *("errors.first_line", "errors.message_of"),
    *("losses.AnyArray", "losses.LABEL_LOSSES", "losses.PROBABILITY_LOSSES", "metrics.AnyArray"),
    *("losses.at_least_float32", "losses.mean_terms", "losses.name_of", "losses.single_losses"),
    *("losses.WHOLE_EXAMPLE_LOSSES", "losses.context_parameters"),
}


def definitions(module: ModuleType) -> dict[str, str | None]:
    """Returns the names that a module defines, with the docstrings of those that are assigned."""
    found: dict[str, str | None] = {}
    body = ast.parse(inspect.getsource(module)).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = following.value if isinstance(following, ast.Expr) else None
            doc = value.value if isinstance(value, ast.Constant) else None
            if isinstance(target, ast.Name):
                found[target.id] = inspect.cleandoc(doc) if isinstance(doc, str) else None
    return found


def public_names() -> dict[str, Any]:
    """Returns the public functions, classes and constants by name, such as "losses.huber"."""
    names = {
        name: getattr(jt, name) for name in jt.__all__ if not inspect.ismodule(getattr(jt, name))
    }
    for prefix in MODULES:
        module = getattr(jt, prefix)
        listed = getattr(module, "__all__", None) or definitions(module)
        members = {f"{prefix}.{n}": getattr(module, n) for n in listed if not n.startswith("_")}
        names |= {name: value for name, value in members.items() if name not in INTERNAL}
    return names


def docstring(name: str, value: Any) -> str:
    """Returns the docstring of a function or class, or the one below an assignment."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return inspect.getdoc(value) or ""
    module = sys.modules[getattr(jt, name.partition(".")[0]).__name__]
    return definitions(module).get(name.rpartition(".")[2]) or ""
