"""The Model of a PyTorch module."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jaxtrain._placement import to_numpy
from jaxtrain.adapters._recording import Recorder
from jaxtrain.adapters._shared import (
    AdaptedApply,
    BatchStatistics,
    RefuseInit,
    Static,
    WithoutDropout,
    unused_key,
)
from jaxtrain.adapters.torch._dropout import dropping_nothing
from jaxtrain.adapters.torch._export import export
from jaxtrain.adapters.torch._interpreter import compute, to_array
from jaxtrain.dataset import JoinedInputs
from jaxtrain.errors import InputError
from jaxtrain.model import Model


def adapt(module: Any, call: Static | None) -> tuple[Model, tuple[PyTree, PyTree]]:
    """Returns the Model of a module with its trained parameters and its other variables.

    Frozen parameters (`requires_grad=False`) are among the other variables.
    """
    _check(module)
    identity = Static(_identity(module))
    template = _TEMPLATES.get(identity)
    if template is None:
        template = _TEMPLATES[identity] = _Template(module)
    apply = Apply(
        identity,
        repr(module),
        template,
        call=Static(call_forward) if call is None else call,
        kind=type(module),
    )
    params: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, tensor in _variables(module).items():
        is_trained = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        (params if is_trained else others)[name] = to_array(tensor)
    return Model(RefuseInit(), apply), (_nested(params), _nested(others))


def call_forward(module: Any, inputs: PyTree, *, train: bool, rngs: Any) -> Any:
    """Calls a module; a tuple of inputs is passed as several arguments if it takes so many."""
    if type(inputs) in (tuple, JoinedInputs):
        try:
            inspect.signature(module.forward).bind(*inputs)
        except TypeError:
            return module(inputs)
        return module(*inputs)
    return module(inputs)


class _Template:
    """A copy of a module, and what has been exported of it so far.

    Attributes:
      module: the copy, whose parameters and buffers have no memory.
      names: the names of parameters and buffers; of those that are shared, with the first name.
      recorder: records the calls of layers, if it is not None.
    """

    def __init__(self, module: Any) -> None:
        try:
            self.module = copy.deepcopy(module)
        except Exception as error:  # of any attribute
            raise InputError(
                f"the module {type(module).__name__} cannot be copied ({error}); expected one for "
                "which copy.deepcopy(module) works"
            ) from error
        for x in _variables(self.module).values():  # programs keep templates in memory
            x.data = x.new_zeros(()).expand(x.shape)
        first = {id(x): name for name, x in _variables(module).items()}
        every = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        self.names = {name: first[id(x)] for name, x in every}
        self.recorder: Recorder | None = None
        self._programs: dict[Any, Any] = {}

    def program(self, call: Any, inputs: PyTree, train: bool) -> Any:
        """Returns the operations of the module for inputs of these shapes, in a mode.

        They hold for any number of examples; beside arrays that the examples share, whose shapes
        may depend on it, for this one alone.
        """
        leaves, structure = jax.tree.flatten(inputs)
        any_size = not isinstance(inputs, JoinedInputs)
        shapes = [(x.shape[1:] if any_size else x.shape, self._dtype(x.dtype)) for x in leaves]
        known = (call, structure, tuple(shapes), train)
        if known not in self._programs:
            module = self.copy()  # an export may change attributes

            def function(tensors: Any) -> Any:
                found = jax.tree.unflatten(structure, tensors)
                return call.value(module, found, train=train, rngs=None)

            self._programs[known] = export(module, function, shapes, any_size=any_size, train=train)
        return self._programs[known]

    def copy(self) -> Any:
        """Returns a new module, with zeros as parameters and buffers."""
        module = copy.deepcopy(self.module)
        for x in _variables(module).values():
            x.data = torch.zeros(x.shape, dtype=x.dtype)
        return module

    def _dtype(self, dtype: Any) -> torch.dtype:
        """Returns the dtype that the user of the module has for inputs of a dtype in JAX."""
        if jax.numpy.issubdtype(dtype, np.floating):
            floats = (x.dtype for x in self.module.parameters() if x.is_floating_point())
            return next(floats, torch.float32)
        return torch.int64 if dtype.itemsize > 1 else getattr(torch, dtype.name)


# Equal modules are exported once.
_TEMPLATES: weakref.WeakValueDictionary[Static, _Template] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class Apply(AdaptedApply):
    """`Model.apply` of a PyTorch module."""

    identity: Static = dataclasses.field(repr=False)
    description: str
    template: _Template = dataclasses.field(compare=False, repr=False)

    def run(self, params: Any, model_state: Any, inputs: Any, train: bool, key: Any) -> Any:
        """Returns the outputs and the updated buffers."""
        template, others = self.template, _flat(model_state)
        values = {**_flat(params), **others}
        variables = {name: values[first] for name, first in template.names.items()}
        recorder = template.recorder
        if recorder is not None and not recorder.is_of_this_thread:
            recorder = None
        program, key = (
            template.program(self.call, inputs, train),
            unused_key() if key is None else key,
        )
        with jax.numpy_rank_promotion("allow"):  # PyTorch's rules of broadcasting
            outputs, updated = compute(
                program, template.module, variables, jax.tree.leaves(inputs), key, recorder
            )
        after = {template.names[name]: x for name, x in updated.items() if name in template.names}
        return outputs, _nested({name: after.get(name, old) for name, old in others.items()})

    @contextlib.contextmanager
    def recording(self, recorder: Recorder, params: PyTree, model_state: Any) -> Iterator[None]:
        """Records the calls of the module and its submodules."""
        before, self.template.recorder = self.template.recorder, recorder
        try:
            yield
        finally:
            self.template.recorder = before

    def without_dropout(self) -> WithoutDropout:
        """Returns the function of `call` that drops nothing in training."""
        return WithoutDropout(self.call, call_without_dropout)

    def batch_statistics(self, params: PyTree, model_state: PyTree) -> dict[str, BatchStatistics]:
        """Returns the statistics by layer; they have the path of their layer."""
        found = {}
        for name, layer in self.template.module.named_modules():
            if (
                isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
                and layer.track_running_stats
            ):
                path = f"model_state.{name}." if name else "model_state."
                found[name] = BatchStatistics(f"{path}running_mean", f"{path}running_var")
        return found

    def to_module(self, params: PyTree, model_state: PyTree) -> Any:
        """Returns a new module with these variables, in evaluation mode."""
        module = self.template.copy()
        values = {**_flat(params), **_flat(model_state)}
        with torch.no_grad():
            for name, tensor in _variables(module).items():
                array = to_numpy(values[name])
                is_float = jax.numpy.issubdtype(array.dtype, np.floating)
                tensor.copy_(torch.tensor(array.astype(np.float64) if is_float else array))
        return module.eval()


def call_without_dropout(call: Any, *args: Any, **options: Any) -> Any:
    """Calls a module, or its `forward` alone, while no function of PyTorch drops elements."""
    with dropping_nothing():
        return call(*args, **options)


def _variables(module: Any) -> dict[str, torch.Tensor]:
    """Returns the parameters and buffers by name; those that are shared have their first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(values, sep=".")


