"""What a run's last digits depend on beside its code: package versions and the device."""

from __future__ import annotations

import platform
from importlib import metadata

from jaxtrain.devices import current_device

_PACKAGES = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _PACKAGES
    }


def device_name() -> str:
    """That device's platform and kind, on one line."""
    device = current_device()
    return device.platform + (
        f": {device.device_kind}" if device.device_kind != device.platform else ""
    )
