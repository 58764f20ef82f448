"""Known faults of XLA's compiler for CPUs: which versions have them, and how they are avoided."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain import _compiler
from jaxtrain._compiler import JAXLIB, WITHOUT_YNN, WRONG_ROWS

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="faults on CPUs")

ROWS = np.random.default_rng(0).normal(size=(36_000, 3)).astype(np.float32)
RIGHT = (ROWS.astype(np.float64) ** 2).sum(1)

# Programs that end the process, with the versions of jaxlib on which they do; None: all so far.
# The first two are https://github.com/jax-ml/jax/issues/39257 and 40412, the last one is the
# product of attention on [batch, 2, 2, 8, 8, 8] under vmap.
CRASHES: dict[str, tuple[str, set[str] | None]] = {
    "39257": (
        "def f(rows, table):\n"
        "    found = jnp.sum(rows[..., None, None, None, None, None] * table, axis=2)\n"
        "    return jnp.log(jnp.maximum(found, 2.2e-16))\n"
        "arguments = jnp.ones((10, 4, 6)), jnp.ones((10, 4, 6, 9, 9, 9, 9, 9))\n",
        {"0.10.2", "0.11.0"},
    ),
    "40412": (
        "def f(a):\n    return jnp.sum(a * (a + 1), axis=3)\n"
        "arguments = (jnp.ones((3, 1, 2, 2, 8, 8, 8)),)\n",
        {"0.10.2"},
    ),
    "rank 8": (
        "from tests.test_compiler import attention_gradients\n"
        "f, arguments = jax.vmap(attention_gradients), (jnp.arange(3),)\n",
        None,
    ),
}


def attention_gradients(seed: Any) -> Any:
    """Returns the gradients of attention on [batch, 2, 2, 8, 8, 8]."""
    inputs, module = jnp.ones((4, 2, 2, 8, 8, 8)), nn.MultiHeadDotProductAttention(num_heads=2)
    params = module.init(jax.random.key(seed), inputs)
    return jax.grad(lambda params: jnp.mean(module.apply(params, inputs) ** 2))(params)


def norms(matrix: Any, rows: Any) -> Any:
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


def norm_state() -> jt.TrainState:
    model = jt.Model(
        lambda key, x: (jnp.eye(3), {}),
        lambda params, state, x, *, train, key: (norms(params, x), state),
    )
    return jt.init_state(model, jt.optimizers.sgd(0.1), ROWS[:1], key=jax.random.key(0))


@pytest.mark.parametrize("options", [None, WITHOUT_YNN], ids=["plain", "without YNNPACK"])
def test_issue_39103_is_in_the_versions_that_we_list(options: Any) -> None:
    found = jax.jit(norms, compiler_options=options)(jnp.eye(3), ROWS)
    is_right = bool(np.allclose(found, RIGHT, rtol=1e-4))
    assert is_right == (options is not None or JAXLIB not in WRONG_ROWS)


def test_large_batches_are_evaluated_correctly() -> None:
    state, size = norm_state(), len(ROWS)
    data = jt.Dataset(ROWS, np.zeros(size, np.float32))

    def loss(predictions: Any, targets: Any) -> Any:
        return predictions

    np.testing.assert_allclose(jt.predict(state, ROWS, batch_size=size), RIGHT, rtol=1e-4)
    expected = pytest.approx(RIGHT.mean(), rel=1e-5)
    assert jt.evaluate(state, data, loss, batch_size=size)["loss"] == expected
    assert jt.eval_step(state, data, loss)["loss"] == expected
    stream = [(data.inputs, data.targets)]
    assert jt.evaluate(state, stream, loss)["loss"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", CRASHES)
def test_a_program_ends_the_process_on_the_versions_that_we_list(name: str) -> None:
    program, versions = CRASHES[name]
    code = f"import jax, jax.numpy as jnp\n{program}jax.block_until_ready(jax.jit(f)(*arguments))\n"
    flag = "--xla_cpu_experimental_ynn_fusion_type="
    for flags, ends in (("", versions is None or JAXLIB in versions), (flag, False)):
        environment = os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert (done.returncode < 0) == ends, done.stderr.decode()[-500:]


def test_a_sweep_over_arrays_of_many_axes_does_not_end_the_process() -> None:
    found = jt.sweep(attention_gradients, {"seed": range(3)}, at_once=3, callbacks=[])
    assert found.shape == (3,)


def test_programs_of_dead_optimizers_are_dropped(
    small_state: jt.TrainState, small_classes: jt.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compiler, "_MAX_PROGRAMS", 2)
    batch, updates = small_classes[:4], []
    for _ in range(6):
        state = jt.with_optimizer(small_state, jt.optimizers.sgd(0.1))
        jt.train_step(state, batch, jt.losses.cross_entropy)
        updates.append(weakref.ref(state.optimizer.update))
    del state
    gc.collect()
    assert sum(update() is not None for update in updates) <= 3


def test_programs_are_not_dropped_while_another_is_traced(
    small_state: jt.TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compiler, "_MAX_PROGRAMS", -1)
    cleared: list[bool] = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))

    def step(rate: jax.Array) -> jax.Array:  # the key of the state is not traced
        return jt.with_optimizer(small_state, jt.optimizers.sgd(rate)).step

    jax.jit(step)(jnp.array(0.1))
    assert not cleared
    step(jnp.array(0.1))
    assert cleared
