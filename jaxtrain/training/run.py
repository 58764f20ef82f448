"""train: a whole run as one compiled program, which may be vmapped and differentiated."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxtrain import parallel
from jaxtrain._arguments import check_arguments, check_integer
from jaxtrain._compiler import bounded
from jaxtrain._device_memory import memory_advice
from jaxtrain._processes import check_same
from jaxtrain._static_key import ByKey
from jaxtrain.callbacks.early_stopping import EarlyStopping
from jaxtrain.dataset import Dataset, epoch_order, without_drop_last
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.metrics import Metric
from jaxtrain.training.checks import check_missing_targets, check_run
from jaxtrain.training.independence import check_independence
from jaxtrain.training.loop import StepLog, compiled_evaluate, train_in_order
from jaxtrain.training.sources import AnySource, InMemory, Repeated, Streamed, make_source
from jaxtrain.training.state import checked_state, counters, next_epoch, recorded, with_epoch
from jaxtrain.training.step import (
    Objective,
    StepFn,
    describe_step,
    evaluation_key,
    finish_metrics,
    make_objective,
)

State = TypeVar("State")


def train(
    state: State,
    train: Dataset | tuple[Any, ...],
    test: Dataset | tuple[Any, ...] | None = None,
    *,
    loss_fn: Loss | None = None,
    metric_fns: Mapping[str, Metric] | None = None,
    state_metrics: Mapping[str, Callable[[Any], Any]] | None = None,
    epochs: int = 5,
    batch_size: int = 64,
    test_batch_size: int = 1000,
    key: Key[Array, ""] | None = None,
    validation: Dataset | tuple[Any, ...] | None = None,
    early_stopping: EarlyStopping | None = None,
    step_fn: StepFn | None = None,
) -> tuple[State, dict[str, Array]]:
    """Trains for some epochs and evaluates after each, in one compiled program.

    The function computes what `fit` computes from the same arguments. It does not return to the
    host between epochs, so it may be called under `jit`, vmapped over states, keys or numbers such
    as learning rates, and differentiated with respect to these numbers. In return it saves nothing,
    reports nothing, and does not stop at a NaN: the run continues, and its later rows are NaN.

    Args:
      state: where to start; not modified.
      train: inputs and targets with leading axis [examples], a `Dataset` or a tuple.
      test: evaluated after each epoch; None skips it.
      loss_fn: per-example loss; may be left out with `step_fn` and without evaluations.
      metric_fns: metrics by name, of the training, test and validation data.
      state_metrics: further columns of the history by name, functions of the state after an epoch,
        written in JAX.
      epochs: passes over `train`.
      batch_size: examples per step.
      test_batch_size: examples at a time in evaluation.
      key: PRNG key of the shuffle; epoch e is shuffled with `fold_in(key, e)`. None keeps the
        stored order.
      validation: evaluated after each epoch, for early stopping.
      early_stopping: `jt.callbacks.early_stopping(...)` stops training when a column of the
        history no longer improves, and returns the best state. The rows of the remaining epochs are
        NaN, with 0 in the column `epoch`. Under `vmap`, a run that has stopped takes as long as the
        longest one.
      step_fn: a custom step function, as for `fit`.

    Returns:
      The state after the last epoch, and the history: the columns of `fit` except `seconds`, each
      with one entry per epoch, [epochs, ...], and `step_losses`, [epochs, steps].

    Raises:
      InputError: an argument is out of range; the data are not finite, or do not fit the model or
        the loss. Values that are traced are not checked.
      OutOfMemoryError: the run does not fit on the device.

    Example:
      >>> def run(seed):
      ...     key = jax.random.key(seed)
      ...     state = jt.init_state(model, optimizer, train.inputs[:1], key=key)
      ...     return jt.train(state, train, test, loss_fn=loss_fn, epochs=5, key=key)
      >>> states, history = jax.jit(jax.vmap(run))(jnp.arange(3))
      >>> history["test_loss"].shape
      (3, 5)
    """
    check_arguments(globals()["train"], locals())  # `train` is an argument
    check_integer(epochs, "epochs", minimum=0)
    if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
        raise InputError(
            f"early_stopping is {early_stopping!r}; expected None or "
            "jaxtrain.callbacks.early_stopping(...)",
            argument="early_stopping",
        )
    for name, metric in (state_metrics or {}).items():
        if not callable(metric):
            raise InputError(
                f"the state metric {name} is {metric!r}; expected a function of the state"
            )
    objective = make_objective(loss_fn, metric_fns, step_fn)
    given = {"train": train, "test": test, "validation": validation}
    sizes = (batch_size, test_batch_size)
    with contextlib.ExitStack() as stack:
        state, sources, columns = prepare(
            *(state, given, objective, sizes, key, stack),
            state_metrics=state_metrics or (),
            settings=lambda: {"epochs of the program": epochs, "early_stopping": early_stopping},
        )
        data = {name: _in_memory(source, name) for name, source in sources.items()}
        if early_stopping is not None:
            early_stopping.check_columns(columns)
        with memory_advice(batch_size):
            settings = _Settings(
                objective,
                tuple((state_metrics or {}).items()),
                epochs,
                batch_size,
                test_batch_size,
                early_stopping,
            )
            final, history = _train(state, data.pop("train"), data, key, ByKey(settings))
    # A dict that leaves a compiled program is sorted by name.
    return final, {name: history[name] for name in (*columns, "step_losses")}


def _in_memory(source: AnySource, name: str) -> Dataset:
    if isinstance(source, InMemory):
        return source.sample
    raise InputError(
        f"{name} is a stream; expected a jaxtrain.Dataset, or a tuple (inputs, targets): "
        "jaxtrain.fit trains on streams"
    )


def prepare(
    state: Any,
    given: Mapping[str, Any],
    objective: Objective,
    batch_sizes: tuple[int, int],
    key: Key[Array, ""] | None,
    stack: contextlib.ExitStack,
    *,
    epochs: int = 1,
    steps: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    state_metrics: Iterable[str] = (),
    settings: Callable[[], Mapping[str, Any]] = dict,
) -> tuple[Any, dict[str, AnySource], tuple[str, ...]]:
    """Checks the arguments of `train` or `fit`, and moves state and data to the devices.

    `given` has the data by the names "train", "test" and "validation", and None for data that are
    not given. `batch_sizes` are those of training and evaluation. `stack` leaves the mesh and
    closes the streams. In a run by steps, an epoch has `steps`. Several processes compare all of
    it, and what `settings` returns, before they compute together.

    Returns:
      The state; the sources by the names of the data; and the columns of the history but `seconds`.
    """
    for size, name in zip(batch_sizes, ("batch_size", "test_batch_size"), strict=True):
        check_integer(size, name, minimum=1)
    train, step_fn = given["train"], objective.step_fn
    held_out = {n: data for n, data in given.items() if n != "train" and data is not None}
    if objective.loss_fn is None and (held_out or objective.metrics):
        raise InputError(
            "loss_fn is None with data or metrics to evaluate; expected a loss, or step_fn alone",
            argument="loss_fn",
        )
    state, epoch = checked_state(state, step_fn), next_epoch(state)
    in_memory = [x for x in (train, *held_out.values()) if isinstance(x, Dataset | tuple)]
    stack.enter_context(parallel.mesh_of(state, *in_memory, mesh=mesh))
    state = parallel.placed(state, "state")
    with memory_advice(batch_sizes[0]):
        sources: dict[str, Any] = {
            "train": make_source(train, "train", batch_sizes[0], key, epoch, stack)
        }
        for name, data in held_out.items():
            data = without_drop_last(data)
            sources[name] = make_source(data, name, batch_sizes[1], None, epoch, stack)
    for name, source in sources.items():
        if isinstance(source, Streamed) and name != "train":
            source.close()  # workers would run until the first evaluation
        if isinstance(source, Streamed) and (name != "train" or steps is None):
            source.check_ends(epochs)
    check_same(
        lambda: {
            "epochs": epochs,
            "steps per epoch": steps,
            **{f"{name} batch_size": each.batch_size for name, each in sources.items()},
            **{f"{name} data": each.describe_order() for name, each in sources.items()},
            **settings(),
        }
    )
    returned = check_run(state, sources, objective)
    check_same(lambda: describe_step(state, sources["train"].batch_shapes(), objective))
    for source in sources.values():
        if isinstance(source, InMemory) and (source.name != "train" or step_fn is None):
            check_missing_targets(state, source.sample, objective.loss_fn, source.name)
    if step_fn is None:
        check_independence(state, sources["train"])
    if steps is not None:
        sources["train"] = Repeated(sources["train"], steps, epochs, state)
        stack.enter_context(contextlib.closing(sources["train"]))
    columns = [
        *(("epoch",) if steps is None else ("epoch", "step")),
        *(f"train_{name}" for name in ("loss", *returned, *dict(objective.trained))),
        *(f"{part}_{name}" for part in held_out for name, _ in objective.evaluated),
        *state_metrics,
        *recorded(state),
    ]
    for name in columns:
        if columns.count(name) > 1 or name in ("step_losses", "seconds"):
            raise InputError(
                f"the history would have two columns named {name!r}; rename one of the metrics"
            )
    return state, sources, tuple(columns)


def history_row(
    counts: Mapping[str, Any],
    log: StepLog,
    values: Mapping[str, Any],
    objective: Objective,
    evaluations: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the history's row for an epoch.

    `counts` are the counters of the optimizer before the epoch, and `values` what the optimizer
    recorded in the last step; `evaluations` has the metrics of each held-out data set by its name.
    """
    skips = "skipped_steps" in values
    row = {"train_loss": mean_step_loss(log.loss, log.weight, skip_nonfinite=skips)}
    row |= {
        f"train_{name}": value
        for name, value in finish_metrics(log.totals, objective.trained).items()
    }
    for part, metrics in evaluations.items():
        row |= {f"{part}_{name}": value for name, value in metrics.items()}
    for name, value in values.items():
        row[name] = value - counts[name] if name in counts else value
    return row


