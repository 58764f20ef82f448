"""The functions of PyTorch that drop elements."""

from __future__ import annotations

from typing import Any, NamedTuple


class _Arguments(NamedTuple):
    """Where a function has its rate and its mode; `training` is None without a mode."""

    position: int
    rate: str
    training: int | None


_DROPOUT = {
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
    *("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"),
}
_RATES: dict[str, _Arguments] = {
    **dict.fromkeys(_DROPOUT, _Arguments(1, "p", 2)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _Arguments(5, "dropout", 6)),
    "multi_head_attention_forward": _Arguments(10, "dropout_p", 13),
    "scaled_dot_product_attention": _Arguments(4, "dropout_p", None),
}


def dropout_rate(function: Any, args: Any, kwargs: Any) -> float:
    """Returns the rate with which a call of a function drops elements."""
    name = getattr(function, "__name__", "")
    found = _arguments(name, args)
    if found is None:
        return 0.0
    training = kwargs.get("training", kwargs.get("train", "alpha" not in name))
    if found.training is not None and len(args) > found.training:
        training = args[found.training]
    default = 0.5 if found.rate == "p" else 0.0
    rate = args[found.position] if len(args) > found.position else kwargs.get(found.rate, default)
    return rate if training else 0.0


def call_without_dropout(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function of PyTorch without dropout."""
    name = getattr(function, "__name__", "")
    if name in _DROPOUT:
        return args[0] if args else kwargs["input"]
    if found := _arguments(name, args):
        if len(args) > found.position:
            args = (*args[: found.position], 0.0, *args[found.position + 1 :])
        else:
            kwargs = {**kwargs, found.rate: 0.0}
    return function(*args, **kwargs)


def dropping_nothing() -> Any:
    """Returns a mode of PyTorch in which no function drops elements."""
    from torch.overrides import TorchFunctionMode

    class DroppingNothing(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return call_without_dropout(function, args, kwargs or {})

    return DroppingNothing()


def _arguments(name: str, args: Any) -> _Arguments | None:
    found = _RATES.get(name)
    # A packed sequence has its batch sizes as a further argument, before the list of weights.
    if found and found.rate == "dropout" and len(args) > 3 and isinstance(args[3], list | tuple):
        return found._replace(position=found.position + 1, training=(found.training or 0) + 1)
    return found
