"""CompileTime: how long JAX traces and compiles, as JAX itself reports it."""

from __future__ import annotations

import time
from typing import Any

import jax

_EVENTS = "/jax/core/compile/"


class CompileTime:
    """Adds up the time in which this process traces and compiles; a context manager.

    Attributes:
      seconds: the time so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> CompileTime:
        jax.monitoring.register_event_time_span_listener(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._add)

    def clock(self) -> float:
        """Returns the time in seconds, of an arbitrary start, that stands still while compiling."""
        return time.perf_counter() - self.seconds

    def _add(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        if not event.startswith(_EVENTS):
            return
        # Functions are traced inside others, which are reported later and include them.
        while self._spans and self._spans[-1][0] >= start_time:
            begun, ended = self._spans.pop()
            self.seconds -= ended - begun
        self._spans.append((start_time, end_time))
        self.seconds += end_time - start_time
