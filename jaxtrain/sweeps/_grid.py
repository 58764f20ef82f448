"""Grid: the configurations of a sweep, checked, and grouped by the values that change programs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain._static_key import static_key
from jaxtrain.errors import InputError
from jaxtrain.sweeps._labels import is_plain, make_labels

_INT32 = np.iinfo(np.int32)


class Group(NamedTuple):
    """The runs of a sweep that share one program.

    Attributes:
      static: the values that the program is compiled for, by name.
      indices: which runs of the sweep they are.
      values: the values that the program receives, by name; arrays of shape [runs].
    """

    static: dict[str, Any]
    indices: list[int]
    values: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """All configurations of a sweep.

    Attributes:
      axes: the values of each axis, by name.
      zipped: whether configuration k takes the k-th value of each axis.
      static_argnames: the axes whose values the programs are compiled for.
    """

    axes: dict[str, tuple[Any, ...]]
    zipped: bool
    static_argnames: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes, or the number of configurations where they are zipped."""
        lengths = tuple(map(len, self.axes.values()))
        return lengths[:1] if self.zipped else lengths

    @functools.cached_property
    def positions(self) -> list[dict[str, int]]:
        """For each run, the position of its value on each axis; the last axis varies fastest.

        Of equal values on an axis, it is the position of the first.
        """
        combine = functools.partial(zip, strict=True) if self.zipped else itertools.product
        rows = combine(*map(_first_positions, self.axes.values()))
        return [dict(zip(self.axes, row, strict=True)) for row in rows]

    @functools.cached_property
    def configurations(self) -> list[dict[str, Any]]:
        """The values by name, for each run in order."""
        return [{n: self.axes[n][at] for n, at in each.items()} for each in self.positions]

    @functools.cached_property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The values of each axis as texts, for tables and pictures."""
        return {name: make_labels(values) for name, values in self.axes.items()}

    @functools.cached_property
    def cells(self) -> dict[str, list[Any]]:
        """The values of each axis, with labels in place of those that JSON does not have."""
        return {
            name: [v if is_plain(v) else self.labels[name][at] for at, v in enumerate(values)]
            for name, values in self.axes.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Returns the grid without `static_argnames`, for `from_json`."""
        return {"axes": self.cells, "zipped": self.zipped}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Grid:
        """Returns the grid that `to_json` has described."""
        axes = {name: tuple(map(_with_tuples, each)) for name, each in saved["axes"].items()}
        return cls(axes, saved["zipped"])

    @property
    def groups(self) -> list[Group]:
        """The runs grouped by their static values."""
        members: dict[tuple[int, ...], list[int]] = {}
        for index, each in enumerate(self.positions):
            members.setdefault(tuple(each[n] for n in self.static_argnames), []).append(index)
        return [
            Group(
                {name: self.configurations[indices[0]][name] for name in self.static_argnames},
                indices,
                {
                    name: _as_array([self.configurations[i][name] for i in indices])
                    for name in self.axes
                    if name not in self.static_argnames
                },
            )
            for indices in members.values()
        ]


def make_grid(
    run: Callable[..., Any],
    axes: Mapping[str, Iterable[Any]],
    *,
    zipped: bool,
    static_argnames: Sequence[str],
) -> Grid:
    """Returns the grid of a sweep.

    Args:
      run: the function that the configurations are passed to.
      axes: the values of each axis, by name.
      zipped: whether configuration k takes the k-th value of each axis.
      static_argnames: axes to compile for each value of; those that do not hold numbers are added.

    Raises:
      InputError: an axis is empty or mixes types, the lengths of zipped axes differ, or `run` does
        not take the axes as arguments.
    """
    if not axes:
        raise InputError(
            "axes is empty; expected a dict of at least one axis, such as "
            '{"learning_rate": [0.01, 0.1]}',
            argument="axes",
        )
    if isinstance(static_argnames, str):
        static_argnames = (static_argnames,)
    values = {name: _values(name, each) for name, each in axes.items()}
    for seed in values.get("seed", ()):
        if not _is_integer(seed):
            raise InputError(f"the axis seed has {seed!r}; expected integers", argument="axes")
    for name in static_argnames:
        if name not in values:
            raise InputError(
                f"static_argnames has {name!r}; expected names of axes: {', '.join(values)}",
                argument="static_argnames",
            )
    static = []
    for name, each in values.items():
        if name in static_argnames or not _are_numbers(name, each):
            static.append(name)
        elif any(isinstance(value, float) for value in each):
            values[name] = tuple(map(float, each))
    lengths = {name: len(each) for name, each in values.items()}
    if zipped and len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(
            f"the axes differ in length: {found} values; expected equal lengths, or zipped=False",
            argument="axes",
        )
    grid = Grid(values, zipped, tuple(static))
    _check_signature(run, grid)
    return grid


