"""The guide's recipes for losses and options of training, in pairs, against loops of PyTorch.

A linear model is trained for two epochs on 10 examples in batches of 4, 4 and 2.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

torch = pytest.importorskip("torch")
F = torch.nn.functional

RANDOM = np.random.default_rng(3)
EXAMPLES, FEATURES, CLASSES, BATCH = 10, 3, 4, 4
INPUTS = RANDOM.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
LABELS = RANDOM.integers(0, CLASSES, EXAMPLES).astype(np.int32)
OTHERS = RANDOM.integers(0, CLASSES, EXAMPLES).astype(np.int32)
START = RANDOM.normal(size=(FEATURES, CLASSES)).astype(np.float32)
CLASS_WEIGHTS = np.array([0.25, 1.0, 0.0, 3.0], np.float32)
KEPT = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 1], bool)
SCORES = np.where(RANDOM.random((EXAMPLES, CLASSES)) < 0.4, np.nan, START[LABELS % 3])
SCORES = SCORES.astype(np.float32)
MIX = 0.3  # of the second labels in mixup

LOSSES = ("class weights", "smoothing", "mask", "mixup", "second loss", "missing targets")
OPTIONS = ("accumulate", "clip", "average", "schedule")
MODEL = jt.Model(
    lambda key, inputs: (jnp.asarray(START), {}),
    lambda params, state, inputs, *, train, key: (inputs @ params, state),
)


def make_loss(chosen):
    """The loss of jaxtrain that the chosen recipes give; targets are a dict."""
    options = {"label_smoothing": 0.2} if "smoothing" in chosen else {}
    if "class weights" in chosen:
        options["weight"] = jnp.asarray(CLASS_WEIGHTS)
    entropy = functools.partial(jt.losses.cross_entropy, **options)
    squares = jt.losses.mean_squared_error
    scored = jt.losses.ignore_nan(jt.losses.huber)

    def loss_fn(predictions, targets):
        loss = entropy(predictions, targets["labels"])
        if "mixup" in chosen:
            loss = (1 - MIX) * loss + MIX * entropy(predictions, targets["others"])
        if "second loss" in chosen:
            loss = loss + 0.5 * squares(predictions, targets["inputs"])
        if "missing targets" in chosen:
            loss = loss + 2 * scored(predictions, targets["scores"])
        return loss

    return loss_fn


def make_data(chosen):
    inputs = np.pad(INPUTS, ((0, 0), (0, 1)))
    targets = {"labels": LABELS, "others": OTHERS, "inputs": inputs, "scores": SCORES}
    weights = None
    if "mask" in chosen:
        weights = KEPT.astype(np.float32)
        targets["labels"] = np.where(KEPT, LABELS, -1)
    return jt.Dataset(INPUTS, targets, weights)


def torch_loss(chosen, logits, rows):
    """The loss of a PyTorch loop on some examples; masked ones are ignored labels."""
    kept = KEPT[rows] if "mask" in chosen else np.ones(len(rows), bool)
    criterion = torch.nn.CrossEntropyLoss(
        weight=torch.tensor(CLASS_WEIGHTS) if "class weights" in chosen else None,
        label_smoothing=0.2 if "smoothing" in chosen else 0.0,
    )

    def labels(values):
        return torch.tensor(np.where(kept, values[rows], -100)).long()

    loss = criterion(logits, labels(LABELS))
    if "mixup" in chosen:
        loss = (1 - MIX) * loss + MIX * criterion(logits, labels(OTHERS))
    used = torch.tensor(kept)
    if "second loss" in chosen:
        inputs = torch.tensor(np.pad(INPUTS, ((0, 0), (0, 1)))[rows])
        loss = loss + 0.5 * F.mse_loss(logits[used], inputs[used])
    if "missing targets" in chosen:
        scores = torch.tensor(SCORES[rows])[used]
        present = ~scores.isnan()
        loss = loss + 2 * F.huber_loss(logits[used][present], scores[present])
    return loss


def rows_of(size):
    return [np.arange(EXAMPLES)[i : i + size] for i in range(0, EXAMPLES, size)]


def pairs(names):
    return [*itertools.combinations(names, 1), *itertools.combinations(names, 2)]


@pytest.mark.parametrize("chosen", pairs(LOSSES), ids=" and ".join)
def test_losses_in_pairs_have_pytorchs_means_and_gradients(chosen) -> None:
    loss_fn, data = make_loss(chosen), make_data(chosen)
    state = jt.init_state(MODEL, optax.sgd(0.1), INPUTS, key=jax.random.key(0))
    for rows in rows_of(5):
        (loss, _), gradient = jt.gradients(state, data[rows[0] : rows[-1] + 1], loss_fn)
        weight = torch.tensor(START, requires_grad=True)
        expected = torch_loss(chosen, torch.tensor(INPUTS[rows]) @ weight, rows)
        expected.backward()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
        np.testing.assert_allclose(gradient, weight.grad, rtol=1e-4, atol=1e-6)
    # The mean over all examples does not depend on the batches of the evaluation.
    expected = torch_loss(chosen, torch.tensor(INPUTS @ START), np.arange(EXAMPLES))
    found = jt.evaluate(state, data, loss_fn, batch_size=3)["loss"]
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)


def torch_epochs(chosen):
    """Two epochs of a PyTorch loop; returns the parameters and the losses of the steps."""
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = torch.optim.SGD([weight], 0.5, momentum=0.9)
    average, updates, losses = None, 0, []
    size = 2 * BATCH if "accumulate" in chosen else BATCH
    for _ in range(2):
        for rows in rows_of(size):
            if "schedule" in chosen:
                optimizer.param_groups[0]["lr"] = 0.5 * 0.1 ** (updates // 2)
            optimizer.zero_grad()
            loss = torch_loss(chosen, torch.tensor(INPUTS[rows]) @ weight, rows)
            loss.backward()
            if "clip" in chosen:
                torch.nn.utils.clip_grad_norm_([weight], 0.3)
            optimizer.step()
            updates += 1
            losses.append(loss.item())
            now = weight.detach().clone()
            average = now if average is None else 0.8 * average + 0.2 * now
    return weight.detach().numpy(), average.numpy(), losses


@pytest.mark.parametrize("chosen", pairs(OPTIONS), ids=" and ".join)
def test_options_in_pairs_train_as_loops_of_pytorch(chosen) -> None:
    losses = ("class weights", "smoothing", "mask")
    rate = jt.optimizers.step_lr(0.5, 2, 0.1) if "schedule" in chosen else 0.5
    optimizer = jt.optimizers.sgd(rate, momentum=0.9)
    if "clip" in chosen:
        optimizer = jt.optimizers.clip_gradients(optimizer, 0.3)
    if "average" in chosen:
        optimizer = jt.optimizers.average_parameters(optimizer, 0.8)
    if "accumulate" in chosen:
        optimizer = jt.optimizers.accumulate_gradients(optimizer, 2)
    state = jt.init_state(MODEL, optimizer, INPUTS, key=jax.random.key(0))
    state, history = jt.train(
        state, make_data(losses), loss_fn=make_loss(losses), epochs=2, batch_size=BATCH
    )
    weight, average, expected = torch_epochs((*chosen, *losses))
    np.testing.assert_allclose(state.params, weight, rtol=1e-4, atol=1e-5)
    if "average" in chosen:
        np.testing.assert_allclose(state.evaluation_params, average, rtol=1e-4, atol=1e-5)
    if "accumulate" not in chosen:
        np.testing.assert_allclose(history["step_losses"].ravel(), expected, rtol=1e-4)


def test_class_weights_and_smoothing_by_hand() -> None:
    """Two examples with the probabilities 3/4 and 1/4 of their labels, and the weights 1 and 3.

    −log p are 0.2877 and 1.3863 for the first class, and the opposite for the second.
    """
    logits = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
    labels = jnp.array([0, 1])
    loss = jt.losses.cross_entropy(
        logits, labels, weight=jnp.array([1.0, 3.0]), label_smoothing=0.5
    )
    low, high = np.log(4 / 3), np.log(4)
    smooth = (1 * low + 3 * high) / 2
    total = 0.5 * (1 * low + 3 * high) + 0.5 * (smooth + smooth)
    np.testing.assert_allclose(loss.values.sum() / loss.weights.sum(), total / (1 + 3), rtol=1e-6)
