"""The ways of jaxtrain to train a module, each as a trainer that can be measured."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.dataset import Dataset
from jaxtrain.errors import InputError
from jaxtrain.inspect import port, without_dropout
from jaxtrain.losses import Loss
from jaxtrain.optimizers import from_torch
from jaxtrain.race.measuring import first_losses
from jaxtrain.training.fit import fit
from jaxtrain.training.loop import predict, train_epoch
from jaxtrain.training.state import TrainState, init_state
from jaxtrain.training.step import train_step

WAYS = ("train_step", "train_epoch", "fit")


class JaxTrainer:
    """Trains a state on data in stored order.

    Args:
      state: where to start.
      dataset: arrays of NumPy.
      loss_fn: per-example loss.
      batch_size: examples per step; the last batch may have fewer.
      way: "train_step", a loop over batches that are copied to the device one by one;
        "train_epoch", on data that are on the device already; or "fit", without callbacks.
    """

    def __init__(
        self, state: TrainState, dataset: Dataset, loss_fn: Loss, batch_size: int, way: str
    ) -> None:
        self.state, self._loss_fn, self._batch_size, self._way = state, loss_fn, batch_size, way
        self._dataset = dataset if way == "train_step" else jax.tree.map(jnp.asarray, dataset)

    def train(self, passes: int) -> np.ndarray:
        """Makes passes over the data, and returns the losses of the last one before its updates."""
        if self._way == "fit":
            self.state, history = fit(
                *(self.state, self._dataset),
                loss_fn=self._loss_fn,
                epochs=passes,
                batch_size=self._batch_size,
                callbacks=[],
            )
            return history.step_losses[-(len(history.step_losses) // passes) :]
        for _ in range(passes):
            losses = self._pass()
        return np.asarray(jax.device_get(losses))

    def losses(self) -> np.ndarray:
        """Makes one pass, and returns the loss of each step."""
        return self.train(1)

    def steps(self, count: int) -> None:
        """Takes steps on the first batch."""
        first = jax.tree.map(jnp.asarray, self._dataset[: self._batch_size])
        for _ in range(count):
            self.state, _ = train_step(self.state, first, self._loss_fn)
        jax.block_until_ready(self.state)

    def predict(self, inputs: Any) -> np.ndarray:
        """Returns the outputs in evaluation mode."""
        return np.asarray(predict(self.state, jnp.asarray(inputs)))

    def updates(self) -> int:
        """Returns how many updates the optimizer has made."""
        return int(self.state.step)

    def _pass(self) -> Any:
        if self._way == "train_epoch":
            self.state, losses = train_epoch(
                self.state, self._dataset, self._loss_fn, batch_size=self._batch_size
            )
            return losses
        found = []
        for batch in self._batches():
            self.state, metrics = train_step(self.state, batch, self._loss_fn)
            found.append(metrics["loss"])
        return found

    def _batches(self) -> Iterator[Dataset]:
        for start in range(0, len(self._dataset), self._batch_size):
            yield self._dataset[start : start + self._batch_size]


def make(
    module: Any,
    optimizer: Any,
    dataset: Dataset,
    loss_fn: Loss,
    batch_size: int,
    way: str,
    model: Any = None,
    *,
    dropout: bool = True,
) -> JaxTrainer:
    """Returns the trainer of a PyTorch module and its optimizer.

    With a model of JAX, this is trained from the module's parameters, in its own layout of inputs.
    """
    key = jax.random.key(0)
    if model is not None:
        for group in optimizer.param_groups:  # the model's parameters have other names
            group.pop("param_names", None)
        translated = from_torch(optimizer)
        with jax.default_matmul_precision("highest"):
            state, inputs, *_ = port(module, model, dataset.inputs, translated, key=key)
        dataset = dataset.replace(inputs=inputs)
    else:
        init = functools.partial(
            init_state, module, from_torch(optimizer, module), dataset[:1].inputs, key=key
        )
        try:
            state = init()
        except InputError as error:
            try:
                state = init(draws_in_evaluation=True)
            except InputError:
                raise error from None
    if not dropout:
        state = state.replace(model=without_dropout(state.model))
    return JaxTrainer(state, dataset, loss_fn, batch_size, way)


def checked_losses(
    module: Any,
    optimizer: Any,
    dataset: Dataset,
    loss_fn: Loss,
    batch_size: int,
    steps: int,
    contenders: Mapping[str, tuple[str, Any]],
) -> dict[str, np.ndarray]:
    """Returns the losses of the first steps without dropout, by contender.

    `contenders` has the way, and the model or None, of each.
    """
    head = dataset[: steps * batch_size]
    return {
        name: first_losses(
            make(module, optimizer, head, loss_fn, batch_size, *each, dropout=False), steps
        )
        for name, each in contenders.items()
    }
