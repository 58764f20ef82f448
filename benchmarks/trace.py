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

import jaxtrain as jt
from jaxtrain import _figures
from jaxtrain.training.loop import compiled_steps
from jaxtrain.training.sources import segments_in_order
from jaxtrain.training.step import Objective

BATCH_SIZE, STEPS = 64, (100, 600)
LOSS = jt.losses.cross_entropy
OPTIMIZERS = {"SGD": jt.optimizers.sgd(0.01), "Adam": jt.optimizers.adam(0.001)}
PHASES = ("batch and copies", "forward", "backward", "loss and optimizer")


def operation_times(folder: Path) -> dict[str, float]:
    """Returns the milliseconds of each operation inside the loop over steps, from a trace.

    These are medians of its runs, so that other processes on the machine matter little.
    """
    (path,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        arguments = event.get("args", {})
        if arguments.get("hlo_module") == "jit_compiled_steps":
            times[arguments["hlo_op"]].append(event["dur"] / 1000)
    steps = STEPS[1] - STEPS[0]
    return {
        name: statistics.median(found) * len(found) / steps
        for name, found in times.items()
        if len(found) >= steps
    }


def operation_origins(state: jt.TrainState, data: jt.Dataset) -> dict[str, str]:
    """Returns where each operation of the training program comes from, such as "jvp(...)/div"."""
    segment = segments_in_order(data, jnp.arange(len(data)), BATCH_SIZE)[0]
    lowered = compiled_steps.lower(state, None, segment, 0, 1, Objective(LOSS))
    program = lowered.compile().as_text() or ""
    return dict(re.findall(r"%?([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", program))


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
    with tempfile.TemporaryDirectory() as folder:
        jt.fit(
            *(state, data),
            loss_fn=LOSS,
            epochs=1,
            batch_size=BATCH_SIZE,
            key=jax.random.key(1),
            callbacks=[jt.callbacks.profile(folder, steps=STEPS)],
        )
        times = operation_times(Path(folder))
    origins = operation_origins(state, data)
    phases = dict.fromkeys(PHASES, 0.0)
    for name, milliseconds in times.items():
        phases[phase_of(origins.get(name, ""))] += milliseconds
    for name in sorted(times, key=times.__getitem__, reverse=True)[:6]:
        origin = origins.get(name, "").removeprefix("jit(compiled_steps)/while/body/")
        print(f"  {times[name]:.3f} ms  {name:24} {origin}")
    return phases


def main() -> None:
    """Prints the milliseconds per step of the longest operations and of each phase."""
    data = jt.data.load("mnist")[0][: (STEPS[1] + 50) * BATCH_SIZE]
    data = jax.tree.map(jnp.asarray, data)
    found: dict[str, dict[str, float]] = {}
    for name, optimizer in OPTIMIZERS.items():
        print(name)
        phases = found[name] = measure(optimizer, data)
        for phase, milliseconds in phases.items():
            print(f"  {phase:20} {milliseconds:.3f} ms {milliseconds / sum(phases.values()):4.0%}")
    if len(sys.argv) > 1:
        draw(found).savefig(sys.argv[1], dpi=110)


def draw(found: dict[str, dict[str, float]]) -> _figures.Figure:
    """Draws one bar per optimizer, divided into the phases of a step."""
    figure = _figures.Figure(figsize=(7, 2.2), layout="constrained")
    ax = figure.subplots()
    colors = ("0.8", _figures.BLUE, _figures.GREEN, _figures.VERMILION)
    for row, phases in enumerate(found.values()):
        left = 0.0
        for (phase, value), color in zip(phases.items(), colors, strict=True):
            ax.barh(row, value, left=left, color=color, label=None if row else phase)
            if value > 0.05 * sum(phases.values()):
                text = f"{value / sum(phases.values()):.0%}"
                ax.text(left + value / 2, row, text, ha="center", va="center", color="white")
            left += value
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set_xlabel("time of the operations of a step, of both threads together (ms)")
    figure.legend(loc="outside upper center", ncols=len(PHASES), frameon=False)
    return figure


if __name__ == "__main__":
    main()
