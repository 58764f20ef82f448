"""Store: the folder of a sweep's finished runs, from which an interrupted sweep resumes."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain._files import lock_folder, make_folder, read_regular_file, write_atomically
from jaxtrain._versions import device_name, versions
from jaxtrain.checkpoint import DamagedError, encode_arrays, read_arrays, without_addresses
from jaxtrain.errors import InputError
from jaxtrain.sweeps._grid import Grid
from jaxtrain.sweeps._program import Program

_IDENTITY = "sweep.json"
_DESCRIPTION = "checkpoint folder"


@contextlib.contextmanager
def open_store(
    folder: str | os.PathLike[str], grid: Grid, programs: Sequence[Program]
) -> Iterator[Store]:
    """Opens the folder of a sweep for this process alone.

    Args:
      folder: the folder; made if it is missing.
      grid: the sweep's configurations.
      programs: the programs of its groups.

    Raises:
      InputError: the folder belongs to another sweep, is in use, or cannot be written.
    """
    path = Path(folder)
    make_folder(path, _DESCRIPTION)
    lock = lock_folder(path, _DESCRIPTION)
    try:
        _check_identity(path, _identity(grid, programs))
        yield Store(path, programs)
    finally:
        lock.release()


class Store:
    """The finished runs in a folder, one file for those that were trained at once."""

    def __init__(self, path: Path, programs: Sequence[Program]) -> None:
        self._path = path
        self._programs = programs

    def restore(self) -> Iterator[tuple[int, list[int], list[np.ndarray]]]:
        """Yields the group, the positions in it, and the leaves of the runs of each file.

        A damaged file is left out with a warning, so that its runs are trained again.
        """
        for file in sorted(self._path.glob("runs-*.safetensors")):
            try:
                arrays, metadata = read_arrays(file)
                yield self._checked(arrays, metadata)
            except (DamagedError, LookupError, TypeError, ValueError) as error:
                reason = (
                    error if isinstance(error, DamagedError) else f"{file} is damaged ({error})"
                )
                warnings.warn(f"{reason}; its runs are trained again", stacklevel=4)

    def _checked(
        self, arrays: dict[str, np.ndarray], metadata: dict[str, Any]
    ) -> tuple[int, list[int], list[np.ndarray]]:
        group, positions = metadata["group"], metadata["positions"]
        program = self._programs[group]
        leaves = [arrays[str(index)] for index in range(len(arrays))]
        expected = [_words(shape) for shape in jax.tree.leaves(program.shapes)]
        found = [(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        runs = {len(leaf) for leaf in leaves}
        if found != expected or runs - {len(positions)}:
            raise ValueError(f"the file of the runs {positions} has other arrays than the sweep")
        return group, positions, leaves

    def save(self, group: int, positions: list[int], leaves: list[np.ndarray]) -> None:
        """Writes the leaves that `Program.train` has returned for some runs of a group."""
        arrays = {str(index): leaf for index, leaf in enumerate(leaves)}
        content = encode_arrays(arrays, {"group": group, "positions": positions})
        file = self._path / f"runs-{group}-{positions[0]}.safetensors"
        write_atomically(file, content, sync_folder=True)


def _words(shape: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype in which a leaf of a run is stored."""
    if jax.numpy.issubdtype(shape.dtype, jax.dtypes.prng_key):
        shape = jax.eval_shape(jax.random.key_data, shape)
    return shape.shape, np.dtype(shape.dtype)


def _identity(grid: Grid, programs: Sequence[Program]) -> dict[str, Any]:
    return {
        "axes": {
            name: [without_addresses(repr(value)) for value in values]
            for name, values in grid.axes.items()
        },
        "zipped": grid.zipped,
        "run": [program.digest() for program in programs],
        "versions": {**versions(), "device": device_name()},
    }


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Writes the identity into a new folder, or compares it with the one that is there."""
    file = path / _IDENTITY
    if not file.exists():
        write_atomically(file, json.dumps(identity, indent=1).encode(), sync_folder=True)
        return
    try:
        found = json.loads(read_regular_file(file))
        differences = [name for name in ("axes", "zipped", "run") if found[name] != identity[name]]
        then = found["versions"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); use another checkpoint folder"
        ) from error
    if not differences:
        return
    if differences == ["run"]:
        moved = ", ".join(
            f"{name} was {then.get(name)} and is now {now}"
            for name, now in identity["versions"].items()
            if then.get(name) != now
        )
        reason = f"its run differs in code, data or settings{f' ({moved})' if moved else ''}"
    else:
        reason = "its axes differ"
    raise InputError(
        f"the {_DESCRIPTION} {path} belongs to another sweep: {reason}; use the same axes and run, "
        "or another folder"
    )
