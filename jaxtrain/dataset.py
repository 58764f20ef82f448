"""Dataset: inputs, targets and weights of examples, as one pytree; a batch is a small Dataset."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key, PyTree

from jaxtrain._arguments import check_key, check_number
from jaxtrain.errors import InputError

# The largest number of characters that a `Dataset` shows of one field.
_MAX_SHOWN = 400


# Not type-checked at run time: JAX rebuilds pytrees with placeholders for their leaves.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A set of examples, stored along the first axis of every array.

    It is a pytree, so `jax.jit`, `jax.vmap` and `jax.device_put` accept it like an array.
    `len(dataset)` is the number of examples and `dataset[a:b]` contains examples a to b - 1.

    Attributes:
      inputs: array, or pytree of arrays, [examples, ...].
      targets: array, or pytree of arrays, [examples, ...]; None if the loss needs none.
      weights: weights of the losses, [examples], or [examples, time] for a loss per token; None
        weights all equally.
      shared: array, or pytree of arrays, without an axis of examples, such as a time grid or the
        adjacency matrix of a graph. Every batch has all of it, and the model receives it after the
        inputs: the tuple `(inputs, shared)`, where a tuple counts as several entries.
      drop_last: whether training leaves out the last batch of an epoch if it is smaller than the
        others, as `jt.data.stream(..., drop_last=True)` does; evaluations use all examples.

    Example:
      >>> dataset = jt.Dataset(jnp.ones((100, 3)), jnp.zeros(100, jnp.int32))
      >>> len(dataset)
      100
      >>> dataset[:32]
      Dataset(inputs=float32[32,3], targets=int32[32])
    """

    inputs: PyTree
    targets: PyTree = None
    weights: ArrayLike | None = None
    shared: PyTree = dataclasses.field(default=None, kw_only=True)
    drop_last: bool = dataclasses.field(default=False, kw_only=True, metadata={"static": True})

    def __len__(self) -> int:
        leaves = jax.tree.leaves(self.inputs)
        if not leaves or not getattr(leaves[0], "shape", ()):
            check_dataset(self, "dataset")  # says what is wrong
        return leaves[0].shape[0]

    def __repr__(self) -> str:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        # Without targets, weights and drop_last where they have their defaults.
        shown = [
            f"{name}={_describe(tree)}"
            for name, tree in fields.items()
            if tree is not None and tree is not False
        ]
        return f"Dataset({', '.join(shown)})"

    def __getitem__(self, index: slice) -> Dataset:
        if not isinstance(index, slice):
            raise InputError(
                f"the index is {index!r}; expected a slice such as dataset[:32], or "
                "dataset.take(indices); the arrays are dataset.inputs and dataset.targets"
            )
        return map_examples(lambda array: array[index], self)

    def take(self, indices: Int[Array, "chosen"]) -> Dataset:
        """Returns the examples at some indices, in that order.

        Args:
          indices: positions of examples; not checked to be in range.

        Example:
          >>> train.take(jnp.array([5, 0, 7]))
          Dataset(inputs=float32[3,8,8], targets=int32[3])
        """
        return map_examples(lambda array: jnp.asarray(array)[indices], self)

    def split(self, fraction: float, key: Key[Array, ""]) -> tuple[Dataset, Dataset]:
        """Splits the examples at random into two disjoint parts.

        Args:
          fraction: fraction of the examples in the second part, between 0 and 1; the number of
            examples is rounded.
          key: PRNG key.

        Returns:
          The rest and the held-out part (for validation), each in stored order.

        Raises:
          InputError: one of the parts would be empty, or the arrays differ in length.

        Example:
          >>> rest, validation = train.split(0.25, jax.random.key(0))
          >>> len(rest), len(validation)
          (48, 16)
        """
        check_dataset(self, "dataset")
        check_key(key)
        examples = len(self)
        check_number(
            "fraction",
            fraction,
            lambda number: 0 < number < 1 and 0 < round(examples * number) < examples,
            f"a number in 0 … 1 that leaves at least one example in each part, of {examples}",
        )
        held_out = round(examples * fraction)
        order = jax.random.permutation(key, examples)
        return (
            self.take(jnp.sort(order[: examples - held_out])),
            self.take(jnp.sort(order[examples - held_out :])),
        )

    def replace(self, **changes: Any) -> Dataset:
        """Returns a copy with some fields replaced.

        Example:
          >>> train.replace(weights=jnp.ones(len(train)))
          Dataset(inputs=float32[64,8,8], targets=int32[64], weights=float32[64])
        """
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_pytree_node_class
class JoinedInputs(tuple):
    """The inputs of a batch and the arrays that its examples share, as a model receives them.

    Attributes:
      shared: how many of the last entries have no batch axis.
    """

    shared: int

    def __new__(cls, entries: Iterable[Any], shared: int) -> JoinedInputs:
        joined = super().__new__(cls, entries)
        joined.shared = shared
        return joined

    def tree_flatten(self) -> tuple[tuple[Any, ...], int]:
        """Returns the entries, and what is not an array."""
        return tuple(self), self.shared

    @classmethod
    def tree_unflatten(cls, shared: int, entries: Iterable[Any]) -> JoinedInputs:
        """Returns the pytree with other entries."""
        return cls(entries, shared)


