"""Takes readings in turns, and leaves out contenders that fail or compute something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.errors import InputError
from jaxtrain.race.processes import ProcessError

# What one process has measured, by case.
Values = dict[str, dict[str, Any]]
# The values of each round, by case and contender.
Readings = dict[str, dict[str, list[dict[str, Any]]]]
# Largest differences of what has been computed at the end of the timed sections, where contenders
# draw different dropout masks: a fraction of the reference's value, and a constant.
Tolerances = Mapping[str, tuple[float, float]]


def take_turns(
    actions: Mapping[str, Callable[[int], Values]],
    rounds: Mapping[str, int],
    *,
    references: Sequence[str],
    tolerances: Tolerances,
    log: Callable[[str], object],
) -> Iterator[tuple[Readings, dict[str, str]]]:
    """Takes readings of each contender in interleaved rounds.

    A contender that fails or computes something else is left out from then on.

    Args:
      actions: from the round to the values that a new process measures, by contender.
      rounds: the number of rounds of each contender.
      references: those with which the others are compared, the first one that has readings.
      tolerances: by which they may differ, by the name of the value.
      log: called with a line about what is measured next.

    Yields:
      After each round, and when Ctrl-C interrupts one, the readings so far, and the reasons of
      those that are left out.
    """
    found: Readings = {}
    failed: dict[str, str] = {}
    interrupted: KeyboardInterrupt | None = None
    total = max(rounds.values(), default=0)
    for index in range(total):
        for name, action in actions.items():
            if name in failed or index >= rounds[name]:
                continue
            log(f"round {index + 1} of {total}: {name}")
            try:
                for case, values in action(index).items():
                    found.setdefault(case, {}).setdefault(name, []).append(values)
            except (ProcessError, InputError) as error:
                failed[name] = str(error)
                log(f"{name} is left out: {error}")
            except KeyboardInterrupt as error:
                interrupted = error
                break
        wrong = check_ends(found, references, tolerances)
        for name, reason in wrong.items():
            log(f"{name} is left out: {reason}")
        failed |= wrong
        for by_name in found.values():
            for name in failed:
                by_name.pop(name, None)
        yield found, failed
        if interrupted is not None:
            raise interrupted


def check_ends(
    readings: Readings, references: Sequence[str], tolerances: Tolerances
) -> dict[str, str]:
    """Compares what has been computed in the timed sections.

    Returns:
      The contenders whose optimizers have made another number of updates than was timed, or whose
      values at the end are far from the reference's, and what is wrong with each.
    """
    wrong: dict[str, str] = {}
    for case, by_name in readings.items():
        chosen = [by_name[name] for name in references if name in by_name]
        reference = (chosen or [*by_name.values(), []])[0]
        for name, values in by_name.items():
            for each in values:
                if "updates" in each and each["updates"] != each["expected_updates"]:
                    wrong[name] = (
                        f"has made {each['updates']} updates in {case}; "
                        f"expected {each['expected_updates']}"
                    )
                for what, (fraction, constant) in tolerances.items():
                    if what in each and what in reference[0]:
                        pair = np.atleast_1d(each[what]), np.atleast_1d(reference[0][what])
                        count = min(map(len, pair))  # some report the last section's alone
                        for value, expected in zip(pair[0][-count:], pair[1][-count:], strict=True):
                            if not abs(value - expected) <= fraction * abs(expected) + constant:
                                wrong[name] = f"ends {case} with the {what} {value:.4g}; " + (
                                    f"expected about {expected:.4g}, as the reference"
                                    if np.isfinite(expected)
                                    else "expected a finite one: use a smaller learning rate"
                                )
    return wrong
