"""train_step and eval_step, each one compiled program for one batch, and what they consist of."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxtrain import adapters, lowerings, parallel
from jaxtrain._arguments import check_arguments
from jaxtrain._compiler import bounded, limit_rows
from jaxtrain._placement import describe_values
from jaxtrain._processes import are_joined, check_same
from jaxtrain._static_key import ByKey, static_key
from jaxtrain.checkpoint import describe_function, digest_program
from jaxtrain.dataset import (
    Dataset,
    as_dataset,
    check_dataset,
    has_weight,
    join_inputs,
    named_arrays,
)
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss, at_least_float32, context_parameters, name_of
from jaxtrain.metrics import AccumulatedMetric, Metric
from jaxtrain.metrics._metric import (
    Mean,
    as_accumulated,
    as_weights,
    mean_totals,
    per_example,
    sum_of_means,
    without_ignored,
)
from jaxtrain.optimizers._extra_args import accepting_extra_args
from jaxtrain.optimizers._inspect import has_accumulation, last_step_finite
from jaxtrain.training.state import TrainState, check_state_type, to_shapes
from jaxtrain.training.tracing import traced_prediction

Metrics = dict[str, Float[Array, "..."]]
Batch = Dataset | tuple[Any, ...]
"""What a step takes: a `Dataset`, or a tuple (inputs, targets) or (inputs, targets, weights)."""
StepFn = Callable[[Any, Dataset], tuple[Any, dict[str, Any]]]
"""A custom step function: `step_fn(state, batch) -> (state, {"loss": ...})`."""
MetricItems = tuple[tuple[str, AccumulatedMetric], ...]
Totals = dict[str, Any]
"""What the metrics have accumulated so far, by name."""
# The first steps that the processes have compared: structure of the state, objective and mesh.
_compared: set[int] = set()
# Numbers that separate the draws of losses and evaluations from those of the steps.
_LOSS, _EVALUATION = (zlib.crc32(name) for name in (b"jaxtrain loss", b"jaxtrain evaluation"))


class Objective(NamedTuple):
    """What a run minimizes and measures; hashable, as `jax.jit` requires of static arguments.

    Attributes:
      loss_fn: per-example loss; None with a `step_fn` alone.
      metrics: the metrics by name.
      step_fn: a custom step function, in place of `train_step`.
    """

    loss_fn: Loss | None
    metrics: MetricItems = ()
    step_fn: StepFn | None = None

    def __hash__(self) -> int:
        return hash(static_key(self))

    def __eq__(self, other: object) -> bool:
        return static_key(self) == static_key(other)

    @property
    def trained(self) -> MetricItems:
        """The metrics of the training data; a custom step function returns means of its own."""
        return self.metrics if self.step_fn is None else ()

    @property
    def evaluated(self) -> MetricItems:
        """The loss and the metrics of held-out data."""
        loss = () if self.loss_fn is None else (("loss", Mean(self.loss_fn)),)
        return (*loss, *self.metrics)


class LossContext(NamedTuple):
    """What a loss or a metric may receive by name besides predictions and targets.

    Attributes:
      params: the parameters.
      model_state: the model state after the batch.
      batch: the batch, which has the inputs.
      key: returns the key of the batch, or None in an evaluation without one.
    """

    params: PyTree
    model_state: PyTree
    batch: Dataset
    key: Callable[[], Any]

    def bind(self, function: Loss) -> Loss:
        """Returns a function of predictions and targets alone; see `jaxtrain.losses.Loss`."""
        names = context_parameters(function)
        if not names:
            return function
        values = {"params": self.params, "model_state": self.model_state}
        if "inputs" in names:
            values["inputs"] = model_inputs(self.batch)
        if "key" in names:
            key = self.key()
            if key is None:
                raise InputError(
                    f"{name_of(function)} takes a key, and the evaluation has none; expected one, "
                    "as in evaluate(..., key=jax.random.key(0))",
                    argument="key",
                )
            values["key"] = jax.random.fold_in(key, _LOSS)
        return functools.partial(function, **{name: values[name] for name in names})


class Auxiliary(NamedTuple):
    """What `gradients` returns besides the loss and its gradients.

    Attributes:
      model_state: the model state after the batch.
      predictions: the model's outputs in training mode, [batch, ...].
      weight: the total weight of the batch, by which means over several batches are weighted:
        without weights, its number of examples; for a `WeightedMean`, the sum of its weights.
    """

    model_state: PyTree
    predictions: PyTree
    weight: Float[Array, ""]


def train_step(state: TrainState, batch: Batch, loss_fn: Loss) -> tuple[TrainState, Metrics]:
    """Takes one gradient step on one batch.

    Jitted; it consists of `gradients` and `apply_gradients`, for steps of your own.

    Args:
      state: parameters, optimizer state and PRNG key; not modified.
      batch: inputs and targets with leading axis [batch], a `Dataset` or a tuple.
      loss_fn: per-example loss `loss(predictions, targets) -> [batch]`; its (weighted) mean over
        the batch is minimized. Its parameters `params`, `model_state`, `inputs` and `key`, if it
        has them, receive these by name (see `jt.losses.Loss`). Pass the same function object each
        time: a new one, such as a lambda created in the loop, triggers a recompilation.

    Returns:
      The next state, and {"loss": mean loss before the update}.

    Raises:
      InputError: `batch` is not a valid batch; the loss does not return one value per example; or,
        in the first step of several processes, their states or losses differ.

    Example:
      >>> state, metrics = jt.train_step(state, train[:32], loss_fn)
      >>> metrics["loss"].shape
      ()
    """
    check_state_type(state)
    check_loss(loss_fn)
    batch = _as_batch(batch)
    with parallel.mesh_of(state, batch):
        try:
            check_first_step(state, batch, Objective(loss_fn))
            return _train_step(state, batch, ByKey(loss_fn))
        except Exception:
            traced_prediction(state, batch, "batch")  # whose error names inputs that do not fit
            raise


def check_first_step(
    state: Any,
    batch: Any,
    objective: Objective,
    further: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Compares the first step of a model, an objective and a mesh between processes.

    Args:
      state: the state before it.
      batch: a batch, or its shapes.
      objective: what the step minimizes and measures.
      further: returns further descriptions by name.

    Raises:
      InputError: the values of the state, the batch's shapes, or the programs differ.
    """
    if not are_joined():
        return
    step = hash((jax.tree.structure(state), objective, parallel.current_mesh()))
    if step in _compared:
        return
    shapes = named_arrays(to_shapes(batch), "batch")
    check_same(
        lambda: {
            **further(),
            **{path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in shapes},
            **{path: describe_values(leaf) for path, leaf in named_arrays(state, "state")},
        }
    )
    # Not before: other shapes could be an error of the model.
    check_same(lambda: describe_step(state, batch, objective))
    _compared.add(step)