def join_inputs(data: Any) -> PyTree:
    """Returns the inputs of a `Dataset` and what is shared; anything else unchanged."""
    if not isinstance(data, Dataset):
        return data
    if data.shared is None:
        return data.inputs
    inputs, shared = (x if type(x) is tuple else (x,) for x in (data.inputs, data.shared))
    return JoinedInputs((*inputs, *shared), len(shared))


def shared_inputs(inputs: PyTree) -> tuple[Any, ...]:
    """Returns the entries of a model's inputs that have no batch axis, the last ones."""
    return inputs[len(inputs) - inputs.shared :] if isinstance(inputs, JoinedInputs) else ()


def map_examples(function: Callable[[Any], Any], dataset: Dataset) -> Dataset:
    """Applies a function to each array of a `Dataset` that has one entry per example."""
    fields = (dataset.inputs, dataset.targets, dataset.weights)
    inputs, targets, weights = jax.tree.map(function, fields)
    return dataset.replace(inputs=inputs, targets=targets, weights=weights)


@functools.partial(jax.jit, static_argnames="examples")
def epoch_order(examples: int, key: Key[Array, ""] | None) -> Int[Array, "examples"]:
    """Returns the order of an epoch's examples: a permutation, or as stored if key is None."""
    if key is None:
        return jnp.arange(examples, dtype=jnp.int32)
    return jax.random.permutation(key, examples)


def _describe(tree: PyTree) -> str:
    """Returns a pytree as text, with dtypes and shapes in place of the values of arrays."""
    shown = str(jax.tree.map(_describe_leaf, tree)).replace("'", "")
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _describe_leaf(leaf: Any) -> str:
    """Returns a leaf as text: dtype and shape of an array, a number, or the type of an object."""
    if leaf is None or isinstance(leaf, bool | int | float):
        return str(leaf)
    package, kind = type(leaf).__module__.split(".")[0], type(leaf).__name__
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape") and package != "pandas":
        return describe_array(leaf)
    return kind if package == "builtins" else f"{package}.{kind}"


