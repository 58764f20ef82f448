"""Trained models as files for other libraries."""

from jaxtrain.export._safetensors import load_params, save_params

__all__ = ["load_params", "save_params"]
