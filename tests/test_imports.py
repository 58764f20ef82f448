"""What `import jaxtrain` brings along, and in which direction its rooms import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxtrain"

HEAVY = {
    *("matplotlib", "sklearn", "tensorflow_datasets", "tensorflow", "requests", "platformdirs"),
    *("tyro", "torch", "beartype", "pytest", "hypothesis", "pandas"),
}


def test_importing_it_pulls_in_nothing_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import sys, jaxtrain; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert loaded >= {"jax", "flax", "optax", "numpy"}
    assert not loaded & HEAVY


def test_imports_run_one_way() -> None:
    """A room may import those before it in this order, and none after."""
    order = [
        *("errors", "data", "models", "losses", "metrics", "optimizers", "state", "steps"),
        *("checks", "epochs", "fit", "progress", "plots", "runs", "command"),
    ]
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxtrain."):
                other = str(node.module).split(".")[1]
                assert order.index(other) <= order.index(room), f"{room} imports {other}"
