"""sweep: trains every configuration of a grid, as many at once as fit and pay off."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import _device_memory
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._processes import are_joined
from jaxtrain.callbacks import Callback, SweepProgress, checked_callbacks
from jaxtrain.callbacks.progress import default_callbacks
from jaxtrain.errors import InputError
from jaxtrain.parallel import axis_size, mesh_of
from jaxtrain.sweeps._grid import Grid, make_grid
from jaxtrain.sweeps._program import Program
from jaxtrain.sweeps._store import Store
from jaxtrain.sweeps.result import SweepResult, history_of

# "auto" multiplies the number of runs at once by this, as long as the time per run falls below
# this part of the time before.
_GROWTH, _GAIN = 8, 0.75
# It tries a larger number only where the runs that are left take this many times as long as
# compiling the smaller one did.
_PAYS = 4


def sweep(
    run: Callable[..., PyTree],
    axes: Mapping[str, Iterable[Any]],
    *,
    zipped: bool = False,
    static_argnames: str | Sequence[str] = (),
    at_once: int | Literal["auto"] = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback | Callable[[SweepProgress], Any]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> SweepResult:
    """Calls a run for every configuration of a grid, many at once under `jax.vmap`.

    The results agree with those of single calls to about 1e-5, not to the last bit: a batch of
    runs compiles to different operations than one run. Long runs amplify the difference.

    Args:
      run: called with one value of each axis by name, `run(learning_rate=..., seed=...)`. Returns
        (state, history), as `jt.train` does, a dict of arrays, or any pytree of arrays. It is
        traced by JAX, so numbers arrive as scalar arrays.
      axes: the values of each axis, by name. An axis of numbers is vmapped. The program is compiled
        once for each value of an axis of anything else, such as strings, tuples, functions (losses,
        optimizers) or modules.
      zipped: pairs the axes: configuration k takes the k-th value of each. By default, the
        configurations are the product of the axes.
      static_argnames: axes of numbers to compile for each value of, since these change shapes:
        batch sizes, widths, depths. Their values arrive as they are. The histories of all runs
        must have the same shapes, so the number of epochs cannot be an axis.
      at_once: how many runs to train at once. "auto" trains one run, then 8, 64, ... at once,
        as long as this takes at least a quarter less time per run and at most half of the free
        memory. On CPUs, a large network alone may occupy all cores, so that "auto" returns to 1.
      checkpoint: folder that keeps the finished runs. The same call resumes from it.
      callbacks: called with a `SweepProgress` as the sweep starts and after each batch of runs:
        functions, whose results are ignored, and the `on_runs` of callbacks such as
        `jt.callbacks.progress()`. None shows progress in a terminal or a notebook, and nothing
        elsewhere.
      mesh: devices with an axis "data", over which the runs are distributed. None means the mesh
        of `jax.set_mesh`, if there is one.

    Returns:
      The histories and states of all runs, by the axes of the grid.

    Raises:
      InputError: the grid is not valid, `run` does not take its axes or returns other columns for
        other values, or the checkpoint folder belongs to another sweep.
      MemoryError: a single run does not fit in memory.

    Example:
      >>> def run(learning_rate, seed):
      ...     key = jax.random.key(seed)
      ...     optimizer = jt.optimizers.sgd(learning_rate)
      ...     state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      ...     return jt.train(state, train, test, loss_fn=loss_fn, epochs=5, key=key)
      >>> result = jt.sweep(run, {"learning_rate": [0.01, 0.03, 0.1], "seed": range(2)})
      >>> result["test_loss"].shape
      (3, 2, 5)
      >>> table = result.table(over="seed")  # print(table) shows it
    """
    check_arguments(sweep, locals(), eager="call it outside")
    grid = make_grid(run, axes, zipped=zipped, static_argnames=static_argnames)
    callbacks = default_callbacks() if callbacks is None else callbacks
    called = checked_callbacks(callbacks, "on_runs")
    _check_called(called)
    if not (isinstance(at_once, str) and at_once == "auto"):
        check_integer(at_once, "at_once", minimum=1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mesh_of(mesh=mesh))
        if are_joined():
            raise InputError(
                f"mesh spans {jax.process_count()} processes; expected devices of this process "
                "alone, since sweep trains in one process",
                argument="mesh",
            )
        programs = [Program(run, group) for group in grid.groups]
        _check_columns(grid, programs)
        store = None
        if checkpoint is not None:
            store = stack.enter_context(contextlib.closing(Store(checkpoint, grid, programs)))
        report = stack.enter_context(_reporting(called))
        training = _Training(grid, programs, store, report)
        training.restore()
        for index in range(len(programs)):
            training.train(index, at_once)
    return training.result()


class _Training:
    """A sweep in progress.

    The leaves of what the runs return are kept on the host, by group and by position in it.
    """

    def __init__(
        self,
        grid: Grid,
        programs: list[Program],
        store: Store | None,
        report: Callable[[SweepProgress], None],
    ) -> None:
        self._grid = grid
        self._programs = programs
        self._store = store
        self._report = report
        self._done: list[dict[int, list[np.ndarray]]] = [{} for _ in programs]

    def _count(self) -> tuple[int, int]:
        return sum(map(len, self._done)), math.prod(self._grid.shape)

    def _keep(self, group: int, positions: list[int], leaves: list[np.ndarray]) -> None:
        for row, position in enumerate(positions):
            self._done[group][position] = [leaf[row] for leaf in leaves]

    def restore(self) -> None:
        """Reads the runs that an earlier call has finished."""
        if self._store is not None:
            for group, positions, leaves in self._store.restore():
                self._keep(group, positions, leaves)
        self._report(SweepProgress(*self._count(), kind="started"))

    def train(self, group: int, at_once: int | Literal["auto"]) -> None:
        """Trains the runs of a group that are not done yet."""
        program = self._programs[group]
        todo = [i for i in range(len(program.group.indices)) if i not in self._done[group]]
        devices = axis_size()
        growing, size, fastest = at_once == "auto", 1, math.inf  # size: runs per device
        if at_once != "auto":
            size = _balanced(_rounds(todo, devices), math.ceil(at_once / devices))
        while todo:
            positions = todo[: size * devices]
            try:
                compile_seconds = program.compile(size)
                started = time.perf_counter()
                leaves = program.train(positions, size)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                if not _device_memory.is_out_of_memory(error):
                    raise
                if size == 1:
                    raise MemoryError(
                        "a single run does not fit in memory; use a smaller batch_size, a smaller "
                        "model, or a device with more memory"
                    ) from error
                growing, size = False, size // 2
                self._report(SweepProgress(*self._count(), size * devices, kind="halved"))
                continue
            seconds = time.perf_counter() - started
            self._keep(group, positions, leaves)
            if self._store is not None:
                self._store.save(group, positions, leaves)
            self._report(SweepProgress(*self._count(), size * devices, compile_seconds, seconds))
            todo = todo[size * devices :]
            if growing:
                growing, size, fastest = _grow(
                    program, size, seconds / size, fastest, compile_seconds, _rounds(todo, devices)
                )

    def result(self) -> SweepResult:
        """Returns the result of all runs."""
        outputs = []
        for program, done in zip(self._programs, self._done, strict=True):
            rows = [done[position] for position in range(len(done))]
            leaves = [np.stack(leaf) for leaf in zip(*rows, strict=True)]
            outputs.append((program.group.indices, program.assemble(leaves)))
        return SweepResult(self._grid, outputs)


def _check_called(callbacks: list[Callback]) -> None:
    """Raises InputError for a callback that has no method for sweeps."""
    for each in callbacks:
        if "on_runs" not in vars(each) and type(each).on_runs is Callback.on_runs:
            raise InputError(
                f"callbacks has the callback {type(each).__name__.strip('_')}, which a sweep does "
                "not call; expected functions, or callbacks with on_runs, such as "
                "jaxtrain.callbacks.progress(): checkpoint= keeps finished runs, and "
                "jaxtrain.train takes early_stopping=",
                argument="callbacks",
            )


@contextlib.contextmanager
def _reporting(callbacks: list[Callback]) -> Iterator[Callable[[SweepProgress], None]]:
    """Yields the function that reports to all callbacks; tells them of the end."""

    def report(progress: SweepProgress) -> None:
        for callback in callbacks:
            callback.on_runs(progress)

    failure: BaseException | None = None
    try:
        yield report
    except BaseException as error:
        failure = error
        raise
    finally:
        for callback in callbacks:
            callback.on_runs_end(failure)


def _rounds(todo: list[int], devices: int) -> int:
    """Returns the largest number of runs that one of the devices has to train."""
    return math.ceil(len(todo) / devices)


def _grow(
    program: Program,
    size: int,
    per_run: float,
    fastest: float,
    compile_seconds: float,
    remaining: int,
) -> tuple[bool, int, float]:
    """Decides how many runs per device to train at once next.

    Returns:
      Whether to measure again, the number of runs, and the shortest time per run of a device so
      far, in seconds.
    """
    if per_run > _GAIN * fastest:  # the larger batch saves less than a quarter
        smaller = max(1, size // _GROWTH)
        return False, _for_the_rest(remaining, smaller, fastest, compile_seconds), fastest
    larger = min(_GROWTH * size, remaining)
    # A program for more runs must save more time than it takes to compile: more than this one.
    pays = larger > size and remaining * per_run > _PAYS * compile_seconds
    if pays and program.fits(larger):
        return True, larger, per_run
    return False, _for_the_rest(remaining, size, per_run, compile_seconds), per_run


def _for_the_rest(remaining: int, size: int, per_run: float, compile_seconds: float) -> int:
    """Returns the number of runs at once for the rest.

    The last batch of a size that is compiled already may be mostly padding; a smaller size is
    compiled where that saves more time than it takes.
    """
    smaller = _balanced(remaining, size)
    saved = math.ceil(remaining / size) * (size - smaller) * per_run
    return smaller if saved > compile_seconds else size


def _balanced(runs: int, size: int) -> int:
    """Returns at most `size`, so that as many batches as needed have about the same size."""
    return math.ceil(runs / math.ceil(runs / size)) if runs else size


def _check_columns(grid: Grid, programs: list[Program]) -> None:
    """Raises InputError if runs with other static values return other columns."""

    def describe(program: Program) -> str:
        at = grid.positions[program.group.indices[0]]
        return ", ".join(f"{name} {grid.labels[name][at[name]]}" for name in program.group.static)

    first = programs[0]
    for program in programs[1:]:
        if _columns(program) != _columns(first):
            raise InputError(
                f"run returns {_columns(program)} with {describe(program)}, but {_columns(first)} "
                f"with {describe(first)}; expected the same columns for all values",
                argument="run",
            )


def _columns(program: Program) -> str:
    history = history_of(program.shapes)
    return f"the columns {', '.join(history)}" if history else "no columns"