def describe_step(state: Any, batch: Any, objective: Objective) -> dict[str, str]:
    """Returns the functions and the program of a step, by name."""
    metrics = [f"{name}: {describe_function(metric)}" for name, metric in objective.metrics]
    return {
        "loss": describe_function(objective.step_fn or objective.loss_fn),
        "metrics": ", ".join(metrics) or "none",
        "the model": repr(getattr(state, "model", None)),
        "the program of a step": program_of_step(state, batch, objective),
    }


def program_of_step(state: Any, batch: Any, objective: Objective) -> str:
    """Returns the digest of the program of a step, whatever the devices are."""
    step = functools.partial(take_step, objective=objective, last=False)
    with parallel.without_mesh():
        return digest_program(jax.jit(step).trace(to_shapes(state), None, to_shapes(batch)))


def _as_batch(batch: Any) -> Dataset:
    """Returns a batch as a `Dataset`; arrays of JAX are checked when the step is traced."""
    if isinstance(batch, Dataset) and all(
        isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)
    ):
        return batch
    return as_dataset(batch, "batch")


@bounded
@functools.partial(jax.jit, static_argnames="loss_fn")
def _train_step(state: TrainState, batch: Dataset, loss_fn: ByKey) -> tuple[TrainState, Metrics]:
    def step(state: TrainState, batch: Dataset) -> tuple[TrainState, Metrics]:
        next_state, loss, _ = update(state, batch, loss_fn.value)
        return next_state, {"loss": loss}

    return parallel.on_auto_axes(step, state, batch, like=(state, None))


