"""What `import jaxtrain` loads, and the direction in which its modules import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxtrain as jt

PACKAGE = Path(__file__).parents[1] / "jaxtrain"

HEAVY = {
    *("matplotlib", "sklearn", "tensorflow_datasets", "tensorflow", "pooch", "platformdirs"),
    *("requests", "tyro", "torch", "beartype", "pytest", "hypothesis", "pandas", "rich", "equinox"),
    *("orbax", "safetensors", "filelock", "IPython", "tensorboardX", "tensorboard", "wandb"),
}


# A run that uses a plain function as a model, and saves it.
RUN = """
inputs = np.ones((8, 1), np.float32)
model = jt.Model(
    lambda key, inputs: ({"w": jnp.ones(1)}, {}),
    lambda params, state, inputs, *, train, key: (inputs * params["w"], state),
)
state = jt.init_state(model, jt.optimizers.sgd(0.1), inputs, key=jax.random.key(0))
loss_fn = jt.losses.mean_squared_error
state, history = jt.fit(state, (inputs, inputs), loss_fn=loss_fn, epochs=1, callbacks=[])
jt.save(sys.argv[1], state)
"""


def test_it_loads_only_what_is_used(tmp_path: Path) -> None:
    """optax, and what it imports itself, may be loaded."""
    program = (
        "import sys, jax, jax.numpy as jnp, numpy as np, optax; before = set(sys.modules)\n"
        f"import jaxtrain as jt\nprint(*set(sys.modules) - before){RUN}"
        "print(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program, tmp_path / "model.safetensors"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, used = map(str.split, result.stdout.splitlines())
    assert "jaxtrain.training.fit" in imported
    parts = {f"jaxtrain.{name}" for name in ("export", "inspect", "models", "sweeps")}
    assert not {*imported} & parts
    exports = {name for name in used if name.startswith("jaxtrain.export.")}
    assert exports == {"jaxtrain.export._safetensors"}
    assert not {*used} & (parts - {"jaxtrain.export"})
    loaded = {name.split(".")[0] for name in used}
    assert not loaded & (HEAVY - {"safetensors"} | {"flax"})
    assert "safetensors" not in {name.split(".")[0] for name in imported}


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert {*jt.__all__} <= {*dir(jt)}
    assert {*jt.export.__all__} <= {*dir(jt.export)}
    with pytest.raises(AttributeError, match=r"module 'jaxtrain' has no attribute 'sweap'"):
        jt.sweap  # noqa: B018


# Each package imports from those before it alone.
ORDER = [
    *(
        "errors",
        "_lazy",
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
