"""What a person sees on screen while `fit` runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxtrain.checks import check_whole
from jaxtrain.events import Compiled, EpochDone, Event, Report, Resumed, StepsDone


@contextlib.contextmanager
def console(
    *, log_interval: int = 100, epoch_interval: int = 1, test_examples: int | None = None
) -> Iterator[Report]:
    """A `report` for `fit`: a progress bar and the tutorials' lines, all on stderr.

    The bar is drawn only where stderr is a terminal; elsewhere there are the lines alone.

    Args:
      log_interval: a line with the running loss every so many steps; 0 is silent altogether. Give
        `fit` the same.
      epoch_interval: a line with the epoch's figures every so many epochs, and after the last.
      test_examples: size of the test set, to print an accuracy as correct/total.

    Yields:
      The function to pass as `fit(..., report=…)`.
    """
    check_whole(log_interval, "log_interval", least=0)
    if log_interval == 0:
        yield lambda event: None
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("+"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[loss]}"),
        console=screen,
        refresh_per_second=5,
        disable=not screen.is_terminal,
    )
    task = bar.add_task("compiling", total=None, loss="")
    plan = Compiled(0.0, 0, 0, 0)
    first_epoch: int | None = None

    def print_line(text: str) -> None:
        screen.print(text, soft_wrap=True)

    def report(event: Event) -> None:
        nonlocal plan, first_epoch
        if isinstance(event, Compiled):
            plan = event
            bar.update(task, description="training", total=plan.epochs * plan.steps)
            print_line(f"compiled in {plan.seconds:.1f} s")
        elif isinstance(event, Resumed):
            if plan.epochs:
                print_line(f"going on after epoch {event.epoch}, from its checkpoint")
            else:
                print_line(f"finished already, after epoch {event.epoch}: nothing left to train")
        elif isinstance(event, StepsDone):
            first_epoch = first_epoch or event.epoch
            done = (event.epoch - first_epoch) * plan.steps + event.step
            bar.update(task, completed=done, loss=f"loss {event.loss:.4f}")
            if plan.steps > 1 and event.step % log_interval == 0:
                share = event.examples_seen / plan.examples
                print_line(
                    f"epoch {event.epoch}  {event.examples_seen}/{plan.examples} ({share:.0%})"
                    f"  loss {event.loss:.6f}"
                )
        else:
            last = event.epoch - (first_epoch or event.epoch) + 1 == plan.epochs
            if event.epoch % epoch_interval == 0 or last:
                print_line(epoch_line(event, test_examples))

    with bar:
        yield report


def epoch_line(event: EpochDone, test_examples: int | None = None) -> str:
    """One epoch's figures on one line."""
    metrics = event.metrics
    parts = [f"epoch {event.epoch}:", f"train loss {metrics['train_loss']:.6f}"]
    if "test_loss" in metrics:
        parts.append(f"test loss {metrics['test_loss']:.6f}")
    if "validation_loss" in metrics:
        parts.append(f"validation loss {metrics['validation_loss']:.6f}")
    if "test_accuracy" in metrics:
        parts.append(f"test accuracy {accuracy_text(metrics['test_accuracy'], test_examples)}")
    if metrics.get("skipped_steps"):
        parts.append(f"{metrics['skipped_steps']} steps skipped, not finite")
    parts.append(f"{metrics['seconds']:.2f} s")
    return "  ".join(parts)


def accuracy_text(accuracy: float, examples: int | None) -> str:
    """An accuracy as `correct/total (%)`."""
    percent = f"{accuracy:.2%}"
    return percent if examples is None else f"{round(accuracy * examples)}/{examples} ({percent})"
