"""Keeps the types of the values that a compiled loop carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from jaxtrain.errors import InputError


def keep_types(after: PyTree, before: PyTree, what: str, argument: str | None = None) -> PyTree:
    """Returns what a step has computed with the types of what it was given, as a loop requires.

    Each array is cast where that loses nothing, for example from bfloat16 to float32.

    Args:
      after: what the step returned.
      before: what it was given.
      what: name of the step, used in error messages.
      argument: the argument that is at fault, for the error.

    Raises:
      InputError: the structures, the shapes, or dtypes between which a cast loses digits differ.
    """
    old, new = (_by_path(tree) for tree in (before, after))
    structure: Any = jax.tree.structure(before)
    if jax.tree.structure(after) != structure:
        paths = [{path for path, _ in tree} for tree in (old, new)]
        changed = [path for path, _ in (*new, *old) if (path in paths[0]) != (path in paths[1])]
        where = f"differs at {changed[0]}" if changed else "differs in its static parts"
        raise InputError(
            f"{what} returned a state of another structure, which {where}; expected that of the "
            "state it is given",
            argument=argument,
        )
    return jax.tree.unflatten(
        structure,
        [
            _keep_type(leaf, like, path, what, argument)
            for (path, leaf), (_, like) in zip(new, old, strict=True)
        ],
    )


def _keep_type(new: Any, old: Any, path: str, what: str, argument: str | None) -> Any:
    found, wanted = (jax.typeof(leaf) for leaf in (new, old))
    if (found.shape, found.dtype) == (wanted.shape, wanted.dtype):
        return new
    same_kind = _kind(found.dtype) == _kind(wanted.dtype)
    loses_nothing = same_kind and (
        getattr(found, "weak_type", False)
        or jnp.promote_types(found.dtype, wanted.dtype) == wanted.dtype
    )
    if found.shape != wanted.shape or not loses_nothing:
        raise InputError(
            f"{what} returned {path} as {_name(found)}; expected {_name(wanted)}, as in the state "
            "it is given: start with that type, or cast it",
            argument=argument,
        )
    return lax.convert_element_type(new, wanted.dtype)


def _kind(dtype: Any) -> Any:
    """Returns the kind of a dtype, which is the same for bfloat16 and float32."""
    kinds = (jnp.bool_, jnp.signedinteger, jnp.unsignedinteger, jnp.floating)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def _by_path(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (f"state.{jax.tree_util.keystr(path, simple=True, separator='.')}".rstrip("."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _name(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"
