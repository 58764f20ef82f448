"""How a module is called in training and in evaluation, and a check that the two differ."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PyTree

from jaxtrain.adapters._recording import Path, Recorder
from jaxtrain.adapters._shared import (
    AdaptedApply,
    DrawingApply,
    Static,
    draws_unasked,
    name_of_plain,
    unused_key,
)
from jaxtrain.dataset import JoinedInputs
from jaxtrain.errors import InputError

# The names of arguments that switch between training and evaluation, with the value in training.
_MODES = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "enable_dropout"), True),
    **dict.fromkeys(("deterministic", "inference", "eval", "use_running_average"), False),
}
_RNGS = ("key", "rngs")
_Parameter = inspect.Parameter
_EITHER, _EMPTY = _Parameter.POSITIONAL_OR_KEYWORD, _Parameter.empty
_RATES = ("rate", "p", "dropout_rate")


def call_by_name(
    module: Any, inputs: PyTree, *state: Any, train: bool, rngs: Any, **options: Any
) -> Any:
    """Calls a module with the mode and the randomness that its signature asks for.

    A tuple of inputs is passed as several arguments if the module takes so many. `state` is the
    `eqx.nn.State` of a stateful Equinox module.
    """
    kind = type(module)
    if not callable(module):
        raise InputError(
            f"the module {kind.__name__} has no __call__; expected one that maps inputs to "
            "outputs, or init_state(..., call=lambda module, inputs, *, train, rngs: ...)"
        )
    named, positional, takes_all = _parameters(kind)
    for name, default in named.items():
        # The default None leaves the mode to a field of that name.
        is_left = default is None and isinstance(getattr(module, name, None), bool)
        if name in _MODES and not is_left:
            options.setdefault(name, _MODES[name] == train)
        elif name == ("key" if isinstance(rngs, jax.Array) else "rngs"):
            options[name] = rngs
    is_tuple = type(inputs) in (tuple, JoinedInputs) and (
        takes_all or 1 < len(inputs) <= len(positional)
    )
    arguments = (*(inputs if is_tuple else (inputs,)), *state)
    try:
        inspect.signature(kind.__call__).bind(module, *arguments, **options)
    except TypeError as error:
        raise InputError(
            f"{kind.__name__} is called with inputs and the mode: {error}; expected inputs that "
            "are a tuple in the order of its arguments, a Dataset with the arrays that all "
            f"examples share, Dataset(..., shared=...), or {_call_hint(kind)}"
        ) from error
    return module(*arguments, **options)


def check_modes(apply: AdaptedApply, params: PyTree, model_state: PyTree) -> None:
    """Traces a module in both modes, on the shapes of its example and once per module.

    Raises:
      InputError: a layer with dropout or batch norm is in the wrong mode, unless the user says how
        the module is called; or evaluation draws random numbers where it is not meant to, or the
        reverse.
    """
    leaves, structure = jax.tree.flatten((params, model_state, apply.example))
    avals = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))
        for x in leaves
    ]
    _check_modes(apply, Static((tuple(avals), structure)))


@functools.lru_cache(maxsize=256)
def _check_modes(apply: AdaptedApply, shapes: Static) -> None:
    leaves, structure = shapes.value
    arguments = jax.tree.unflatten(structure, leaves)
    kind, is_by_name = apply.kind, apply.call.value is call_by_name
    for train in (True, False):
        draws, error = _trace(apply, arguments, train, is_by_name)
        is_odd = error is not None or draws != (train or apply.draws)
        switches = _parameters(kind)[0] if is_by_name and is_odd else {}
        for name, value in switches.items():
            if name in _MODES or not isinstance(value, bool):
                continue
            call = Static(functools.partial(call_by_name, **{name: not value}))
            other = dataclasses.replace(apply, call=call)
            changed, failure = _trace(other, arguments, train, is_by_name)
            if failure is None and (error is not None or changed != draws):
                raise InputError(
                    f"the argument {name}={value} of {kind.__name__}.__call__ switches between "
                    "training and evaluation, and init_state does not pass it; expected "
                    f"{_call_hint(kind, name, train != value)}"
                )
        if error is not None:
            raise error
        if apply.draws and not draws and not train:
            raise InputError(
                f"draws_in_evaluation is True, and {kind.__name__} draws nothing in evaluation; "
                f"expected a call that draws, such as {_call_hint(kind, is_fixed=True)}"
            )


def check_plain(apply: Any, params: PyTree, model_state: PyTree, inputs: PyTree) -> None:
    """Raises InputError where plain functions draw in evaluation unasked, or do not where asked.

    Without a key, as in an evaluation, a function that draws raises an error.
    """
    function = apply.apply if isinstance(apply, DrawingApply) else apply

    def draws(key: Any) -> bool | None:
        try:
            return depends_on_key(
                lambda key, *args: function(*args, train=False, key=key)[0],
                key,
                (params, model_state, inputs),
            )
        except Exception:  # which the first evaluation reports
            return None

    if isinstance(apply, DrawingApply):
        if draws(unused_key()) is False:
            raise InputError(
                f"draws_in_evaluation is True, and {name_of_plain(function)} draws nothing with "
                "train=False; expected a function that draws from the key"
            )
    elif draws(None) is None and draws(unused_key()):
        raise InputError(draws_unasked(name_of_plain(function)))


def depends_on_key(run: Callable[..., Any], key: Any, arguments: Any) -> bool:
    """Returns whether the results of a function depend on its first argument, a key or None."""
    jaxpr: Any = jax.make_jaxpr(run)(key, *arguments).jaxpr
    return key is not None and dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1][0]


def _trace(
    apply: AdaptedApply, arguments: Any, train: bool, has_check: bool
) -> tuple[bool, Exception | None]:
    """Traces a module; returns whether its results depend on the PRNG key, and what is wrong."""

    def run(key: Any, params: PyTree, model_state: PyTree, inputs: PyTree) -> Any:
        recorder = _ModeCheck(train, apply.draws) if has_check else Recorder()
        with apply.recording(recorder, params, model_state):
            results = apply.call_module(params, model_state, inputs, train, key)
        return results if train else results[0]

    try:
        draws = depends_on_key(run, unused_key(), arguments)
    except Exception as error:  # raised by the caller
        return False, error
    is_wrong = draws and not train and not apply.draws
    return draws, InputError(draws_unasked(apply.kind.__name__)) if is_wrong else None


class _ModeCheck(Recorder):
    """Raises InputError when a layer with dropout or batch norm is in the wrong mode.

    Dropout may be on in evaluation if the module is meant to draw there.
    """

    def __init__(self, train: bool, draws: bool) -> None:
        super().__init__()
        self._train, self._draws = train, draws
        # The layers that are being called, each with its mode if that is the wrong one.
        self._stack: list[tuple[type, tuple[str, bool] | None]] = []

    def call(self, path: Path | None, layer: Any, function: Any, args: Any, kwargs: Any) -> Any:
        """Checks the mode of a layer and calls it."""
        if not self.is_of_this_thread:
            return function(*args, **kwargs)
        mode = _mode(layer, function, args, kwargs)
        is_right = mode is None or mode[1] == (_MODES[mode[0]] == self._train)
        self._stack.append((type(layer), None if is_right else mode))
        try:
            may_draw = self._draws and not self._train
            if not is_right and (_is_batch_norm(type(layer)) or (_drops(layer) and not may_draw)):
                self._refuse(path)
            return function(*args, **kwargs)
        finally:
            self._stack.pop()

    def _refuse(self, path: Path | None) -> None:
        network, layer = self._stack[0][0], self._stack[-1][0]
        owner, mode = next((owner, mode) for owner, mode in self._stack if mode is not None)
        now, other = ("training", "evaluation") if self._train else ("evaluation", "training")
        place = f"{layer.__name__} {'.'.join(path)!r}" if path else layer.__name__
        whole = f" of {network.__name__}" if len(self._stack) > 1 else ""
        hint = _call_hint(network)
        if not self._train and not _is_batch_norm(layer):
            hint += "; or, if dropout is meant to draw, init_state(..., draws_in_evaluation=True)"
        raise InputError(
            f"in {now}, {place}{whole} is in {other} mode because of {mode[0]}={mode[1]} of "
            f"{owner.__name__}; expected {now} mode: set it by an argument train of "
            f"{network.__name__}.__call__, or say that the module is called as it should be, by "
            f"{hint}"
        )


def _mode(layer: Any, function: Any, args: Any, kwargs: Any) -> tuple[str, bool] | None:
    """Returns the name and the value that set a layer's mode; an argument precedes a field."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
    except TypeError:
        arguments = {}
    for read in (arguments.get, lambda name: getattr(layer, name, None)):
        for name in _MODES:
            value = read(name)
            if isinstance(value, bool):
                return name, value
    return None


