"""A resumed run equals an uninterrupted one bit by bit; other data or settings are refused."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import list_checkpoints, list_epochs
from jaxtrain.errors import InputError, NonFiniteError, StorageError
from tests.training.helpers import Stop, assert_same_run, stop_at

LOSS, KEY = jt.losses.cross_entropy, jax.random.key(3)


def fit(state, data, path: Path | None, options=None, *, callbacks=(), **arguments):
    defaults = {"loss_fn": LOSS, "batch_size": 16, "key": jax.random.key(3), "epochs": 2}
    saving = [] if path is None else [jt.callbacks.checkpoint(path, **(options or {}))]
    arguments = {"test": data, **defaults, **arguments}
    return jt.fit(state, data, callbacks=[*callbacks, *saving], **arguments)


def contrary(data: jt.Dataset) -> jt.Dataset:
    """Returns validation data whose loss rises with training."""
    return data.replace(targets=(data.targets + 1) % 3)


def optimizers() -> dict[str, Any]:
    """Some of each form of state, and the options that keep a state of their own."""
    names = ("sgd", "adam", "rprop", "adadelta")
    found = {
        name: jt.optimizers.clip_gradients(jt.optimizers.make(name, 0.01), 1.0) for name in names
    }
    adam = jt.optimizers.adam(0.01)
    found["averaged"] = jt.optimizers.average_parameters(adam, 0.9)
    found["accumulated"] = jt.optimizers.accumulate_gradients(adam, 3)  # of 4 batches
    return found


@pytest.mark.parametrize("name", optimizers())
def test_optimizers_resume_bit_identically(
    tmp_path: Path, small_state, small_classes, name
) -> None:
    state = jt.with_optimizer(small_state, optimizers()[name])
    straight = fit(state, small_classes, None)
    fit(state, small_classes, tmp_path, epochs=1)
    assert_same_run(fit(state, small_classes, tmp_path), straight)


def test_batch_norm_a_schedule_and_early_stopping_resume(tmp_path: Path, small_classes) -> None:
    """Early stopping counts epochs without improvement across interruptions."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(inputs))
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    optimizer = jt.optimizers.adam(jt.optimizers.step_lr(0.01, 1, 0.5, steps_per_epoch=4))
    state = jt.init_state(Network(), optimizer, small_classes.inputs[:1], key=jax.random.key(0))
    stopping = [jt.callbacks.early_stopping(4)]
    options = {"validation": contrary(small_classes), "callbacks": stopping, "test": None}
    straight = fit(state, small_classes, None, epochs=20, **options)
    stopped = len(straight[1]["epoch"])
    assert 5 <= stopped < 20
    for epochs in (1, stopped - 1):
        fit(state, small_classes, tmp_path, epochs=epochs, **options)
    assert list_epochs(tmp_path)[-1] == stopped - 1
    # Further calls return the same result.
    for epochs in (20, 20, 25):
        assert_same_run(fit(state, small_classes, tmp_path, epochs=epochs, **options), straight)


def test_every_third_epoch_and_the_last_are_saved(tmp_path, small_state, small_classes) -> None:
    options = {"every": 3, "keep": 2}
    fit(small_state, small_classes, tmp_path, options, epochs=8)
    assert list_epochs(tmp_path) == [6, 8]
    fit(small_state, small_classes, tmp_path, options, epochs=9)
    assert list_epochs(tmp_path) == [8, 9]


def test_a_run_resumes_from_its_initial_state_or_from_one_it_returned(
    tmp_path, small_state, small_classes
) -> None:
    straight = fit(small_state, small_classes, None, epochs=4)
    state, _ = fit(small_state, small_classes, tmp_path)
    fit(state, small_classes, tmp_path, epochs=1)
    for start, epochs in ((small_state, 4), (state, 2)):
        assert_same_run(fit(start, small_classes, tmp_path, epochs=epochs), straight)


def test_weakly_typed_states_resume(tmp_path: Path, small_state, small_classes) -> None:
    """jnp.full of a Python number is weakly typed; the result of a step is not."""
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), small_state.params)
    state = small_state.replace(params=params)
    assert params["Dense_0"]["bias"].weak_type
    straight = fit(state, small_classes, None)
    first = fit(state, small_classes, tmp_path, epochs=1)
    assert_same_run(fit(first[0], small_classes, tmp_path, epochs=1), straight)


