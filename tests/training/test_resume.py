"""A resumed run equals an uninterrupted one bit by bit; checkpoints of other runs are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxtrain as jt
from jaxtrain.checkpoint import list_epochs
from jaxtrain.optimizers import OPTIMIZERS
from jaxtrain.training.events import EpochDone
from tests.checkpoint.helpers import assert_identical

LOSS = jt.losses.cross_entropy
ROOT = Path(__file__).parents[2]


def fit(state, data, path: Path | None, options=None, **arguments):
    defaults = {"loss_fn": LOSS, "batch_size": 16, "key": jax.random.key(3), "epochs": 3}
    checkpoint = None if path is None else jt.CheckpointOptions(path, **(options or {}))
    return jt.fit(state, data, data, checkpoint=checkpoint, **{**defaults, **arguments})


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
        "validation_data": contrary(small_classes),
        "early_stopping": jt.EarlyStopping(4),
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
        "validation_data": contrary(small_classes),
        "early_stopping": jt.EarlyStopping(9),
        "epochs": 3,
    }
    best, _ = fit(small_state, small_classes, tmp_path, **options)
    assert best.epoch < 3
    with pytest.raises(jt.InputError, match=r"epochs is 1, but .* holds epoch 3"):
        fit(best, small_classes, tmp_path, **{**options, "epochs": 1})
    _, history = fit(best, small_classes, tmp_path, **{**options, "epochs": 4})
    assert history["epoch"][-1] == best.epoch + 4


def test_a_run_stopped_by_a_callback_leaves_a_checkpoint(
    tmp_path, small_state, small_classes
) -> None:
    """Also between the epochs that are saved regularly."""

    def stop_at_two(event) -> bool:
        return isinstance(event, EpochDone) and event.epoch == 2

    stopped = fit(
        small_state, small_classes, tmp_path, {"every": 100}, epochs=9, on_event=stop_at_two
    )
    assert list_epochs(tmp_path) == [2]
    assert stopped[1]["epoch"].tolist() == [1, 2]
    straight = fit(small_state, small_classes, None, epochs=4)
    assert_same_run(fit(small_state, small_classes, tmp_path, epochs=4), straight)


CHANGES = [
    ({"batch_size": 17}, "batch_size was 16 and is now 17"),
    ({"key": None}, "order of the examples was by key .* and is now as stored"),
    ({"loss_fn": jt.losses.soft_cross_entropy}, "loss was cross_entropy and is now soft_cross"),
    ({"metric_fns": {"accuracy": jt.metrics.accuracy}}, "columns was .* test_accuracy"),
    ({"epochs": 2}, "epochs is 2, but .* holds epoch 3; expected at least 3"),
    ({"metric_fns": {"loss2": LOSS}}, "columns was .* test_loss2"),
    ({"test_batch_size": 7}, "test_batch_size was 1000 and is now 7"),
    ({"validation": True}, "columns was"),
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
    if change.pop("validation", False):
        change |= {"validation_data": small_classes, "early_stopping": jt.EarlyStopping(5)}
    data = small_classes
    if "loss_fn" in change:
        data = data.replace(targets=jax.nn.one_hot(data.targets, 3))
    with pytest.raises(jt.InputError, match=message):
        fit(small_state, data, tmp_path, options, **change)


def small_network(data, *, seed=0, dropout=0.2, width=8, rate=0.1, **options) -> jt.TrainState:
    model = jt.models.FeedForward((width, 3), dropout_rate=dropout, mean=0.0, std=1.0)
    optimizer = jt.optimizers.sgd(rate, **options)
    return jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.3}, r"model was .*FeedForward.*0\.2.* and is now .*0\.3"),
        ({"seed": 1}, r"start \(parameters, optimizer state and key\) was"),
        ({"rate": 0.2}, "start .* was"),
        ({"momentum": 0.9}, "checkpoint has|training step .* was|start .* was"),
        ({"weight_decay": 0.1}, "training step .* was|checkpoint has|start .* was"),
        ({"width": 9}, "model was .*FeedForward|checkpoint has|start"),
    ],
    ids=str,
)
@pytest.mark.parametrize("moved", ["nothing", "python", "jax"])
def test_another_model_initial_state_or_optimizer_is_refused(
    tmp_path: Path, small_classes, monkeypatch, options, message, moved
) -> None:
    """Also after a change of versions."""
    fit(small_network(small_classes), small_classes, tmp_path)
    if moved == "python":
        monkeypatch.setattr("platform.python_version", lambda: "3.99.1")
    if moved == "jax":
        monkeypatch.setattr("jaxtrain._versions.metadata.version", lambda name: "99.0")
    with pytest.raises(jt.InputError, match=message):
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


@pytest.mark.parametrize("moved", ["nothing", "python", "jax"])
def test_another_activation_is_refused_after_a_version_change(
    tmp_path: Path, small_classes, monkeypatch, moved
) -> None:
    def state(smooth: bool) -> jt.TrainState:
        optimizer = jt.optimizers.sgd(0.1)
        return jt.init_state(
            Activated(smooth), optimizer, small_classes.inputs[:1], key=jax.random.key(0)
        )

    fit(state(False), small_classes, tmp_path)
    if moved == "python":
        monkeypatch.setattr("platform.python_version", lambda: "3.99.1")
    if moved == "jax":
        monkeypatch.setattr("jaxtrain._versions.metadata.version", lambda name: "99.0")
    with pytest.raises(jt.InputError, match=r"training step .* was"):
        fit(state(True), small_classes, tmp_path, epochs=4)


def test_another_schedule_is_refused_after_a_version_change(
    tmp_path: Path, small_classes, monkeypatch
) -> None:
    """Both rates are 0.1 for the first hundred steps."""

    def state(schedule) -> jt.TrainState:
        model = jt.models.FeedForward((3,), mean=0.0, std=1.0)
        optimizer = jt.optimizers.sgd(schedule)
        return jt.init_state(model, optimizer, small_classes.inputs[:1], key=jax.random.key(0))

    fit(state(jt.optimizers.step_lr(0.1, 100)), small_classes, tmp_path)
    monkeypatch.setattr("jaxtrain._versions.metadata.version", lambda name: "99.0")
    message = r"jax was .* and is now 99\.0.*training step .* was"
    with pytest.raises(jt.InputError, match=message):
        fit(state(jt.optimizers.step_lr(0.1, 200)), small_classes, tmp_path, epochs=4)


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
            checkpoint=jt.CheckpointOptions(sys.argv[1]),
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


def test_changed_data_are_refused(tmp_path: Path, small_state, small_classes) -> None:
    fit(small_state, small_classes, tmp_path)
    changed = small_classes.replace(inputs=small_classes.inputs.at[3, 2].add(0.001))
    with pytest.raises(jt.InputError, match="training data was 50 examples with the digest"):
        fit(small_state, changed, tmp_path)
    fit(small_state, small_classes, tmp_path)  # the same again is accepted


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
        checkpoint = jt.CheckpointOptions(sys.argv[1])
        loss_fn = jt.losses.mean_squared_error
        _, history = jt.fit(
            state, data, loss_fn=loss_fn, epochs=int(sys.argv[2]), checkpoint=checkpoint
        )
        print(len(history["epoch"]), repr(model))
    """)
    printed = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(epochs)],
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

    def on_event(event) -> None:
        if isinstance(event, EpochDone):
            os.chdir(tmp_path / "elsewhere")

    fit(small_state, small_classes, Path("checkpoints"), on_event=on_event)
    assert list_epochs(tmp_path / "checkpoints") == [1, 2, 3]