def take_step(
    state: Any,
    totals: Totals | None,
    batch: Dataset,
    objective: Objective,
    last: bool | Bool[Array, ""],
) -> tuple[Any, Float[Array, ""], Float[Array, ""], Totals]:
    """Takes one step inside a larger program, and measures its predictions.

    `last` is whether the step ends an epoch, for `accumulate_gradients`.

    Returns:
      The next state, the loss, the total weight of the batch, and the totals of the metrics after
      the step, or those of the means of the other values that `step_fn` returns. With
      `skip_nonfinite`, a step whose loss is not finite leaves the totals as they are.
    """
    if objective.step_fn is not None:
        state, values = objective.step_fn(state, batch)
        weight = jnp.asarray(total_weight(batch), jnp.float32)
        means = {name: at_least_float32(jnp.asarray(x, float)) for name, x in values.items()}
        loss = means.pop("loss")
        after: Totals = {
            name: [(jnp.where(weight == 0, 0, mean * weight), weight)]
            for name, mean in means.items()
        }
        after = after if totals is None else jax.tree.map(jnp.add, totals, after)
    else:
        assert objective.loss_fn is not None  # checked on the host
        before = state
        state, loss, aux = update(state, batch, objective.loss_fn, last=last)
        weight = aux.weight
        after = _training_totals(before, totals, batch, objective, aux)
    if totals is not None and last_step_finite(getattr(state, "opt_state", ())) is not None:
        finite = jnp.isfinite(loss)  # as in `mean_step_loss`
        after = jax.tree.map(functools.partial(jnp.where, finite), after, totals)
    return state, loss, weight, after


def first_totals(state: Any, batch: Dataset, objective: Objective) -> Totals:
    """Returns totals of the shapes of those of `take_step`, which take less time to trace."""
    if objective.step_fn is not None:
        return take_step(state, None, batch, objective, last=False)[-1]
    assert objective.loss_fn is not None  # checked on the host
    _, aux = _mean_loss(state.params, state, batch, objective.loss_fn)
    return _training_totals(state, None, batch, objective, aux)


def _training_totals(
    state: TrainState,
    totals: Totals | None,
    batch: Dataset,
    objective: Objective,
    aux: Auxiliary,
) -> Totals:
    """Returns the totals after a batch; `aux` is that of the step, and `state` the one before."""
    further = LossContext(state.params, aux.model_state, batch, lambda: _step_key(state))
    return update_metrics(totals, aux.predictions, batch, objective.metrics, further)


def update(
    state: TrainState, batch: Dataset, loss_fn: Loss, *, last: bool | Bool[Array, ""] = False
) -> tuple[TrainState, Float[Array, ""], Auxiliary]:
    """Returns the next state, the loss before the update and the auxiliary outputs."""
    (loss, aux), grads = gradients(state, batch, loss_fn)
    extra_args: dict[str, Any] = {}
    if has_accumulation(state.opt_state):  # other optimizers may refuse unknown arguments
        extra_args = {"weight": aux.weight, "last": last}
    next_state = apply_gradients(
        state,
        grads,
        model_state=aux.model_state,
        # Line searches (optax.lbfgs and others) need these; other optimizers ignore them.
        value=loss,
        grad=grads,
        value_fn=lambda params: _mean_loss(params, state, batch, loss_fn)[0],
        **extra_args,
    )
    return next_state, loss, aux


