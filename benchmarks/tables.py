"""Makes the tables of the results, for the terminal and in Markdown."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.peers import label
from benchmarks.readings import (
    Results,
    Row,
    fastest_pytorch_sweep,
    matrix_products,
    readings,
    relative_flop_times,
    rows_of,
    slowdowns,
    steps_per_epoch,
)
from benchmarks.speedrun import EXAMPLE, RECIPE
from benchmarks.suites import EAGER, OURS, WARM_CACHE
from benchmarks.targets import LINES_CASE, NETWORKS_CASE, PROCESS_CASE, measured_targets
from benchmarks.timing import Spread, speedup, spread

LEFT_ALIGNED = ("case", "peer", "notes")
EAGER_PEERS = (EAGER, "pytorch-dataloader", "pytorch-pixels")


class Cells(NamedTuple):
    """A table as text; columns without any text are left out when it is written."""

    headings: list[str]
    rows: list[list[str]]

    def without_empty_columns(self) -> Cells:
        """Returns the table without the columns that are empty in every row."""
        kept = [i for i in range(len(self.headings)) if any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Cells([self.headings[i] for i in kept], rows)


def markdown(table: Cells) -> str:
    """Returns the table in Markdown."""
    headings, rows = table.without_empty_columns()
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def print_suite(results: Results, suite: str) -> None:
    """Prints the table of a suite."""
    headings, rows = suite_table(results, suite).without_empty_columns()
    title = f"{suite} (one reading each: noise)" if results["quick"] else suite
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in LEFT_ALIGNED else "right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(table)


MODEL_NAMES = {
    "T2, batch 64": "T2, a feed-forward network",
    "CNN, batch 64": "CNN of PyTorch's MNIST example",
    "ResNet, batch 64": "ResNet with batch norm",
    "LSTM, batch 64": "LSTM over the rows of images",
    "ViT, batch 64": "ViT, two transformer blocks",
}
SWEEP_NAMES = {LINES_CASE: "1,000 runs of T1", NETWORKS_CASE: "64 runs of T2 on digits"}


SPEEDRUN_NAMES = {
    OURS: "`make speedrun`",
    RECIPE: "the same recipe in eager PyTorch",
    EXAMPLE: "PyTorch's MNIST example, to its first epoch above 99 %",
}


def summary_table(results: Results) -> Cells:
    """Returns the README's table: the epoch of each model, sweeps, and the whole process."""
    rows = []
    for case, name in MODEL_NAMES.items():
        ours, theirs = (readings(results, "models", case, peer) for peer in (OURS, EAGER))
        if ours is not None and theirs is not None:
            rows.append([name, *_compared(ours, theirs)])
    for case, name in SWEEP_NAMES.items():
        ours, row = readings(results, "sweep", case, OURS), fastest_pytorch_sweep(results, case)
        if ours is not None and row is not None:
            cells = _compared(ours, row["readings"])
            cells[1] += f" ({label(row['peer'])})"
            rows.append([name, *cells])
    cold, warm, theirs = (
        readings(results, "run", PROCESS_CASE, peer) for peer in (OURS, WARM_CACHE, EAGER)
    )
    if cold is not None and warm is not None and theirs is not None:
        first, second = _compared(cold, theirs), _compared(warm, theirs)
        both = [f"{first[i]} cold, {second[i]} warm" for i in (0, 2)]
        rows.append(["whole process, T2, 5 epochs", both[0], first[1], both[1]])
    machine = f"{device_name(results)}, {results['machine']['cores']} cores"
    headings = ["model", "jaxtrain", "eager PyTorch", "ratio (95 % interval)", "machine"]
    return Cells(headings, [[*row, machine] for row in rows])


