"""The Model of an Equinox module, which is written for one example and mapped over the batch."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain.adapters._recording import Path, Recorder, patched_calls
from jaxtrain.adapters._shared import (
    AdaptedApply,
    BatchStatistics,
    RefuseInit,
    Static,
    WithoutDropout,
    describe_type,
    to_arrays,
    unused_key,
)
from jaxtrain.dataset import JoinedInputs, named_arrays
from jaxtrain.errors import InputError
from jaxtrain.model import Model

# The axis name for layers that reduce over the batch: eqx.nn.BatchNorm(size, axis_name="batch").
_AXIS = "batch"
# Batch norm divides its statistics by 1 - momentum^updates, which is 1 after so many.
_MANY_UPDATES = 2**20


def adapt(model: Any, call: Static) -> tuple[Model, tuple[PyTree, PyTree]]:
    """Returns the Model of an Equinox module with its parameters and its other arrays."""
    module, state = model if isinstance(model, tuple) else (model, None)
    if not isinstance(module, eqx.Module):
        raise InputError(f"model is a {describe_type(module)}; expected an eqx.Module")
    if state is None:
        module, state = _split_state(module)
    # Modules that differ only in their mode must compare equal.
    module = eqx.nn.inference_mode(module, value=False)
    module = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, module)
    params, others = eqx.partition(module, _is_parameter)
    constants, static = eqx.partition(others, lambda leaf: isinstance(leaf, jax.Array))
    # Weak types are kept: State.set rejects a value of another type.
    model_state = {} if state is None else {"state": _copy(state)}
    if jax.tree.leaves(constants):
        model_state["constants"] = to_arrays(constants)
    leaves, structure = jax.tree.flatten(static)
    identity = Static((tuple(leaves), structure))
    apply = Apply(static, identity, call=call, kind=type(module))
    return Model(RefuseInit(), apply), (to_arrays(params), model_state)


@dataclasses.dataclass(frozen=True)
class Apply(AdaptedApply):
    """`Model.apply` of an Equinox module."""

    # The module without its arrays, and a hashable form of it for comparisons.
    static: Any = dataclasses.field(compare=False)
    identity: Static = dataclasses.field(repr=False)

    def run(self, params: Any, model_state: Any, inputs: Any, train: bool, key: Any) -> Any:
        """Returns the outputs for a batch and the updated `eqx.nn.State`."""
        module = self._combine(params, model_state, inference=not train)
        if train or key is not None:
            batch = jax.tree.leaves(inputs)[0].shape[0]
            keys, key_axis = jax.random.split(key, batch), 0
        else:
            keys, key_axis = unused_key(), None

        def call(example: PyTree, state: Any, key: Any) -> tuple[Any, Any]:
            if state is None:
                return self.call.value(module, example, train=train, rngs=key), None
            return self.call.value(module, example, state, train=train, rngs=key)

        axes: Any = 0
        if isinstance(inputs, JoinedInputs):
            count = inputs.shared
            axes = JoinedInputs([0] * (len(inputs) - count) + [None] * count, count)
        call = jax.vmap(call, in_axes=(axes, None, key_axis), out_axes=(0, None), axis_name=_AXIS)
        try:
            outputs, state = call(inputs, model_state.get("state"), keys)
        except NameError as error:
            if "axis name" not in str(error):
                raise
            raise InputError(
                f"the module {type(module).__name__} reduces over an axis other than the batch "
                f"({error}); expected axis_name={_AXIS!r}"
            ) from error
        return outputs, model_state if state is None else {**model_state, "state": state}

    def recording(
        self, recorder: Recorder, params: PyTree, model_state: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Records the calls of the module and its submodules, on one example."""
        module = self._combine(params, model_state, inference=False)
        return patched_calls(recorder, module, _modules, eqx.nn.Dropout)

    def without_dropout(self) -> WithoutDropout:
        """Returns the function of `call` that drops nothing in training."""
        return WithoutDropout(self.call, _call_without_dropout)

    def batch_statistics(
        self, params: PyTree, model_state: dict[str, Any]
    ) -> dict[str, BatchStatistics]:
        """Returns the statistics by layer; they are in the `eqx.nn.State`."""
        if "state" not in model_state:
            return {}
        module, state = self._combine(params, model_state, inference=True), model_state["state"]
        path_of = {id(leaf): path for path, leaf in named_arrays(model_state, "model_state")}
        found = {}
        for keys, layer in jax.tree_util.tree_leaves_with_path(module, is_leaf=_is_batch_norm):
            if not _is_batch_norm(layer):
                continue
            if layer.mode == "ema":
                counter, (mean, var) = layer.ema_first_time_index, state.get(layer.ema_state_index)
                scale, final_count = 1.0, np.asarray(False)
            else:
                counter, (mean, var) = layer.batch_counter, state.get(layer.batch_state_index)
                count = int(state.get(counter))
                scale = 1.0 - layer.momentum**count if count else 1.0
                final_count = np.asarray(_MANY_UPDATES)
            paths = [path_of[id(leaf)] for leaf in (mean, var, state.get(counter))]
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            found[name] = BatchStatistics(paths[0], paths[1], paths[2], final_count, scale)
        return found

    def to_module(self, params: PyTree, model_state: dict[str, Any]) -> Any:
        """Returns the module in inference mode, as a pair with its `eqx.nn.State` if it has one."""
        module = self._combine(params, model_state, inference=True)
        if "state" not in model_state:
            return module
        return module, _copy(model_state["state"])

    def _combine(self, params: PyTree, model_state: dict[str, Any], *, inference: bool) -> Any:
        constants = [model_state["constants"]] if "constants" in model_state else []
        module = eqx.combine(params, *constants, self.static)
        return eqx.nn.inference_mode(module, value=inference)


def _call_without_dropout(call: Any, module: eqx.Module, *args: Any, **options: Any) -> Any:
    """Calls a module whose layers have no rate of dropout."""

    def is_dropout(node: Any) -> bool:
        return isinstance(node, eqx.nn.Dropout)

    def convert(node: Any) -> Any:
        return eqx.tree_at(lambda x: x.p, node, 0.0) if is_dropout(node) else node

    return call(jax.tree.map(convert, module, is_leaf=is_dropout), *args, **options)


def _modules(module: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Returns the nested modules with their paths."""

    def is_nested(node: Any) -> bool:
        return node is not module and isinstance(node, eqx.Module)

    found = [(path, module)]
    for keys, node in jax.tree_util.tree_leaves_with_path(module, is_leaf=is_nested):
        if is_nested(node):
            names = (jax.tree_util.keystr((key,), simple=True) for key in keys)
            found += _modules(node, (*path, *names))
    return found


def _split_state(module: Any) -> tuple[Any, Any]:
    """Returns a module and its initial `eqx.nn.State`, or None if it has none."""

    def is_index(node: Any) -> bool:
        return isinstance(node, eqx.nn.StateIndex)

    if not any(map(is_index, jax.tree.leaves(module, is_leaf=is_index))):
        return module, None
    try:
        return eqx.nn.make_with_state(lambda: module)()
    except ValueError as error:
        raise InputError(
            f"the module {type(module).__name__} comes without its state; expected the pair "
            "(module, state) that eqx.nn.make_with_state returns"
        ) from error


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _copy(state: Any) -> Any:
    """Returns a copy of an `eqx.nn.State`; setting a value invalidates the original."""
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, leaves)


def _is_batch_norm(node: Any) -> bool:
    return isinstance(node, eqx.nn.BatchNorm)
