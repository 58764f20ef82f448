"""Signals: Ctrl-C, SIGTERM and SIGHUP as exceptions that are raised once and are not lost.

The exception is raised at once, not left to a flag that the loop polls: an XLA compilation, or a
compiled chunk of steps that takes a second, could not be interrupted by a flag.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from typing import Any


class Terminated(BaseException):
    """The process was asked to end: SIGTERM."""


class TerminalClosed(BaseException):
    """The terminal of the process was closed: SIGHUP."""


_EXCEPTIONS = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: TerminalClosed,
}
# What a script prints last.
MESSAGES = {
    KeyboardInterrupt: "interrupted",
    Terminated: "terminated",
    TerminalClosed: "terminal closed",
}
# 128 + the signal's number, as shells report it.
EXIT_STATUS = {kind: 128 + number for number, kind in _EXCEPTIONS.items()}

# For this long, further signals are ignored while the process cleans up.
_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.05

_MAIN_THREAD = threading.main_thread().ident or 0
_raised_at: list[float] = []


def raise_on_signals() -> None:
    """Makes signals raise their exceptions in the main thread from now on.

    If SIGHUP is already ignored, as under `nohup`, it stays ignored.
    """
    for number in _EXCEPTIONS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise_once)
    sys.unraisablehook = _report_unless_ours


def ignore_signals() -> None:
    """Ignores the signals from now on, in a process whose work is done."""
    for number in _EXCEPTIONS:
        signal.signal(number, signal.SIG_IGN)


def _raise_once(number: int, frame: object) -> None:
    now = time.monotonic()
    if _raised_at and now - _raised_at[-1] < _PATIENCE_SECONDS:
        return
    _raised_at.append(now)
    error = _EXCEPTIONS[signal.Signals(number)]()
    # Not by threading, whose locks the main thread may hold right now.
    _thread.start_new_thread(_repeat_if_lost, (number, error))
    raise error


def _repeat_if_lost(number: int, error: BaseException) -> None:
    """Sends the signal again if its exception was lost.

    XLA and JAX swallow exceptions that are raised in their callbacks. While an exception
    propagates, some `finally` or `with` is handling it, except for a few microseconds in between;
    the last handler ends the process.
    """
    misses = 0
    while misses < 2:
        time.sleep(_POLL_SECONDS)
        misses = 0 if _is_handled(error) else misses + 1
    _raised_at.clear()
    # To the main thread itself: it may be waiting in a call that only a signal interrupts.
    signal.pthread_kill(_MAIN_THREAD, number)


def _is_handled(error: BaseException) -> bool:
    """Returns whether the main thread is handling this exception, or a later one it led to."""
    active: Any = sys._current_exceptions().get(_MAIN_THREAD)
    if isinstance(active, tuple):  # before Python 3.12: type, value, traceback
        active = active[1]
    while active is not None:
        if active is error:
            return True
        active = active.__context__
    return False


def _report_unless_ours(unraisable: Any) -> None:
    if unraisable.exc_type not in EXIT_STATUS:
        sys.__unraisablehook__(unraisable)