def speedrun_table(results: Results) -> Cells:
    """Returns the README's table of the suite `speedrun`: one line per recipe."""
    rows = []
    for row in rows_of(results, "speedrun"):
        facts = row["facts"]
        accuracies = facts["accuracies"]
        ours = readings(results, "speedrun", row["case"], OURS)
        rows.append(
            [
                SPEEDRUN_NAMES[row["peer"]],
                f"{statistics.mean(accuracies):.2%} ({min(accuracies):.2%}), "
                f"{len(accuracies)} seeds",
                duration(statistics.median(row["readings"])),
                ""
                if ours is None or row["peer"] == OURS
                else with_interval(speedup(ours, row["readings"]), "×"),
                duration(statistics.median(facts["compile_seconds"]))
                if any(facts["compile_seconds"])
                else "none",
                duration(statistics.median(facts["process_seconds"])),
                f"{device_name(results)}, {results['machine']['cores']} cores",
            ]
        )
    headings = ["MNIST to 99 %", "test accuracy: mean (lowest)", "training", "ratio (95 %)"]
    return Cells([*headings, "compiling", "process", "machine"], rows)


def memory_sentence(results: Results) -> str:
    """Returns a sentence that compares the peak memory of T2's process, or an empty text."""
    ours, eager, pixels = (
        readings(results, "memory", PROCESS_CASE, peer) for peer in (OURS, EAGER, "pytorch-pixels")
    )
    if ours is None or eager is None or pixels is None:
        return ""
    values = [mebibytes(statistics.median(each)) for each in (ours, eager, pixels)]
    return (
        f"The peak memory of the cold process is {values[0]}; PyTorch's is {values[1]}, or "
        f"{values[2]} if it keeps the images as uint8 pixels."
    )


def _compared(ours: list[float], theirs: list[float]) -> list[str]:
    """Returns both medians, and their ratio with its interval."""
    medians = [duration(statistics.median(values)) for values in (ours, theirs)]
    return [*medians, with_interval(speedup(ours, theirs), "×")]


def target_table(machines: list[Results]) -> Cells:
    """Returns the aims, and the value and verdict of each machine."""
    aims: dict[str, str] = {}
    columns: list[dict[str, str]] = []
    for results in machines:
        column = {}
        for target, value in measured_targets(results):
            aims[target.measure] = target.aim
            column[target.measure] = f"{with_interval(value, target.unit)}: {target.verdict(value)}"
        columns.append(column)
    rows = [
        [measure, aim, *(column.get(measure, "") for column in columns)]
        for measure, aim in aims.items()
    ]
    return Cells(["measure", "aim", *map(device_name, machines)], rows)


def suite_table(results: Results, suite: str) -> Cells:
    """Returns every row of a suite: median, quartiles, ratios and notes."""
    as_text: Callable[[float], str] = mebibytes if suite == "memory" else duration
    rows = []
    for row in (row for row in results["rows"] if row["suite"] == suite):
        case, name = row["case"], row["peer"]
        if row["missing"]:
            rows.append([case, label(name), f"missing: {row['missing']}", "", "", "", ""])
            continue
        low, median, high = spread(row["readings"])
        single = len(row["readings"]) == 1
        quartiles = "" if single else f"{as_text(low)} – {as_text(high)}"
        ours = readings(results, suite, case, OURS)
        ratio = (
            ""
            if ours is None or single or name in (OURS, WARM_CACHE)
            else with_interval(speedup(ours, row["readings"]), "×")
        )
        products = matrix_products(results, suite, case)
        over = "" if not products or single else f"{number(median / statistics.median(products))} ×"
        notes = "; ".join(_notes(results, row, median))
        rows.append([case, label(name), as_text(median), quartiles, ratio, over, notes])
    headings = ["case", "peer", "median", "quartiles"]
    return Cells([*headings, "ratio to jaxtrain (95 %)", "ratio to matrix products", "notes"], rows)


def slower_table(results: Results) -> Cells:
    """Returns the cases of `step` and `models` in which another library is the fastest."""
    rows = []
    for name, (_, fastest) in slowdowns(results).items():
        suite, _, case = name.partition(": ")
        ours, theirs = (readings(results, suite, case, peer) for peer in (OURS, fastest))
        if fastest != OURS and ours is not None and theirs is not None:
            medians = (duration(statistics.median(seconds)) for seconds in (ours, theirs))
            ratio = with_interval(speedup(ours, theirs), "×")
            rows.append([suite, case, label(fastest), *medians, ratio])
    headings = ["suite", "case", "fastest library", "jaxtrain", "fastest library's median"]
    return Cells([*headings, "ratio to jaxtrain (95 %)"], rows)


