"""The Model of a Flax Linen module."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxtrain.adapters._recording import Recorder
from jaxtrain.adapters._shared import (
    AdaptedApply,
    BatchStatistics,
    Static,
    call_parameters,
    named_statistics,
)
from jaxtrain.errors import InputError
from jaxtrain.model import Model

# Other names for `train`. Without the check in `adapt`, such a module would not be in training
# mode during training.
_OTHER_MODES = frozenset({"training", "is_training", "deterministic", "use_running_average"})


def adapt(module: nn.Module, rngs: Sequence[str]) -> tuple[Model, None]:
    """Returns the Model of a Linen module; its parameters come from `Model.init`."""
    accepted = call_parameters(module)
    other = sorted(_OTHER_MODES & accepted)
    if other and "train" not in accepted:
        raise InputError(
            f"the __call__ of {type(module).__name__} takes {other[0]!r} and not 'train'; expected "
            "a module that is called as module(inputs, train: bool): rename the argument, or wrap "
            "the module"
        )
    # A **kwargs does not count: `nn.Sequential` would pass `train` to its layers.
    arguments = Static(module), tuple(rngs), "train" in accepted
    return Model(Init(*arguments), Apply(*arguments)), None


@dataclasses.dataclass(frozen=True)
class Init:
    """`Model.init` of a Linen module."""

    module: Static = dataclasses.field(repr=False)
    rngs: tuple[str, ...] = dataclasses.field(repr=False)
    takes_train: bool = dataclasses.field(repr=False)

    def __call__(self, key: jax.Array, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Returns fresh parameters and the other collections; the values of `inputs` are unused."""
        variables = dict(self._init(key, jax.tree.map(_concrete, inputs)))
        params = variables.pop("params", {})
        return params, variables

    # Compiled as one program: run eagerly, each initializer would be compiled separately.
    @functools.partial(jax.jit, static_argnums=0)
    def _init(self, key: jax.Array, inputs: PyTree) -> dict[str, Any]:
        others = [name for name in self.rngs if name not in ("params", "dropout")]
        rngs = {"params": key, **_streams(key, others)}
        train = {"train": False} if self.takes_train else {}
        return self.module.value.init(rngs, inputs, **train)


@dataclasses.dataclass(frozen=True)
class Apply(AdaptedApply):
    """`Model.apply` of a Linen module."""

    module: Static
    rngs: tuple[str, ...]
    takes_train: bool = dataclasses.field(repr=False)

    def __call__(
        self,
        params: PyTree,
        model_state: dict[str, Any],
        inputs: PyTree,
        *,
        train: bool,
        key: jax.Array | None,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the outputs and, in training, the updated collections."""
        variables = {"params": params, **model_state}
        options: dict[str, Any] = {"train": train} if self.takes_train else {}
        try:
            if not train:
                return self.module.value.apply(variables, inputs, **options), model_state
            outputs, updated = self.module.value.apply(
                variables,
                inputs,
                **options,
                rngs=_streams(key, self.rngs),
                mutable=list(model_state),
            )
        except flax.errors.ScopeCollectionNotFound as error:
            raise InputError(
                f"model_state has the collections {sorted(model_state)}, but not all that "
                f"{type(self.module.value).__name__} needs; expected the model_state that "
                f"init_state returns (Flax: {error})"
            ) from error
        except flax.errors.InvalidRngError as error:
            raise InputError(
                f"{type(self.module.value).__name__} draws from an RNG stream without a key "
                f"({str(error).split(' (http')[0]}); expected its name in "
                "init_state(rngs=...), and no draws in evaluation"
            ) from error
        return outputs, dict(updated)

    @contextlib.contextmanager
    def recording(self, recorder: Recorder, params: PyTree, model_state: PyTree) -> Iterator[None]:
        """Records the calls of the module and its submodules."""

        def intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name == "setup":  # runs before the first call, without inputs
                return method(*args, **kwargs)
            return recorder.call(module.path, type(module).__name__, method, args, kwargs)

        with nn.intercept_methods(intercept):
            yield

    def batch_statistics(self, params: PyTree, model_state: PyTree) -> dict[str, BatchStatistics]:
        """Returns the statistics by layer; the first name is that of the collection."""
        return named_statistics(model_state, skip=1)

    def to_module(self, params: PyTree, model_state: PyTree) -> NoReturn:
        """Raises InputError: a Linen module holds no parameters."""
        raise InputError(
            "Linen modules hold no parameters; use "
            "model.apply({'params': state.params, **state.model_state}, ...)"
        )


def _streams(key: Any, names: Iterable[str]) -> dict[str, Any]:
    """Returns a key for each RNG stream; that of "dropout" is `key` itself."""
    return {
        name: key if name == "dropout" else jax.random.fold_in(key, zlib.crc32(name.encode()))
        for name in names
    }


def _concrete(leaf: Any) -> Any:
    is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    return jnp.zeros(leaf.shape, leaf.dtype) if is_abstract else leaf
