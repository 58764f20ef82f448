"""reuse_freed_memory: the kernel hands out the memory of a program once, not in each call."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

import jaxtrain as jt
from jaxtrain._allocator import ENVIRONMENT

# Prints how many pages of memory the kernel hands out in a call of a function with an intermediate
# result of 49 MB, or 12,000 pages: the median of the last calls. The first ones divide the heap.
PROGRAM = """
import resource, statistics, sys
import jax, jax.numpy as jnp, jaxtrain as jt

if "call" in sys.argv and not jt.reuse_freed_memory():
    sys.exit(3)
if "undo" in sys.argv:
    jt.reuse_freed_memory(enable=False)
function = jax.jit(lambda x: jnp.tanh(x @ x.T) @ x)
x, counts = jnp.ones((3500, 8)), [0]
for _ in range(25):
    x = jax.block_until_ready(function(x))
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(after - before for before, after in zip(counts[10:], counts[11:])))
"""


def faults(*arguments: str, **environment: str) -> float:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if result.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.mark.slow
def test_calls_after_the_first_ones_ask_the_kernel_for_no_memory() -> None:
    assert faults("call") < 100
    assert faults(**ENVIRONMENT) < 100
    assert faults("call", "undo") > 10_000


def test_once_jax_runs_it_is_too_late() -> None:
    jax.devices()
    with pytest.raises(jt.errors.InputError, match=r"expected reuse_freed_memory\(\) before"):
        jt.reuse_freed_memory()
