"""TrainState: everything that changes in a training run, as one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxtrain import adapters
from jaxtrain._arguments import check_arguments
from jaxtrain._compiler import release_programs
from jaxtrain._placement import has_values
from jaxtrain.dataset import check_array, join_inputs, named_arrays
from jaxtrain.errors import InputError
from jaxtrain.model import Model
from jaxtrain.optimizers._check import check_optimizer
from jaxtrain.optimizers._evaluation import (
    adapt_lookahead,
    evaluation_params,
    restart_evaluation,
)
from jaxtrain.optimizers._hoist import hoist_tracers
from jaxtrain.optimizers._inspect import check_order, has_settable_rate, map_rates
from jaxtrain.optimizers._numbers import check_not_negative
from jaxtrain.optimizers._records import records


# Not type-checked at run time: JAX rebuilds pytrees with placeholders for their leaves.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """Parameters, optimizer state, counters and PRNG key of one run; a frozen pytree.

    Attributes:
      step: optimizer steps taken.
      epoch: epochs completed, by `train_epoch` or `fit`.
      params: the pytree that is optimized.
      model_state: variables of the model that are not optimized, such as batch statistics; {} if
        there are none.
      opt_state: state of the optimizer.
      key: PRNG key. Step t draws from `fold_in(key, t)`, so a resumed run draws the same numbers.
      model: the network (static).
      optimizer: the optax transformation (static); `with_optimizer` sets another one.

    Example:
      >>> state, metrics = jt.train_step(state, batch, loss_fn)
      >>> state.step
      Array(1, dtype=int32)
      >>> jax.tree.map(jnp.shape, state.params)
      {'Dense_0': {'bias': (8,), 'weight': (8, 64)}, 'Dense_1': {'bias': (10,), 'weight': (10, 8)}}
      >>> state = state.replace(key=jax.random.key(1))
    """

    step: Int[Array, ""]
    epoch: Int[Array, ""]
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    model: Model = dataclasses.field(metadata={"static": True})
    optimizer: optax.GradientTransformation = dataclasses.field(metadata={"static": True})

    @property
    def evaluation_params(self) -> PyTree:
        """The parameters that are evaluated, saved and exported.

        The average, if the optimizer keeps one (`average_parameters`); those of `evaluate_with`,
        `optax.lookahead` or `optax.contrib.schedule_free`; else `params`.
        """
        return evaluation_params(self.opt_state, self.params)

    def replace(self, **changes: Any) -> TrainState:
        """Returns a copy with some fields replaced.

        With new `params`, an average of the parameters starts anew with them, as do other
        `evaluation_params`, unless `opt_state` is replaced too. A new `optimizer` continues with
        the state of the old one, unless `opt_state` is replaced too.
        """
        if "params" in changes and "opt_state" not in changes:
            changes["opt_state"] = restart_evaluation(self.opt_state, changes["params"])
        new = dataclasses.replace(self, **changes)
        if "optimizer" not in changes:
            return new
        optimizer, opt_state = adapt_lookahead(new.optimizer, new.opt_state, new.params)
        return dataclasses.replace(new, optimizer=optimizer, opt_state=opt_state)

    def __repr__(self) -> str:
        parts = {"params": self.params, "model_state": self.model_state}
        count = sum(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(self.params))
        shapes = [f"  {path}: {_describe(leaf)}" for path, leaf in named_arrays(parts, "")]
        head = f"TrainState(step={_value(self.step)}, epoch={_value(self.epoch)}, {count:,} params"
        return "\n".join([head, *shapes]) + ")"


def _refuse_update(updates: Any, opt_state: Any, params: Any = None) -> Any:
    raise InputError(
        "the state has no optimizer; expected one before training: "
        "jaxtrain.with_optimizer(state, jaxtrain.optimizers.sgd(0.01))"
    )


# Of a state that only predicts; its parameters come from a file.
NO_OPTIMIZER = optax.GradientTransformation(lambda params: optax.EmptyState(), _refuse_update)


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation | None,
    sample_inputs: PyTree,
    *,
    key: Key[Array, ""],
    rngs: Sequence[str] = ("dropout",),
    sown_losses: Sequence[str] = (),
    call: Callable[..., Any] | None = None,
    draws_in_evaluation: bool = False,
    independent_examples: bool = True,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      model: a Linen module; an NNX, Equinox or PyTorch module, whose own parameters are the initial
        ones; or a `Model`.
      optimizer: any optax transformation; `jaxtrain.optimizers` has those of `torch.optim`. None
        for a state that only predicts, such as one for `load`.
      sample_inputs: inputs with the shapes and dtypes of training, or a `Dataset`, such as
        `train[:1]`; one example is enough, and the values are not used.
      key: PRNG key; determines the initial parameters and every random draw of the model.
      rngs: names of the RNG streams that a Linen module draws from in training.
      sown_losses: names of the collections in which a Linen module sows losses, as by
        `self.sow("losses", "l2", value)`. Their sum is added to the loss of each training step;
        evaluations report `loss_fn` alone. What is sown elsewhere is not kept.
      call: how the module is called, `call(module, inputs, *, train, rngs) -> outputs`. By default
        it is `module(inputs)`, with each of these arguments that the module has: train, training,
        is_training, is_train or enable_dropout; deterministic, inference, eval or
        use_running_average, which are `not train`; and key or rngs. A tuple of inputs is passed as
        several arguments if the module takes so many. `rngs` is a dict of keys for Linen, an
        `nnx.Rngs` for NNX, None for PyTorch, which gets tensors, and the key of one example for
        Equinox, which gets one example as `inputs`, and `call(module, inputs, state, *, train,
        rngs) -> (outputs, state)` if the module is stateful.
      draws_in_evaluation: whether the model is meant to draw random numbers in evaluation as well,
        such as a variational autoencoder or Monte Carlo dropout. `evaluate` and `predict` then
        need a key; `fit` and `train` evaluate with one from the state's key and step. By default,
        such a model is refused, since dropout that stays on is a common fault.
      independent_examples: False if the examples of a batch influence each other on purpose, in
        evaluation as well, such as the nodes of a graph. `fit` and `train` then do not check that
        they do not.

    Returns:
      A TrainState at step 0.

    Raises:
      InputError: an argument has the wrong type; without `call`, a layer with dropout or batch norm
        is in the mode of evaluation during training, or the reverse; evaluation draws random
        numbers, or does not with `draws_in_evaluation`; in training, no scalars are sown in a
        collection of `sown_losses`; or wrappers of the optimizer are in an order in which they do
        not work.

    Example:
      >>> state = jt.init_state(model, optax.adam(1e-3), train.inputs[:1], key=jax.random.key(0))
      >>> def call(module, inputs, *, train, rngs):
      ...     return module(inputs["pixels"] / 255, train=train)
      >>> sample = {"pixels": train.inputs[:1]}
      >>> state = jt.init_state(model, optimizer, sample, key=key, call=call)
    """
    check_arguments(init_state, locals())
    sample_inputs = join_inputs(sample_inputs)
    for path, leaf in named_arrays(sample_inputs, "sample_inputs"):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            check_array(leaf, path)
    leaves = jax.tree.leaves(sample_inputs)
    if leaves and not any(leaf.ndim for leaf in leaves):
        raise InputError("sample_inputs is a scalar; expected inputs with an axis of examples")
    params_key, state_key = jax.random.split(key)
    release_programs()
    adapted, held = adapters.adapt(model, rngs, sown_losses, call)
    adapted = adapters.drawing(adapted) if draws_in_evaluation else adapted
    if not independent_examples:
        adapted = adapted._replace(independent_examples=False)
    try:
        params, model_state = adapted.init(params_key, sample_inputs) if held is None else held
        adapted = adapters.checked(adapted, params, model_state, sample_inputs)
    except InputError:
        raise
    except Exception as error:  # of the network
        shapes = ", ".join(
            f"{path} of {jnp.result_type(leaf)}{list(leaf.shape)}"
            for path, leaf in named_arrays(sample_inputs, "sample_inputs")
        )
        error.add_note(
            f"init_state called the model with {shapes}: their first axis is that of the "
            "examples, as in train.inputs[:1]"
        )
        raise
    optimizer, opt_state = _initialized(NO_OPTIMIZER if optimizer is None else optimizer, params)
    return TrainState(
        # Arrays from the start: Python integers would compile the first step twice.
        step=jnp.zeros((), jnp.int32),
        epoch=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        key=state_key,
        model=adapted,
        optimizer=optimizer,
    )


