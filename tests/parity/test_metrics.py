"""Every metric against scikit-learn, over random data in batches of random sizes.

60 data sets of each kind; `JAXTRAIN_CASES=1000 make test ARGS=tests/parity/test_metrics.py` tries
1,000.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp
from sklearn import metrics as sk

import jaxtrain as jt

CASES = int(os.environ.get("JAXTRAIN_CASES", "60"))
AVERAGES = ("macro", "micro", "weighted", None)
# Batches of two sizes, so that little is compiled; all divisions of a data set consist of them.
SIZES = (1, 4)


def small_auc(average: str | None) -> Any:
    """Exact for up to 64 examples, as `roc_auc` is for 65,536, and faster to sort."""
    return dataclasses.replace(jt.metrics.roc_auc(average), capacity=(64, 1024))


# How scikit-learn computes each metric of targets, predictions and weights. Its scores of classes
# are 0 where ours are NaN, since "zero_division" would change the averages too.


def class_score(name: str, average: str | None, classes: int) -> Callable[..., Any]:
    def score(true, scores, weights):
        predicted = scores.argmax(axis=1) if classes else scores > 0
        chosen = {} if average or not classes else {"labels": range(classes)}
        if average is None:
            chosen["zero_division"] = np.nan
        function = getattr(sk, f"{name}_score")
        return function(true, predicted, average=average, sample_weight=weights, **chosen)

    return score


def one_area(true, scores, weights):
    if len(set(true[weights > 0])) < 2:
        return np.nan
    return sk.roc_auc_score(true, scores, sample_weight=weights)


def area(average: str | None, classes: int) -> Callable[..., Any]:
    """As `roc_auc_score(multi_class="ovr")`, which refuses absent classes: they are NaN."""

    def score(true, scores, weights):
        if classes:
            others = np.where(np.eye(classes)[:, None], -np.inf, scores.astype(float))
            scores = scores - logsumexp(others, axis=2).T  # log odds, in float64
            true = np.eye(classes, dtype=int)[true]
        if average == "micro":
            return one_area(true.ravel(), scores.ravel(), np.repeat(weights, true.shape[1]))
        each = [one_area(*pair, weights) for pair in zip(true.T, scores.T, strict=True)]
        if average == "weighted":
            support = weights @ true
            kept = support > 0
            return np.average(np.array(each)[kept], weights=support[kept]) if any(kept) else np.nan
        return each if average is None else np.mean(each)

    return score


def r2(true, predictions, weights):
    true, predictions = (x.reshape(len(x), -1).astype(float) for x in (true, predictions))
    if len(true) < 2:
        return np.nan
    scores = sk.r2_score(true, predictions, sample_weight=weights, multioutput="raw_values")
    # Weighted means of equal numbers may be rounded to other numbers.
    constant, exact = np.ptp(true, axis=0) == 0, (true == predictions).all(axis=0)
    return np.where(constant, np.where(exact, 1.0, 0.0), scores).mean()


def of_classes(classes: int) -> dict[str, tuple[Any, Callable[..., Any]]]:
    known = {"labels": range(classes)}
    found: dict[str, tuple[Any, Callable[..., Any]]] = {
        "balanced": (
            jt.metrics.balanced_accuracy,
            lambda t, p, w: sk.balanced_accuracy_score(t, p.argmax(1), sample_weight=w),
        ),
        "confusion": (
            jt.metrics.confusion_matrix,
            lambda t, p, w: sk.confusion_matrix(t, p.argmax(1), sample_weight=w, **known),
        ),
    }
    return found | of_labels(classes)


def of_labels(classes: int = 0) -> dict[str, tuple[Any, Callable[..., Any]]]:
    found = {}
    for average in AVERAGES:
        for name in ("precision", "recall", "f1"):
            ours = getattr(jt.metrics, name)(average)
            found[f"{name} {average}"] = ours, class_score(name, average, classes)
        found[f"auc {average}"] = small_auc(average), area(average, classes)
    return found


def of_binary() -> dict[str, tuple[Any, Callable[..., Any]]]:
    found: dict[str, tuple[Any, Callable[..., Any]]] = {"auc": (small_auc("macro"), one_area)}
    for average in ("binary", *AVERAGES):
        for name in ("precision", "recall", "f1"):
            ours, theirs = getattr(jt.metrics, name)(average), class_score(name, average, 0)
            if average is None:
                theirs = functools.partial(of_both_classes, name)
            found[f"{name} {average}"] = ours, theirs
    return found


def of_both_classes(name: str, true, scores, weights):
    options = {"labels": [0, 1], "average": None, "zero_division": np.nan}
    return getattr(sk, f"{name}_score")(true, scores > 0, sample_weight=weights, **options)


KINDS = {
    "2 classes": of_classes(2),
    "5 classes": of_classes(5),
    "one score": of_binary(),
    "3 labels": of_labels(),
    "1 output": {"r2": (jt.metrics.r2, r2)},
    "2 outputs": {"r2": (jt.metrics.r2, r2)},
}


def draw(kind: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns predictions, targets and weights: with offsets, ties, few examples, constants."""
    examples = random.choice([1, 2, 3, 7, 16, 40])
    size = int(kind[0]) if kind[0].isdigit() else 1
    offset, scale = random.choice([0, 0, 1, -300, 1e6]), random.choice([1, 1, 1e-3, 1e3])
    noise = random.normal(size=(2, examples, size))
    if "output" in kind:
        targets = offset + scale * noise[0]
        predictions = targets + scale * random.choice([0, 0.3, 3]) * noise[1]
        if random.uniform() < 0.2:
            targets[:] = targets[0]
        if size == 1 and random.uniform() < 0.5:
            targets, predictions = targets[:, 0], predictions[:, 0]
    elif "classes" in kind:
        # Not so far from 0 that the roundings of probabilities decide about ties.
        offset = scale * random.choice([0, 0, 1, -30])
        predictions, targets = offset + scale * noise[0], random.integers(0, size, examples)
        targets = np.where(random.uniform(size=examples) < 0.3, random.integers(size), targets)
    else:
        predictions = offset + scale * noise[0]
        targets = (random.uniform(size=predictions.shape) < random.choice([0, 0.3, 0.5])).astype(
            int
        )
        if kind == "one score" and random.uniform() < 0.5:
            targets = targets[:, 0]
    if random.uniform() < 0.5:  # ties: some examples are predicted as others are
        predictions = predictions[random.integers(0, examples, examples)]
    weights = {
        "none": np.ones(examples),
        "some 0": random.integers(0, 3, examples),
        "any": random.uniform(0.1, 2, examples),
    }[random.choice(["none", "some 0", "any"])]
    return (
        predictions.astype(np.float32),
        targets.astype(np.float32) if "output" in kind else targets,
        weights.astype(np.float32),
    )