def test_a_run_resumes_from_the_best_state_it_returned(
    tmp_path: Path, small_state, small_classes
) -> None:
    """Early stopping returns a state that is not the last one."""
    options = {
        "validation": contrary(small_classes),
        "callbacks": [jt.callbacks.early_stopping(9)],
        "epochs": 3,
    }
    best, _ = fit(small_state, small_classes, tmp_path, **options)
    assert best.epoch < 3
    with pytest.raises(InputError, match=r"epochs is 1, but .* holds epoch 3"):
        fit(best, small_classes, tmp_path, **{**options, "epochs": 1})
    _, history = fit(best, small_classes, tmp_path, **{**options, "epochs": 4})
    assert history["epoch"][-1] == best.epoch + 4


def test_a_run_stopped_by_a_callback_leaves_a_checkpoint(
    tmp_path, small_state, small_classes
) -> None:
    """Also between the epochs that are saved regularly."""

    def stop_at_two(run) -> bool:
        return run.epoch == 2

    stopped = fit(
        small_state, small_classes, tmp_path, {"every": 100}, epochs=9, callbacks=[stop_at_two]
    )
    assert list_epochs(tmp_path) == [2]
    assert stopped[1]["epoch"].tolist() == [1, 2]
    straight = fit(small_state, small_classes, None, epochs=3)
    assert_same_run(fit(small_state, small_classes, tmp_path, epochs=3), straight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small_state, small_classes) -> Path:
    """A folder with two epochs, which no test changes."""
    path = tmp_path_factory.mktemp("saved")
    fit(small_state, small_classes, path, {"configuration": {"note": 1}})
    return path


CHANGES = [
    ({"batch_size": 17}, "train batch size was 16 and is now 17"),
    ({"key": None}, r"train data was .* shuffled by key .* and is now .* as stored"),
    ({"key": jax.random.key(4)}, r"train data was .* key .* and is now .* key"),
    (
        {"metric_fns": {"accuracy": jt.metrics.accuracy}},
        r"columns was epoch, train_loss, .* and is now epoch, train_loss, train_accuracy, ",
    ),
    ({"metric_fns": {"loss2": LOSS}}, r"columns was .* and is now epoch, train_loss, train_loss2"),
    ({"test": None}, r"test data was .* and is now None"),
    ({"epochs": 1}, r"epochs is 1, but .* holds epoch 2; expected at least 2"),
    ({"test_batch_size": 7}, "test batch size was 50 and is now 7"),
    (
        {"configuration": {"note": 2}},
        r"belongs to another run: note was 1 and is now 2; use the same",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_another_run_is_refused(saved, small_state, small_classes, change, message) -> None:
    change = dict(change)
    options = {"configuration": change.pop("configuration", {"note": 1})}
    with pytest.raises(InputError, match=message):
        fit(small_state, small_classes, saved, options, **change)
    assert list_epochs(saved) == [1, 2]


def test_changed_data_are_refused(saved: Path, small_state, small_classes) -> None:
    options = {"configuration": {"note": 1}}
    changed = small_classes.replace(inputs=small_classes.inputs.at[3, 2].add(0.001))
    with pytest.raises(InputError, match="train data was 50 examples with the digest"):
        fit(small_state, changed, saved, options)
    with pytest.raises(InputError, match="another run: test data was 50 examples with the digest"):
        fit(small_state, small_classes, saved, options, test=changed)
    fit(small_state, small_classes, saved, options)  # the same again is accepted


def small_network(data, *, seed=0, dropout=0.2, width=8, rate=0.1, **options) -> jt.TrainState:
    model = jt.models.FeedForward((width, 3), dropout_rate=dropout, mean=0.0, std=1.0)
    optimizer = jt.optimizers.sgd(rate, **options)
    return jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(seed))


@pytest.fixture(scope="module")
def network(tmp_path_factory, small_classes) -> Path:
    """A folder with an epoch of the network, which no test changes."""
    path = tmp_path_factory.mktemp("network")
    fit(small_network(small_classes), small_classes, path, epochs=1)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "the key of the state was"),
        ({"momentum": 0.9}, r"has .* where this run has .*; expected the same model, optimizer"),
        (
            {"weight_decay": 0.1},
            r"has .* where this run has .*; expected the same model, optimizer",
        ),
        ({"width": 9}, r"has .*float32\[8\] where this run has .*float32\[9\]"),
    ],
    ids=str,
)
def test_another_key_and_other_shapes_are_refused(
    network: Path, small_classes, options, message
) -> None:
    with pytest.raises(InputError, match=message):
        fit(small_network(small_classes, **options), small_classes, network)


