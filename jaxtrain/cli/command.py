"""The command line of an experiment: from its flags to its exit status."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from jaxtrain.cli.compilation_cache import set_up_compilation_cache
from jaxtrain.cli.devices import select_device
from jaxtrain.cli.flags import DatasetFlags, ExperimentFlags, TrainingFlags, flag_of
from jaxtrain.cli.runs import RunFolder
from jaxtrain.data import Resolved, load_resolved
from jaxtrain.dataset import Dataset
from jaxtrain.errors import (
    DataUnavailableError,
    InputError,
    NonFiniteError,
    OutOfMemoryError,
    ProcessLostError,
    StorageError,
    StreamError,
    recovery_notes,
)
from jaxtrain.losses import Loss
from jaxtrain.training.state import TrainState

Config = TypeVar("Config")
_EXPECTED = (
    *(InputError, NonFiniteError, MemoryError, StorageError),
    *(StreamError, ProcessLostError),
)
# For this long after a signal, further ones do not interrupt the cleanup.
_PATIENCE_SECONDS = 2.0

for _package in ("matplotlib", "platformdirs", "tyro"):  # which every script needs
    if importlib.util.find_spec(_package) is None:
        sys.exit(
            f"error: the package {_package} is not installed; install it with "
            "pip install 'jaxtrain[experiments]'"
        )


class Terminated(BaseException):
    """The process was asked to end: SIGTERM."""


def main(config_type: type[Config], run: Callable[[Config], object]) -> None:
    """Runs an experiment with the configuration that the command line gives.

    A user's mistake ends with one sentence on stderr and status 1, one in the flags with tyro's
    message and 2, Ctrl-C with one line and 130, SIGTERM with one line and 143.

    Args:
      config_type: a dataclass; its fields are the flags, their docstrings the help.
      run: the experiment; its docstring is the description.
    """
    with report_errors(config_type):
        import tyro

        options = (tyro.conf.OmitArgPrefixes,)
        run(tyro.cli(config_type, description=run.__doc__, config=options))


@contextlib.contextmanager
def report_errors(config_type: type | None = None) -> Iterator[None]:
    """Ends the process as `main` describes on an error of the library or a signal.

    Args:
      config_type: the dataclass of the flags, to name the flag that sets a wrong argument.
    """
    with warnings.catch_warnings(), _signals_raised():
        warnings.showwarning = lambda message, *_, **__: _print_line(f"warning: {message}")
        try:
            yield
        except _EXPECTED as error:
            text = str(error) or "out of memory"  # Python's own MemoryError has no text
            hint = _flag_hint(error, config_type)
            _print_line("; ".join([f"error: {text}{hint}", *recovery_notes(error)]))
            sys.exit(1)
        except (KeyboardInterrupt, Terminated) as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            word = "interrupted" if interrupted else "terminated"
            _print_line("; ".join([word, *recovery_notes(error)]))
            sys.stdout.flush()
            # At once: Python's own exit would tear XLA down while it may still be compiling.
            os._exit(128 + (signal.SIGINT if interrupted else signal.SIGTERM))


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt and Terminated.

    At once, not by a flag that the loop polls: a compilation could not be interrupted by a flag.
    """
    latest = -math.inf

    def handle(number: int, frame: object) -> None:
        nonlocal latest
        if time.monotonic() - latest > _PATIENCE_SECONDS:
            latest = time.monotonic()
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    previous = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _flag_hint(error: BaseException, config_type: type | None) -> str:
    """Returns the flags that help against an error, since the library does not know of flags."""
    known: list[str] = []
    argument = getattr(error, "argument", None)
    flag = None if config_type is None else flag_of(argument, config_type)
    if isinstance(error, OutOfMemoryError):
        known = [f"{flag} {error.fitting}"] if flag and error.fitting else []
    elif isinstance(error, DataUnavailableError):
        known = ["--data-dir FOLDER", "--dataset digits"]
    elif isinstance(error, NonFiniteError) and not error.hint:
        known = ["--max-gradient-norm 1", "--on-nonfinite skip"]
    elif isinstance(error, InputError) and flag is not None:
        known = [flag]
    return f" (flags: {', '.join(known)})" if len(known) > 1 else f" ({known[0]})" if known else ""


def load_images(config: DatasetFlags) -> Resolved:
    """Loads the data set that the flags name; says on stderr if `auto` falls back to digits."""
    data = load_resolved(config.dataset, config.data_dir)
    if data.notice is not None:
        _print_line(
            f"This is not MNIST but scikit-learn's digits: {data.notice} (--data-dir FOLDER)."
        )
    return data


def verify_step(config: TrainingFlags, state: TrainState, batch: Dataset, loss_fn: Loss) -> None:
    """With --verify, computes one training step in several ways and prints the report on stderr.

    Raises:
      InputError: the ways differ by more than rounding.
    """
    if config.verify:
        from jaxtrain.inspect import verify

        verification = verify(state, batch, loss_fn)
        _print_line(str(verification))
        if not verification.ok:
            raise InputError(
                "the compiled training step is wrong; expected differences of rounding alone: see "
                "docs/compiler.md for versions and flags"
            )


@contextlib.contextmanager
def run_folder(config: ExperimentFlags) -> Iterator[RunFolder]:
    """Sets up JAX as the flags say, and opens the output folder; prints its path at the end.

    Args:
      config: the experiment's configuration.

    Yields:
      The folder, if --overwrite and the checkpoints permit writing to it.

    Raises:
      InputError: JAX has no such device, or the folder cannot be written or contains a finished
        run.
      MissingExtraError: a package that --log needs is not installed.
    """
    select_device(config.device, getattr(config, "devices", 1))
    set_up_compilation_cache(config.compilation_cache)
    with RunFolder(config) as folder:
        yield folder
    print(f"results: {config.output_dir}")
