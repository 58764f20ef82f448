"""The Model of a Flax NNX module."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from jaxtrain.adapters._recording import Path, Recorder, patched_calls
from jaxtrain.adapters._shared import (
    AdaptedApply,
    BatchStatistics,
    RefuseInit,
    Static,
    WithoutDropout,
    describe_type,
    dropout_rates,
    named_statistics,
    to_arrays,
    unused_key,
)
from jaxtrain.errors import InputError
from jaxtrain.model import Model


def adapt(module: Any, call: Static) -> tuple[Model, tuple[PyTree, PyTree]]:
    """Returns the Model of an NNX module with its parameters and its other variables."""
    if not isinstance(module, nnx.Module):
        raise InputError(f"model is a {describe_type(module)}; expected an nnx.Module")
    module = nnx.clone(module)  # the user's module is not modified
    nnx.pop(module, nnx.Intermediate)  # outputs of an earlier call
    module.train()  # modules that differ only in their mode must compare equal
    graphdef, *states = nnx.split(module, nnx.Param, ...)
    params, model_state = (to_arrays(nnx.to_pure_dict(state)) for state in states)
    apply = Apply(Static(graphdef), _describe(module), call=call, kind=type(module))
    return Model(RefuseInit(), apply), (params, model_state)


@dataclasses.dataclass(frozen=True)
class Apply(AdaptedApply):
    """`Model.apply` of an NNX module."""

    graphdef: Static = dataclasses.field(repr=False)
    description: str = dataclasses.field(compare=False)

    def run(self, params: Any, model_state: Any, inputs: Any, train: bool, key: Any) -> Any:
        """Returns the outputs and the updated variables."""
        module = nnx.merge(self.graphdef.value, params, model_state)
        module.train() if train else module.eval()
        rngs = nnx.Rngs(unused_key()) if key is None else _reseed(module, key)
        outputs = self.call.value(module, inputs, train=train, rngs=rngs)
        # Each step draws from its own key, so the RNG state is not updated.
        changing = nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        return outputs, _update(model_state, nnx.to_pure_dict(changing))

    def recording(
        self, recorder: Recorder, params: PyTree, model_state: PyTree
    ) -> contextlib.AbstractContextManager[None]:
        """Records the calls of the module and its submodules."""
        module = nnx.merge(self.graphdef.value, params, model_state)
        return patched_calls(recorder, module, _modules, nnx.Dropout)

    def without_dropout(self) -> WithoutDropout:
        """Returns the function of `call` that drops nothing in training."""
        return WithoutDropout(self.call, _call_without_dropout)

    def batch_statistics(self, params: PyTree, model_state: PyTree) -> dict[str, BatchStatistics]:
        """Returns the statistics by layer; they have the path of their layer."""
        return named_statistics(model_state, skip=0)

    def to_module(self, params: PyTree, model_state: PyTree) -> Any:
        """Returns a new module with these variables, in evaluation mode."""
        module = nnx.merge(self.graphdef.value, params, model_state)
        module.eval()
        return module


def _call_without_dropout(call: Any, module: nnx.Module, *args: Any, **options: Any) -> Any:
    """Calls a module, which has been built for this call, with no rate of dropout."""
    for _, layer in _modules(module):
        for name in dropout_rates(layer):
            setattr(layer, name, 0.0)
    return call(module, *args, **options)


def _modules(module: nnx.Module) -> list[tuple[Path, nnx.Module]]:
    """Returns the nested modules with their paths."""
    return [
        (tuple(map(str, path)), node)
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Module)
    ]


def _reseed(module: nnx.Module, key: Any) -> nnx.Rngs:
    """Restarts every RNG stream of a module with its own key; returns one more."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    for index, stream in enumerate(streams):
        stream_key = jax.random.fold_in(key, index)
        shape = stream.key[...].shape  # a module made under vmap has one key per layer
        stream.key[...] = jax.random.split(stream_key, shape) if shape else stream_key
        stream.count[...] = jnp.zeros(shape, jnp.uint32)
    return nnx.Rngs(jax.random.fold_in(key, len(streams)))


def _update(old: Any, new: Any) -> Any:
    """Returns `old` with the values of `new`, without variables that the call added by sowing."""
    if not isinstance(old, dict):
        return new
    return {name: _update(old[name], new[name]) if name in new else old[name] for name in old}


def _describe(module: nnx.Module) -> str:
    """Returns the nested modules with their settings, in less text than the repr of a GraphDef."""
    parts = []
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            values = ", ".join(
                f"{name}={value!r}"
                for name, value in vars(node).items()
                if isinstance(value, bool | int | float | str) and str(name)[0] != "_"
            )
            parts.append((".".join(map(str, path)), f"{type(node).__name__}({values})"))
    return "; ".join(f"{path}: {text}" if path else text for path, text in sorted(parts))
