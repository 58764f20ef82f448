"""Every public function and class has an example in its docstring, and all examples run.

They run as a reader runs them who has pasted the code of docs/reference/index.md before.
"""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.public_names import docstring, public_names

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "index.md"
NAMES = public_names()

# Examples that need an optional package are skipped without it.
PACKAGES = {
    **dict.fromkeys(("export.load_torch", "export.to_torch", "optimizers.from_torch"), "torch"),
    "race": "torch",
    "export.onnx": "onnxruntime",
    "callbacks.tensorboard": "tensorboardX",
    "callbacks.wandb": "wandb",
    **dict.fromkeys(("data.load", "data.load_resolved"), "sklearn"),
    **dict.fromkeys(("data.stream", "data.Stream"), "grain"),
    "data.open_tfds": "tensorflow_datasets",
    **dict.fromkeys(("sweeps.SweepResult", "find_learning_rate"), "matplotlib"),
}

# Functions return these or call callbacks with them, and have examples.
RESULTS = {
    *("Minimum", "Race", "Run", "sweeps.RangeTest", "sweeps.SweepRun", "sweeps.SweepTable"),
    *("callbacks.SweepProgress", "data.Resolved", "losses.WeightedSum"),
}


def needs_example(name: str, value: Any) -> bool:
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    is_callable = inspect.isroutine(value) or inspect.isclass(value)
    return is_callable and not is_error and name not in RESULTS


def examples_of(name: str, value: Any) -> list[doctest.DocTest]:
    """Returns those of the docstring, and of the methods of a class."""
    if inspect.isroutine(value) or inspect.isclass(value):
        found = doctest.DocTestFinder().find(value, name, module=False)
    else:
        text = docstring(name, value)
        found = [doctest.DocTestParser().get_doctest(text, {}, name, None, 0)]
    return [example for example in found if example.examples]


WITH_EXAMPLES = sorted(name for name, value in NAMES.items() if examples_of(name, value))


@pytest.fixture(scope="module")
def names_of_the_page() -> dict[str, Any]:
    """What the code of the reference's first page defines."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def test_every_public_name_has_a_docstring() -> None:
    assert {name for name, value in NAMES.items() if not docstring(name, value)} == set()


def test_every_public_function_and_class_has_an_example() -> None:
    needed = {name for name, value in NAMES.items() if needs_example(name, value)}
    assert needed - set(WITH_EXAMPLES) == set()


def test_the_exemptions_are_needed() -> None:
    assert RESULTS & set(WITH_EXAMPLES) == set()
    assert RESULTS | set(PACKAGES) <= set(NAMES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_runs(
    name: str, names_of_the_page: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if name == "data.open_tfds":
        from tests.test_tfds import prepare

        prepare(tmp_path / "tfds", name="mnist")
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    if name == "callbacks.wandb":
        for folder in ("CACHE", "CONFIG", "DATA"):
            monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    messages: list[str] = []
    with jax.numpy_rank_promotion("allow"):  # JAX's default, unlike in the other tests
        for example in examples_of(name, NAMES[name]):
            example.globs = dict(names_of_the_page)
            runner.run(example, out=messages.append)
    assert messages == []