def work_table(results: Results) -> Cells:
    """Returns the FLOPs of one step and the bytes that it moves at least, by case."""
    rows = {}
    for row in rows_of(results, "step"):
        flops, moved = row["facts"]["flops"], row["facts"]["bytes"]
        rows[row["case"]] = [row["case"], number(flops / 1e6), number(moved / 1e6)]
    return Cells(["case", "MFLOP", "MB"], list(rows.values()))


def _notes(results: Results, row: Row, median: float) -> list[str]:
    """Returns the notes of a row: rates, compilation, accuracy and disturbed readings."""
    suite, facts = row["suite"], row["facts"]
    notes = []
    if "extrapolated_from" in facts:
        notes.append(f"extrapolated from {facts['extrapolated_from']} runs")
    if suite == "step":
        notes.append(f"{facts['flops'] / median / 1e9:.3g} GFLOP/s")
    if suite in ("step", "models") and not facts["products"] and not results["quick"]:
        compilation = facts["compile_seconds"]
        eager = readings(results, suite, row["case"], EAGER)
        if eager is not None and row["peer"] not in EAGER_PEERS:
            notes.append(f"compiles in {compilation:.2g} s")
            saved = statistics.median(eager) - median
            if saved > 0:
                steps = compilation / saved * steps_per_epoch(row)
                notes.append(f"faster than eager PyTorch after {steps:.0f} steps")
            else:
                notes.append("not faster than eager PyTorch")
    if suite == "growth":
        time = relative_flop_times(results).get(row["case"])
        notes.append(f"{facts['flops'] / median / 1e9:.0f} GFLOP/s")
        if time is not None:
            notes.append(f"{100 * (time - 1):+.0f} % time per FLOP")
    if suite == "speedrun":
        seconds = [statistics.median(facts[f"{what}_seconds"]) for what in ("compile", "process")]
        notes.append(f"compiles in {seconds[0]:.2g} s, process {seconds[1]:.3g} s")
        accuracies = facts["accuracies"]
        notes.append(
            f"test accuracy {statistics.mean(accuracies):.2%}, lowest {min(accuracies):.2%} of "
            f"{len(accuracies)} seeds"
        )
        if "epochs" in facts:
            notes.append(f"{min(facts['epochs'])} to {max(facts['epochs'])} epochs")
    if "accuracy" in facts:
        notes.append(f"test accuracy {100 * facts['accuracy']:.2f} %")
    if facts.get("disturbed"):
        notes.append(f"{facts['disturbed']} of {len(row['readings'])} readings disturbed")
    return notes


def device_name(results: Results) -> str:
    """Returns the name of the GPU, or of the processor where there is no GPU."""
    machine = results["machine"]
    return str(machine["processor"] if machine["device"] == "cpu" else machine["device"])


def machine_line(results: Results) -> str:
    """Returns the machine, versions, flags and commit in one line."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = ", ".join(f"{name}={value}" for name, value in machine["flags"].items())
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"{machine['precision']}; Python {machine['python']}, {versions}; "
        f"flags: {flags or 'none'}; commit {machine['commit'] or 'unknown'}"
    )


def with_interval(value: Spread, unit: str) -> str:
    """Returns the value with its interval, for example "2 × (1.9 – 2.1)"."""
    low, median, high = map(number, value)
    return f"{median} {unit}" if low == high else f"{median} {unit} ({low} – {high})"


def number(value: float) -> str:
    """Returns the number with three digits and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Returns the duration with three digits in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-6)} µs"


def mebibytes(value: float) -> str:
    """Returns the memory as text; the value is in MiB."""
    return f"{value:.0f} MiB"
