"""Trained models as files for other libraries and for servers."""

from jaxtrain.export._onnx import onnx
from jaxtrain.export._safetensors import load, save
from jaxtrain.export._stablehlo import load_stablehlo, stablehlo
from jaxtrain.export._torch import Conversion as Conversion
from jaxtrain.export._torch import conversions as conversions
from jaxtrain.export._torch import load_torch, to_torch
from jaxtrain.export._torch import misfits as misfits

__all__ = [
    "load",
    "load_stablehlo",
    "load_torch",
    "onnx",
    "save",
    "stablehlo",
    "to_torch",
]
