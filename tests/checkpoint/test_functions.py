"""Digests of functions: what changes them, and what does not."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxtrain.checkpoint import describe_function

ROOT = Path(__file__).parents[2]

IMPORTS = """
import dataclasses, functools, math
import jax, numpy as np
from beartype import beartype
"""

# Definitions of `function`, with the part that is replaced.
DIFFERENT = {
    "constant": ("function = lambda each, rng: each + 1", "1", "2"),
    "type of a constant": ("function = lambda each, rng: each + 1", "1", "1.0"),
    "operator": ("function = lambda each, rng: each + 1", "+", "-"),
    "order of arguments": ("def function(each, rng): return each", "each, rng", "rng, each"),
    "kind of arguments": ("def function(each, *rng): return each", "*rng", "**rng"),
    "argument by keyword": ("def function(each, rng): return each", ", rng", ", *, rng"),
    "range of a try": (
        """
def function(each, rng):
    try:
        each.a
    except KeyError:
        each.c
    else:
        each.b
""",
        "    except KeyError:\n        each.c\n    else:\n        each.b",
        "        each.b\n    except KeyError:\n        each.c",
    ),
    "attribute": ("def function(each, rng): return each.min()", "min", "max"),
    "local function": (
        """
def function(each, rng):
    def inner(): return each + 1
    return inner()
""",
        "1",
        "2",
    ),
    "set of constants": ("def function(each, rng): return each in {'a', 'b'}", "'b'", "'c'"),
    "default": ("def function(each, rng, size=1): return each", "1", "2"),
    "keyword default": ("def function(each, rng, *, size=1): return each", "1", "2"),
    "captured number": (
        """
def make(size): return lambda each, rng: each + size
function = make(1)
""",
        "make(1)",
        "make(2)",
    ),
    "captured array": (
        """
def make(size): return lambda each, rng: each + size
function = make(np.arange(5000))
""",
        "np.arange(5000)",
        "np.arange(5000)[::-1]",
    ),
    "captured array of JAX": (
        """
def make(size): return lambda each, rng: each + size
function = make(jax.numpy.arange(5000))
""",
        "jax.numpy.arange(5000)",
        "jax.numpy.arange(5000).at[2000].set(0)",
    ),
    "captured objects": (
        """
def make(sizes): return lambda each, rng: each + sizes[0]
function = make(np.array([1, 'a'], object))
""",
        "'a'",
        "'b'",
    ),
    "global number": ("SIZE = 1\ndef function(each, rng): return SIZE", "1", "2"),
    "global tuple": ("SIZE = (1, ('a',))\ndef function(each, rng): return SIZE", "'a'", "'b'"),
    "global array": (
        "SIZE = np.arange(2)\ndef function(each, rng): return SIZE",
        "arange(2)",
        "arange(3)",
    ),
    "global of a local function": (
        "SIZE = 1\ndef function(each, rng): return [SIZE for _ in each]",
        "1",
        "2",
    ),
    "global function": (
        """
SIZE = 1
def inner(): return SIZE
def outer(): return inner()
def function(each, rng): return outer()
""",
        "1",
        "2",
    ),
    "jitted global function": (
        """
@jax.jit
def inner(each): return each + 1
def function(each, rng): return inner(each)
""",
        "1",
        "2",
    ),
    "bound argument": (
        "def shift(size, each, rng): return each\nfunction = functools.partial(shift, .1)",
        ".1",
        ".3",
    ),
    "bound keyword": (
        "def shift(each, rng, size): return each\nfunction = functools.partial(shift, size=.1)",
        ".1",
        ".3",
    ),
    "bound function": (
        "def shift(each, rng, f): return each\n"
        "function = functools.partial(shift, f=[lambda: 1, math.sin])",
        "1",
        "2",
    ),
    "bound function in C": (
        "def shift(each, rng, f): return each\nfunction = functools.partial(shift, f=math.sin)",
        "sin",
        "cos",
    ),
    "bound type": (
        "def shift(each, rng, f): return each\nfunction = functools.partial(shift, f=int)",
        "int",
        "float",
    ),
    "bound method in C": (
        "def shift(each, rng, f): return each\nfunction = functools.partial(shift, f={1: 2}.get)",
        "2",
        "3",
    ),
    "order of a dict": (
        "def shift(each, rng, d): return each\n"
        "function = functools.partial(shift, d={'a': 1, 'b': 1})",
        "'a': 1, 'b': 1",
        "'b': 1, 'a': 1",
    ),
    "partial of a partial": (
        "def shift(each, rng, d): return each\n"
        "function = functools.partial(dict(f=functools.partial(shift, d=1))['f'])",
        "1",
        "2",
    ),
    "function in a decorator": (
        """
