"""The operations of a module, as `torch.export` lists them."""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.export import _trace

from jaxtrain.adapters.torch._messages import failure, place
from jaxtrain.errors import InputError

# The size of the batch in an example: one that few layers have.
BATCH = 13
# Held while functions of PyTorch are replaced.
_LOCK = threading.Lock()


class _Called(torch.nn.Module):
    """A module and how it is called, as a module of tensors."""

    def __init__(self, module: Any, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module = module
        self._function = function

    def forward(self, *leaves: Any) -> Any:
        return self._function(leaves)


def export(
    module: Any, call: Callable[[Any], Any], shapes: Sequence[Any], *, any_size: bool, train: bool
) -> torch.export.ExportedProgram:
    """Returns the operations of a module.

    Args:
      module: the module, which is set to the mode.
      call: from the tensors of the inputs to the outputs of the module.
      shapes: shapes and dtypes of the inputs, without the batch axis if `any_size`.
      any_size: whether the operations are those for any number of examples.
      train: whether in training mode.
    """
    module.train(train)
    batch = (BATCH,) if any_size else ()
    example = tuple(torch.zeros((*batch, *shape), dtype=dtype) for shape, dtype in shapes)
    axes = {0: torch.export.Dim("batch")} if any_size else {}
    dynamic = {"leaves": tuple(axes for _ in example)}
    try:
        with _corrected(), torch.enable_grad():
            return torch.export.export(
                _Called(module, call), example, dynamic_shapes=dynamic, strict=False
            )
    except InputError:
        raise
    except Exception as error:  # of any part of the module
        raise failure(error, type(module).__name__, example) from error


@contextlib.contextmanager
def _corrected() -> Iterator[None]:
    """Makes an export silent, and changes what would be wrong or fail in it."""

    def apply(cls: type, *args: Any, **options: Any) -> Any:
        if cls.__module__.startswith("torch."):  # such as that of torch.library.custom_op
            return original(cls, *args, **options)
        raise InputError(
            f"the module calls the autograd function {cls.__name__}"
            f"{place(traceback.extract_stack())}, whose backward JAX does not see; expected "
            "operations of PyTorch, or one that torch.library.custom_op defines and "
            "jaxtrain.adapters.torch.register computes in JAX"
        )

    def is_causal(mask: Any, is_causal: bool | None = None, size: Any = None) -> bool:
        return bool(is_causal)  # PyTorch compares the values of the mask

    with _LOCK:  # streams trace in threads of their own
        original = vars(torch.autograd.Function)["apply"].__func__
        fast_path = torch.backends.mha.get_fastpath_enabled()
        disabled = logging.root.manager.disable
        with (
            warnings.catch_warnings(),
            mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)),
            mock.patch.object(torch.nn.modules.transformer, "_detect_is_causal_mask", is_causal),
            # It prints the graph of a module that fails.
            mock.patch.object(_trace, "print", create=True),
        ):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fast_path)
                logging.disable(disabled)
