"""Model: what training needs from a network, as two pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree


class Model(NamedTuple):
    """A network as a pair of pure functions.

    `init_state` builds one from a Linen, NNX, Equinox or PyTorch module; write one directly for a
    network in plain JAX. Both functions must be hashable, since they are static in a compiled step:
    define them once, not per call.

    Attributes:
      init: `init(key, inputs) -> (params, model_state)`. `params` is the pytree that is optimized;
        `model_state` is the pytree of everything else that changes during training, such as
        running means; {} if there is none.
      apply: `apply(params, model_state, inputs, *, train, key) -> (outputs, model_state)`. `train`
        is a Python bool; `key` is the step's PRNG key in training and None in evaluation, except
        with `init_state(..., draws_in_evaluation=True)`.
      independent_examples: whether the outputs of an example in evaluation depend on this example
        alone, which `fit` and `train` check; see `init_state`.

    Example:
      >>> def init(key, inputs):
      ...     return {"weight": jnp.zeros((inputs.shape[-1], 1))}, {}
      >>> def apply(params, model_state, inputs, *, train, key):
      ...     return inputs @ params["weight"], model_state
      >>> data = jt.data.points_on_line()
      >>> state = jt.init_state(jt.Model(init, apply), optimizer, data.inputs, key=key)
      >>> state, losses = jt.train_epoch(state, data, jt.losses.mean_squared_error)
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Any, PyTree]]
    independent_examples: bool = True
