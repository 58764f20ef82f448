"""Placement of states, data sets and batches on a mesh of devices with the axis "data"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxtrain._arguments import check_arguments
from jaxtrain._compiler import is_tracing
from jaxtrain._placement import describe_values, put
from jaxtrain._processes import check_same, initialize
from jaxtrain.dataset import Dataset, check_dataset, map_examples, named_arrays
from jaxtrain.errors import InputError

__all__ = ["initialize", "replicate", "shard"]

# The axis of a mesh over which batches are divided.
AXIS = "data"

Rule = Callable[[str, Any], P]


def replicate(tree: PyTree, mesh: jax.sharding.Mesh, rule: Rule | None = None) -> PyTree:
    """Places a state or a data set on a mesh, a complete copy on every device.

    Arrays that are already sharded over this mesh keep their sharding. With several processes,
    each passes the same values, which are compared.

    Args:
      tree: a `TrainState`, a `Dataset`, or any pytree of arrays.
      mesh: the devices.
      rule: `rule(path, leaf) -> PartitionSpec` shards some arrays instead; the path is, for
        example, "params.Dense_0.kernel".

    Returns:
      The pytree on the devices of the mesh.

    Raises:
      InputError: the mesh has no axis "data", an array cannot be divided as the rule says, or the
        processes pass different values.

    Example:
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> state = jt.parallel.replicate(state, mesh)
    """
    check_arguments(replicate, locals(), eager="call it outside")
    check_mesh(mesh)
    return _replicated(tree, "", mesh, rule)


def _replicated(
    tree: PyTree, name: str, mesh: jax.sharding.Mesh, rule: Rule | None = None
) -> PyTree:
    if mesh.is_multi_process:
        moved = [
            (path, leaf)
            for path, leaf in named_arrays(tree, name)
            if getattr(leaf, "is_fully_addressable", True)
        ]
        with jax.set_mesh(mesh):
            check_same(lambda: {path: describe_values(leaf) for path, leaf in moved})

    def place(path: str, leaf: Any) -> Any:
        spec = _spec_on(leaf, mesh) if rule is None else rule(path, leaf)
        try:
            return put(leaf, NamedSharding(mesh, spec))
        except (TypeError, ValueError, AssertionError) as error:
            raise InputError(
                f"the specification of {path}, of shape {jnp.shape(leaf)}, is {spec}, which does "
                f"not fit the mesh {dict(mesh.shape)}; expected axes of the mesh whose sizes "
                "divide those of the array"
            ) from error

    leaves = [place(path, leaf) for path, leaf in named_arrays(tree, "")]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def placed(tree: PyTree, name: str) -> PyTree:
    """Returns arrays on the devices of the current mesh, or else on JAX's default device.

    `name` is that of `tree` in error messages.
    """
    mesh = current_mesh()
    if mesh is None or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(jnp.asarray, tree)
    check_mesh(mesh)
    return _replicated(tree, name, mesh)


def shard(dataset: Dataset, mesh: jax.sharding.Mesh) -> Dataset:
    """Divides a data set over the devices of a mesh, each of which stores one part.

    An epoch on a sharded data set takes the same batches in the same order as on one device, since
    the shuffle is one permutation of all examples. Each step therefore exchanges its batch between
    the devices. A replicated data set, the default of `fit`, needs no such exchange.

    Args:
      dataset: all examples, or with several processes the part of this process, for example of
        `jt.data.load(name, shard=(jax.process_index(), jax.process_count()))`. Every process has
        the same number of examples.
      mesh: the devices.

    Returns:
      The examples of all processes, divided over all devices.

    Raises:
      InputError: the number of examples is not a multiple of the number of devices.

    Example:
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> train = jt.parallel.shard(train, mesh)
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn)
    """
    check_arguments(shard, locals(), eager="call it outside")
    check_mesh(mesh)
    check_dataset(dataset, "dataset")
    processes = jax.process_count() if mesh.is_multi_process else 1
    devices = mesh.shape[AXIS] // processes
    arrays = named_arrays(dataset, "dataset")
    with jax.set_mesh(mesh):
        check_same(
            lambda: {path: f"{array.dtype}{list(array.shape)}" for path, array in arrays},
            "the same number of examples, and the same shapes and dtypes, in every process",
        )
    if len(dataset) % devices:
        fitting = len(dataset) // devices * devices
        raise InputError(
            f"dataset has {len(dataset)} examples for {devices} devices; expected a multiple of "
            f"{devices}: leave out the last ones with dataset[:{fitting}], or replicate it"
        )
    sharding = NamedSharding(mesh, P(AXIS))
    divided = map_examples(
        lambda array: jax.make_array_from_process_local_data(sharding, array), dataset
    )
    return divided.replace(shared=replicate(dataset.shared, mesh))


def check_mesh(mesh: Any) -> None:
    """Raises InputError unless `mesh` is a mesh of devices with the axis "data"."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise InputError(
            f'mesh is {mesh!r}; expected a mesh, such as jax.make_mesh((8,), ("data",))',
            argument="mesh",
        )
    if AXIS not in mesh.axis_names:
        raise InputError(
            f'mesh has the axes {mesh.axis_names}; expected one named "data", over which the '
            "batches are divided",
            argument="mesh",
        )


def check_batch_size(batch_size: int, examples: int) -> None:
    """Raises InputError if the devices of the current mesh do not divide the batch size.

    Args:
      batch_size: examples per step, of all devices together.
      examples: examples of the data set; a larger batch size means all of them.
    """
    devices = axis_size()
    size = min(batch_size, examples)
    if size % devices:
        lower = size // devices * devices
        nearest = [str(n) for n in (lower, lower + devices) if 0 < n <= examples]
        hint = f"such as {' or '.join(nearest)}" if nearest else "or use a larger data set"
        raise InputError(
            f"batch_size is {size} on {devices} devices; expected a multiple of {devices}, {hint}",
            argument="batch_size",
        )


