"""Ctrl-C and SIGTERM as exceptions that come once, and do come."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from typing import Any


class Terminated(BaseException):
    """The process was asked to end by SIGTERM."""


_EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
# 128 + the signal's number, as shells report it.
EXIT_STATUS = {kind: 128 + number for number, kind in _EXCEPTIONS.items()}

# While a run comes to its end, further signals would cut off what the first one asked for; after
# so long they may.
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.05

_MAIN_THREAD = threading.main_thread().ident or 0
_asked_at: list[float] = []


def raise_on_signals() -> None:
    """Raise KeyboardInterrupt and Terminated in the main thread from now on."""
    for number in _EXCEPTIONS:
        signal.signal(number, _raise_once)
    sys.unraisablehook = _report_unless_ours


def ignore_signals() -> None:
    """Let a process that has done its work end in peace."""
    for number in _EXCEPTIONS:
        signal.signal(number, signal.SIG_IGN)


def _raise_once(number: int, frame: object) -> None:
    now = time.monotonic()
    if _asked_at and now - _asked_at[-1] < _PATIENCE_SECONDS:
        return
    _asked_at.append(now)
    error = _EXCEPTIONS[signal.Signals(number)]()
    # Not by threading, whose locks the main thread may hold right now.
    _thread.start_new_thread(_repeat_if_lost, (number, error))
    raise error


def _repeat_if_lost(number: int, error: BaseException) -> None:
    """Send the signal again if its exception got lost.

    XLA and JAX swallow what is raised within their callbacks. An exception that is on its way up is
    being handled, in one `finally` or `with` after the other, all but a few microseconds; the
    last handler ends the process.
    """
    missing = 0
    while missing < 2:
        time.sleep(_LOOK_SECONDS)
        missing = 0 if _is_handled(error) else missing + 1
    _asked_at.clear()
    # To that thread itself: it may be waiting for something that only a signal cuts short.
    signal.pthread_kill(_MAIN_THREAD, number)


def _is_handled(error: BaseException) -> bool:
    """Whether the main thread is handling this exception, or one that came up meanwhile."""
    active: Any = sys._current_exceptions().get(_MAIN_THREAD)
    if isinstance(active, tuple):  # before Python 3.12: type, value, traceback
        active = active[1]
    while active is not None:
        if active is error:
            return True
        active = active.__context__
    return False


def _report_unless_ours(ignored: Any) -> None:
    if ignored.exc_type not in EXIT_STATUS:
        sys.__unraisablehook__(ignored)