def parts(examples: int, random: np.random.Generator) -> list[slice]:
    """Returns a division into batches of both sizes, in any order."""
    fours = random.integers(0, examples // 4 + 1)
    sizes = random.permutation([4] * fours + [1] * (examples - 4 * fours))
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_batches_equal_scikit_learns(kind: str) -> None:
    ours = {name: metric for name, (metric, _) in KINDS[kind].items()}
    # Averages differ in `finish` only.
    shared = {name: name.split()[0] for name in ours}
    updated = {short: ours[name] for name, short in shared.items()}

    @jax.jit
    def update(totals, predictions, targets, weights):
        return {
            name: metric.update(totals and totals[name], predictions, targets, weights)
            for name, metric in updated.items()
        }

    @jax.jit
    def finish(totals):
        return {name: metric.finish(totals[shared[name]]) for name, metric in ours.items()}

    for case in range(CASES):
        random = np.random.default_rng(case)
        predictions, targets, weights = draw(kind, random)
        exists = weights > 0
        shown = [
            np.where(exists.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0)
            for x in (predictions, targets)
        ]
        arrays = (*shown, weights)
        shapes = jax.eval_shape(update, None, *(x[:1] for x in arrays))
        totals = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        for part in parts(len(weights), random):
            totals = update(totals, *(x[part] for x in arrays))
        found = finish(totals)
        if not exists.any():
            assert all(np.isnan(x).all() for name, x in found.items() if name != "confusion")
            continue
        kept = [x[exists] for x in (targets, predictions, weights)]
        if kind == "one score":
            kept = [x.ravel() for x in kept]
        for name, (_, theirs) in KINDS[kind].items():
            with warnings.catch_warnings(action="ignore"):
                expected = theirs(*kept)
            # R² subtracts from 1 what may be large.
            tolerance = 2e-5 * max(1, abs(1 - expected)) if name == "r2" else 2e-6
            np.testing.assert_allclose(
                found[name], expected, rtol=2e-6, atol=tolerance, err_msg=f"{name}, case {case}"
            )


IDENTITY = jt.Model(  # its predictions are its inputs
    lambda key, inputs: ({"w": jnp.zeros(())}, {}),
    lambda params, state, inputs, *, train, key: (inputs, state),
)


def no_loss(predictions, targets):
    return jnp.zeros(len(predictions))


def evaluated(predictions, data, metrics, batch_size):
    state = jt.init_state(IDENTITY, optax.sgd(0.1), predictions[:1], key=jax.random.key(0))
    return jt.evaluate(state, data, no_loss, metrics, batch_size=batch_size)


@pytest.mark.parametrize("kind", ["5 classes", "one score", "3 labels", "1 output"])
def test_evaluation_of_padded_data_equals_scikit_learns(kind: str) -> None:
    """NaN and labels that are no classes, of weight 0, in memory and as a stream."""
    for case in range(max(1, CASES // 100)):
        random = np.random.default_rng(case)
        predictions, targets, weights = draw(kind, random)
        padding = random.uniform(size=len(weights)) < 0.3
        padding[0] = False
        weights = np.where(padding, 0, weights + 0.5).astype(np.float32)
        mask = [padding.reshape((-1,) + (1,) * (x.ndim - 1)) for x in (predictions, targets)]
        wrong = np.nan if "output" in kind else -3
        data = jt.Dataset(
            np.where(mask[0], np.float32("nan"), predictions),
            np.where(mask[1], wrong, targets).astype(targets.dtype),
            weights,
        )
        names = {"balanced", "confusion", "auc", "auc macro", "f1 macro", "f1 binary", "r2"}
        names &= set(KINDS[kind])
        chosen = {name: KINDS[kind][name][0] for name in names}
        kept = [x[~padding] for x in (targets, predictions, weights)]
        if kind == "one score":
            kept = [x.ravel() for x in kept]
        middle = len(weights) * 2 // 3 + 1
        for dataset in (data, [data[:middle], data[middle:]] if middle < len(weights) else data):
            found = evaluated(predictions, dataset, chosen, 40)
            for name in names:
                with warnings.catch_warnings(action="ignore"):
                    expected = KINDS[kind][name][1](*kept)
                tolerance = 2e-5 * max(1, abs(1 - expected)) if name == "r2" else 2e-6
                np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "tolerance"),
    [("random", 1e-6), ("by score", 1e-6), ("by label", 1e-6), ("from the outside in", 3e-5)],
)
def test_the_area_of_a_million_examples(order: str, tolerance: float) -> None:
    """Of which 65,536 are kept."""
    random = np.random.default_rng(0)
    labels = (random.uniform(size=10**6) < 0.3).astype(np.int32)
    scores = (random.normal(size=10**6) + labels).astype(np.float32)
    weights = random.uniform(0.1, 2, 10**6).astype(np.float32)
    at = {
        "random": slice(None),
        "by score": np.argsort(scores),
        "by label": np.argsort(labels, kind="stable"),
        "from the outside in": np.argsort(-np.abs(scores)),
    }[order]
    data = jt.Dataset(scores[at], labels[at], weights[at])
    found = evaluated(scores, data, {"auc": jt.metrics.roc_auc()}, 10_000)["auc"]
    expected = sk.roc_auc_score(labels, scores, sample_weight=weights)
    assert found == pytest.approx(expected, abs=tolerance)