def _values(name: str, values: Any) -> tuple[Any, ...]:
    """Returns the values of an axis, numbers as Python's own."""
    is_iterable = isinstance(values, Iterable) and len(getattr(values, "shape", (0,))) == 1
    if isinstance(values, (str, bytes, Mapping)) or not is_iterable:
        raise InputError(
            f"the axis {name} is {values!r}; expected a sequence of values, such as a list",
            argument="axes",
        )
    found = tuple(map(_as_python_number, values))
    if any(isinstance(value, (np.ndarray, jax.Array)) for value in found):
        raise InputError(
            f"the axis {name} has arrays; expected numbers, or objects to compile for, such as "
            "strings, tuples, functions and modules",
            argument="axes",
        )
    if not found:
        raise InputError(f"the axis {name} is empty; expected at least one value", argument="axes")
    return found


def _as_python_number(value: Any) -> Any:
    is_number = isinstance(value, np.generic) or (
        isinstance(value, (np.ndarray, jax.Array))
        and value.ndim == 0
        and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    )
    return value.item() if is_number else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(name: str, values: tuple[Any, ...]) -> bool:
    """Returns whether an axis holds numbers, and raises InputError if it mixes types."""
    flags = [isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values]
    if all(flags):
        for value in values:
            if _is_integer(value) and not _INT32.min <= value <= _INT32.max:
                raise InputError(
                    f"the axis {name} has {value}; expected integers from {_INT32.min} to "
                    f"{_INT32.max}, or {name} among static_argnames",
                    argument="axes",
                )
            if math.isnan(value):
                raise InputError(f"the axis {name} has {value}; expected numbers", argument="axes")
            _check_range(name, value)
        return True
    kinds = {type(value): value for value in values}
    if len(kinds) > 1 and any(map(is_plain, values)):
        first, second = list(kinds.values())[:2]
        raise InputError(
            f"the axis {name} mixes {first!r} and {second!r}; expected values of one type, or "
            f"{name} among static_argnames",
            argument="axes",
        )
    return False


def _check_range(name: str, value: Any) -> None:
    """Raises InputError if a number becomes infinite or 0 in the dtype that JAX gives it."""
    dtype = jnp.result_type(float)
    with np.errstate(over="ignore"):
        rounded = np.asarray(value, dtype)
    overflows = np.isinf(rounded) and not math.isinf(value)
    underflows = rounded == 0 and value != 0
    if overflows or underflows:
        raise InputError(
            f"the axis {name} has {value}, which {dtype} cannot hold; expected numbers from "
            f"{jnp.finfo(dtype).tiny:.2g} to {jnp.finfo(dtype).max:.2g}",
            argument="axes",
        )


def _with_tuples(value: Any) -> Any:
    """Returns a value as it was before JSON turned tuples into lists."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _first_positions(values: tuple[Any, ...]) -> list[int]:
    """Returns for each value the position of the first that has the same `static_key`."""
    found: dict[Any, int] = {}
    return [found.setdefault(static_key(value), at) for at, value in enumerate(values)]


def _as_array(values: list[Any]) -> np.ndarray:
    if all(map(_is_integer, values)):
        return np.array(values, np.int32)
    return np.array(values, jnp.result_type(float))


def _check_signature(run: Callable[..., Any], grid: Grid) -> None:
    """Raises InputError unless `run` takes the axes as named arguments."""
    names = ", ".join(grid.axes)
    if not callable(run):
        raise InputError(f"run is {run!r}; expected a function, run({names})", argument="run")
    try:
        signature = inspect.signature(run)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(**dict.fromkeys(grid.axes))
    except TypeError as error:
        raise InputError(
            f"the axes are {names}, but run takes {signature} ({error}); expected an axis for each "
            "argument of run, by the same name",
            argument="run",
        ) from error
