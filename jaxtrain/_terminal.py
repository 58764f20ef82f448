"""Terminal output by rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def make_console(**options: Any) -> Console:
    """Returns rich's console, without highlighting, for which a closed pipe is an error.

    rich itself would end the process with status 1.
    """
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError being handled

    return PipeConsole(highlight=False, **options)
