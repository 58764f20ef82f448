"""fit: the loop over epochs on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import reprlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._carry import keep_types
from jaxtrain._compile_time import CompileTime
from jaxtrain._device_memory import memory_advice
from jaxtrain._json import rounded
from jaxtrain._placement import describe_values, read_only
from jaxtrain._processes import agree, check_same, process_lost_errors
from jaxtrain.callbacks import Callback, checked_callbacks
from jaxtrain.callbacks.progress import default_callbacks
from jaxtrain.checkpoint import describe_function, identify, without_addresses
from jaxtrain.data.stream import Source
from jaxtrain.dataset import Dataset, named_arrays
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss, name_of
from jaxtrain.metrics import Metric
from jaxtrain.training.checks import check_epoch, check_state, check_step_count, check_steps
from jaxtrain.training.history import NO_LOSSES, History, Run
from jaxtrain.training.loop import (
    compiled_evaluate,
    compiled_steps,
    copied,
    evaluate_source,
    first_log,
)
from jaxtrain.training.run import history_row, prepare
from jaxtrain.training.sources import AnySource, Segment, segments_in_order
from jaxtrain.training.state import counters, recorded, with_epoch
from jaxtrain.training.step import (
    Objective,
    StepFn,
    evaluation_key,
    make_objective,
    program_of_step,
)

# Target duration of a compiled call, after which Ctrl-C is handled; and the time after which
# `on_steps` is called although no callback asks for it.
_CALL_SECONDS, _REPORT_SECONDS = 1.0, 0.5
_EXPECTED_START = "the same state in every process, and one checkpoint folder for all of them"

State = TypeVar("State")
AnyData = Dataset | tuple[Any, ...] | Iterable[Any] | Source


def fit(
    state: State,
    train: AnyData,
    test: AnyData | None = None,
    *,
    loss_fn: Loss | None = None,
    metric_fns: Mapping[str, Metric] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    evaluate_every: int | None = None,
    batch_size: int = 64,
    test_batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
    validation: AnyData | None = None,
    callbacks: Sequence[Callback | Callable[[Run], Any]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    step_fn: StepFn | None = None,
) -> tuple[State, History]:
    """Trains for some epochs, or some steps, and evaluates after each epoch.

    Calling it again with the returned state and the same data continues the run: 2 epochs and then
    3 give exactly the results of 5 in one call. With `jt.callbacks.checkpoint`, the same call
    resumes an interrupted run from its newest checkpoint. On the same CPU with the same versions,
    the results are bit-identical to those of an uninterrupted run.

    A NaN or infinity in a loss or the state ends the run before the epoch is reported or saved;
    `optimizers.skip_nonfinite` leaves out the steps of a few bad batches instead.

    Args:
      state: where to start; not modified.
      train: inputs and targets with leading axis [examples], a `Dataset` or a tuple; or a stream,
        such as `jt.data.stream`, a Grain or PyTorch loader, any iterable of batches, or an object
        with `len(train)` and `train[index]`. A `Dataset` with `np.memmap` arrays is read as a
        stream.
      test: evaluated after each epoch; may be a stream; None skips it.
      loss_fn: per-example loss; may be left out with `step_fn` and without evaluations.
      metric_fns: metrics by name, of the training, test and validation data. With `step_fn`, of
        test and validation data: the step returns those of the training data.
      epochs: passes over `train` after `state`, 5 by default. Epochs restored from a checkpoint
        count, so a resumed run trains only the remaining ones.
      steps: number of steps, instead of `epochs`; the data are repeated as needed, and a stream may
        be endless.
      evaluate_every: number of steps between two evaluations and rows of the history, in a run by
        steps. An epoch is then that many steps, also for callbacks. `steps` must be a multiple of
        it, and is its default.
      batch_size: examples per step, of all devices together; a stream of batches has its own, and
        then the argument is not used.
      test_batch_size: the same for test and validation data.
      key: PRNG key of the shuffle; epoch e is shuffled with `fold_in(key, e)`. None keeps the
        stored order.
      validation: evaluated after each epoch, for early stopping.
      callbacks: what `jt.callbacks` has, your own `Callback`, or functions `callback(run)`, called
        after each epoch, that return True to end the run, a changed state, or None. Without
        `callbacks`, progress is shown in a terminal or a notebook; [] is silent.
      mesh: devices with an axis "data", over which each batch is divided. State and data are
        copied to every device, unless `jt.parallel` has sharded them. None means the mesh of
        `jax.set_mesh` or of the data, if there is one.
      step_fn: a custom step function in place of `train_step`, of the form
        `step_fn(state, batch) -> (state, {"loss": ...})`. It must increase `state.step` by one;
        other scalars that it returns become columns `train_NAME`. The state may then be any pytree
        with `step`, `epoch` and `key`; evaluation needs a `TrainState`.

    Returns:
      The state after the last epoch, or the best one if a callback keeps it; and the history with
      one entry per epoch: `epoch`; `step`, in a run by steps; `train_loss` and `train_NAME` for
      each metric, over the epoch's own predictions before each update; `test_loss`, `test_NAME`,
      and the same for validation; what the optimizer records: `skipped_steps`, `learning_rate` of
      the last step, `gradient_norm`; and `seconds`, of training and evaluation without compiling.
      `history.step_losses` has one entry per step.

    Raises:
      InputError: an argument is out of range; the data are not finite, or do not fit the model or
        the loss; a callback cannot start, for example because the checkpoints belong to another
        run; or several processes differ in what they should train together.
      NonFiniteError: a loss or an array of the state became NaN or infinite.
      OutOfMemoryError: the device has too little memory.
      StorageError: a checkpoint could not be written, and earlier ones are intact.
      StreamError: a stream raised an error.
      MissingExtraError: data are on disk, and `jaxtrain[stream]` is not installed.
      ProcessLostError: another process of the cluster ended.

    After the arguments are checked, any exception, KeyboardInterrupt included, has the attributes
    `state` and `history` of the last completed epoch. If the run resumed within an epoch, `state`
    is the restored state until that epoch is complete.

    Example:
      >>> state, history = jt.fit(
      ...     state, train, test, loss_fn=loss_fn, metric_fns={"accuracy": jt.metrics.accuracy},
      ...     epochs=10, batch_size=16, key=jax.random.key(0),
      ... )
      >>> history["test_accuracy"].shape
      (10,)
      >>> state, history = jt.fit(
      ...     state, train, loss_fn=loss_fn, steps=100, evaluate_every=25, batch_size=16
      ... )
      >>> history["step"] - history["step"][0]
      array([ 0, 25, 50, 75])
    """
    check_arguments(fit, locals(), eager="call jaxtrain.train, which computes the same")
    epochs, steps_per_epoch = _checked_length(epochs, steps, evaluate_every)
    called = _in_order(
        checked_callbacks(default_callbacks() if callbacks is None else callbacks, "on_epoch")
    )
    objective = make_objective(loss_fn, metric_fns, step_fn)
    given = {"train": train, "test": test, "validation": validation}
    sizes = (batch_size, test_batch_size)
    with contextlib.ExitStack() as stack:
        start, sources, columns = prepare(
            *(state, given, objective, sizes, key, stack),
            epochs=epochs,
            steps=steps_per_epoch,
            mesh=mesh,
            settings=functools.partial(_describe_callbacks, called),
        )
        source: Any = sources["train"]
        run = completed = Run(
            state=start,
            epoch=int(start.epoch),
            last_epoch=int(start.epoch) + epochs,
            columns=(*columns, "seconds"),
            log=read_only(first_log(start, source.batch_shapes(), objective)),
            steps_per_epoch=source.steps,
            examples_per_epoch=source.examples,
            test_examples=sources["test"].examples if "test" in sources else 0,
            monitor=next((each.monitor for each in called if each.monitor is not None), None),
            describe=functools.partial(_describe, start, sources, objective, columns),
        )
        del start  # which on a mesh is a copy of the state

        def ending(function: Callable[[Run, BaseException | None], None]) -> Any:
            # Reads `completed` when the stack unwinds, not when it is pushed.
            def end(kind: object, error: BaseException | None, trace: object) -> None:
                function(completed, error)

            return end

        stack.push(ending(_attach))
        stack.enter_context(process_lost_errors())
        timer = stack.enter_context(CompileTime())
        for callback in sorted(called, key=lambda each: not each.saves):
            stack.push(ending(callback.on_end))
            run = completed = callback.on_start(run) or run
        check_same(functools.partial(_describe_start, run), _EXPECTED_START)
        trainer = _Trainer(source, objective, called, timer)
        counts = {name: int(value) for name, value in counters(run.state).items()}
        counts = run.counts if run.step else counts
        run = completed = run.replace(counts=counts, describe=dict)
        while run.epoch < run.last_epoch and not run.is_over:
            before, begun = run, timer.clock() - run.seconds
            run = trainer(run, begun)
            after = with_epoch(run.state, before.state.epoch + 1)
            values = _evaluate(after, sources, objective, run.epoch + 1)
            row = history_row(run.counts, run.log, recorded(after), objective, values)
            row = _to_host({"epoch": run.epoch + 1, "step": after.step, **row})
            check_epoch(before.state, after, run.log, row, sources, objective)
            row["seconds"] = agree(timer.clock() - begun)
            run = completed = run.after_epoch(after, row, timer.seconds)
            for callback in called:
                run = _agreed(run, after) if callback.saves else run
                run = _after(run, callback)
            run = completed = _agreed(run, after)
    return (run.state if run.best is None else run.best), run.history


@dataclasses.dataclass
class _Trainer:
    """Takes the remaining steps of an epoch, in compiled calls of at most about a second.

    Attributes:
      source: the training data.
      objective: what the steps minimize and measure.
      callbacks: called after blocks of steps.
      timer: measures the time of compiling.
      seconds_per_step: of the latest call that compiled nothing; infinite before the first one.
      reported: when `on_steps` was last called.
    """

    source: AnySource
    objective: Objective
    callbacks: list[Callback]
    timer: CompileTime
    seconds_per_step: float = math.inf
    reported: float = 0.0

    def __call__(self, run: Run, begun: float) -> Run:
        """Returns the run after the last step of an epoch, which began at the time `begun`."""
        before, start = run.state, run.step
        run = run.replace(state=copied(before))
        segments = self.source.segments(run.epoch + 1, start, run.position)
        advice = memory_advice(self.source.batch_size, functools.partial(self._lower, before))
        with advice, contextlib.closing(segments):
            for segment in segments:
                while run.step < segment.start + segment.steps:
                    pauses = {each: each.next_pause(run) or 0 for each in self.callbacks}
                    later = [step for step in pauses.values() if step > run.step]
                    pause = min(later, default=math.inf)
                    run = self._take_steps(run, segment, pause)
                    if any(each.saves and pauses[each] == run.step for each in self.callbacks):
                        values = _to_host(recorded(run.state))
                        check_state(before, run.state, run.epoch + 1, run.step, values)
                    now = time.perf_counter()
                    if agree(run.step == pause or now - self.reported > _REPORT_SECONDS):
                        run, self.reported = self._report(run, begun), now
            if len(run.losses):
                run, self.reported = self._report(run, begun), time.perf_counter()
        if self.objective.step_fn is not None:
            check_step_count(before, run.state, run.step - start)
        return run

    def _take_steps(self, run: Run, segment: Segment, pause: float) -> Run:
        """Returns the run after one call, at the latest at the step `pause` of the epoch."""
        first = run.step - segment.start
        steps = max(1, int(_CALL_SECONDS / self.seconds_per_step))
        stop = min(first + steps, segment.steps, pause - segment.start)
        stop = agree(int(stop))  # all processes take the same steps at once
        started, compiled = time.perf_counter(), self.timer.seconds
        state, log = compiled_steps(run.state, run.log.totals, segment, first, stop, self.objective)
        run = run.after_steps(state, segment, stop, log)  # waits for the device
        check_steps(state, log, segment, run.epoch + 1, self.source, self.objective)
        if self.timer.seconds == compiled:
            self.seconds_per_step = (time.perf_counter() - started) / (stop - first)
        return run

    def _report(self, run: Run, begun: float) -> Run:
        """Calls `on_steps`."""
        run = run.replace(seconds=self.timer.clock() - begun, compile_seconds=self.timer.seconds)
        for callback in self.callbacks:
            callback.on_steps(run)
        return run.replace(losses=NO_LOSSES)

    def _lower(self, state: Any, batch_size: int) -> jax.stages.Lowered:
        """Lowers the training steps at another batch size; of a stream, on its first batch."""
        data = self.source.sample
        segment = segments_in_order(data, jnp.arange(len(data)), batch_size)[0]
        return compiled_steps.lower(state, None, segment, 0, 1, self.objective)


def _checked_length(
    epochs: int | None, steps: int | None, evaluate_every: int | None
) -> tuple[int, int | None]:
    """Returns the number of epochs, and of steps per epoch, or None for a pass over the data."""
    for value, name in ((epochs, "epochs"), (steps, "steps"), (evaluate_every, "evaluate_every")):
        if value is not None:
            check_integer(value, name, minimum=0 if name == "epochs" else 1)
    if steps is None:
        epochs = 5 if epochs is None else epochs
        if evaluate_every is not None:
            raise InputError(
                f"evaluate_every is {evaluate_every} and steps is None; expected a number of steps "
                f"as well: steps={max(1, epochs) * evaluate_every} for {max(1, epochs)} "
                "evaluations",
                argument="evaluate_every",
            )
        return epochs, None
    if epochs is not None:
        raise InputError(
            f"epochs is {epochs} and steps is {steps}; expected one of them: steps={steps} and "
            "evaluate_every=... for evaluations in between",
            argument="steps",
        )
    evaluate_every = steps if evaluate_every is None else evaluate_every
    if steps % evaluate_every:
        below = steps // evaluate_every * evaluate_every
        found = " or ".join(str(each) for each in (below, below + evaluate_every) if each)
        raise InputError(
            f"steps is {steps} and evaluate_every is {evaluate_every}; expected a multiple of it, "
            f"such as {found} steps",
            argument="steps",
        )
    return steps // evaluate_every, evaluate_every


def _describe_callbacks(callbacks: list[Callback]) -> dict[str, str]:
    """Describes the callbacks that all processes must have; others may be in one of them only."""
    found = [each for each in callbacks if each.saves or each.monitor is not None]
    described = ", ".join(without_addresses(repr(each)) for each in found)
    return {"saving and monitoring callbacks": described or "none"}


def _describe_start(run: Run) -> dict[str, str]:
    after = f"step {run.step} of epoch {run.epoch + 1}" if run.step else f"epoch {run.epoch}"
    return {"the start": f"after {after}"} | {
        path: describe_values(leaf) for path, leaf in named_arrays(run.state, "state")
    }


def _agreed(run: Run, before: Any) -> Run:
    """Returns the run with the decision of process 0 whether it ends; callbacks may differ.

    Raises:
      InputError: the processes' callbacks have changed the state `before` differently.
    """
    check_same(
        lambda: {
            path: describe_values(leaf) if run.state is not before else "unchanged"
            for path, leaf in named_arrays(run.state, "state")
        },
        "callbacks that change the state in the same way in every process",
    )
    is_over = agree(run.is_over)
    return run if is_over == run.is_over else run.replace(is_over=is_over)


def _after(run: Run, callback: Callback) -> Run:
    """Returns the run after `on_epoch` of a callback, which may change or end it."""
    result = callback.on_epoch(run)
    changed = run
    if isinstance(result, Run):
        changed = result
    elif isinstance(result, type(run.state)):
        changed = run.replace(state=result)
    elif isinstance(result, bool) or (
        getattr(result, "dtype", None) == np.dtype(bool) and result.ndim == 0
    ):
        changed = run.replace(is_over=run.is_over or bool(result))
    elif result is not None:
        raise InputError(
            f"the callback {name_of(callback.on_epoch)} returned {reprlib.repr(result)}; expected "
            "True to end the run, False or None, a changed state, or a changed run",
            argument="callbacks",
        )
    if changed.state is run.state:
        return changed
    state = keep_types(changed.state, run.state, "a callback", "callbacks")
    return changed.replace(state=jax.tree.map(jnp.asarray, state))


def _attach(completed: Run, error: BaseException | None) -> None:
    """Attaches the state and the history of the last completed epoch to an error."""
    if error is not None:
        with contextlib.suppress(Exception):  # an error that takes no attributes
            error.state, error.history = completed.state, completed.history  # type: ignore[attr-defined]


def _evaluate(
    state: Any, sources: Mapping[str, Any], objective: Objective, epoch: int
) -> dict[str, dict[str, Any]]:
    """Returns the loss and the metrics of each held-out data set."""
    found = {}
    for name, source in sources.items():
        if name != "train":
            key = evaluation_key(state, objective)

            def lower(
                batch_size: int, data: Any = source.sample, key: Any = key
            ) -> jax.stages.Lowered:
                return compiled_evaluate.lower(state, data, objective, key, batch_size=batch_size)

            with memory_advice(source.batch_size, lower, "test_batch_size"):
                found[name] = jax.device_get(evaluate_source(state, source, objective, epoch, key))
    return found


def _to_host(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the history as Python numbers, and arrays of NumPy."""
    values = {name: np.asarray(value) for name, value in row.items()}
    numbers = {name: x.item() if x.ndim == 0 else x for name, x in values.items()}
    if "learning_rate" in numbers:
        numbers["learning_rate"] = rounded(numbers["learning_rate"])
    return numbers


