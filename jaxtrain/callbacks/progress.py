"""progress: shows how far `fit` or `sweep` is, in a terminal, a file or a notebook."""

from __future__ import annotations

import datetime
import functools
import html
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain._arguments import check_integer
from jaxtrain._processes import shows_progress
from jaxtrain._terminal import make_console
from jaxtrain.callbacks._callback import Callback, SweepProgress

if TYPE_CHECKING:
    from jaxtrain.training.history import Run

_REFRESHES_PER_SECOND = 5
# Between two lines of a sweep, which may finish thousands of runs one at a time.
_SECONDS_PER_LINE = 1.0
# A notebook stores all rows of its table, and renders them again after each epoch.
_MAX_TABLE_ROWS = 200


def progress(log_interval: int = 100, epoch_interval: int = 1) -> Callback:
    """Shows the progress of `fit` or `sweep`: a bar, and lines with losses or finished runs.

    In a terminal both are written to stderr; without one, only the lines. In a notebook, a bar and
    a table with one row per epoch are the output of the cell. An epoch is shown with all columns of
    the history, the monitored one first, as far as they fit into the width of the terminal; of an
    array, its lowest and highest value. With several processes, only process 0 shows it. `fit` and
    `sweep` without `callbacks` show it in a terminal or a notebook.

    Args:
      log_interval: steps between two lines with the training loss; 0 shows nothing at all. In a
        notebook, the loss is shown beside the bar, about once per second.
      epoch_interval: epochs between two lines with the epoch's figures; the last is always shown.

    Example:
      >>> state, history = jt.fit(
      ...     state, train, loss_fn=loss_fn, callbacks=[jt.callbacks.progress(epoch_interval=10)]
      ... )
    """
    check_integer(log_interval, "log_interval", minimum=0)
    check_integer(epoch_interval, "epoch_interval", minimum=1)
    return _Progress(log_interval, epoch_interval)


def default_callbacks() -> list[Callback]:
    """Returns the callbacks of a call without any: progress in a terminal or a notebook."""
    return [progress()] if _in_notebook() or _has_terminal() else []


