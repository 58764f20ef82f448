"""Helpers that all adapters share."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain import lowerings
from jaxtrain.adapters._recording import Recorder
from jaxtrain.dataset import named_arrays
from jaxtrain.errors import InputError
from jaxtrain.losses import name_of


class Static:
    """Makes any value hashable, as `jax.jit` requires of static values.

    Wrappers of equal values are equal, so that states of equal modules share one compiled step.
    The wrapper of a value that is not hashable equals only wrappers of that same object.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            # Computed once, since every call of a compiled function needs it.
            self._hash = hash(value)
        except TypeError:
            self._hash = id(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static):
            return NotImplemented
        if self.value is other.value:
            return True
        return self._hash == other._hash and bool(self.value == other.value)

    def __repr__(self) -> str:
        return repr(self.value)


class BatchStatistics(NamedTuple):
    """Where a model state has the running statistics of a batch norm layer.

    Attributes:
      mean: path of the running mean.
      var: path of the running variance.
      counter: path of the number of updates, or of a flag that there has been one; "" if the
        library has none.
      final_count: the counter after many updates.
      scale: the mean and variance in use are the arrays divided by this.
    """

    mean: str
    var: str
    counter: str = ""
    final_count: np.ndarray | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class WithoutDropout:
    """Calls a module while its layers drop nothing; equal ones are compiled once.

    Attributes:
      call: calls the module.
      run: the function of a framework that makes this call without dropout.
    """

    call: Static
    run: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the module."""
        return self.run(self.call.value, *args, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedApply(abc.ABC):
    """Base of the `Model.apply` of modules.

    Attributes:
      kind: the class of the module.
      call: the function that calls the module.
      example: shapes of the inputs; states of equal modules compare equal whatever it is.
      sown_losses: the collections in which a Linen module sows losses.
      returns_losses: whether the outputs in training are pairs of outputs and sown losses.
      draws: whether the module is meant to draw random numbers in evaluation.
    """

    kind: type = dataclasses.field(compare=False, repr=False)
    call: Static = dataclasses.field(repr=False)
    example: PyTree = dataclasses.field(default=None, compare=False, repr=False)
    sown_losses: tuple[str, ...] = ()
    returns_losses: bool = dataclasses.field(default=False, repr=False)
    draws: bool = dataclasses.field(default=False, repr=False)

    def __call__(
        self, params: PyTree, model_state: Any, inputs: PyTree, *, train: bool, key: Any
    ) -> tuple[Any, Any]:
        """Returns the outputs and the model state after the call.

        In evaluation, a key is given if the module is meant to draw, and the state has changed
        where the module itself sets variables.
        """
        if self.draws and key is None:
            raise missing_key(self.kind.__name__)
        with lowerings.scope():
            return self.call_module(params, model_state, inputs, train, key)

    def call_module(
        self, params: PyTree, model_state: Any, inputs: PyTree, train: bool, key: Any
    ) -> Any:
        """Calls `run`; an axis over which layers reduce besides the batch has size 1."""
        try:
            return self.run(params, model_state, inputs, train, key)
        except NameError as error:
            axis = re.search(r"unbound axis name: (\w+)", str(error))
            if axis is None:
                raise
        options: Any = {"in_axes": None, "out_axes": None, "axis_size": 1, "axis_name": axis[1]}
        call = jax.vmap(lambda p, s, x: self.run(p, s, x, train, key), **options)
        return call(params, model_state, inputs)

    @abc.abstractmethod
    def run(self, params: Any, model_state: Any, inputs: Any, train: bool, key: Any) -> Any:
        """Returns the outputs of `call` and the model state after it; `key` may be None."""

    @abc.abstractmethod
    def recording(
        self, recorder: Recorder, params: PyTree, model_state: Any
    ) -> contextlib.AbstractContextManager[None]:
        """Records the calls of the module and its submodules."""

    @abc.abstractmethod
    def without_dropout(self) -> WithoutDropout:
        """Returns the function of `call` that drops nothing in training."""

    @abc.abstractmethod
    def batch_statistics(self, params: PyTree, model_state: Any) -> dict[str, BatchStatistics]:
        """Returns where the model state has the running statistics of batch norm, by layer."""

    @abc.abstractmethod
    def to_module(self, params: PyTree, model_state: Any) -> Any:
        """Returns the module with these variables, in evaluation mode."""


@dataclasses.dataclass(frozen=True)
class DrawingApply:
    """`Model.apply` of plain functions that are meant to draw random numbers in evaluation."""

    apply: Any
    draws: ClassVar[bool] = True

    def __call__(self, *args: Any, train: bool, key: Any) -> tuple[Any, Any]:
        """Calls the function."""
        if key is None:
            raise missing_key(name_of_plain(self.apply))
        return self.apply(*args, train=train, key=key)


def dropout_rates(layer: Any) -> dict[str, float]:
    """Returns the rates with which a layer drops, by the names of its attributes."""
    names = ("rate", "p", "dropout_rate") if "drop" in type(layer).__name__.lower() else ()
    found = {name: getattr(layer, name, None) for name in (*names, "dropout_rate")}
    return {name: x for name, x in found.items() if isinstance(x, int | float) and x > 0}


def unused_key() -> Any:
    """Returns a key for evaluation, in which modules may split it but not draw from it."""
    with jax.ensure_compile_time_eval():
        return jax.random.key(0)


def named_statistics(model_state: PyTree, skip: int) -> dict[str, BatchStatistics]:
    """Returns the pairs of leaves named "mean" and "var" in a model state, by layer.

    Args:
      model_state: a pytree of dicts.
      skip: number of names in front of the path of a layer.
    """
    found: dict[str, dict[str, str]] = {}
    for path, _ in named_arrays(model_state, "model_state"):
        layer, _, name = path.rpartition(".")
        if name in ("mean", "var"):
            found.setdefault(".".join(layer.split(".")[1 + skip :]), {})[name] = path
    return {
        layer: BatchStatistics(pair["mean"], pair["var"])
        for layer, pair in found.items()
        if len(pair) == 2
    }


@dataclasses.dataclass(frozen=True)
class RefuseInit:
    """`Model.init` of a module that holds its own parameters."""

    def __call__(self, key: jax.Array, inputs: PyTree) -> NoReturn:
        """Raises InputError: the parameters are those of the module."""
        raise InputError(
            "the module holds its own parameters, so Model.init cannot be called; make a new "
            "module and pass it to init_state"
        )


def describe_type(value: Any) -> str:
    """Returns the name of a value's type with its package, such as `torch.Tensor`."""
    package = type(value).__module__.split(".")[0]
    name = type(value).__name__
    return name if package == "builtins" else f"{package}.{name}"


def name_of_plain(function: Any) -> str:
    """Returns the name of a plain function of a Model for messages."""
    return f"{name_of(function)} of the Model"


def missing_key(name: str) -> InputError:
    """Returns the error for a model that draws in evaluation, and has no key."""
    return InputError(
        f"{name} draws random numbers in evaluation, and there is no key; expected one, as in "
        "evaluate(..., key=jax.random.key(0)) or predict(..., key=...)",
        argument="key",
    )


def draws_unasked(name: str) -> str:
    """Returns the message for a model that draws random numbers in evaluation."""
    return (
        f"{name} draws random numbers in evaluation; expected outputs that the inputs determine: "
        "draw in training alone, by the argument train of __call__, by self.training of a PyTorch "
        "module or by call=..., or from a fixed key; or, if it is meant to draw, "
        "init_state(..., draws_in_evaluation=True)"
    )


def to_arrays(tree: PyTree) -> PyTree:
    """Returns the leaves as JAX arrays without weak types, which the first update would remove."""

    def convert(leaf: Any) -> Any:
        array = jnp.asarray(leaf)
        is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        return array if is_key else jnp.asarray(array, array.dtype)

    return jax.tree.map(convert, tree)
