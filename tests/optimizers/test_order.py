"""The library's wrappers in any order, against a loop written by hand on a linear model."""

from __future__ import annotations

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtrain as jt

# All pairs on many cases: JAXTRAIN_CASES=1000 make test ARGS=tests/optimizers/test_order.py
CASES = int(os.environ.get("JAXTRAIN_CASES", "30"))
RATE, NORM, DECAY, STEPS, BATCH_SIZE, EPOCHS = 0.1, 1.0, 0.6, 3, 2, 2
# With these, an observation that is the second one without improvement halves the rate.
PLATEAU = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=1e-4)
LOSS = jt.losses.mean_squared_error
MODEL = jt.Model(
    lambda key, x: ({"w": jnp.zeros(2)}, {}), lambda p, s, x, *, train, key: (x @ p["w"], s)
)
WRAPPERS = {
    "skip": jt.optimizers.skip_nonfinite,
    "accumulate": lambda optimizer: jt.optimizers.accumulate_gradients(optimizer, STEPS),
    "average": lambda optimizer: jt.optimizers.average_parameters(optimizer, DECAY),
    "clip": lambda optimizer: jt.optimizers.clip_gradients(optimizer, NORM),
    "record": jt.optimizers.record_gradient_norm,
    "plateau": lambda optimizer: optax.chain(optimizer, PLATEAU),
}
REFUSED = {("accumulate", "skip"), ("plateau", "skip"), ("plateau", "average")}
PAIRS = [pair for pair in itertools.permutations(WRAPPERS, 2) if pair not in REFUSED]
# From the outermost to the innermost. Together they have each pair in both orders.
ORDERS = [
    ("skip", "average", "accumulate", "clip", "record", "plateau"),
    ("record", "clip", "skip", "accumulate", "average", "plateau"),
    ("average", "skip", "accumulate", "plateau", "record", "clip"),
    ("average", "clip", "plateau", "accumulate", "record"),
]
if "JAXTRAIN_CASES" in os.environ:
    ORDERS += PAIRS


def wrapped(order, optimizer):
    for name in reversed(order):
        optimizer = WRAPPERS[name](optimizer)
    return optimizer


def test_the_orders_have_all_pairs() -> None:
    found = {pair for order in ORDERS for pair in itertools.combinations(order, 2)}
    assert found == set(PAIRS)


def train(order, case):
    state = jt.init_state(
        MODEL, wrapped(order, jt.optimizers.sgd(RATE)), case.inputs[:1], key=jax.random.key(0)
    )
    for _ in range(EPOCHS):
        state, _ = jt.train_epoch(state, case, LOSS, batch_size=BATCH_SIZE)
    recorded = {name: each.value for name, each in jt.optimizers.records(state.opt_state).items()}
    return {"w": state.params["w"], "average": state.evaluation_params["w"], **recorded}


class Plateau:
    """The rule of optax, with the settings above."""

    def __init__(self) -> None:
        self.best, self.waited, self.scale = np.inf, 0, 1.0

    def observe(self, loss: float) -> None:
        if loss < (1 - 1e-4) * self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        if self.waited == 2:
            self.scale, self.waited = self.scale / 2, 0


