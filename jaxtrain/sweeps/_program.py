"""Programs that train some runs of a group at once."""

from __future__ import annotations

import functools
import numbers
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxtrain import _device_memory, parallel
from jaxtrain._compiler import options_for
from jaxtrain._placement import to_words
from jaxtrain.checkpoint import digest_program
from jaxtrain.errors import InputError, first_line, message_of
from jaxtrain.sweeps._grid import Group
from jaxtrain.sweeps.result import history_of

_DIVIDED = P(parallel.AXIS)


def _sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns how the values of an axis of the sweep are divided over the devices."""
    return NamedSharding(mesh, _DIVIDED)


class _Compiled(NamedTuple):
    """A program, the arrays that the run captures, and the seconds of compiling."""

    program: jax.stages.Compiled
    captured: list[Any]
    seconds: float


class Program:
    """The function of a group of runs, compiled for some numbers of runs.

    On a mesh, each device trains its own part of the runs, without communication.

    Attributes:
      group: the runs.
      shapes: what one run returns, as a pytree of `jax.ShapeDtypeStruct`.
    """

    def __init__(self, run: Callable[..., PyTree], group: Group) -> None:
        self.group = group
        self._run = functools.partial(run, **group.static)
        self._columns: list[str] = []
        self._traced = self._trace(1)
        self._check_captured()
        # Without the axis over the runs.
        self.shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._traced.out_info
        )
        self._compiled: dict[int, _Compiled] = {}

    def _check_captured(self) -> None:
        """Raises InputError if the run uses arrays that are on a mesh already."""
        for array in self._traced.jaxpr.consts:
            if isinstance(array, jax.Array) and len(array.sharding.device_set) > 1:
                raise InputError(
                    f"run uses an array of shape {array.shape} that is on "
                    f"{len(array.sharding.device_set)} devices; expected arrays on one device, "
                    "since each device trains whole runs: load the data outside jax.set_mesh",
                    argument="run",
                )

    def _trace(self, size: int) -> jax.stages.Traced:
        def train(values: dict[str, jax.Array]) -> PyTree:
            if size == 1:  # compiles as the run itself, not as a batch of one
                alone = {name: value[0] for name, value in values.items()}
                output = self._run(**alone)
                _check_output(output)
                self._columns = list(history_of(output) or ())
                return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), output)
            return jax.vmap(lambda each: self._run(**each), axis_size=size)(values)

        try:
            with parallel.without_mesh():  # each device trains whole runs
                return jax.jit(train).trace(self._shapes_of(size))
        except (TypeError, ValueError, IndexError) as error:  # ConcretizationTypeError and others
            if not isinstance(error, jax.errors.JAXTypeError) and "Trace" not in message_of(error):
                raise
            names = ", ".join(self.group.values) or "none"
            reason = first_line(error).rstrip(".")
            raise InputError(
                f"run needs the value of an array while it is traced ({reason}); expected JAX "
                "operations only: use jt.train in place of jt.fit, return arrays without float() "
                f"or .item(), and name axes that set shapes or branches ({names}) among "
                "static_argnames",
                argument="static_argnames",
            ) from error

    def _shapes_of(
        self, size: int, sharding: NamedSharding | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((size,), array.dtype, sharding=sharding)
            for name, array in self.group.values.items()
        }

    def digest(self) -> str:
        """Returns a digest of the traced run and the arrays that it has captured."""
        return digest_program(self._traced)

    def compile(self, size: int) -> float:
        """Compiles for a number of runs per device; returns the seconds, the first time."""
        self._compile(size)
        compiled = self._compiled[size]
        self._compiled[size] = compiled._replace(seconds=0.0)
        return compiled.seconds

    def _compile(self, size: int) -> None:
        if size not in self._compiled:
            started = time.perf_counter()
            traced = self._traced if size == 1 else self._trace(size)
            program, captured = traced.jaxpr.jaxpr, traced.jaxpr.consts

            # The arrays that the run captures, such as the data, become arguments: as constants
            # they would be copied into the program, and compiling would take seconds longer.
            def train(captured: list[Any], values: dict[str, jax.Array]) -> list[jax.Array]:
                return jax.core.eval_jaxpr(program, captured, *jax.tree.leaves(values))

            mesh = parallel.current_mesh()
            if mesh is None:
                shapes = self._shapes_of(size)
            else:
                train = jax.shard_map(  # captured arrays are replicated, values are sharded
                    train, mesh=mesh, in_specs=(P(), _DIVIDED), out_specs=_DIVIDED, check_vma=False
                )
                captured = parallel.replicate(captured, mesh)
                shapes = self._shapes_of(size * parallel.axis_size(), _sharding(mesh))
            options = options_for(traced.jaxpr)
            compiled = jax.jit(train).lower(captured, shapes).compile(options)
            self._compiled[size] = _Compiled(compiled, captured, time.perf_counter() - started)

    def fits(self, size: int) -> bool:
        """Returns whether the program for a number of runs per device fits in the free memory."""
        try:
            self._compile(size)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if _device_memory.is_out_of_memory(error):
                return False
            raise
        needed = _device_memory.working_bytes(self._compiled[size].program)
        return needed <= _device_memory.USABLE_FRACTION * _device_memory.free_bytes()

    def train(self, positions: list[int], size: int) -> list[np.ndarray]:
        """Trains the runs at these positions of the group.

        Args:
          positions: which runs, at most `size` per device; the last one is repeated to fill the
            program.
          size: the number of runs per device of the compiled program.

        Returns:
          The leaves of what the runs return, on the host, each with a leading axis over the runs.
        """
        padded = positions + positions[-1:] * (size * parallel.axis_size() - len(positions))
        values: dict[str, Any] = {name: array[padded] for name, array in self.group.values.items()}
        mesh = parallel.current_mesh()
        if mesh is not None:
            values = {
                name: jax.device_put(array, _sharding(mesh)) for name, array in values.items()
            }
        compiled = self._compiled[size]
        leaves = compiled.program(compiled.captured, values)
        return [np.asarray(to_words(leaf))[: len(positions)] for leaf in leaves]

    def assemble(self, leaves: list[np.ndarray]) -> PyTree:
        """Returns the pytree of leaves that `train` has returned, with PRNG keys as keys.

        The columns of the history are in the order in which the run returns them; a dict that
        leaves a compiled program is sorted by name.
        """
        shapes, structure = jax.tree.flatten(self.shapes)
        found = [
            jax.random.wrap_key_data(jnp.asarray(leaf), impl=shape.dtype)
            if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)
            else leaf
            for leaf, shape in zip(leaves, shapes, strict=True)
        ]
        output = jax.tree.unflatten(structure, found)
        history = history_of(output)
        if history is None:
            return output
        ordered = {name: history[name] for name in self._columns}
        return ordered if history is output else (output[0], ordered)


def _check_output(output: PyTree) -> None:
    for leaf in jax.tree.leaves(output):
        if not isinstance(leaf, numbers.Number) and not hasattr(leaf, "dtype"):
            raise InputError(f"run returns {leaf!r}; expected arrays or numbers", argument="run")
