"""Checks on the host: of arguments before anything compiles, and of the results of each call."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxtrain import adapters, parallel
from jaxtrain._carry import keep_types
from jaxtrain._compiler import bounded
from jaxtrain._json import rounded
from jaxtrain._placement import has_values, is_key, to_numpy
from jaxtrain.dataset import (
    Dataset,
    as_dataset,
    has_weight,
    join_inputs,
    map_examples,
    named_arrays,
)
from jaxtrain.errors import InputError, NonFiniteError, StreamError
from jaxtrain.losses import LABEL_LOSSES, PROBABILITY_LOSSES, Loss, single_losses
from jaxtrain.metrics import takes_labels
from jaxtrain.optimizers._inspect import check_line_search
from jaxtrain.optimizers._safeguards import all_finite, stays_finite, without_records
from jaxtrain.training.state import TrainState, to_shapes
from jaxtrain.training.step import LossContext, MetricItems, Objective, mean_loss
from jaxtrain.training.tracing import shape_of, traced_prediction

_SKIPPED_HINT = "try a smaller learning rate, gradient clipping or scaled inputs"
# Number of examples with missing targets for which `check_missing_targets` computes the loss.
_MAX_CHECKED = 64


def checked_data(data: Any, name: str) -> Dataset:
    """Returns a checked data set on the device, so that it is transferred once, not per epoch."""
    data = as_dataset(data, name)
    check_values(data, name)
    check_total_weight(data.weights, name)
    return parallel.placed(data, name)


def check_weights(weights: Any, name: str) -> bool:
    """Returns whether a weight is above 0; raises InputError if one is negative or not finite."""
    if weights is None or not has_values(weights):
        return True
    values = np.asarray(weights)
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest < np.inf:  # also of NaN, which propagates to both
        raise InputError(
            f"{name}.weights ranges from {lowest} to {highest}; expected finite weights of at "
            "least 0"
        )
    return bool(highest > 0)


def check_total_weight(weights: Any, name: str) -> None:
    """Raises InputError unless the weights of a data set are valid, and some are above 0."""
    if not check_weights(weights, name):
        raise InputError(f"{name}.weights is 0 everywhere; expected some weights above 0")


def check_batches(
    batches: Dataset, count: int, name: str, start: int, limits: TargetLimits | None
) -> bool:
    """Checks consecutive batches of a stream, [parts, steps, batch / parts, ...].

    The first `count` steps are batches, from number `start` on, and the others are 0. Numbers that
    are not finite are not looked for, which would take as long as reading: a NaN loss shows them.

    Returns:
      Whether a weight is above 0.

    Raises:
      InputError: a weight is negative, a target outside the limits, or an integer too large.
    """
    try:
        check_values(batches, name, floats=False)
    except InputError:
        for index in range(count):
            batch = map_examples(functools.partial(_rows, steps=slice(index, index + 1)), batches)
            check_values(batch, f"batch {start + index + 1} of {name}", floats=False)
        raise
    if limits is not None:
        rows = functools.partial(_rows, steps=slice(count))
        targets, weights = jax.tree.map(rows, (batches.targets, batches.weights))
        check_limits(targets, weights, limits, name)
    return check_weights(batches.weights, name)


def _rows(leaf: np.ndarray, steps: slice) -> np.ndarray:
    """Returns the examples of some steps of stacked batches, in any order."""
    return leaf[:, steps].reshape(-1, *leaf.shape[3:])


def check_values(dataset: Dataset, name: str, *, floats: bool = True) -> None:
    """Raises InputError unless all values are finite in the dtypes that JAX gives them.

    Targets may be NaN, where `check_missing_targets` decides. By default JAX converts 64-bit values
    to 32 bits: 1e300 would become infinite, and the label 2³² + 1 would become 1. Values of weight
    0 may be anything. Arrays whose values are not available are skipped: those that are traced or
    spread over several hosts; without `floats`, also all that are not integers.
    """
    weights = dataset.weights
    for path, array in named_arrays(dataset, name):
        dtype = array.dtype
        target = jax.dtypes.canonicalize_dtype(dtype)
        floating = jnp.issubdtype(dtype, jnp.floating)
        if not has_values(array) or not (floats if floating else target != dtype):
            continue
        # With NumPy nothing is compiled, and on a CPU nothing is copied.
        values = np.asarray(array)
        limits = jnp.finfo(target) if floating else jnp.iinfo(target)
        with np.errstate(invalid="ignore"):  # comparing NaN may warn
            # NaN propagates to both. Two passes, but no temporary copy of the data.
            low, high = values.min(), values.max()
            if limits.min <= low and high <= limits.max:
                continue
            wrong = ~((values >= limits.min) & (values <= limits.max))
        has_weights = weights is not None and not path.startswith(
            (f"{name}.weights", f"{name}.shared")
        )
        if has_weights and has_values(weights):
            wrong &= has_weight(np.asarray(weights), values)
        if path.startswith(f"{name}.targets") and floating:
            wrong &= ~np.isnan(values)
        if wrong.any():
            kind = "finite numbers" if floating else "integers"
            advice = "fix or drop such examples, or give them the weight 0"
            _refuse(path, values, wrong, f"{kind} that {target} can hold: {advice}")


def check_missing_targets(
    state: TrainState, data: Dataset, loss_fn: Loss | None, name: str
) -> None:
    """Raises InputError if targets are NaN and make the loss or its gradient non-finite.

    A loss that leaves them out, as `losses.ignore_nan` does, has finite values and gradients.
    """
    if loss_fn is None:
        return
    arrays = {
        path: np.asarray(array)
        for path, array in named_arrays(data.targets, f"{name}.targets")
        if jnp.issubdtype(array.dtype, jnp.floating) and has_values(array)
    }
    # NaN propagates to the minimum, which needs no temporary copy of the data.
    missing = {path: values for path, values in arrays.items() if np.isnan(values.min())}
    if not missing:
        return
    rows = [np.isnan(x).reshape(len(x), -1).any(axis=1) for x in missing.values()]
    few = np.flatnonzero(np.any(rows, axis=0))[:_MAX_CHECKED]
    with jax.ensure_compile_time_eval():
        predictions = jax.tree.map(
            lambda leaf: jnp.full((len(few), *leaf.shape[1:]), 0.5, leaf.dtype),
            traced_prediction(state, data, name).out_info,
        )
        batch = data.take(jnp.asarray(few))
        further = LossContext(state.params, state.model_state, batch, lambda: state.key)
        loss_fn = further.bind(loss_fn)
        value_and_grad = jax.value_and_grad(
            lambda x: mean_loss(loss_fn, x, batch)[0], allow_int=True
        )
        loss, grads = value_and_grad(predictions)
        # The gradients of integers have no numbers.
        grads = [leaf for leaf in jax.tree.leaves(grads) if leaf.dtype != jax.dtypes.float0]
        finite = all_finite((loss, grads))
    if not isinstance(finite, jax.core.Tracer) and not finite:
        path, values = next(iter(missing.items()))
        _refuse(
            path,
            values,
            np.isnan(values),
            "finite numbers: fix or drop such examples, or leave out missing targets by "
            "jaxtrain.losses.ignore_nan(loss_fn)",
        )


def _refuse(path: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> NoReturn:
    position = np.unravel_index(int(np.argmax(wrong)), values.shape)
    index = ", ".join(map(str, position))
    raise InputError(f"{path} holds {values[position]} at [{index}]; expected {expected}")


def warn_of_single_examples(state: Any, source: Any) -> None:
    """Warns once if batch norm normalizes single values, whose variance is 0.

    That is, if a batch has one example, and a layer of batch norm has one value of each channel per
    example. PyTorch raises an error in that case.
    """
    size, examples = source.batch_size, source.examples
    if size > 1 and examples % size != 1:
        return
    layers = _single_value_layers(state, source.batch_shapes())
    if not layers:
        return
    which, advice = "each", "another batch_size"
    if size > 1:
        which = "the last"
        advice += ", or drop_last=True in the Dataset or the stream, which leaves out that batch"
    warnings.warn(
        f"{which} batch of {source.name} has one example, so batch norm ({', '.join(layers)}) "
        "normalizes each value by itself: outputs are constant, and the running variance shrinks; "
        f"expected at least 2 examples: use {advice}",
        stacklevel=5,
    )


def _single_value_layers(state: Any, batch: Dataset) -> list[str]:
    """Returns the layers of batch norm that have one value of each channel per example."""
    if not jax.tree.leaves(state.model_state):
        return []
    variables = (state.params, state.model_state)
    # Zeros, since an Equinox module reads a counter, and the state may be traced.
    params, model_state = jax.tree.map(
        lambda leaf: leaf if is_key(leaf) else np.zeros(leaf.shape, leaf.dtype), variables
    )
    sizes = dict(named_arrays(model_state, "model_state"))
    inputs = join_inputs(map_examples(functools.partial(shape_of, rows=1), batch))
    # Whatever is wrong with the model, its first step reports; this is about a warning.
    with contextlib.suppress(Exception):
        statistics = adapters.batch_statistics(state.model, params, model_state)
        with adapters.recording(state.model, params, model_state) as recorder:
            apply = functools.partial(state.model.apply, train=True)
            jax.eval_shape(apply, *variables, inputs, key=state.key)
        calls = {".".join(call.path): call.inputs for call in recorder.calls}
        return [
            layer
            for layer, found in statistics.items()
            if calls.get(layer) and calls[layer][0].size == sizes[found.mean].size
        ]
    return []


def check_run(state: Any, sources: Mapping[str, Any], objective: Objective) -> tuple[str, ...]:
    """Raises InputError unless state, data, loss and step of a run fit together.

    Returns the names of the values that a custom step function returns besides the loss.
    """
    train, step_fn = sources["train"], objective.step_fn
    if len(sources) > 1 and not isinstance(state, TrainState):
        raise InputError(
            f"{list(sources)[1]} is given, but state is a {type(state).__name__}, which has no "
            "model to evaluate; expected a TrainState, or a callback that evaluates"
        )
    for source in sources.values():
        if source is not train or step_fn is None:
            check_source(state, source, objective)
        if step_fn is None:  # which may convert the inputs itself
            _warn_of_another_kind(train, source)
    train.check_division()
    if step_fn is not None:
        return check_step_fn(step_fn, state, train.batch_shapes())
    warn_of_single_examples(state, train)
    examples = train.examples or train.batch_size * (train.steps or 2)  # unknown: more than one
    check_line_search(state.opt_state, examples, train.batch_size)
    return ()


def _warn_of_another_kind(train: Any, source: Any) -> None:
    """Warns if held-out inputs are floats where those of training are integers, or the reverse."""
    pairs = zip(
        named_arrays(train.sample.inputs, f"{train.name}.inputs"),
        named_arrays(source.sample.inputs, f"{source.name}.inputs"),
        strict=False,  # other structures are errors elsewhere
    )
    for (path, ours), (other, theirs) in pairs:
        if len({jnp.issubdtype(each.dtype, jnp.floating) for each in (ours, theirs)}) == 2:
            warnings.warn(
                f"{path} is {ours.dtype} and {other} is {theirs.dtype}; expected the same kind, "
                "since the model may scale integer pixels itself",
                stacklevel=5,
            )


def check_source(state: TrainState, source: Any, objective: Objective) -> None:
    """Checks the data, or the first batch of a stream, which then checks the later ones itself."""
    source.limits = check_data(
        *(state, source.sample, objective.loss_fn, source.name, objective.metrics),
        batch_size=source.batch_size,
    )
    source.accepts = functools.partial(traced_prediction, to_shapes(state))


def check_step_fn(step_fn: Any, state: Any, batch: Dataset) -> tuple[str, ...]:
    """Returns the names of the values that a custom step function returns besides the loss.

    Raises InputError unless it is `step_fn(state, batch) -> (state, {"loss": ...})`, and keeps the
    structure, the shapes and the dtypes of the state.
    """
    result = jax.eval_shape(step_fn, state, batch)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        found = result[1] if isinstance(result, tuple) and len(result) == 2 else result
        kind = "an array" if hasattr(found, "dtype") else f"a {type(found).__name__}"
        raise InputError(
            f'step_fn returned {kind}; expected the next state and a dict such as {{"loss": loss}}',
            argument="step_fn",
        )
    after, values = result
    scalars = {name for name, value in values.items() if jnp.shape(value) == ()}
    if "loss" not in scalars or len(scalars) < len(values):
        shapes = ", ".join(f"{name} of shape {jnp.shape(x)}" for name, x in values.items())
        raise InputError(
            f"step_fn returned {shapes or 'an empty dict'}; expected scalars, one of them named "
            "loss",
            argument="step_fn",
        )
    jax.eval_shape(lambda after: keep_types(after, state, "step_fn", argument="step_fn"), after)
    return tuple(name for name in values if name != "loss")


def check_step_count(before: Any, after: Any, steps: int) -> None:
    """Raises InputError unless a custom step function has counted its steps."""
    if int(after.step) - int(before.step) != steps:
        raise InputError(
            f"state.step is {int(after.step)} after {steps} step{'s' * (steps != 1)} from "
            f"{int(before.step)}; expected step_fn to increase it by one",
            argument="step_fn",
        )


class TargetLimits(NamedTuple):
    """The range of targets that the loss and the metrics take.

    Attributes:
      low: the smallest target.
      high: the largest target.
      kind: "label" or "probability".
      reason: why these are the limits, for messages.
    """

    low: int
    high: int
    kind: str
    reason: str


def check_data(
    state: TrainState,
    data: Dataset,
    loss_fn: Loss | None,
    name: str,
    metrics: MetricItems = (),
    *,
    batch_size: int | None = None,
) -> TargetLimits | None:
    """Raises InputError unless the model takes the inputs, and loss and metrics the targets.

    JAX clamps an index out of range, so a wrong label would train silently. What has weight 0 may
    have any label. `data` is a data set or the first batch of a stream. Returns the limits,
    against which later batches are checked.
    """
    outputs, limits = traced_prediction(state, data, name, batch_size).out_info, None
    targets, losses = data.targets, set() if loss_fn is None else single_losses(loss_fn)
    if isinstance(targets, (np.ndarray, jax.Array)):
        # Targets of another dtype are refused by the loss itself.
        if hasattr(outputs, "shape") and jnp.issubdtype(targets.dtype, jnp.integer):
            labelled = next((each for each, metric in metrics if takes_labels(metric)), None)
            if losses & LABEL_LOSSES or (labelled and _has_classes(outputs, targets)):
                count = outputs.shape[-1]
                reason = f"the model has {count} output{'s' * (count != 1)}"
                limits = TargetLimits(0, count - 1, "label", reason)
            elif labelled:
                reason = f"the metric {labelled} takes 0 and 1 for one score per target"
                limits = TargetLimits(0, 1, "label", reason)
        if limits is None and losses & PROBABILITY_LOSSES:
            limits = TargetLimits(0, 1, "probability", "the loss is a cross entropy")
    if all(map(has_values, jax.tree.leaves((targets, data.weights)))):
        check_limits(targets, data.weights, limits, name)
    return limits


def _has_classes(outputs: Any, targets: Any) -> bool:
    return len(outputs.shape) > targets.ndim and outputs.shape[-1] > 1


def check_limits(targets: Any, weights: Any, limits: TargetLimits | None, name: str) -> None:
    """Raises InputError if a target is not within the limits; see `check_data`."""
    if limits is None:
        return
    values = np.asarray(targets)
    if weights is not None:
        values = values[np.broadcast_to(has_weight(np.asarray(weights), values), values.shape)]
    if limits.kind != "label" and values.size and np.isnan(values.min()):
        values = values[~np.isnan(values)]  # missing targets
    if not values.size:
        return
    low, high = values.min(), values.max()
    if low < limits.low or high > limits.high:  # a NaN is found elsewhere
        wrong = low if low < limits.low else high
        plural = "labels" if limits.kind == "label" else "values"
        ways = ["give others the weight 0"]
        if limits.reason == "the model has 1 output":
            ways = ["a model of two classes has two outputs, or sigmoid_binary_cross_entropy"]
        elif limits.kind == "label" and low >= 1 and high == limits.high + 1:
            ways.insert(0, "count the labels from 0, by targets - 1")
        raise InputError(
            f"{name}.targets holds the {limits.kind} {wrong}; expected {plural} from {limits.low} "
            f"to {limits.high}, since {limits.reason}: {', or '.join(ways)}"
        )


def check_steps(
    state: Any, log: Any, segment: Any, epoch: int, source: Any, objective: Objective
) -> None:
    """Raises NonFiniteError at the first step whose loss or recorded value is not finite.

    Recorded values are those of the optimizer, such as the norm of the gradient. The `StepLog` of
    the segment has zeros for the steps that were not taken.
    """
    if "skipped_steps" in log.recorded:
        return
    values = {"training loss": np.asarray(log.loss)}
    values |= {name.replace("_", " "): np.asarray(x) for name, x in log.recorded.items()}
    first = {name: int(np.argmin(np.isfinite(x))) for name, x in values.items() if x.ndim == 1}
    wrong = {name: at for name, at in first.items() if not np.isfinite(values[name][at])}
    if not wrong:
        return
    quantity = min(wrong, key=lambda name: wrong[name])  # on a tie the first one, the loss
    step = wrong[quantity]
    value, rates = float(values[quantity][step]), values.get("learning rate")
    rate = None if rates is None else rounded(rates[step])
    loss_fn = objective.loss_fn if objective.step_fn is None else None
    found = _bad_values(state, segment, step, source, loss_fn)
    raise NonFiniteError(epoch, segment.start + step + 1, quantity, value, rate, found)


def _bad_values(state: Any, segment: Any, index: int, source: Any, loss_fn: Loss | None) -> str:
    """Returns where a batch of a stream has NaN or infinity, or "".

    Streams are not checked before they are used, which would take as long as reading them.
    """
    name = f"batch {segment.start + index + 1} of {source.name}"
    with contextlib.suppress(Exception):  # the run ends by another error
        batch = segment.batch(index)
        try:
            check_values(batch, name)
            check_missing_targets(state, batch, loss_fn, name)
        except InputError as error:
            return str(error)
    return ""


def check_state(before: Any, after: Any, epoch: int, step: int, row: Mapping[str, Any]) -> None:
    """Raises NonFiniteError if an array of the state became NaN or infinite.

    Values that were infinite before are allowed: a running minimum may start at infinity. `row` has
    what the optimizer recorded, by name.
    """
    if _stays_finite(before, after):
        return
    leaves = jax.tree.leaves(without_records(before))
    for (path, new), old in zip(named_arrays(without_records(after), ""), leaves, strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            now = to_numpy(new)
            wrong = np.isfinite(to_numpy(old)) & ~np.isfinite(now)
            if wrong.any():
                value = float(now[wrong][0].real)
                raise NonFiniteError(epoch, step, path, value, row.get("learning_rate"), _hint(row))


def check_epoch(
    before: Any,
    after: Any,
    log: Any,
    row: Mapping[str, Any],
    sources: Mapping[str, Any],
    objective: Objective,
) -> None:
    """Raises NonFiniteError if the state or a held-out loss is wrong, or every step was skipped."""
    epoch, rate, losses = row["epoch"], row.get("learning_rate"), log.loss
    check_state(before, after, epoch, len(losses), row)
    if row.get("skipped_steps") == len(losses):  # further epochs would change nothing
        quantity, value = "training loss or gradient of every step", float(losses[0])
        hint = "check the data, or try a smaller learning rate"
        raise NonFiniteError(epoch, None, quantity, value, rate, hint)
    for name in ("test", "validation"):
        value = row.get(f"{name}_loss", 0)
        if not np.isfinite(value):
            found = _bad_values_of(after, sources[name], epoch, objective.loss_fn)
            raise NonFiniteError(epoch, None, f"{name} loss", value, rate, found or _hint(row))


def _hint(row: Mapping[str, Any]) -> str:
    return _SKIPPED_HINT if "skipped_steps" in row else ""


def _bad_values_of(state: Any, source: Any, epoch: int, loss_fn: Loss | None) -> str:
    """Returns the first bad values of a held-out stream, which is read again; see `_bad_values`."""
    with (
        contextlib.suppress(InputError, StreamError),
        contextlib.closing(source.segments(epoch)) as segments,
    ):
        for segment in segments:
            # Data in memory were checked before training.
            for index in range(segment.steps if segment.order is None else 0):
                if found := _bad_values(state, segment, index, source, loss_fn):
                    return found
    return ""


@bounded
@jax.jit
def _stays_finite(before: PyTree, after: PyTree) -> Array:
    return parallel.on_auto_axes(stays_finite, before, after)
