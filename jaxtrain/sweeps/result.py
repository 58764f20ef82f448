"""SweepResult: the histories and states of a sweep, by the axes of its grid."""

from __future__ import annotations

import csv
import dataclasses
import io
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain._extras import needs_extra
from jaxtrain._files import write_atomically
from jaxtrain.callbacks.early_stopping import Mode, infer_mode
from jaxtrain.checkpoint import encode_arrays, read_arrays
from jaxtrain.errors import InputError
from jaxtrain.sweeps._grid import Grid, axis_names
from jaxtrain.training.state import TrainState

if TYPE_CHECKING:
    import pandas

    from jaxtrain._figures import Figure

_HELD_OUT = ("test_", "validation_")


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


@dataclasses.dataclass(frozen=True)
class SweepTable:
    """A table of a sweep, which prints itself.

    Attributes:
      headings: the names of the columns.
      rows: the cells of each row, as text.
    """

    headings: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [self.headings, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def __repr__(self) -> str:
        return str(self)


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
      >>> result.final("test_accuracy").shape
      (2, 3)
      >>> best = result.best("test_accuracy", over="seed")
      >>> metrics = jt.evaluate(best.state, test, loss_fn)
      >>> table = result.table(over="seed")  # print(table) shows it
      >>> result.line_plot("test_loss", over="seed").savefig("losses.png")
      >>> frame = result.to_pandas()  # a row per run and epoch
      >>> result.to_csv("runs.csv")
    """

    def __init__(
        self, grid: Grid, outputs: list[tuple[list[int], PyTree]], rows: list[int] | None = None
    ) -> None:
        """Makes the result from what the runs have returned.

        Args:
          grid: the configurations of the sweep.
          outputs: for each group of runs with the same shapes, which runs they are and what they
            have returned, stacked along a leading axis.
          rows: the epoch of each run's state, as an index; by default from the states.
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
        if column not in self.columns:
            found = f"; expected one of {', '.join(self.columns)}"
            if not self.columns:
                found = (
                    ", since its runs return no history; expected run to return (state, history) "
                    "or a dict of arrays"
                )
            raise InputError(f"the sweep has no column {column!r}{found}")
        return self._stack(
            f"the column {column!r}", [history_of(t)[column] for _, t in self._outputs]
        )

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
            shape = list(values.shape[len(self.shape) :])
            raise InputError(
                f"the column {column!r} has the shape {shape} in each run; expected one value per "
                "epoch"
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
        index = range(len(self.configurations))[index]
        indices, tree = next(each for each in self._outputs if index in each[0])
        alone = jax.tree.map(operator.itemgetter(indices.index(index)), tree)
        state = jax.tree.map(jnp.asarray, _state(alone))
        return SweepRun(self.configurations[index], history_of(alone) or {}, state)

    def best(self, column: str, mode: Mode | None = None, *, over: Any = ()) -> SweepRun:
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
        """
        if mode not in (None, "min", "max"):
            raise InputError(f"mode is {mode!r}; expected 'min' or 'max'", argument="mode")
        sign = 1 if (mode or infer_mode(column)) == "min" else -1
        values = sign * np.ravel(self.final(column))
        groups = [runs for _, runs in self._grid.split(over)]
        means = np.array([values[runs].mean() for runs in groups])
        if np.isnan(means).all():
            kind = "configurations, averaged over " + ", ".join(axis_names(over))
            raise InputError(
                f"{column} is NaN in all {len(means)} {kind if over else 'runs'}; expected one "
                "without a diverged run: try smaller learning rates"
            )
        return self.run(groups[int(np.nanargmin(means))][0])

    def table(self, columns: Sequence[str] | None = None, *, over: Any = ()) -> SweepTable:
        """Returns the final values as a table, averaged over some of the axes.

        Args:
          columns: the columns to show; by default the losses and the test and validation metrics.
          over: the axis, or the axes, over which to average; the cells are then "mean ± standard
            deviation" over the finite runs, and a further column counts the diverged ones.

        Raises:
          InputError: there is no such axis or column.
        """
        if isinstance(columns, str):
            columns = [columns]
        if columns is None:
            columns = [n for n in self.columns if n == "train_loss" or n.startswith(_HELD_OUT)]
            columns = columns or [n for n in self.columns if self[n].ndim <= len(self.shape) + 1]
        finals = {name: np.ravel(self.final(name)) for name in columns}
        finite = np.all([np.isfinite(each) for each in finals.values()], axis=0)
        headings = [name for name in self.axes if name not in axis_names(over)] + list(columns)
        rows = []
        for at, runs in self._grid.split(over):
            labels = [self._grid.labels[name][position] for name, position in at.items()]
            cells = [_cell(finals[name][runs]) for name in columns]
            diverged = f"{len(runs) - sum(finite[runs])} of {len(runs)}"
            rows.append([*labels, *cells, *([] if finite.all() else [diverged])])
        return SweepTable(headings + ([] if finite.all() else ["diverged"]), rows)

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
        with needs_extra("experiments"):
            import pandas

        return pandas.DataFrame(self._long_columns())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the histories as CSV: the rows of `to_pandas`, without columns of arrays.

        Args:
          path: the file; replaced if it exists.
        """
        columns = self._long_columns()
        names = [
            n
            for n, cells in columns.items()
            if not any(isinstance(cell, np.ndarray) for cell in cells[:1])
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(zip(*(columns[name] for name in names), strict=True))
        write_atomically(Path(path), text.getvalue().encode())

    def _long_columns(self) -> dict[str, list[Any]]:
        """Returns the columns of `to_pandas`, each with one cell per run and epoch."""
        histories: list[dict[str, np.ndarray]] = [{} for _ in self.configurations]
        for indices, tree in self._outputs:
            for row, index in enumerate(indices):
                for name, column in (history_of(tree) or {}).items():
                    histories[index][name] = np.asarray(column[row])
        titles = {name: f"history_{name}" if name in self.axes else name for name in self.columns}
        columns: dict[str, list[Any]] = {n: [] for n in ("run", *self.axes, *titles.values())}
        for index, history in enumerate(histories):
            epochs = max((len(each) for each in history.values() if each.ndim == 1), default=1)
            trained = np.flatnonzero(history.get("epoch", ()))  # 0 after early stopping
            rows = trained[-1] + 1 if len(trained) else epochs
            columns["run"] += [index] * rows
            for name, position in self._grid.positions[index].items():
                columns[name] += [self._grid.cells[name][position]] * rows
            for name, each in history.items():
                is_per_epoch = each.ndim and len(each) == epochs
                columns[titles[name]] += list(each[:rows]) if is_per_epoch else [each[()]] * rows
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
        write_atomically(Path(path), encode_arrays(arrays, metadata))

    def line_plot(self, column: str, *, x: str | None = None, over: Any = ()) -> Figure:
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
        """
        from jaxtrain.sweeps import _pictures  # needs matplotlib

        return _pictures.line_plot(self._grid, column, self.final(column), x, axis_names(over))

    def heat_map(
        self, column: str, *, x: str | None = None, y: str | None = None, over: Any = ()
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
        """
        from jaxtrain.sweeps import _pictures  # needs matplotlib

        return _pictures.heat_map(self._grid, column, self.final(column), x, y, axis_names(over))


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
    arrays, metadata = read_arrays(Path(path))
    try:
        grid = Grid.from_json(metadata["sweep"])
        outputs = [
            (indices, {name: arrays[f"{group}.{name}"] for name in metadata["columns"]})
            for group, indices in enumerate(metadata["indices"])
        ]
        return SweepResult(grid, outputs, metadata["rows"])
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a saved sweep; expected a file written by SweepResult.save"
        ) from error


def history_of(output: PyTree) -> Any:
    """Returns the dict of arrays in what a run returns, or None."""
    if isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "_fields"):
        output = output[1]
    is_history = isinstance(output, Mapping) and all(
        isinstance(column, numbers.Number) or hasattr(column, "shape") for column in output.values()
    )
    return output if is_history else None


def mean_and_deviation(values: np.ndarray) -> tuple[float, float, int]:
    """Returns mean and standard deviation of the finite values, and how many they are.

    Both are NaN without finite values; the deviation of one value is 0.
    """
    finite = np.asarray(values[np.isfinite(values)], np.float64)
    if not len(finite):
        return np.nan, np.nan, 0
    deviation = np.std(finite, ddof=1) if len(finite) > 1 else 0.0
    return float(finite.mean()), float(deviation), len(finite)


def _state(output: PyTree) -> TrainState | None:
    """Returns the state in what a run returns, or None."""
    is_pair = isinstance(output, tuple) and len(output) == 2
    return output[0] if is_pair and isinstance(output[0], TrainState) else None


def _cell(values: np.ndarray) -> str:
    """Returns the mean of the finite values, with their standard deviation if there are several."""
    mean, deviation, count = mean_and_deviation(values)
    return f"{mean:.4g} ± {deviation:.2g}" if count > 1 else f"{mean:.4g}"
