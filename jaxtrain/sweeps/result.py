"""SweepResult: the histories and states of a sweep, by the axes of its grid."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import numbers
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxtrain._files import write_atomically
from jaxtrain.checkpoint import encode_arrays, read_arrays
from jaxtrain.errors import InputError
from jaxtrain.training.state import TrainState

if TYPE_CHECKING:
    from jaxtrain._figures import Figure

Mode = Literal["min", "max"]
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
      >>> best = result.best("test_accuracy", mode="max")
      >>> metrics = jt.evaluate(best.state, test, loss_fn)
      >>> table = result.table(over="seed")  # print(table) shows it
      >>> result.line_plot("test_loss", over="seed").savefig("losses.png")
      >>> result.to_csv("runs.csv")
    """

    def __init__(
        self,
        axes: dict[str, tuple[Any, ...]],
        configurations: list[dict[str, Any]],
        shape: tuple[int, ...],
        outputs: list[tuple[list[int], PyTree]],
        rows: list[int] | None = None,
    ) -> None:
        """Makes the result from what the runs have returned.

        Args:
          axes: the values of each axis, by name.
          configurations: the value on each axis by name, for each run.
          shape: the lengths of the axes.
          outputs: for each group of runs with the same shapes, which runs they are and what they
            have returned, stacked along a leading axis.
          rows: the epoch of each run's state, as an index; by default from the states.
        """
        self.axes = axes
        self.configurations = configurations
        self.shape = shape
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
          InputError: the runs return arrays of different shapes.
        """
        trees = [tree for _, tree in self._outputs]
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
                "expected the same shape in all of them"
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
        for indices, tree in self._outputs:
            if index in indices:
                alone = jax.tree.map(operator.itemgetter(indices.index(index)), tree)
                state = jax.tree.map(jnp.asarray, _state(alone))
                return SweepRun(self.configurations[index], history_of(alone) or {}, state)
        raise AssertionError(index)

    def best(self, column: str, mode: Mode | None = None) -> SweepRun:
        """Returns the run with the best final value of a column.

        Args:
          column: its name.
          mode: "min" if smaller is better, "max" if larger is better. May be left out for losses,
            the columns whose names end in "loss".

        Raises:
          InputError: the mode is missing, or all runs have diverged.
        """
        if mode is None and column.endswith("loss"):
            mode = "min"
        if mode not in ("min", "max"):
            raise InputError(
                f"mode is {mode!r}; expected 'min' or 'max' (it may be omitted for columns whose "
                "names end in 'loss')",
                argument="mode",
            )
        values = np.ravel(self.final(column)) * (1 if mode == "min" else -1)
        if np.isnan(values).all():
            raise InputError(
                f"{column} is NaN in all {len(values)} runs; expected one that has not diverged: "
                "try smaller learning rates"
            )
        return self.run(int(np.nanargmin(values)))

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
        groups = list(self._averaged(over))
        headings = [name for name in self.axes if name not in axis_names(over)] + list(columns)
        rows = [
            [*map(format_value, shown.values()), *(_cell(finals[n][indices]) for n in columns)]
            for shown, indices in groups
        ]
        diverged = [
            sum(not all(np.isfinite(finals[n][i]) for n in columns) for i in indices)
            for _, indices in groups
        ]
        if any(diverged):
            headings.append("diverged")
            for row, count, (_, indices) in zip(rows, diverged, groups, strict=True):
                row.append(f"{count} of {len(indices)}")
        return SweepTable(headings, rows)

    def _averaged(self, over: Any) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yields each configuration of the other axes, and the runs that have it."""
        for name in axis_names(over):
            if name not in self.axes:
                raise InputError(
                    f"over has {name!r}; expected axes of the sweep: {', '.join(self.axes)}",
                    argument="over",
                )
        found: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for index, each in enumerate(self.configurations):
            shown = {name: value for name, value in each.items() if name not in axis_names(over)}
            found.setdefault(repr(shown), (shown, []))[1].append(index)
        yield from found.values()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the histories as CSV: one line per run and epoch, with the run's configuration.

        Columns with several values per epoch, such as `step_losses`, are left out, and so are the
        epochs after early stopping. A column with the name of an axis gets the prefix `history_`.

        Args:
          path: the file; replaced if it exists.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        histories = [self.run(index) for index in range(len(self.configurations))]
        names = [name for name in self.columns if np.ndim(histories[0].history[name]) <= 1]
        headings = [f"history_{name}" if name in self.axes else name for name in names]
        writer.writerow(["run", *self.axes, *headings])
        for index, (configuration, history, _) in enumerate(histories):
            lengths = [len(history[name]) for name in names if np.ndim(history[name])]
            rows = max(lengths, default=1)
            epochs = np.atleast_1d(history.get("epoch", 1))
            if len(epochs) == rows and np.any(epochs):  # epoch 0 at the end: not trained
                rows = 1 + np.flatnonzero(epochs)[-1]
            values = [np.atleast_1d(history[name]) for name in names]
            for row in range(rows):
                cells = [value[min(row, len(value) - 1)].item() for value in values]
                writer.writerow([index, *configuration.values(), *cells])
        write_atomically(Path(path), text.getvalue().encode())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the axes and the histories to one file, for `load_sweep`.

        The states are not written. `sweep(..., checkpoint=folder)` keeps them in a folder, and
        `jt.save(path, result.best(...).state)` writes that of one run.

        Args:
          path: the file, by convention with the suffix .safetensors; replaced if it exists.
        """
        arrays = {
            f"{group}.{name}": column
            for group, (_, tree) in enumerate(self._outputs)
            for name, column in (history_of(tree) or {}).items()
        }
        metadata = {
            "axes": {name: list(map(_plain, values)) for name, values in self.axes.items()},
            "configurations": [
                {name: _plain(value) for name, value in each.items()}
                for each in self.configurations
            ],
            "shape": self.shape,
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
        """
        from jaxtrain.sweeps import _pictures

        return _pictures.line_plot(self, column, x, over)

    def heat_map(self, column: str, *, x: str | None = None, y: str | None = None) -> Figure:
        """Draws the final value of a column over two axes, averaged over the others.

        Args:
          column: its name.
          x: the horizontal axis; by default the second one.
          y: the vertical axis; by default the first one.

        Returns:
          A matplotlib figure; `figure.savefig(path)` writes it.
        """
        from jaxtrain.sweeps import _pictures

        return _pictures.heat_map(self, column, x, y)


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
        axes = {name: tuple(map(_hashable, values)) for name, values in metadata["axes"].items()}
        configurations = [
            {name: _hashable(value) for name, value in each.items()}
            for each in metadata["configurations"]
        ]
        outputs = [
            (indices, {name: arrays[f"{group}.{name}"] for name in metadata["columns"]})
            for group, indices in enumerate(metadata["indices"])
        ]
        return SweepResult(
            axes, configurations, tuple(metadata["shape"]), outputs, metadata.get("rows")
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a saved sweep; expected a file written by SweepResult.save"
        ) from error