def double(f):
    @functools.wraps(f)
    def doubled(each, rng): return 2 * f(each, rng)
    return doubled
@double
def function(each, rng): return each + 1
""",
        "1",
        "3",
    ),
    "decorator": (
        """
def double(f):
    @functools.wraps(f)
    def doubled(each, rng): return 2 * f(each, rng)
    return doubled
@beartype
@double
def function(each, rng): return each + 1
""",
        "2",
        "3",
    ),
    "checked function": (
        "@beartype\ndef function(each: np.ndarray, rng: object): return 1",
        "1",
        "2",
    ),
    "jitted function": ("function = jax.jit(lambda each, rng: each + 1)", "1", "2"),
}

CLASS = """
@dataclasses.dataclass
class Shift:
    size: float
    table: object = dataclasses.field(repr=False, default=None)
    offset = 10
    def __call__(self, each, rng): return self.moved(each) + 20 + self.made(each, rng)
    def moved(self, each): return each + self.size * self.limit
    @property
    def limit(self): return 30
    @staticmethod
    def scaled(each, rng): return 40
    @classmethod
    def made(cls, each, rng): return 50

class Plain:
    def __init__(self, size): self.size = size
    def __repr__(self): return "Plain"
    def __call__(self, each, rng): return self.size
    def apply(self, each, rng): return self.size

@dataclasses.dataclass
class Options:
    size: object = dataclasses.field(repr=False)

class Slots:
    __slots__ = ("size",)
    def __init__(self, size): self.size = size
    def __call__(self, each, rng): return self.size

class Config:
    def __init__(self, size): self.size = size

class Steps(list):
    def __call__(self, each, rng): return 60

class Wrapper(Plain):
    def __init__(self, f, size):
        functools.update_wrapper(self, f)
        self.size = size

"""
OBJECTS = {
    "field": ("function = Shift(0.1)", "0.1", "0.3"),
    "field that repr omits": ("function = Shift(0.1, [1])", "[1]", "[2]"),
    "class attribute": ("function = Shift(0.1)", "10", "11"),
    "__call__": ("function = Shift(0.1)", "20", "21"),
    "other method": ("function = Shift(0.1)", "self.size *", "self.size /"),
    "property": ("function = Shift(0.1)", "30", "31"),
    "static method": ("function = Shift.scaled", "40", "41"),
    "class method": ("function = Shift.made", "50", "51"),
    "attribute": ("function = Plain(0.1)", "0.1", "0.3"),
    "slot": ("function = Slots(0.1)", "0.1", "0.3"),
    "method's instance": ("function = Plain(0.1).apply", "0.1", "0.3"),
    "bound object": ("function = functools.partial(len, Config(0.1))", "0.1", "0.3"),
    "bound dataclass": ("function = functools.partial(len, Options(0.1))", "0.1", "0.3"),
    "class method that it calls": ("function = Shift(0.1)", "50", "51"),
    "list": ("function = Steps([1])", "[1]", "[2]"),
    "list's __call__": ("function = Steps([1])", "60", "61"),
    "wrapper's attribute": ("function = Wrapper(len, 0.1)", "0.1", "0.3"),
}
DIFFERENT |= {
    f"object's {name}": (CLASS + text, old, new) for name, (text, old, new) in OBJECTS.items()
}

SAME = {
    "comment": ("def function(each, rng):\n    return 1", "return 1", "# one\n    return 1"),
    "docstring": ("def function(each, rng):\n    'One.'\n    return 1", "One", "Two"),
    "new docstring": ("def function(each, rng):\n    return 1", "return 1", "'One.'\n    return 1"),
    "other global": ("SIZE = 1\ndef function(each, rng): return each", "1", "2"),
    "attribute with the name of a global": (
        "SIZE = 1\ndef function(each, rng): return each.SIZE",
        "1",
        "2",
    ),
    "mutable global": ("SIZES = [1]\ndef function(each, rng): return SIZES", "1", "2"),
    "function of another module": (
        """