@contextlib.contextmanager
def mesh_of(*trees: PyTree, mesh: jax.sharding.Mesh | None = None) -> Iterator[None]:
    """Enters a mesh: the given one, else that of `jax.set_mesh`, else that of the first array.

    Traced arrays have no known mesh. A function that you trace, and that calls the library, is
    therefore called under `jax.set_mesh`.

    Args:
      trees: pytrees of arrays.
      mesh: the mesh, or None.

    Raises:
      InputError: the given mesh has no axis "data"; or without a mesh, the arrays are on different
        devices, with which JAX does not compute.
    """
    if mesh is not None:
        check_mesh(mesh)
    elif not is_tracing() and current_mesh() is None:
        mesh = next(filter(None, map(_mesh_of_leaf, jax.tree.leaves(trees))), None)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        try:
            yield
        except ValueError as error:
            is_placed = mesh is not None or current_mesh() is not None
            if not is_placed and not isinstance(error, InputError):
                check_devices(*trees)
            raise


def check_devices(*trees: PyTree) -> None:
    """Raises InputError if arrays that `jax.device_put` has placed are on different devices.

    The first tree is the state.
    """
    found: dict[Any, str] = {}
    for tree, name in zip(trees, ("state", *["data"] * len(trees)), strict=False):
        for path, leaf in named_arrays(tree, name):
            is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
            if is_array and leaf.committed:
                found.setdefault(frozenset(leaf.sharding.device_set), path)
    if len(found) > 1:
        (first, path), (second, other), *_ = found.items()
        raise InputError(
            f"{path} is on {_names(first)} and {other} on {_names(second)}; expected the same "
            "devices: move one of them by jax.device_put, or pass mesh= to fit"
        )


def _names(devices: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, devices)))


def current_mesh() -> jax.sharding.Mesh | None:
    """Returns the mesh that `jax.set_mesh` has set; None without one, and in a traced function."""
    mesh = None if is_tracing() else jax.sharding.get_mesh()
    return None if mesh is None or mesh.empty else mesh


def replicated_like(leaf: Any) -> NamedSharding | None:
    """Returns the sharding that copies an array to all devices of the mesh of `leaf`, or None."""
    mesh = _mesh_of_leaf(leaf)
    return None if mesh is None else NamedSharding(mesh, P())


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which programs are for one device, whatever mesh the user has set.

    It cannot be entered while JAX traces. An empty abstract mesh would not do: programs would be
    compiled and exported for the devices of the user's mesh.
    """
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def axis_size() -> int:
    """Returns the number of devices over which the current mesh divides a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AXIS not in mesh.axis_names:
        return 1
    # Inside `jax.shard_map` each device computes on its own.
    return 1 if AXIS in mesh.manual_axes else mesh.shape[AXIS]


def divide(batch: Dataset) -> Dataset:
    """Divides a batch over the devices of the current mesh.

    Without it, XLA may compute a batch that is taken from a sharded data set on every device. A
    batch that the devices do not divide, such as the last one of an epoch, stays undivided.
    """
    devices = axis_size()
    if devices == 1:
        return batch

    def constrain(leaf: Any) -> Any:
        is_divisible = jnp.shape(leaf)[0] % devices == 0
        return lax.with_sharding_constraint(leaf, P(AXIS) if is_divisible else P())

    return map_examples(constrain, batch)


def first_axis(batch: PyTree) -> P:
    """Returns the `PartitionSpec` of the first axis of a batch, as its type records it."""
    return P(*jax.typeof(jax.tree.leaves(batch)[0]).sharding.spec[:1])


def on_auto_axes(function: Callable[..., Any], *args: Any, like: Any = None) -> Any:
    """Calls a function with the axes of the mesh in JAX's mode `Auto`.

    In the mode `Explicit`, the default of `jax.make_mesh`, each operation of a network would have
    to state the sharding of its result where this is ambiguous.

    Args:
      function: a function of pytrees of arrays, called while JAX traces.
      args: its arguments.
      like: the shardings of the results, as a pytree or a prefix of one: an array stands for its
        own sharding, and None for a copy on every device, which each of several processes can read.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(args)]
    meshes = [jax.sharding.get_abstract_mesh(), *(sharding.mesh for sharding in shardings)]
    mesh = next((each for each in meshes if each.explicit_axes), None)
    if mesh is not None:

        def sharding_of(leaf: Any) -> NamedSharding:
            spec = leaf if isinstance(leaf, P) else P()
            is_array = leaf is not None and not isinstance(leaf, P)
            return NamedSharding(mesh, jax.typeof(leaf).sharding.spec if is_array else spec)

        out = jax.tree.map(sharding_of, like, is_leaf=_is_spec)
        return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out)(*args)
    results = function(*args)
    if axis_size() == 1:
        return results

    def constrain(leaf: Any, results: Any) -> Any:
        return lax.with_sharding_constraint(results, P()) if leaf is None else results

    return jax.tree.map(constrain, like, results, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, P)


def _mesh_of_leaf(leaf: Any) -> jax.sharding.Mesh | None:
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return None
    mesh = getattr(leaf.sharding, "mesh", None)
    is_divided = mesh is not None and AXIS in mesh.axis_names and mesh.shape[AXIS] > 1
    return mesh if is_divided else None


def _spec_on(leaf: Any, mesh: jax.sharding.Mesh) -> P:
    """Returns the `PartitionSpec` of an array on a mesh, which is P() if it is elsewhere."""
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
        return sharding.spec
    return P()
