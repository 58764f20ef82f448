"""Recorder: the layers that a network calls while JAX traces it."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

Path = tuple[str, ...]
_SETTINGS = ("epsilon", "eps", "momentum", "rate", "p", "dropout_rate")
# Held while classes are patched.
_PATCHING = threading.Lock()


class Call(NamedTuple):
    """The first call of a layer.

    Attributes:
      path: attributes or names that lead from the network to the layer; () is the network itself.
      type: name of the layer's class.
      inputs: shapes and dtypes of the arrays among its arguments, without PRNG keys.
      outputs: those of its results.
      settings: its numbers, such as {"epsilon": 1e-6}, by attribute.
    """

    path: Path
    type: str
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    settings: dict[str, float]


class Recorder:
    """Records calls of layers, and names the operations of each in JAX's name stack."""

    def __init__(self) -> None:
        self._calls: dict[Path, Call] = {}
        self._indices: dict[Path, int] = {}
        self._thread = threading.get_ident()

    @property
    def calls(self) -> list[Call]:
        """The layers in the order of their first calls."""
        return list(self._calls.values())

    @property
    def is_of_this_thread(self) -> bool:
        """Whether the current thread made the recorder; calls in others are not recorded."""
        return threading.get_ident() == self._thread

    def call(
        self, path: Path | None, layer: Any, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Calls the function of a layer and records it; in another thread, only calls it.

        The path is None for a layer that JAX has rebuilt, in a loop for example.
        """
        if path is None or not self.is_of_this_thread:
            return function(*args, **kwargs)
        is_first = path not in self._calls
        if is_first:
            self._indices[path] = len(self._calls)
            values = {name: getattr(layer, name, None) for name in _SETTINGS}
            settings = {name: x for name, x in values.items() if isinstance(x, int | float)}
            self._calls[path] = Call(
                path, type(layer).__name__, _shapes((args, kwargs)), (), settings
            )
        with jax.named_scope(f"jaxtrain_layer_{self._indices[path]}"):
            outputs = function(*args, **kwargs)
        if is_first:
            self._calls[path] = self._calls[path]._replace(outputs=_shapes(outputs))
        return outputs

    def layer_of(self, name_stack: str) -> int | None:
        """Returns the index in `calls` of the innermost layer of an operation, or None."""
        found = re.findall(r"jaxtrain_layer_(\d+)", name_stack)
        return int(found[-1]) if found else None


@contextlib.contextmanager
def patched_calls(
    recorder: Recorder,
    module: Any,
    modules: Callable[[Any], Iterable[tuple[Path, Any]]],
    dropout: type,
) -> Iterator[None]:
    """Records the calls of all layers of a network whose framework has no hook for it.

    In the meantime, `__call__` of the classes of the layers is replaced. `modules` returns the
    layers of a network with their paths. The network may also create `dropout` layers in its call.
    """
    paths: dict[int, Path] = {}
    classes = {dropout, *(type(layer) for _, layer in modules(module))}
    owners = {base for cls in classes for base in cls.__mro__ if "__call__" in vars(base)}

    def wrap(original: Any) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            function = original.__get__(self, type(self))
            if not recorder.is_of_this_thread:  # perhaps of another network
                return function(*args, **kwargs)
            if not paths:
                for path, layer in modules(self):
                    paths.setdefault(id(layer), path)
            return recorder.call(paths.get(id(self)), self, function, args, kwargs)

        return call

    with _PATCHING:
        originals = {owner: vars(owner)["__call__"] for owner in owners}
        try:
            for owner, original in originals.items():
                setattr(owner, "__call__", wrap(original))  # noqa: B010
            yield
        finally:
            for owner, original in originals.items():
                setattr(owner, "__call__", original)  # noqa: B010


def _shapes(tree: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns the arrays among some values, without PRNG keys and the state of Equinox's layers."""
    return tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for leaf in jax.tree.leaves(tree, is_leaf=_is_state)
        if isinstance(leaf, jax.Array) and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _is_state(node: Any) -> bool:
    return type(node).__module__.startswith("equinox.") and type(node).__name__ == "State"
