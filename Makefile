# Every target works in a fresh clone: the virtual environment is created if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles the files that are imported, and keeps the results; compiling all takes longer.
INSTALL := pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=
# Processes that run the tests; 0 runs them in this one, to debug.
WORKERS ?= 2

.PHONY: help linear mnist sweep speedrun tutorials test test-all test-without-torch package docs test-docs
.PHONY: bench check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

linear: $(VENV)/installed  ## tutorial T1: linear regression (ARGS="--epochs 400" passes flags)
	$(BIN)/python experiments/linear_regression.py $(ARGS)

mnist: $(VENV)/installed  ## tutorial T2: MNIST (ARGS="--dataset digits" passes flags)
	$(BIN)/python experiments/mnist.py $(ARGS)

sweep: $(VENV)/installed  ## T2 at several learning rates and seeds (ARGS="--dataset digits" passes flags)
	$(BIN)/python experiments/sweep.py $(ARGS)

speedrun: $(VENV)/installed  ## MNIST to 99 % in seconds, 20 seeds (ARGS="--seeds 1" passes flags)
	$(BIN)/python experiments/speedrun.py $(ARGS)

tutorials: $(VENV)/installed  ## all tutorials, and one table of their figures beside the originals'
	$(BIN)/python -m experiments.tutorials $(ARGS)

# With TYPES=1, shapes and types are checked at run time, in all tests but those that run scripts
# in other processes, which the type checker does not reach.
IN_PROCESSES := test_experiments.py test_survival.py test_benchmarks.py test_extras.py test_user_types.py
IN_PROCESSES += cli/test_command.py callbacks/test_progress.py docs
TYPES_1 := --jaxtyping-packages=jaxtrain,tests.checked $(addprefix --ignore=tests/,$(IN_PROCESSES))
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal $(TYPES_$(TYPES))

test: $(VENV)/installed-test  ## run the fast tests (TYPES=1 checks shapes and types at run time)
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/installed-test  ## run all tests, also those that start processes or train for long
	$(BIN)/python $(PYTEST) $(ARGS)

# In a virtual environment of its own: make test-without-torch PYTHON=python3.13
test-without-torch: .venv-without-torch/installed  ## run the fast tests without PyTorch (PYTHON=python3.13 picks another Python)
	.venv-without-torch/bin/python $(PYTEST) -m "not slow" $(ARGS)

# The sdist's tests of what can differ from a clone: files that it lacks, and the package as installed.
SDIST_TESTS := $(addprefix tests/,test_packaging.py test_imports.py test_user_types.py)
SDIST_TESTS += tests/models/test_models.py
SDIST_TOOLS := pytest pytest-xdist hypothesis beartype pandas

package:  ## build the wheel and the sdist, install the wheel, train a model in a folder, test the sdist
	rm -rf build && mkdir -p build/folder build/sdist
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m $(INSTALL) build
	build/tools/bin/python -m build --outdir build/dist .
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m $(INSTALL) build/dist/*.whl
	cd build/folder && ../venv/bin/python $(CURDIR)/tests/own_model.py
	tar -xzf build/dist/*.tar.gz -C build/sdist --strip-components 1
	build/venv/bin/python -m $(INSTALL) "$$(echo build/dist/*.whl)[types]" $(SDIST_TOOLS)
	cd build/sdist && ../venv/bin/python -m pytest --quiet --numprocesses $(WORKERS) $(SDIST_TESTS)

docs: $(VENV)/installed-docs  ## build the site in docs/_build/html; every tutorial is executed
	rm -rf docs/_build
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky -b html -d docs/_build/doctrees \
		docs docs/_build/html

test-docs: docs $(VENV)/installed-test  ## build the site, and test its links and pages in Chromium
	OMP_NUM_THREADS=1 JAXTRAIN_REQUIRE_SITE=1 $(BIN)/python $(PYTEST) tests/docs $(ARGS)

bench: $(VENV)/installed-bench  ## time ours against PyTorch and others (ARGS="--quick" in two minutes)
	$(BIN)/python -m benchmarks $(ARGS)

check: $(VENV)/installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches, keep results in runs/
	rm -rf $(VENV) .venv-without-torch build dist docs/_build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .jax_cache .hypothesis

# What the metadata of the installed package is made from: the second file states the version.
METADATA := pyproject.toml jaxtrain/__init__.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(METADATA) | $(BIN)/python
	$(BIN)/python -m $(INSTALL) --editable '.[experiments]'
	touch $@

$(VENV)/installed-test: $(METADATA) | $(BIN)/python
	$(BIN)/python -m $(INSTALL) --editable '.[test,torch]'
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: $(METADATA) | $(BIN)/python
	$(BIN)/python -m $(INSTALL) --editable '.[bench]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(METADATA) | $(BIN)/python
	$(BIN)/python -m $(INSTALL) --editable '.[docs]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(METADATA) | $(BIN)/python
	$(BIN)/python -m $(INSTALL) --editable '.[dev]'
	touch $@ $(addprefix $(VENV)/installed,-test -bench -docs) $(VENV)/installed

.venv-without-torch/installed: $(METADATA)
	$(PYTHON) -m venv .venv-without-torch
	.venv-without-torch/bin/python -m $(INSTALL) --editable '.[test]'
	touch $@
