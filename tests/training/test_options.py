"""Averaged parameters, accumulated gradients and half precision, in every way to train."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt
from tests.checkpoint.helpers import assert_identical
from tests.training.test_resume import assert_same_run, fit

LOSS = jt.losses.cross_entropy


def make_state(optimizer, data: jt.Dataset, dropout_rate: float = 0.0) -> jt.TrainState:
    model = jt.models.FeedForward((8, 3), dropout_rate=dropout_rate, mean=0.0, std=1.0)
    return jt.init_state(model, optimizer, data.inputs[:1], key=jax.random.key(0))


def assert_close(ours, theirs, rtol=1e-6, atol=1e-6) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def averaged(decay: float = 0.9, *, evaluate: bool = True):
    return jt.optimizers.average_parameters(
        jt.optimizers.sgd(0.1, momentum=0.9), decay, evaluate=evaluate
    )


def accumulating(steps: int = 2):
    return jt.optimizers.accumulate_gradients(jt.optimizers.adam(0.01), steps)


@pytest.mark.parametrize("make", [averaged, accumulating])
def test_options_resume_bit_identically(tmp_path, small_classes, make) -> None:
    state = make_state(make(), small_classes, dropout_rate=0.2)
    straight = fit(state, small_classes, None, epochs=4)
    fit(state, small_classes, tmp_path, epochs=2)
    assert_same_run(fit(state, small_classes, tmp_path, epochs=4), straight)


@pytest.mark.parametrize("make", [averaged, accumulating])
def test_a_run_of_train_has_the_bits_of_fit(small_classes, make) -> None:
    state = make_state(make(), small_classes, dropout_rate=0.2)
    options = {"loss_fn": LOSS, "batch_size": 16, "epochs": 2, "key": jax.random.key(1)}
    ours, history = jt.train(state, small_classes, small_classes, **options)
    theirs, expected = jt.fit(state, small_classes, small_classes, **options)
    if make is accumulating:  # XLA compiles the last step of an epoch in another way
        assert_close(ours.params, theirs.params)
        return
    assert_identical(ours, theirs)
    np.testing.assert_array_equal(history["test_loss"], expected["test_loss"].astype(np.float32))


@pytest.mark.parametrize("make", [averaged, accumulating])
def test_runs_with_options_may_be_vmapped(small_classes, make) -> None:
    def run(seed):
        state = make_state(make(), small_classes)
        state = state.replace(key=jax.random.key(seed))
        return jt.train(
            state, small_classes, loss_fn=LOSS, batch_size=16, epochs=2, key=jax.random.key(seed)
        )[0].params

    together = jax.vmap(run)(jnp.arange(3))
    for seed in range(3):
        assert_close(jax.tree.map(lambda leaf, i=seed: leaf[i], together), run(seed), atol=1e-5)


def test_the_average_equals_that_of_pytorch(small_classes) -> None:
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from benchmarks import torch_reference

    state = make_state(averaged(), small_classes)
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
    state, _ = jt.train_step(make_state(averaged(), small_classes), small_classes[:16], LOSS)
    assert_close(jt.optimizers.averaged_params(state.opt_state), state.params, 0, 0)


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluation_uses_the_average_only_if_asked(small_classes, evaluate: bool) -> None:
    state = make_state(averaged(evaluate=evaluate), small_classes)
    state, history = jt.fit(
        state, small_classes, small_classes, loss_fn=LOSS, batch_size=16, epochs=2
    )
    average = jt.optimizers.averaged_params(state.opt_state)
    used = average if evaluate else state.params
    plain = jt.with_optimizer(state.replace(params=used), optax.sgd(0.1))
    expected = jt.evaluate(plain, small_classes, LOSS)["loss"]
    assert jt.evaluate(state, small_classes, LOSS)["loss"] == expected
    assert history["test_loss"][-1] == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_array_equal(
        jt.predict(state, small_classes.inputs), jt.predict(plain, small_classes.inputs)
    )
    assert jt.optimizers.averaged_params(plain.opt_state) is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_steps_equal_steps_on_larger_batches(
    small_classes, optimizer: str, weighted: bool
) -> None:
    """50 examples: 3 batches of 16 and one of 2, or a batch of 32 and one of 18."""
    data = small_classes
    if weighted:
        data = data.replace(weights=jnp.linspace(0.0, 2.0, 50))
    inner = jt.optimizers.make(optimizer, 0.05)
    options = {"loss_fn": LOSS, "key": jax.random.key(1), "epochs": 3}
    ours, _ = jt.train(
        make_state(jt.optimizers.accumulate_gradients(inner, 2), data),
        data,
        batch_size=16,
        **options,
    )
    theirs, _ = jt.train(make_state(inner, data), data, batch_size=32, **options)
    assert_close(ours.params, theirs.params)
    assert (int(ours.step), int(theirs.step)) == (12, 6)


def test_an_incomplete_accumulation_makes_an_update_at_the_end_of_an_epoch(small_classes) -> None:
    """4 batches by 3: updates of 48 examples and of the last 2."""
    optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.sgd(0.05), 3)
    state, _ = jt.train_epoch(
        make_state(optimizer, small_classes), small_classes, LOSS, batch_size=16
    )
    expected = make_state(jt.optimizers.sgd(0.05), small_classes)
    expected, _ = jt.train_step(expected, small_classes[:48], LOSS)
    expected, _ = jt.train_step(expected, small_classes[48:], LOSS)
    assert_close(state.params, expected.params)


def test_steps_alone_update_after_the_given_number(small_classes) -> None:
    state = start = make_state(accumulating(2), small_classes)
    state, _ = jt.train_step(state, small_classes[:16], LOSS)
    assert_close(state.params, start.params, 0, 0)
    state, _ = jt.train_step(state, small_classes[16:32], LOSS)
    expected = make_state(jt.optimizers.adam(0.01), small_classes)
    expected, _ = jt.train_step(expected, small_classes[:32], LOSS)
    assert_close(state.params, expected.params)


def test_a_schedule_counts_the_updates_of_accumulated_gradients(small_classes) -> None:
    schedule = jt.optimizers.step_lr(0.1, 1, 0.5)
    optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.sgd(schedule), 2)
    _, history = jt.fit(
        make_state(optimizer, small_classes), small_classes, loss_fn=LOSS, batch_size=16, epochs=2
    )
    assert history["learning_rate"].tolist() == pytest.approx([0.05, 0.0125])


def test_an_average_of_accumulated_gradients_and_skipped_steps_composes(small_classes) -> None:
    optimizer = jt.optimizers.skip_nonfinite(jt.optimizers.average_parameters(accumulating(2), 0.5))
    state, history = jt.fit(
        make_state(optimizer, small_classes), small_classes, loss_fn=LOSS, batch_size=16, epochs=2
    )
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


def test_networks_of_this_library_compute_pixels_in_half_precision_too(small_classes) -> None:
    pixels = jnp.zeros((4, 6), jnp.uint8)
    model = jt.models.FeedForward((8, 3))
    params = model.init(jax.random.key(0), pixels)["params"]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert model.apply({"params": half}, pixels).dtype == jnp.bfloat16


def test_mixed_precision_trains_as_well_on_digits(digits: jt.data.Resolved) -> None:
    mean, std = jt.data.STATISTICS["digits"]
    network = jt.models.FeedForward(mean=mean, std=std)

    def accuracy(model) -> float:
        state = jt.init_state(
            model,
            jt.optimizers.sgd(0.05, momentum=0.9),
            digits.train.inputs[:1],
            key=jax.random.key(0),
        )
        _, history = jt.train(
            state,
            digits.train,
            digits.test,
            loss_fn=LOSS,
            metric_fns={"accuracy": jt.metrics.accuracy},
            epochs=10,
            key=jax.random.key(1),
        )
        return float(history["test_accuracy"][-1])

    assert accuracy(jt.mixed_precision(network)) == pytest.approx(accuracy(network), abs=0.02)


def test_frozen_parameters_stay_and_the_others_train(small_classes) -> None:
    """The recipe of the guide."""

    def label(params):
        return {name: "frozen" if name == "Dense_0" else "trained" for name in params}

    optimizer = optax.partition(
        {"trained": jt.optimizers.adam(0.01), "frozen": optax.set_to_zero()}, label
    )
    start = make_state(optimizer, small_classes)
    state, _ = jt.train_epoch(start, small_classes, LOSS, batch_size=16)
    assert_close(state.params["Dense_0"], start.params["Dense_0"], 0, 0)
    assert np.abs(state.params["Dense_1"]["weight"] - start.params["Dense_1"]["weight"]).max() > 0
