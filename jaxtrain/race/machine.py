"""Describes the machine and its software, and notices what else it computes."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxtrain._allocator import ENVIRONMENT

_RECORDED = (
    *("XLA_FLAGS", "JAX_PLATFORMS", "JAXTRAIN_CPU_LOWERINGS"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *ENVIRONMENT,
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "equinox", "keras")


def describe() -> dict[str, Any]:
    """Returns processor, versions and flags."""
    device, versions = jax.devices()[0], {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "processor": _processor(),
        "cores": cores(),
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "precision": "float32, no TF32",
        "flags": {name: os.environ[name] for name in _RECORDED if name in os.environ},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Returns what `describe` returned, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = ", ".join(f"{name}={value}" for name, value in machine["flags"].items())
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"{machine['precision']}; Python {machine['python']}, {versions}"
        f"{flags and f'; flags: {flags}'}"
    )


def cores() -> int:
    """Returns the number of cores that this process may use, as XLA counts them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Returns the name of the processor, or of its architecture where the name is unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Load:
    """What other processes have computed since it was made, as Linux counts it."""

    def __init__(self) -> None:
        self._start = _busy_seconds()

    def others(self) -> float | None:
        """Returns how many of our cores other processes, and virtual machines, have kept busy.

        On a machine with more cores than this process may use, it assumes that they fill the other
        cores first. On systems other than Linux it returns None.
        """
        busy, own, now = (b - a for a, b in zip(self._start, _busy_seconds(), strict=True))
        rest = (os.cpu_count() or 1) - cores()
        return max(0.0, (busy - own) / now - rest) if busy else None


def _busy_seconds() -> tuple[float, float, float]:
    """Returns the time that all cores, and that this process and its children, were busy."""
    times, path = os.times(), Path("/proc/stat")
    busy = 0.0
    if path.exists():
        user, nice, system, _, _, interrupts, soft, steal, *_ = map(
            int, path.read_text().splitlines()[0].split()[1:]
        )
        busy = (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy, sum(times[:4]), time.monotonic()
