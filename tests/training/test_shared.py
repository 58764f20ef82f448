"""Dataset.shared: arrays without an axis of examples, which the model receives after the inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtrain as jt
from tests.training.helpers import assert_close

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LOSS = jt.losses.cross_entropy
GRAPH = RNG.normal(size=(3, 3)).astype(np.float32)
NODES = RNG.normal(size=(16, 3, 4)).astype(np.float32)
LABELS = RNG.integers(0, 2, (16, 3)).astype(np.int32)
MASK = np.arange(48).reshape(16, 3) % 5 != 0
DATA = jt.Dataset(NODES, LABELS, MASK, shared=GRAPH)


class Linen(nn.Module):
    """The reference has the graph itself."""

    has_graph: bool = False

    @nn.compact
    def __call__(self, nodes: Any, graph: Any = None) -> Any:
        x = nn.Dense(2, use_bias=False, kernel_init=nn.initializers.ones)(nodes)
        return (GRAPH if self.has_graph else graph) @ x


class Nnx(nnx.Module):
    def __init__(self) -> None:
        start, rngs = nnx.initializers.ones, nnx.Rngs(0)
        self.layer = nnx.Linear(4, 2, use_bias=False, kernel_init=start, rngs=rngs)

    def __call__(self, nodes: Any, graph: Any) -> Any:
        return graph @ self.layer(nodes)


class Equinox(eqx.Module):
    weight: Any

    def __call__(self, nodes: Any, graph: Any) -> Any:
        assert nodes.shape == (3, 4)
        assert graph.shape == (3, 3)
        return graph @ (nodes @ self.weight)


def apply(params: Any, state: Any, inputs: Any, *, train: bool, key: Any) -> Any:
    nodes, graph = inputs
    return graph @ (nodes @ params["w"]), state


MODELS = {
    "Linen": Linen(),
    "NNX": Nnx(),
    "Equinox": Equinox(jnp.ones((4, 2))),
    "plain functions": jt.Model(lambda key, inputs: ({"w": jnp.ones((4, 2))}, {}), apply),
}


if importlib.util.find_spec("torch"):
    import torch

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2, bias=False)
            torch.nn.init.ones_(self.layer.weight)

        def forward(self, nodes: Any, graph: Any) -> Any:
            return graph @ self.layer(nodes)

    MODELS["PyTorch"] = Torch()


def results(model: Any, data: jt.Dataset, **options: Any) -> dict[str, Any]:
    """What trains, evaluates and predicts, with partial last batches."""
    state = jt.init_state(model, optax.sgd(0.1), data[:1], key=KEY)
    train, test = data.split(0.25, KEY)
    state, history = jt.fit(
        *(state, train, test),
        **{"loss_fn": LOSS, "metric_fns": {"accuracy": jt.metrics.accuracy}, "epochs": 2},
        **{"batch_size": 8, "test_batch_size": 3, "key": KEY, "callbacks": []},
        **options,
    )
    return {
        "history": {name: x for name, x in history.items() if name != "seconds"},
        "evaluation": jt.evaluate(state, data, LOSS, batch_size=5),
        "predictions": jt.predict(state, data, batch_size=5),
        "parameters": sorted(float(leaf.sum()) for leaf in jax.tree.leaves(state.params)),
    }


@pytest.mark.parametrize("framework", MODELS)
def test_a_model_that_receives_an_array_is_one_that_contains_it(framework: str) -> None:
    expected = results(Linen(has_graph=True), DATA.replace(shared=None))
    assert_close(results(MODELS[framework], DATA), expected)


def test_train_and_a_mesh_give_the_same_numbers() -> None:
    expected = results(Linen(), DATA)
    mesh = jax.make_mesh((4,), ("data",))
    assert_close(results(Linen(), DATA, mesh=mesh), expected)
    placed = jt.parallel.shard(DATA, mesh)
    state = jt.init_state(Linen(), optax.sgd(0.1), DATA[:1], key=KEY)
    assert placed.shared.sharding.is_fully_replicated
    ours = jt.train_epoch(state, placed, LOSS, batch_size=8)[1]
    assert_close(ours, jt.train_epoch(state, DATA, LOSS, batch_size=8)[1])


def test_slices_and_splits_keep_all_of_it() -> None:
    text = "inputs=float32[2,3,4], targets=int32[2,3], weights=bool[2,3], shared=float32[3,3]"
    assert repr(DATA[:2]) == f"Dataset({text})" == repr(DATA.take(jnp.arange(2)))
    assert len(DATA) == 16
    for part in DATA.split(0.5, KEY):
        np.testing.assert_array_equal(part.shared, GRAPH)


def test_tuples_of_inputs_and_of_shared_arrays_are_so_many_arguments() -> None:
    seen = []

    class Network(nn.Module):
        @nn.compact
        def __call__(self, left: Any, right: Any, grid: Any, names: Any) -> Any:
            seen.append([left.shape[1:], right.shape[1:], grid.shape, names["a"].shape])
            return nn.Dense(1)(left)

    data = jt.Dataset((np.ones((4, 2)), np.ones((4, 3))), shared=(np.ones(5), {"a": np.ones(6)}))
    state = jt.init_state(Network(), optax.sgd(0.1), data, key=KEY)
    assert jt.predict(state, data).shape == (4, 1)
    assert jt.summary(state, data).layers[0].inputs[2].shape == (5,)
    assert seen
    assert all(each == [(2,), (3,), (5,), (6,)] for each in seen)


def test_a_run_with_another_shared_array_does_not_resume(tmp_path: Path) -> None:
    state = jt.init_state(Linen(), optax.sgd(0.1), DATA, key=KEY)
    options = {"loss_fn": LOSS, "callbacks": [jt.callbacks.checkpoint(tmp_path)]}
    jt.fit(state, DATA, epochs=1, **options)
    with pytest.raises(jt.errors.InputError, match="train data"):
        jt.fit(state, DATA.replace(shared=GRAPH + 1), epochs=1, **options)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ([1.0], r"train\.shared\.0 is a float; expected a NumPy or JAX array"),
        (np.full(3, np.nan, np.float32), r"train\.shared holds nan at \[0\]"),
    ],
)
def test_values_that_are_no_arrays_are_named(shared: Any, message: str) -> None:
    state = jt.init_state(Linen(), optax.sgd(0.1), DATA, key=KEY)
    with pytest.raises(jt.errors.InputError, match=message):
        jt.fit(state, DATA.replace(shared=shared), loss_fn=LOSS)


def test_streams_and_exports_say_that_they_do_not_take_it(tmp_path: Path) -> None:
    state = jt.init_state(Linen(), optax.sgd(0.1), DATA, key=KEY)
    NODES.tofile(tmp_path / "nodes.bin")
    mapped = np.memmap(tmp_path / "nodes.bin", np.float32, "r", shape=NODES.shape)
    for stream in ([DATA], DATA.replace(inputs=mapped)):
        with pytest.raises(
            jt.errors.InputError, match="has shared arrays, which a stream does not"
        ):
            jt.evaluate(state, stream, LOSS)
    with pytest.raises(jt.errors.InputError, match=r"preprocess=lambda inputs: \(inputs, shared\)"):
        jt.export.stablehlo(state, tmp_path / "model.stablehlo", DATA[:1])
    path, pair = tmp_path / "model.stablehlo", lambda inputs: (inputs, GRAPH)
    jt.export.stablehlo(state, path, NODES[:1], preprocess=pair)
    found = jt.export.load_stablehlo(path)(NODES)
    np.testing.assert_allclose(found, jt.predict(state, DATA), rtol=1e-5, atol=1e-6)
