"""The usual differences between a PyTorch module and its port, as changes of the module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from jaxtrain.inspect._torch_calls import ARGUMENTS, Change, Site

# By name: the function with the defaults of JAX, and what to write in JAX.
_ACTIVATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "no activation": (lambda x: x, "no activation"),
    "relu": (F.relu, "jax.nn.relu(x)"),
    "gelu": (F.gelu, "jax.nn.gelu(x, approximate=False)"),
    "approximate gelu": (
        lambda x: F.gelu(x, approximate="tanh"),
        "jax.nn.gelu(x, approximate=True)",
    ),
    "silu": (F.silu, "jax.nn.silu(x)"),
    "leaky_relu": (F.leaky_relu, "jax.nn.leaky_relu(x, {0:g})"),
    "elu": (F.elu, "jax.nn.elu(x, {0:g})"),
    "tanh": (torch.tanh, "jnp.tanh(x)"),
    "sigmoid": (torch.sigmoid, "jax.nn.sigmoid(x)"),
    "softplus": (F.softplus, "jax.nn.softplus({0:g} * x) / {0:g}"),
    "relu6": (F.relu6, "jax.nn.relu6(x)"),
    "hardswish": (F.hardswish, "jax.nn.hard_swish(x)"),
    "softmax": (lambda x: F.softmax(x, -1), "jax.nn.softmax(x, axis={0})"),
    "log_softmax": (lambda x: F.log_softmax(x, -1), "jax.nn.log_softmax(x, axis={0})"),
}
# Their arguments, with the defaults of JAX.
_OPTIONS: dict[str, tuple[str, float]] = {
    "leaky_relu": ("negative_slope", 0.01),
    "elu": ("alpha", 1.0),
    "softplus": ("beta", 1.0),
    "softmax": ("dim", -1),
    "log_softmax": ("dim", -1),
}
# Of norms without a layer whose settings are known.
_EPSILONS = (1e-6, 1e-5, 1e-3, 1e-12, 1e-8)


def other_numbers(
    site: Site, arguments: Mapping[str, Any], settings: Mapping[str, float], layer: Any
) -> Iterator[Change]:
    """Yields the numbers of a norm that the model's layer has otherwise.

    Args:
      site: the call.
      arguments: its arguments.
      settings: numbers of the model's layer, by the names of its framework.
      layer: the layer in PyTorch.
    """
    if site.function not in ARGUMENTS or not site.function.endswith("_norm"):
        return
    if (eps := settings.get("epsilon", settings.get("eps"))) is not None:
        yield from _epsilon(site, arguments, eps)
    is_tracked = site.function == "batch_norm" and arguments.get("running_mean") is not None
    if not is_tracked or "momentum" not in settings:
        return
    number, momentum = arguments.get("momentum", 0.1), 1 - settings["momentum"]
    is_cumulative = getattr(layer, "momentum", 0) is None
    if is_cumulative or not math.isclose(momentum, number, rel_tol=1e-3):
        theirs = "a cumulative average (momentum=None)" if is_cumulative else f"{number:g}"
        fix = f"{{layer}}(momentum={1 - number:g})"
        fix = "a layer that averages all batches equally" if is_cumulative else fix
        ours = f"{momentum:g} (momentum={1 - momentum:g} in JAX)"
        yield _change("momentum", site, theirs, ours, fix, _replace(momentum=momentum))


def in_evaluation(site: Site, arguments: Mapping[str, Any]) -> Iterator[Change]:
    """Yields what a model may do differently in a call, as far as evaluation shows it.

    Args:
      site: the call.
      arguments: its arguments.
    """
    name, is_causal = site.function.removesuffix("_"), arguments.get("is_causal", False)
    is_known = name in ARGUMENTS
    if is_known and (name.startswith("conv") or "pool" in name):
        yield from _windows(site, arguments)
    if is_known and name.endswith("_norm"):
        for eps in _EPSILONS:
            yield from _epsilon(site, arguments, eps)
    if is_known and (name.startswith("conv") or name == "linear"):
        weight = arguments["weight"]
        if arguments.get("bias") is not None:
            fix = "{layer}(..., use_bias=True)"
            yield _change("bias", site, "a bias", "no bias", fix, _replace(bias=None))
        if name == "linear" and weight.shape[0] == weight.shape[1]:
            fix = "x @ weight.T, or {layer}, with its kernel"
            yield _change("weight layout", site, "x @ weight.T", "x @ weight", fix, _transposed)
    if name == "gelu" and arguments.get("approximate", "none") != "none":
        name = "approximate gelu"
    if name in _ACTIVATIONS or name == "outputs":
        theirs, fix = _activation(name, arguments)
        for other, (function, _) in _ACTIVATIONS.items():
            ours = _activation(other, {})[0]
            if ours != theirs and (name, other) != ("outputs", "no activation"):
                yield _change("activation", site, theirs, ours, fix, _instead(function))
    if name == "masked_fill" or arguments.get("attn_mask") is not None or is_causal:
        change = _replace(attn_mask=None, is_causal=False)
        change = _instead(lambda x: x) if name == "masked_fill" else change
        yield _change("mask", site, "a mask", "no mask", "the mask of the attention", change)
    if name in ("var", "std"):
        fix = f"jnp.{name}(x, ddof=1)"
        yield _change("variance", site, "divided by n - 1", "divided by n", fix, _biased(name))
    if name in ("flatten", "view", "reshape") and isinstance(arguments["input"], torch.Tensor):
        yield from _flattened(site, arguments["input"].shape)


def in_training(site: Site, arguments: Mapping[str, Any]) -> Iterator[Change]:
    """Yields what a model may do differently in a call, as far as only training shows it."""
    if site.function != "batch_norm" or arguments.get("running_mean") is None:
        return
    mode = "batch norm in training", site, "statistics of the batch"
    fix = "{layer} in training mode, such as use_running_average=not train"
    yield _change(*mode, "running statistics", fix, _replace(training=False))
    note = "the running variance of batch norm is the biased one, as in Flax and Equinox"
    convention = _change("running variance", site, "unbiased", note, "", _biased_running)
    yield convention._replace(is_convention=True)


def joined(changes: Sequence[Change]) -> Iterator[Change]:
    """Yields changes, and those that make the same change in several calls at once."""
    yield from changes
    groups: dict[Any, list[Change]] = {}
    for change in changes:
        (site,) = change.calls
        groups.setdefault((change.kind, site.function, change.ours), []).append(change)
    for group in groups.values():
        if len(group) > 1:
            parts = [(x.theirs, x.fix, x.calls) for x in group]
            theirs, fix, calls = (
                {key: value for part in column for key, value in part.items()}
                for column in zip(*parts, strict=True)
            )
            yield group[0]._replace(theirs=theirs, fix=fix, calls=calls)


def with_bias(layer: str, size: int) -> Change:
    """Returns the change of a layer without a bias to one with a bias of 0."""

    def change(module: Any) -> None:
        found = module.get_submodule(layer)
        found.bias = torch.nn.Parameter(torch.zeros(size, dtype=found.weight.dtype))

    site = Site(layer, "bias", 0)
    fix = "{layer}(..., use_bias=False)"
    return Change("bias", {site: "no bias"}, "a bias", {site: fix}, {}, change)


def one_bias(names: Sequence[str]) -> Change:
    """Returns the change of recurrent layers to one trained bias, where PyTorch has two."""

    def change(module: Any) -> None:
        for name in names:
            module.get_parameter(name).requires_grad_(False)

    note = "recurrent layers have two biases in PyTorch, whose sum moves twice as far per step"
    return Change("biases", {}, note, {}, {}, change, is_convention=True)


def unfrozen() -> Change:
    """Returns the change of a module to one whose parameters are all trained."""

    def change(module: Any) -> None:
        module.requires_grad_(True)

    site = Site("", "parameters", 0)
    fix = "optax.partition with optax.set_to_zero for the frozen parameters"
    theirs = "parameters with requires_grad=False"
    return Change("frozen", {site: theirs}, "trained ones", {site: fix}, {}, change)


def _activation(name: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Returns a function with its argument, if it is not JAX's default, and what to write."""
    fix = _ACTIVATIONS.get(name, (None, "the outputs without it"))[1]
    if name not in _OPTIONS:
        return name, fix
    option, default = _OPTIONS[name]
    value = arguments.get(option)
    if value is None or (option == "dim" and value == arguments["input"].dim() - 1):
        value = default
    return name if value == default else f"{name} with {option}={value:g}", fix.format(value)


