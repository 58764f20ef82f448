"""Where the time of T2's step goes, by SGD and by Adam, from traces: `python -m benchmarks.trace`.

With a path as argument, it also draws a picture.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

import jaxtrain as jt
from benchmarks.figures import BLUE, GREEN, VERMILION

BATCH_SIZE, STEPS = 64, 500
LOSS = jt.losses.cross_entropy
OPTIMIZERS = {"SGD": jt.optimizers.sgd(0.01), "Adam": jt.optimizers.adam(0.001)}
COLORS = {"batch and copies": "0.8", "forward": BLUE, "backward": GREEN}
COLORS["loss and optimizer"] = VERMILION


@jax.jit
def epoch(state: jt.TrainState, data: jt.Dataset) -> tuple[jt.TrainState, jax.Array]:
    """Trains for an epoch of shuffled batches; the trace shows it as `jit_epoch`."""
    return jt.train_epoch(state, data, LOSS, batch_size=BATCH_SIZE, key=jax.random.key(1))


def operation_times(folder: Path) -> dict[str, float]:
    """Returns the milliseconds of each operation inside the loop over steps, from a trace.

    These are medians of its runs, so that other processes on the machine matter little.
    """
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        arguments = event.get("args", {})
        if arguments.get("hlo_module") == "jit_epoch":
            times[arguments["hlo_op"]].append(event["dur"] / 1000)
    return {
        name: statistics.median(found) * len(found) / STEPS
        for name, found in times.items()
        if len(found) >= STEPS
    }


def phase_of(origin: str) -> str:
    """Returns the phase of a step that an operation belongs to."""
    if "transpose(" in origin:
        return "backward"
    if "jvp(FeedForward)" in origin:
        return "forward"
    # XLA adds copies, which have no origin.
    return "batch and copies" if not origin or "gather" in origin else "loss and optimizer"


def measure(optimizer: optax.GradientTransformation, data: jt.Dataset) -> dict[str, float]:
    """Returns the milliseconds per step of each phase, and prints the longest operations."""
    model = jt.models.FeedForward()
    state = jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))
    program = epoch.lower(state, data).compile()
    jax.block_until_ready(program(state, data))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(program(state, data))
        times = operation_times(Path(folder))
    # Where each operation comes from, such as "jvp(...)/div".
    text = program.as_text() or ""
    origins = dict(re.findall(r"%?([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", text))
    phases = dict.fromkeys(COLORS, 0.0)
    for name, milliseconds in times.items():
        phases[phase_of(origins.get(name, ""))] += milliseconds
    for name in sorted(times, key=times.__getitem__, reverse=True)[:6]:
        print(f"  {times[name]:.3f} ms  {name:24} {origins.get(name, '').partition('body/')[2]}")
    return phases


def main() -> None:
    """Prints the milliseconds per step of the longest operations and of each phase."""
    train, _ = jt.data.load("mnist")
    data = jax.tree.map(jnp.asarray, train[: STEPS * BATCH_SIZE])
    found: dict[str, dict[str, float]] = {}
    for name, optimizer in OPTIMIZERS.items():
        print(name)
        phases = found[name] = measure(optimizer, data)
        for phase, milliseconds in phases.items():
            print(f"  {phase:20} {milliseconds:.3f} ms {milliseconds / sum(phases.values()):4.0%}")
    if len(sys.argv) > 1:
        draw(found).savefig(sys.argv[1], dpi=110)


def draw(found: dict[str, dict[str, float]]) -> Figure:
    """Draws one bar per optimizer, divided into the phases of a step."""
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    ax = figure.subplots()
    for row, phases in enumerate(found.values()):
        left = 0.0
        for phase, value in phases.items():
            label = None if row else phase
            ax.barh(row, value, left=left, color=COLORS[phase], label=label)
            if value > 0.05 * sum(phases.values()):
                text = f"{value / sum(phases.values()):.0%}"
                ax.text(left + value / 2, row, text, ha="center", va="center", color="white")
            left += value
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set_xlabel("time of the operations of a step, of both threads together (ms)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    main()