def by_hand(order, inputs, targets, weights):
    """Returns what `train` does, in NumPy."""
    w = average = np.zeros(2)
    plateau, norm, skipped, updates, count, group = Plateau(), 0.0, 0, 0, 0, []
    splits = [order.index(name) for name in ("accumulate", "skip") if name in order]
    split = splits[0] if splits else 0
    steps = STEPS if "accumulate" in order else 1
    starts = range(0, len(inputs), BATCH_SIZE)
    for start in [*starts] * EPOCHS:
        x, y, weight = (a[start : start + BATCH_SIZE] for a in (inputs, targets, weights))
        error, total = x @ w - y, weight.sum()
        loss, gradient = weight @ error**2 / total, 2 * (weight * error) @ x / total
        is_bad = "skip" in order and not np.isfinite(loss + gradient.sum())
        for position, name in enumerate(order[:split]):
            if name == "clip":
                gradient = gradient * min(1, NORM / (np.linalg.norm(gradient) + 1e-6))
            elif name == "record" and not (is_bad and "skip" in order[:position]):
                norm = np.linalg.norm(gradient)
            elif name == "plateau":
                plateau.observe(loss)
        skipped, count = skipped + is_bad, count + 1
        if not is_bad:
            group.append((total, loss, gradient))
        if count < steps and start != starts[-1]:
            continue
        if group:
            total = sum(each[0] for each in group)
            loss, gradient = (sum(each[0] * each[i] for each in group) / total for i in (1, 2))
            for name in order[split:]:
                if name == "clip":
                    gradient = gradient * min(1, NORM / (np.linalg.norm(gradient) + 1e-6))
                elif name == "record":
                    norm = np.linalg.norm(gradient)
                elif name == "plateau":
                    plateau.observe(loss)
            w = w - RATE * plateau.scale * gradient
            average = average + (1 - DECAY) * (w - average) if updates else w
            updates += 1
        count, group = 0, []
    found = {"w": w, "average": average if "average" in order else w}
    found |= {"skipped_steps": skipped} if "skip" in order else {}
    found |= {"learning_rate": RATE * plateau.scale}
    return found | ({"gradient_norm": norm} if "record" in order else {})


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_wrappers_compose_as_in_a_loop_by_hand(order) -> None:
    """Weighted batches, a partial last one, updates across which an epoch ends, and NaN."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(CASES, 13, 2))
    targets = inputs @ random.normal(size=2) + random.normal(size=(CASES, 13))
    weights = random.uniform(0.5, 2, size=(CASES, 13))
    if "skip" in order:
        targets[random.uniform(size=targets.shape) < random.choice([0, 0.1, 0.5])] = np.nan
    with jax.enable_x64(True):
        cases = jt.Dataset(*map(jnp.asarray, (inputs, targets, weights)))
        found = jax.jit(jax.vmap(lambda case: train(order, case)))(cases)
    for index in range(CASES):
        expected = by_hand(order, inputs[index], targets[index], weights[index])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            message = f"{name} of case {index}"
            np.testing.assert_allclose(found[name][index], value, rtol=1e-9, err_msg=message)


def test_the_last_update_of_an_epoch_is_made_without_a_bad_batch() -> None:
    """The weight is 0.03 after the examples 1 to 4; 5 to 7 add 0.001 · 2 · 36.67 · 1.97."""
    model = jt.Model(
        lambda key, x: ({"w": jnp.zeros(())}, {}), lambda p, s, x, *, train, key: (p["w"] * x, s)
    )
    inputs = jnp.arange(1.0, 9.0)
    optimizer = jt.optimizers.accumulate_gradients(jt.optimizers.sgd(1e-3), 4)
    optimizer = jt.optimizers.skip_nonfinite(optimizer)
    state = jt.init_state(model, optimizer, inputs[:1], key=jax.random.key(0))
    data = jt.Dataset(inputs.at[7].set(jnp.nan), 2 * inputs)
    state, _ = jt.train_epoch(state, data, LOSS, batch_size=1)
    assert float(state.params["w"]) == pytest.approx(0.174466667, rel=1e-6)


def test_an_update_that_overflows_is_skipped_with_all_of_its_batches() -> None:
    """Each gradient is finite; Adam's square of their mean is not. The next update is normal."""
    adam = jt.optimizers.adam(0.1)
    optimizer = wrapped(("skip", "average", "accumulate"), adam)
    params, large, small = jnp.zeros(2), jnp.array([1e20, 1.0]), jnp.ones(2)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in [large] * STEPS + [small] * STEPS:
        updates, state = update(gradient, state, params)
    expected, inner = adam.update(small, adam.init(params), params)
    np.testing.assert_allclose(updates, expected)
    np.testing.assert_allclose(jt.optimizers.averaged_params(state), expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner.inner.inner.inner, inner)
    assert jt.optimizers.records(state)["skipped_steps"].value == 1


SGD = jt.optimizers.sgd(0.1)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (wrapped(("accumulate", "skip"), SGD), r"expected skip_nonfinite\(accumulate_gradients"),
        (
            wrapped(("average", "accumulate", "clip", "skip"), SGD),
            r"expected skip_nonfinite\(accumulate_gradients",
        ),
        (
            optax.MultiSteps(WRAPPERS["skip"](SGD), 2).gradient_transformation(),
            "a bad batch removes others",
        ),
        (
            optax.named_chain(("sgd", WRAPPERS["skip"](SGD)), ("plateau", PLATEAU)),
            r"expected skip_nonfinite\(optax.chain\(...\)\)",
        ),
        (wrapped(("plateau", "skip"), SGD), r"expected skip_nonfinite\(optax.chain\(...\)\)"),
        (wrapped(("plateau", "record", "average"), SGD), r"expected average_parameters\(optax.ch"),
        (
            wrapped(("skip", "plateau", "accumulate"), SGD),
            r"expected skip_nonfinite\(accumulate_gradients\(optax.chain",
        ),
        (wrapped(("accumulate", "clip", "accumulate"), SGD), "with the product of the steps"),
        (WRAPPERS["accumulate"](jt.optimizers.lbfgs()), r"line search \(L-BFGS\) is inside"),
        (
            optax.partition(
                {"a": WRAPPERS["average"](SGD), "b": SGD}, {"first": "a", "second": "b"}
            ),
            r"expected it around the complete optimizer",
        ),
    ],
)
def test_other_orders_are_refused_by_name_of_one_that_works(optimizer, message) -> None:
    model = jt.Model(
        lambda key, x: ({"first": jnp.zeros(()), "second": jnp.zeros(())}, {}),
        lambda p, s, x, *, train, key: (x, s),
    )
    with pytest.raises(jt.errors.InputError, match=message):
        jt.init_state(model, optimizer, jnp.zeros((1, 2)), key=jax.random.key(0))
