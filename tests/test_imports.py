"""What `import jaxtrain` loads, and the direction in which its modules import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxtrain"

HEAVY = {
    *("matplotlib", "sklearn", "tensorflow_datasets", "tensorflow", "pooch", "platformdirs"),
    *("requests", "tyro", "torch", "beartype", "pytest", "hypothesis", "pandas", "rich", "equinox"),
    *("orbax", "safetensors", "filelock", "IPython", "tensorboardX", "tensorboard", "wandb"),
}


def test_importing_it_loads_nothing_heavy() -> None:
    """Flax and optax themselves may."""
    program = (
        "import sys, flax.linen, optax; before = set(sys.modules); import jaxtrain; "
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "jaxtrain" in loaded
    assert not loaded & HEAVY


# Each package imports from those before it alone.
ORDER = [
    *(
        "errors",
        "_allocator",
        "_compile_time",
        "_compiler",
        "_extras",
        "_versions",
        "_arguments",
        "_carry",
        "_compiler",
        "_processes",
        "_files",
        "_figures",
        "_placement",
        "_safetensors",
        "_device_memory",
        "_differences",
        "_json",
        "_static_key",
        "lowerings",
        "dataset",
        "model",
        "parallel",
        "losses",
        "metrics",
    ),
    *("optimizers", "models", "adapters", "checkpoint", "data", "_terminal", "callbacks"),
    *("training", "sweeps", "export", "inspect", "race", "cli"),
]
# The same inside the package of the training loop.
TRAINING = [
    *("state", "tracing", "step", "checks", "independence", "sources", "loop"),
    *("batch_stats", "run", "history", "fit"),
]


def is_for_types(node: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose imports never run."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imported_modules(path: Path) -> set[str]:
    """The modules of jaxtrain that a file imports when it runs, without the package's name."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = str(node.module)
            is_package = (PACKAGE.parent / module.replace(".", "/")).is_dir()
            names = [f"{module}.{alias.name}" if is_package else module for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("jaxtrain.") for name in names if name.startswith("jaxtrain.")}
    return found


def test_packages_import_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        allowed = {*ORDER[: ORDER.index(package)], package}
        assert {name.split(".")[0] for name in imported_modules(path)} <= allowed, path


def test_modules_of_the_training_loop_import_one_way() -> None:
    for path in (PACKAGE / "training").glob("*.py"):
        if path.stem == "__init__":
            continue
        before = set(TRAINING[: TRAINING.index(path.stem)])
        imported = {n.split(".")[1] for n in imported_modules(path) if n.startswith("training.")}
        assert imported <= before, path


def test_private_modules_stay_in_their_package() -> None:
    """What begins with an underscore is imported by its own package only.

    The modules of `metrics` and `optimizers` are private to jaxtrain: only the names of the
    packages are for users.
    """
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0]
        for name in imported_modules(path):
            parts = name.split(".")
            if len(parts) > 1 and any(part.startswith("_") for part in parts[1:]):
                assert parts[0] in (package, "metrics", "optimizers"), f"{path} imports {name}"
