"""Trained models as files for other libraries and for servers."""

from typing import TYPE_CHECKING

from jaxtrain._lazy import lazy_names

if TYPE_CHECKING:
    from jaxtrain.export._onnx import onnx
    from jaxtrain.export._safetensors import load, save
    from jaxtrain.export._stablehlo import load_stablehlo, stablehlo
    from jaxtrain.export._torch import Conversion as Conversion
    from jaxtrain.export._torch import conversions as conversions
    from jaxtrain.export._torch import load_torch, to_torch
    from jaxtrain.export._torch import misfits as misfits
else:  # so that type checkers report names that do not exist
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "_onnx": ("onnx",),
            "_safetensors": ("load", "save"),
            "_stablehlo": ("load_stablehlo", "stablehlo"),
            "_torch": ("Conversion", "conversions", "load_torch", "misfits", "to_torch"),
        },
    )

__all__ = [
    "load",
    "load_stablehlo",
    "load_torch",
    "onnx",
    "save",
    "stablehlo",
    "to_torch",
]