def with_optimizer(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state with a new, freshly initialized optimizer on the trained parameters.

    Args:
      state: where to start; its parameters, counters and key stay.
      optimizer: any optax transformation.

    Raises:
      InputError: `optimizer` is not an optax transformation, or its wrappers are in an order in
        which they do not work.

    Example:
      >>> state = jt.with_optimizer(state, jt.optimizers.sgd(1e-4))  # fine-tuning
    """
    check_state_type(state)
    release_programs()
    optimizer, opt_state = _initialized(optimizer, state.params)
    return state.replace(optimizer=optimizer, opt_state=opt_state)


def set_learning_rate(state: TrainState, learning_rate: float | Float[Array, ""]) -> TrainState:
    """Returns the state with another learning rate, and everything else that the optimizer keeps.

    The next steps use the rate, so moments and averages continue, as after
    `group["lr"] = learning_rate` in PyTorch. A schedule ends: the rate is constant from then on.
    All groups of `optax.partition` get the rate. No program is compiled again, and the function
    works under `jit` and `vmap`.

    The optimizers of `jt.optimizers` keep their rate in the state, except Rprop, which has a step
    size per parameter, and L-BFGS; so does `optax.inject_hyperparams` with a number. For others,
    and for another schedule, `state.replace(optimizer=optax.adam(schedule))` takes an optimizer
    whose state has the same structure.

    Args:
      state: where to start.
      learning_rate: the rate from the next step on, a scalar.

    Raises:
      InputError: the rate is not a number, negative or not finite, or the state has no rate that
        can be set.

    Example:
      >>> state, losses = jt.train_epoch(state, train, loss_fn)
      >>> state = jt.set_learning_rate(state, 1e-4)
      >>> jt.optimizers.records(state.opt_state)["learning_rate"].value
      Array(0.0001, dtype=float32)
      >>> def lower(run):  # after each epoch of fit
      ...     return jt.set_learning_rate(run.state, 0.1 / run.epoch)
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, epochs=2, callbacks=[lower])
    """
    check_state_type(state)
    if callable(learning_rate):
        raise InputError(
            "learning_rate is a function; expected a number: for another schedule, use "
            "state.replace(optimizer=...) with an optimizer of the same kind",
            argument="learning_rate",
        )
    check_not_negative(learning_rate=learning_rate)
    if jnp.ndim(learning_rate):
        raise InputError(
            f"learning_rate has the shape {jnp.shape(learning_rate)}; expected a scalar: use "
            "jax.vmap for several states",
            argument="learning_rate",
        )
    if not has_settable_rate(state.opt_state, schedules=True):
        raise InputError(
            "the state of the optimizer has no learning rate to set in each group of parameters, "
            "such as that of optax.adam(1e-3); expected an optimizer of jaxtrain.optimizers other "
            "than rprop and lbfgs, or one of optax.inject_hyperparams with a number: or use "
            "state.replace(optimizer=optax.adam(1e-4)), which keeps the state",
            argument="state",
        )
    opt_state = map_rates(lambda rate: learning_rate, state.opt_state, schedules=True)
    return state.replace(opt_state=opt_state)


def to_module(state: TrainState) -> Any:
    """Returns the trained NNX, Equinox or PyTorch module, with averaged parameters if it has any.

    Args:
      state: a state that `init_state` made from such a module.

    Returns:
      A new NNX or PyTorch module, in evaluation mode; or the Equinox module, as a pair with its
      `eqx.nn.State` if it has one.

    Raises:
      InputError: the model is a Linen module or a `Model`, whose parameters are `state.params`.

    Example:
      >>> from flax import nnx
      >>> train, test = jt.data.line()
      >>> module = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> state = jt.init_state(module, optimizer, train.inputs[:1], key=key)
      >>> state, losses = jt.train_epoch(state, train, jt.losses.mean_squared_error)
      >>> trained = jt.to_module(state)
      >>> trained(test.inputs).shape
      (10, 1)
    """
    check_state_type(state)
    return adapters.to_module(state.model, state.evaluation_params, state.model_state)


def to_shapes(tree: Any) -> Any:
    """Returns shapes and dtypes in place of arrays, without their placement."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def recorded(state: Any) -> dict[str, Array]:
    """Returns what the optimizer records, by name; {} for a state without one."""
    found = records(getattr(state, "opt_state", ()))
    return {name: record.value for name, record in found.items()}