def total_weight(batch: Dataset) -> int | Float[Array, ""]:
    """Returns the sum of the weights of a batch: without weights, its number of examples."""
    return len(batch) if batch.weights is None else jnp.sum(as_weights(batch.weights))


def gradients(
    state: TrainState, batch: Batch, loss_fn: Loss
) -> tuple[tuple[Float[Array, ""], Auxiliary], PyTree]:
    """Returns the mean loss of a batch with auxiliary outputs, and its gradients.

    The order is that of `jax.value_and_grad(..., has_aux=True)`. Not jitted: call it from a jitted
    step of your own, with `apply_gradients`.

    Args:
      state: parameters and PRNG key.
      batch: inputs and targets with leading axis [batch], a `Dataset` or a tuple.
      loss_fn: per-example loss `loss(predictions, targets) -> [batch]`.

    Returns:
      The (weighted) mean loss and an `Auxiliary` with the new model state and the predictions; and
      the gradients of the loss with respect to `state.params`.

    Raises:
      InputError: `batch` is not a valid batch, or the loss does not return one value per example.

    Example:
      >>> @jax.jit
      ... def step(state, batch):
      ...     (loss, aux), grads = jt.gradients(state, batch, loss_fn)
      ...     grads = jax.tree.map(jnp.sign, grads)
      ...     state = jt.apply_gradients(state, grads, model_state=aux.model_state)
      ...     return state, {"loss": loss}
      >>> state, metrics = step(state, batch)
    """
    check_state_type(state)
    check_loss(loss_fn)
    batch = as_dataset(batch, "batch")

    def compute(state: TrainState, batch: Dataset) -> tuple[tuple[Array, Auxiliary], PyTree]:
        value_and_grad = jax.value_and_grad(_mean_loss, has_aux=True)
        return value_and_grad(state.params, state, parallel.divide(batch), loss_fn)

    weight: Any = None  # on every device
    auxiliary = Auxiliary(state.model_state, parallel.first_axis(batch), weight)
    like = ((None, auxiliary), state.params)
    return parallel.on_auto_axes(compute, state, batch, like=like)


def apply_gradients(
    state: TrainState, grads: PyTree, *, model_state: PyTree | None = None, **extra_args: Any
) -> TrainState:
    """Returns the state after one optimizer update.

    Args:
      state: the state at which the gradients were computed.
      grads: gradients with the structure and the shapes of `state.params`.
      model_state: the model state after the batch, `aux.model_state` of `gradients`. It may be left
        out for a model without one.
      **extra_args: passed on to optimizers that take them, such as `value` for
        `optax.contrib.reduce_on_plateau`.

    Returns:
      The next state, with its step incremented.

    Raises:
      InputError: `grads` has another structure or other shapes than `state.params`, or the model
        has a state and `model_state` is missing.

    Example:
      >>> (loss, aux), grads = jt.gradients(state, batch, loss_fn)
      >>> state = jt.apply_gradients(state, grads, model_state=aux.model_state)
    """
    check_state_type(state)
    _check_like_params("grads", grads, state.params)
    if model_state is None:
        if jax.tree.leaves(state.model_state):
            raise InputError(
                "model_state is missing, and the model has one, such as batch statistics; expected "
                "model_state=aux.model_state, with aux as gradients returns it",
                argument="model_state",
            )
        model_state = state.model_state
    skips = last_step_finite(state.opt_state) is not None  # the optimizer has `skip_nonfinite`
    if skips:
        extra_args["model_states"] = (state.model_state, model_state)
    updates, opt_state = accepting_extra_args(state.optimizer).update(
        grads, state.opt_state, state.params, **extra_args
    )
    _check_like_params("the optimizer's updates", updates, state.params)
    if skips:
        model_state = jax.tree.map(
            functools.partial(jnp.where, last_step_finite(opt_state)),
            model_state,
            state.model_state,
        )
    return state.replace(
        # Counted even if skipped, so that dropout and the epoch advance.
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        model_state=model_state,
    )


