"""Devices: where JAX computes, and where it caches what it compiled for that processor."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
from pathlib import Path
from typing import Literal

import jax

from jaxtrain.errors import InputError

Device = Literal["auto", "cpu", "gpu"]


def select_device(device: Device) -> None:
    """Makes JAX compute on `device` (`auto`: JAX's default); call it before the first array.

    Raises:
      InputError: the device is "gpu" and JAX sees none.
    """
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device == "gpu":
        try:
            jax.config.update("jax_default_device", jax.devices("gpu")[0])
        except RuntimeError as error:
            raise InputError(
                "--device is gpu, but "
                + missing_gpu_advice(has_nvidia_gpu(), has_cuda_plugin())
                + ", or use --device cpu"
            ) from error


def missing_gpu_advice(gpu: bool, plugin: bool) -> str:
    """Returns what is missing if JAX sees no GPU, and what to do about it."""
    if gpu and not plugin:
        return (
            "JAX has no CUDA plugin for the NVIDIA GPU of this machine; install it by "
            "pip install 'jaxtrain[cuda]'"
        )
    if gpu:
        return (
            "JAX's CUDA plugin cannot use the NVIDIA GPU of this machine; check that nvidia-smi "
            "lists it, that its driver is recent enough for CUDA 13, and that "
            "CUDA_VISIBLE_DEVICES and JAX_PLATFORMS do not hide it"
        )
    return "this machine has no NVIDIA GPU that its driver lists; expected one (see nvidia-smi)"


def has_nvidia_gpu() -> bool:
    """Returns whether this machine has a device of the NVIDIA driver."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def has_cuda_plugin() -> bool:
    """Returns whether JAX's CUDA plugin is installed, for any CUDA version."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def set_up_jax(device: Device, compilation_cache: bool) -> None:
    """Selects the device and caches compilations; call it before the first array.

    Raises:
      InputError: the device is "gpu" and JAX sees none.
    """
    select_device(device)
    jax.config.update("jax_enable_compilation_cache", compilation_cache)
    if compilation_cache:
        cache_compilations()


def cache_compilations() -> None:
    """Keeps compiled programs for the next process, in JAX's persistent cache.

    The cache lies in $JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder, in one
    subfolder per kind of processor, since programs contain machine code. A folder that cannot be
    written is not used. The cache may be deleted at any time.
    """
    from platformdirs import user_cache_path

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = user_cache_path("jaxtrain") / "compiled" / _processor_kind()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX caches only what took a second to compile; most programs here take less.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


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
