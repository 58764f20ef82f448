"""Writes the tables in README.md and docs/benchmarks.md, and the figures, from the JSON results.

    python -m benchmarks.report [--check]

With --check it writes nothing, and fails where a page differs from what it would write.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.figures import epoch_ratios
from benchmarks.peers import PEERS, label
from benchmarks.results import (
    EAGER,
    EXAMPLE,
    NO_LIBRARIES,
    OURS,
    RECIPE,
    WARM_CACHE,
    Results,
    fastest,
    find,
    load_all,
    medians,
    ratio_to_ours,
)
from benchmarks.speedrun import CASE
from jaxtrain.race.estimates import Estimate
from jaxtrain.race.machine import machine_line
from jaxtrain.race.result import number

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

PROCESS = "whole process, T2, 5 epochs"
MODEL_NAMES = {
    "T2, batch 64": "T2, a feed-forward network",
    "CNN, batch 64": "CNN of PyTorch's MNIST example",
    "ResNet, batch 64": "ResNet with batch norm",
    "LSTM, batch 64": "LSTM over the rows of images",
    "ViT, batch 64": "ViT, two transformer blocks",
}
SWEEP_NAMES = {
    "1000 × T1, 200 epochs": "1,000 runs of T1",
    "64 × T2 on digits, 29 steps": "64 runs of T2 on digits",
}
PYTORCH_SWEEPS = (EAGER, "pytorch-batched")
SPEEDRUN_NAMES = {
    OURS: "`make speedrun`",
    RECIPE: "the same recipe in eager PyTorch",
    EXAMPLE: "PyTorch's MNIST example, until above 99 %",
}

# What trains whole epochs, and single steps, by what the README calls it.
WAYS = {"": (OURS, "jaxtrain-steps"), ", with Numba": ("jaxtrain-numba", "jaxtrain-numba-steps")}


def readme_section(machines: dict[str, Results]) -> str:
    """Returns the text between the README's marks: a summary of the first CPU machine."""
    on_cpu = [each for each in machines.values() if each["machine"]["device"] == "cpu"]
    results, machine = on_cpu[0], on_cpu[0]["machine"]
    values = medians(results, "memory")[PROCESS]
    memory = [f"{values[name]:.0f} MiB" for name in (OURS, EAGER, "pytorch-pixels")]
    return "\n\n".join(
        [
            summary_table(results),
            speedrun_table(results),
            "Above 1, jaxtrain is faster: the ratio is PyTorch's median over jaxtrain's. The "
            "models train for an epoch at batch 64, in one call or in a loop over `train_step`; "
            "cold and warm refer to JAX's compilation cache. "
            f"{ranking(results)} The peak memory of the cold process is {memory[0]}; "
            f"PyTorch's is {memory[1]}, or {memory[2]} if it keeps the images as uint8 pixels. "
            f"Machine: {device_name(results)}, {machine['cores']} cores. Software: "
            f"Python {machine['python']}, JAX {machine['versions']['jax']}, "
            f"PyTorch {machine['versions']['torch']}. "
            f"{'' if len(on_cpu) < len(machines) else 'No GPU results yet. '}"
            "Method and all results: [docs/benchmarks.md](docs/benchmarks.md). Why jaxtrain loses "
            "where it does: [NOTES.md](benchmarks/NOTES.md).",
        ]
    )


