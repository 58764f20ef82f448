"""What `history.plot` draws."""

from __future__ import annotations

import numpy as np
import pytest

import jaxtrain as jt

pytest.importorskip("matplotlib")

EPOCHS = np.array([1, 2, 3])
COLUMNS = {
    **{"epoch": EPOCHS, "train_loss": np.array([2.0, 1.0, 0.5]), "train_accuracy": EPOCHS / 4},
    **{"test_loss": np.array([1.5, 0.7, 0.6]), "test_accuracy": EPOCHS / 5},
    **{"validation_loss": np.array([1.4, 0.8, 0.7]), "test_recall": np.ones((3, 10))},
    **{"learning_rate": np.full(3, 0.1), "gradient_norm": np.array([100.0, 10.0, 1.0])},
    "seconds": np.array([3.0, 2.0, 1.0]),
}
STEPS = np.linspace(2.5, 0.4, 12, dtype=np.float32)


def test_a_panel_has_the_curves_of_all_data_in_the_time_of_their_epochs() -> None:
    figure = jt.History(COLUMNS, STEPS).plot("digits")
    loss, accuracy, norm = figure.axes  # neither arrays, nor a constant rate
    curves = {line.get_label(): line.get_xydata() for line in loss.lines}
    steps, train, test, validation = curves.values()
    np.testing.assert_allclose(steps, np.stack([np.arange(1, 13) / 4, STEPS], axis=1))
    np.testing.assert_allclose(train.T, [EPOCHS - 0.5, COLUMNS["train_loss"]])
    np.testing.assert_allclose(test.T, [EPOCHS, COLUMNS["test_loss"]])
    np.testing.assert_allclose(validation.T, [EPOCHS, COLUMNS["validation_loss"]])
    assert list(curves)[2:] == ["test, after epoch", "validation, after epoch"]
    assert [len(ax.lines) for ax in (accuracy, norm)] == [2, 1]
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "log"]
    assert accuracy.get_title() == "test: 60.00% after the last epoch"
    assert figure.get_suptitle() == "digits"


def test_a_loss_below_0_has_a_linear_scale() -> None:
    (ax,) = jt.History({"epoch": EPOCHS, "train_loss": 1.0 - EPOCHS}, STEPS - 1).plot().axes
    assert (ax.get_yscale(), ax.get_ylabel()) == ("linear", "loss")


def test_a_history_without_epochs_is_one_sentence() -> None:
    with pytest.raises(jt.errors.InputError, match="the history has no epochs; expected"):
        jt.History({"epoch": EPOCHS[:0]}, STEPS[:0]).plot()