def _in_order(callbacks: list[Callback]) -> list[Callback]:
    """Returns the callbacks in the order in which they are called: those that save are last."""
    monitored = sorted({each.monitor for each in callbacks if each.monitor is not None})
    if len(monitored) > 1:
        raise InputError(
            f"the callbacks judge epochs by {' and '.join(monitored)}; expected one column, since "
            "fit returns one best state",
            argument="callbacks",
        )
    return sorted(callbacks, key=lambda each: each.saves)


def _describe(
    state: Any,
    sources: Mapping[str, AnySource],
    objective: Objective,
    columns: tuple[str, ...],
) -> dict[str, Any]:
    """Returns what identifies a run, by which a checkpoint decides whether it may resume."""
    source = sources["train"]
    rate = recorded(state).get("learning_rate")
    reading = {f"what reads {name}": _describe_reading(each) for name, each in sources.items()}
    return identify(
        state,
        settings={f"{name} data": each.describe() for name, each in sources.items()}
        | {f"{name} batch size": each.batch_size for name, each in sources.items()}
        | {"columns": ", ".join(columns)},
        program=program_of_step(state, source.batch_shapes(), objective),
        descriptions={
            "model": repr(getattr(state, "model", None)),
            "loss": describe_function(objective.step_fn or objective.loss_fn),
            "metrics": ", ".join(describe_function(metric) for _, metric in objective.metrics),
            "learning rate": "unknown" if rate is None else f"{rounded(rate):g}",
        },
        reading={name: text for name, text in reading.items() if text},
        seekable=source.is_seekable,
    )


def _describe_reading(source: AnySource) -> str:
    """Returns what reads a stream that resumes within an epoch; warns if it cannot be compared."""
    opaque: set[str] = set()
    text = source.describe_reading(opaque)
    if opaque:
        warnings.warn(
            f"{source.name} reads from an object with {', '.join(sorted(opaque))}, which cannot be "
            "compared; if what it reads changes, a run that resumes does not notice",
            stacklevel=2,
        )
    return text