def describe_array(array: Any) -> str:
    """Returns the dtype and shape of an array, such as uint8[32,28,28]."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def as_dataset(data: Any, name: str) -> Dataset:
    """Returns a `Dataset`, or a tuple (inputs, targets[, weights]) as one, checked."""
    if isinstance(data, tuple) and len(data) in (2, 3):
        data = Dataset(*data)
    check_dataset(data, name)
    return data


def without_drop_last(data: Any) -> Any:
    """Returns a `Dataset` without `drop_last`, for evaluation; anything else unchanged."""
    return data.replace(drop_last=False) if isinstance(data, Dataset) else data


def check_dataset(dataset: Any, name: str) -> None:
    """Raises InputError unless all arrays of a Dataset have the same, positive, length."""
    if not isinstance(dataset, Dataset):
        found = f"a {type(dataset).__name__}"
        if isinstance(dataset, tuple):
            found += f" of {len(dataset)}"
        hint = ""
        if isinstance(dataset, float):
            hint = f", such as those of rest, {name} = data.split({dataset}, key)"
        elif callable(dataset):
            hint = ": call the function, if it returns the data"
        raise InputError(
            f"{name} is {found}; expected a jaxtrain.Dataset(inputs, targets), or a tuple "
            f"(inputs, targets){hint}"
        )
    if not isinstance(dataset.drop_last, bool):
        raise InputError(f"{name}.drop_last is {dataset.drop_last!r}; expected True or False")
    for path, array in named_arrays(dataset, name):
        check_array(array, path)
    arrays = named_arrays(dataset.replace(shared=None), name)
    for path, array in arrays:
        if not array.shape:
            raise InputError(f"{path} is a scalar; expected an array with one entry per example")
    if not jax.tree.leaves(dataset.inputs):
        raise InputError(f"{name}.inputs is empty; expected at least one array")
    (first, length), *rest = [(path, array.shape[0]) for path, array in arrays]
    for path, other in rest:
        if other != length:
            raise InputError(
                f"{first} has {length} examples and {path} has {other}; expected the same number "
                "along the first axis"
            )
    if length == 0:
        raise InputError(f"{name} is empty; expected at least one example")
    _check_weights(dataset, name)


def _check_weights(dataset: Dataset, name: str) -> None:
    """Raises InputError for the third of two inputs and their labels, which cannot be weights."""
    weights: Any = dataset.weights
    targets = dataset.targets
    if weights is None or not hasattr(targets, "dtype"):
        return
    like = [x.shape for x in jax.tree.leaves(dataset.inputs) if x.dtype == targets.dtype]
    is_input = targets.ndim > 2 or (targets.ndim == 2 and targets.shape in like)
    are_labels = weights.ndim == 1 and jnp.issubdtype(weights.dtype, jnp.integer) and is_input
    if are_labels or weights.ndim > max(2, targets.ndim):
        raise InputError(
            f"{name} has the weights {describe_array(weights)} for the targets "
            f"{describe_array(targets)}; expected weights of the losses: if these are two inputs "
            "and a target, pass ((first, second), target); whole numbers as weights are passed as "
            "weights.astype(numpy.float32)"
        )


def has_weight(weights: Any, array: Any) -> Any:
    """Returns where the values of an array have a weight other than 0.

    A value of inputs, predictions or targets belongs to all weights with the same indices on the
    leading axes that both shapes share; it has a weight if one of them is not 0.

    Args:
      weights: [examples] or [examples, time], of NumPy or JAX.
      array: [examples, ...].

    Returns:
      A mask with the number of axes of `array`, to which it broadcasts.
    """
    pairs = zip(weights.shape, array.shape, strict=False)
    shared = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    shared = min(weights.ndim, array.ndim) if shared is None else shared
    mask = (weights != 0).any(axis=tuple(range(shared, weights.ndim)))
    return mask.reshape(mask.shape + (1,) * (array.ndim - shared))


def check_inputs(inputs: PyTree) -> None:
    """Raises InputError unless there is at least one example."""
    if isinstance(inputs, Dataset):
        raise InputError(
            "inputs is a Dataset; expected its inputs, dataset.inputs: a function "
            "preprocess=lambda inputs: (inputs, shared) appends shared arrays"
        )
    arrays = named_arrays(inputs, "inputs")
    for path, array in arrays:
        check_array(array, path)
    # Not `len`, since the number of examples may be symbolic in `jax.export`.
    if not arrays or any(array.ndim == 0 or array.shape[0] == 0 for _, array in arrays):
        shapes = ", ".join(str(array.shape) for _, array in arrays)
        raise InputError(
            f"inputs has the shape {shapes}; expected at least one example along the first axis"
        )
    if len({array.shape[0] for _, array in arrays}) > 1:
        lengths = ", ".join(f"{path} has {array.shape[0]}" for path, array in arrays)
        raise InputError(f"{lengths} examples; expected the same number along the first axis")


def check_array(array: Any, path: str) -> None:
    """Raises InputError unless `array` is a NumPy or JAX array of a real dtype of JAX."""
    if not isinstance(array, (np.ndarray, np.generic, jax.Array)):
        kind = f"{type(array).__module__.split('.')[0]}.{type(array).__name__}"
        hint = {
            "torch.Tensor": "tensor.numpy()",
            "pandas.DataFrame": "frame.to_numpy()",
            "pandas.Series": "series.to_numpy()",
        }.get(kind, "numpy.asarray(...)")
        raise InputError(
            f"{path} is a {kind.removeprefix('builtins.')}; expected a NumPy or JAX array: "
            f"convert it with {hint}"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{path} is a masked array; expected one without a mask: fill it, as by "
            "array.filled(0), and give the examples that are missing the weight 0"
        )
    dtype = array.dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise InputError(
            f"{path} has the dtype {dtype}; expected real numbers{_hint_of_text(array)}"
        )
    if isinstance(array, (np.ndarray, np.generic)) and (
        not dtype.isnative or (dtype == np.longdouble and dtype.itemsize > 8)
    ):
        raise InputError(
            f"{path} has the dtype {dtype.str}, which JAX does not support; expected a native "
            f"dtype: convert it with array.astype({_native_name(dtype)!r})"
        )


def _hint_of_text(array: Any) -> str:
    """Returns where the first text of an array is and what to write for it, or nothing."""
    if array.dtype.kind in "OUST":
        for index, value in np.ndenumerate(array):
            if isinstance(value, str):
                place = ", ".join(map(str, index))
                return (
                    f", and [{place}] is {str(value)!r}: number the categories of a column with "
                    "pandas.Categorical(column, categories).codes"
                )
    return ""


def _native_name(dtype: np.dtype) -> str:
    return "float64" if dtype == np.longdouble else dtype.newbyteorder("=").name


def named_arrays(tree: PyTree, name: str) -> list[tuple[str, Any]]:
    """Returns every leaf of a pytree with its path, such as `data.inputs.image`."""
    return [
        (".".join(filter(None, [name, jax.tree_util.keystr(path, simple=True, separator=".")])), x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
