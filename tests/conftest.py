"""Data and models that several test modules share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Programs compiled by one test are found by the next and by the processes it starts; before JAX
# is imported, which reads these.
CACHE = Path(__file__).parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# PyTorch's threads spin while they wait, and the tests run in several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Python's collector walks all that JAX has traced, by default hundreds of times in a module.
gc.set_threshold(100_000, 20, 100)
# Simulated devices, for the tests of meshes; all other tests use the first one. Most of the time is
# spent on compiling, which takes a third as long without LLVM's optimizations and XLA's newer
# emitters. jaxlib 0.12 has no others, and ends the process at a flag that it does not know.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# The tests run in several processes, which share a GPU where there is one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import jaxtrain as jt  # noqa: E402
from jaxtrain.data.mnist import DATA_DIR_VARIABLE  # noqa: E402

# Compiling takes longer than hypothesis' default deadline, and not the same twice.
settings.register_profile("jaxtrain", deadline=None, derandomize=True)
settings.load_profile("jaxtrain")

# The library must not rely on implicit rank promotion, which users may forbid.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow tests first: one process begins with them while another runs the others."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def mnist() -> jt.data.Resolved:
    """The real MNIST, where the environment says that it is on disk."""
    if not os.environ.get(DATA_DIR_VARIABLE):
        pytest.skip(f"needs MNIST: set {DATA_DIR_VARIABLE} to the folder of its files")
    return jt.data.load_resolved("mnist")


@pytest.fixture(scope="session")
def digits() -> jt.data.Resolved:
    """The bundled digits."""
    return jt.data.load_resolved("digits")


# Shared by all tests, so that those of a module also share the programs compiled for them.
@pytest.fixture(scope="session")
def small_classes() -> jt.Dataset:
    """50 examples of 6 features in 3 classes that a small network can learn."""
    key = jax.random.key(7)
    labels = jnp.arange(50) % 3
    inputs = jax.nn.one_hot(labels, 6) + 0.3 * jax.random.normal(key, (50, 6))
    return jt.Dataset(inputs, labels)


@pytest.fixture(scope="session")
def small_state(small_classes: jt.Dataset) -> jt.TrainState:
    """A small network with dropout for `small_classes`, with plain SGD."""
    model = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
    return jt.init_state(
        model, jt.optimizers.sgd(0.1), small_classes.inputs[:1], key=jax.random.key(0)
    )


# Of memory, by a process; each compiled program has some.
MAX_MAPS = 3_000


@pytest.fixture(autouse=True, scope="module")
def _release_compiled_programs() -> Iterator[None]:
    """Programs are released when there are many: each takes memory, and Linux limits the maps.

    Releasing them takes a second, and the next module compiles again what it shares with this one.
    With this number of maps, a process has about 2 GiB.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
