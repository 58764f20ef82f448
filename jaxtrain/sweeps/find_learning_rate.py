"""find_learning_rate: the range test, which suggests a learning rate from one short run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Key

from jaxtrain import parallel
from jaxtrain._arguments import check_arguments, check_finite, check_integer
from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.losses import Loss
from jaxtrain.optimizers._averaging import has_updated
from jaxtrain.optimizers._inspect import has_line_search, last_step_finite
from jaxtrain.training.checks import check_data, check_missing_targets, checked_data
from jaxtrain.training.state import TrainState, checked_state, recorded, with_optimizer
from jaxtrain.training.step import Batch, check_loss, update

if TYPE_CHECKING:
    from jaxtrain._figures import Figure

# The run has diverged where the smoothed loss exceeds this multiple of its lowest value so far.
_DIVERGED = 4.0
# Fraction of the steps in a smoothing window, and its minimum number of steps.
_WINDOW, _MIN_WINDOW = 0.1, 5
# A loss that falls does so by more than this multiple of the noise of the smoothed losses.
_MIN_FALL = 8.0


class RangeTest(NamedTuple):
    """The result of a learning rate range test.

    Attributes:
      rates: the learning rate of each update, up to where the run diverged, [steps].
      losses: the loss before each update, the mean over its batches, [steps].
      smoothed_losses: the losses, smoothed by a line through the neighboring ones, [steps].
      suggestion: the rate at which the smoothed loss falls fastest.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed_losses: np.ndarray
    suggestion: float

    def plot(self) -> Figure:
        """Draws the losses against the learning rate, and marks the suggestion.

        Returns:
          A matplotlib figure; `figure.savefig(path)` writes it.
        """
        from jaxtrain import _figures  # needs matplotlib

        figure = _figures.Figure(figsize=(6.5, 4), layout="constrained")
        ax = figure.subplots()
        ax.plot(self.rates, self.losses, ".", color=_figures.GREY, markersize=3, label="each step")
        ax.plot(self.rates, self.smoothed_losses, color=_figures.BLUE, label="smoothed")
        ax.axvline(
            self.suggestion,
            color=_figures.VERMILION,
            linestyle="--",
            label=f"suggestion: {self.suggestion:.2g}",
        )
        # A spike before the run diverged would leave no room for the other losses.
        top = min(self.losses.max(), 2 * max(self.losses[0], self.smoothed_losses.max()))
        ax.set(xscale="log", ylim=(min(0, self.losses.min()), 1.1 * top))
        _figures.label_axes(ax, "learning rate (log scale)", "training loss")
        ax.legend(fontsize=8)
        figure.suptitle("learning rate range test", fontsize=11)
        return figure


def find_learning_rate(
    state: TrainState,
    train: Batch,
    make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    *,
    loss_fn: Loss,
    lowest: float = 1e-5,
    highest: float = 10.0,
    steps: int = 200,
    batch_size: int = 64,
    key: Key[Array, ""] | None = None,
) -> RangeTest:
    """Suggests a learning rate by a range test.

    The test trains for some steps while the rate grows exponentially. At low rates the loss stays
    constant, then it falls, and at high rates it rises. The suggestion is the rate at which it
    falls fastest (Smith, 2017, https://arxiv.org/abs/1506.01186). It is an estimate from one run:
    compare rates around it with `sweep`.

    Args:
      state: the parameters to start from; not modified. Its optimizer is not used.
      train: inputs and targets with leading axis [examples], a `Dataset` or a tuple.
      make_optimizer: makes the optimizer from a schedule, such as `jt.optimizers.adam`. The
        schedule is one rate per update, whatever the count; with accumulated gradients, an update
        takes several batches.
      loss_fn: per-example loss.
      lowest: the rate of the first update.
      highest: the rate of the last update.
      steps: updates to make; with more, the loss falls at lower rates.
      batch_size: examples per step.
      key: PRNG key of the shuffle; None keeps the stored order.

    Returns:
      The rates, losses and smoothed losses up to where the run diverged, and the suggestion. The
      rates are those that the optimizer records, if it does.

    Raises:
      InputError: an argument is out of range, or the loss falls at no rate by more than its noise.

    Example:
      >>> range_test = jt.find_learning_rate(
      ...     state, train, jt.optimizers.adam, loss_fn=loss_fn, steps=100, batch_size=16
      ... )
      >>> state = jt.with_optimizer(state, jt.optimizers.adam(range_test.suggestion))
      >>> range_test.plot().savefig("learning_rates.png")
    """
    if not callable(make_optimizer):
        raise InputError(
            f"make_optimizer is a {type(make_optimizer).__name__}; expected a function that makes "
            "an optimizer from a schedule, such as jaxtrain.optimizers.adam, without parentheses",
            argument="make_optimizer",
        )
    check_arguments(find_learning_rate, locals(), eager="call it outside")
    check_integer(steps, "steps", minimum=20)
    check_integer(batch_size, "batch_size", minimum=1)
    check_finite(lowest=lowest, highest=highest)
    if not 0 < lowest < highest:
        raise InputError(
            f"lowest is {lowest!r} and highest is {highest!r}; expected rates with "
            "0 < lowest < highest"
        )
    check_loss(loss_fn)
    calls = []

    def optimizer_with(rate: ArrayLike) -> optax.GradientTransformation:
        def schedule(count: ArrayLike) -> ArrayLike:
            calls.append(True)
            return rate

        return make_optimizer(schedule)

    ramp = jnp.geomspace(lowest, highest, steps)
    state = checked_state(with_optimizer(state, optimizer_with(ramp[0])))
    state = parallel.placed(state, "state")
    if has_line_search(state.opt_state):
        raise InputError(
            "make_optimizer makes an optimizer with a line search, such as L-BFGS, which finds the "
            "rate of each step itself; expected another optimizer",
            argument="make_optimizer",
        )
    dataset = checked_data(train, "train")
    parallel.check_devices(state, dataset)
    check_data(state, dataset, loss_fn, "train")
    check_missing_targets(state, dataset, loss_fn, "train")
    batches = _batches(len(dataset), min(batch_size, len(dataset)), steps, key)

    @jax.jit
    def run(state: TrainState, updates: Array, dataset: Dataset) -> tuple[Any, _Log]:
        def step(carry: tuple[TrainState, Array], indices: Array) -> tuple[Any, _Log]:
            state, updates = carry
            rate = ramp[jnp.minimum(updates, steps - 1)]
            after = state.replace(optimizer=optimizer_with(rate))  # only used while traced
            after, loss, _ = update(after, dataset.take(indices), loss_fn)
            updated = jnp.asarray(has_updated(after.opt_state))
            used = recorded(after).get("learning_rate", rate)
            after = after.replace(optimizer=state.optimizer)
            return (after, updates + updated), _Log(loss, used, updated)

        return lax.scan(step, (state, updates), batches)

    updates, before = jnp.zeros((), jnp.int32), -1
    logs = []
    while before < updates < steps:  # once, unless an update takes several batches
        before = int(updates)
        (state, updates), log = run(state, updates, dataset)
        logs.append(log)
    if not calls:
        raise InputError(
            "make_optimizer ignores the schedule that it is given; expected a function that passes "
            "it on as the learning rate, such as jaxtrain.optimizers.adam",
            argument="make_optimizer",
        )
    log = jax.tree.map(lambda *parts: np.concatenate(parts), *logs)
    skips = last_step_finite(state.opt_state) is not None
    return _result(*_per_update(log, steps, skips))