def summary_table(results: Results) -> str:
    """Returns the README's table: the epoch of each model, sweeps, and the whole process."""
    rows = []
    for case, name in MODEL_NAMES.items():
        found = medians(results, "models")[case]
        for suffix, ways in WAYS.items():
            if ways[0] in found:
                speedups = [ratio_to_ours(results, "models", case, EAGER, way) for way in ways]
                times = [duration(found[peer]) for peer in (ways[0], EAGER)]
                rows.append([name + suffix, *times, *map(with_interval, speedups)])
    for case, name in SWEEP_NAMES.items():
        found = medians(results, "sweep")[case]
        peer = min(PYTORCH_SWEEPS, key=found.__getitem__)
        ratio = ratio_to_ours(results, "sweep", case, peer)
        theirs = f"{duration(found[peer])} ({label(peer)})"
        rows.append([name, duration(found[OURS]), theirs, with_interval(ratio), ""])
    found = medians(results, "run")[PROCESS]
    both, ratios = [], []
    for row, state in ((OURS, "cold"), (WARM_CACHE, "warm")):
        both.append(f"{duration(found[row])} {state}")
        ratio = ratio_to_ours(results, "run", PROCESS, EAGER, row)
        ratios.append(f"{with_interval(ratio)} {state}")
    rows.append([PROCESS, ", ".join(both), duration(found[EAGER]), ", ".join(ratios), ""])
    headings = ["model", "jaxtrain", "eager PyTorch", "ratio (95 %)", "loop over `train_step`"]
    return markdown(headings, rows)


def speedrun_table(results: Results) -> str:
    """Returns the table of the suite `speedrun`: one line per recipe."""
    rows = []
    for name, median in medians(results, "speedrun")[CASE].items():
        facts = find(results, "speedrun", CASE, name)["facts"]
        accuracies = facts["accuracies"]
        ratio = ratio_to_ours(results, "speedrun", CASE, name)
        compiling = statistics.median(facts["compile_seconds"])
        rows.append(
            [
                SPEEDRUN_NAMES[name],
                f"{statistics.mean(accuracies):.2%} ({min(accuracies):.2%}), "
                f"{len(accuracies)} seeds",
                duration(median),
                "" if name == OURS else with_interval(ratio),
                duration(compiling) if compiling else "none",
                duration(statistics.median(facts["process_seconds"])),
            ]
        )
    headings = ["MNIST to 99 %", "test accuracy: mean (lowest)", "training", "ratio (95 %)"]
    return markdown([*headings, "compiling", "process"], rows)


def ranking(results: Results) -> str:
    """Returns a sentence: in how many cases jaxtrain is fastest, and its worst case."""
    cases = {
        f"{suite}: {case}": found
        for suite in ("step", "models")
        for case, found in medians(results, suite).items()
    }
    won = sum(fastest(found) == OURS for found in cases.values())
    text = f"jaxtrain is the fastest library in {won} of {len(cases)} cases of `step` and `models`"
    if won == len(cases):
        return f"{text}."
    slowdowns = {case: found[OURS] / found[fastest(found)] for case, found in cases.items()}
    worst = max(slowdowns, key=slowdowns.__getitem__)
    name = label(fastest(cases[worst]))
    return f"{text}; in the worst, `{worst}`, {name} is {number(slowdowns[worst])} × as fast."


def page_section(machines: dict[str, Results]) -> str:
    """Returns the text between the marks of docs/benchmarks.md: the tables of every machine."""
    parts = []
    for name, results in machines.items():
        heading = f"## {device_name(results)} (`{name}`)"
        parts += [heading, f"{software(results)}."]
        text = "Time per epoch of each network and peer in multiples of jaxtrain's"
        parts.append(f"![{text}](images/{name}_epoch_ratios.png)")
        for suite, table in TABLES.items():
            if medians(results, suite):
                parts += [f"### Suite `{suite}`", table(results)]
    return "\n\n".join(parts)


def suite_table(results: Results, suite: str) -> str:
    """Returns jaxtrain's medians, and the others' ratios to them; the fastest library is bold.

    Peers of a single case are left out; the suite `run` has them.
    """
    found = medians(results, suite)

    def cell(case: str, peer: str) -> str:
        if peer not in found[case]:
            return ""
        if peer == OURS:
            text = duration(found[case][peer])
        else:
            text = with_interval(ratio_to_ours(results, suite, case, peer))
        return f"**{text}**" if peer == fastest(found[case]) else text

    names = [name for name in PEERS if sum(name in each for each in found.values()) > 1]
    rows = [[label(name), *(cell(case, name) for case in found)] for name in names]
    return markdown(["peer", *(case.removesuffix(", batch 64") for case in found)], rows)


