"""fit and train refuse models that mix the examples of a batch in evaluation, and no others."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxtrain as jt

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(6, 4)).astype(np.float32)
SERIES = RNG.normal(size=(6, 5, 4)).astype(np.float32)
TOKENS = RNG.integers(0, 20, (6, 5)).astype(np.int32)
IMAGES = RNG.integers(0, 255, (6, 8, 8)).astype(np.uint8)
PICTURES = RNG.normal(size=(6, 8, 8, 3)).astype(np.float32)
MESSAGE = r"changes by .* with the other examples .*independent_examples=False"


def check(
    model: Any, inputs: Any, *, loss: Any = None, traced: bool = False, **options: Any
) -> Any:
    """Runs the checks of `fit` and `train`, without a step."""
    first = jax.tree.map(lambda leaf: leaf[:1], inputs)
    state = jt.init_state(model, optax.sgd(0.1), first, key=KEY, **options)
    data = jt.Dataset(inputs, np.zeros(len(jax.tree.leaves(inputs)[0]), np.float32))
    loss: Any = lambda predictions, targets: jnp.zeros(len(targets))  # noqa: E731
    arguments: dict[str, Any] = {"loss_fn": loss, "epochs": 0, "batch_size": 4}
    if traced:
        return jax.eval_shape(lambda state: jt.train(state, data, **arguments), state)
    jt.train(state, data, **arguments)
    return jt.fit(state, data, **arguments, callbacks=[])


def plain(function: Any) -> jt.Model:
    """A model without parameters."""
    return jt.Model(
        lambda key, inputs: ({"unused": jnp.zeros(())}, {}),
        lambda params, state, inputs, *, train, key: (function(inputs), state),
    )


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3))(inputs / 255))
        return nn.Dense(2)(x.reshape(len(inputs), -1))


class ByHand(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, example: Any) -> Any:
        x = self.layer(example)
        return x - lax.pmean(x, "batch")


class Attention(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(20, 8)(tokens) + nn.Embed(9, 8)(jnp.arange(tokens.shape[1]))[None]
        mask = nn.combine_masks(
            nn.make_causal_mask(tokens), nn.make_attention_mask(tokens > 0, tokens > 0)
        )
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        return nn.Dense(3)(nn.gelu(x)[:, -1])


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, series: Any) -> Any:
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(4))(series)[:, -1])


class Pictures(nn.Module):
    @nn.compact
    def __call__(self, images: Any, train: bool = False) -> Any:
        x = nn.Conv(4, (3, 3), strides=2)(images / 255)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.GroupNorm(2)(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.avg_pool(x, (2, 2)).mean((1, 2)))
        return nn.softmax(nn.Dense(3)(x))


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layer, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        return self.norm(self.layer(images)).reshape(images.shape[0], -1)


def normalized(x: Any) -> Any:
    return (x - x.mean(0, keepdims=True)) / x.std(0, keepdims=True)


MIXING = {
    "a convolution": (Convolution(), IMAGES),
    "a convolution in bfloat16": (jt.mixed_precision(Convolution()), IMAGES),
    "the mean over a named axis": (ByHand(eqx.nn.Linear(4, 4, key=KEY)), ROWS),
    "a norm by hand": (plain(normalized), ROWS),
    "half precision": (jt.mixed_precision(plain(normalized), "float16"), ROWS),
    "a running sum": (plain(lambda x: jnp.cumsum(x, axis=0)), ROWS),
    "a reversed batch": (plain(lambda x: x[::-1]), ROWS),
    "sorted rows": (plain(lambda x: jnp.sort(x, axis=0)), ROWS),
    "attention over the batch": (plain(lambda x: nn.softmax(x @ x.T) @ x), ROWS),
    "wrong axes": (plain(lambda x: x.T.reshape(x.shape)), ROWS),
    "another row": (plain(lambda x: x[jnp.zeros(len(x), int)]), ROWS),
    "a shift": (plain(lambda x: jnp.pad(x, ((1, 0), (0, 0)))[:-1]), ROWS),
    "a loop over the batch": (
        plain(lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros(4), x)[1]),
        ROWS,
    ),
    "a window": (plain(lambda x: nn.max_pool(x[None], (2,), padding="SAME")[0]), ROWS),
    "one of several inputs": (
        plain(lambda x: {"a": x["a"], "b": x["b"] * x["b"].sum()}),
        {"a": ROWS, "b": TOKENS},
    ),
}
# Operations whose results have the shape of a batch, and rows of other examples.
MOVING = {
    "rows that move": lambda x: jnp.roll(x, 1, axis=0),
    "padding at one end": lambda x: lax.pad(x, 0.0, ((1, -1, 0), *[(0, 0, 0)] * (x.ndim - 1))),
    "axes in another order": lambda x: x.swapaxes(0, 1).reshape(x.shape),
    "joined and divided": lambda x: x.reshape(-1, 4).reshape(5, -1, 4).swapaxes(0, 1),
    "a sum over joined axes": lambda x: jnp.cumsum(x.reshape(-1, 4), 0).reshape(x.shape),
    "rows that are looked up": lambda x: jnp.take_along_axis(
        x, jnp.argsort(x[:, :1], axis=0), axis=0
    ),
    "a loop from the end": lambda x: lax.scan(lambda c, row: (c + row, c), x[0], x, reverse=True)[
        1
    ],
    "a product of both": lambda x: jnp.einsum("nti,mti->nm", x, x)[:, :3],
    "the convolution of a series": lambda x: lax.conv_general_dilated(
        x.swapaxes(0, 1), jnp.ones((3, 4, 4)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ).swapaxes(0, 1),
    "in a part": lambda x: (jax.jit(lambda y: y - y.sum(0, keepdims=True))(x), x),
}
APART = {
    "the tutorial's network": (jt.models.FeedForward((5, 3)), IMAGES),
    "bfloat16": (jt.mixed_precision(jt.models.FeedForward((5, 3))), IMAGES),
    "a network of images": (Pictures(), PICTURES),
    "float16": (jt.mixed_precision(Pictures(), "float16"), PICTURES),
    "NNX": (Nnx(), PICTURES),
    "Equinox": (eqx.nn.MLP(4, 3, 8, 2, key=KEY), ROWS),
    "attention": (Attention(), TOKENS),
    "a recurrent network": (Recurrent(), SERIES),
    "operations along other axes": (
        plain(
            lambda x: (
                jnp.sort(jnp.cumsum(x[:, ::-1], 1), 2).reshape(-1, 4).T[:2].T.reshape(len(x), -1)
                + jnp.take_along_axis(x[:, :, 0], jnp.argmax(x, 1)[:, :1], 1)
            )
        ),
        SERIES,
    ),
    "joined axes, in both orders": (
        plain(
            lambda x: (
                (x.reshape(-1, 4) @ jnp.ones((4, 3))).reshape(*x.shape[:2], 3)
                + jnp.tanh(x[:, :2].swapaxes(0, 1).reshape(-1, 4)).reshape(2, len(x), 4)[0, :, None]
                @ jnp.ones((4, 3))
            )
        ),
        SERIES,
    ),
    "an error in a batch of one": (plain(lambda x: x.reshape(3, -1) if len(x) == 1 else x), ROWS),
}
UNPROVEN = {
    "a loop of unknown length": (
        plain(lambda x: lax.while_loop(lambda y: y.max() > 1, lambda y: y / 2, x) * 0),
        ROWS,
    ),
    "a scalar output": (plain(lambda x: {"rows": x, "mean": x.mean()}), ROWS),
    "outputs that are not finite": (plain(lambda x: jnp.log(-jnp.abs(x - x.mean()))), ROWS),
    "outputs of zero": (plain(lambda x: 0 * x.sum(0, keepdims=True) + jnp.zeros_like(x)), ROWS),
    "rounding": (plain(lambda x: x + 1e-7 * x.sum(0, keepdims=True)), ROWS),
    "as many features as rows of the proof": (nn.Dense(83), ROWS),
    "equal examples": (plain(normalized), np.ones((6, 4), np.float32)),
    "one example": (plain(normalized), ROWS[:1]),
}


@pytest.mark.parametrize("case", MIXING)
def test_a_model_that_mixes_examples_is_refused(case: str) -> None:
    model, inputs = MIXING[case]
    with pytest.raises(jt.errors.InputError, match=MESSAGE):
        check(model, inputs)
    check(model, inputs, independent_examples=False)


@pytest.mark.parametrize("case", MOVING)
def test_operations_that_move_examples_are_refused(case: str) -> None:
    with pytest.raises(jt.errors.InputError, match=MESSAGE):
        check(plain(MOVING[case]), SERIES)


@pytest.mark.parametrize("case", [*APART, *UNPROVEN])
def test_other_models_are_not_refused(monkeypatch, case: str) -> None:
    """And without a warning; usual networks are proven right without compiling anything."""
    compiled, compile_ = [], jax.stages.Lowered.compile
    count = lambda self, *args, **kwargs: compiled.append(1) or compile_(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(jax.stages.Lowered, "compile", count)
    check(*(APART | UNPROVEN)[case])
    # A scan of JAX 0.12 has other parameters, which have no rule yet.
    is_new_scan = case == "a recurrent network" and jax.__version_info__ >= (0, 11)
    assert not compiled or case in UNPROVEN or is_new_scan


def test_the_error_names_the_shape_and_the_way_out() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"batch of train\.inputs is uint8\[4,8,8\]"
    ) as e:
        check(Convolution(), IMAGES)
    assert "images[..., None]" in str(e.value)
    check(Convolution(), IMAGES[..., None])


def test_a_traced_run_steps_and_streams() -> None:
    """Values are unknown in a traced run; a step is not checked; a stream by its first batch."""
    model, inputs = MIXING["a norm by hand"]
    check(model, inputs, traced=True)
    state = jt.init_state(model, optax.sgd(0.1), inputs[:1], key=KEY)
    loss = jt.losses.mean_squared_error
    jt.train_step(state, (inputs, inputs), loss)
    jt.train_epoch(state, (inputs, inputs), loss, batch_size=6)
    with pytest.raises(jt.errors.InputError, match=MESSAGE):
        jt.fit(state, [(inputs, inputs)], loss_fn=loss, callbacks=[])


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_in_front_of_the_image_are_a_warning(channels: int) -> None:
    images = RNG.normal(size=(6, channels, 8, 8)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"axis 1 of train\.inputs.*moveaxis\(images, 1, 3\)"):
        check(Convolution(), images)
    check(Convolution(), np.moveaxis(images, 1, 3))


def test_the_nodes_of_a_graph_may_be_the_examples() -> None:
    graph = RNG.normal(size=(6, 6)).astype(np.float32)
    model, data = plain(lambda nodes: graph @ nodes), (ROWS, ROWS)
    state = jt.init_state(model, optax.sgd(0.1), ROWS, key=KEY, independent_examples=False)
    loss = jt.losses.mean_squared_error
    _, history = jt.fit(state, data, data, loss_fn=loss, epochs=1, callbacks=[])
    assert history["test_loss"][0] == pytest.approx(np.mean((graph @ ROWS - ROWS) ** 2), rel=1e-5)
