"""run_epoch: one epoch of `fit`, which trains in chunks, checks each, and evaluates at the end."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtrain._processes import agree, gather
from jaxtrain.checkpoint import PartOfEpoch
from jaxtrain.errors import NonFiniteError
from jaxtrain.optimizers import skipped_steps
from jaxtrain.training._chunk import CHUNK_SECONDS, Chunk
from jaxtrain.training._nonfinite import check_arrays, hint_for, raise_for_steps
from jaxtrain.training._plan import Plan, learning_rate
from jaxtrain.training._profile import Profile
from jaxtrain.training._programs import mean_step_loss
from jaxtrain.training._resident import Resident
from jaxtrain.training._streamed import Streamed
from jaxtrain.training.events import OnEvent, StepsDone
from jaxtrain.training.state import TrainState

# Saves a state, the losses of the epoch so far, and what the rest of the epoch needs.
Save = Callable[[TrainState, np.ndarray, PartOfEpoch], None]


def run_epoch(
    plan: Plan,
    state: TrainState,
    epoch: int,
    on_event: OnEvent,
    *,
    part: PartOfEpoch | None,
    losses: np.ndarray,
    every_steps: int | None,
    save: Save,
    profile: Profile | None,
) -> tuple[TrainState, dict[str, float], np.ndarray]:
    """Trains one epoch and evaluates.

    Args:
      plan: the run.
      state: the state before the epoch, or after `part`.
      epoch: the epoch, counted from 1.
      on_event: receives `StepsDone`.
      part: the steps that an earlier call has taken, or None.
      losses: the losses of these.
      every_steps: number of steps between two saves, or None.
      save: called after each multiple of `every_steps`, except at the end of the epoch.
      profile: traces some steps; None traces none.

    Returns:
      The state after the epoch, the history's row, and the losses of the epoch's steps.
    """
    started = time.perf_counter() - (0.0 if part is None else part.seconds)
    skipped_before = skipped_steps(state.opt_state) if part is None else part.skipped

    def save_part(state: TrainState, losses: np.ndarray, weights: np.ndarray, at: Chunk) -> None:
        positions = gather(json.dumps(at.position)) if isinstance(plan.train, Streamed) else None
        seconds = time.perf_counter() - started
        skipped = 0 if skipped_before is None else int(skipped_before)
        save(state, losses, PartOfEpoch(at.stop, at.examples, weights, skipped, seconds, positions))

    before = state
    state, losses, weights, norm = _train(
        plan, state, epoch, on_event, part, losses, every_steps, save_part, profile
    )
    check_arrays(before, state, epoch)
    skipped_after = skipped_steps(state.opt_state)
    skips = skipped_after is not None
    skipped = int(skipped_after) - int(skipped_before or 0) if skipped_after is not None else 0
    if skipped == len(losses):  # further epochs would change nothing
        quantity, value = "training loss or gradient of every step", float(losses[0])
        hint = "check the data, or try a smaller learning rate"
        raise NonFiniteError(epoch, None, quantity, value, learning_rate(state), hint)
    rate = learning_rate(state)
    if isinstance(plan.train, Resident):
        per_step: Any = plan.train.step_weights(epoch)
    else:
        per_step = weights
    row: dict[str, float] = {
        "epoch": epoch,
        "train_loss": float(mean_step_loss(losses, per_step, skip_nonfinite=skips)),
        **_evaluate(plan, state, epoch),
        **{name: float(metric(state)) for name, metric in plan.state_metrics.items()},
        "gradient_norm": norm,
        "skipped_steps": skipped,
        **({} if rate is None else {"learning_rate": rate}),
    }
    state = state.replace(epoch=before.epoch + 1)
    return state, row | {"seconds": agree(time.perf_counter() - started)}, losses


def _train(
    plan: Plan,
    state: TrainState,
    epoch: int,
    on_event: OnEvent,
    part: PartOfEpoch | None,
    losses: np.ndarray,
    every_steps: int | None,
    save_part: Callable[[TrainState, np.ndarray, np.ndarray, Chunk], None],
    profile: Profile | None,
) -> tuple[TrainState, np.ndarray, np.ndarray, float]:
    """Trains one epoch; returns the state, the steps' losses and weights, and the last norm."""
    weights = np.empty(0, np.float32) if part is None else part.weights
    # Only process 0 of several may show progress, and all must take the same steps at once.
    interval = agree(getattr(on_event, "steps_between_events", 0))
    reported, reported_at, norm = len(losses), 0.0, np.float32(np.nan)
    last: Chunk | None = None
    ends = () if profile is None else profile.ends(len(losses))
    chunks = plan.train.chunks(epoch, part, interval, every_steps, ends)

    def report(chunk: Chunk) -> None:
        nonlocal reported, reported_at
        on_event(StepsDone(epoch, chunk.stop, chunk.examples, losses[reported:], state))
        reported, reported_at = chunk.stop, time.perf_counter()

    with chunks as each:
        for chunk in each:
            before = state
            with contextlib.nullcontext() if profile is None else profile.chunk(chunk):
                state, found, norms, totals = chunk.run(before)
            finite = np.isfinite(found) & np.isfinite(norms)
            if not finite.all() and skipped_steps(state.opt_state) is None:
                raise_for_steps(chunk, before, epoch, finite)
            losses, weights = np.append(losses, found), np.append(weights, totals)
            norm, last = norms[-1], chunk
            is_due = time.perf_counter() - reported_at > CHUNK_SECONDS / 2
            is_multiple = every_steps is not None and chunk.stop % every_steps == 0
            saves = is_multiple and not chunk.ends_epoch
            if is_due or saves or (interval and chunk.stop % interval == 0):
                report(chunk)
            if saves:
                save_part(state, losses, weights, chunk)
    if last is not None and reported < len(losses):
        report(last)
    return state, losses, weights, float(norm)


def steps_between_saves(plan: Plan, every_steps: int | None) -> int | None:
    """Returns after how many steps to save within an epoch; None, with a warning, if impossible."""
    train = plan.train
    if every_steps is None or not isinstance(train, Streamed) or train.batches.has_position:
        return every_steps
    warnings.warn(
        f"{train.batches.name} is {train.batches!r}, which has no position, so every_steps="
        f"{every_steps} saves nothing and an interrupted run resumes at the start of the epoch; "
        "use jaxtrain.data.stream or an iterator of Grain to resume within it",
        stacklevel=3,
    )
    return None


def _evaluate(plan: Plan, state: TrainState, epoch: int) -> dict[str, float]:
    """Evaluates the test and validation data; a loss that is not finite ends the run."""
    row: dict[str, float] = {}
    for part in plan.held_out:
        values = plan.evaluate(state, part, epoch)
        row |= {f"{part}_{name}": value for name, value in values.items()}
        if not np.isfinite(row[f"{part}_loss"]):
            raise NonFiniteError(
                epoch,
                None,
                f"{part} loss",
                row[f"{part}_loss"],
                learning_rate(state),
                hint_for(state),
            )
    return row