def _check_like_params(name: str, tree: PyTree, params: PyTree) -> None:
    ours: Any = jax.tree.structure(params)
    theirs: Any = jax.tree.structure(tree)
    if ours != theirs:
        hint = ", the last of (loss, aux), grads = gradients(...)" if name == "grads" else ""
        raise InputError(
            f"{name} has the structure {theirs}; expected that of state.params, {ours}{hint}"
        )
    for (path, grad), param in zip(named_arrays(tree, name), jax.tree.leaves(params), strict=True):
        if jnp.shape(grad) != jnp.shape(param):
            raise InputError(
                f"{path} has the shape {jnp.shape(grad)}; expected that of the parameter, "
                f"{jnp.shape(param)}"
            )


def _mean_loss(
    params: PyTree, state: TrainState, batch: Dataset, loss_fn: Loss
) -> tuple[Float[Array, ""], Auxiliary]:
    inputs, key = model_inputs(batch), _step_key(state)
    with lowerings.scope():
        predictions, model_state, sown = adapters.call_in_training(
            state.model, params, state.model_state, inputs, key=key
        )
        loss_fn = LossContext(params, model_state, batch, lambda: key).bind(loss_fn)
        mean, weight = mean_loss(loss_fn, predictions, batch)
    mean = functools.reduce(jnp.add, to_float32(sown), mean)
    return mean, Auxiliary(model_state, predictions, weight)


def _step_key(state: TrainState) -> Any:
    """Returns the key from which the step after a state draws."""
    return jax.random.fold_in(state.key, state.step)


