"""Progress of `fit` and `sweep` on screen: a bar and lines, in a terminal, a file or Jupyter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jaxtrain._arguments import check_integer
from jaxtrain._processes import shows_progress
from jaxtrain.cli.terminal import make_console
from jaxtrain.training.events import (
    Compiled,
    EpochDone,
    Event,
    OnEvent,
    Resumed,
    RunsDone,
    RunsHalved,
    RunsRestored,
    StepsDone,
    every_steps,
)

if TYPE_CHECKING:
    from rich.progress import Progress

_REFRESHES_PER_SECOND = 5
# Between two lines of a sweep, which may finish thousands of runs one at a time.
_SECONDS_PER_LINE = 1.0


@contextlib.contextmanager
def console(
    *, log_interval: int = 100, epoch_interval: int = 1, test_examples: int | None = None
) -> Iterator[OnEvent]:
    """Shows the progress of `fit` or `sweep`: a bar, and lines with losses or finished runs.

    In a terminal both are written to stderr; without one, only the lines. In Jupyter they are the
    output of the cell. With several processes, only process 0 shows it.

    Args:
      log_interval: steps between two lines with the training loss; 0 prints nothing at all.
      epoch_interval: epochs between two lines with the epoch's figures; the last is always printed.
      test_examples: size of the test set, to print an accuracy as correct/total.

    Yields:
      The function to pass as `on_event` to `fit` or `sweep`. A callback that calls it needs
      `every_steps(log_interval, callback)` to receive the steps that are printed.

    Example:
      >>> with jt.progress() as on_event:
      ...     state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=on_event)
    """
    check_integer(log_interval, "log_interval", minimum=0)
    if log_interval == 0 or not shows_progress():
        yield lambda event: None
        return
    check_integer(epoch_interval, "epoch_interval", minimum=1)
    with _screen() as (bar, print_line, refresh):
        task = bar.add_task("compiling", total=None, loss="", unit="steps")
        plan = Compiled(0.0, 0, 0, 0)
        first_epoch: int | None = None
        runs_line = -_SECONDS_PER_LINE

        def on_event(event: Event) -> None:
            nonlocal plan, first_epoch, runs_line
            if isinstance(event, RunsDone | RunsRestored | RunsHalved):
                now = time.monotonic()
                is_more = isinstance(event, RunsDone) and event.done < event.total
                if not is_more or now - runs_line >= _SECONDS_PER_LINE:
                    print_line(_runs_line(event))
                    runs_line = now
                if not isinstance(event, RunsHalved):
                    bar.update(
                        task,
                        description="training",
                        unit="runs",
                        completed=event.done,
                        total=event.total,
                    )
            elif isinstance(event, Compiled):
                plan = event
                # A stream may not tell its length.
                total = plan.epochs * plan.steps if plan.steps else None
                bar.update(task, description="training", total=total)
                print_line(f"compiled in {plan.seconds:.1f} s")
            elif isinstance(event, Resumed):
                if plan.epochs:
                    where = f"epoch {event.epoch}"
                    if event.step:
                        where = f"step {event.step} of epoch {event.epoch + 1}"
                    print_line(f"resuming after {where}, from its checkpoint")
                else:
                    print_line(
                        f"already finished, after epoch {event.epoch}: nothing left to train"
                    )
            elif isinstance(event, StepsDone):
                first_epoch = first_epoch or event.epoch
                done = (event.epoch - first_epoch) * plan.steps + event.step
                bar.update(task, completed=done, loss=f"loss {event.loss:.4f}")
                if plan.steps != 1 and event.step % log_interval == 0:
                    seen = f"{event.examples_seen} examples"
                    if plan.examples:
                        fraction = event.examples_seen / plan.examples
                        seen = f"{event.examples_seen}/{plan.examples} ({fraction:.0%})"
                    print_line(f"epoch {event.epoch}  {seen}  loss {event.loss:.6f}")
            else:
                is_last = event.epoch - (first_epoch or event.epoch) + 1 == plan.epochs
                if is_last or event.epoch % epoch_interval == 0:
                    print_line(epoch_line(event, test_examples))
            refresh()

        yield every_steps(log_interval, on_event)


@contextlib.contextmanager
def _screen() -> Iterator[tuple[Progress, Callable[[str], None], Callable[[], None]]]:
    """Yields the bar, a function that prints a line, and one that shows the bar's new state."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = make_console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("+"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[loss]}"),
        console=screen,
        refresh_per_second=_REFRESHES_PER_SECOND,
        disable=not screen.is_terminal,
    )
    if screen.is_jupyter:
        with _jupyter_display(bar) as refresh:
            yield bar, print, refresh
        return
    with bar:
        yield bar, lambda line: screen.print(line, soft_wrap=True, markup=False), lambda: None


@contextlib.contextmanager
def _jupyter_display(bar: Progress) -> Iterator[Callable[[], None]]:
    """Shows the bar in the output of a Jupyter cell; yields the function that updates it.

    rich itself would need ipywidgets.
    """
    from IPython.display import display

    handle = display(bar, display_id=True)
    shown = time.monotonic()

    def refresh() -> None:
        nonlocal shown
        if time.monotonic() - shown >= 1 / _REFRESHES_PER_SECOND:
            handle.update(bar)
            shown = time.monotonic()

    try:
        yield refresh
    finally:
        handle.update(bar)


def _runs_line(event: RunsDone | RunsRestored | RunsHalved) -> str:
    """Returns what a sweep has reported, on one line."""
    if isinstance(event, RunsHalved):
        return f"out of memory: continuing with {event.parallel} runs at once"
    if isinstance(event, RunsRestored):
        return f"{event.done}/{event.total} runs restored from the checkpoint folder"
    compiled = f", compiled in {event.compile_seconds:.1f} s" if event.compile_seconds else ""
    at_once = f"{event.parallel} at once" if event.parallel > 1 else "one at a time"
    per_run = f"{event.seconds / event.parallel:.2f} s per run"
    return f"{event.done}/{event.total} runs  {at_once}, {per_run}{compiled}"


def epoch_line(event: EpochDone, test_examples: int | None = None) -> str:
    """Returns one epoch's figures on one line."""
    metrics = event.metrics
    parts = [f"epoch {event.epoch}:", f"train loss {metrics['train_loss']:.6f}"]
    if "test_loss" in metrics:
        parts.append(f"test loss {metrics['test_loss']:.6f}")
    if "validation_loss" in metrics:
        parts.append(f"validation loss {metrics['validation_loss']:.6f}")
    if "test_accuracy" in metrics:
        parts.append(f"test accuracy {accuracy_text(metrics['test_accuracy'], test_examples)}")
    if metrics.get("skipped_steps"):
        parts.append(f"{metrics['skipped_steps']} non-finite steps skipped")
    parts.append(f"{metrics['seconds']:.2f} s")
    return "  ".join(parts)


def accuracy_text(accuracy: float, examples: int | None) -> str:
    """Returns an accuracy as `correct/total (%)`."""
    percent = f"{accuracy:.2%}"
    return percent if examples is None else f"{round(accuracy * examples)}/{examples} ({percent})"
