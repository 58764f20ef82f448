"""Modules of every framework train and evaluate in the right mode, or are refused by name."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtrain as jt
from tests.adapters.helpers import DATA, INPUTS, KEY, LOSS, assert_close, evaluate, init, train

KINDS = ["Linen", "NNX", "Equinox"]


def make(kind: str, call: Any, **fields: Any) -> Any:
    """Returns a module with the given `__call__` and a method for each layer of any framework.

    `layer(x)` has parameters, `drop(x, off)` is a dropout of rate 0.5, and `norm(x, off)` is a
    batch norm; `off` is None or the layer's argument.
    """
    fields = {"rate": 0.5, **fields}
    if kind == "Linen":

        def drop(self: Any, x: Any, off: Any, key: Any = None) -> Any:
            return nn.Dropout(self.rate)(x, deterministic=off)

        methods = {
            "layer": lambda self, x: nn.Dense(8, name="dense")(x),
            "drop": drop,
            "norm": lambda self, x, off: nn.BatchNorm(momentum=0.9)(x, use_running_average=off),
        }
        types = {name: type(value) for name, value in fields.items()}
        names = {
            "__call__": call and nn.compact(call),
            "__annotations__": types,
            **fields,
            **methods,
        }
        return type("Net", (nn.Module,), names)()
    if kind == "NNX":

        def create(self: Any) -> None:
            rngs = nnx.Rngs(0)
            self.layer = nnx.Linear(4, 8, rngs=rngs)
            self.dropout = nnx.Dropout(fields["rate"], rngs=rngs)
            self.batch_norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.streams = rngs
            vars(self).update(fields)

        methods = {
            "drop": lambda self, x, off, key=None: self.dropout(x, deterministic=off),
            "norm": lambda self, x, off: self.batch_norm(x, use_running_average=off),
        }
        return type("Net", (nnx.Module,), {"__init__": create, "__call__": call, **methods})()
    methods = {
        "drop": lambda self, x, off, key: eqx.nn.Dropout(self.rate)(x, inference=off, key=key),
        "__call__": call,
    }
    types = {"layer": Any, **{name: type(value) for name, value in fields.items()}}
    net = type("Net", (eqx.Module,), {"__annotations__": types, **fields, **methods})
    return net(eqx.nn.Linear(4, 8, key=KEY))


def of_layer(kind: str, state: jt.TrainState) -> Any:
    """Returns the outputs of the layer with parameters, for the inputs of the tests."""
    if kind == "Equinox":
        return np.asarray(jax.vmap(state.params.layer)(INPUTS))
    layer = jax.tree.map(np.asarray, state.params["dense" if kind == "Linen" else "layer"])
    return np.asarray(INPUTS) @ layer["kernel"] + layer["bias"]


def drops(kind: str, state: jt.TrainState) -> bool:
    """Returns whether half of the outputs is dropped in training; evaluation drops none."""
    expected = of_layer(kind, state)
    np.testing.assert_allclose(evaluate(state)[0], expected, rtol=1e-5, atol=1e-6)
    outputs = np.asarray(train(state)[0])
    dropped = outputs == 0
    scaled = np.where(dropped, 0, 2 * expected)
    return 0.3 < dropped.mean() < 0.7 and np.allclose(outputs, scaled, rtol=1e-5)


def dropped(self: Any, x: Any, train: Any, key: Any) -> Any:
    return self.drop(self.layer(x), not train, key)


# Each default is that of evaluation. Linen and NNX ignore the key, Equinox needs it.
SPELLINGS = {
    "train": lambda self, x, train=False, key=None: dropped(self, x, train, key),
    "training": lambda self, x, training=False, key=None: dropped(self, x, training, key),
    "is_training": lambda self, x, *, is_training, key=None: dropped(self, x, is_training, key),
    "is_train": lambda self, x, is_train=False, key=None: dropped(self, x, is_train, key),
    "enable_dropout": lambda self, x, enable_dropout=True, key=None: dropped(
        self, x, enable_dropout, key
    ),
    "deterministic": lambda self, x, deterministic=True, *, key=None: dropped(
        self, x, not deterministic, key
    ),
    "inference": lambda self, x, key=None, inference=False: dropped(self, x, not inference, key),
    "eval": lambda self, x, *, eval, key=None: dropped(self, x, not eval, key),
    "use_running_average": lambda self, x, use_running_average=None, key=None: dropped(
        self, x, not use_running_average, key
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mode_argument_is_passed_whatever_its_name(kind: str, spelling: str) -> None:
    assert drops(kind, init(make(kind, SPELLINGS[spelling])))


def hidden(self: Any, x: Any, stochastic: bool = False, key: Any = None) -> Any:
    return self.drop(self.layer(x), not stochastic, key)


def by_hand(self: Any, x: Any, noise: bool = False, key: Any = None) -> Any:
    x = self.layer(x)
    if not noise:
        return x
    key = self.make_rng("dropout") if isinstance(self, nn.Module) else key
    key = self.streams() if isinstance(self, nnx.Module) else key
    return x * 2 * jax.random.bernoulli(key, 0.5, x.shape)


def always_by_hand(self: Any, x: Any, key: Any = None) -> Any:
    return by_hand(self, x, True, key)


def by_field(self: Any, x: Any, key: Any = None) -> Any:
    return self.drop(self.layer(x), not self.training, key)


def always(self: Any, x: Any, train: bool, key: Any = None) -> Any:
    return self.drop(self.layer(x), False, key)


def normalized(self: Any, x: Any, training: bool) -> Any:
    return self.norm(self.layer(x), not training)


def frozen(self: Any, x: Any) -> Any:
    return self.norm(self.layer(x), True)


def by_batch(self: Any, x: Any) -> Any:
    return self.norm(self.layer(x), False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "fields", "match"),
    [
        (hidden, {}, r"the argument stochastic=False of Net.* module\(inputs, stochastic=train"),
        (by_hand, {}, r"the argument noise=False of Net.* call=lambda .*, noise=train"),
        (
            by_field,
            {"training": False},
            "in training, (Net|Dropout).* because of training=False of",
        ),
        (by_field, {"training": True}, "in evaluation, (Net|Dropout).* because of training=True"),
        (always, {}, "in evaluation, Dropout.* of Net is in training mode because of"),
        (always_by_hand, {}, "Net draws random numbers in evaluation; expected .* call="),
    ],
)
def test_dropout_in_the_wrong_mode_is_refused(
    kind: str, call: Any, fields: Any, match: str
) -> None:
    with pytest.raises(jt.errors.InputError, match=match):
        init(make(kind, call, **fields))


@pytest.mark.parametrize("kind", ["Linen", "NNX"])
def test_batch_norm_has_the_mode_of_the_call_or_is_refused(kind: str) -> None:
    state = init(make(kind, normalized))
    x = of_layer(kind, state)
    assert_close(evaluate(state)[0], x / np.sqrt(1 + 1e-5))
    outputs, after = train(state)
    assert_close(outputs, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
    found = [leaf for leaf in jax.tree.leaves(after) if leaf.shape == (8,)]
    assert_close(found, [0.1 * x.mean(0), 0.9 + 0.1 * x.var(0)])
    for call, mode in ((frozen, "evaluation"), (by_batch, "training")):
        with pytest.raises(jt.errors.InputError, match=f"BatchNorm.* of Net is in {mode} mode"):
            init(make(kind, call))
    as_called = init(make(kind, frozen), call=lambda module, inputs, *, train, rngs: module(inputs))
    assert_close(train(as_called)[0], evaluate(as_called)[0])


class Stateful(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self) -> None:
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")

    def __call__(self, x: Any, state: Any, training: bool) -> Any:
        return self.norm(x, state, inference=not training)


class Fixed(Stateful):
    def __call__(self, x: Any, state: Any) -> Any:
        return self.norm(x, state, inference=False)


def test_batch_norm_of_equinox_has_the_mode_of_the_call_or_is_refused() -> None:
    x = np.asarray(INPUTS)
    for call in (None, lambda m, x, state, *, train, rngs: m(x, state, training=train)):
        state = init(Stateful(), call=call)
        outputs, after = train(state)
        assert_close(outputs, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
        evaluated = state.replace(model_state=after)
        module, batch_state = jt.to_module(evaluated)
        expected, _ = jax.vmap(module.norm, in_axes=(0, None), axis_name="batch")(x, batch_state)
        assert_close(evaluate(evaluated)[0], expected)
    with pytest.raises(jt.errors.InputError, match="in evaluation, BatchNorm 'norm' of Fixed is"):
        init(Fixed())


def unused(self: Any, x: Any, key: Any = None) -> Any:
    jax.random.uniform(jax.random.split(jax.random.key(0) if key is None else key)[0])
    return self.layer(x) + jax.random.uniform(jax.random.key(3))


@pytest.mark.parametrize("kind", ["NNX", "Equinox"])
def test_unused_draws_and_draws_from_a_fixed_key_are_no_draws(kind: str) -> None:
    state = init(make(kind, unused))
    assert_close(evaluate(state)[0], of_layer(kind, state) + jax.random.uniform(jax.random.key(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_needs_no_mode(kind: str) -> None:
    state = init(make(kind, always, rate=0.0))
    assert_close(train(state)[0], of_layer(kind, state))


def masked(self: Any, x: Any, mask: Any, stochastic: bool = False, key: Any = None) -> Any:
    return self.drop(self.layer(x), not stochastic, key) * mask


def call_masked(module: Any, inputs: Any, *, train: bool, rngs: Any) -> Any:
    key = {} if isinstance(rngs, (dict, nnx.Rngs)) else {"key": rngs}
    return module(inputs["x"], inputs["mask"], stochastic=train, **key)


@pytest.mark.parametrize("kind", KINDS)
def test_call_says_how_a_module_is_called(kind: str) -> None:
    inputs = {"x": INPUTS, "mask": jnp.ones((20, 8)).at[:, 3].set(0)}
    network = jt.mixed_precision(make(kind, masked)) if kind == "NNX" else make(kind, masked)
    state = init(network, inputs, call=call_masked)
    outputs = [
        *(train(state, key, inputs)[0] for key in jax.random.split(KEY)),
        evaluate(state, inputs)[0],
    ]
    assert all((x[:, 3] == 0).all() for x in outputs)
    assert 0.3 < (outputs[0] == 0).mean() < 0.8
    assert (outputs[0] != outputs[1]).any()
    expected = of_layer(kind, state) * inputs["mask"]
    np.testing.assert_allclose(outputs[2], expected, atol=0.05 if kind == "NNX" else 1e-6)
    assert state.model == init(network, inputs, call=call_masked).model


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_of_a_call_drives_draws_in_training_alone(kind: str) -> None:
    def call(module: Any, inputs: Any, *, train: bool, rngs: Any) -> Any:
        x = module(inputs)
        key = rngs["dropout"] if kind == "Linen" else rngs() if kind == "NNX" else rngs
        return x * 2 * jax.random.bernoulli(key, 0.5, x.shape) if train or draws else x

    network, draws = make(kind, lambda self, x: self.layer(x)), False
    assert drops(kind, init(network, call=call))
    draws = True
    with pytest.raises(jt.errors.InputError, match="Net draws random numbers in evaluation"):
        init(network, call=lambda *args, **options: call(*args, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_is_several_arguments_if_the_module_takes_them(kind: str) -> None:
    inputs = INPUTS, jnp.full((20, 8), 3.0)
    state = init(make(kind, lambda self, x, y, train=False: self.layer(x) * y), inputs)
    assert_close(evaluate(state, inputs)[0], 3 * of_layer(kind, state))
    state = init(make(kind, lambda self, pair, train=False: self.layer(pair[0]) + pair[1]), inputs)
    assert_close(evaluate(state, inputs)[0], 3 + of_layer(kind, state))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_argument_is_named_with_the_call_that_passes_it(kind: str) -> None:
    match = (
        r"Net is called .* missing a required argument: 'mask'; .* shared=\.\.\.\), or "
        r"init_state\(..., call=lambda "
        r'module, inputs, \*, train, rngs: module\(inputs\["x"\], inputs\["mask"\], key=rngs\)\)'
    )
    with pytest.raises(jt.errors.InputError, match=match):
        init(make(kind, masked))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_may_be_called_by_another_method(kind: str) -> None:
    def call(module: Any, inputs: Any, *, train: bool, rngs: Any) -> Any:
        return module.layer(inputs)

    def encode(module: Any, inputs: Any, *, train: bool, rngs: Any) -> Any:
        return module.encode(inputs)

    class Encoder(nn.Module):
        @nn.compact
        def encode(self, x: Any) -> Any:
            return nn.Dense(8, name="dense")(x)

    state = init(
        *([Encoder()] if kind == "Linen" else [make(kind, None)]),
        call=encode if kind == "Linen" else call,
    )
    assert_close(train(state)[0], of_layer(kind, state))


@pytest.mark.parametrize(
    ("model", "call", "match"),
    [
        (jt.Model(len, len), len, "call is given with a Model"),
        (eqx.nn.Identity(), "forward", r"call is 'forward'; expected a function call\(module"),
        (nn.Dense(1), lambda module, inputs: inputs, "call does not take train and rngs; expected"),
    ],
)
def test_a_call_is_a_function_and_for_modules(model: Any, call: Any, match: str) -> None:
    # The type checker of `make test TYPES=1` may raise first.
    with pytest.raises((jt.errors.InputError, TypeError), match=f"{match}|typechecking"):
        init(model, call=call)


@pytest.mark.parametrize("kind", ["Linen", "NNX"])
def test_batch_norm_may_reduce_over_an_axis_name(kind: str) -> None:
    def states(axis_name: str | None) -> jt.TrainState:
        if kind == "Linen":
            return init(nn.BatchNorm(axis_name=axis_name))
        return init(nnx.BatchNorm(4, axis_name=axis_name, rngs=nnx.Rngs(0)))

    found, expected = (
        jt.train_epoch(states(name), DATA, LOSS, batch_size=10) for name in ("batch", None)
    )
    assert_close(found[1], expected[1])
    assert_close(found[0].model_state, expected[0].model_state)
