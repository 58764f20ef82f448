"""The functions of PyTorch that drop elements."""

from __future__ import annotations

from typing import Any

_DROPOUT = {
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
    *("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"),
}
# Where functions have the rate: position and name.
_RATES: dict[str, tuple[int, str]] = {
    **dict.fromkeys(_DROPOUT, (1, "p")),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (5, "dropout")),
    "multi_head_attention_forward": (10, "dropout_p"),
    "scaled_dot_product_attention": (4, "dropout_p"),
}


def dropout_rate(function: Any, args: Any, kwargs: Any) -> float:
    """Returns the rate with which a call of a function drops elements in training."""
    position, name = _RATES.get(getattr(function, "__name__", ""), (0, ""))
    default = 0.5 if name == "p" else 0.0
    return (args[position] if len(args) > position else kwargs.get(name, default)) if name else 0.0


def call_without_dropout(function: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function of PyTorch without dropout."""
    name = getattr(function, "__name__", "")
    if name in _DROPOUT:
        return args[0] if args else kwargs["input"]
    if name in _RATES:
        position, argument = _RATES[name]
        if len(args) > position:
            args = (*args[:position], 0.0, *args[position + 1 :])
        else:
            kwargs = {**kwargs, argument: 0.0}
    return function(*args, **kwargs)