class Activated(nn.Module):
    """Two networks with the same parameters and the same repr."""

    smooth: bool

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        activation = nn.softplus if self.smooth else nn.relu
        return nn.Dense(3)(activation(nn.Dense(8)(inputs)))

    def __repr__(self) -> str:
        return "Activated()"


def activated(data, smooth: bool, rate: Any = 0.1) -> jt.TrainState:
    optimizer = jt.optimizers.sgd(rate)
    return jt.init_state(Activated(smooth), optimizer, data.inputs[:1], key=jax.random.key(0))


def l1(predictions, targets):
    return jnp.abs(predictions - jax.nn.one_hot(targets, 3)).mean(axis=1)


CODE = r"written by other code or from other initial values \("


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"dropout": 0.3}, {}, CODE + r"model was .*FeedForward.*0\.2.* and is now .*0\.3"),
        ({}, {"loss_fn": l1}, CODE + r"loss was cross_entropy \(\w+\) and is now l1 \("),
        ({"rate": 0.2}, {}, CODE + "learning rate was 0.1 and is now 0.2"),
    ],
    ids=["model", "loss", "learning rate"],
)
def test_changed_code_resumes_with_a_warning(
    tmp_path: Path, network: Path, small_classes, state, options, message
) -> None:
    path = shutil.copytree(network, tmp_path / "copy")
    with pytest.warns(UserWarning, match=message):
        _, history = fit(small_network(small_classes, **state), small_classes, path, **options)
    assert history["epoch"].tolist() == [1, 2]


def test_another_activation_or_schedule_resumes_with_a_warning(
    tmp_path: Path, small_classes
) -> None:
    """No name tells them apart. Both rates are 0.1 for the first hundred steps."""
    one, other = (jt.optimizers.step_lr(0.1, steps) for steps in (100, 200))
    fit(activated(small_classes, False, one), small_classes, tmp_path, epochs=1)
    message = CODE + r"of the model, the loss, the optimizer or the parameters\)"
    for number, state in enumerate(
        [activated(small_classes, True, one), activated(small_classes, True, other)], start=2
    ):
        with pytest.warns(UserWarning, match=message) as warned:
            fit(state, small_classes, tmp_path, epochs=number)
        assert len(warned) == 1
    with warnings.catch_warnings(action="error"):  # the last one is the run from now on
        fit(activated(small_classes, True, other), small_classes, tmp_path, epochs=4)


def test_other_initial_parameters_cause_a_warning(
    tmp_path: Path, small_state, small_classes
) -> None:
    straight = fit(small_state, small_classes, None)
    fit(small_state, small_classes, tmp_path, epochs=1)
    other = small_state.replace(params=jax.tree.map(lambda x: x + 1, small_state.params))
    with pytest.warns(
        UserWarning, match="from other initial values .*the values of the checkpoint"
    ):
        assert_same_run(fit(other, small_classes, tmp_path), straight)


def test_a_part_of_an_epoch_resumes_with_its_metrics(
    tmp_path: Path, small_state, small_classes
) -> None:
    """Also one of the first epoch, and with an array per epoch."""
    metrics = {"accuracy": jt.metrics.accuracy, "confusion": jt.metrics.confusion_matrix, "l1": l1}
    straight = fit(small_state, small_classes, None, metric_fns=metrics)
    assert straight[1]["train_confusion"].shape == (2, 3, 3)
    for epoch, step in ((1, 2), (1, 3), (2, 3)):
        with pytest.raises(Stop) as raised:
            fit(
                small_state,
                small_classes,
                tmp_path,
                {"every_steps": 1},
                metric_fns=metrics,
                callbacks=[stop_at(epoch, step)],
            )
        error: Any = raised.value
        assert error.state.epoch == epoch - 1
        assert list_checkpoints(tmp_path)[-1] == (epoch - 1, step - 1)
    resumed = fit(small_state, small_classes, tmp_path, metric_fns=metrics)
    assert_same_run(resumed, straight)


