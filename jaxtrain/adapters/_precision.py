"""mixed_precision: a network that computes in half precision on float32 parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxtrain._arguments import describe
from jaxtrain.errors import InputError
from jaxtrain.model import Model


class MixedPrecision(NamedTuple):
    """A network and the dtype that it computes in; `init_state` takes it as a model.

    Attributes:
      model: the network.
      dtype: the name of the dtype.
    """

    model: Any
    dtype: str


def mixed_precision(model: Any, dtype: Any = "bfloat16") -> MixedPrecision:
    """Returns a network that computes in half precision, for `init_state`.

    The parameters, their gradients and the optimizer stay in float32. In each step, parameters and
    floating inputs are cast to `dtype` (Micikevicius et al., 2018,
    https://arxiv.org/abs/1710.03740). The outputs, the model state, losses and metrics are float32.
    A network that makes float32 arrays itself, from integer inputs for example, computes in float32
    from there on, except in layers with a `dtype` of their own and those of `jaxtrain.models`.

    Args:
      model: a Linen, NNX, Equinox or PyTorch module, or a `Model`.
      dtype: "bfloat16"; or "float16", whose small range needs a scaled loss in most networks.

    Raises:
      InputError: the dtype is another one.

    Example:
      >>> network = jt.mixed_precision(model, "bfloat16")
      >>> state = jt.init_state(network, optimizer, train.inputs[:1], key=key)
      >>> jt.predict(state, test.inputs).dtype
      dtype('float32')
    """
    try:
        name = jnp.dtype(dtype).name
    except (TypeError, ValueError):
        name = ""
    if name not in ("bfloat16", "float16"):
        raise InputError(
            f"dtype is {describe(dtype)}; expected 'bfloat16' or 'float16'", argument="dtype"
        )
    return MixedPrecision(model, name)


@dataclasses.dataclass(frozen=True)
class CastApply:
    """`Model.apply` on parameters and inputs that are cast to a dtype.

    Attributes:
      apply: the function of the network.
      dtype: the name of the dtype.
    """

    apply: Any
    dtype: str

    def __call__(
        self, params: PyTree, model_state: PyTree, inputs: PyTree, *, train: bool, key: Any
    ) -> tuple[Any, PyTree]:
        """Returns the outputs and the model state in the dtypes of the network without casts."""
        outputs, new_state = self.apply(
            _cast(params, self.dtype), model_state, _cast(inputs, self.dtype), train=train, key=key
        )
        new_state = jax.tree.map(
            lambda new, old: (
                jnp.asarray(new).astype(jnp.asarray(old).dtype) if _is_float(old) else new
            ),
            new_state,
            model_state,
        )
        return _cast(outputs, "float32"), new_state


def cast_model(model: Model, dtype: str) -> Model:
    """Returns the Model that computes in a dtype."""
    return model._replace(apply=CastApply(model.apply, dtype))


def _cast(tree: PyTree, dtype: str) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if _is_float(leaf) else leaf, tree)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