def _epsilon(site: Site, arguments: Mapping[str, Any], eps: float) -> Iterator[Change]:
    """Yields the change of a norm to another epsilon, if it is another."""
    theirs = arguments.get("eps", None if site.function == "rms_norm" else 1e-5)
    theirs = torch.finfo(arguments["input"].dtype).eps if theirs is None else theirs
    if not math.isclose(eps, theirs, rel_tol=1e-3):
        fix = f"{{layer}}({{eps}}={theirs:g})"
        yield _change("epsilon", site, f"{theirs:g}", f"{eps:g}", fix, _replace(eps=eps))


def _change(
    kind: str, site: Site, theirs: str, ours: str, fix: str, call: Callable[[Any], Any]
) -> Change:
    return Change(kind, {site: theirs}, ours, {site: fix}, {site: call})


def _replace(**values: Any) -> Callable[[Any], Any]:
    """Returns a change of some arguments."""
    return lambda inner: lambda *args, **kwargs: inner(*args, **{**kwargs, **values})


def _transposed(inner: Any) -> Any:
    return lambda **kwargs: inner(**{**kwargs, "weight": kwargs["weight"].T})


def _instead(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a change to another function of the first argument."""

    def change(inner: Any) -> Any:
        return lambda *args, **kwargs: function(args[0] if args else kwargs["input"])

    return change


def _windows(site: Site, arguments: Mapping[str, Any]) -> Iterator[Change]:
    """Yields other paddings, strides and kinds of convolutions and pooling."""
    name = site.function
    axes = int(name[-2])
    is_max, kernel = name.startswith("max"), arguments.get("kernel_size")
    shape = tuple(arguments["input"].shape[-axes:])
    weight = arguments.get("weight")
    size = _tuple(kernel if weight is None else tuple(weight.shape[2:]), axes)
    dilation = _tuple(arguments.get("dilation", 1), axes)
    stride = arguments.get("stride")
    strides = _tuple((1 if weight is not None else kernel) if stride is None else stride, axes)
    reach = [(k - 1) * d for k, d in zip(size, dilation, strict=True)]
    given = arguments.get("padding", 0)
    own = [(r // 2, r - r // 2) for r in reach] if given == "same" else None
    own = own or [(p, p) for p in _tuple(0 if given == "valid" else given, axes)]
    totals = [
        max((math.ceil(n / s) - 1) * s + r + 1 - n, 0)
        for n, s, r in zip(shape, strides, reach, strict=True)
    ]
    known = [own]
    for ours, pads in (
        ('"SAME"', [(t // 2, t - t // 2) for t in totals]),
        ("0", [(0, 0)] * axes),
        ("1", [(1, 1)] * axes),
        ("half of the kernel", [(r // 2, r // 2) for r in reach]),
    ):
        if pads not in known:
            known.append(pads)
            theirs = _short([a if a == b else (a, b) for a, b in own])
            call = _padded(pads, -math.inf if is_max else 0.0)
            fix = f"{{layer}}(..., padding={theirs})"
            yield _change("padding", site, theirs, ours, fix, call)
    if weight is None:
        window = f"{'max' if is_max else 'avg'}_pool"
        fix = f"{window} with a stride of {_short(strides)}"
        if set(strides) != {1}:
            yield _change("stride", site, _short(strides), "1", fix, _replace(stride=1))
        other = getattr(F, name.replace("max", "avg") if is_max else name.replace("avg", "max"))
        options = {"kernel_size": size, "stride": strides, "padding": _tuple(given, axes)}
        change = _instead(lambda x: other(x, **options))
        yield _change("pooling", site, window, f"{other.__name__[:3]}_pool", window, change)
        if not is_max and any(_tuple(given, axes)):
            counted = arguments.get("count_include_pad", True)
            theirs, ours = (f"count_include_pad={x}" for x in (counted, not counted))
            call = _replace(count_include_pad=not counted)
            yield _change("padding", site, theirs, ours, f"avg_pool(..., {theirs})", call)


def _padded(pads: Sequence[tuple[int, int]], value: float) -> Callable[[Any], Any]:
    """Returns a change to another padding."""
    flat = [x for pair in reversed(pads) for x in pair]

    def change(inner: Any) -> Any:
        def call(**kwargs: Any) -> Any:
            padded = F.pad(kwargs["input"], flat, value=value)
            return inner(**{**kwargs, "input": padded, "padding": 0})

        return call

    return change


def _flattened(site: Site, shape: Sequence[int]) -> Iterator[Change]:
    """Yields other orders of the axes that a call flattens behind the batch."""
    if not 2 < len(shape) < 6:
        return
    axes = "chw" if len(shape) == 4 else "abcd"[: len(shape) - 1]
    fix = "x.transpose(0, 3, 1, 2).reshape(len(x), -1)" if len(shape) == 4 else "PyTorch's order"
    for order in itertools.islice(itertools.permutations(range(1, len(shape))), 1, None):

        def change(inner: Any, order: Sequence[int] = order) -> Any:
            def call(x: Any, *args: Any, **kwargs: Any) -> Any:
                outputs = inner(x, *args, **kwargs)
                moved = x.permute(0, *order) if outputs.dim() == 2 else x
                return moved.reshape(outputs.shape)

            return call

        ours = ", ".join(axes[i - 1] for i in order)
        yield _change("flatten order", site, ", ".join(axes), ours, fix, change)


def _biased(name: str) -> Callable[[Any], Any]:
    """Returns a change to variances, or their roots, that are divided by n."""

    def change(inner: Any) -> Any:
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = inner(x, *args, **kwargs)
            n = x.numel() // outputs.numel()
            return outputs * ((n - 1) / n) ** (0.5 if name == "std" else 1.0)

        return call

    return change


def _biased_running(inner: Any) -> Any:
    """Returns batch norm that adds the biased variance to the running one."""

    def call(**kwargs: Any) -> Any:
        running, x = kwargs["running_var"], kwargs["input"]
        updated = running.clone()  # the original must not change before the backward pass
        outputs = inner(**{**kwargs, "running_var": updated})
        if kwargs.get("training"):
            n = x.numel() // x.shape[1]
            added = updated - running * (1 - kwargs["momentum"])
            running.copy_(updated - added / n)
        return outputs

    return call


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    return (
        tuple(value)
        if isinstance(value, Sequence) and len(value) == axes
        else ((value[0] if isinstance(value, Sequence) else value,) * axes)
    )


def _short(values: Sequence[Any]) -> str:
    """Returns one value for equal ones, else all of them."""
    return str(values[0]) if len(set(values)) == 1 else str(list(values))
