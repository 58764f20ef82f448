"""Tutorial T1 from PyTorch's initial parameters equals its published listing.

`test_experiments.py` compares with its published table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from experiments.linear_regression import PUBLISHED_BIAS, PUBLISHED_WEIGHT


@pytest.fixture(scope="module")
def run() -> np.ndarray:
    """Rows (train MAE, test MAE, w, b) of 400 epochs."""
    train, test = jt.data.line()
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(0.01),
        train.inputs[:1],
        key=jax.random.key(0),
    ).replace(
        params={"weight": jnp.array([[PUBLISHED_WEIGHT]]), "bias": jnp.array([PUBLISHED_BIAS])}
    )
    rows = []

    def report(run: jt.Run) -> None:
        params, row = run.state.params, run.rows[-1]
        numbers = (params["weight"].item(), params["bias"].item())
        rows.append((row["train_loss"], row["test_loss"], *numbers))

    jt.fit(
        state,
        train,
        test,
        loss_fn=jt.losses.mean_absolute_error,
        epochs=400,
        batch_size=40,
        callbacks=[report],
    )
    return np.array(rows)


def test_the_second_200_epochs_equal_the_published_listing(run: np.ndarray) -> None:
    for epoch in range(200, 400, 10):
        np.testing.assert_allclose(
            run[epoch, :2], [0.008932482451200485, 0.005023092031478882], rtol=0, atol=1e-6
        )
    np.testing.assert_allclose(run[399, 2:], [0.6990, 0.3093], rtol=0, atol=5e-5)


def test_a_constant_step_on_the_absolute_error_ends_in_a_cycle_of_two_epochs(
    run: np.ndarray,
) -> None:
    np.testing.assert_allclose(run[398], run[396], atol=1e-6)
    np.testing.assert_allclose(run[399], run[397], atol=1e-6)
    assert abs(run[399, 3] - run[398, 3]) > 0.009  # b jumps by the learning rate


def test_the_data_and_the_initial_parameters_match_pytorch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(0, 1, 0.02).unsqueeze(1)
    y = 0.7 * x + 0.3
    train, test = jt.data.line()
    # torch.arange rounds some points to the neighbouring float32, depending on its vector width.
    np.testing.assert_allclose(np.concatenate([train.inputs, test.inputs]), x, rtol=2e-7)
    np.testing.assert_allclose(np.concatenate([train.targets, test.targets]), y, rtol=2e-7)
    assert len(train.inputs) == 40

    torch.manual_seed(42)
    assert (torch.randn(1).item(), torch.randn(1).item()) == (PUBLISHED_WEIGHT, PUBLISHED_BIAS)