def inner(): return 1
inner.__module__ = "other"
def function(each, rng): return inner()
""",
        "1",
        "2",
    ),
    "order of keywords": (
        "def shift(each, rng, a, b): return each\nfunction = functools.partial(shift, a=1, b=2)",
        "a=1, b=2",
        "b=2, a=1",
    ),
    "order of attributes": (
        CLASS + "function = Plain(1); function.a = 2; function.b = 3",
        "function.a = 2; function.b = 3",
        "function.b = 3; function.a = 2",
    ),
}


def define(text: str, file: str = "one.py") -> Any:
    namespace: dict[str, Any] = {"__name__": "a_module"}
    exec(compile(IMPORTS + text, file, "exec", dont_inherit=True), namespace)
    return namespace["function"]


@pytest.mark.parametrize(("text", "old", "new"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_it_computes_changes_the_digest(text: str, old: str, new: str) -> None:
    assert text.count(old) >= 1
    before = describe_function(define(text))
    assert before == describe_function(define(text))
    # Of two occurrences, the last is the value.
    assert before != describe_function(define(new.join(text.rsplit(old, 1))))


@pytest.mark.parametrize(("text", "old", "new"), SAME.values(), ids=SAME)
def test_what_it_does_not_compute_leaves_the_digest(text: str, old: str, new: str) -> None:
    assert old in text
    changed = new.join(text.rsplit(old, 1))
    assert describe_function(define(text)) == describe_function(define(changed))


@pytest.mark.parametrize("text", [text for text, _, _ in DIFFERENT.values()], ids=DIFFERENT)
def test_the_place_in_a_file_leaves_the_digest(text: str) -> None:
    moved = define("# moved\n\n\nother = lambda: 3\n" + text, "elsewhere/two.py")
    assert describe_function(define(text)) == describe_function(moved)


def test_another_process_has_the_same_digests() -> None:
    """Among others of objects and of sets, whose `repr` depends on the process."""
    program = """
import sys
from tests.checkpoint.test_functions import CLASS, DIFFERENT, define
from jaxtrain.checkpoint import describe_function
for text, _, _ in DIFFERENT.values():
    print(describe_function(define(text)))
for value in ("{'a', 'b', 'c', ('d',)}", "object()", "np.random.default_rng(0)", "iter([])"):
    print(describe_function(define(f"function = functools.partial(len, {value})")))
"""
    results = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    assert results[0] == results[1]
    assert len(results[0]) == len(DIFFERENT) + 4
    ours = [describe_function(define(text)) for text, _, _ in DIFFERENT.values()]
    assert results[0][: len(ours)] == ours


@pytest.mark.parametrize(
    "text",
    [
        "def function(each, rng): return function(each, rng) + 1",
        "def other(): return function() + 1\ndef function(): return other()",
        "steps = [1]; steps.append(steps); function = functools.partial(len, steps)",
        CLASS + "function = Plain(1); function.own = function.apply",
        CLASS + "function = Plain(1); function.own = function",
    ],
)
def test_a_value_may_contain_itself(text: str) -> None:
    assert describe_function(define(text)) == describe_function(define(text))
    changed = "2".join(text.rsplit("1", 1))
    assert describe_function(define(text)) != describe_function(define(changed))


def test_a_captured_variable_may_have_no_value_yet() -> None:
    def function() -> Any:
        return later

    assert function.__closure__ == (types.CellType(),)
    before = describe_function(function)
    later = 1
    assert describe_function(function) != before
    assert before.startswith("function (")


def test_functions_that_share_others_are_described_once() -> None:
    """Otherwise the time would double with each of them."""
    lines = ["def f0(): return 1"]
    lines += [f"def f{i}(): return f{i - 1}() + f{i - 1}()" for i in range(1, 60)]
    assert describe_function(define("\n".join([*lines, "function = f59"]))).startswith("f59 (")
