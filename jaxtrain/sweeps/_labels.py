"""Labels: the values of an axis as short texts, also those of functions and modules."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

_LONGEST = 40  # characters of a value's representation


def is_plain(value: Any) -> bool:
    """Returns whether JSON has a value: a finite number, a string, None, or a tuple of those."""
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (bool, int, str))


def make_labels(values: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the values of an axis as texts, which differ for different objects.

    A function has its name. An object has its class, with the fields in which it differs from the
    others of its class; those that still look the same are numbered.
    """
    texts = [_label(value, values) for value in values]
    objects: dict[str, list[int]] = collections.defaultdict(list)  # the ids, by text
    for text, value in zip(texts, values, strict=True):
        if not is_plain(value) and id(value) not in objects[text]:
            objects[text].append(id(value))
    return tuple(
        f"{text} {1 + objects[text].index(id(value))}" if len(objects[text]) > 1 else text
        for text, value in zip(texts, values, strict=True)
    )


def _label(value: Any, values: tuple[Any, ...]) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if is_plain(value):
        return str(value)
    if isinstance(value, functools.partial):
        options = [*map(repr, value.args), *(f"{n}={v!r}" for n, v in value.keywords.items())]
        return f"{_label(value.func, values)}({', '.join(options)})"
    if hasattr(value, "__name__"):
        return str(value.__name__)
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    shown = []
    for field in fields:
        same_class = (each for each in values if type(each) is type(value))
        texts = {repr(getattr(each, field.name, None)) for each in same_class}
        own = repr(getattr(value, field.name, None))
        if field.repr and len(texts) > 1 and _is_short(own):
            shown.append(f"{field.name}={own}")
    text = "" if fields else repr(value)
    if text and _is_short(text):
        return text
    return type(value).__name__ + (f"({', '.join(shown)})" if shown else "")


def _is_short(text: str) -> bool:
    return len(text) <= _LONGEST and "\n" not in text and " at 0x" not in text
