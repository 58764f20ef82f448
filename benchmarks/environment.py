"""Describes the machine and software, and gives all libraries the same settings."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from benchmarks.peers import DEVICE_VARIABLE

RECORDED = (
    *("XLA_FLAGS", "JAX_PLATFORMS", "JAXTRAIN_CPU_LOWERINGS"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
)
CACHE_SETTINGS = ("JAX_COMPILATION", "JAX_PERSISTENT", "TORCHINDUCTOR")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "equinox", "keras")


def describe() -> dict[str, Any]:
    """Returns processor, versions, flags and commit, as they go into the results."""
    device = jax.devices()[0]
    return {
        "processor": processor(),
        "cores": cores(),
        "device": "cpu" if device.platform == "cpu" else device.device_kind,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
        "precision": "float32, no TF32",
        "flags": {name: os.environ[name] for name in RECORDED if name in os.environ},
        "commit": commit(),
    }


def variables(cache: Path | None) -> dict[str, str]:
    """Returns the environment variables of a process that measures a peer, and of its caches."""
    found = {name: os.environ[name] for name in os.environ if not name.startswith(CACHE_SETTINGS)}
    found |= {"OMP_NUM_THREADS": str(cores()), DEVICE_VARIABLE: jax.default_backend()}
    if jax.default_backend() != "cpu":
        found["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # no TF32
    if cache is None:
        return found | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    return found | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


def cores() -> int:
    """Returns the number of cores that this process may use, as XLA counts them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Returns the name of the processor, or of its architecture where the name is unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit, with "-dirty" if files differ from it, or None outside a git clone."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
