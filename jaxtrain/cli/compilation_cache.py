"""The cache of compiled programs, which lets the next run of a script start sooner."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import zlib
from pathlib import Path

import jax

from jaxtrain._extras import needs_extra

_STAMP = ".verified"
_ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"


def set_up_compilation_cache(enabled: bool) -> None:
    """Turns JAX's persistent compilation cache on or off.

    The cache is in $JAX_COMPILATION_CACHE_DIR, else in the user's cache folder, with a subfolder
    per kind of processor, since programs contain machine code. A folder that cannot be written is
    not used. The cache may be deleted at any time.
    """
    jax.config.update("jax_enable_compilation_cache", enabled)
    if not enabled:
        return
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    folder = Path(chosen) if chosen else _default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_damaged_entries(folder)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX caches only what took a second to compile. Even a single operation takes
        # longer to compile than to read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def remove_damaged_entries(folder: Path) -> None:
    """Removes entries that a full disk or a killed process left incomplete.

    JAX never replaces a damaged entry; it would warn and recompile in every run. Only entries newer
    than the file `.verified`, which marks the previous check, are read.
    """
    stamp = folder / _STAMP
    since = stamp.stat().st_mtime - 10 if stamp.exists() else 0  # file systems round times
    for entry in folder.glob("jit_*-cache"):
        if entry.stat().st_mtime >= since and not _is_complete(entry.read_bytes()):
            entry.unlink(missing_ok=True)
    stamp.touch()


def _is_complete(entry: bytes) -> bool:
    """Returns whether JAX can decompress an entry: by zstandard if it is installed, else zlib."""
    try:
        if entry.startswith(_ZSTANDARD_MAGIC):
            importlib.import_module("zstandard").decompress(entry)
        else:
            zlib.decompress(entry)
    except ImportError:
        return True  # it cannot be checked here
    except Exception:  # each library raises its own
        return False
    return True


def _default_folder() -> Path:
    with needs_extra("experiments"):
        from platformdirs import user_cache_path

    return user_cache_path("jaxtrain") / "compiled" / _processor_kind()


def _processor_kind() -> str:
    """Returns a name shared by processors that run the same machine code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    features = next(flags, platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