def counters(state: Any) -> dict[str, Array]:
    """Returns the counters among what the optimizer records, by name."""
    found = records(getattr(state, "opt_state", ()))
    return {name: record.value for name, record in found.items() if record.counts}


def next_epoch(state: Any) -> int:
    """Returns the epoch that comes next, counted from 1; 1 if the state is traced."""
    return 1 if isinstance(state.epoch, jax.core.Tracer) else int(state.epoch) + 1


def with_epoch(state: Any, epoch: Array) -> Any:
    """Returns the state with another number of epochs, also of a user's own pytree."""
    if hasattr(state, "_replace"):  # a NamedTuple
        return state._replace(epoch=epoch)
    if hasattr(state, "replace"):
        return state.replace(epoch=epoch)
    return dataclasses.replace(state, epoch=epoch)


def check_state_type(state: Any, step_fn: Any = None) -> None:
    """Raises InputError unless `state` is a TrainState, or what a `step_fn` needs."""
    if step_fn is not None and not isinstance(state, TrainState):
        for name in ("step", "epoch", "key"):
            if not hasattr(state, name):
                raise InputError(
                    f"state is a {type(state).__name__} without {name}; expected a jaxtrain."
                    "TrainState, or a pytree with the fields step, epoch and key"
                )
    elif not isinstance(state, TrainState):
        kind = f"{type(state).__module__}.{type(state).__name__}"
        is_own = all(hasattr(state, name) for name in ("step", "epoch", "key"))
        hint = ", or the step of such a state, fit(..., step_fn=...)" if is_own else ""
        raise InputError(
            f"state is a {kind}; expected a jaxtrain.TrainState, as returned by "
            f"init_state, train_step or fit{hint}"
        )
    if getattr(state.step, "ndim", 0):
        raise InputError(
            f"state is a batch of states of shape {state.step.shape}; expected one state: "
            "select one by jax.tree.map(lambda leaf: leaf[0], state), or apply jax.vmap to the "
            "function"
        )