def mean_loss(
    loss_fn: Loss, predictions: Any, batch: Dataset
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the (weighted) mean loss of a batch, and the total weight of the batch.

    The weight is that of the mean, if there is one: a loss per token counts each token, and a
    `WeightedMean` its own weights. A sum of several means has the weight of the batch.
    """
    predictions, weights = to_float32(predictions), None
    if batch.weights is not None:
        weights = as_weights(batch.weights)
        predictions = stop_gradients_at_zero_weight(predictions, weights)
    shape = (len(batch),) if weights is None else weights.shape
    totals = mean_totals(per_example(loss_fn, predictions, batch.targets, shape), weights)
    weight = totals[0][1] if len(totals) == 1 else total_weight(batch)
    mean = functools.reduce(jnp.add, [safe_divide(*pair) for pair in totals])
    return mean, jnp.asarray(weight, mean.dtype)


def eval_step(
    state: TrainState,
    batch: Batch,
    loss_fn: Loss,
    metric_fns: Mapping[str, Metric] | None = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Metrics:
    """Returns the mean loss and the metrics of one batch, with the model in evaluation mode.

    Args:
      state: the parameters to evaluate.
      batch: inputs and targets with leading axis [batch], a `Dataset` or a tuple.
      loss_fn: per-example loss.
      metric_fns: metrics by name, such as {"accuracy": metrics.accuracy}.
      key: PRNG key, for a model or a loss that draws random numbers in evaluation; see `evaluate`.

    Returns:
      {"loss": mean loss, and each metric by its name}.

    Raises:
      InputError: `batch` is not a valid batch, a metric is not one value per example, or a key is
        missing or superfluous.

    Example:
      >>> metrics = jt.eval_step(state, batch, loss_fn, {"accuracy": jt.metrics.accuracy})
      >>> sorted(metrics)
      ['accuracy', 'loss']
    """
    check_arguments(eval_step, locals())
    check_state_type(state)
    batch, objective = _as_batch(batch), make_objective(loss_fn, metric_fns)
    check_evaluation_key(state, key, objective.evaluated)
    with parallel.mesh_of(state, batch):
        try:
            return _eval_step(state, batch, key, objective)
        except Exception:
            traced_prediction(state, batch, "batch")
            raise


@bounded
@functools.partial(jax.jit, static_argnames="objective")
def _eval_step(
    state: TrainState, batch: Dataset, key: Key[Array, ""] | None, objective: Objective
) -> Metrics:
    check_dataset(batch, "batch")
    evaluated = functools.partial(evaluate_batch, objective=objective)
    totals = parallel.on_auto_axes(evaluated, state, None, batch, key)
    return finish_metrics(totals, objective.evaluated)


def check_evaluation_key(state: TrainState, key: Any, metrics: MetricItems = ()) -> None:
    """Raises InputError if an evaluation has a key and draws nothing from it.

    A missing key is found where it is needed.
    """
    if key is not None and not _evaluation_draws(state, metrics):
        raise InputError(
            f"key is given, but {adapters.name_of_model(state.model)} draws no random numbers in "
            "evaluation; expected no key, or a state of init_state(..., draws_in_evaluation=True)",
            argument="key",
        )


def _evaluation_draws(state: TrainState, metrics: MetricItems) -> bool:
    functions = [metric.function for _, metric in metrics if isinstance(metric, Mean)]
    return adapters.draws_in_evaluation(state.model) or any(
        "key" in context_parameters(function) for function in functions
    )


def evaluation_key(state: TrainState, objective: Objective) -> Any:
    """Returns the key of the evaluations that a run makes at a state; None if they draw nothing."""
    if not _evaluation_draws(state, objective.evaluated):
        return None
    return jax.random.fold_in(jax.random.fold_in(state.key, _EVALUATION), state.step)


def batch_key(key: Any, index: Any) -> Any:
    """Returns the key of a batch of an evaluation, counted from 0; None without a key."""
    return None if key is None else jax.random.fold_in(key, index)


def make_objective(
    loss_fn: Loss | None,
    metric_fns: Mapping[str, Metric] | None = None,
    step_fn: StepFn | None = None,
) -> Objective:
    """Validates the arguments and returns an `Objective`."""
    if loss_fn is not None or step_fn is None:
        check_loss(loss_fn)  # which refuses None
    metric_fns = {} if metric_fns is None else metric_fns
    if "loss" in metric_fns:
        raise InputError(
            "metric_fns has a metric named 'loss', the name of the loss itself; rename it"
        )
    for name, metric in metric_fns.items():
        if not callable(metric) and not (
            isinstance(metric, tuple) and len(metric) == 2 and all(map(callable, metric))
        ):
            raise InputError(
                f"the metric {name} is {metric!r}; expected a function, or a pair of functions "
                "(sums, finish)"
            )
        _check_hashable(metric, f"the metric {name}")
    metrics = tuple((name, as_accumulated(metric)) for name, metric in metric_fns.items())
    return Objective(loss_fn, metrics, step_fn)


def check_loss(loss_fn: Any) -> None:
    """Raises InputError unless `loss_fn` is callable, hashable and not of PyTorch."""
    if not callable(loss_fn):
        found = repr(loss_fn) if isinstance(loss_fn, str) else f"a {type(loss_fn).__name__}"
        raise InputError(
            f"loss_fn is {found}; expected a function, such as jaxtrain.losses.cross_entropy"
        )
    inner = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    owner = getattr(inner, "__module__", None) or type(inner).__module__
    if owner.split(".")[0] == "torch":
        raise InputError(
            f"loss_fn is {name_of(inner)} of PyTorch; expected a function of JAX's arrays, such as "
            "jaxtrain.losses.cross_entropy for torch.nn.CrossEntropyLoss",
            argument="loss_fn",
        )
    _check_hashable(loss_fn, "loss_fn")


def _check_hashable(function: Any, name: str) -> None:
    try:
        hash(function)
    except TypeError as error:
        raise InputError(
            f"{name} is a {type(function).__name__}, which is not hashable; expected a function, "
            "or an object of a class with @dataclass(frozen=True), since it is static in the "
            "compiled step"
        ) from error


def evaluate_batch(
    state: TrainState,
    totals: Totals | None,
    batch: Dataset,
    key: Key[Array, ""] | None,
    objective: Objective,
) -> Totals:
    """Returns the totals of loss and metrics after a batch, with the model in evaluation mode."""
    devices = parallel.axis_size()
    # A batch of a stream or of `eval_step` may have more rows than are compiled correctly.
    size = devices * limit_rows(-(-len(batch) // devices))
    for start in range(0, len(batch), size):
        part = parallel.divide(batch[start : start + size])
        part_key = batch_key(key, start) if start else key
        totals = _evaluate_part(state, totals, part, part_key, objective)
    assert totals is not None  # a batch has at least one example
    return totals


def _evaluate_part(
    state: TrainState, totals: Totals | None, part: Dataset, key: Any, objective: Objective
) -> Totals:
    with lowerings.scope():
        predictions, model_state = _call_in_evaluation(state, model_inputs(part), key)
        further = LossContext(state.evaluation_params, model_state, part, lambda: key)
        return update_metrics(totals, predictions, part, objective.evaluated, further)


def update_metrics(
    totals: Totals | None,
    predictions: Any,
    batch: Dataset,
    metrics: MetricItems,
    further: LossContext,
) -> Totals:
    """Returns the totals of the metrics after one more batch; None stands for no batch before."""
    predictions, targets = to_float32(predictions), batch.targets
    if batch.weights is None:
        weights = jnp.ones(len(batch))
    else:
        weights = as_weights(batch.weights)
        predictions, targets = without_ignored((predictions, targets), weights)
    after = {}
    for name, metric in metrics:
        bound = Mean(further.bind(metric.function)) if isinstance(metric, Mean) else metric
        total = None if totals is None else totals[name]
        after[name] = bound.update(total, predictions, targets, weights)
    return after


def finish_metrics(totals: Totals, metrics: MetricItems) -> Metrics:
    """Returns each metric from its total; values that `step_fn` returns are weighted means."""
    return _finish(totals, ByKey(metrics))


# In `fit` the totals of an epoch are NumPy's, and each operation would be compiled by itself.
@bounded
@functools.partial(jax.jit, static_argnames="metrics")
def _finish(totals: Totals, metrics: ByKey) -> Metrics:
    finish = {name: metric.finish for name, metric in metrics.value}
    return {name: finish.get(name, sum_of_means)(total) for name, total in totals.items()}


def model_inputs(batch: Dataset) -> PyTree:
    """Returns what a model receives, with 0 in place of NaN and infinity of weight 0 in the inputs.

    Their derivatives would make all parameters NaN, although the loss does not depend on them.
    Finite inputs stay as they are, since layers such as batch norm see them.
    """
    if batch.weights is None:
        return join_inputs(batch)
    weights = jnp.asarray(batch.weights)

    def hide(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(has_weight(weights, leaf) | jnp.isfinite(leaf), leaf, 0)

    return join_inputs(batch.replace(inputs=jax.tree.map(hide, batch.inputs)))


def predict_batch(state: TrainState, inputs: PyTree, key: Any = None) -> Any:
    """Returns the model's outputs for one batch, in evaluation mode."""
    with lowerings.scope():
        return _call_in_evaluation(state, inputs, key)[0]


def _call_in_evaluation(state: TrainState, inputs: PyTree, key: Any) -> tuple[Any, PyTree]:
    params, model_state = state.evaluation_params, state.model_state
    return adapters.call_in_evaluation(state.model, params, model_state, inputs, key=key)


def stop_gradients_at_zero_weight(predictions: Any, weights: Array) -> Any:
    """Stops gradients of losses with weight 0, which may be NaN, such as those of padded targets.

    Multiplying by the weight is not enough, since 0 times NaN is NaN.
    """

    def select(leaf: Array) -> Array:
        return jnp.where(has_weight(weights, leaf), leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(select, predictions)


def to_float32(predictions: Any) -> Any:
    """Promotes half-precision outputs, so that losses and metrics are computed in float32."""
    return jax.tree.map(at_least_float32, predictions)


def safe_divide(total: Array, weight: Array) -> Array:
    """Returns total / weight, or 0 if a batch to train on has no weight: it changes nothing."""
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1, weight))
