"""A resumed run equals an uninterrupted one bit by bit; other data or settings are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
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
from jaxtrain.optimizers._torch import OPTIMIZERS
from tests.checkpoint.helpers import assert_identical

LOSS = jt.losses.cross_entropy
ROOT = Path(__file__).parents[2]


def fit(state, data, path: Path | None, options=None, *, callbacks=(), **arguments):
    defaults = {"loss_fn": LOSS, "batch_size": 16, "key": jax.random.key(3), "epochs": 3}
    saving = [] if path is None else [jt.callbacks.checkpoint(path, **(options or {}))]
    arguments = {"test": data, **defaults, **arguments}
    return jt.fit(state, data, callbacks=[*callbacks, *saving], **arguments)


class StopAt(jt.callbacks.Callback):
    """Interrupts a run after some steps of an epoch."""

    def __init__(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step

    def next_pause(self, run) -> int | None:
        return self._step if run.epoch + 1 == self._epoch and run.step < self._step else None

    def on_steps(self, run) -> None:
        if (run.epoch + 1, run.step) == (self._epoch, self._step):
            raise KeyboardInterrupt


def assert_same_run(ours, theirs) -> None:
    assert_identical(ours[0], theirs[0])
    one, other = ({k: v for k, v in run[1].items() if k != "seconds"} for run in (ours, theirs))
    assert_identical(one, other)
    assert_identical(ours[1].step_losses, theirs[1].step_losses)


def contrary(data: jt.Dataset) -> jt.Dataset:
    """Returns validation data whose loss rises with training."""
    return data.replace(targets=(data.targets + 1) % 3)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_every_optimizer_resumes_bit_identically(tmp_path: Path, small_classes, name) -> None:
    model = jt.models.FeedForward(features=(8, 3), dropout_rate=0.2, mean=0.0, std=1.0)
    optimizer = jt.optimizers.clip_gradients(OPTIMIZERS[name](0.01), 1.0)
    state = jt.init_state(model, optimizer, small_classes.inputs[:1], key=jax.random.key(0))
    straight = fit(state, small_classes, None, epochs=4)
    fit(state, small_classes, tmp_path, epochs=2)
    assert_same_run(fit(state, small_classes, tmp_path, epochs=4), straight)


def test_batch_norm_a_schedule_and_early_stopping_resume(tmp_path: Path, small_classes) -> None:
    """Early stopping counts epochs without improvement across interruptions."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, inputs, train: bool = False):
            x = nn.Dense(8)(inputs)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    optimizer = jt.optimizers.adam(jt.optimizers.step_lr(0.01, 1, 0.5, steps_per_epoch=4))
    state = jt.init_state(Network(), optimizer, small_classes.inputs[:1], key=jax.random.key(0))
    options = {
        "validation": contrary(small_classes),
        "callbacks": [jt.callbacks.early_stopping(4)],
    }
    straight = fit(state, small_classes, None, epochs=20, **options)
    stopped = len(straight[1]["epoch"])
    assert 5 <= stopped < 20
    for epochs in (1, 3, stopped - 1):
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


def test_a_run_resumes_from_the_state_it_returned(tmp_path, small_state, small_classes) -> None:
    straight = fit(small_state, small_classes, None, epochs=5)
    state, _ = fit(small_state, small_classes, tmp_path, epochs=2)
    assert_same_run(fit(state, small_classes, tmp_path, epochs=3), straight)


def test_a_run_resumes_from_its_initial_state_after_calls_that_continued_it(
    tmp_path, small_state, small_classes
) -> None:
    straight = fit(small_state, small_classes, None, epochs=6)
    state, _ = fit(small_state, small_classes, tmp_path, epochs=2)
    fit(state, small_classes, tmp_path, epochs=3)
    assert_same_run(fit(small_state, small_classes, tmp_path, epochs=6), straight)


