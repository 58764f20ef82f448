"""Computes in JAX what `torch.export` lists, operation by operation."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate, map_arg

from jaxtrain.adapters._recording import Recorder
from jaxtrain.adapters.torch._export import BATCH
from jaxtrain.adapters.torch._messages import failed, layer_path, no_rule
from jaxtrain.adapters.torch._rules import RULES, ChannelsLast, Update, to_first

# Operations that change the shape and no number, also in place, as in x.transpose_(0, 1).
_VIEWS = {f"aten.{x}" for x in ("transpose", "t", "squeeze", "unsqueeze", "swapaxes", "swapdims")}
# Arguments that say where and how PyTorch stores a tensor.
_STORAGE = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "generator", "out")


def compute(
    program: torch.export.ExportedProgram,
    module: Any,
    variables: Mapping[str, Any],
    leaves: Sequence[Any],
    key: Any,
    recorder: Recorder | None,
) -> tuple[Any, dict[str, Any]]:
    """Computes a module in JAX.

    Args:
      program: the operations of the module.
      module: the module, whose submodules the recorder sees.
      variables: parameters and buffers by name.
      leaves: the inputs.
      key: PRNG key of all draws.
      recorder: records the calls of submodules, if it is not None.

    Returns:
      The outputs, and the variables that are used, by name, after the call.
    """
    interpreter = _Interpreter(program.graph_module, module, key, recorder)
    inputs, nodes = iter(leaves), list(program.graph.nodes)
    for spec, node in zip(program.graph_signature.input_specs, nodes, strict=False):
        name = (spec.target or "").removeprefix("module.")
        if not name:
            interpreter.values[node] = next(inputs)
        elif name in variables:
            interpreter.values[node] = variables[name]
        else:
            interpreter.values[node] = to_array(program.constants[spec.target])
        interpreter.variables |= {node: name} if name else {}
    results = interpreter.run(nodes)
    outputs = torch.utils._pytree.tree_unflatten(results, program.call_spec.out_spec)
    return outputs, {name: interpreter.read(n) for n, name in interpreter.variables.items()}


class _Interpreter:
    """Computes the nodes of a graph one by one, also views and operations that change tensors.

    Attributes:
      values: the value of each node; of a view, the pair of the base's value and its own.
      variables: the nodes of parameters, buffers and constants, with their names.
      views: the node that a node is a view of, with the function from one to the other.
    """

    def __init__(self, module: Any, layers: Any, key: Any, recorder: Recorder | None) -> None:
        self.values: dict[Any, Any] = {}
        self.variables: dict[Any, str] = {}
        self.views: dict[Any, tuple[Any, Callable[[Any], Any]]] = {}
        self._module, self._layers, self._key, self._recorder = module, layers, key, recorder
        self._draws = 0
        self._detached = False

    def read(self, node: Any) -> Any:
        """Returns the current value of a node."""
        return to_first(self.read_stored(node))

    def read_stored(self, node: Any) -> Any:
        """Returns the current value of a node, perhaps with channels last."""
        if node not in self.views:
            return self.values[node]
        parent, view = self.views[node]
        if view is _same:
            return self.read_stored(parent)
        base = self.read(parent)
        if node not in self.values or self.values[node][0] is not base:
            self.values[node] = (base, view(base))
        return self.values[node][1]

    def write(self, node: Any, value: Any) -> None:
        """Sets the value of a node and of all that it is a view of."""
        parent, view = self.views.get(node, (None, _same))
        if parent is not None and view is _same:
            self.write(parent, value)
            return
        old = self.read(node)
        if isinstance(value, ChannelsLast):
            value = ChannelsLast(value.array.astype(old.dtype))
        else:
            value = jnp.broadcast_to(value, old.shape).astype(old.dtype)
        if parent is None:
            self.values[node] = value
            return
        base = self.read(parent)
        places = view(jnp.arange(base.size).reshape(base.shape))
        changed = base.reshape(-1).at[places].set(to_first(value))
        self.write(parent, changed.reshape(base.shape))

    def run(self, nodes: Iterable[Any], depth: int = 1) -> Any:
        """Computes nodes, and returns the values of the output node if there is one."""
        results = None
        for path, group in itertools.groupby(nodes, lambda node: layer_path(node, depth)):
            members = list(group)
            if path is not None and self._recorder is not None:
                self._record(path, members, depth)
                continue
            for node in members:
                if node.op == "output":
                    results = self._arguments(node.args[0])
                else:
                    self._compute(node)
        return results

    def _record(self, path: str, members: list[Any], depth: int) -> None:
        """Computes the nodes of a layer as a call that the recorder sees."""
        inside = set(members)
        outside = dict.fromkeys(n for m in members for n in m.all_input_nodes if n not in inside)

        def call(*_: Any) -> list[Any]:
            self.run(members, depth + 1)
            return [self.read(node) for node in members if set(node.users) - inside]

        assert self._recorder is not None
        layer = self._layers.get_submodule(path)
        inputs = [self.read(node) for node in outside if node not in self.variables]
        self._recorder.call(tuple(filter(None, path.split("."))), layer, call, inputs, {})

    def _compute(self, node: Any) -> None:
        target = node.target
        if node.op == "get_attr":
            value = operator.attrgetter(target)(self._module)
            self.values[node] = to_array(value) if isinstance(value, torch.Tensor) else value
        elif isinstance(target, torch._ops.OpOverload):
            self._operation(node)
        elif str(target) == "wrap_with_set_grad_enabled":
            is_enabled, block, *arguments = node.args
            outer, self._detached = self._detached, not is_enabled
            self._inline(node, self.read(block), arguments)
            self._detached = outer
        elif isinstance(target, torch._ops.OperatorBase):
            raise no_rule(str(target), node)
        elif target is operator.getitem and node.args[0] in self.views:  # of several views
            (parent, view), index = self.views[node.args[0]], node.args[1]
            self.views[node] = (parent, lambda base: view(base)[index])
        elif node.op == "call_function":  # of sizes
            self.values[node] = target(*self._arguments(node.args))

    def _operation(self, node: Any) -> None:
        schema = node.target._schema
        name, overload = schema.name.replace("::", "."), node.target._overloadname
        alias = schema.arguments[0].alias_info if schema.arguments else None
        in_place = alias is not None and alias.is_write
        name = name.removesuffix("_") if in_place else name
        rule = RULES.get(f"{name}.{overload}") or RULES.get(name)
        if rule is None:
            self._decompose(name, node)
            return
        arguments = self._arguments(node.args, self.read_stored if rule.takes_last else self.read)
        options = {k: self._arguments(v) for k, v in node.kwargs.items() if k not in _STORAGE}
        if rule.random:
            options["key"] = jax.random.fold_in(self._key, self._draws)
            self._draws += 1

        def function(*first: Any) -> Any:
            try:
                value = rule.function(*first, *arguments[len(first) :], **options)
            except Exception as error:  # of any type, by the rule
                raise failed(name, node, error) from error
            return jax.tree.map(_stop_gradient, value) if self._detached else value

        target = node.args[0] if in_place else node.kwargs.get("out")
        changes_shape = in_place and name in _VIEWS
        if target is not None and not changes_shape:
            self.write(target, function())
            self.views[node] = (target, _same)
        elif changes_shape or (alias is not None and _storage(node) == _storage(node.args[0])):
            self.views[node] = (node.args[0], function)
            self.read(node)
        else:
            value = function()
            if isinstance(value, Update):
                for index, changed in value.changed.items():
                    self.write(node.args[index], changed)
                value = value.output
            self.values[node] = value

    def _decompose(self, name: str, node: Any) -> None:
        """Computes an operation without a rule by those that it consists of in PyTorch."""
        target = node.target
        function = target
        if not target._can_decompose():
            function = get_decompositions([target]).get(target, target)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        examples = []
        for tensor in tensors:
            shape = [n if isinstance(n, int) else BATCH for n in self.read(tensor).shape]
            examples.append(torch.zeros(shape, dtype=tensor.meta["val"].dtype))

        def call(*given: Any) -> Any:
            found = dict(zip(tensors, given, strict=True))
            args, options = map_arg((node.args, node.kwargs), lambda n: found.get(n, n))
            args, options = map_arg((args, options), self.read)  # sizes
            return function(*args, **options)

        try:
            block = make_fx(call, tracing_mode="symbolic")(*examples)
        except Exception as error:  # of any type, by PyTorch
            raise no_rule(name, node) from error
        if any(inner.target == target for inner in block.graph.nodes):
            raise no_rule(name, node)
        for inner in block.graph.nodes:
            inner.meta |= {k: node.meta.get(k) for k in ("stack_trace", "nn_module_stack")}
        self._inline(node, block, tensors)

    def _inline(self, node: Any, block: Any, arguments: Sequence[Any]) -> None:
        """Computes a graph in place of a node; what it changes in its arguments stays changed."""
        places = [inner for inner in block.graph.nodes if inner.op == "placeholder"]
        for place, argument in zip(places, arguments, strict=True):
            self.views[place] = (argument, _same)
        outer, self._module = self._module, block
        results = self.run(block.graph.nodes, depth=sys.maxsize)
        self._module = outer
        output = next(inner for inner in block.graph.nodes if inner.op == "output").args[0]
        if isinstance(output, torch.fx.Node):
            self.views[node] = (output, _same)
        else:
            self.values[node] = results

    def _arguments(self, arguments: Any, read: Callable[[Any], Any] | None = None) -> Any:
        """Returns arguments with the values of nodes, and with dtypes of JAX."""

        def convert(value: Any) -> Any:
            if isinstance(value, torch.fx.Node):
                return (read or self.read)(value)
            return to_dtype(value) if isinstance(value, torch.dtype) else value

        return map_aggregate(arguments, convert)


def _same(base: Any) -> Any:
    return base


def _stop_gradient(value: Any) -> Any:
    return jax.lax.stop_gradient(value) if isinstance(value, jax.Array) else value


def _storage(node: Any) -> Any:
    """Returns what identifies the memory of a node's tensor, or of its first one."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) else value
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def to_dtype(dtype: torch.dtype) -> Any:
    """Returns JAX's dtype."""
    return jax.dtypes.canonicalize_dtype(jnp.dtype(str(dtype).removeprefix("torch.")))


def to_array(tensor: torch.Tensor) -> jax.Array:
    """Returns a copy of a tensor."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not have
        return jnp.asarray(tensor.float().numpy(), jnp.bfloat16)
    return jnp.array(tensor.numpy(), to_dtype(tensor.dtype))
