# Every target works from a fresh clone: the virtual environment is made when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the tests; 0 runs them one after the other, to watch or to debug.
WORKERS ?= 2

.PHONY: help linear mnist tutorials test bench check format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

linear: $(VENV)/installed  ## tutorial T1: linear regression (ARGS="--epochs 400" passes flags)
	$(BIN)/python experiments/linear_regression.py $(ARGS)

mnist: $(VENV)/installed  ## tutorial T2: MNIST (ARGS="--dataset digits" passes flags)
	$(BIN)/python experiments/mnist.py $(ARGS)

tutorials: $(VENV)/installed  ## all tutorials, and one table of their figures beside the originals'
	$(BIN)/python -m experiments.tutorials $(ARGS)

test: $(VENV)/installed-test  ## run the tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(ARGS)

bench: $(VENV)/installed-bench  ## time ours against PyTorch and others (ARGS="--quick" in a minute)
	$(BIN)/python -m benchmarks $(ARGS)

# What runs in processes of its own, or is no part of the library, is left out of the last line: it is
# beyond its checker.
check: $(VENV)/installed-dev  ## lint, format, types, and the tests with shapes and types checked at run time
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --jaxtyping-packages=jaxtrain,tests.checked --ignore=tests/test_experiments.py --ignore=tests/test_survival.py --ignore=tests/test_benchmarks.py

format: $(VENV)/installed-dev  ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches, keep results in runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .jax_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed-test $(VENV)/installed-bench $(VENV)/installed