def history_of(output: PyTree) -> Any:
    """Returns the dict of arrays in what a run returns, or None."""
    if isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "_fields"):
        output = output[1]
    return output if isinstance(output, Mapping) and _has_arrays(output) else None


def _has_arrays(columns: Mapping[str, Any]) -> bool:
    return all(
        isinstance(column, numbers.Number) or hasattr(column, "shape")
        for column in columns.values()
    )


def _state(output: PyTree) -> TrainState | None:
    """Returns the state in what a run returns, or None."""
    is_pair = isinstance(output, tuple) and len(output) == 2
    return output[0] if is_pair and isinstance(output[0], TrainState) else None


def axis_names(over: Any) -> tuple[str, ...]:
    """Returns the axes to average over, given as one name or several."""
    return (over,) if isinstance(over, str) else tuple(over)


def format_value(value: Any) -> str:
    """Returns a value of an axis as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(values: np.ndarray) -> str:
    """Returns the mean of the finite values, with their standard deviation if there are several."""
    finite = np.asarray(values[np.isfinite(values)], np.float64)
    if not len(finite):
        return "nan"
    mean = f"{finite.mean():.4g}"
    return mean if len(finite) == 1 else f"{mean} ± {np.std(finite, ddof=1):.2g}"


def _plain(value: Any) -> Any:
    """Returns a value of an axis as JSON has it, or as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value


def _hashable(value: Any) -> Any:
    """Returns a value as it was before JSON turned tuples into lists."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
