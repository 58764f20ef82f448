"""The command line around an experiment: flags in, one sentence and an exit status out."""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import hashlib
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from jaxtyping import Array, Key

from jaxtrain.checks import check_whole
from jaxtrain.errors import InputError, NonFiniteLossError
from jaxtrain.runs import FINISHED_NOTE

Device = Literal["auto", "cpu", "gpu"]
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "rprop", "adagrad", "adadelta", "lbfgs"]
Config = TypeVar("Config")

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(config_type: type[Config], run: Callable[[Config], object]) -> None:
    """Run an experiment with the configuration that the command line gives.

    A user's mistake ends with one sentence on stderr and status 1, Ctrl-C with one line and 130.

    Args:
      config_type: a dataclass; its fields are the flags, their docstrings the help.
      run: the experiment; its docstring is the description.
    """
    import tyro

    with mistakes_on_one_line():
        run(tyro.cli(config_type, description=run.__doc__))


@contextlib.contextmanager
def mistakes_on_one_line() -> Iterator[None]:
    """End the process as `main` describes where a user's mistake or Ctrl-C comes up in it."""
    sys.unraisablehook = _interrupt_again
    try:
        yield
    except (InputError, NonFiniteLossError) as error:
        print(_one_line(f"error: {error}", error), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(_one_line("interrupted", error), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: Python's own exit would tear XLA down while it may still be compiling.
        os._exit(_INTERRUPTED)


def _interrupt_again(ignored: Any) -> None:
    """Repeat a Ctrl-C that Python dropped because it arrived within a callback of XLA."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        # A moment later, when the callback is over: here it would be dropped once more.
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(ignored)


def _one_line(message: str, error: BaseException) -> str:
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(FINISHED_NOTE)]
    return "; ".join([message, *notes])


def select_device(device: Device) -> None:
    """Make JAX compute on `device` (`auto`: where JAX likes); call it before the first array.

    Raises:
      InputError: a GPU is asked for and JAX sees none.
    """
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device == "gpu":
        try:
            jax.config.update("jax_default_device", jax.devices("gpu")[0])
        except RuntimeError as error:
            raise InputError(
                "--device is gpu, but JAX sees no GPU; expected one that nvidia-smi lists and the "
                "CUDA build of JAX (pip install 'jaxtrain[cuda]'), or take --device cpu"
            ) from error


def set_up_jax(device: Device, compilation_cache: bool) -> None:
    """Choose the device and cache compilations, before the first array.

    Raises:
      InputError: a GPU is asked for and JAX sees none.
    """
    select_device(device)
    jax.config.update("jax_enable_compilation_cache", compilation_cache)
    if compilation_cache:
        cache_compilations()


def cache_compilations() -> None:
    """Keep compiled programs where the next process finds them, by JAX's persistent cache.

    In the folder that $JAX_COMPILATION_CACHE_DIR names, or else in the user's cache folder, apart
    for each kind of processor, since its programs hold machine code; a folder that cannot be
    written is left alone. Safe to delete at any time.
    """
    from platformdirs import user_cache_path

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = user_cache_path("jaxtrain") / "compiled" / _processor_kind()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX keeps only what took a second to compile; here half a second is half of the waiting.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def _processor_kind() -> str:
    """A name for processors that run the same machine code."""
    features = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        features = next(
            (line for line in lines if line.startswith(("flags", "Features"))), features
        )
    digest = hashlib.sha256(features.encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"


def seed_key(seed: int) -> Key[Array, ""]:
    """The PRNG key of a seed.

    Raises:
      InputError: the seed is not in 0 … 2³² − 1; JAX would take a larger one for a smaller.
    """
    check_whole(seed, "seed", least=0, most=2**32 - 1)
    return jax.random.key(seed)


def has_defaults(config: Any, *names: str) -> bool:
    """Whether these flags were left as they are, so that the tutorial's figures can be expected."""
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return all(getattr(config, name) == fields[name] for name in names)


class Comparison(NamedTuple):
    """A figure of a tutorial beside ours.

    Attributes:
      figure: what it is.
      original: the tutorial's, or PyTorch's where the tutorial runs it.
      ours: the same from jaxtrain.
      tolerance: how far apart they may be.
    """

    figure: str
    original: float
    ours: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether ours is within the tolerance."""
        return abs(self.ours - self.original) <= self.tolerance


def comparison_rows(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str, str, str]]:
    """Figure, original, ours and difference as text, with a mark where they disagree."""
    for row in comparisons:
        mark = "" if row.agrees else f"  ✗ more than {row.tolerance:g}"
        difference = f"{row.ours - row.original:+.1e}{mark}"
        yield row.figure, f"{row.original:.10g}", f"{row.ours:.10g}", difference


def print_comparisons(title: str, comparisons: Iterable[Comparison], output_dir: Path) -> None:
    """Print the table of figures, if any, on stdout, and as the last line where the results are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for heading in ("original", "ours", "difference"):
        table.add_column(heading, justify="right")
    for row in comparison_rows(comparisons):
        table.add_row(*row)
    if table.row_count:
        Console(highlight=False).print(table)
    print(f"results: {output_dir}")


def print_summary(title: str, rows: Mapping[str, str], output_dir: Path) -> None:
    """Print the closing table on stdout, and as the last line where the results are."""
    print_table(title, rows)
    print(f"results: {output_dir}")


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print names and values on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)