def test_weakly_typed_states_resume(tmp_path: Path, small_classes) -> None:
    """jnp.full of a Python number is weakly typed; the result of a step is not."""
    data = small_classes.replace(targets=small_classes.targets[:, None].astype(float))
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(0.01),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    state = state.replace(params={"weight": jnp.full((6, 1), 0.5), "bias": jnp.full(1, 0.5)})
    assert state.params["weight"].weak_type
    options = {"loss_fn": jt.losses.mean_squared_error}
    straight = fit(state, data, None, epochs=4, **options)
    fit(state, data, tmp_path, epochs=2, **options)
    first = fit(state, data, tmp_path, epochs=2, **options)
    assert_same_run(fit(first[0], data, tmp_path, epochs=2, **options), straight)


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
    straight = fit(small_state, small_classes, None, epochs=4)
    assert_same_run(fit(small_state, small_classes, tmp_path, epochs=4), straight)


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
    ({"epochs": 2}, r"epochs is 2, but .* holds epoch 3; expected at least 3"),
    ({"test_batch_size": 7}, "test batch size was 50 and is now 7"),
    (
        {"configuration": {"note": 2}},
        r"belongs to another run: note was 1 and is now 2; use the same",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_another_run_is_refused(tmp_path, small_state, small_classes, change, message) -> None:
    fit(small_state, small_classes, tmp_path, {"configuration": {"note": 1}})
    change = dict(change)
    options = {"configuration": change.pop("configuration", {"note": 1})}
    with pytest.raises(InputError, match=message):
        fit(small_state, small_classes, tmp_path, options, **change)
    assert list_epochs(tmp_path) == [1, 2, 3]


def test_changed_data_are_refused(tmp_path: Path, small_state, small_classes) -> None:
    fit(small_state, small_classes, tmp_path)
    changed = small_classes.replace(inputs=small_classes.inputs.at[3, 2].add(0.001))
    with pytest.raises(InputError, match="train data was 50 examples with the digest"):
        fit(small_state, changed, tmp_path)
    with pytest.raises(InputError, match="another run: test data was 50 examples with the digest"):
        fit(small_state, small_classes, tmp_path, test=changed)
    fit(small_state, small_classes, tmp_path)  # the same again is accepted


def small_network(data, *, seed=0, dropout=0.2, width=8, rate=0.1, **options) -> jt.TrainState:
    model = jt.models.FeedForward((width, 3), dropout_rate=dropout, mean=0.0, std=1.0)
    optimizer = jt.optimizers.sgd(rate, **options)
    return jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(seed))


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
    tmp_path: Path, small_classes, options, message
) -> None:
    fit(small_network(small_classes), small_classes, tmp_path)
    with pytest.raises(InputError, match=message):
        fit(small_network(small_classes, **options), small_classes, tmp_path, epochs=4)


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


CODE = r"written by other code \("


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"dropout": 0.3}, {}, CODE + r"model was .*FeedForward.*0\.2.* and is now .*0\.3"),
        ({}, {"loss_fn": l1}, CODE + "loss was cross_entropy and is now l1"),
        ({"rate": 0.2}, {}, r"began with another initial opt_state .*0\.1.* and is now .*0\.2"),
    ],
    ids=["model", "loss", "learning rate"],
)
def test_changed_code_resumes_with_a_warning(
    tmp_path: Path, small_classes, state, options, message
) -> None:
    first = fit(small_network(small_classes), small_classes, tmp_path)
    with pytest.warns(UserWarning, match=message):
        _, history = fit(
            small_network(small_classes, **state), small_classes, tmp_path, epochs=4, **options
        )
    assert_identical(history["train_loss"][:3], first[1]["train_loss"])
    assert history["epoch"].tolist() == [1, 2, 3, 4]


def test_another_activation_or_schedule_resumes_with_a_warning(
    tmp_path: Path, small_classes
) -> None:
    """No name tells them apart. Both rates are 0.1 for the first hundred steps."""
    one, other = (jt.optimizers.step_lr(0.1, steps) for steps in (100, 200))
    fit(activated(small_classes, False, one), small_classes, tmp_path, epochs=1)
    message = CODE + r"the code of the model, the loss or the optimizer\)"
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
    fit(small_state, small_classes, tmp_path, epochs=2)
    other = small_state.replace(params=jax.tree.map(lambda x: x + 1, small_state.params))
    for _ in range(2):  # the checkpoints of the resumed run remember those that it began with
        with pytest.warns(UserWarning, match="began with another initial params; the values in"):
            assert_same_run(fit(other, small_classes, tmp_path), straight)
    with warnings.catch_warnings(action="error"):
        fit(small_state, small_classes, tmp_path)