@functools.partial(jax.jit, static_argnames="skip_nonfinite")
def mean_step_loss(
    losses: Float[Array, "steps"], weights: Float[Array, "steps"], *, skip_nonfinite: bool
) -> Float[Array, ""]:
    """Returns the mean over an epoch's examples of the loss before each update.

    `weights` are the total weights of the examples of each step. With `skip_nonfinite`, steps whose
    loss is NaN or infinite are left out. NaN if no step has a weight.
    """
    weights = weights.astype(losses.dtype)
    if skip_nonfinite:
        finite = jnp.isfinite(losses)
        losses, weights = jnp.where(finite, losses, 0), jnp.where(finite, weights, 0)

    def add(sums: tuple[Array, Array], pair: tuple[Array, Array]) -> tuple[Any, None]:
        loss, weight = pair
        return (sums[0] + loss * weight, sums[1] + weight), None

    # A scan gives the same bits alone, in `fit`, and inside the program of `train`; a sum does not,
    # since XLA fuses it with the operations around it.
    zero = jnp.zeros((), losses.dtype)
    (loss, total), _ = lax.scan(add, (zero, zero), (losses, weights))
    return loss / total


class _Settings(NamedTuple):
    """What the program of `train` is compiled for; hashable."""

    objective: Objective
    state_metrics: tuple[tuple[str, Callable[[Any], Any]], ...]
    epochs: int
    batch_size: int
    test_batch_size: int
    early_stopping: EarlyStopping | None


