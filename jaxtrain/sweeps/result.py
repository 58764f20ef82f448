"""SweepResult: the histories and states of a sweep, by the axes of its grid."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._extras import needs_extra
from jaxtrain._files import output_path, write_atomically, write_csv
from jaxtrain.callbacks.early_stopping import Mode, infer_mode
from jaxtrain.checkpoint import encode_arrays, read_arrays
from jaxtrain.errors import InputError
from jaxtrain.sweeps._grid import Grid
from jaxtrain.training.state import TrainState

if TYPE_CHECKING:
    import pandas

    from jaxtrain._figures import Figure

_HELD_OUT = ("test_", "validation_")

Names: TypeAlias = str | Sequence[str]
"""One name, or several."""


class SweepRun(NamedTuple):
    """One run of a sweep.

    Attributes:
      configuration: its value on each axis, by name.
      history: its columns by name; arrays of shape [epochs].
      state: the state that it returned, or None if it returned none.
    """

    configuration: dict[str, Any]
    history: dict[str, np.ndarray]
    state: TrainState | None


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SweepTable:
    """The final values of a sweep, averaged over some axes; prints as a table.

    Attributes:
      frame: one row per configuration of the other axes: its value on each of them, the mean of
        each column over the finite runs and, after averaging, their standard deviation as
        `NAME_deviation`; and how many of its runs have `diverged`.
      cells: the columns that are printed, as text.
    """

    frame: pandas.DataFrame
    cells: dict[str, list[str]]

    def __str__(self) -> str:
        columns = [[name, *cells] for name, cells in self.cells.items()]
        aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
        return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))

    __repr__ = __str__


class SweepResult:
    """What the runs of a sweep have returned, by the axes of its grid.

    Attributes:
      axes: the values of each axis, by name.
      configurations: the value on each axis by name, for each run; the last axis varies fastest.
      shape: the lengths of the axes, or the number of runs where the axes are zipped.

    Example:
      >>> def run(learning_rate, seed):
      ...     optimizer = jt.optimizers.sgd(learning_rate)
      ...     state = jt.init_state(model, optimizer, train.inputs[:1], key=jax.random.key(seed))
      ...     return jt.train(state, train, test, loss_fn=loss_fn, metric_fns=metric_fns, epochs=5)
      >>> result = jt.sweep(run, {"learning_rate": [0.01, 0.1], "seed": range(3)})
      >>> result["test_accuracy"].shape  # of each epoch
      (2, 3, 5)
      >>> best = result.best("test_accuracy", over="seed")
      >>> metrics = jt.evaluate(best.state, test, loss_fn)
      >>> table = result.table(over="seed")  # print(table) shows it
      >>> result.line_plot("test_loss", over="seed").savefig("losses.png")
    """

    def __init__(
        self, grid: Grid, outputs: list[tuple[list[int], PyTree]], rows: list[int] | None = None
    ) -> None:
        """Takes the grid; for each group, which runs it has and their outputs, stacked.

        `rows` are the indices of the epochs of the runs' states, by default from the states.
        """
        self.axes = grid.axes
        self.configurations = grid.configurations
        self.shape = grid.shape
        self._grid = grid
        self._outputs = outputs
        self._rows = self._final_rows() if rows is None else rows

    def _final_rows(self) -> list[int]:
        """Returns the row of the history that belongs to the state of each run; -1 is the last."""
        rows = np.full(len(self.configurations), -1)
        for indices, tree in self._outputs:
            state, history = _state(tree), history_of(tree) or {}
            if state is not None and np.ndim(history.get("epoch", 0)) == 2:
                is_row = np.asarray(history["epoch"]) == np.asarray(state.epoch)[:, None]
                rows[indices] = np.where(is_row.any(axis=1), is_row.argmax(axis=1), -1)
        return rows.tolist()

    def __repr__(self) -> str:
        lengths = ", ".join(f"{name}: {len(values)}" for name, values in self.axes.items())
        return f"SweepResult({len(self.configurations)} runs, {lengths}; {', '.join(self.columns)})"

    @property
    def columns(self) -> list[str]:
        """The names of the histories' columns; empty if the runs return no history."""
        return list(history_of(self._outputs[0][1]) or {})

    @property
    def outputs(self) -> PyTree:
        """What the runs have returned, as one pytree with leading axes [axes...].

        Raises:
          InputError: the runs return different numbers of arrays, or other shapes.
        """
        trees = [tree for _, tree in self._outputs]
        if len({len(jax.tree.leaves(tree)) for tree in trees}) > 1:
            raise InputError(
                "the runs return different numbers of arrays; expected the same structure from all "
                "of them: result[column] and result.run(index) return some of them"
            )
        leaves = zip(*map(jax.tree.leaves, trees), strict=True)
        stacked = [self._stack("an array of the runs' outputs", list(each)) for each in leaves]
        return jax.tree.unflatten(jax.tree.structure(trees[0]), stacked)

    def __getitem__(self, column: str) -> np.ndarray:
        """Returns a column of the histories.

        Args:
          column: its name.

        Returns:
          An array of shape [axes..., epochs], or [axes...] if the runs return a scalar. A run that
          has diverged has NaN in its own rows. The rows after early stopping are NaN.

        Raises:
          InputError: there is no such column, or its shape differs between the runs.
        """
        check_arguments(SweepResult.__getitem__, locals())
        if column not in self.columns:
            raise InputError(
                f"the sweep has no column {column!r}; expected one of {', '.join(self.columns)}"
                if self.columns
                else f"the sweep has no column {column!r}, since its runs return no history; "
                "expected run to return (state, history) or a dict of arrays"
            )
        columns = [history_of(tree)[column] for _, tree in self._outputs]
        return self._stack(f"the column {column!r}", columns)

    def _stack(self, name: str, parts: list[Any]) -> Any:
        """Returns the arrays of all groups as one array of shape [axes..., ...]."""
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) > 1:
            raise InputError(
                f"{name} has the shapes {', '.join(map(str, sorted(shapes)))} in different runs; "
                "expected the same shape in all of them: to_pandas() and run(index) take any"
            )
        order = np.argsort([index for indices, _ in self._outputs for index in indices])
        numpy = isinstance(parts[0], np.ndarray)  # PRNG keys are arrays of JAX
        joined: Any = np.concatenate(parts) if numpy else jnp.concatenate(parts)
        return joined[order].reshape(self.shape + joined.shape[1:])

    def final(self, column: str) -> np.ndarray:
        """Returns the value of a column for the state that each run has returned.

        Args:
          column: its name.

        Returns:
          An array of shape [axes...]: the last epoch, or the best one where a run of `jt.train`
          has stopped early. NaN where the train loss is NaN, since metrics such as the accuracy of
          a diverged run are numbers without a meaning.

        Raises:
          InputError: there is no such column, or it has more than one value per epoch.
        """
        values = self[column]
        extra = values.ndim - len(self.shape)
        if extra == 0:
            return values
        if extra > 1:
            raise InputError(
                f"the column {column!r} has the shape {list(values.shape[-extra:])} in each run; "
                "expected one value per epoch"
            )
        rows = np.array(self._rows)
        rows = np.where((rows < 0) | (rows >= values.shape[-1]), values.shape[-1] - 1, rows)
        final = np.take_along_axis(values, rows.reshape(*self.shape, 1), axis=-1)[..., 0]
        is_float = np.issubdtype(final.dtype, np.inexact)
        if is_float and column != "train_loss" and "train_loss" in self.columns:
            final = np.where(np.isnan(self.final("train_loss")), np.nan, final)
        return final

    def run(self, index: int) -> SweepRun:
        """Returns one run.

        Args:
          index: its position in `configurations`.
        """
        runs = len(self.configurations)
        check_integer(index, "index", minimum=-runs, maximum=runs - 1)
        index = range(runs)[index]
        indices, tree = next(each for each in self._outputs if index in each[0])
        alone = jax.tree.map(operator.itemgetter(indices.index(index)), tree)
        # `jnp.asarray` would compile a program for each shape.
        state = jax.device_put(_state(alone))
        return SweepRun(self.configurations[index], history_of(alone) or {}, state)

    def best(self, column: str, mode: Mode | None = None, *, over: Names = ()) -> SweepRun:
        """Returns the run with the best final value of a column.

        Args:
          column: its name.
          mode: "min" if smaller is better, "max" if larger is better. None infers it from the
            column's name, as `jt.callbacks.early_stopping` does.
          over: the axis, or the axes, over which to average, such as "seed": then the
            configuration of the other axes with the best mean is chosen, of which no run has
            diverged, and the first of its runs is returned.

        Raises:
          InputError: there is no such column or axis, or all runs have diverged.
          MissingExtraError: `over` is given, and pandas is not installed.
        """
        check_arguments(SweepResult.best, locals())
        names = _axis_names(over)
        values, runs = np.ravel(self.final(column)), range(len(self.configurations))
        if names:
            groups = self._grouped([column], names)[column]
            values = groups.agg(lambda each: each.mean(skipna=False)).to_numpy()
            runs = groups.head(1).index
        values = values if (mode or infer_mode(column)) == "min" else -values
        if np.isnan(values).all():
            kind = f"configurations, averaged over {', '.join(names)}" if names else "runs"
            raise InputError(
                f"{column} is NaN in all {len(values)} {kind}; expected one without a diverged "
                "run: try smaller learning rates"
            )
        return self.run(runs[int(np.nanargmin(values))])

    def table(self, columns: Names | None = None, *, over: Names = ()) -> SweepTable:
        """Returns the final values as a table, averaged over some of the axes.

        Args:
          columns: the columns to show; by default the losses and the test and validation metrics.
          over: the axis, or the axes, over which to average; the cells are then "mean ± standard
            deviation" over the finite runs, and a further column counts the diverged ones.

        Raises:
          InputError: there is no such axis or column.
          MissingExtraError: pandas is not installed.
        """
        check_arguments(SweepResult.table, locals())
        if isinstance(columns, str):
            columns = [columns]
        if columns is None:
            columns = [n for n in self.columns if n == "train_loss" or n.startswith(_HELD_OUT)]
            columns = columns or [n for n in self.columns if self[n].ndim <= len(self.shape) + 1]
        if not columns:
            raise InputError("columns is empty; expected at least one column", argument="columns")
        names = _axis_names(over)
        groups = self._grouped(columns, names)
        means, deviations, runs = groups.mean(), groups.std(), groups.size()
        diverged = groups.apply(lambda each: each.isna().any(axis=1).sum())
        values, cells = {}, {}
        for level, name in enumerate(each for each in self.axes if each not in names):
            at = means.index.get_level_values(level)
            values[name] = [self._grid.cells[name][position] for position in at]
            cells[name] = [self._grid.labels[name][position] for position in at]
        for name, title in zip(columns, map(self._title, columns), strict=True):
            values[title] = means[name].tolist()
            cells[title] = list(map(_cell, means[name], deviations[name]))
            if names:
                values[f"{title}_deviation"] = deviations[name].tolist()
        values["diverged"] = diverged.tolist()
        if diverged.any():
            cells["diverged"] = [f"{n} of {size}" for n, size in zip(diverged, runs, strict=True)]
        return SweepTable(_pandas().DataFrame(values), cells)

    def _title(self, column: str) -> str:
        """Returns the name of a column beside the axes."""
        return f"history_{column}" if column in self.axes else column

    def _grouped(self, columns: Sequence[str], over: tuple[str, ...]) -> Any:
        """Returns the final values, NaN if not finite, grouped by the axes that are not averaged.

        The groups of pandas have one row per run; their index has the positions on these axes.
        """
        pandas = _pandas()
        for name in over:
            if name not in self.axes:
                raise InputError(
                    f"over has {name!r}; expected axes of the sweep: {', '.join(self.axes)}",
                    argument="over",
                )
        finals = {name: np.ravel(self.final(name)).astype(float) for name in columns}
        frame = pandas.DataFrame(finals).replace([np.inf, -np.inf], np.nan)
        positions = pandas.DataFrame(self._grid.positions)
        axes = [positions[name] for name in self.axes if name not in over]
        return frame.groupby(axes or np.zeros(len(frame)), sort=False)

    def to_pandas(self) -> pandas.DataFrame:
        """Returns the histories in long format: one row per run and epoch.

        The columns are `run`, the axes and those of the histories. Functions and modules on an
        axis are names, as in tables. A column with several values per epoch, such as
        `step_losses`, has an array in each row. The epochs after early stopping are left out. A
        column with the name of an axis gets the prefix `history_`.

        Raises:
          MissingExtraError: pandas is not installed.

        Example:
          >>> frame = jt.sweep(lambda x: {"loss": (x - 1) ** 2}, {"x": [0.0, 3.0]}).to_pandas()
          >>> print(frame.to_string(index=False))
           run   x  loss
             0 0.0   1.0
             1 3.0   4.0
        """
        return _pandas().DataFrame(self._long_columns())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the histories as CSV: the rows of `to_pandas`, without columns of arrays.

        Args:
          path: the file; replaced if it exists.
        """
        columns = self._long_columns()
        numbers = {n: c for n, c in columns.items() if not isinstance(c[0], np.ndarray)}
        write_csv(output_path(path), numbers)

    def _long_columns(self) -> dict[str, list[Any]]:
        """Returns the columns of `to_pandas`, each with one cell per run and epoch."""
        histories: list[dict[str, np.ndarray]] = [{} for _ in self.configurations]
        for indices, tree in self._outputs:
            for name, column in (history_of(tree) or {}).items():
                for index, values in zip(indices, np.asarray(column), strict=True):
                    histories[index][name] = np.asarray(values)
        titles = map(self._title, self.columns)
        columns: dict[str, list[Any]] = {name: [] for name in ("run", *self.axes, *titles)}
        for index, history in enumerate(histories):
            epochs = max((len(each) for each in history.values() if each.ndim == 1), default=1)
            trained = np.flatnonzero(history.get("epoch", ()))  # 0 after early stopping
            rows = trained[-1] + 1 if len(trained) else epochs
            columns["run"] += [index] * rows
            for name, position in self._grid.positions[index].items():
                columns[name] += [self._grid.cells[name][position]] * rows
            for name, each in history.items():
                per_epoch = each.ndim and len(each) == epochs
                columns[self._title(name)] += list(each[:rows]) if per_epoch else [each[()]] * rows
        return columns

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the axes and the histories to one file, for `load_sweep`.

        The states are not written. `sweep(..., checkpoint=folder)` keeps them in a folder, and
        `jt.save(path, result.best(...).state)` writes that of one run. Functions and modules on an
        axis become their names.

        Args:
          path: the file, by convention with the suffix .safetensors; replaced if it exists.
        """
        arrays = {
            f"{group}.{name}": column
            for group, (_, tree) in enumerate(self._outputs)
            for name, column in (history_of(tree) or {}).items()
        }
        metadata = {
            "sweep": self._grid.to_json(),
            "indices": [indices for indices, _ in self._outputs],
            "columns": self.columns,
            "rows": self._rows,
        }
        write_atomically(output_path(path), encode_arrays(arrays, metadata))

    def line_plot(self, column: str, *, x: str | None = None, over: Names = ()) -> Figure:
        """Draws the final value of a column against one axis, with a band over others.

        Args:
          column: its name.
          x: the horizontal axis; by default the first one that is not in `over`.
          over: the axis, or the axes, over which to average; the band is mean ± standard
            deviation. There is one line for each configuration of the remaining axes.

        Returns:
          A matplotlib figure; `figure.savefig(path)` writes it.

        Raises:
          InputError: there is no such axis or column, or all axes are in `over`.
          MissingExtraError: pandas or matplotlib is not installed.
        """
        from jaxtrain.sweeps import _pictures  # needs matplotlib

        check_arguments(SweepResult.line_plot, locals())
        names = _axis_names(over)
        return _pictures.line_plot(self._grid, self._grouped([column], names)[column], x, names)

    def heat_map(
        self, column: str, *, x: str | None = None, y: str | None = None, over: Names = ()
    ) -> Figure:
        """Draws the final value of a column over two axes, averaged over the others.

        Args:
          column: its name.
          x: the horizontal axis; by default the second one that is not in `over`.
          y: the vertical axis; by default the first one.
          over: the axis, or the axes, over which to average; by default all but x and y. Where
            runs have diverged, the mean is over the finite ones.

        Returns:
          A matplotlib figure; `figure.savefig(path)` writes it.

        Raises:
          InputError: there is no such axis or column, or not two axes remain for x and y.
          MissingExtraError: pandas or matplotlib is not installed.
        """
        from jaxtrain.sweeps import _pictures  # needs matplotlib

        check_arguments(SweepResult.heat_map, locals())
        x, y, names = _pictures.heat_map_axes(self._grid, x, y, _axis_names(over))
        return _pictures.heat_map(self._grid, self._grouped([column], names)[column], x, y, names)


