"""The Model of a Flax Linen module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jaxtrain._compiler import bounded
from jaxtrain.adapters._recording import Recorder
from jaxtrain.adapters._shared import (
    AdaptedApply,
    BatchStatistics,
    Static,
    WithoutDropout,
    draws_unasked,
    dropout_rates,
    named_statistics,
    unused_key,
)
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.model import Model


def adapt(
    module: nn.Module, rngs: Sequence[str], sown_losses: Sequence[str], call: Static
) -> tuple[Model, None]:
    """Returns the Model of a Linen module; its parameters come from `Model.init`."""
    arguments, losses = (Static(module), tuple(rngs)), tuple(sown_losses)
    apply = Apply(*arguments, call=call, kind=type(module), sown_losses=losses)
    return Model(Init(*arguments, call, losses), apply), None


@dataclasses.dataclass(frozen=True)
class Init:
    """`Model.init` of a Linen module."""

    module: Static = dataclasses.field(repr=False)
    rngs: tuple[str, ...] = dataclasses.field(repr=False)
    call: Static = dataclasses.field(repr=False)
    sown_losses: tuple[str, ...] = dataclasses.field(repr=False)

    def __call__(self, key: jax.Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Returns fresh parameters and the other collections; the values of `inputs` are unused."""
        variables = self._init(key, jax.tree.map(_concrete, inputs))
        params = variables.pop("params", {})
        return params, variables

    # Compiled as one program: run eagerly, each initializer would be compiled separately.
    @bounded
    @functools.partial(jax.jit, static_argnums=0)
    def _init(self, key: jax.Array, inputs: PyTree) -> dict[str, Any]:
        others = [name for name in self.rngs if name not in ("params", "dropout")]
        rngs = {"params": key, **_streams(key, others)}
        call = functools.partial(self.call.value, train=False, rngs=_streams(key, self.rngs))
        # Nothing is sown in a collection that is not mutable.
        kept = DenyList(("intermediates", *self.sown_losses))
        variables = self.module.value.init(rngs, inputs, method=call, mutable=kept)
        found = flatten_dict(dict(variables), keep_empty_nodes=True)
        if any(type(value) is tuple for value in found.values()):
            # A call appends to the tuples that `sow` has made, and not to those of variables.
            mutable = [name for name in variables if name != "params"]
            apply = functools.partial(
                self.module.value.apply, method=call, rngs=rngs, mutable=mutable
            )
            after = flatten_dict(dict(jax.eval_shape(apply, variables, inputs)[1]))
            found = {
                path: value
                for path, value in found.items()
                if type(value) is not tuple or len(value) == len(after[path])
            }
        return unflatten_dict(found)


@dataclasses.dataclass(frozen=True)
class Apply(AdaptedApply):
    """`Model.apply` of a Linen module."""

    module: Static
    rngs: tuple[str, ...]

    def run(self, params: Any, model_state: Any, inputs: Any, train: bool, key: Any) -> Any:
        """Returns the outputs and, in training, the updated collections; see `returns_losses`."""
        variables = {"params": params, **model_state}
        streams = _streams(unused_key() if key is None else key, self.rngs)
        call = functools.partial(self.call.value, train=train, rngs=streams)
        try:
            if not train:
                options = {"rngs": streams} if self.draws and key is not None else {}
                outputs = self.module.value.apply(variables, inputs, method=call, **options)
                return outputs, model_state
            outputs, updated = self.module.value.apply(
                variables,
                inputs,
                method=call,
                rngs=streams,
                mutable=[*model_state, *(self.sown_losses if self.returns_losses else ())],
            )
        except flax.errors.ScopeCollectionNotFound as error:
            raise InputError(
                f"model_state has the collections {sorted(model_state)}, but not all that "
                f"{self.kind.__name__} needs; expected the model_state that "
                f"init_state returns (Flax: {error})"
            ) from error
        except flax.errors.InvalidRngError as error:
            raise InputError(
                f"{self.kind.__name__} draws from an RNG stream without a key "
                f"({str(error).split(' (http')[0]}); expected its name in init_state(rngs=...)"
                if train
                else draws_unasked(self.kind.__name__)
            ) from error
        updated = dict(updated)
        if self.returns_losses:
            sown = {name: updated.pop(name, {}) for name in self.sown_losses}
            outputs = outputs, self._losses(sown)
        return outputs, _without_sown(model_state, updated)

    def _losses(self, sown: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the losses in the collections, after a check that they are scalars."""
        for name, values in sown.items():
            if not values:
                raise InputError(
                    f"sown_losses has {name!r}, and {self.kind.__name__} sows nothing there in "
                    f"training; expected a collection of losses, by self.sow({name!r}, 'l2', value)"
                )
        for path, loss in named_arrays(sown, ""):
            if jnp.shape(loss) != ():
                raise InputError(
                    f"{self.kind.__name__} sows {path} of shape {jnp.shape(loss)}; expected a "
                    "scalar, such as its mean"
                )
        return tuple(map(jnp.asarray, jax.tree.leaves(sown)))

    @contextlib.contextmanager
    def recording(self, recorder: Recorder, params: PyTree, model_state: PyTree) -> Iterator[None]:
        """Records the calls of the module and its submodules."""

        def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "setup":  # runs before the first call, without inputs
                return method(*args, **kwargs)
            return recorder.call(context.module.path, context.module, method, args, kwargs)

        with nn.intercept_methods(intercept):
            yield

    def without_dropout(self) -> WithoutDropout:
        """Returns the function of `call` that drops nothing in training."""
        return WithoutDropout(self.call, _call_without_dropout)

    def batch_statistics(self, params: PyTree, model_state: PyTree) -> dict[str, BatchStatistics]:
        """Returns the statistics by layer; the first name is that of the collection."""
        return named_statistics(model_state, skip=1)

    def to_module(self, params: PyTree, model_state: PyTree) -> NoReturn:
        """Raises InputError: a Linen module holds no parameters."""
        raise InputError(
            "Linen modules hold no parameters; use "
            "model.apply({'params': state.params, **state.model_state}, ...)"
        )


def _call_without_dropout(call: Any, *args: Any, **options: Any) -> Any:
    """Calls a module whose layers have no rate of dropout."""

    def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        for name in dropout_rates(context.module):  # of an instance of this call
            object.__setattr__(context.module, name, 0.0)
        return method(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return call(*args, **options)


def _streams(key: Any, names: Iterable[str]) -> dict[str, Any]:
    """Returns a key for each RNG stream; that of "dropout" is `key` itself."""
    return {
        name: key if name == "dropout" else jax.random.fold_in(key, zlib.crc32(name.encode()))
        for name in names
    }


def _without_sown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Returns the collections after a call without the tuples that it has added by sowing."""
    known = flatten_dict(before, keep_empty_nodes=True)
    found = flatten_dict(after, keep_empty_nodes=True)
    return unflatten_dict(
        {path: x for path, x in found.items() if path in known or type(x) is not tuple}
    )


def _concrete(leaf: Any) -> Any:
    is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype) if is_abstract else leaf
