"""TrainState: all that a training run is, as one pytree."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jaxtyping import Array, Key, PyTree, Shaped

from jaxtrain.errors import InputError


# Not type-checked at run time: JAX rebuilds pytrees with placeholders for their leaves.
@no_type_check
class TrainState(train_state.TrainState):
    """Parameters, optimizer state, step counter and PRNG key of one run.

    Attributes (beside `step`, `apply_fn`, `params`, `tx`, `opt_state` of Flax's TrainState):
      key: PRNG key; step t draws from `fold_in(key, t)`, so resuming needs nothing else.
      model_state: Flax collections other than "params", `batch_stats` for instance; {} if none.
    """

    key: Key[Array, ""]
    model_state: PyTree


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    sample_inputs: Shaped[Array, "batch ..."],
    *,
    key: Key[Array, ""],
) -> TrainState:
    """The state before the first step.

    Args:
      model: any Flax Linen module that is called as `model(inputs, train: bool)`. Its collections
        beside "params" are carried along as long as they keep their structure, as batch norm's do.
      optimizer: any optax transformation; `jaxtrain.optimizers` has those of `torch.optim`.
      sample_inputs: inputs of the shape and dtype to come, one example is enough; values unused.
      key: PRNG key from `jax.random.key(seed)`; decides parameters and dropout.

    Returns:
      A TrainState with fresh parameters, at step 0.

    Raises:
      InputError: the key is no PRNG key, or the optimizer no optax transformation.
    """
    if not isinstance(key, jax.Array):
        raise InputError(f"key is {key!r}; expected a PRNG key, jax.random.key(0) for instance")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InputError(
            f"optimizer is {optimizer!r}; expected an optax transformation, "
            "jaxtrain.optimizers.sgd(0.01) for instance"
        )
    params_key, state_key = jax.random.split(key)
    # Compiled as one program: run eagerly, every initializer would be compiled by itself.
    variables: dict[str, Any] = jax.jit(model.init, static_argnames="train")(
        params_key, sample_inputs, train=False
    )
    model_state = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    return TrainState(
        # An array from the start: a Python int would compile the first step twice.
        step=jnp.zeros((), jnp.int32),
        apply_fn=model.apply,
        params=params,
        tx=optimizer,
        opt_state=jax.jit(optimizer.init)(params),
        key=state_key,
        model_state=model_state,
    )
