"""The device on which JAX computes."""

from __future__ import annotations

import os
from typing import Literal

import jax

from jaxtrain._arguments import check_integer
from jaxtrain.errors import InputError
from jaxtrain.parallel import AXIS

DeviceName = Literal["auto", "cpu", "gpu"]
_SIMULATED = "xla_force_host_platform_device_count"  # the older name of jax_num_cpu_devices


def select_device(device: DeviceName, count: int = 1) -> None:
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
        return
    try:
        devices = jax.devices(None if device == "auto" else device)
    except Exception as error:  # RuntimeError, or AssertionError for a missing plugin
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--device is {device}, but JAX has no such device here ({reason}); on a machine with "
            "an NVIDIA GPU, pip install 'jaxtrain[cuda]' and check that nvidia-smi lists it and "
            "$JAX_PLATFORMS does not hide it, or use --device cpu"
        ) from error
    if device == "gpu":
        jax.config.update("jax_default_device", devices[0])


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
