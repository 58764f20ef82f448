"""The device on which JAX computes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import jax

from jaxtrain._arguments import check_integer
from jaxtrain.errors import InputError
from jaxtrain.parallel import AXIS

Device = Literal["auto", "cpu", "gpu"]
_SIMULATED = "xla_force_host_platform_device_count"  # the flag's older name


def select_device(device: Device, count: int = 1) -> None:
    """Makes JAX compute on `device` (`auto`: JAX's default); call it before the first array.

    Args:
      device: the kind of device.
      count: how many are needed; where they are CPUs, the processor is divided into as many.

    Raises:
      InputError: JAX has no such device.
    """
    if count > 1 and _SIMULATED not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif device == "gpu":
        try:
            jax.config.update("jax_default_device", jax.devices("gpu")[0])
        except Exception as error:  # RuntimeError, or AssertionError for a missing plugin
            raise InputError(
                "--device is gpu, but "
                + missing_gpu_advice(has_nvidia_gpu(), has_cuda_plugin())
                + ", or use --device cpu"
            ) from error
    else:
        try:
            jax.devices()
        except Exception as error:  # RuntimeError, or AssertionError for a missing plugin
            platforms = os.environ.get("JAX_PLATFORMS")
            if platforms:
                raise InputError(
                    f"$JAX_PLATFORMS is {platforms!r}, but JAX has no such device here; unset it, "
                    "or use --device cpu"
                ) from error
            raise InputError(f"JAX has no device here ({error}); use --device cpu") from error


def make_mesh(count: int) -> jax.sharding.Mesh | None:
    """Returns a mesh of the first devices, or None for a single one.

    Raises:
      InputError: JAX has fewer devices.
    """
    check_integer(count, "devices", minimum=1)
    if count == 1:
        return None
    devices = jax.devices()
    if count > len(devices):
        raise InputError(
            f"--devices is {count}, but JAX has {len(devices)} here "
            f"({devices[0].device_kind}); expected at most {len(devices)}",
            argument="devices",
        )
    return jax.make_mesh((count,), (AXIS,), devices=devices[:count])


def missing_gpu_advice(gpu: bool, plugin: bool) -> str:
    """Returns what is missing if JAX sees no GPU, and what to do about it."""
    if gpu and not plugin:
        return (
            "JAX has no CUDA plugin for the NVIDIA GPU of this machine; install it with "
            "pip install 'jaxtrain[cuda]'"
        )
    if gpu:
        return (
            "JAX's CUDA plugin cannot use the NVIDIA GPU of this machine; check that nvidia-smi "
            "lists it, that its driver is recent enough for CUDA 13, and that "
            "CUDA_VISIBLE_DEVICES and JAX_PLATFORMS do not hide it"
        )
    return "this machine has no NVIDIA GPU, or its driver does not list it (see nvidia-smi)"


def has_nvidia_gpu() -> bool:
    """Returns whether this machine has a device of the NVIDIA driver."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def has_cuda_plugin() -> bool:
    """Returns whether JAX's CUDA plugin is installed, for any CUDA version."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
