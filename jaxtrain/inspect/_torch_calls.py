"""Runs copies of a PyTorch module in which calls of functions of PyTorch are changed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from torch.overrides import TorchFunctionMode

from jaxtrain.adapters.torch import call, call_without_dropout, dropout_rate

# The first arguments of functions, which are called with these by name.
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_POOL = ("input", "kernel_size", "stride", "padding")
_MAX_POOL = (*_POOL, "dilation", "ceil_mode", "return_indices")
_AVG_POOL = (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"max_pool{n}d": _MAX_POOL for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _AVG_POOL for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "gelu": ("input",),
    "leaky_relu": ("input", "negative_slope", "inplace"),
    "elu": ("input", "alpha", "inplace"),
    "softplus": ("input", "beta", "threshold"),
    "softmax": ("input", "dim"),
    "log_softmax": ("input", "dim"),
    "scaled_dot_product_attention": _ATTENTION,
    "multi_head_attention_forward": (),
    "batch_norm": (*_BATCH_NORM, "eps"),
    "instance_norm": (*_BATCH_NORM, "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


class Site(NamedTuple):
    """A call of a function in a forward pass.

    Attributes:
      layer: name of the module that makes it; "" is the outermost.
      function: name of the function, or "outputs" for the outputs of the outermost module.
      number: how many such calls the layer made before.
    """

    layer: str
    function: str
    number: int


class Change(NamedTuple):
    """Something that a model may do differently from a PyTorch module.

    Attributes:
      kind: the kind of difference, such as "padding".
      theirs: the setting or function in PyTorch, by call.
      ours: the setting or function in the model.
      fix: the code to write in the model, by call; `{layer}`, `{eps}` are names of its framework.
      calls: by call, a function that takes the called function and returns another one.
      module: changes the module itself.
      is_convention: whether it is a difference that a right port may have.
    """

    kind: str
    theirs: dict[Site, str]
    ours: str
    fix: dict[Site, str]
    calls: dict[Site, Callable[[Any], Any]]
    module: Callable[[Any], None] | None = None
    is_convention: bool = False


class Forward(NamedTuple):
    """What a forward pass computed.

    Attributes:
      outputs: leaves of the outputs; None if it failed.
      layers: outputs of layers by name, in the order of calls.
      sites: the calls of functions with their arguments, in order.
    """

    outputs: list[np.ndarray] | None
    layers: dict[str, np.ndarray]
    sites: dict[Site, dict[str, Any]]


class Training(NamedTuple):
    """What some steps of training computed: the first pass, and the steps.

    Attributes:
      rates: layers that drop, with their rates, in the order of calls.
    """

    outputs: list[np.ndarray]
    buffers: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    losses: list[float]
    parameters: dict[str, np.ndarray]
    rates: list[tuple[str, float]]


class Reference:
    """A copy of a module, which runs without dropout."""

    def __init__(self, module: Any, *, exact: bool = False) -> None:
        self._module = copy.deepcopy(module).cpu()
        self._module = self._module.double() if exact else self._module
        self._stack: list[str] = []
        self._layers: dict[str, np.ndarray] = {}
        for name, layer in self._module.named_modules():
            self._watch(name, layer)

    def _watch(self, name: str, layer: Any) -> None:
        def enter(*_: Any) -> None:
            self._stack.append(name)

        def leave(layer: Any, inputs: Any, output: Any) -> None:
            self._stack.pop()
            if isinstance(output, torch.Tensor) and not layer.training:
                self._layers[name] = _to_array(output)

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)

    def _run(self, module: Any, inputs: PyTree, calls: _Calls) -> list[torch.Tensor]:
        self._stack.clear()
        calls.stack = self._stack
        with calls:
            outputs = call(module, inputs)
        leaves = jax.tree.leaves(outputs)
        return [calls.change(Site("", "outputs", 0), lambda x: x)(leaf) for leaf in leaves]

    def evaluate(self, inputs: PyTree, changes: Collection[Change] = ()) -> Forward:
        """Runs the module in evaluation mode; a change may make it fail."""
        module, calls = self._changed(changes), _Calls(changes)
        self._layers, outputs = {}, None
        with torch.no_grad():
            try:
                found = self._run(module.eval(), to_tensors(module, inputs), calls)
                outputs = list(map(_to_array, found))
            except Exception:
                if not changes:
                    raise
        return Forward(outputs, self._layers, calls.sites)

    def train(
        self,
        inputs: PyTree,
        loss: Callable[[list[np.ndarray]], tuple[float, list[np.ndarray]]],
        optimizer: Callable[[Any], Any],
        steps: int,
        changes: Collection[Change] = (),
        seed: int = 0,
    ) -> Training:
        """Trains a copy of the module.

        Args:
          inputs: the batch of each step.
          loss: returns the loss of outputs, and its gradients with respect to them.
          optimizer: makes the optimizer of a module.
          steps: number of steps.
          changes: changes of the module.
          seed: seed of PyTorch's random numbers, which are restored afterwards.
        """
        module = copy.deepcopy(self._changed(changes)).train()
        tensors, stepper = to_tensors(module, inputs), optimizer(module)
        first: Training | None = None
        losses = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(steps):
                calls = _Calls(changes)
                stepper.zero_grad()
                outputs = self._run(module, tensors, calls)
                arrays = [_to_array(x.detach()) for x in outputs]
                value, cotangents = loss(arrays)
                losses.append(value)
                pairs = [
                    (x, torch.tensor(np.asarray(c), dtype=x.dtype))
                    for x, c in zip(outputs, cotangents, strict=True)
                    if x.requires_grad
                ]
                torch.autograd.backward([x for x, _ in pairs], [c for _, c in pairs])
                if first is None:
                    grads = [(n, x.grad) for n, x in _parameters(module) if x.grad is not None]
                    found = _arrays(module.named_buffers()), _arrays(grads)
                    first = Training(arrays, *found, losses, {}, calls.rates)
                stepper.step()
        assert first is not None
        return first._replace(parameters=_arrays(_parameters(module)))

    def _changed(self, changes: Collection[Change]) -> Any:
        functions = [change.module for change in changes if change.module is not None]
        module = copy.deepcopy(self._module) if functions else self._module
        for function in functions:
            function(module)
        return module


class _Calls(TorchFunctionMode):
    """Records calls of functions, and changes some; leaves dropout out."""

    def __init__(self, changes: Collection[Change]) -> None:
        super().__init__()
        self.stack: Sequence[str] = ()
        self.sites: dict[Site, dict[str, Any]] = {}
        self.rates: list[tuple[str, float]] = []
        self._changes = changes
        self._counts: Counter[tuple[str, str]] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls a function."""
        name, layer = getattr(function, "__name__", ""), self.stack[-1] if self.stack else ""
        kwargs = kwargs or {}
        if rate := dropout_rate(function, args, kwargs):
            self.rates.append((layer, rate))
        site = Site(layer, name, self._counts[layer, name])
        self._counts[layer, name] += 1
        if name in ARGUMENTS:
            kwargs = {**dict(zip(ARGUMENTS[name], args, strict=False)), **kwargs}
            args = args[len(ARGUMENTS[name]) :]
        self.sites[site] = kwargs if name in ARGUMENTS else {"input": next(iter(args), None)}

        def inner(*args: Any, **kwargs: Any) -> Any:
            return call_without_dropout(function, args, kwargs)

        return self.change(site, inner)(*args, **kwargs)

    def change(self, site: Site, function: Any) -> Any:
        """Returns a function as the changes of a call have it."""
        # The first are the innermost: conventions see the arguments that the others change.
        for change in sorted(self._changes, key=lambda each: not each.is_convention):
            function = change.calls[site](function) if site in change.calls else function
        return function


def to_tensors(module: Any, inputs: PyTree) -> PyTree:
    """Returns inputs as tensors of the dtypes that a module expects."""
    floats = (x.dtype for x in module.parameters() if x.is_floating_point())
    dtype = next(floats, torch.float32)

    def convert(leaf: Any) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(leaf, order="C"))
        if tensor.is_floating_point():
            return tensor.to(dtype)
        return tensor if leaf.dtype.itemsize == 1 else tensor.long()

    return jax.tree.map(convert, inputs)


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().copy() if tensor.dtype == torch.float64 else tensor.float().numpy().copy()


def _arrays(items: Any) -> dict[str, np.ndarray]:
    return {name: _to_array(x.detach()) for name, x in items if x.is_floating_point()}


def _parameters(module: Any) -> Any:
    return module.named_parameters(remove_duplicate=False)
