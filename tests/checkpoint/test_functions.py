"""Digests of functions: what changes them, and what does not."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.checkpoint import describe_function

ROOT = Path(__file__).parents[2]

IMPORTS = """
import dataclasses, functools, math, re
import jax, numpy as np
from beartype import beartype
"""
MAKE = "def make(size): return lambda each, rng: each + size\n"
SHIFT = "def shift(each, rng, size): return each\n"
TRY = """
def function(each, rng):
    try:
        each.a
    except KeyError:
        each.c
    else:
        each.b
"""
DECORATED = """
def double(f):
    @functools.wraps(f)
    def doubled(each, rng): return 2 * f(each, rng)
    return doubled
@beartype
@double
def function(each, rng): return each + 1
"""
CLASSES = """
@dataclasses.dataclass
class Shift:
    size: float
    table: object = dataclasses.field(repr=False, default=None)
    def __call__(self, each, rng): return self.moved(each) + 20
    def moved(self, each): return each + self.size * 30
    @staticmethod
    def scaled(each, rng): return 40
    @property
    def offset(self): return 50
    @functools.cached_property
    def squared(self): return self.size ** 2

class Inherited(Shift):
    pass

class Plain:
    def __init__(self, size): self.size = size
    def __repr__(self): return "Plain"
    def apply(self, each, rng): return self.size

class Slots:
    __slots__ = ("size",)
    def __init__(self, size): self.size = size
    def __call__(self, each, rng): return self.size

class Config:
    def __init__(self, size): self.size = size
