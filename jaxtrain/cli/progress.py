"""Progress: the bar and the lines that a person sees on screen while `fit` runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxtrain._arguments import check_integer
from jaxtrain.training.events import (
    Compiled,
    EpochDone,
    Event,
    OnEvent,
    Resumed,
    StepsDone,
    every_steps,
)


@contextlib.contextmanager
def console(
    *, log_interval: int = 100, epoch_interval: int = 1, test_examples: int | None = None
) -> Iterator[OnEvent]:
    """Shows the progress of `fit` on stderr: a bar, and lines with losses.

    The bar is drawn only if stderr is a terminal; otherwise there are only the lines.

    Args:
      log_interval: print the training loss every so many steps; 0 prints nothing at all.
      epoch_interval: print the epoch's figures every so many epochs, and after the last.
      test_examples: size of the test set, to print an accuracy as correct/total.

    Yields:
      The function to pass as `fit(..., on_event=...)`. A callback that calls it needs
      `every_steps(log_interval, callback)` to receive the steps that are printed.

    Example:
      >>> with progress.console() as on_event:
      ...     state, history = jt.fit(state, train, test, loss_fn=loss_fn, on_event=on_event)
    """
    check_integer(log_interval, "log_interval", minimum=0)
    if log_interval == 0:
        yield lambda event: None
        return
    check_integer(epoch_interval, "epoch_interval", minimum=1)

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
        screen.print(text, soft_wrap=True, markup=False)

    def on_event(event: Event) -> None:
        nonlocal plan, first_epoch
        if isinstance(event, Compiled):
            plan = event
            bar.update(task, description="training", total=plan.epochs * plan.steps)
            print_line(f"compiled in {plan.seconds:.1f} s")
        elif isinstance(event, Resumed):
            if plan.epochs:
                print_line(f"resuming after epoch {event.epoch}, from its checkpoint")
            else:
                print_line(f"already finished, after epoch {event.epoch}: nothing left to train")
        elif isinstance(event, StepsDone):
            first_epoch = first_epoch or event.epoch
            done = (event.epoch - first_epoch) * plan.steps + event.step
            bar.update(task, completed=done, loss=f"loss {event.loss:.4f}")
            if plan.steps > 1 and event.step % log_interval == 0:
                fraction = event.examples_seen / plan.examples
                print_line(
                    f"epoch {event.epoch}  {event.examples_seen}/{plan.examples} ({fraction:.0%})"
                    f"  loss {event.loss:.6f}"
                )
        else:
            is_last = event.epoch - (first_epoch or event.epoch) + 1 == plan.epochs
            if is_last or event.epoch % epoch_interval == 0:
                print_line(epoch_line(event, test_examples))

    with bar:
        yield every_steps(log_interval, on_event)


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
        parts.append(f"{metrics['skipped_steps']} steps skipped, not finite")
    parts.append(f"{metrics['seconds']:.2f} s")
    return "  ".join(parts)


def accuracy_text(accuracy: float, examples: int | None) -> str:
    """Returns an accuracy as `correct/total (%)`."""
    percent = f"{accuracy:.2%}"
    return percent if examples is None else f"{round(accuracy * examples)}/{examples} ({percent})"
