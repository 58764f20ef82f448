"""Gradient transformations that torch.optim needs and optax lacks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxtrain.optimizers._numbers import Number


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together, in float32 or wider.

    Args:
      tree: pytree of arrays, such as gradients.
    """

    def sum_of_squares(leaf: Array) -> Array:
        # Cast first: half precision overflows at 256 squared.
        absolute = jnp.abs(leaf)
        squares = jnp.square(absolute.astype(jnp.promote_types(absolute.dtype, jnp.float32)))
        # The first axis first: on a CPU, XLA then adds rows as vectors, whereas a full reduction
        # would be a chain of scalar additions.
        return jnp.sum(jnp.sum(squares, axis=0)) if leaf.ndim > 1 else jnp.sum(squares)

    return jnp.sqrt(sum(map(sum_of_squares, jax.tree.leaves(tree)), start=jnp.zeros(())))


class ClippingState(NamedTuple):
    """State of `clip_by_global_norm`: empty; `check_line_search` looks for its type."""


def clip_by_global_norm(max_norm: Number) -> optax.GradientTransformation:
    """Scales gradients whose global norm is above `max_norm`, as PyTorch's `clip_grad_norm_`.

    The factor is min(1, max_norm / (norm + 1e-6)); that of optax lacks the 1e-6.

    Args:
      max_norm: maximum of the Euclidean norm over all parameters.
    """

    def update(
        updates: PyTree, state: ClippingState, params: PyTree | None = None
    ) -> tuple[PyTree, ClippingState]:
        del params
        factor = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: ClippingState(), update)


class DampedTraceState(NamedTuple):
    """State of `damped_trace`.

    Attributes:
      trace: the momentum buffer of each parameter.
      started: whether the buffer already contains a gradient.
    """

    trace: PyTree
    started: Bool[Array, ""]


def damped_trace(momentum: Number, dampening: Number) -> optax.GradientTransformation:
    """Adds momentum with dampening: buffer ← momentum · buffer + (1 − dampening) · gradient.

    `optax.trace` lacks PyTorch's dampening. The first buffer is the first gradient, not dampened.
    """

    def init(params: PyTree) -> DampedTraceState:
        return DampedTraceState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), bool))

    def update(
        updates: PyTree, state: DampedTraceState, params: PyTree | None = None
    ) -> tuple[PyTree, DampedTraceState]:
        del params
        factor = jnp.where(state.started, 1 - dampening, 1.0)
        trace = jax.tree.map(
            lambda buffer, gradient: momentum * buffer + factor.astype(gradient.dtype) * gradient,
            state.trace,
            updates,
        )
        return trace, DampedTraceState(trace, jnp.ones((), bool))

    return optax.GradientTransformation(init, update)


class AmsgradState(NamedTuple):
    """State of `scale_by_amsgrad`.

    Attributes:
      step: steps so far.
      mu: first moment of the gradient.
      nu: second moment.
      nu_max: the largest second moment so far.
    """

    step: Int[Array, ""]
    mu: PyTree
    nu: PyTree
    nu_max: PyTree


def scale_by_amsgrad(b1: Number, b2: Number, eps: Number) -> optax.GradientTransformation:
    """Scales as Adam with the largest second moment so far (Reddi, Kale & Kumar, 2018).

    PyTorch takes the largest moment and then corrects its bias. optax's `scale_by_amsgrad`
    corrects first, so that the large corrections of the first steps last forever.
    """

    def init(params: PyTree) -> AmsgradState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AmsgradState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(
        updates: PyTree, state: AmsgradState, params: PyTree | None = None
    ) -> tuple[PyTree, AmsgradState]:
        del params
        mu = optax.tree_utils.tree_update_moment(updates, state.mu, b1, 1)
        nu = optax.tree_utils.tree_update_moment(updates, state.nu, b2, 2)
        step = state.step + 1
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
        mu_hat = optax.tree_utils.tree_bias_correction(mu, b1, step)
        nu_hat = optax.tree_utils.tree_bias_correction(nu_max, b2, step)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, AmsgradState(step, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


class SumOfSquaresState(NamedTuple):
    """State of `scale_by_root_sum_of_squares`: the sum of each parameter's squared gradients."""

    sum_of_squares: PyTree


def scale_by_root_sum_of_squares(
    initial_accumulator_value: Number, eps: Number
) -> optax.GradientTransformation:
    """Divides by √(sum of squared gradients) + eps: Adagrad's scaling in PyTorch.

    `optax.scale_by_rss` has epsilon inside the root, where 1e-10 amounts to 1e-5.
    """

    def init(params: PyTree) -> SumOfSquaresState:
        return SumOfSquaresState(
            jax.tree.map(lambda leaf: jnp.full_like(leaf, initial_accumulator_value), params)
        )

    def update(
        updates: PyTree, state: SumOfSquaresState, params: PyTree | None = None
    ) -> tuple[PyTree, SumOfSquaresState]:
        del params
        sums = jax.tree.map(lambda s, g: s + jnp.square(g), state.sum_of_squares, updates)
        updates = jax.tree.map(lambda s, g: g / (jnp.sqrt(s) + eps), sums, updates)
        return updates, SumOfSquaresState(sums)

    return optax.GradientTransformation(init, update)


class RpropState(NamedTuple):
    """State of `scale_by_sign_and_step_size`.

    Attributes:
      step_sizes: each parameter's step size.
      previous: its previous gradient, 0 where the sign has just changed.
    """

    step_sizes: PyTree
    previous: PyTree


def scale_by_sign_and_step_size(
    first: Number, etas: tuple[float, float], step_sizes: tuple[float, float]
) -> optax.GradientTransformation:
    """Scales the sign of each gradient by the parameter's step size: Rprop's update, negated.

    `optax.scale_by_rprop` applies each update one step late.
    """
    eta_minus, eta_plus = etas

    def init(params: PyTree) -> RpropState:
        return RpropState(
            jax.tree.map(lambda leaf: jnp.full_like(leaf, first), params),
            jax.tree.map(jnp.zeros_like, params),
        )

    def update(
        updates: PyTree, state: RpropState, params: PyTree | None = None
    ) -> tuple[PyTree, RpropState]:
        del params
        turns = jax.tree.map(lambda g, p: jnp.sign(g * p), updates, state.previous)
        sizes = jax.tree.map(
            lambda turn, size: jnp.clip(
                size * jnp.select([turn > 0, turn < 0], [eta_plus, eta_minus], 1.0), *step_sizes
            ),
            turns,
            state.step_sizes,
        )
        kept = jax.tree.map(lambda turn, g: jnp.where(turn < 0, 0, g), turns, updates)
        updates = jax.tree.map(lambda g, size: jnp.sign(g) * size, kept, sizes)
        return updates, RpropState(sizes, kept)

    return optax.GradientTransformation(init, update)