@pytest.mark.parametrize("best", ["validation_loss", "validation_hits"])
def test_the_best_state_is_kept_and_returned(
    tmp_path: Path, small_state, small_classes, best
) -> None:
    """By a checkpoint that judges epochs by a column, also after resuming."""
    options = {
        "validation": contrary(small_classes),
        "metric_fns": {"hits": jt.metrics.accuracy},
        "test": None,
    }
    for epochs in (3, 5, 5):
        saving = {"best": best, "keep": 1}
        state, history = fit(small_state, small_classes, tmp_path, saving, epochs=epochs, **options)
        assert len(history["epoch"]) == epochs
        values = history[best] * (-1 if best == "validation_hits" else 1)
        assert state.epoch == 1 + np.argmin(values)
    # Without `best`, the last state is returned.
    state, _ = fit(small_state, small_classes, tmp_path, epochs=5, **options)
    assert state.epoch == 5


def test_a_state_of_your_own_resumes(tmp_path: Path, small_classes) -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Own:
        step: Any
        epoch: Any
        key: Any
        weights: Any

    def step_fn(state: Own, batch):
        def loss(weights):
            key = jax.random.fold_in(state.key, state.step)
            noise = jax.random.normal(key, batch.inputs.shape)
            predictions = (batch.inputs + noise) @ weights
            return LOSS(predictions, batch.targets).mean()

        value, slope = jax.value_and_grad(loss)(state.weights)
        weights = state.weights - 0.1 * slope
        state = dataclasses.replace(state, step=state.step + 1, weights=weights)
        return state, {"loss": value, "norm": jnp.linalg.norm(slope)}

    own = Own(jnp.int32(0), jnp.int32(0), jax.random.key(0), jnp.zeros((6, 3)))
    options = {"loss_fn": None, "test": None, "step_fn": step_fn}
    straight = fit(own, small_classes, None, **options)
    saving = {"every_steps": 2}
    with pytest.raises(Stop):
        fit(own, small_classes, tmp_path, saving, callbacks=[stop_at(2, 3)], **options)
    assert list_checkpoints(tmp_path)[-1] == (1, 2)
    assert_same_run(fit(own, small_classes, tmp_path, **options), straight)


def test_other_versions_resume_with_a_warning(
    tmp_path: Path, small_state, small_classes, monkeypatch
) -> None:
    straight = fit(small_state, small_classes, None)
    with monkeypatch.context() as patch:
        patch.setattr("jaxtrain._versions.metadata.version", lambda name: "0.0.1")
        fit(small_state, small_classes, tmp_path, epochs=1)
    with pytest.warns(UserWarning, match=r"jax was 0\.0\.1 and is now .* last digits may differ"):
        assert_same_run(fit(small_state, small_classes, tmp_path), straight)


REPRS = itertools.count()


class Unsteady(nn.Module):
    """Its repr differs each time, as that of a set of strings differs between processes."""

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        return nn.Dense(3)(inputs)

    def __repr__(self) -> str:
        return f"Unsteady({next(REPRS)})"


def test_a_model_whose_repr_depends_on_the_hash_seed_resumes(tmp_path: Path, small_classes) -> None:
    optimizer, inputs = jt.optimizers.sgd(0.1), small_classes.inputs[:1]
    state = jt.init_state(Unsteady(), optimizer, inputs, key=jax.random.key(0))
    with warnings.catch_warnings(action="error"):
        fit(state, small_classes, tmp_path, epochs=1)
        _, history = fit(state, small_classes, tmp_path)
    assert history["epoch"].tolist() == [1, 2]


def test_a_renamed_checkpoint_folder_stops_the_run(tmp_path, small_state, small_classes) -> None:
    def rename(run) -> None:
        if run.epoch == 2:
            while list_epochs(tmp_path / "checkpoints") != [1]:
                pass
            os.rename(tmp_path / "checkpoints", tmp_path / "elsewhere")

    with pytest.raises(StorageError, match="could not be written"):
        fit(small_state, small_classes, tmp_path / "checkpoints", epochs=9, callbacks=[rename])


def test_a_run_that_diverges_keeps_its_checkpoints(tmp_path: Path) -> None:
    data = jt.Dataset(jnp.linspace(-1, 1, 8)[:, None], jnp.linspace(0, 3, 8)[:, None])
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(1e3),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    options = {"loss_fn": jt.losses.mean_squared_error, "epochs": 99}
    with pytest.raises(NonFiniteError) as raised:
        jt.fit(state, data, callbacks=[jt.callbacks.checkpoint(tmp_path, keep=2)], **options)
    assert list_epochs(tmp_path) == [raised.value.epoch - 2, raised.value.epoch - 1]
    assert raised.value.state.epoch == raised.value.epoch - 1
