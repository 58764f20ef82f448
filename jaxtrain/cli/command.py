"""The command line of an experiment: from its flags to its exit status."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from jaxtrain.callbacks import Callback, progress
from jaxtrain.cli.compilation_cache import set_up_compilation_cache
from jaxtrain.cli.devices import select_device
from jaxtrain.cli.flags import DatasetFlags, ExperimentFlags, TrainingFlags, flag_of
from jaxtrain.cli.parsing import parse
from jaxtrain.cli.resuming import resumes
from jaxtrain.cli.runs import RunFolder
from jaxtrain.cli.signals import EXIT_STATUS, MESSAGES, ignore_signals, raise_on_signals
from jaxtrain.data import Resolved, load_resolved
from jaxtrain.errors import (
    DataUnavailableError,
    InputError,
    NonFiniteError,
    OutOfMemoryError,
    ProcessLostError,
    StorageError,
    StreamError,
    printable,
    recovery_notes,
)

Config = TypeVar("Config")
BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE
_EXPECTED = (
    *(InputError, NonFiniteError, MemoryError, StorageError),
    *(StreamError, ProcessLostError),
)
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EAGAIN}

for _package in ("matplotlib", "platformdirs", "tyro"):  # which every script needs
    if importlib.util.find_spec(_package) is None:
        sys.exit(
            f"error: the package {_package} is not installed; install it with "
            "pip install 'jaxtrain[experiments]'"
        )


def main(config_type: type[Config], run: Callable[[Config], object]) -> None:
    """Runs an experiment with the configuration that the command line gives.

    A user's mistake ends with one sentence on stderr and status 1, Ctrl-C with one line and 130,
    SIGTERM with one line and 143, a closed terminal with 129, a closed pipe with 141.

    Args:
      config_type: a dataclass; its fields are the flags, their docstrings the help.
      run: the experiment; its docstring is the description.
    """
    with report_errors(config_type):
        run(parse(config_type, run.__doc__, sys.argv[1:]))


@contextlib.contextmanager
def report_errors(config_type: type | None = None) -> Iterator[None]:
    """Ends the process as `main` describes on an error of the library or a signal.

    Args:
      config_type: the dataclass of the flags, to name the flag that sets a wrong argument.
    """
    _prepare_output()
    warnings.showwarning = _print_warning
    raise_on_signals()
    try:
        try:
            yield
        except _EXPECTED as error:
            hint = _flag_hint(error, config_type)
            text = str(error) or "out of memory"  # Python's own MemoryError has no text
            _print_line("; ".join([f"error: {text}{hint}", *recovery_notes(error)]))
            sys.exit(1)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BaseException as error:
        signalled = _find_signal(error)
        if signalled is not None:
            _end_by_signal(signalled)
        _end_if_output_failed(error)
        raise
    finally:
        ignore_signals()


def _prepare_output() -> None:
    """Replaces closed streams by the null device, and escapes what their encoding lacks."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _find_signal(error: BaseException | None) -> BaseException | None:
    """Returns the exception of a signal, also if an OSError replaced it while it propagated.

    When a terminal is closed, rich fails to remove its bar.
    """
    while error is not None and type(error) not in EXIT_STATUS:
        error = error.__context__ if isinstance(error, OSError) else None
    return error


def _end_by_signal(error: BaseException) -> NoReturn:
    """Prints one line and ends the process with the signal's status."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        _print_line("; ".join([MESSAGES[type(error)], *recovery_notes(error)]))
        sys.stdout.flush()
    # At once: Python's own exit would tear XLA down while it may still be compiling.
    os._exit(EXIT_STATUS[type(error)])


def _end_if_output_failed(error: BaseException) -> None:
    """Ends the process if the error is that stdout or stderr cannot be written."""
    if isinstance(error, BrokenPipeError):  # the reader has left, as in `--help | head`
        _discard_output()
        sys.exit(BROKEN_PIPE_STATUS)
    # Writes to stdout and stderr have no file name.
    if isinstance(error, OSError) and error.filename is None and error.errno in _OUTPUT_ERRORS:
        with contextlib.suppress(OSError):
            _print_line(f"error: the output could not be printed ({error.strerror})")
        _discard_output()
        sys.exit(1)


def _print_line(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _print_line(f"warning: {message}")


def _discard_output() -> None:
    """Redirects stdout and stderr to nowhere, so that Python's own flush at exit succeeds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def _flag_hint(error: BaseException, config_type: type | None) -> str:
    """Returns the flags that help against an error, since the library does not know of flags."""
    known: list[str] = []
    if isinstance(error, OutOfMemoryError) and error.fitting is not None:
        known = [f"--{error.argument.replace('_', '-')} {error.fitting}"]
    elif isinstance(error, DataUnavailableError):
        known = ["--data-dir FOLDER", "--dataset digits"]
    elif isinstance(error, NonFiniteError) and not error.hint:
        known = ["--max-gradient-norm 1", "--on-nonfinite skip"]
    elif isinstance(error, InputError) and config_type is not None:
        flag = flag_of(error.argument, config_type)
        known = [flag] if flag else []
    return f" (flags: {', '.join(known)})" if len(known) > 1 else f" ({known[0]})" if known else ""


def load_images(config: DatasetFlags) -> Resolved:
    """Loads the data set that the flags name; says on stderr if `auto` falls back to digits."""
    data = load_resolved(config.dataset, config.data_dir)
    if data.notice is not None:
        _print_line(
            f"This is not MNIST but scikit-learn's digits: {data.notice} (--data-dir FOLDER)."
        )
    return data


@contextlib.contextmanager
def run_folder(config: ExperimentFlags) -> Iterator[RunFolder]:
    """Sets up JAX as the flags say, and opens the output folder.

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
    options: dict[str, Any] = {}
    if isinstance(config, TrainingFlags):
        options = {
            "resuming": resumes(config),
            "log": config.log,
            "histograms": config.log_histograms,
        }
    with RunFolder(config.output_dir, config, overwrite=config.overwrite, **options) as folder:
        yield folder


def reporting(
    folder: RunFolder,
    log_interval: int,
    *,
    epoch_interval: int = 1,
    part: str = "",
    **columns: float | str,
) -> list[Callback]:
    """Returns callbacks that write a run to the folder and show its progress.

    Args:
      folder: the output folder.
      log_interval: steps between two lines of progress; 0 shows nothing at all.
      epoch_interval: epochs between two lines.
      part: name of the run, in an experiment of several.
      columns: additional columns of `history.csv`.
    """
    shown = progress(log_interval, max(1, epoch_interval))
    return [*folder.callbacks(part, **columns), shown]