def checked_state(state: Any, step_fn: Any = None) -> Any:
    """Returns the state without weak types, which would trigger a recompilation in the second step.

    Raises InputError if it is of another type, or a variable of the model contains NaN.
    """
    check_state_type(state, step_fn)
    typed = jax.tree.map(_strongly_typed, state)
    if not isinstance(state, TrainState):
        return typed
    variables = {"params": state.params, "model_state": state.model_state}
    for path, leaf in named_arrays(variables, ""):
        is_float = jnp.issubdtype(leaf.dtype, jnp.inexact)
        if is_float and has_values(leaf) and np.isnan(np.asarray(leaf)).any():
            raise InputError(
                f"state holds NaN in {path}; expected numbers: start from init_state or from an "
                "earlier state"
            )
    # The model state keeps weak types: an `eqx.nn.State` refuses values of another type.
    return typed.replace(model_state=jax.tree.map(jnp.asarray, state.model_state))


def _strongly_typed(leaf: Any) -> Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) or not array.weak_type:
        return array
    return lax.convert_element_type(array, array.dtype)


def _initialized(optimizer: Any, params: PyTree) -> tuple[optax.GradientTransformation, PyTree]:
    """Returns a checked optimizer and its initial state; see `hoist_tracers`."""
    check_optimizer(optimizer)
    optimizer, opt_state = adapt_lookahead(*hoist_tracers(optimizer, params), params)
    check_order(opt_state, params)
    return optimizer, opt_state


def _describe(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(getattr(leaf, 'shape', ()))}"


def _value(leaf: Any) -> str:
    """Returns the value of a counter, or its type while it is traced or vmapped."""
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    is_number = is_array and not isinstance(leaf, jax.core.Tracer) and leaf.ndim == 0
    return str(int(leaf)) if is_number else _describe(leaf)
