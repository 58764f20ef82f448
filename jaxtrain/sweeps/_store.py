"""Store: the folder of a sweep's finished runs, from which an interrupted sweep resumes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain._arguments import checked_path
from jaxtrain._files import lock_folder, make_folder, write_atomically
from jaxtrain._placement import to_words
from jaxtrain._versions import device_name, versions
from jaxtrain.checkpoint import DamagedError, encode_arrays, malformed_is_damaged, read_arrays
from jaxtrain.errors import InputError
from jaxtrain.sweeps._grid import Grid
from jaxtrain.sweeps._program import Program

_DESCRIPTION = "checkpoint folder"


class Store:
    """The finished runs in a folder, one file for those that were trained at once."""

    def __init__(
        self, folder: str | os.PathLike[str], grid: Grid, programs: Sequence[Program]
    ) -> None:
        """Opens the folder of a sweep for this process alone, until `close`.

        Args:
          folder: the folder; made if it is missing.
          grid: the sweep's configurations.
          programs: the programs of its groups.

        Raises:
          InputError: the folder is in use, or cannot be written.
        """
        self._path = checked_path(folder, "checkpoint")
        make_folder(self._path, _DESCRIPTION)
        identity = {
            "grid": grid.to_json(),
            "run": [program.digest() for program in programs],
            "versions": {**versions(), "device": device_name()},
        }
        self._identity = json.loads(json.dumps(identity))  # tuples become lists, as in a file
        self._shapes = [
            jax.eval_shape(lambda tree: list(map(to_words, jax.tree.leaves(tree))), program.shapes)
            for program in programs
        ]
        self._runs = [len(program.group.indices) for program in programs]
        self._lock = lock_folder(self._path, _DESCRIPTION)

    def close(self) -> None:
        """Releases the folder."""
        self._lock.release()

    def restore(self) -> Iterator[tuple[int, list[int], list[np.ndarray]]]:
        """Yields the group, the positions in it, and the leaves of the runs of each file.

        A damaged file, or one that does not fit the sweep, is left out with a warning, so that its
        runs are trained again.

        Raises:
          InputError: a file belongs to another sweep, or cannot be read at the moment.
        """
        for file in sorted(self._path.glob("runs-*.safetensors")):
            try:
                arrays, metadata = read_arrays(file)
                with malformed_is_damaged(file):
                    self._check_identity(metadata.get("identity", {}))
                    leaves = [arrays[str(index)] for index in range(len(arrays))]
                    group, positions = metadata["group"], metadata["positions"]
                    self._check_fits(group, positions, leaves)
            except DamagedError as error:
                warnings.warn(f"{error}; its runs are trained again", stacklevel=4)
                continue
            yield group, positions, leaves

    def save(self, group: int, positions: list[int], leaves: list[np.ndarray]) -> None:
        """Writes the leaves that `Program.train` has returned for some runs of a group."""
        arrays = {str(index): leaf for index, leaf in enumerate(leaves)}
        metadata = {"identity": self._identity, "group": group, "positions": positions}
        file = self._path / f"runs-{group}-{positions[0]}.safetensors"
        write_atomically(file, encode_arrays(arrays, metadata), sync_folder=True)

    def _check_fits(self, group: Any, positions: Any, leaves: list[np.ndarray]) -> None:
        """Raises ValueError unless these can be the leaves of some runs of a group."""
        if type(group) is not int or not 0 <= group < len(self._runs):
            raise ValueError(f"group is {group!r}, of {len(self._runs)} groups")
        runs = range(self._runs[group])
        integers = all(type(each) is int and each in runs for each in positions)
        if not integers or len(set(positions)) < len(positions):
            raise ValueError(f"positions is {positions!r}, of {len(runs)} runs")
        found = [(leaf.shape, leaf.dtype) for leaf in leaves]
        expected = [((len(positions), *leaf.shape), leaf.dtype) for leaf in self._shapes[group]]
        if found != expected:
            raise ValueError("its arrays have other shapes or dtypes than the runs return")

    def _check_identity(self, found: dict[str, Any]) -> None:
        """Raises InputError if the finished runs are of other axes, code or data."""
        ours = self._identity
        reason = "its axes differ"
        if found.get("grid") == ours["grid"]:
            if found["run"] == ours["run"]:
                return
            then, now = found["versions"], ours["versions"]
            moved = [
                f"{n} was {then.get(n)} and is now {now[n]}" for n in now if then.get(n) != now[n]
            ]
            reason = "its run differs in code, data or settings"
            reason += f" ({', '.join(moved)})" if moved else ""
        raise InputError(
            f"the {_DESCRIPTION} {self._path} belongs to another sweep: {reason}; use the same "
            "axes and run, or another folder"
        )
