"""The package versions and the device that the last digits of a run depend on."""

from __future__ import annotations

import platform
from importlib import metadata

import jax
import jax.numpy as jnp

_PACKAGES = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that determine a run's numbers."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def current_device() -> jax.Device:
    """Returns JAX's default device."""
    return next(iter(jnp.zeros(()).devices()))


def device_name() -> str:
    """Returns the platform and the kind of JAX's default device."""
    device = current_device()
    return device.platform + (
        f": {device.device_kind}" if device.device_kind != device.platform else ""
    )
