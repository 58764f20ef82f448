"""The cache of compiled programs, which lets the next run of a script start sooner."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import platform
import re
import stat
import time
import zlib
from pathlib import Path

import jax

from jaxtrain._extras import needs_extra

_STAMP = ".verified"
_ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")  # JAX's names; other files are the user's
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
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not folder:
        folder = _default_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    with contextlib.suppress(OSError, ValueError):
        remove_damaged_entries(Path(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX caches only what took a second to compile; most programs here take less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def remove_damaged_entries(folder: Path) -> None:
    """Removes entries that a full disk or a killed process left incomplete.

    JAX never replaces a damaged entry; it would warn and recompile in every run. Only entries newer
    than the file `.verified`, which marks the previous check, are read.
    """
    stamp = folder / _STAMP
    since = stamp.stat().st_mtime_ns if stamp.exists() else 0
    # Entries of the last seconds are read again next time: file systems round times.
    now = time.time_ns() - 10 * 10**9
    for entry in filter(lambda path: _ENTRY.fullmatch(path.name), folder.iterdir()):
        status = entry.lstat()
        is_new = stat.S_ISREG(status.st_mode) and status.st_mtime_ns >= since
        if is_new and not _is_complete(entry.read_bytes()):
            entry.unlink()
    if folder.is_dir():
        stamp.touch()
        os.utime(stamp, ns=(now, now))


def _is_complete(entry: bytes) -> bool:
    """Returns whether JAX can decompress an entry (zstandard if it is installed, else zlib)."""
    if entry.startswith(_ZSTANDARD_MAGIC):
        for name in ("compression.zstd", "zstandard"):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(name)
                break
        else:
            return True  # it cannot be checked here
        decompress = module.decompress
    else:
        decompress = zlib.decompress
    try:
        decompress(entry)
    except Exception:  # each library raises its own
        return False
    return True


def _default_folder() -> Path:
    with needs_extra("experiments"):
        from platformdirs import user_cache_path

    return user_cache_path("jaxtrain") / "compiled" / _processor_kind()


def _processor_kind() -> str:
    """Returns a name shared by processors that run the same machine code."""
    features = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        features = next(
            (line for line in lines if line.startswith(("flags", "Features"))), features
        )
    digest = hashlib.sha256(features.encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"
