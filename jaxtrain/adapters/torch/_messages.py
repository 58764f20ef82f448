"""What cannot be computed in JAX, in one sentence that names the user's line."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import torch

from jaxtrain.errors import InputError, first_line

_SKIPPED = tuple(str(Path(str(file)).parent) for file in (torch.__file__, jax.__file__, __file__))
_LAYERS = str(Path(torch.nn.__file__).parent)


def no_rule(name: str, node: Any) -> InputError:
    """Returns the error for an operation that has no rule."""
    if name in ("aten.item", "aten._local_scalar_dense"):
        return InputError(
            f"the module reads the value of a tensor by .item(){_line(node)}; expected tensors "
            "throughout, since a compiled program has no values while it is traced"
        )
    return InputError(f"the operation {name}{_line(node)} has no rule in JAX; {_way_out(name)}")


def failed(name: str, node: Any, error: Exception) -> InputError:
    """Returns the error for an operation whose rule has raised one."""
    reason = first_line(error)
    return InputError(
        f"the operation {name}{_line(node)} failed in JAX ({reason}); {_way_out(name)}"
    )


def failure(error: Exception, kind: str, inputs: Sequence[Any]) -> InputError:
    """Returns the error for a module that PyTorch cannot export, with the inputs it was called."""
    text, where = str(error), place(traceback.extract_tb(error.__traceback__))
    if "data-dependent" in text:
        return InputError(
            f"{kind} makes a decision that depends on the values of tensors{where}; expected "
            "control flow that shapes and settings determine: use torch.where to choose between "
            "tensors"
        )
    if "Constraints violated" in text:
        return InputError(
            f"{kind} takes a fixed number of examples; expected the batch as the first axis "
            "(batch_first=True in recurrent layers), and its size from the inputs, such as "
            "x.view(x.shape[0], -1) or x.flatten(1)"
        )
    reason = text.splitlines()[0] if text else type(error).__name__
    # A size that torch.export leaves open is a symbol, such as s28.
    reason = re.sub(r"\bs\d+\b", "batch", reason)
    shapes = " and ".join(
        f"({', '.join(['batch', *map(str, x.shape[1:])])}) {str(x.dtype).removeprefix('torch.')}"
        for x in inputs
    )
    return InputError(
        f"PyTorch cannot run {kind}{where} on inputs of {shapes}: {reason}; expected inputs that "
        "the module takes, in its layout and dtype (integer pixels divided by 255), and a module "
        "that torch.export.export(strict=False) accepts"
    )


def place(frames: Iterable[Any]) -> str:
    """Returns the innermost line of the user's code, or else of a layer of PyTorch, as a clause."""
    frames = list(frames)[::-1]
    users = [frame for frame in frames if not frame.filename.startswith((*_SKIPPED, "<"))]
    layers = [frame for frame in frames if frame.filename.startswith(_LAYERS)]
    for frame in users or layers:
        return f", called at {Path(frame.filename).name}:{frame.lineno} ({frame.line})"
    return ""


def _line(node: Any) -> str:
    """Returns the user's line and the layer that call the operation of a node."""
    trace = node.meta.get("stack_trace") or ""
    found = re.findall(r'File "(.+)", line (\d+), in (.+)\n\s*(.*)', trace)
    frames = [traceback.FrameSummary(f, int(n), name, line=text) for f, n, name, text in found]
    path = layer_path(node)
    return place(frames) + (f", in the layer {path}" if path else "")


def layer_path(node: Any, depth: int = -1) -> str | None:
    """Returns the path of the layer that a node is in, or of the ancestor at a depth."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not -1 <= depth < len(stack) or not stack:
        return None
    return stack[depth][0].removeprefix("module").removeprefix(".")


def _way_out(name: str) -> str:
    return (
        "use another operation, or register a function in JAX of the same arguments by "
        f"@jaxtrain.adapters.torch.register({name!r})"
    )
