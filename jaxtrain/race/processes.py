"""Calls functions in new processes, in which nothing else has been imported or compiled."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxtrain._allocator import ENVIRONMENT
from jaxtrain._extras import needs_extra
from jaxtrain.errors import InputError
from jaxtrain.race.machine import cores

# Set for each process, to the platform of JAX's default device.
DEVICE_VARIABLE = "JAXTRAIN_RACE_DEVICE"
# They are pickled with their code, since importing them would import JAX.
_BY_VALUE = (
    *("jaxtrain.race.measuring", "jaxtrain.race.preparing", "jaxtrain.race.pytorch"),
    "jaxtrain.adapters.torch._dropout",
)
_CACHE_SETTINGS = ("JAX_COMPILATION", "JAX_PERSISTENT", "TORCHINDUCTOR")
_MAX_REASON = 240


class ProcessError(Exception):
    """A process failed; the message is that of its error."""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    cache: Path | None = None,
    reuse_memory: bool = False,
) -> Any:
    """Returns what a function returns in a new process.

    The function and its arguments travel by cloudpickle, which also takes what `__main__` or a
    notebook defines; the result travels by pickle.

    Args:
      function: the function.
      *arguments: its arguments.
      cache: folder of compiled programs; None compiles everything anew.
      reuse_memory: whether the process reuses freed memory, as after `jt.reuse_freed_memory()`.

    Raises:
      InputError: the function raised it.
      ProcessError: it raised another error, or the process ended.
      MissingExtraError: cloudpickle is not installed.
    """
    with needs_extra("torch"):
        import cloudpickle
    for name in _BY_VALUE:
        if name in sys.modules:
            cloudpickle.register_pickle_by_value(sys.modules[name])
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "call", Path(folder) / "result"
        with source.open("wb") as file:
            pickle.dump([os.path.abspath(each) for each in sys.path], file)
            try:
                cloudpickle.dump((function, arguments), file)
            except OSError:  # a full disk
                raise
            except Exception as error:  # of any object
                reason = _first_lines(str(error))
                raise InputError(
                    f"an argument cannot be sent to another process ({reason}); expected objects "
                    "that cloudpickle can pickle, without open files, locks or generators"
                ) from error
        child = str(Path(__file__).with_name("child.py"))
        # An exception, such as that of Ctrl-C, ends the process.
        process = subprocess.run(
            [sys.executable, child, str(source), str(target)],
            env=_variables(cache, reuse_memory),
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode or not target.exists():
            last = process.stderr.strip().splitlines()[-1:]
            raise ProcessError(": ".join([_ending(process.returncode), *last]))
        kinds, value = pickle.loads(target.read_bytes())
    if kinds is None:
        return value
    if InputError.__name__ in kinds:
        raise InputError(value)
    raise ProcessError(f"{kinds[0]}: {_first_lines(value)}" if value else kinds[0])


@contextlib.contextmanager
def by_value(*objects: Any) -> Iterator[None]:
    """Lets `call` send the code of objects that the user's own files define.

    Otherwise a process would import these files, and with them what they import, such as JAX.
    """
    with needs_extra("torch"):
        import cloudpickle
    names = {base.__module__ for each in objects for base in type(each).__mro__}
    names |= {each.__module__ for each in objects}  # of functions
    tops = {name.partition(".")[0] for name in names if _is_of_user(name)}
    added = tops - cloudpickle.list_registry_pickle_by_value()
    for name in added:
        cloudpickle.register_pickle_by_value(sys.modules[name])
    try:
        yield
    finally:
        for name in added:
            cloudpickle.unregister_pickle_by_value(sys.modules[name])


def _is_of_user(name: str) -> bool:
    """Returns whether a module is neither an installed package nor one of Python or jaxtrain."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or name.partition(".")[0] in ("__main__", "jaxtrain"):
        return False
    folders = Path(file).resolve().parents
    installed = {"site-packages", "dist-packages"} & {each.name for each in folders}
    return not installed and Path(sysconfig.get_path("stdlib")).resolve() not in folders


def _ending(code: int) -> str:
    """Returns how a process has ended."""
    if code >= 0:
        return f"the process ended with exit code {code}"
    return f"the process ended by signal {-code} ({signal.strsignal(-code)})"


def _first_lines(text: str) -> str:
    """Returns the beginning of a message as one line."""
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return joined if len(joined) <= _MAX_REASON else f"{joined[:_MAX_REASON]} ..."


def _variables(cache: Path | None, reuse_memory: bool) -> dict[str, str]:
    """Returns the environment variables of a process."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(_CACHE_SETTINGS)}
    # The process that starts this one may hold most of the memory of a GPU.
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found |= (ENVIRONMENT if reuse_memory else {}) | kept
    found |= {"OMP_NUM_THREADS": str(cores()), DEVICE_VARIABLE: jax.default_backend()}
    if jax.default_backend() != "cpu":
        found |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"}
    if cache is None:
        return found | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    return found | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