def _check(module: Any) -> None:
    """Raises InputError for modules that cannot be trained."""
    kind = type(module).__name__
    for layer in module.modules():
        owner = type(layer).__module__
        if ".quantized" in owner:
            raise InputError(
                f"{kind} has the quantized layer {type(layer).__name__}; expected the module "
                "before its quantization, since integer kernels are not trained"
            )
        if isinstance(layer, torch.jit.ScriptModule) or hasattr(layer, "_orig_mod"):
            raise InputError(
                f"{kind} is compiled by torch.jit or torch.compile; expected the module itself"
            )
        if isinstance(layer, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            raise InputError(
                f"{kind} is a {type(layer).__name__}; expected its module, model.module"
            )
    for name, tensor in _variables(module).items():
        if torch.nn.parameter.is_lazy(tensor):
            raise InputError(
                f"the parameter {name} of {kind} has no shape yet; call the module once, such as "
                "module(torch.zeros(1, 1, 28, 28)), before init_state"
            )
        if tensor.device.type != "cpu":
            raise InputError(
                f"{name} of {kind} is on the device {tensor.device}; expected the module on the "
                "CPU: pass module.cpu(), and JAX chooses the device"
            )


def _identity(module: Any) -> Any:
    """Returns a hashable value that is equal for modules that compute the same.

    It contains the classes and the attributes of all submodules, and of parameters and buffers the
    shapes. Other objects than arrays, data classes and containers are equal if they say so.
    """
    known: dict[int, Any] = {id(layer): name for name, layer in module.named_modules()}
    for name, x in _variables(module).items():
        known[id(x)] = (name, x.shape, x.dtype, x.requires_grad)

    def describe(value: Any) -> Any:
        value = value() if isinstance(value, weakref.ref) else value
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, torch.Tensor | np.ndarray):
            array = np.asarray(to_array(value) if isinstance(value, torch.Tensor) else value)
            return array.shape, array.dtype, hashlib.sha256(array.tobytes()).digest()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return type(value), describe(vars(value))
        if isinstance(value, Mapping):
            return tuple((describe(key), describe(item)) for key, item in value.items())
        if isinstance(value, list | tuple | set):
            return type(value), tuple(map(describe, value))
        plain = bool | int | float | complex | str | bytes | type | None
        return (type(value), value) if isinstance(value, plain) else Static(value)

    return tuple(
        (name, type(layer), known[id(layer)], describe({**vars(layer), "training": True}))
        for name, layer in module.named_modules(remove_duplicate=False)
    )
