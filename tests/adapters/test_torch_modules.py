"""PyTorch modules train in JAX as they do in PyTorch, and come back."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.adapters.helpers import KEY

torch = pytest.importorskip("torch")

from tests.adapters.torch_networks import CASES, Tokens  # noqa: E402

STEPS, BATCH = 5, 4
OPTIMIZERS = {
    "sgd": (
        jt.optimizers.sgd(0.05, momentum=0.9),
        lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
    ),
    # A gradient that is 0 but for rounding errors must not be divided by its size.
    "adam": (
        jt.optimizers.adam(0.01, eps=1e-2),
        lambda params: torch.optim.Adam(params, 0.01, eps=1e-2),
    ),
}


def make_inputs(shapes: Any, count: int = BATCH, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    arrays = tuple(
        rng.integers(0, shape.count, (count, *shape.shape))
        if isinstance(shape, Tokens)
        else rng.normal(size=(count, *shape)).astype(np.float32)
        for shape in shapes
    )
    return arrays if len(arrays) > 1 else arrays[0]


def call_torch(module: Any, inputs: Any, *, train: bool) -> Any:
    module.train(train)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return module(*(torch.tensor(np.asarray(x)) for x in inputs))


def loss_fn(outputs: Any, targets: Any) -> Any:
    """The squared distance to 0.3 of each example, for arrays and tensors."""
    leaves = [((x - 0.3) ** 2).reshape((x.shape[0], -1)).mean(1) for x in jax.tree.leaves(outputs)]
    return sum(leaves[1:], leaves[0])


def to_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x.detach() if hasattr(x, "detach") else x), tree)


def assert_close(found: Any, expected: Any) -> None:
    """To 1e-5 of the largest number in each array."""
    found, expected = to_numpy(found), to_numpy(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(np.abs(y).max(), 0.1))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    names = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in names}


@jax.jit
def in_jax(states: Any, inputs: Any) -> Any:
    """Returns outputs in evaluation and in training, gradients, and the states after some steps.

    The gradients of both optimizers are computed at once, under `vmap`.
    """
    batch, (first, *_) = jt.Dataset(inputs, jnp.zeros(BATCH)), states.values()
    outputs, _ = first.model.apply(first.params, first.model_state, inputs, train=False, key=None)

    def gradients(params: Any, model_state: Any, step: Any) -> Any:
        state = first.replace(params=params, model_state=model_state, step=step)
        return jt.gradients(state, batch, loss_fn)

    def step(states: Any, _: Any) -> Any:
        parts = [(state.params, state.model_state, state.step) for state in states.values()]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
        results = jax.vmap(gradients)(*stacked)
        after = {}
        for index, (name, state) in enumerate(states.items()):
            (_, aux), grads = jax.tree.map(lambda x, i=index: x[i], results)
            after[name] = jt.apply_gradients(state, grads, model_state=aux.model_state)
        return after, results

    after, results = jax.lax.scan(step, states, length=STEPS)
    (losses, _), _ = results
    (_, aux), grads = jax.tree.map(lambda x: x[0, 0], results)
    return outputs, aux.predictions, grads, after, dict(zip(states, losses.T, strict=True))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_in_pytorch(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    module = case.make()
    inputs = make_inputs(case.shapes)
    sample = jax.tree.map(lambda x: x[:1], inputs)
    start = copy.deepcopy(module.state_dict())
    states = {
        name: jt.init_state(module, ours, sample, key=KEY) for name, (ours, _) in OPTIMIZERS.items()
    }
    outputs, predictions, grads, after, losses = in_jax(states, inputs)

    assert_close(outputs, call_torch(module, inputs, train=False))
    reference = copy.deepcopy(module)
    found = call_torch(reference, inputs, train=True)
    assert_close(predictions, found)
    loss_fn(found, None).mean().backward()
    assert_close(flat(grads), {name: p.grad for name, p in reference.named_parameters()})

    for name, (_, theirs) in OPTIMIZERS.items():
        reference = copy.deepcopy(module)
        optimizer, found = theirs(reference.parameters()), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            found.append(loss_fn(call_torch(reference, inputs, train=True), None).mean())
            found[-1].backward()
            optimizer.step()
        state = after[name]
        assert_close(losses[name], np.array([float(x.detach()) for x in found]))
        assert_close(flat(state.params), dict(reference.named_parameters()))
        assert_close(flat(state.model_state), dict(reference.named_buffers()))
        trained = jt.to_module(state)
        assert type(trained) is type(module)
        assert not trained.training
        assert_close(
            call_torch(trained, inputs, train=False), call_torch(reference, inputs, train=False)
        )
        assert {k: v.dtype for k, v in trained.state_dict().items()} == {
            k: v.dtype for k, v in start.items()
        }
    assert all(torch.equal(module.state_dict()[k], v) for k, v in start.items())