def step_table(results: Results) -> str:
    """Returns the medians of single steps in ms, and the ratio of the fastest other library."""
    found = medians(results, "step")
    names = [name for name in PEERS if any(name in each for each in found.values())]
    rows = []
    for case, each in found.items():
        best, other = fastest(each), fastest(each, without=(*NO_LIBRARIES, OURS))
        cells = [number(1000 * each[name]) for name in names]
        cells[names.index(best)] = f"**{cells[names.index(best)]}**"
        ratio = with_interval(ratio_to_ours(results, "step", case, other))
        rows.append([case.replace(", batch", ""), *cells, ratio])
    return markdown(["network, batch (ms)", *map(label, names), "fastest other (95 %)"], rows)


def process_table(results: Results) -> str:
    """Returns time, peak memory and test accuracy of whole processes."""
    seconds, memory = (medians(results, suite)[PROCESS] for suite in ("run", "memory"))
    rows = []
    for name in seconds:
        facts = find(results, "run", PROCESS, name)["facts"]
        is_ours = name in (OURS, WARM_CACHE)
        ratio = "" if is_ours else with_interval(ratio_to_ours(results, "run", PROCESS, name))
        cells = [f"{seconds[name]:.3g}", ratio, f"{memory[name]:.0f}", f"{facts['accuracy']:.2%}"]
        rows.append([label(name), *cells])
    headings = [PROCESS, "seconds", "ratio (95 %)", "peak memory, MiB", "test accuracy"]
    return markdown(headings, rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "models": functools.partial(suite_table, suite="models"),
    "step": step_table,
    "sweep": functools.partial(suite_table, suite="sweep"),
    "run": process_table,
    "speedrun": speedrun_table,
}


def console_table(results: Results, suite: str) -> str:
    """Returns every row of a suite, for the terminal."""
    lines = [suite]
    for row in (row for row in results["rows"] if row["suite"] == suite):
        text = f"missing: {row['missing']}"
        if row["readings"]:
            median = statistics.median(row["readings"])
            text = f"{median:.0f} MiB" if suite == "memory" else duration(median)
        lines.append(f"  {row['case']:32} {label(row['peer']):30} {text}")
    return "\n".join(lines)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows])


def device_name(results: Results) -> str:
    """Returns the name of the device: the GPU, or else the processor."""
    machine = results["machine"]
    return str(machine["processor"] if machine["device"] == "cpu" else machine["device"])


def software(results: Results) -> str:
    """Returns the machine, versions, flags and commit in one line."""
    machine = results["machine"]
    return f"{machine_line(machine)}; commit {machine['commit'] or 'unknown'}"


def with_interval(value: Estimate) -> str:
    """Returns the ratio with its interval, for example "2 × (1.9–2.1)"."""
    low, median, high = map(number, value)
    return f"{median} ×" if low == high else f"{median} × ({low}–{high})"


def duration(seconds: float) -> str:
    """Returns the duration with three digits in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-6)} µs"


def main() -> None:
    """Writes the pages and figures, or checks the pages."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page is out of date"
    )
    arguments = parser.parse_args()
    machines = load_all(RESULTS)
    pages = {}
    for path, section in ((README, readme_section(machines)), (PAGE, page_section(machines))):
        before, rest = path.read_text().split(BEGIN)
        pages[path] = f"{before}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"
    if arguments.check:
        stale = [path.name for path, text in pages.items() if path.read_text() != text]
        if stale:
            sys.exit(f"error: out of date: {', '.join(stale)}; run python -m benchmarks.report")
        return
    for path, text in pages.items():
        path.write_text(text)
    for name, results in machines.items():
        if (figure := epoch_ratios(results)) is not None:
            figure.savefig(PAGE.parent / "images" / f"{name}_epoch_ratios.png", dpi=120)


if __name__ == "__main__":
    main()