class _Progress(Callback):
    """What `progress` returns."""

    def __init__(self, log_interval: int, epoch_interval: int) -> None:
        self._log_interval, self._epoch_interval = log_interval, epoch_interval
        self._display: _Terminal | _Notebook | None = None  # while it shows something
        self._start = (0, 0)  # the epoch and step where the run started
        self._epoch = 0  # the last epoch that is shown
        self._steps = 0  # steps that are done, from the start of its first epoch
        self._line_time = 0.0

    def on_start(self, run: Run) -> None:
        """Shows an empty bar."""
        self._start, self._epoch, self._steps = (run.epoch, run.step), run.epoch, run.step
        self._open()

    def next_pause(self, run: Run) -> int | None:
        """Returns the next step with a line."""
        if self._display is None or not self._display.has_lines or run.steps_per_epoch == 1:
            return None
        return (run.step // self._log_interval + 1) * self._log_interval

    def on_steps(self, run: Run) -> None:
        """Updates the bar, and shows a line at the steps that have one."""
        if self._display is None:
            return
        is_first = self._steps == self._start[1]
        self._steps += len(run.losses)
        epochs = run.last_epoch - self._start[0]
        loss = f"loss {_format(run.losses[-1])}"
        self._display.update(
            f"epoch {run.epoch + 1}/{run.last_epoch}",
            self._steps,
            epochs * run.steps_per_epoch or None,  # a stream may not tell its length
            "steps",
            loss,
        )
        if is_first:
            self._show_start(run)
        is_due = run.step % self._log_interval == 0 and run.steps_per_epoch != 1
        if is_due and self._display.has_lines:
            seen = f"{run.examples} examples"
            if run.examples_per_epoch:
                fraction = run.examples / run.examples_per_epoch
                seen = f"{run.examples}/{run.examples_per_epoch} ({fraction:.0%})"
            self._display.line(f"epoch {run.epoch + 1}  {seen}  {loss}")

    def on_epoch(self, run: Run) -> None:
        """Shows the epoch's figures."""
        is_last = run.epoch >= run.last_epoch or run.is_over
        if is_last or run.epoch % self._epoch_interval == 0:
            self._show_epoch(run)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Shows the last epoch, and ends the bar."""
        if self._display is None:
            return
        try:
            if self._epoch < run.epoch:  # another callback has ended the run
                self._show_epoch(run)
            if self._steps == self._start[1]:
                self._display.hide_bar()
                if error is None and run.resumed:
                    self._display.line(
                        f"already finished, after epoch {run.epoch}: nothing left to train"
                    )
        finally:
            self._close()

    def on_runs(self, progress: SweepProgress) -> None:
        """Updates the bar, and shows a line at most once per second."""
        if self._display is None:
            self._open()
        if self._display is None:
            return
        if progress.kind == "trained":
            now = time.monotonic()
            if progress.done == progress.total or now - self._line_time >= _SECONDS_PER_LINE:
                self._line_time = now
                self._display.line(_trained_line(progress))
        elif progress.kind == "halved":
            self._display.line(f"out of memory: continuing with {progress.at_once} runs at once")
        elif progress.done:
            self._display.line(
                f"{progress.done}/{progress.total} runs restored from the checkpoint folder"
            )
        title = "compiling" if progress.kind == "started" else "training"
        self._display.update(title, progress.done, progress.total, "runs", "")

    def on_runs_end(self, error: BaseException | None) -> None:
        """Ends the bar."""
        self._close()

    def _open(self) -> None:
        if self._log_interval and shows_progress():
            self._display = _Notebook() if _in_notebook() else _Terminal()

    def _close(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            display.close()

    def _show_start(self, run: Run) -> None:
        assert self._display is not None
        if run.compile_seconds and self._display.has_lines:
            self._display.line(f"compiled in {run.compile_seconds:.1f} s")
        if run.resumed:
            epoch, step = self._start
            where = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
            self._display.line(f"resuming after {where}, from its checkpoint")

    def _show_epoch(self, run: Run) -> None:
        if self._display is not None:
            self._epoch = run.epoch
            self._display.epoch(run)


class _Terminal:
    """A bar at the bottom of a terminal, and lines above it; without a terminal, lines only."""

    has_lines = True

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class LeftColumn(TimeRemainingColumn):
            def render(self, task: Task) -> Text:
                if task.finished or task.time_remaining is None:
                    return Text()
                return Text.assemble("+ ", super().render(task), " left")

        self._screen = make_console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            LeftColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._screen,
            refresh_per_second=_REFRESHES_PER_SECOND,
            disable=not self._screen.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=None, count="", text="")
        self._bar.start()

    def update(self, title: str, done: int, total: int | None, unit: str, text: str) -> None:
        """Changes the bar."""
        count = _count(done, total, unit)
        self._bar.update(
            self._task, description=title, completed=done, total=total, count=count, text=text
        )

    def line(self, text: str) -> None:
        """Prints a line."""
        self._screen.print(text, soft_wrap=True, markup=False)

    def epoch(self, run: Run) -> None:
        """Prints the line of the last epoch."""
        width = self._screen.width if self._screen.is_terminal else None
        self.line(epoch_line(run.rows[-1], run.test_examples or None, run.monitor, width))

    def hide_bar(self) -> None:
        """Removes the bar."""
        self._bar.update(self._task, visible=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.stop()


class _Notebook:
    """A bar and a table of the epochs in the output of a cell, updated in place."""

    has_lines = False

    def __init__(self) -> None:
        from IPython.display import display

        self._title, self._text, self._note = "compiling", "", ""
        self._done, self._total = 0, 0  # 0: unknown
        self._rows: list[list[str]] = []  # the first has the columns
        self._started = self._shown = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and steps of the first update
        self._has_bar = True
        self._handle: Any = display(self, display_id=True)

    def update(self, title: str, done: int, total: int | None, unit: str, text: str) -> None:
        """Changes the bar."""
        self._title, self._done, self._total = title, done, total or 0
        self._text = f"{_count(done, total, unit)} · {self._clock()}"
        if text:
            self._text += f" · {text}"
        self._refresh()

    def line(self, text: str) -> None:
        """Shows a text below the bar, in place of the one before."""
        self._note = text
        self._refresh()

    def epoch(self, run: Run) -> None:
        """Adds a row to the table."""
        row = run.rows[-1]
        names = sorted(row, key=lambda name: (name != "epoch", name != run.monitor))
        self._rows = self._rows or [[name.replace("_", " ") for name in names]]
        self._rows.append([_figure(name, row[name]) for name in names])
        del self._rows[1:-_MAX_TABLE_ROWS]
        self._refresh()

    def hide_bar(self) -> None:
        """Removes the bar."""
        self._has_bar = False

    def close(self) -> None:
        """Shows the final state."""
        self._total = self._total or self._done  # of unknown length
        self._handle.update(self)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._shown >= 1 / _REFRESHES_PER_SECOND:
            self._shown = now
            self._handle.update(self)

    def _clock(self) -> str:
        """Returns the time that has passed, and the time that is left."""
        now = time.monotonic()
        passed = _format_time(now - self._started)
        if self._first is None:
            self._first = now, self._done
        done = self._done - self._first[1]
        if not self._total or done == 0 or self._done == self._total:
            return passed
        left = (now - self._first[0]) / done * (self._total - self._done)
        return f"{passed} + {_format_time(left)} left"

    def _lines(self) -> list[str]:
        status = f"{self._title} · {self._text}" if self._text else self._title
        return [line for line in (status * self._has_bar, self._note) if line]

    def _repr_html_(self) -> str:
        value = f' value="{self._done}" max="{self._total}"' if self._total else ""
        bar = f"<progress{value}></progress> " if self._has_bar else ""
        lines = "<br>".join(map(html.escape, self._lines()))
        rows = [
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * len(self._rows)], self._rows, strict=False)
        ]
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        return bar + lines + (f"<table>{table}</table>" if table else "")

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        rows = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in self._rows
        ]
        return "\n".join(self._lines() + rows)


def epoch_line(
    row: Mapping[str, Any],
    test_examples: int | None = None,
    monitor: str | None = None,
    width: int | None = None,
) -> str:
    """Returns one epoch's figures on one line: all columns, the monitored one first.

    Args:
      row: the epoch's value in each column of the history.
      test_examples: size of the test set, to show its accuracy as correct/total.
      monitor: the column by which a callback judges the epoch, or None.
      width: characters that fit; None shows all columns. The line says how many it leaves out:
        records first, then metrics of the training data, and the losses last.
    """
    names = [name for name in row if name not in ("epoch", "skipped_steps", "seconds")]
    names.sort(key=lambda name: name != monitor)
    shown = sorted(names, key=functools.partial(_rank, monitor=monitor))
    while True:
        parts, data = [], ""
        for name in (name for name in names if name in shown):
            prefix, _, rest = name.partition("_")
            is_metric = prefix in ("train", "test", "validation")
            # The name of the data stands at the first of its figures.
            label = rest if is_metric and prefix == data else name
            data = prefix if is_metric else ""
            examples = test_examples if name == "test_accuracy" else None
            parts.append(f"{label.replace('_', ' ')} {_figure(name, row[name], examples)}")
        if len(shown) < len(names):
            parts.append(f"+{len(names) - len(shown)} more")
        if row.get("skipped_steps"):
            parts.append(f"{row['skipped_steps']} non-finite steps skipped")
        line = "  ".join([f"epoch {row['epoch']}:", *parts, _format_seconds(row["seconds"])])
        line = line.replace(":  ", ": ", 1)
        if width is None or len(line) <= width or not shown:
            return line
        if test_examples is None:
            shown.pop()
        test_examples = None  # shorter


def _rank(name: str, monitor: str | None) -> tuple[bool, bool, bool, bool]:
    """Returns a key by which the columns are ordered that are shown rather than left out."""
    data = name.partition("_")[0]
    is_held_out = data in ("test", "validation")
    return name != monitor, not name.endswith("_loss"), not is_held_out, data != "train"


def _figure(name: str, value: Any, examples: int | None = None) -> str:
    """Returns a value of a column; an array as its range, or a matrix as its shape."""
    if np.ndim(value) > 1:
        return f"[{', '.join(map(str, np.shape(value)))}]"
    if np.ndim(value) == 1:
        finite = np.asarray(value)[np.isfinite(value)]
        return f"{_format(finite.min())}…{_format(finite.max())}" if finite.size else "nan"
    return accuracy_text(value, examples) if name.endswith("accuracy") else _format(value)


def accuracy_text(accuracy: float, examples: int | None) -> str:
    """Returns an accuracy as `correct/total (%)`."""
    percent = f"{accuracy:.2%}"
    return percent if examples is None else f"{round(accuracy * examples)}/{examples} ({percent})"


def _count(done: int, total: int | None, unit: str) -> str:
    return f"{done} {unit}" if total is None else f"{done}/{total} {unit}"


def _trained_line(progress: SweepProgress) -> str:
    """Returns what a sweep has trained, on one line."""
    at_once = f"{progress.at_once} at once" if progress.at_once > 1 else "one at a time"
    per_run = f"{progress.seconds / progress.at_once:.2f} s per run"
    compiled = f", compiled in {progress.compile_seconds:.1f} s" * (progress.compile_seconds > 0)
    return f"{progress.done}/{progress.total} runs  {at_once}, {per_run}{compiled}"


def _format(value: Any) -> str:
    """Returns a number with four digits, or an integer with all of them."""
    if isinstance(value, int | np.integer):
        return str(value)
    return f"{value:#.4g}".rstrip(".")


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def _format_time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _in_notebook() -> bool:
    """Returns whether the program is a cell of a notebook, such as Jupyter's or Colab's."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _has_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is no stderr, or it is closed
        return False