def test_a_part_of_an_epoch_resumes_with_its_metrics(
    tmp_path: Path, small_state, small_classes
) -> None:
    """Also one of the first epoch, and with an array per epoch."""
    metrics = {"accuracy": jt.metrics.accuracy, "confusion": jt.metrics.confusion_matrix, "l1": l1}
    straight = fit(small_state, small_classes, None, metric_fns=metrics)
    assert straight[1]["train_confusion"].shape == (3, 3, 3)
    for epoch, step in ((1, 2), (1, 3), (2, 1), (3, 3)):
        with pytest.raises(KeyboardInterrupt) as raised:
            fit(
                small_state,
                small_classes,
                tmp_path,
                {"every_steps": 1},
                metric_fns=metrics,
                callbacks=[StopAt(epoch, step)],
            )
        assert raised.value.state.epoch == epoch - 1
        assert list_checkpoints(tmp_path)[-1] == (epoch - 1, step - 1)
    resumed = fit(small_state, small_classes, tmp_path, metric_fns=metrics)
    assert_same_run(resumed, straight)


def test_the_best_state_is_kept_and_returned(tmp_path: Path, small_state, small_classes) -> None:
    options = {"validation": contrary(small_classes), "metric_fns": {"hits": jt.metrics.accuracy}}
    first, _ = fit(small_state, small_classes, None, epochs=1, **options)
    for best in ("validation_loss", "validation_hits"):
        saving = {"best": best, "keep": 1}
        found = [
            fit(small_state, small_classes, tmp_path / best, saving, epochs=epochs, **options)
            for epochs in (4, 7, 7)
        ]
        for (state, history), epochs in zip(found, (4, 7, 7), strict=True):
            assert len(history["epoch"]) == epochs
            values = history[best] * (-1 if best == "validation_hits" else 1)
            assert state.epoch == 1 + np.argmin(values)
    assert_identical(
        fit(
            small_state,
            small_classes,
            tmp_path / "validation_loss",
            epochs=7,
            options={"best": "validation_loss"},
            **options,
        )[0],
        first,
    )
    # Without it, or by another column, it is not the best state.
    state, _ = fit(small_state, small_classes, tmp_path / "validation_loss", epochs=7, **options)
    assert state.epoch == 7


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
    with pytest.raises(KeyboardInterrupt):
        fit(own, small_classes, tmp_path, saving, callbacks=[StopAt(2, 3)], **options)
    assert list_checkpoints(tmp_path)[-1] == (1, 2)
    assert_same_run(fit(own, small_classes, tmp_path, **options), straight)


def assert_close(ours, theirs) -> None:
    for one, other in zip(
        jax.tree.leaves(ours[0].params), jax.tree.leaves(theirs[0].params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1].step_losses, theirs[1].step_losses, rtol=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.filterwarnings("ignore:.*written with other versions or on another device")
def test_a_run_resumes_on_another_mesh(tmp_path: Path, streamed: bool) -> None:
    """No mesh, meshes of one, two and eight devices, and one with a second axis."""
    labels = np.arange(64) % 3
    data = jt.Dataset(np.eye(6, dtype=np.float32)[labels], labels)
    state, key = small_network(data), jax.random.key(3)
    train = jt.data.stream(data, 16, key) if streamed else data
    options = {"test": data, "loss_fn": LOSS, "batch_size": 16, "key": None if streamed else key}
    straight = jt.fit(state, train, epochs=6, callbacks=[], **options)
    devices = jax.devices()
    meshes = [None] + [
        jax.make_mesh(shape, ("data", "model")[: len(shape)], devices=devices[: np.prod(shape)])
        for shape in ((1,), (8,), (4, 2), (2,), (1,))
    ]
    for epochs, mesh in enumerate(meshes, start=1):
        # The messages about code would name it.
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?s).*other code")
            saving = jt.callbacks.checkpoint(tmp_path)
            found = jt.fit(state, train, epochs=epochs, callbacks=[saving], mesh=mesh, **options)
        leaf = jax.tree.leaves(found[0].params)[0]
        assert len(leaf.sharding.device_set) == (1 if mesh is None else mesh.size)
    assert_close(found, straight)


def shifted(example, rng, *, by: float):
    inputs, label = example
    return inputs + by * rng.normal(size=6).astype(np.float32), label


