"""What the readings say: tables on screen, pictures, and the README's section on performance.

    python -m benchmarks.report [FILE] [--check]

writes the section between the README's marks, benchmarks/RESULTS.md and the pictures in docs/ from
the JSON files in benchmarks/results/, so that no figure there is typed by hand. With --check it
writes nothing and fails where the texts differ from what it would write; with a FILE of readings it
only prints its tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.peers import PEERS
from benchmarks.problem import NETWORKS
from benchmarks.timing import Spread, speedup, spread
from jaxtrain.cli import plots

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
OURS, EAGER = "jaxtrain", "pytorch"
WARM = "jaxtrain, warm cache"
EPOCH_CASE = "T2, batch 64"

Results = dict[str, Any]
Cells = list[str]


def rows_of(results: Results, suite: str, case: str | None = None) -> list[dict[str, Any]]:
    """The rows of a suite that have readings."""
    return [
        row
        for row in results["rows"]
        if row["suite"] == suite and row["readings"] and case in (None, row["case"])
    ]


def readings(results: Results, suite: str, case: str, peer: str) -> list[float] | None:
    """The readings of one row; None if there is none."""
    found = [row for row in rows_of(results, suite, case) if row["peer"] == peer]
    return found[0]["readings"] if found else None


def floor_readings(results: Results, suite: str, case: str) -> list[float] | None:
    """The readings of the fastest matrix products alone; None if there are none."""
    found = [row["readings"] for row in rows_of(results, suite, case) if row["facts"].get("floor")]
    return min(found, key=statistics.median, default=None)


class Target(NamedTuple):
    """A line of the table of aims.

    Attributes:
      measure: what is compared.
      aim: the aim in words.
      value: the figure and its interval; None where it was not measured.
      reached: whether a figure is good enough.
      unit: what follows the figure.
    """

    measure: str
    aim: str
    value: Callable[[Results], Spread | None]
    reached: Callable[[float], bool]
    unit: str = " ×"


def faster(measure: str, aim: float, suite: str, case: str, peer: str, ours: str = OURS) -> Target:
    """How many times as long the peer takes."""

    def value(results: Results) -> Spread | None:
        mine, theirs = (readings(results, suite, case, name) for name in (ours, peer))
        return None if mine is None or theirs is None else speedup(mine, theirs)

    return Target(measure, f"≥ {aim:g} ×", value, lambda figure: figure >= aim)


def _over_floor(results: Results) -> Spread | None:
    ours = readings(results, "epoch", EPOCH_CASE, OURS)
    floor = floor_readings(results, "epoch", EPOCH_CASE)
    return None if ours is None or floor is None else speedup(floor, ours)


def growth_rates(results: Results) -> dict[str, float]:
    """Seconds per counted FLOP of each grown case, relative to T2 at batch 64."""
    rates = {
        row["case"]: statistics.median(row["readings"]) / row["facts"]["flops"]
        for row in rows_of(results, "growth")
    }
    base = rates.get("batch 64")
    return {} if base is None else {case: rate / base for case, rate in rates.items()}


def _growth(results: Results) -> Spread | None:
    worst = max((abs(rate - 1) for rate in growth_rates(results).values()), default=None)
    return None if worst is None else Spread(*[100 * worst] * 3)


WHOLE = "whole process, T2, 5 epochs"
CPU_TARGETS = (
    faster("one `train_step` call vs eager PyTorch's step", 1.7, "step", EPOCH_CASE, EAGER),
    faster("an epoch vs eager PyTorch, slicing", 2.3, "epoch", EPOCH_CASE, EAGER),
    faster("an epoch vs eager PyTorch, DataLoader", 3.5, "epoch", EPOCH_CASE, "pytorch-dataloader"),
    faster("an epoch vs Keras 3 on JAX", 1.4, "epoch", EPOCH_CASE, "keras"),
    faster("an epoch vs Flax NNX", 1.7, "epoch", EPOCH_CASE, "nnx"),
    faster("an epoch vs Equinox", 2.0, "epoch", EPOCH_CASE, "equinox"),
    Target(
        "an epoch over its matrix products alone, fastest BLAS",
        "≤ 1.45 ×",
        _over_floor,
        lambda figure: figure <= 1.45,
    ),
    faster("T1's 200 epochs vs eager PyTorch", 200, "run", "1 × T1, 200 epochs", EAGER),
    faster(
        "1000 T1 runs at once vs 1000 eager (20, times 50)",
        1500,
        "sweep",
        "1000 × T1, 200 epochs",
        EAGER,
    ),
    faster("whole process, 5 epochs, warm cache vs eager, slicing", 2, "run", WHOLE, EAGER, WARM),
    faster("the same vs eager, DataLoader", 2, "run", WHOLE, "pytorch-dataloader", WARM),
    faster(
        "peak memory of a process, 2 epochs, cold cache: eager PyTorch's over ours",
        1,
        "memory",
        "whole process, T2, 2 epochs",
        EAGER,
    ),
    faster(
        "the same, PyTorch keeping uint8 pixels",
        1,
        "memory",
        "whole process, T2, 2 epochs",
        "pytorch-pixels",
    ),
    Target(
        "work growth: largest deviation of seconds per counted FLOP from T2's at batch 64, "
        "faster or slower",
        "≤ 15 %",
        _growth,
        lambda figure: figure <= 15,
        " %",
    ),
)


def _step_microseconds(results: Results) -> Spread | None:
    ours = [row for row in rows_of(results, "epoch", EPOCH_CASE) if row["peer"] == OURS]
    if not ours:
        return None
    steps = -(-ours[0]["facts"]["examples"] // ours[0]["facts"]["batch_size"])
    return Spread(*(1e6 / steps * each for each in spread(ours[0]["readings"])))


def _share_of_floor(results: Results) -> Spread | None:
    ours = readings(results, "step", "wide, batch 4096", OURS)
    floor = floor_readings(results, "step", "wide, batch 4096")
    if ours is None or floor is None:
        return None
    return Spread(*(100 * each for each in speedup(ours, floor)))


GPU_TARGETS = (
    Target(
        "a step of `train_epoch`, batch 64",
        "≤ 30 µs",
        _step_microseconds,
        lambda figure: figure <= 30,
        " µs",
    ),
    faster("an epoch vs eager PyTorch, slicing", 15, "epoch", EPOCH_CASE, EAGER),
    faster("an epoch vs PyTorch CUDA graphs", 3, "epoch", EPOCH_CASE, "pytorch-cuda-graphs"),
    faster(
        "64 MNIST networks at once vs one after another in eager PyTorch",
        40,
        "sweep",
        "64 × T2 network, 100 steps",
        EAGER,
    ),
    Target(
        "the wide network at batch 4096: share of the measured rate of its matrix products",
        "≥ 60 %",
        _share_of_floor,
        lambda figure: figure >= 60,
        " %",
    ),
)


def targets(results: Results) -> Iterator[tuple[Target, Spread]]:
    """The aims that were measured: those of a CPU, or those of a GPU."""
    for target in CPU_TARGETS if results["machine"]["device"] == "cpu" else GPU_TARGETS:
        value = target.value(results)
        if value is not None:
            yield target, value


def number(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Three digits with a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{number(seconds / size)} {unit}"
    raise AssertionError


def target_table(results: Results) -> tuple[Cells, list[Cells]]:
    """The aims beside what was reached."""
    body = []
    for target, value in targets(results):
        low, middle, high = map(number, value)
        interval = "" if low == high else f" ({low} – {high})"
        verdicts = {target.reached(value.low), target.reached(value.high)}
        verdict = "yes" if verdicts.pop() else "**missed**"
        if verdicts:  # the interval spans the aim
            verb = "reaches" if target.reached(value.median) else "misses"
            verdict = f"within noise, its median {verb}"
        body.append([target.measure, target.aim, f"{middle}{target.unit}{interval}", verdict])
    return ["measure", "aim", "measured (95 % interval)", "reached"], body


def suite_table(results: Results, suite: str) -> tuple[Cells, list[Cells]]:
    """Every row of a suite: time, spread, ratio to ours, distance from the floor, compiling."""
    body = []
    for row in (row for row in results["rows"] if row["suite"] == suite):
        name = row["peer"]
        label = PEERS[name].label if name in PEERS else name
        if row["missing"]:
            body.append([row["case"], label, f"missing: {row['missing']}", "", "", "", ""])
            continue
        low, middle, high = spread(row["readings"])
        ours = readings(results, suite, row["case"], OURS)
        ratio = "" if ours is None or name in (OURS, WARM) else _ratio(ours, row["readings"])
        floor = floor_readings(results, suite, row["case"])
        facts = row["facts"]
        floor_seconds = facts.get("floor_seconds") if floor is None else statistics.median(floor)
        over = "" if floor_seconds is None else f"{number(middle / floor_seconds)} ×"
        as_text = (lambda mib: f"{mib:.0f} MiB") if suite == "memory" else duration
        body.append(
            [
                row["case"],
                label,
                as_text(middle),
                "" if len(row["readings"]) == 1 else f"{as_text(low)} – {as_text(high)}",
                ratio,
                over,
                _note(results, row, middle),
            ]
        )
    return [
        "case",
        "peer",
        "median",
        "quartiles",
        "ours faster (95 %)",
        "over floor",
        "notes",
    ], body


def work_table(results: Results) -> tuple[Cells, list[Cells]]:
    """FLOPs of the matrix products and bytes moved at least, by case."""
    body = {}
    for row in rows_of(results, "step"):
        flops, moved = row["facts"]["flops"], row["facts"]["bytes"]
        body[row["case"]] = [row["case"], number(flops / 1e6), number(moved / 1e6)]
    return ["case", "MFLOP", "MB"], list(body.values())


def _ratio(ours: list[float], theirs: list[float]) -> str:
    low, middle, high = map(number, speedup(ours, theirs))
    return f"{middle} ×" if low == high else f"{middle} × ({low} – {high})"


def _note(results: Results, row: dict[str, Any], median: float) -> str:
    facts = row["facts"]
    notes = []
    if "extrapolated_from" in facts:
        notes.append(f"extrapolated from {facts['extrapolated_from']}")
    if row["suite"] == "step":
        notes.append(f"{facts['flops'] / median / 1e9:.3g} GFLOP/s")
    if row["suite"] in ("step", "epoch") and not facts["floor"]:
        compiling = max(0.0, facts["first_seconds"] - median)
        eager = readings(results, row["suite"], row["case"], EAGER)
        if eager is not None and row["peer"] not in (EAGER, "pytorch-dataloader"):
            notes.append(f"compiling {compiling:.2g} s")
            saved = statistics.median(eager) - median
            steps = -(-facts["examples"] // facts["batch_size"])  # one in the suite `step`
            paid = f"after {compiling / saved * steps:.0f} steps" if saved > 0 else "never"
            notes.append(f"paid back against eager PyTorch {paid}")
    if row["suite"] == "growth":
        rate = growth_rates(results).get(row["case"])
        notes.append(f"{facts['flops'] / median / 1e9:.0f} GFLOP/s")
        if rate is not None:
            notes.append(f"{100 * (rate - 1):+.0f} % per FLOP")
    if "accuracy" in facts:
        notes.append(f"{facts['accuracy']:.2%} correct, {facts['peak_mib']:.0f} MiB")
    return "; ".join(notes)


def print_suite(results: Results, suite: str) -> None:
    """Print a suite's table, without columns that stay empty."""
    headings, body = suite_table(results, suite)
    kept = [i for i in range(len(headings)) if any(cells[i] for cells in body)]
    table = Table(title=suite, title_justify="left")
    for i in kept:
        table.add_column(headings[i], justify="left" if headings[i] in _LEFT else "right")
    for cells in body:
        table.add_row(*(cells[i] for i in kept))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(table)


