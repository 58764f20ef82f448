"""Traces a model on the host, and names inputs that it does not take."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import adapters
from jaxtrain._compiler import bounded
from jaxtrain.dataset import Dataset, describe_array, join_inputs, map_examples, named_arrays
from jaxtrain.errors import InputError, first_line
from jaxtrain.training.state import TrainState

# Number of examples with which a model is traced whose examples do not depend on each other: a
# prime number, of which few axes of networks are a multiple; see `independence`.
TRACED_ROWS = 83

# A jitted function keeps its traces, for several data sets and checks.
predict_alone = bounded(
    jax.jit(
        lambda model, params, model_state, inputs: adapters.call_in_evaluation(
            model, params, model_state, inputs, key=jax.random.key(0)
        )[0],
        static_argnums=0,
    )
)


def traced_prediction(
    state: TrainState, data: Dataset, name: str, batch_size: int | None = None
) -> Any:
    """Returns the traced model in evaluation mode, a `jax.stages.Traced`.

    The batch has `TRACED_ROWS` examples; or if they depend on each other, `batch_size` or all.
    """
    rows = TRACED_ROWS
    if not state.model.independent_examples:
        rows = min(batch_size or len(data), len(data))
    inputs = join_inputs(map_examples(functools.partial(shape_of, rows=rows), data))
    try:
        return predict_alone.trace(state.model, state.params, state.model_state, inputs)
    except InputError:
        raise
    except Exception as error:  # networks raise different types for a wrong shape
        reason = first_line(error)
        if reason.startswith("DataLoader worker"):  # PyTorch raises it from a signal handler
            raise
        shapes = ", ".join(
            f"{path} has {leaf.dtype}{[1, *leaf.shape[1:]]} per example"
            for path, leaf in named_arrays(data.inputs, f"{name}.inputs")
        )
        hint = "" if rows == TRACED_ROWS else f", and batches of the right size, not of {rows}"
        raise InputError(
            f"the model does not take the inputs of {name} ({shapes}): {reason}; expected the "
            f"shapes and dtypes that init_state was given{hint}"
        ) from error


def check_batch_axis(state: TrainState, inputs: Any) -> None:
    """Raises InputError if inputs have the shape of one example, without an axis of examples."""
    example = adapters.example_inputs(state.model)
    leaves, wanted = jax.tree.leaves(inputs), jax.tree.leaves(example)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if wanted and shapes == [leaf.shape[1:] for leaf in wanted]:
        found = ", ".join(describe_array(leaf) for leaf in leaves)
        raise InputError(
            f"inputs is {found}, the shape of one example; expected an axis of examples before "
            "it, as in inputs[None]",
            argument="inputs",
        )


def shape_of(leaf: Any, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), jnp.result_type(leaf))