def test_a_renamed_checkpoint_folder_stops_the_run(tmp_path, small_state, small_classes) -> None:
    def on_event(event) -> None:
        if isinstance(event, EpochDone) and event.epoch == 2:
            while list_epochs(tmp_path / "checkpoints") != [1]:
                pass
            os.rename(tmp_path / "checkpoints", tmp_path / "elsewhere")

    with pytest.raises(jt.StorageError, match="could not be written"):
        fit(small_state, small_classes, tmp_path / "checkpoints", epochs=9, on_event=on_event)


def test_a_run_that_diverges_keeps_its_checkpoints(tmp_path: Path) -> None:
    data = jt.Dataset(jnp.linspace(-1, 1, 8)[:, None], jnp.linspace(0, 3, 8)[:, None])
    state = jt.init_state(
        jt.models.LinearRegression(),
        jt.optimizers.sgd(1e3),
        data.inputs[:1],
        key=jax.random.key(0),
    )
    options = {"loss_fn": jt.losses.mean_squared_error, "epochs": 99}
    with pytest.raises(jt.NonFiniteError) as raised:
        jt.fit(state, data, checkpoint=jt.CheckpointOptions(tmp_path, keep=2), **options)
    assert list_epochs(tmp_path) == [raised.value.epoch - 2, raised.value.epoch - 1]
    assert raised.value.state.epoch == raised.value.epoch - 1