_LEFT = ("case", "peer", "notes")


def machine_line(results: Results) -> str:
    """The machine in one sentence."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = ", ".join(f"{name}={value}" for name, value in machine["flags"].items())
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"{machine['precision']}; Python {machine['python']}, {versions}; "
        f"flags: {flags or 'none'}; commit {machine['commit'] or 'unknown'}"
    )


COLOURS = {
    OURS: plots.BLUE,
    EAGER: plots.VERMILION,
    "pytorch-compile": plots.ORANGE,
    "pytorch-cuda-graphs": plots.YELLOW,
    "nnx": plots.GREEN,
    "equinox": plots.PURPLE,
    "keras": plots.SKY,
}
MARKERS = dict(zip(COLOURS, "osD^vP*", strict=True))


def draw(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Write the pictures that the readings allow; returns their paths."""
    written = []
    pictures = {
        "step_time": _step_figure(results, throughput=False),
        "step_throughput": _step_figure(results, throughput=True),
        "epoch_ratios": _ratio_figure(results),
    }
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / f"{prefix}{name}.png", dpi=120)
            written.append(folder / f"{prefix}{name}.png")
    return written


def _step_figure(results: Results, *, throughput: bool) -> Figure | None:
    """Time of a step, or examples a second, against batch size; a panel for each network."""
    rows = rows_of(results, "step")
    networks = [name for name in NETWORKS if any(r["facts"]["network"] == name for r in rows)]
    if not networks:
        return None
    figure = Figure(figsize=(4.2 * len(networks), 4.2), layout="constrained")
    for ax, network in zip(
        figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True
    ):
        mine = [row for row in rows if row["facts"]["network"] == network]
        for name in dict.fromkeys(row["peer"] for row in mine):
            if name in COLOURS:
                _curve(ax, [row for row in mine if row["peer"] == name], throughput)
        floors = [row for row in mine if row["facts"]["floor"]]
        best: dict[int, dict[str, Any]] = {}
        for row in floors:
            size = row["facts"]["batch_size"]
            if size not in best or min(row["readings"]) < min(best[size]["readings"]):
                best[size] = row
        _curve(ax, list(best.values()), throughput, label="matrix products alone (floor)")
        ax.set_xscale("log", base=4)
        ax.set_yscale("log")
        ax.set_title(network if network != "wide" else "wide (4 × 1024)")
        unit = "examples per second" if throughput else "milliseconds per step"
        plots.label_axes(ax, "batch size", unit)
        sizes = sorted({row["facts"]["batch_size"] for row in mine})
        ax.set_xticks(sizes, [str(size) for size in sizes])
    handles, labels = figure.axes[min(1, len(networks) - 1)].get_legend_handles_labels()
    columns = 4 if len(networks) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def _curve(
    ax: Axes, rows: list[dict[str, Any]], throughput: bool, label: str | None = None
) -> None:
    rows = sorted(rows, key=lambda row: row["facts"]["batch_size"])
    if not rows:
        return
    sizes = [row["facts"]["batch_size"] for row in rows]
    spreads = [spread(row["readings"]) for row in rows]
    values = [
        [size / each for size, each in zip(sizes, part, strict=True)]
        if throughput
        else [1e3 * each for each in part]
        for part in zip(*spreads, strict=True)
    ]
    low, middle, high = values
    name = rows[0]["peer"]
    style: dict[str, Any] = (
        {"color": "black", "linestyle": ":", "marker": ".", "markersize": 4}
        if label
        else {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4}
    )
    ax.plot(sizes, middle, label=label or PEERS[name].label, **style)
    ax.fill_between(sizes, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _ratio_figure(results: Results) -> Figure | None:
    """How many times as long an epoch takes each peer, with its interval."""
    ours = readings(results, "epoch", EPOCH_CASE, OURS)
    rows = [r for r in rows_of(results, "epoch", EPOCH_CASE) if r["peer"] != OURS]
    if ours is None or not rows:
        return None
    ratios = {
        (PEERS[row["peer"]].label if row["peer"] in PEERS else row["peer"]): speedup(
            ours, row["readings"]
        )
        for row in rows
    }
    ratios = dict(sorted(ratios.items(), key=lambda item: item[1].median))
    figure = Figure(figsize=(7, 1.1 + 0.36 * len(ratios)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(1, color=plots.BLUE, linestyle="--", linewidth=1, zorder=0)
    floors = {row["peer"] for row in rows if row["facts"]["floor"]}
    for place, (name, (low, middle, high)) in enumerate(ratios.items()):
        ax.plot([low, high], [place, place], color=plots.GREY, linewidth=3)
        colour = "black" if name in floors else plots.VERMILION
        ax.plot(middle, place, "o", color=colour, fillstyle="none" if name in floors else "full")
        ax.annotate(
            f"{middle:.2f} ×",
            (high, place),
            (6, -3),
            textcoords="offset points",
            bbox={"color": "white", "pad": 0.5},
        )
    ax.set_title("dashed: jaxtrain; hollow: no training, products alone", fontsize=9)
    ax.set_yticks(range(len(ratios)), list(ratios))
    ax.set_ylim(-0.6, len(ratios) - 0.4)
    ax.set_xlim(0, 1.15 * max(high for _, _, high in ratios.values()))
    plots.label_axes(ax, "seconds of an epoch, in multiples of jaxtrain's (95 % interval)", "")
    return figure


def markdown(headings: Cells, body: list[Cells]) -> str:
    """A table in Markdown, without columns that stay empty."""
    kept = [i for i in range(len(headings)) if any(cells[i] for cells in body)]
    lines = [[headings[i] for i in kept], ["---"] * len(kept)]
    lines += [[cells[i] for i in kept] for cells in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machines_table(every: list[Results]) -> tuple[Cells, list[Cells]]:
    """The aims, and what each of several machines reached."""
    reached = [{cells[0]: cells for cells in target_table(results)[1]} for results in every]
    aims = {measure: cells[1] for rows in reached for measure, cells in rows.items()}
    body = []
    for measure, aim in aims.items():
        found = [rows.get(measure) for rows in reached]
        body.append(
            [measure, aim, *("" if cells is None else f"{cells[2]}: {cells[3]}" for cells in found)]
        )
    return ["measure", "aim", *map(machine_name, every)], body


def machine_name(results: Results) -> str:
    """What computed: the GPU, or the processor."""
    machine = results["machine"]
    return str(machine["processor"] if machine["device"] == "cpu" else machine["device"])


def readme_section(every: dict[str, Results]) -> str:
    """The text between the README's marks."""
    parts = [
        "Written by `.venv/bin/python -m benchmarks.report` from "
        "[`benchmarks/results/`](benchmarks/results); every table of it is in "
        "[RESULTS.md](benchmarks/RESULTS.md), what was tried and did not help in "
        "[NOTES.md](benchmarks/NOTES.md)."
    ]
    on_cpu = {name: r for name, r in every.items() if r["machine"]["device"] == "cpu"}
    on_gpu = {name: r for name, r in every.items() if name not in on_cpu}
    for group in (on_cpu, on_gpu):
        if not group:
            continue
        parts.append(markdown(*machines_table(list(group.values()))))
        parts.append(
            "Figures with their 95 % intervals. Measured on:\n\n"
            + "\n".join(f"- {machine_line(results)}" for results in group.values())
        )
        first = next(iter(group))
        parts.append(
            f"On the {machine_name(group[first])} (the others in "
            "[RESULTS.md](benchmarks/RESULTS.md)):"
        )
        parts.append(
            "![An epoch of MNIST: each peer's time in multiples of jaxtrain's]"
            f"(docs/{first}_epoch_ratios.png)"
        )
        parts.append(f"![Time of a training step against batch size](docs/{first}_step_time.png)")
    if not on_gpu:
        parts.append("No GPU results yet.")
    return "\n\n".join(parts)


def all_tables(every: dict[str, Results]) -> str:
    """benchmarks/RESULTS.md."""
    parts = ["# Readings\n\nWritten by `python -m benchmarks.report`; do not edit."]
    for name, results in every.items():
        parts.append(f"## {name}\n\n{machine_line(results)}")
        for picture in ("step_throughput", "step_time", "epoch_ratios"):
            parts.append(f"![{picture.replace('_', ' ')}](../docs/{name}_{picture}.png)")
        parts.append(f"### Counted work of a step\n\n{markdown(*work_table(results))}")
        for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
            parts.append(f"### {suite}\n\n{markdown(*suite_table(results, suite))}")
    return "\n\n".join(parts) + "\n"


def print_file(file: Path) -> None:
    """Print the tables of one file of readings."""
    try:
        results = json.loads(file.read_text())
        suites = dict.fromkeys(row["suite"] for row in results["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {file} is no file of readings ({error}); python -m benchmarks makes one")
    for suite in suites:
        print_suite(results, suite)
    print(machine_line(results))


def main() -> None:
    """Write the texts and pictures, or check the texts."""
    description = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=description)
    parser.add_argument("file", type=Path, nargs="?", help="readings whose tables to print")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    arguments = parser.parse_args()
    if arguments.file is not None:
        print_file(arguments.file)
        return
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"), key=lambda file: file.stem)
    every = {file.stem: json.loads(file.read_text()) for file in files}
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    texts = {
        ROOT / "README.md": f"{before}{BEGIN}\n\n{readme_section(every)}\n\n{END}{after}",
        ROOT / "benchmarks" / "RESULTS.md": all_tables(every),
    }
    stale = [path.name for path, text in texts.items() if path.read_text() != text]
    if arguments.check:
        if stale:
            sys.exit(f"error: {', '.join(stale)} differ from benchmarks/results; run the report")
        print("README.md and benchmarks/RESULTS.md say what benchmarks/results holds")
        return
    for path, text in texts.items():
        path.write_text(text)
    for name, results in every.items():
        draw(results, ROOT / "docs", f"{name}_")


if __name__ == "__main__":
    main()
