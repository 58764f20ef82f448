"""Writes docs/benchmarks.md, its figures and the README's table from benchmarks/results/*.json.

    python -m benchmarks.report [--check]

With --check it writes nothing, and fails where a page differs from what it would write.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxtrain.cli import command as command  # isort: skip  # first: reports missing extras

from benchmarks.figures import draw
from benchmarks.peers import label
from benchmarks.readings import Results, load_all, rows_of, slowdowns
from benchmarks.suites import OURS
from benchmarks.tables import (
    device_name,
    machine_line,
    markdown,
    memory_sentence,
    number,
    slower_table,
    speedrun_table,
    suite_table,
    summary_table,
    target_table,
    work_table,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHOD = ROOT / "benchmarks" / "method.md"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

INTRODUCTION = """\
# Benchmarks

`python -m benchmarks.report` writes this page from
[`benchmarks/results/`](../benchmarks/results); do not edit it by hand.
[NOTES.md](../benchmarks/NOTES.md) shows where the time goes, and what was tried without gain."""
FIGURES = {
    "epoch_ratios": "Time per epoch of each network and peer in multiples of jaxtrain's",
    "step_time": "Time per training step against batch size",
    "step_throughput": "Examples per second against batch size",
}
FIGURE_SUITES = {"epoch_ratios": "models", "step_time": "step", "step_throughput": "step"}


def benchmarks_page(machines: dict[str, Results]) -> str:
    """Returns docs/benchmarks.md: aims, method, and every table and figure."""
    parts = [INTRODUCTION, "## Aims"]
    on_cpu, on_gpu = _by_device(machines)
    parts += [markdown(target_table(group)) for group in (on_cpu, on_gpu) if group]
    if not on_gpu:
        parts.append("No GPU results yet.")
    parts.append(METHOD.read_text().strip())
    for name, results in machines.items():
        parts += [f"## {device_name(results)} (`{name}`)", f"{machine_line(results)}."]
        parts += [
            f"![{text}](images/{name}_{figure}.png)"
            for figure, text in FIGURES.items()
            if rows_of(results, FIGURE_SUITES[figure])
        ]
        slower = slower_table(results)
        if slower.rows:
            parts += ["### Where another library is faster", ranking(results), markdown(slower)]
        for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
            parts += [f"### Suite `{suite}`", markdown(suite_table(results, suite))]
        if rows_of(results, "step"):
            parts += [
                "### Work per step",
                "FLOPs of the matrix products, and memory traffic if nothing stays in a cache.",
                markdown(work_table(results)),
            ]
    return "\n\n".join(parts) + "\n"


def readme_section(machines: dict[str, Results]) -> str:
    """Returns the text between the README's marks: a summary of the first CPU machine."""
    on_cpu, on_gpu = _by_device(machines)
    if not on_cpu:
        return "No CPU results yet."
    results, machine = on_cpu[0], on_cpu[0]["machine"]
    versions = machine["versions"]
    software = [f"Python {machine['python']}", f"JAX {versions['jax']}"]
    if "torch" in versions:
        software.append(f"PyTorch {versions['torch']}")
    speedrun = [markdown(speedrun_table(results))] if rows_of(results, "speedrun") else []
    parts = [
        markdown(summary_table(results)),
        *speedrun,
        "Above 1, jaxtrain is faster: the ratio is PyTorch's median over jaxtrain's. The models "
        "train for an epoch at batch 64; cold and warm refer to JAX's compilation cache. "
        f"{ranking(results)} {memory_sentence(results)} Software: {', '.join(software)}."
        + ("" if on_gpu else " No GPU results yet.")
        + " Method, aims and all results: [docs/benchmarks.md](docs/benchmarks.md). "
        "Why jaxtrain loses where it does: [NOTES.md](benchmarks/NOTES.md).",
    ]
    return "\n\n".join(parts)


def ranking(results: Results) -> str:
    """Returns a sentence: in how many cases jaxtrain is fastest, and its worst case."""
    found = slowdowns(results)
    if not found:
        return "No training steps or epochs were measured."
    won = sum(fastest == OURS for _, fastest in found.values())
    text = f"jaxtrain is the fastest library in {won} of {len(found)} cases of `step` and `models`"
    if won == len(found):
        return f"{text}."
    worst = max(found, key=lambda case: found[case][0])
    factor, fastest = found[worst]
    return f"{text}; in the worst, `{worst}`, {label(fastest)} is {number(factor)} × as fast."


def _by_device(machines: dict[str, Results]) -> tuple[list[Results], list[Results]]:
    """Returns the results on CPUs, and those on GPUs."""
    on_cpu = [results for results in machines.values() if results["machine"]["device"] == "cpu"]
    on_gpu = [results for results in machines.values() if results["machine"]["device"] != "cpu"]
    return on_cpu, on_gpu


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
    readme = README.read_text()
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    pages = {
        README: f"{before}{BEGIN}\n\n{readme_section(machines)}\n\n{END}{after}",
        PAGE: benchmarks_page(machines),
    }
    if arguments.check:
        stale = [path for path, text in pages.items() if _read(path) != text]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            sys.exit(f"error: out of date: {names}; run python -m benchmarks.report to write them")
        return
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path, text in pages.items():
        path.write_text(text)
    for name, results in machines.items():
        draw(results, IMAGES, f"{name}_")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
