"""The device on which JAX computes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import jax

from jaxtrain.errors import InputError

Device = Literal["auto", "cpu", "gpu"]


def select_device(device: Device) -> None:
    """Makes JAX compute on `device` (`auto`: JAX's default); call it before the first array.

    Raises:
      InputError: JAX has no such device.
    """
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
