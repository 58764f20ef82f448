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
        _read(config_type, ["--help"], show=True, description=description)
    groups = list(_groups(arguments))
    switches = _switches(config_type)
    for flag, values in groups:
        if values and flag.replace("_", "-") in switches:
            raise InputError(f"{flag} takes no value, but {values[0]!r} follows (see --help)")
    try:
        config, unknown = _read(config_type, arguments)
    except SystemExit as error:
        for flag, values in groups:  # one at a time, to find the wrong one
            try:
                _read(config_type, [flag, *values])
            except SystemExit:
                raise InputError(_describe(config_type, flag, values)) from error
        raise InputError(f"the flags cannot be read: {' '.join(arguments)} (see --help)") from error
    if unknown:
        raise InputError(_suggest(config_type, unknown[0]))
    return _expand_users(config)


def _read(
    config_type: type[Config],
    arguments: Sequence[str],
    *,
    show: bool = False,
    description: str | None = None,
) -> tuple[Config, list[str]]:
    """Returns the configuration and the arguments that no flag takes.

    Raises:
      SystemExit: a value cannot be read, or the help was printed.
    """
    import tyro  # slow to import: after signals are handled

    quiet = contextlib.nullcontext() if show else contextlib.redirect_stderr(io.StringIO())
    with quiet:
        return tyro.cli(
            config_type,
            args=arguments,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
            return_unknown_args=True,
            console_outputs=show,
        )


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each flag with its values.

    Raises:
      InputError: a value is empty, or comes before the first flag.
    """
    flag: str | None = None
    values: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument == "" or (argument.startswith("--") and equals and not value):
            name = name or flag or "an argument"
            raise InputError(f"{name} is empty; expected a value (see --help)")
        if argument.startswith("--"):
            if flag is not None:
                yield flag, values
            flag, values = name, [value] if equals else []
        elif flag is None:
            raise InputError(f"the argument {argument!r} is not a flag; expected --NAME VALUE")
        else:
            values.append(argument)
    if flag is not None:
        yield flag, values


def flag_types(config_type: type) -> dict[str, Any]:
    """Returns the type of each flag, by its name on the command line."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= flag_types(hints[field.name])
        else:
            found[f"--{field.name.replace('_', '-')}"] = hints[field.name]
    return found


def _switches(config_type: type) -> list[str]:
    """Returns the flags that take no value."""
    flags = [flag for flag, kind in flag_types(config_type).items() if kind is bool]
    return ["--help", *flags, *(f"--no-{flag[2:]}" for flag in flags)]


def _describe(config_type: type, flag: str, values: Sequence[str]) -> str:
    """Returns what is wrong with the value of a flag."""
    kind = flag_types(config_type).get(flag.replace("_", "-"))
    text = " ".join(values)
    found = f"is {text!r}" if values else "has no value"
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
    names = {int: "an integer", float: "a number", Path: "a path"}
    return names.get(kind, "another value")


def _suggest(config_type: type, argument: str) -> str:
    """Returns what is wrong with an argument that no flag takes."""
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}; expected --NAME VALUE (see --help)"
    name = argument.partition("=")[0]
    known = [*flag_types(config_type), *_switches(config_type)]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? (see --help)" if close else "see --help"
    return f"there is no flag {name}; {hint}"


def _expand_users(config: Any) -> Any:
    """Replaces a leading ~ in paths by the home folder, which no shell does in --flag=~/path."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _expand_users(value)
        elif isinstance(value, Path):
            try:
                changes[field.name] = value.expanduser()
            except RuntimeError as error:
                raise InputError(
                    f"--{field.name.replace('_', '-')} is {value}, but there is no such home "
                    "folder; expected a path"
                ) from error
    return dataclasses.replace(config, **changes)
