"""LogFile: a locked log that a run rewrites at its start and then appends to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO

from jaxtrain._files import lock_file, make_folder, open_input, output_path, replace_file
from jaxtrain._processes import shows_progress
from jaxtrain.errors import InputError


class LogFile:
    """A log: a new file, an empty one, or one that the same kind of logger wrote.

    The file is locked from the first `rewrite` until `close`, so that a second run does not write
    to it. All methods raise OSError if the file cannot be written, or is no longer the one that was
    opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], argument: str, is_log: Callable[[bytes], bool]
    ) -> None:
        """Makes the folder of the file, and checks that the file can be opened.

        Args:
          path: the file.
          argument: the name of the argument.
          is_log: returns whether the first line of a file, with its end, is that of a log.

        Raises:
          InputError: it is not a regular file, it has content that is not a log, another run is
            writing to it, or it or its folder cannot be written.
        """
        self.path = output_path(path, argument)
        self._is_log = is_log
        self._file: BinaryIO | None = None
        if shows_progress():
            make_folder(self.path.parent, "folder of the log")
            try:
                self._open()
            except OSError as error:
                raise InputError(
                    f"{argument} is {self.path}, which cannot be written ({error.strerror}); "
                    "expected a new file, or one by this logger",
                    argument=argument,
                ) from error
            finally:
                self.close()

    def rewrite(self, change: Callable[[bytes], bytes]) -> None:
        """Replaces the content by a function of it, at once, and keeps the file open."""
        if self._file is None:
            self._open()
        content = b""
        if self._file is not None:
            self._check()
            self._file.seek(0)
            content = self._file.read()
        file = replace_file(self.path, change(content), lock=True)
        self.close()
        self._file = file

    def append(self, text: str) -> None:
        """Adds lines, which are on disk when it returns."""
        self._check()
        assert self._file is not None
        self._file.write(text.encode())
        self._file.flush()

    def close(self) -> None:
        """Closes the file, which releases it to other runs."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self) -> None:
        """Opens and locks the file if it exists."""
        try:
            self._file = open_input(self.path)
        except FileNotFoundError:
            return
        lock_file(self._file)
        self._check()
        first = self._file.readline()
        if first and not self._is_log(first):
            raise OSError(errno.EEXIST, f"it is not a log: it starts with {first[:40]!r}")

    def _check(self) -> None:
        """Raises OSError if the open file is not the one at the path."""
        assert self._file is not None
        try:
            is_same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise OSError(errno.ESTALE, "it was deleted or replaced")
