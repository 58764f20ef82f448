"""Averaged parameters, accumulated gradients and half precision, in every way to train."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt
from tests.training.helpers import assert_close, assert_identical

LOSS = jt.losses.cross_entropy


def make_state(optimizer, data: jt.Dataset, dropout_rate: float = 0.0) -> jt.TrainState:
    model = jt.models.FeedForward((8, 3), dropout_rate=dropout_rate, mean=0.0, std=1.0)
    return jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))


# Made once, so that tests share the compiled steps.
SGD, ADAM = jt.optimizers.sgd(0.1, momentum=0.9), jt.optimizers.adam(0.01)
AVERAGED = jt.optimizers.average_parameters(SGD, 0.9)
ACCUMULATING = jt.optimizers.accumulate_gradients(ADAM, 2)


@pytest.mark.parametrize("optimizer", [AVERAGED, ACCUMULATING], ids=["averaged", "accumulating"])
def test_a_run_of_train_has_the_numbers_of_fit(small_classes, optimizer) -> None:
    """Alone and under vmap. XLA compiles the last step of an accumulated epoch in another way."""
    state = make_state(optimizer, small_classes, dropout_rate=0.2)

    def run(seed, train=jt.train):
        return train(
            state.replace(key=jax.random.key(seed)),
            small_classes,
            small_classes,
            loss_fn=LOSS,
            batch_size=16,
            epochs=2,
            key=jax.random.key(seed),
        )

    fitted, expected = run(1, jt.fit)
    found, history = run(1)
    compare = assert_close if optimizer is ACCUMULATING else assert_identical
    compare(found.params, fitted.params)
    np.testing.assert_allclose(history["test_loss"], expected["test_loss"], rtol=1e-6)
    together, _ = jax.vmap(run)(jnp.arange(2))
    one = jax.tree.map(lambda leaf: leaf[1], together.params)
    assert_close(one, fitted.params, atol=1e-5)


def test_the_average_equals_that_of_pytorch(small_classes) -> None:
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from benchmarks import torch_reference

    state = make_state(AVERAGED, small_classes)
    model = torch_reference.feed_forward((8, 3), 6, dropout_rate=0.0)
    torch_reference.load(model, state.params)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inputs = torch.tensor(np.array(small_classes.inputs))
    targets = torch.tensor(np.array(small_classes.targets)).long()
    for batch in torch_reference.slices(inputs, targets, 16):
        torch_reference.train_steps(model, optimizer, [batch], torch.nn.functional.cross_entropy)
        average.update_parameters(model)
    state, _ = jt.train_epoch(state, small_classes, LOSS, batch_size=16)
    found = jt.optimizers.averaged_params(state.opt_state)
    assert_close(found, torch_reference.read_params(average.module))
    assert_close(state.params, torch_reference.read_params(model))
    assert np.abs(found["Dense_0"]["weight"] - state.params["Dense_0"]["weight"]).max() > 0.01


def test_the_average_of_the_first_step_is_its_parameters(small_classes) -> None:
    state, _ = jt.train_step(make_state(AVERAGED, small_classes), small_classes[:16], LOSS)
    assert_identical(jt.optimizers.averaged_params(state.opt_state), state.params)


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluation_uses_the_average_only_if_asked(small_classes, evaluate: bool) -> None:
    optimizer = jt.optimizers.average_parameters(SGD, 0.9, evaluate=evaluate)
    state = make_state(optimizer, small_classes)
    state, history = jt.fit(
        state, small_classes, small_classes, loss_fn=LOSS, batch_size=16, epochs=2
    )
    average = jt.optimizers.averaged_params(state.opt_state)
    used = average if evaluate else state.params
    plain = jt.with_optimizer(state.replace(params=used), SGD)
    expected = jt.evaluate(plain, small_classes, LOSS)["loss"]
    assert jt.evaluate(state, small_classes, LOSS)["loss"] == expected
    assert history["test_loss"][-1] == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_array_equal(
        jt.predict(state, small_classes.inputs), jt.predict(plain, small_classes.inputs)
    )
    assert jt.optimizers.averaged_params(plain.opt_state) is None


@pytest.mark.parametrize("evaluate", [True, False])
def test_parameters_that_are_put_in_are_those_that_come_out(
    small_classes, tmp_path, evaluate: bool
) -> None:
    """The average starts anew with them; the next update replaces it, as at the start of a run."""
    torch = pytest.importorskip("torch")
    optimizer = jt.optimizers.average_parameters(SGD, 0.9, evaluate=evaluate)
    state, _ = jt.train_epoch(make_state(optimizer, small_classes), small_classes, LOSS)
    other = jt.init_state(state.model, SGD, small_classes.inputs[:1], key=jax.random.key(7))
    expected = jt.predict(other, small_classes.inputs)
    jt.save(tmp_path / "other", other)
    states = {
        "replace": state.replace(params=other.params),
        "load": jt.load(tmp_path / "other", state),
        "load_torch": jt.export.load_torch(state, jt.export.to_torch(other)),
    }
    for name, put_in in states.items():
        np.testing.assert_array_equal(jt.predict(put_in, small_classes.inputs), expected, name)
        assert_identical(jt.optimizers.averaged_params(put_in.opt_state), other.params)
        jt.save(tmp_path / name, put_in)
        assert (tmp_path / name).read_bytes() == (tmp_path / "other").read_bytes()
        for key, tensor in jt.export.to_torch(put_in).items():
            assert torch.equal(tensor, jt.export.to_torch(other)[key])
        trained, _ = jt.train_step(put_in, small_classes, LOSS)
        assert_identical(jt.optimizers.averaged_params(trained.opt_state), trained.params)
    kept = state.replace(params=other.params, opt_state=state.opt_state)
    assert_identical(kept.opt_state, state.opt_state)


@pytest.mark.parametrize(
    ("optimizer", "weighted"), [(SGD, True), (ADAM, False)], ids=["sgd, weighted", "adam"]
)
def test_accumulated_steps_equal_steps_on_larger_batches(
    small_classes, optimizer, weighted: bool
) -> None:
    """50 examples: 3 batches of 16 and one of 2, or a batch of 32 and one of 18."""
    weights = jnp.linspace(0.0, 2.0, 50) if weighted else None
    data = small_classes.replace(weights=weights)
    ours = make_state(jt.optimizers.accumulate_gradients(optimizer, 2), data)
    theirs = make_state(optimizer, data)
    for _ in range(2):
        ours, _ = jt.train_epoch(ours, data, LOSS, batch_size=16)
        theirs, _ = jt.train_epoch(theirs, data, LOSS, batch_size=32)
    assert_close(ours.params, theirs.params)
    assert (int(ours.step), int(theirs.step)) == (8, 4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_epoch_ends_with_an_update(batch_size: int) -> None:
    """Also an epoch without a partial batch; y = 2 x, by the mean gradient of each update."""
    inputs = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.sgd(0.01), 3)
    model = jt.models.LinearRegression(use_bias=False)
    state = jt.init_state(model, optimizer, inputs, key=jax.random.key(0))
    state = state.replace(params={"weight": jnp.zeros((1, 1))})
    options = {"loss_fn": jt.losses.mean_squared_error, "batch_size": batch_size}
    state, _ = jt.train_epoch(state, (inputs, 2 * inputs), **options)
    weight = 0.0
    for rows in [inputs[:3], inputs[3:]] if batch_size == 1 else [inputs]:
        weight -= 0.01 * np.mean(2 * rows * (weight - 2) * rows)
    assert state.params["weight"].item() == pytest.approx(weight, rel=1e-6)


def test_an_incomplete_accumulation_makes_an_update_at_the_end_of_an_epoch(small_classes) -> None:
    """4 batches by 3: updates of 48 examples and of the last 2."""
    optimizer = jt.optimizers.accumulate_gradients(SGD, 3)
    state = make_state(optimizer, small_classes)
    state, _ = jt.train_epoch(state, small_classes, LOSS, batch_size=16)
    expected = make_state(SGD, small_classes)
    for batch in (small_classes[:48], small_classes[48:]):
        expected, _ = jt.train_step(expected, batch, LOSS)
    assert_close(state.params, expected.params)


def test_steps_alone_update_after_the_given_number(small_classes) -> None:
    state = start = make_state(ACCUMULATING, small_classes)
    state, _ = jt.train_step(state, small_classes[:16], LOSS)
    assert_identical(state.params, start.params)
    state, _ = jt.train_step(state, small_classes[16:32], LOSS)
    expected = make_state(ADAM, small_classes)
    expected, _ = jt.train_step(expected, small_classes[:32], LOSS)
    assert_close(state.params, expected.params)


def test_a_schedule_counts_updates_and_composes_with_an_average_and_skipped_steps(
    small_classes,
) -> None:
    schedule = jt.optimizers.step_lr(0.1, 1, 0.5)
    optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.sgd(schedule), 2)
    optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.average_parameters(optimizer, 0.5))
    state = make_state(optimizer, small_classes)
    state, history = jt.fit(state, small_classes, loss_fn=LOSS, batch_size=16, epochs=2)
    assert history["learning_rate"].tolist() == pytest.approx([0.05, 0.0125])
    assert history["skipped_steps"].tolist() == [0, 0]
    assert jt.optimizers.averaged_params(state.opt_state) is not None


def test_bad_options_are_named() -> None:
    with pytest.raises(
        jt.errors.InputError, match=r"decay is 1\.5; expected a number that is from 0"
    ):
        jt.optimizers.average_parameters(jt.optimizers.sgd(0.1), 1.5)
    with pytest.raises(jt.errors.InputError, match="steps is 0; expected an integer of at least 1"):
        jt.optimizers.accumulate_gradients(jt.optimizers.sgd(0.1), 0)
    with pytest.raises(
        jt.errors.InputError, match="dtype is 'int8'; expected 'bfloat16' or 'float16'"
    ):
        jt.mixed_precision(jt.models.FeedForward(), "int8")


DTYPES: list = []


class Recorder(nn.Module):
    """A network with batch norm that notes the dtypes in which it computes."""

    @nn.compact
    def __call__(self, inputs, train: bool = False):
        x = nn.Dense(8)(inputs)
        x = nn.BatchNorm(use_running_average=not train)(x)
        DTYPES.append(x.dtype)
        return nn.Dense(3)(nn.relu(x))


def test_mixed_precision_computes_in_bfloat16_on_float32_parameters(small_classes) -> None:
    model = jt.mixed_precision(Recorder(), "bfloat16")
    state = jt.init_state(
        model, jt.optimizers.adam(0.01), small_classes.inputs[:1], key=jax.random.key(0)
    )
    DTYPES.clear()
    state, losses = jt.train_epoch(state, small_classes, LOSS, batch_size=16)
    assert set(DTYPES) == {jnp.bfloat16.dtype}
    leaves = jax.tree.leaves((state.params, state.model_state, state.opt_state))
    assert {leaf.dtype.name for leaf in leaves} <= {"float32", "int32"}
    assert losses.dtype == jnp.float32
    assert jt.predict(state, small_classes.inputs).dtype == jnp.float32


def test_mixed_precision_equals_a_cast_by_hand(small_classes) -> None:
    model = jt.models.FeedForward((8, 3), dropout_rate=0.0, mean=0.0, std=1.0)
    state = jt.init_state(
        jt.mixed_precision(model),
        jt.optimizers.sgd(0.1),
        small_classes.inputs[:1],
        key=jax.random.key(0),
    )
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    logits = model.apply({"params": half}, small_classes.inputs.astype(jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        jt.predict(state, small_classes.inputs), logits.astype(jnp.float32), rtol=1e-2, atol=1e-2
    )
