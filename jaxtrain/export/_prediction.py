"""A trained model as a function of any number of examples, for files that contain a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxtrain import adapters
from jaxtrain._placement import is_key, to_numpy
from jaxtrain.dataset import check_inputs, describe_array, named_arrays
from jaxtrain.errors import InputError, first_line
from jaxtrain.training.state import TrainState, check_state_type
from jaxtrain.training.step import predict_batch


def prediction_function(
    state: TrainState,
    preprocess: Callable[[PyTree], PyTree] | None,
    postprocess: Callable[[Any], Any] | None,
) -> Callable[[PyTree], Any]:
    """Returns the function of one batch that computes what `predict` does.

    Args:
      state: the parameters to predict with, which become constants.
      preprocess: applied to the inputs first, or None.
      postprocess: applied to the outputs, or None.

    Raises:
      InputError: the state is not a TrainState, its model draws random numbers, or a function
        cannot be called.
    """
    check_state_type(state)
    if adapters.draws_in_evaluation(state.model):
        raise InputError(
            f"{adapters.name_of_model(state.model)} draws random numbers in evaluation, and the "
            "program in a file has no key; expected a model that does not draw: the parameters of "
            "this state in one of init_state(..., call=...)",
            argument="state",
        )

    def on_host(tree: PyTree) -> PyTree:
        # A file does not depend on the devices that the state lies on.
        return jax.tree.map(lambda leaf: leaf if is_key(leaf) else to_numpy(leaf), tree)

    constants = state.replace(
        step=np.zeros((), np.int32),
        epoch=np.zeros((), np.int32),
        params=on_host(state.evaluation_params),
        model_state=on_host(state.model_state),
        opt_state=(),
        key=None,
    )

    def predict(inputs: PyTree) -> Any:
        # Arrays rather than NumPy's, which indexing by a traced array would fail on.
        arrays = jax.tree.map(jax.numpy.asarray, constants)
        outputs = predict_batch(arrays, inputs if preprocess is None else preprocess(inputs))
        return outputs if postprocess is None else postprocess(outputs)

    return predict


def symbolic_inputs(inputs: PyTree, name: str) -> PyTree:
    """Returns the shapes and dtypes of inputs, with a symbolic number of examples.

    Args:
      inputs: array or pytree of arrays, [examples, ...].
      name: the name of the number of examples.

    Raises:
      InputError: the inputs are not arrays, or there are none.
    """
    from jax import export

    check_inputs(inputs)
    (examples,) = export.symbolic_shape(name)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (examples, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)
        ),
        inputs,
    )


def trace_any_number(
    trace: Callable[[Callable[[PyTree], Any]], Any],
    predict: Callable[[PyTree], Any],
    specs: PyTree,
    inputs: PyTree,
) -> Any:
    """Traces a prediction for a symbolic number of examples.

    A model that needs their number as an integer, by `len(x)` for example, is traced for one
    example, and mapped over the others.

    Args:
      trace: traces a function of inputs with the shapes of `specs`.
      predict: the function of a batch.
      specs: what `symbolic_inputs` returned.
      inputs: the arrays that it was given.

    Raises:
      InputError: the function cannot be traced, or what it predicts for an example depends on the
        others of the batch.
    """
    try:
        return trace(predict)
    except InputError:
        raise
    except Exception as error:  # models raise different types
        failure = error

    def of_one(example: PyTree) -> Any:
        outputs = predict(jax.tree.map(lambda leaf: leaf[None], example))
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    mapped = jax.vmap(of_one)
    try:
        result = trace(mapped)
    except Exception:
        raise _export_error(specs, failure) from failure
    # Two examples that differ, since one may be all there is.
    pair = jax.tree.map(
        lambda leaf, spec: np.stack([leaf[0], np.zeros_like(leaf[0])]).astype(spec.dtype),
        jax.tree.map(np.asarray, inputs),
        specs,
    )
    found, expected = (jax.tree.leaves(jax.jit(each)(pair)) for each in (mapped, predict))
    for ours, theirs in zip(found, expected, strict=True):
        if not np.allclose(ours, theirs, rtol=1e-2, atol=1e-3, equal_nan=True):
            raise _export_error(specs, failure, " whose prediction does not depend on the others")
    return result


def _export_error(inputs: PyTree, error: Exception, which: str = "") -> InputError:
    """Returns the error for a model that cannot be traced for symbolic inputs."""
    shapes = ", ".join(
        f"{path} has {describe_array(leaf)}" for path, leaf in named_arrays(inputs, "inputs")
    )
    reason = first_line(error)
    return InputError(
        f"the model cannot be exported ({shapes}): {reason}; expected inputs as of init_state, and "
        f"a model that takes any number of examples{which}: x.shape[0] in place of len(x)"
    )