def test_a_stream_resumes_with_another_number_of_workers(
    tmp_path: Path, small_state, small_classes
) -> None:
    def train(path, workers: int, by: float = 0.1, **options):
        transform = functools.partial(shifted, by=by)
        key = jax.random.key(3)
        stream = jt.data.stream(small_classes, 16, key, transform=transform, workers=workers)
        saving = {"every_steps": 2}
        return fit(small_state, stream, path, saving, test=None, key=None, epochs=2, **options)

    straight = train(None, 0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 1, callbacks=[StopAt(2, 3)])
    assert list_checkpoints(tmp_path)[-1] == (1, 2)
    with pytest.raises(InputError, match=r"transformed by shifted \(.* and is now .* shifted \("):
        train(tmp_path, 0, by=0.2)
    assert_same_run(train(tmp_path, 0), straight)


def test_a_sharded_run_resumes_on_another_number_of_devices(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, warnings
        import jax, jax.numpy as jnp, numpy as np
        import jaxtrain as jt

        warnings.simplefilter("ignore")
        mesh = jax.make_mesh((len(jax.devices()),), ("data",))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        inputs = jnp.arange(128.0).reshape(16, 8) / 128
        data = jt.Dataset(inputs, inputs[:, :1])
        model = jt.models.LinearRegression()
        state = jt.init_state(model, jt.optimizers.adam(0.01), inputs, key=jax.random.key(0))
        place = lambda x: jax.device_put(x, rows) if x.shape[:1] == (8,) else x
        state = jax.tree.map(place, state)
        state, history = jt.fit(
            state,
            data,
            loss_fn=jt.losses.mean_squared_error,
            epochs=int(sys.argv[2]),
            batch_size=8,
            callbacks=[jt.callbacks.checkpoint(sys.argv[1])],
        )
        print(len(state.params["weight"].sharding.device_set), history["train_loss"].tolist())
    """)

    def run(devices: int, epochs: int) -> tuple[int, list[float]]:
        flags = f"--xla_force_host_platform_device_count={devices}"
        result = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(epochs)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        count, losses = result.stdout.split(" ", 1)
        return int(count), json.loads(losses)

    count, first = run(8, 2)
    assert (count, len(first)) == (8, 2)
    count, second = run(4, 4)
    assert (count, len(second)) == (4, 4)
    assert second[:2] == first
    assert second[3] < second[1]


def test_other_versions_resume_with_a_warning(
    tmp_path: Path, small_state, small_classes, monkeypatch
) -> None:
    straight = fit(small_state, small_classes, None, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr("jaxtrain._versions.metadata.version", lambda name: "0.0.1")
        fit(small_state, small_classes, tmp_path, epochs=2)
    with pytest.warns(UserWarning, match=r"jax was 0\.0\.1 and is now .* last digits may differ"):
        assert_same_run(fit(small_state, small_classes, tmp_path, epochs=3), straight)


def test_a_model_whose_repr_depends_on_the_hash_seed_resumes(tmp_path: Path) -> None:
    """The order of a set of strings differs between processes."""
    program = textwrap.dedent("""
        import sys
        import flax.linen as nn, jax, jax.numpy as jnp
        import jaxtrain as jt

        class Network(nn.Module):
            names: frozenset

            @nn.compact
            def __call__(self, inputs, train: bool = False):
                return nn.Dense(1)(inputs)

        data = jt.Dataset(jnp.ones((4, 2)), jnp.ones((4, 1)))
        model = Network(frozenset(["a", "b", "c", "d", "e", "f"]))
        state = jt.init_state(model, jt.optimizers.sgd(0.1), data.inputs, key=jax.random.key(0))
        checkpoint = jt.callbacks.checkpoint(sys.argv[1])
        loss_fn = jt.losses.mean_squared_error
        _, history = jt.fit(
            state, data, loss_fn=loss_fn, epochs=int(sys.argv[2]), callbacks=[checkpoint]
        )
        print(len(history["epoch"]), repr(model))
    """)
    printed = [
        subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", program, str(tmp_path), str(epochs)],
            env={**os.environ, "PYTHONHASHSEED": str(epochs)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split(maxsplit=1)
        for epochs in (1, 2)
    ]
    assert [length for length, _ in printed] == ["1", "2"]
    assert printed[0][1] != printed[1][1]


def test_a_program_may_change_its_working_directory(
    tmp_path: Path, small_state, small_classes, monkeypatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def move(run) -> None:
        os.chdir(tmp_path / "elsewhere")

    fit(small_state, small_classes, Path("checkpoints"), callbacks=[move])
    assert list_epochs(tmp_path / "checkpoints") == [1, 2, 3]


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
