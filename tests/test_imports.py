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
    *("orbax", "safetensors"),
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


# What each room may import of the others; all may import errors.
PARTS = {"data", "models", "losses", "metrics", "transforms"}
MAY_IMPORT = {
    "errors": set(),
    **{part: set() for part in PARTS},
    "folders": set(),
    "devices": set(),
    "versions": {"devices"},
    "tables": set(),
    "signals": set(),
    "optimizers": {"transforms"},
    "state": set(),
    "steps": {"data", "losses", "metrics", "state"},
    "checks": {"data", "losses", "optimizers", "state", "steps"},
    "epochs": {"checks", "data", "health", "losses", "metrics", "state", "steps", "transforms"},
    "checkpoint_files": {"state"},
    "checkpoints": {"checkpoint_files", "folders", "state"},
    "export": {"folders", "state"},
    "memory": {"devices"},
    "health": {"optimizers", "state"},
    "history": set(),
    "events": {"history", "state"},
    "fit": {
        *("checkpoint_files", "checkpoints", "checks", "data", "epochs", "events", "health"),
        *("history", "losses", "memory", "metrics", "optimizers", "state", "steps", "versions"),
    },
    "minimize": {"checks", "optimizers"},
    "progress": {"checks", "events"},
    "plots": {"data"},
    "runs": {"events", "export", "folders", "state", "versions"},
    "command": {"checkpoints", "checks", "fit", "runs", "signals"},
}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            whole = node.module == "jaxtrain"
            names = [f"jaxtrain.{a.name}" for a in node.names] if whole else [str(node.module)]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("jaxtrain.")}
    return rooms


def test_imports_run_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            assert imported_rooms(path) - {room, "errors"} <= MAY_IMPORT[room], room