@bounded
@functools.partial(jax.jit, static_argnames="static")
def _train(
    state: Any,
    train_data: Dataset,
    held_out: dict[str, Dataset],
    key: Key[Array, ""] | None,
    static: ByKey,
) -> tuple[Any, dict[str, Array]]:
    settings: _Settings = static.value
    objective, size = settings.objective, settings.test_batch_size

    def run(
        state: Any, train_data: Dataset, held_out: dict[str, Dataset], key: Array | None
    ) -> tuple[Any, dict[str, Array]]:
        def one_epoch(state: Any) -> tuple[Any, dict[str, Array]]:
            epoch, counts = state.epoch + 1, counters(state)
            epoch_key = None if key is None else jax.random.fold_in(key, epoch)
            order = epoch_order(len(train_data), epoch_key)
            state, log = train_in_order(state, train_data, order, objective, settings.batch_size)
            state = with_epoch(state, epoch)
            evaluations = {}
            for part, data in held_out.items():
                own_key = evaluation_key(state, objective)
                evaluations[part] = compiled_evaluate(
                    state, data, objective, own_key, batch_size=size
                )
            row = history_row(counts, log, recorded(state), objective, evaluations)
            row |= {"epoch": epoch, "step_losses": log.loss}
            row |= {name: metric(state) for name, metric in settings.state_metrics}
            return state, jax.tree.map(jnp.asarray, row)

        if settings.early_stopping is None:
            return lax.scan(lambda state, _: one_epoch(state), state, length=settings.epochs)
        return _scan_until_stopped(one_epoch, state, settings.epochs, settings.early_stopping)

    return parallel.on_auto_axes(run, state, train_data, held_out, key, like=(state, None))


def _scan_until_stopped(
    one_epoch: Callable[[Any], tuple[Any, dict[str, Array]]],
    state: Any,
    epochs: int,
    early_stopping: EarlyStopping,
) -> tuple[Any, dict[str, Array]]:
    """Returns the best state and the history; epochs after the end are not trained."""
    no_row = jax.tree.map(_missing, jax.eval_shape(one_epoch, state)[1])
    start, dtype = early_stopping.min_epochs, jnp.result_type(float)

    def run_unless_stopped(carry: Any, index: Array) -> tuple[Any, dict[str, Array]]:
        state, best_state, best, waited = carry
        stopped = waited >= early_stopping.patience
        state, row = lax.cond(stopped, lambda state: (state, no_row), one_epoch, state)
        value = jnp.asarray(row[early_stopping.monitor], dtype)
        better = early_stopping.is_better(value, best) & ~stopped
        # The first epoch that is judged is the best so far; before it, the current one is kept.
        better |= index <= start
        best_state = jax.tree.map(lambda new, old: jnp.where(better, new, old), state, best_state)
        best, waited = jnp.where(better, value, best), jnp.where(better, 0, waited + 1)
        return (state, best_state, best, waited), row

    carry = (state, state, jnp.array(jnp.nan, dtype), jnp.array(0))
    carry, history = lax.scan(run_unless_stopped, carry, jnp.arange(epochs))
    return carry[1], history


def _missing(leaf: jax.ShapeDtypeStruct) -> Array:
    """Returns the value of a column for an epoch that is not trained."""
    missing = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
    return jnp.full(leaf.shape, missing, leaf.dtype)
