"""Initial parameters and outputs of the models compared with PyTorch's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.models.test_models import init

torch = pytest.importorskip("torch")

from benchmarks import torch_reference  # noqa: E402


def test_pytorchs_linear_layer_starts_in_the_same_range() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128)
    ours = init(jt.models.FeedForward((128,)), jnp.zeros((1, 256)))["Dense_0"]
    theirs = {"weight": linear.weight, "bias": linear.bias}
    for name, values in theirs.items():
        values = values.detach().numpy()
        assert np.abs(values).max() == pytest.approx(np.abs(ours[name]).max(), rel=0.02)
        assert values.std() == pytest.approx(np.asarray(ours[name]).std(), rel=0.15)


def test_logits_match_pytorch() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    model = jt.models.FeedForward()
    params = init(model, jnp.asarray(images))
    theirs = torch_reference.feed_forward((256, 128, 64, 10), 784, 0.2).eval()
    torch_reference.load(theirs, params)
    expected = theirs(torch_reference.normalised(images, 0.1307, 0.3081)).detach()
    logits = model.apply({"params": params}, jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
