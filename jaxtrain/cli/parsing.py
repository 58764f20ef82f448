"""Parses the command line into a dataclass, and reports a mistake in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxtrain.errors import InputError

Config = TypeVar("Config")
_TYPE_NAMES = {int: "an integer", float: "a number", Path: "a path", bool: "no value"}


def parse(config_type: type[Config], description: str | None, arguments: Sequence[str]) -> Config:
    """Returns the configuration that the command line gives.

    Args:
      config_type: a dataclass; its fields are the flags, their docstrings the help.
      description: what `--help` prints above the flags.
      arguments: the command line without the program's name.

    Raises:
      InputError: a flag is unknown, or its value cannot be read.
      SystemExit: `--help` was printed.
    """
    if "-h" in arguments or "--help" in arguments:
        _read(config_type, ["--help"], description)
    try:
        config, unknown = _read(config_type, arguments)
    except SystemExit as error:
        for flag, values in _groups(arguments):  # one at a time, to find the wrong one
            try:
                _read(config_type, [flag, *values])
            except SystemExit:
                raise InputError(_describe(config_type, flag, values)) from error
        raise InputError(f"the flags cannot be read: {' '.join(arguments)} (see --help)") from error
    if unknown:
        raise InputError(_suggest(config_type, unknown[0]))
    return config


def _read(
    config_type: type[Config], arguments: Sequence[str], description: str | None = None
) -> tuple[Config, list[str]]:
    """Returns the configuration and the arguments that no flag takes.

    Raises:
      SystemExit: a value cannot be read, or the help was printed.
    """
    import tyro

    with contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(
            config_type,
            args=arguments,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
            return_unknown_args=True,
        )


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each flag with its values."""
    starts = [at for at, argument in enumerate(arguments) if argument.startswith("--")]
    for start, stop in zip(starts, [*starts[1:], len(arguments)], strict=True):
        flag, equals, value = arguments[start].partition("=")
        yield flag, [*([value] if equals else []), *arguments[start + 1 : stop]]


def flag_types(config_type: type) -> dict[str, Any]:
    """Returns the type of each flag, by its name on the command line."""
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    return {f"--{name.replace('_', '-')}": hints[name] for name in names}


def _describe(config_type: type, flag: str, values: Sequence[str]) -> str:
    """Returns what is wrong with the value of a flag."""
    kind = flag_types(config_type).get(flag.replace("_", "-"))
    found = f"is {' '.join(values)!r}" if values else "has no value"
    return f"{flag} {found}; expected {_describe_type(kind)} (see --help)"


def _describe_type(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [each for each in arguments if each is not types.NoneType]
        return " or ".join([*map(_describe_type, kinds), "None"])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of values, each {_describe_type(arguments[0])}"
    return _TYPE_NAMES.get(kind, "another value")


def _suggest(config_type: type, argument: str) -> str:
    """Returns what is wrong with an argument that no flag takes."""
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; expected --NAME VALUE (see --help)"
    name = argument.partition("=")[0]
    types = flag_types(config_type)
    known = [*types, *(f"--no-{flag[2:]}" for flag, kind in types.items() if kind is bool)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? (see --help)" if close else "see --help"
    return f"there is no flag {name}; {hint}"
