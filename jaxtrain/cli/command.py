"""The command line of an experiment: flags in, one sentence and an exit status out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import optax
from jaxtyping import Array, Key

from jaxtrain._arguments import check_integer
from jaxtrain._files import lock_folder
from jaxtrain.checkpoint import CheckpointOptions, checkpoint_path, list_epochs, read_file
from jaxtrain.cli.runs import RunFolder, read_json, remove_file, to_json
from jaxtrain.cli.signals import EXIT_STATUS, Terminated, ignore_signals, raise_on_signals
from jaxtrain.errors import (
    DataUnavailableError,
    InputError,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
    printable,
    recovery_notes,
)
from jaxtrain.optimizers import clip_gradients, skip_nonfinite

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "rprop", "adagrad", "adadelta", "lbfgs"]
Config = TypeVar("Config")
BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE

# Flags that may change when a run resumes: they do not decide what it computes.
_FREE = {
    *("epochs", "device", "compilation_cache", "log_interval", "output_dir", "overwrite"),
    *("data_dir", "safety"),
}


@dataclasses.dataclass(frozen=True)
class Safety:
    """Flags of every experiment that trains by `fit`: checkpoints and safeguards."""

    checkpoint_dir: Path | None = None
    """Save checkpoints here; the same command then resumes after an interruption."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints; the last epoch is always saved."""
    keep: int = 3
    """How many checkpoints to keep, the newest."""
    resume: Literal["auto", "required", "never"] = "auto"
    """auto: resume if there is a checkpoint. required: fail without one. never: fail with one."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinity in loss, gradient or state: end the run, or skip that step."""
    max_gradient_norm: float | None = None
    """Scale gradients down to this norm (over all parameters); None leaves them."""

    def wrap(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns the optimizer with the safeguards that the flags ask for.

        Raises:
          InputError: the gradient norm is not positive.
        """
        optimizer = clip_gradients(optimizer, self.max_gradient_norm)
        return skip_nonfinite(optimizer) if self.on_nonfinite == "skip" else optimizer

    def fit_options(self, config: Any, *, part: str = "", **known: Any) -> dict[str, Any]:
        """Returns the arguments of `fit` that the flags set.

        With --overwrite, the checkpoints of another run in the same folder are removed here.

        Args:
          config: the experiment's configuration; a run with another one cannot resume from these
            checkpoints.
          part: subfolder of the checkpoints, in an experiment of several runs.
          known: values that the configuration leaves open, the data set of "auto" for example.
        """
        if self.checkpoint_dir is None:
            if self.resume == "required":
                raise InputError("--resume is required without --checkpoint-dir; expected both")
            return {"checkpoint": None}
        names = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
        resume = self.resume
        if part and resume == "required" and self._has_checkpoints():
            resume = "auto"  # later parts may not have begun when an earlier one was interrupted
        options = CheckpointOptions(
            self.checkpoint_dir / part,
            every=self.checkpoint_every,
            keep=self.keep,
            resume=resume,
            configuration={name: getattr(config, name) for name in names}
            | {"max_gradient_norm": self.max_gradient_norm, "on_nonfinite": self.on_nonfinite}
            | known,
        )
        if config.overwrite and resume == "auto":
            _remove_other_run(self.checkpoint_dir / part, options.configuration)
        return {"checkpoint": options}

    def resumes(self, config: Any) -> bool:
        """Returns whether results in the output folder are of the run that resumes.

        Raises:
          InputError: results and checkpoints would share a folder, or the results are of a run
            with other flags and the same folder of checkpoints.
        """
        folder, output_dir = self.checkpoint_dir, config.output_dir
        if folder is None:
            return False
        if _same_folder(folder, output_dir):
            raise InputError(
                f"--checkpoint-dir is {folder}, the output folder itself; expected another folder, "
                f"such as {output_dir / 'checkpoints'}"
            )
        if self.resume == "never" or not self._has_checkpoints():
            return False
        earlier = read_json(output_dir / "config.json")
        try:
            if not _same_folder(Path(earlier["safety"]["checkpoint_dir"]), folder):
                return False
            now = to_json(dataclasses.asdict(config))
            different = {
                name: (earlier[name], value)
                for name, value in now.items()
                # (A flag that is left out may have been filled in.)
                if name not in _FREE and value is not None and earlier[name] != value
            }
        except (KeyError, TypeError):  # not written by an experiment
            return False
        if different and not config.overwrite:
            raise InputError(
                f"the output folder {output_dir} contains another run: "
                f"{format_differences(different)}; keep it and choose others by --output-dir and "
                "--checkpoint-dir, or replace it by --overwrite"
            )
        return not different

    def _has_checkpoints(self) -> bool:
        """Returns whether the run has checkpoints, or one of its parts."""
        folder = self.checkpoint_dir
        try:
            parts = [] if folder is None else [folder, *folder.iterdir()]
        except (OSError, ValueError):  # ValueError: a null character in the name
            return False
        return any(list_epochs(part) for part in parts)


def main(config_type: type[Config], run: Callable[[Config], object]) -> None:
    """Runs an experiment with the configuration that the command line gives.

    A user's mistake ends with one sentence on stderr and status 1, Ctrl-C with one line and 130,
    SIGTERM with one line and 143.

    Args:
      config_type: a dataclass; its fields are the flags, their docstrings the help.
      run: the experiment; its docstring is the description.
    """
    with report_errors():
        import tyro  # slow to import: after signals are handled

        run(tyro.cli(config_type, description=run.__doc__, config=(tyro.conf.OmitArgPrefixes,)))


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Ends the process as `main` describes on an error of the library or a signal."""
    warnings.showwarning = _print_warning
    raise_on_signals()
    try:
        yield
    except (InputError, NonFiniteError, OutOfMemoryError, StorageError) as error:
        print(_one_line(f"error: {error}{_flags(error)}", error), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of the output has left, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE_STATUS)
    except (KeyboardInterrupt, Terminated) as error:
        word = "terminated" if isinstance(error, Terminated) else "interrupted"
        print(_one_line(word, error), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: Python's own exit would tear XLA down while it may still be compiling.
        os._exit(EXIT_STATUS[type(error)])
    finally:
        ignore_signals()


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {printable(str(message))}", file=sys.stderr)


def _one_line(message: str, error: BaseException) -> str:
    return printable("; ".join([message, *recovery_notes(error)]))


def _flags(error: BaseException) -> str:
    """Returns the flags for what an error advises, since the library does not know of flags."""
    if isinstance(error, OutOfMemoryError) and error.fitting is not None:
        return f" (--{error.argument.replace('_', '-')} {error.fitting})"
    if isinstance(error, DataUnavailableError):
        return " (--data-dir FOLDER, --dataset digits)"
    if isinstance(error, NonFiniteError):
        return " (--max-gradient-norm 1, --on-nonfinite skip)"
    return ""


def output_folder(config: Any) -> RunFolder:
    """Returns the folder that --output-dir names, if --overwrite and the checkpoints permit it.

    Raises:
      InputError: it cannot be written, or contains a finished run.
    """
    safety = getattr(config, "safety", None)  # of experiments that train by fit
    resuming = safety is not None and safety.resumes(config)
    return RunFolder(config.output_dir, config, overwrite=config.overwrite, resuming=resuming)


def seed_key(seed: int) -> Key[Array, ""]:
    """Returns the PRNG key of a seed.

    Raises:
      InputError: the seed is not in 0 … 2³² − 1; JAX would silently reduce a larger one.
    """
    check_integer(seed, "seed", minimum=0, maximum=2**32 - 1)
    return jax.random.key(seed)


def has_defaults(config: Any, *names: str) -> bool:
    """Returns whether these flags have their defaults, so that the tutorial's figures apply.

    With clipped gradients they do not.
    """
    if hasattr(config, "safety") and config.safety.max_gradient_norm is not None:
        return False
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return all(getattr(config, name) == fields[name] for name in names)


def format_differences(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns names with their earlier and present values, in one clause."""
    return ", ".join(f"{name} was {then} and is now {now}" for name, (then, now) in pairs.items())


def _remove_other_run(folder: Path, configuration: Mapping[str, Any]) -> None:
    """Removes the checkpoints in a folder if they are of a run with another configuration.

    Raises:
      InputError: another run is using the folder.
      StorageError: a checkpoint cannot be removed.
    """
    epochs = list_epochs(folder)
    for epoch in reversed(epochs):
        with contextlib.suppress(InputError):  # a damaged one: the one before tells as well
            record, _ = read_file(checkpoint_path(folder, epoch))
            if record["metadata"].get("configuration") == configuration:
                return
            break
    else:
        return
    lock = lock_folder(folder, "checkpoint folder")
    try:
        for epoch in epochs:
            remove_file(checkpoint_path(folder, epoch))
    finally:
        os.close(lock)
    print(printable(f"removed the checkpoints of another run in {folder}"), file=sys.stderr)


def _same_folder(first: Path, second: Path) -> bool:
    try:
        return os.path.realpath(first) == os.path.realpath(second)
    except ValueError:  # a null character in the name
        return False
