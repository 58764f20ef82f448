"""Converts modules of other libraries to a Model; each framework is imported only if used."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxtrain.adapters import torch
from jaxtrain.adapters._modes import call_by_name, check_modes, check_plain, depends_on_key
from jaxtrain.adapters._precision import CastApply, MixedPrecision, cast_model, mixed_precision
from jaxtrain.adapters._recording import Call, Recorder
from jaxtrain.adapters._shared import (
    AdaptedApply,
    BatchStatistics,
    DrawingApply,
    Static,
    describe_type,
    name_of_plain,
    named_statistics,
)
from jaxtrain.errors import InputError
from jaxtrain.model import Model

__all__ = [
    "BatchStatistics",
    "Call",
    "MixedPrecision",
    "Recorder",
    "adapt",
    "batch_statistics",
    "call_in_evaluation",
    "call_in_training",
    "checked",
    "depends_on_key",
    "drawing",
    "draws_in_evaluation",
    "example_inputs",
    "mixed_precision",
    "name_of_model",
    "recording",
    "sown_losses",
    "to_module",
    "torch",
    "without_dropout",
]

_EXPECTED = "expected a Linen, NNX, Equinox or PyTorch module or a jaxtrain.Model(init, apply)"


def adapt(
    model: Any, rngs: Sequence[str], sown_losses: Sequence[str], call: Callable[..., Any] | None
) -> tuple[Model, tuple[PyTree, PyTree] | None]:
    """Returns the Model of a network, and the variables that the network already contains.

    The arguments are those of `init_state`; `model` may also be the pair (module, state) of
    `eqx.nn.make_with_state`. The two functions of the Model are equal for equal modules. The
    variables are the pair (params, model_state), or None if `Model.init` makes them.
    """
    if isinstance(model, type):
        raise InputError(
            f"model is the class {model.__name__}; expected an instance of it, such as "
            f"{model.__name__}(...)"
        )
    if isinstance(model, MixedPrecision):
        adapted, held = adapt(model.model, rngs, sown_losses, call)
        return cast_model(adapted, model.dtype), held
    if sown_losses and "flax.linen.module.Module" not in _bases(model):
        raise InputError(
            f"sown_losses is {sown_losses!r} for a {describe_type(model)}; expected a Linen "
            "module, or no sown_losses"
        )
    if isinstance(model, Model):
        _check_model(model)
        if call is not None:
            raise InputError(
                "call is given with a Model; expected a module, or the call in Model.apply"
            )
        return model, None
    if call is not None:
        _check_call(call)
    # Frameworks are recognized by the names of base classes, so that none is imported.
    is_pair = isinstance(model, tuple) and len(model) == 2
    bases = [_bases(part) for part in model] if is_pair else [_bases(model)]
    function = Static(call_by_name if call is None else call)
    if all(any(base.startswith("equinox.") for base in part) for part in bases):
        from jaxtrain.adapters import _equinox

        return _equinox.adapt(model, function)
    if "flax.linen.module.Module" in bases[0] and not is_pair:
        from jaxtrain.adapters import _linen

        return _linen.adapt(model, rngs, sown_losses, function)
    if any(base.startswith("flax.nnx.") for base in bases[0]) and not is_pair:
        from jaxtrain.adapters import _nnx

        return _nnx.adapt(model, function)
    if "torch.nn.modules.module.Module" in bases[0] and not is_pair:
        return torch.adapt(model, None if call is None else function)
    raise InputError(f"model is a {describe_type(model)}; {_EXPECTED}{_hint(model, bases[0])}")


def _check_call(call: Any) -> None:
    """Raises InputError unless `call` is a function that takes the mode and the randomness."""
    expected = "expected a function call(module, inputs, *, train, rngs)"
    if not callable(call):
        raise InputError(f"call is {call!r}; {expected}", argument="call")
    try:
        names = inspect.signature(call).parameters
    except ValueError:  # such as a function in C
        return
    takes_all = any(each.kind is each.VAR_KEYWORD for each in names.values())
    missing = [name for name in ("train", "rngs") if name not in names and not takes_all]
    if missing:
        raise InputError(
            f"call does not take {' and '.join(missing)}; {expected}, which may ignore them",
            argument="call",
        )


def to_module(model: Model, params: PyTree, model_state: PyTree) -> Any:
    """Returns the trained module, in evaluation mode; see `jaxtrain.to_module`."""
    apply = _of_module(model)
    if apply is None:
        raise InputError(
            "the model is a Model of plain functions, which has no module; use "
            "model.apply(state.params, state.model_state, inputs, train=False, key=None)"
        )
    return apply.to_module(params, model_state)


def checked(model: Model, params: PyTree, model_state: PyTree, inputs: PyTree) -> Model:
    """Returns an equal Model that knows the shapes of its inputs, after a check of its modes."""
    apply = _of_module(model)
    if apply is None:
        check_plain(_innermost(model), params, model_state, inputs)
        return model
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.result_type(x)), inputs)
    apply = dataclasses.replace(apply, example=shapes)
    check_modes(_returning_losses(apply), params, model_state)
    return _with_apply(model, apply)


def example_inputs(model: Model) -> PyTree | None:
    """Returns the shapes that `checked` received, or None for a Model of plain functions."""
    return getattr(_of_module(model), "example", None)


def sown_losses(model: Model) -> tuple[str, ...]:
    """Returns the collections in which the module sows losses."""
    apply = _of_module(model)
    return () if apply is None else apply.sown_losses


def call_in_training(
    model: Model, params: PyTree, model_state: PyTree, inputs: PyTree, *, key: Any
) -> tuple[PyTree, PyTree, tuple[Any, ...]]:
    """Returns the outputs and the model state of `model.apply`, and the losses that were sown."""
    apply = _of_module(model)
    if apply is None or not apply.sown_losses:
        return (*model.apply(params, model_state, inputs, train=True, key=key), ())
    model = _with_apply(model, _returning_losses(apply))
    results, updated = model.apply(params, model_state, inputs, train=True, key=key)
    outputs, losses = results
    return outputs, updated, losses


def drawing(model: Model) -> Model:
    """Returns a Model that is meant to draw random numbers in evaluation."""
    apply = _innermost(model)
    if isinstance(apply, AdaptedApply):
        return _with_apply(model, dataclasses.replace(apply, draws=True))
    return _with_apply(model, DrawingApply(apply))


def without_dropout(model: Model) -> Model:
    """Returns the same Model without dropout in training; one of plain functions as it is."""
    apply = _of_module(model)
    if apply is None:
        return model
    return _with_apply(model, dataclasses.replace(apply, call=Static(apply.without_dropout())))


def draws_in_evaluation(model: Model) -> bool:
    """Returns whether the model is meant to draw random numbers in evaluation."""
    return getattr(_innermost(model), "draws", False)


def call_in_evaluation(
    model: Model, params: PyTree, model_state: PyTree, inputs: PyTree, *, key: Any
) -> tuple[PyTree, PyTree]:
    """Returns the outputs and the model state; a model that draws nothing receives no key."""
    key = key if draws_in_evaluation(model) else None
    return model.apply(params, model_state, inputs, train=False, key=key)


def name_of_model(model: Model) -> str:
    """Returns the name of the class of a module, or of the function of a plain Model."""
    apply = _innermost(model)
    if isinstance(apply, AdaptedApply):
        return apply.kind.__name__
    return name_of_plain(apply.apply if isinstance(apply, DrawingApply) else apply)


def batch_statistics(
    model: Model, params: PyTree, model_state: PyTree
) -> dict[str, BatchStatistics]:
    """Returns where a model state has the running statistics of batch norm.

    The keys are the paths of the layers among the parameters, such as "BatchNorm_0". A Model of
    plain functions has the statistics at these paths as well.
    """
    apply = _of_module(model)
    if apply is None:
        return named_statistics(model_state, skip=0)
    return apply.batch_statistics(params, model_state)


@contextlib.contextmanager
def recording(model: Model, params: PyTree, model_state: PyTree) -> Iterator[Recorder]:
    """Yields a recorder of the layers that `model.apply` calls while it is traced inside."""
    apply, recorder = _of_module(model), Recorder()
    with apply.recording(recorder, params, model_state) if apply else contextlib.nullcontext():
        yield recorder


def _of_module(model: Model) -> AdaptedApply | None:
    """Returns the function of a module, also of one in mixed precision."""
    apply = _innermost(model)
    return apply if isinstance(apply, AdaptedApply) else None


def _innermost(model: Model) -> Any:
    return model.apply.apply if isinstance(model.apply, CastApply) else model.apply


def _with_apply(model: Model, apply: Any) -> Model:
    """Returns the Model with another function of the module, also of one in mixed precision."""
    if isinstance(model.apply, CastApply):
        return model._replace(apply=dataclasses.replace(model.apply, apply=apply))
    return model._replace(apply=apply)


def _returning_losses(apply: AdaptedApply) -> AdaptedApply:
    return dataclasses.replace(apply, returns_losses=True) if apply.sown_losses else apply


def _check_model(model: Model) -> None:
    for name, function in (("init", model.init), ("apply", model.apply)):
        if not callable(function):
            raise InputError(f"Model.{name} is {function!r}; expected a function")
        try:
            hash(function)
        except TypeError:
            raise InputError(
                f"Model.{name} is {function!r}, which is not hashable; expected a function, or an "
                "instance of a frozen dataclass with __call__"
            ) from None


def _bases(value: Any) -> list[str]:
    """Returns the full names of a value's type and its base classes."""
    return [f"{base.__module__}.{base.__name__}" for base in type(value).__mro__]


def _hint(model: Any, bases: list[str]) -> str:
    if "jaxtrain.training.state.TrainState" in bases:
        return ": pass state.model, or continue training with the state itself"
    if any(base.startswith("flax.training.train_state.") for base in bases):
        return ": pass the module of this state, and set its parameters with .replace(params=...)"
    if any(base.startswith("torch.") for base in bases):
        return ": pass the torch.nn.Module"
    if isinstance(model, tuple) and all(map(callable, model)):
        return ": use jaxtrain.Model(*model), whose docstring gives the signatures"
    if callable(model):
        return ": wrap the function in a Model"
    return ""