def load_sweep(path: str | os.PathLike[str]) -> SweepResult:
    """Reads a file of `SweepResult.save`; its runs have no states.

    Args:
      path: the file.

    Raises:
      InputError: the file is missing, damaged, or not a saved sweep.

    Example:
      >>> result = jt.sweep(lambda x: {"loss": (x - 1) ** 2}, {"x": [0.0, 1.0, 3.0]})
      >>> result.save("parabola.safetensors")
      >>> jt.load_sweep("parabola.safetensors")["loss"]
      array([1., 0., 4.], dtype=float32)
    """
    arrays, metadata = read_arrays(path)
    try:
        grid = Grid.from_json(metadata["sweep"])
        outputs = [
            (indices, {name: arrays[f"{group}.{name}"] for name in metadata["columns"]})
            for group, indices in enumerate(metadata["indices"])
        ]
        rows = metadata["rows"]
        _check_saved(grid, outputs, rows)
        return SweepResult(grid, outputs, rows)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not a saved sweep; expected a file written by SweepResult.save"
        ) from error


def _check_saved(grid: Grid, outputs: list[tuple[list[int], PyTree]], rows: list[int]) -> None:
    """Raises ValueError unless outputs and rows have each run of a grid once."""
    runs = sorted(index for indices, _ in outputs for index in indices)
    count = math.prod(grid.shape) if grid.axes else 0
    # Compared before there are lists of `count` elements, which a file may state to be huge.
    if len(runs) != count or runs != list(range(count)) or len(rows) != count or not grid.cells:
        raise ValueError("it has other runs than its grid")
    if not all(type(each) is int for each in (*runs, *rows)) or len(grid.configurations) != count:
        raise ValueError("it has runs or rows that are not integers")
    lengths = [(len(indices), {len(x) for x in tree.values()}) for indices, tree in outputs]
    if any(found - {length} for length, found in lengths):
        raise ValueError("its columns have other lengths than its runs")


def history_of(output: PyTree) -> Any:
    """Returns the dict of arrays in what a run returns, or None."""
    if isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "_fields"):
        output = output[1]
    is_history = isinstance(output, Mapping) and all(
        isinstance(column, numbers.Number) or hasattr(column, "shape") for column in output.values()
    )
    return output if is_history else None


def _state(output: PyTree) -> TrainState | None:
    """Returns the state in what a run returns, or None."""
    is_pair = isinstance(output, tuple) and len(output) == 2
    return output[0] if is_pair and isinstance(output[0], TrainState) else None


def _pandas() -> Any:
    with needs_extra("experiments"):
        import pandas

    return pandas


def _axis_names(over: Names) -> tuple[str, ...]:
    """Returns the axes to average over, given as one name or several."""
    return (over,) if isinstance(over, str) else tuple(over)


def _cell(mean: float, deviation: float) -> str:
    """Returns a mean as text, with the standard deviation if there is one."""
    return f"{mean:.4g}" if np.isnan(deviation) else f"{mean:.4g} ± {deviation:.2g}"