class _Log(NamedTuple):
    """The loss of each batch, the rate that is recorded after it, and whether it ends an update."""

    losses: Any
    rates: Any
    updated: Any


def _per_update(log: _Log, steps: int, skips: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rate and the mean loss of each of the first `steps` updates."""
    updates = np.cumsum(log.updated) - log.updated  # that a batch belongs to
    count = min(steps, int(log.updated.sum()))
    used = (updates < count) & (np.isfinite(log.losses) if skips else True)
    sums = np.bincount(updates[used], log.losses[used], count)
    return (
        np.asarray(log.rates[log.updated][:count], float),
        sums / np.maximum(np.bincount(updates[used], minlength=count), 1),
    )


def _batches(
    examples: int, batch_size: int, steps: int, key: Key[Array, ""] | None
) -> Int[Array, "steps batch"]:
    """Returns the examples of each step, from as many epochs as are needed."""
    epochs = -(-steps * batch_size // examples)
    if key is None:
        orders = jnp.tile(jnp.arange(examples), epochs)
    else:
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(epochs))
        orders = jax.vmap(lambda each: jax.random.permutation(each, examples))(keys).ravel()
    return orders[: steps * batch_size].reshape(steps, batch_size)


def _result(rates: np.ndarray, losses: np.ndarray) -> RangeTest:
    """Returns the losses up to where the run diverges, and where they fall fastest."""
    from scipy.signal import savgol_filter  # takes a while to import

    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(np.argmin(finite))
    window = max(_MIN_WINDOW, round(_WINDOW * len(losses))) // 2 * 2 + 1
    if count < window:
        rate = f"{rates[count]:.3g}, after {count} updates" if count < len(losses) else ""
        raise InputError(
            f"the loss is {losses[count]:g} at the learning rate {rate}; expected finite losses at "
            "low rates: lower lowest, or scale the inputs"
            if rate
            else f"the optimizer makes {count} updates and then none; expected updates by finite "
            "gradients, or accumulation over fewer batches"
        )
    smoothed = savgol_filter(losses[:count], window, polyorder=1)
    lowest = np.minimum.accumulate(smoothed)
    diverged = smoothed > lowest + (_DIVERGED - 1) * np.abs(lowest)  # losses may be negative
    if diverged.any():  # smoothed again, without the losses after the run diverged
        count = max(window, int(np.argmax(diverged)))
        smoothed = savgol_filter(losses[:count], window, polyorder=1)
    slopes = savgol_filter(losses[:count], window, polyorder=1, deriv=1)
    end = int(np.argmin(smoothed)) + 1
    at = int(np.argmin(slopes[:end]))
    # The noise of the smoothed losses: of the mean over a window, and of rounding.
    noise = np.std(losses[:end] - smoothed[:end]) / np.sqrt(window)
    noise += np.finfo(np.float32).eps * np.abs(smoothed[:end]).max()
    if smoothed[:end].max() - smoothed[end - 1] <= _MIN_FALL * noise:
        raise InputError(
            f"the loss falls at no learning rate from {rates[0]:.3g} to {rates[count - 1]:.3g} by "
            "more than its noise, so there is no suggestion; expected it to fall: choose another "
            "range or a larger batch_size, or check the model and the data"
        )
    return RangeTest(rates[:count], losses[:count], smoothed, float(rates[at]))
