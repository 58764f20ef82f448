"""Tutorial T2: 300 steps equal PyTorch's. `make tutorials` compares the accuracy of its epochs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxtrain as jt

STEPS, BATCH_SIZE = 300, 64


def test_300_steps_match_pytorch(mnist: jt.data.Resolved) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks import torch_reference

    train = jax.tree.map(lambda array: array[: STEPS * BATCH_SIZE], mnist.train)
    state = jt.init_state(
        jt.models.FeedForward(dropout_rate=0.0),
        jt.optimizers.sgd(0.01, weight_decay=1e-6),
        train.inputs[:1],
        key=jax.random.key(42),
    )
    model = torch_reference.feed_forward((256, 128, 64, 10), 784, dropout_rate=0.0)
    torch_reference.load(model, state.params)
    inputs = torch_reference.normalised(np.asarray(train.inputs), *jt.data.STATISTICS["mnist"])
    targets = torch.from_numpy(np.array(train.targets)).long()

    state, losses = jt.train_epoch(state, train, jt.losses.cross_entropy, batch_size=BATCH_SIZE)
    expected = torch_reference.train_steps(
        model,
        torch.optim.SGD(model.parameters(), 0.01, weight_decay=1e-6),
        torch_reference.slices(inputs, targets, BATCH_SIZE),
        torch.nn.functional.cross_entropy,
    )

    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, torch.stack(expected), rtol=0, atol=1e-4)
    assert losses[-10:].mean() < 0.9 * losses[0]  # the comparison is of a network that learns
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4),
        state.params,
        torch_reference.read_params(model),
    )


def test_the_statistics_equal_those_of_the_training_pixels(
    mnist: jt.data.Resolved, digits: jt.data.Resolved
) -> None:
    for data in (mnist, digits):
        pixels = np.asarray(data.train.inputs) / 255
        np.testing.assert_allclose(
            [pixels.mean(), pixels.std()], jt.data.STATISTICS[data.name], atol=5e-5
        )
