"""verify: clean networks pass in every way, and a planted fault of the compiler is named."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import jaxtrain as jt
from jaxtrain import _compiler
from jaxtrain.inspect import Verification
from jaxtrain.lowerings import _convolution

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 6, 6, 1)).astype(np.float32)
LABELS = RNG.integers(0, 3, 6)
LOSS = jt.losses.cross_entropy
WAYS = ("operation by operation", "compiled", "inside a loop", "under vmap", "as two half batches")


class Cnn(nn.Module):
    """A CNN, with or without batch norm and dropout."""

    regularized: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.relu(nn.Conv(2, (3, 3))(x))
        if self.regularized:
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = jt.models.Dropout(0.5)(nn.max_pool(x, (2, 2), (2, 2)), train)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Recurrent(nn.Module):
    """A recurrent network over the rows of an image."""

    cell: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.RNN(self.cell)(x[:, :3, :, 0])[:, -1])


def verify(model: Any, batch: Any = (IMAGES, LABELS), loss_fn: Any = LOSS) -> Verification:
    state = jt.init_state(model, jt.optimizers.sgd(0.1), batch[0][:1], key=jax.random.key(0))
    return jt.verify(state, batch, loss_fn)


MLP = jt.models.FeedForward(features=(3,), mean=0.0, std=1.0)


@pytest.mark.parametrize(
    "model",
    [
        MLP,
        pytest.param(Cnn(regularized=True), marks=pytest.mark.slow),
        pytest.param(Recurrent(nn.OptimizedLSTMCell(2)), marks=pytest.mark.slow),
        pytest.param(Recurrent(nn.GRUCell(2)), marks=pytest.mark.slow),
        pytest.param(jt.mixed_precision(Cnn()), marks=pytest.mark.slow),
    ],
    ids=["MLP", "CNN", "LSTM", "GRU", "half precision"],
)
def test_rounding_explains_all_differences_of(model: Any) -> None:
    found = verify(model)
    assert found.ok, found
    assert (found.operation, found.flag) == (None, None)
    for each, way in zip(found.differences, WAYS, strict=True):
        assert each.way.startswith(way)
        assert each.difference <= each.explained < 0.2  # bfloat16 has 8 bits
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert all(line.endswith("ok") for line in lines[1:])


def test_halves_count_by_the_class_weights_of_their_labels() -> None:
    weighted = functools.partial(LOSS, weight=jnp.array([1.0, 5.0, 0.2]))
    labels = np.array([0, 0, 0, 1, 2, 2])
    assert verify(MLP, (IMAGES, labels), weighted).ok
    # The sum of two means is not a mean of the halves' sums.
    found = verify(MLP, (IMAGES, labels), lambda p, t: weighted(p, t) + LOSS(p, t))
    assert found.ok
    assert [each.way for each in found.differences] == list(WAYS[:-1])


twice_p = Primitive("twice")
twice_p.def_impl(lambda x: x + x)
twice_p.def_abstract_eval(lambda x: x)
ad.deflinear2(twice_p, lambda cotangent, _: [twice_p.bind(cotangent)])
batching.defvectorized(twice_p)
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: 2.001 * x, multiple_results=False))


def apply_twice(params: Any, state: Any, x: Any, *, train: bool, key: Any) -> Any:
    return jnp.tanh(twice_p.bind(x.reshape(len(x), -1) @ params)), state


def test_an_operation_that_is_wrong_when_compiled_is_named() -> None:
    found = verify(jt.Model(lambda key, x: (jnp.ones((36, 3)) / 36, {}), apply_twice))
    assert not found.ok
    assert [each.ok for each in found.differences] == [True, False, False, False, False]
    assert found.operation is not None
    assert found.operation.startswith("twice -> float32[6,3]")
    assert f"{__file__}:" in found.operation
    assert found.flag is None
    assert "removed by: no known flag" in str(found)


@pytest.fixture
def wrong_convolution(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    right = _convolution._ungrouped
    monkeypatch.setattr(
        _convolution, "_ungrouped", lambda *args, **options: 1.001 * right(*args, **options)
    )
    jt.use_cpu_lowerings(True)  # drops the programs that are right
    yield
    monkeypatch.undo()
    jt.use_cpu_lowerings(True)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the lowerings are those of CPUs")
def test_the_librarys_own_convolution_is_compared_with_that_of_xla(
    wrong_convolution: None,
) -> None:
    """In float64, the lowering does not apply."""
    found = verify(Cnn())
    assert not any(each.ok for each in found.differences)
    assert found.operation is not None
    assert found.operation.startswith("conv_general_dilated -> float32[6,6,6,2]")


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fault on CPUs")
def test_the_known_fault_is_found_with_the_flag_that_removes_it() -> None:
    def apply(scale: Any, matrix: Any, x: Any, *, train: bool, key: Any) -> Any:
        return scale * jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x), matrix

    model = jt.Model(lambda key, x: (jnp.ones(()), jnp.eye(3)), apply)
    rows = RNG.normal(size=(36_000, 3)).astype(np.float32)

    def loss(predictions: Any, targets: Any) -> Any:
        return predictions

    found = verify(model, (rows, np.zeros(len(rows), np.float32)), loss)
    if _compiler.JAXLIB in _compiler.WRONG_ROWS:
        assert not found.ok
        assert found.operation is not None
        assert found.operation.startswith("reduce_sum -> float32[36000]")
        assert found.flag == "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type="
    else:
        assert found.ok, found


def test_wrong_arguments_are_named() -> None:
    state = jt.init_state(MLP, jt.optimizers.sgd(0.1), IMAGES[:1], key=jax.random.key(0))
    with pytest.raises(jt.errors.InputError, match="loss_fn is 'mse'; expected a function"):
        jt.verify(state, (IMAGES, LABELS), "mse")  # type: ignore[arg-type]
    with pytest.raises(jt.errors.InputError, match="batch"):
        jt.verify(state, (IMAGES, LABELS[:2]), LOSS)