def _is_batch_norm(kind: type) -> bool:
    return any(base.__name__ == "BatchNorm" for base in kind.__mro__)


def _drops(layer: Any) -> bool:
    """Returns whether a layer drops with a rate."""
    rates = (getattr(layer, name, None) for name in _RATES)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _parameters(kind: type) -> tuple[dict[str, Any], list[str], bool]:
    """Returns what a class's `__call__` takes.

    Returns:
      The parameters that may be passed by name, with their defaults; the names of those for inputs;
      and whether it takes any number of them.
    """
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    named = {x.name: x.default for x in parameters if x.kind in (_EITHER, _Parameter.KEYWORD_ONLY)}
    others = {*_MODES, *_RNGS, "state"}
    positional = [x.name for x in parameters if x.kind in (_Parameter.POSITIONAL_ONLY, _EITHER)]
    takes_all = any(x.kind == _Parameter.VAR_POSITIONAL for x in parameters)
    return named, [name for name in positional if name not in others], takes_all


def _call_hint(
    kind: type, switch: str = "", value_in_training: bool = True, *, is_fixed: bool = False
) -> str:
    """Returns the argument of `init_state` that calls a module, as source text.

    With `is_fixed`, the module is called as in training.
    """
    named, positional, _ = _parameters(kind)
    modes = {name: value for name, value in _MODES.items() if name in named}
    if switch:
        modes[switch] = value_in_training
    required = [name for name in positional if named.get(name, _EMPTY) is _EMPTY]
    arguments = [f'inputs["{name}"]' for name in required] if len(required) > 1 else ["inputs"]
    has_state = named.get("state") is _EMPTY
    arguments += ["state"] * has_state
    arguments += [
        f"{name}={value}" if is_fixed else f"{name}={'' if value else 'not '}train"
        for name, value in modes.items()
    ]
    arguments += [f"{name}=rngs" for name in _RNGS if name in named]
    return (
        f"init_state(..., call=lambda module, inputs, {'state, ' * has_state}*, train, rngs: "
        f"module({', '.join(arguments)}))"
    )