"""

# Definitions of `function`, with the part that is replaced.
DIFFERENT = {
    "constant": ("function = lambda each, rng: each + 1", "1", "2"),
    "operator": ("function = lambda each, rng: each + 1", "+", "-"),
    "kind of arguments": ("def function(each, *rng): return each", "*rng", "**rng"),
    "range of a try": (
        TRY,
        "    except KeyError:\n        each.c\n    else:\n        each.b",
        "        each.b\n    except KeyError:\n        each.c",
    ),
    "local function": ("def function(each, rng): return [e + 1 for e in each]", "1", "2"),
    "default": ("def function(each, rng, size=1): return each", "1", "2"),
    "captured number": (MAKE + "function = make(1)", "make(1)", "make(2)"),
    "captured array": (MAKE + "function = make(np.arange(5000))", "5000)", "5000)[::-1]"),
    "global number": ("SIZE = 1\ndef function(each, rng): return SIZE", "1", "2"),
    "global array": ("SIZE = np.ones(2)\ndef function(each, rng): return SIZE", "(2)", "(3)"),
    "global function": (
        "SIZE = 1\ndef inner(): return SIZE\ndef function(each, rng): return inner()",
        "1",
        "2",
    ),
    "bound argument": (SHIFT + "function = functools.partial(shift, .1)", ".1", ".3"),
    "bound functions": (
        SHIFT + "function = functools.partial(shift, size=[lambda: 1, math.sin])",
        "1, math.sin",
        "1, math.cos",
    ),
    "decorator": (DECORATED, "2", "3"),
    "jitted function": ("function = jax.jit(lambda each, rng: each + 1)", "1", "2"),
    "field": (CLASSES + "function = Shift(0.1)", "0.1", "0.3"),
    "field that repr omits": (CLASSES + "function = Shift(0.1, [1])", "[1]", "[2]"),
    "call": (CLASSES + "function = Shift(0.1)", "20", "21"),
    "method": (CLASSES + "function = Shift(0.1)", "30", "31"),
    "property": (CLASSES + "function = Shift(0.1)", "50", "51"),
    "captured strings": (
        MAKE + "function = make(np.array(['a', None], object))",
        "'a', None",
        "'b', None",
    ),
    "static method": (CLASSES + "function = Shift.scaled", "40", "41"),
    "slot": (CLASSES + "function = Slots(0.1)", "0.1", "0.3"),
    "instance of a method": (CLASSES + "function = Plain(0.1).apply", "0.1", "0.3"),
    "bound object": (CLASSES + "function = functools.partial(len, Config(0.1))", "0.1", "0.3"),
    "bound object that shows no field": (
        CLASSES + "function = functools.partial(len, Plain(0.1))",
        "0.1",
        "0.3",
    ),
    "bound generator": (
        "function = functools.partial(len, np.random.default_rng(0))",
        "(0)",
        "(1)",
    ),
    "bound pattern": ("function = functools.partial(len, re.compile('a'))", "'a'", "'b'"),
    "itself": ("def function(each, rng): return function(each, rng) + 1", "1", "2"),
    "list with itself": (
        "x = [1]; x.append(x); function = functools.partial(len, x)",
        "[1]",
        "[2]",
    ),
}
SAME = {
    "comment": ("def function(each, rng):\n    return 1", "return 1", "# one\n    return 1"),
    "docstring": ("def function(each, rng):\n    'One.'\n    return 1", "One", "Two"),
    "new docstring": ("def function(each, rng):\n    return 1", "return 1", "'One.'\n    return 1"),
    "other global": ("SIZE = 1\ndef function(each, rng): return each.SIZE", "1", "2"),
    "mutable global": ("SIZES = [1]\ndef function(each, rng): return SIZES", "1", "2"),
    "function of another module": (
        "def inner(): return 1\ninner.__module__ = 'x'\ndef function(each, rng): return inner()",
        "1",
        "2",
    ),
    "cached property": (
        CLASSES + "function = Shift(0.1); function.squared",
        "function.squared",
        "None",
    ),
    "order of keywords": (
        "def f(each, rng, a, b): return each\nfunction = functools.partial(f, a=1, b=2)",
        "a=1, b=2",
        "b=2, a=1",
    ),
}


def define(text: str, file: str = "one.py") -> Any:
    namespace: dict[str, Any] = {"__name__": "a_module"}
    exec(compile(IMPORTS + text, file, "exec", dont_inherit=True), namespace)
    return namespace["function"]


def replace_last(text: str, old: str, new: str) -> str:
    assert old in text
    return new.join(text.rsplit(old, 1))


@pytest.mark.parametrize(("text", "old", "new"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_it_computes_changes_the_digest_and_its_place_does_not(text, old, new) -> None:
    before = describe_function(define(text))
    moved = define("# moved\n\n\nother = lambda: 3\n" + text, "elsewhere/two.py")
    assert before == describe_function(moved)
    assert before != describe_function(define(replace_last(text, old, new)))


@pytest.mark.parametrize(("text", "old", "new"), SAME.values(), ids=SAME)
def test_what_it_does_not_compute_leaves_the_digest(text: str, old: str, new: str) -> None:
    changed = define(replace_last(text, old, new))
    assert describe_function(define(text)) == describe_function(changed)


def test_another_process_has_the_same_digests() -> None:
    """Among others of objects and of sets, whose `repr` depends on the process."""
    program = """
from tests.checkpoint.test_functions import DIFFERENT, define
from jaxtrain.checkpoint import describe_function
for text, _, _ in DIFFERENT.values():
    print(describe_function(define(text)))
for value in ("{'a', 'b', 'c', ('d',)}", "object()", "np.random.default_rng(0)"):
    print(describe_function(define(f"function = functools.partial(len, {value})")))
"""
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    with contextlib.redirect_stdout(io.StringIO()) as ours:
        exec(program, {})
    assert ours.getvalue() == other
    assert other.count("\n") == len(DIFFERENT) + 3


def test_a_captured_variable_may_have_no_value_yet() -> None:
    def function() -> Any:
        return later

    before = describe_function(function)
    later = 1
    assert describe_function(function) != before
    assert before.startswith("function (")


def test_functions_that_share_others_are_described_once() -> None:
    """Otherwise the time would double with each of them."""
    lines = ["def f0(): return 1"]
    lines += [f"def f{i}(): return f{i - 1}() + f{i - 1}()" for i in range(1, 60)]
    assert describe_function(define("\n".join([*lines, "function = f59"]))).startswith("f59 (")
