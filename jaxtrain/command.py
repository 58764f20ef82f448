"""The command line around an experiment: flags in, one sentence and an exit status out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from jaxtyping import Array, Key

from jaxtrain.checkpoints import Resume, in_words, list_epochs
from jaxtrain.checks import check_whole
from jaxtrain.errors import (
    InputError,
    NonFiniteLossError,
    OutOfMemoryError,
    StorageError,
    what_is_kept,
)
from jaxtrain.fit import OnNonfinite
from jaxtrain.runs import RunFolder, plain
from jaxtrain.signals import EXIT_STATUS, Terminated, ignore_signals, raise_on_signals

OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop", "rprop", "adagrad", "adadelta", "lbfgs"]
Config = TypeVar("Config")
EXIT_STATUS_OF_A_BROKEN_PIPE = 128 + signal.SIGPIPE


@dataclasses.dataclass(frozen=True)
class Safety:
    """Flags of every experiment that trains by `fit`: what a run survives, and how."""

    checkpoint_dir: Path | None = None
    """Keep checkpoints here; the same command then goes on where it was cut off."""
    checkpoint_every: int = 1
    """Epochs from one checkpoint (about 0.1 s) to the next; the last epoch always has one."""
    keep: int = 3
    """How many checkpoints to keep, the newest."""
    resume: Resume = "auto"
    """auto: go on from a checkpoint if there is one. must: or fail. never: fail if there is one."""
    on_nonfinite: OnNonfinite = "stop"
    """What a NaN or infinity in loss or gradient does: end the run, or skip that step's update."""
    max_gradient_norm: float | None = None
    """Scale gradients down to this norm (over all parameters); None leaves them."""

    def fit_options(self, config: Any, *, part: str = "", **known: Any) -> dict[str, Any]:
        """Arguments of `fit`.

        Args:
          config: the experiment's configuration; a run with another cannot go on from these
            checkpoints.
          part: subfolder of the checkpoints, where an experiment is several runs.
          known: what fields of the configuration turned out to be, the data set of "auto".
        """
        names = [field.name for field in dataclasses.fields(config) if field.name not in _FREE]
        resume = self.resume
        if part and resume == "must" and self._has_checkpoints():
            resume = "auto"  # the later ones need not have begun when the first was cut off
        return {
            "checkpoint_dir": self.checkpoint_dir and self.checkpoint_dir / part,
            "checkpoint_every": self.checkpoint_every,
            "keep": self.keep,
            "resume": resume,
            "on_nonfinite": self.on_nonfinite,
            "configuration": {name: getattr(config, name) for name in names}
            | {"max_gradient_norm": self.max_gradient_norm, "on_nonfinite": self.on_nonfinite}
            | known,
        }

    def goes_on(self, config: Any) -> bool:
        """Whether results in the output folder are of the run that goes on from the checkpoints.

        Raises:
          InputError: results and checkpoints would lie in one folder, or the results are of a
            run with other flags and the same folder of checkpoints.
        """
        folder, output_dir = self.checkpoint_dir, config.output_dir
        if folder is None:
            return False
        if folder.resolve() == output_dir.resolve():
            raise InputError(
                f"--checkpoint-dir is {folder}, the output folder itself; expected another, "
                f"{output_dir / 'checkpoints'} for instance"
            )
        if self.resume == "never" or not self._has_checkpoints():
            return False
        try:
            earlier = json.loads((output_dir / "config.json").read_text())
            if Path(earlier["safety"]["checkpoint_dir"]).resolve() != folder.resolve():
                return False
            now = {name: plain(value) for name, value in dataclasses.asdict(config).items()}
            different = {
                name: (earlier[name], value)
                for name, value in now.items()
                # (A flag that is left out may have been filled in.)
                if name not in _FREE and value is not None and earlier[name] != value
            }
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        if different and not config.overwrite:
            raise InputError(
                f"the output folder {output_dir} holds another run: {in_words(different)}; keep it "
                "and name another by --output-dir and another --checkpoint-dir, or take --overwrite"
            )
        return not different

    def _has_checkpoints(self) -> bool:
        """Whether there are any, of the run or, where it has several parts, of one of them."""
        folder = self.checkpoint_dir
        try:
            parts = [] if folder is None else [folder, *folder.iterdir()]
        except OSError:
            return False
        return any(map(list_epochs, parts))


# What may change when a run goes on: how far it goes, what is seen of it, and where it runs.
_FREE = {
    *("epochs", "device", "compilation_cache", "log_interval", "output_dir", "overwrite"),
    *("data_dir", "safety"),
}


def main(config_type: type[Config], run: Callable[[Config], object]) -> None:
    """Run an experiment with the configuration that the command line gives.

    A user's mistake ends with one sentence on stderr and status 1, Ctrl-C with one line and 130,
    SIGTERM with one line and 143.

    Args:
      config_type: a dataclass; its fields are the flags, their docstrings the help.
      run: the experiment; its docstring is the description.
    """
    with mistakes_on_one_line():
        import tyro  # takes its time, too

        run(tyro.cli(config_type, description=run.__doc__, config=(tyro.conf.OmitArgPrefixes,)))


@contextlib.contextmanager
def mistakes_on_one_line() -> Iterator[None]:
    """End the process as `main` describes where a mistake or a signal comes up in it."""
    warnings.showwarning = _warn_on_one_line
    raise_on_signals()
    try:
        yield
    except (InputError, NonFiniteLossError, OutOfMemoryError, StorageError) as error:
        print(_one_line(f"error: {error}", error), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # who reads the output has left: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_STATUS_OF_A_BROKEN_PIPE)
    except (KeyboardInterrupt, Terminated) as error:
        word = "terminated" if isinstance(error, Terminated) else "interrupted"
        print(_one_line(word, error), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: Python's own exit would tear XLA down while it may still be compiling.
        os._exit(EXIT_STATUS[type(error)])
    finally:
        ignore_signals()


def _warn_on_one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _one_line(message: str, error: BaseException) -> str:
    text = "; ".join([message, *what_is_kept(error)])
    # The same words as in Python, as flags.
    for name in ("checkpoint_dir", "max_gradient_norm", "on_nonfinite"):
        text = re.sub(rf"(?<![\w/]){name}\b", f"--{name.replace('_', '-')}", text)
    return text


def output_folder(config: Any) -> RunFolder:
    """The folder that --output-dir names, as --overwrite and the checkpoints let it be used.

    Raises:
      InputError: it cannot be written, or holds a finished run.
    """
    safety = getattr(config, "safety", None)  # of experiments that train by fit
    goes_on = safety is not None and safety.goes_on(config)
    return RunFolder(config.output_dir, config, overwrite=config.overwrite, goes_on=goes_on)


def seed_key(seed: int) -> Key[Array, ""]:
    """The PRNG key of a seed.

    Raises:
      InputError: the seed is not in 0 … 2³² − 1; JAX would take a larger one for a smaller.
    """
    check_whole(seed, "seed", least=0, most=2**32 - 1)
    return jax.random.key(seed)


def has_defaults(config: Any, *names: str) -> bool:
    """Whether these flags were left as they are, so that the tutorial's figures can be expected.

    With clipped gradients they cannot.
    """
    if hasattr(config, "safety") and config.safety.max_gradient_norm is not None:
        return False
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    return all(getattr(config, name) == fields[name] for name in names)
