"""Dataset: splitting and slicing, and the bundled digits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt


@pytest.mark.parametrize(("examples", "fraction"), [(2, 0.5), (60, 0.05), (61, 0.7)])
def test_a_split_contains_every_example_once(examples: int, fraction: float) -> None:
    data = jt.Dataset(np.arange(examples)[:, None], -np.arange(examples))
    rest, held_out = data.split(fraction, jax.random.key(0))
    assert len(held_out) == round(examples * fraction)
    together = np.concatenate([rest.targets, held_out.targets])
    np.testing.assert_array_equal(np.sort(-together), np.arange(examples))
    for part in (rest, held_out):
        np.testing.assert_array_equal(part.inputs[:, 0], -part.targets)
        assert (np.diff(part.inputs[:, 0]) > 0).all()  # the order is kept


def test_the_representation_has_shapes_in_place_of_values() -> None:
    labels = np.arange(3, dtype=np.int64)
    data = jt.Dataset({"pixels": jnp.ones((3, 8, 8)), "scale": jnp.ones(3)}, labels)
    expected = "Dataset(inputs={pixels: float32[3,8,8], scale: float32[3]}, targets=int64[3])"
    assert repr(data) == expected
    assert repr(jt.Dataset(labels, weights=labels)) == "Dataset(inputs=int64[3], weights=int64[3])"


def test_the_representation_shows_what_is_not_an_array_yet() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"size": [1.0, 2.0], "price": ["a", "b"]})
    data = jt.Dataset(frame[["size"]], frame["price"])
    assert repr(data) == "Dataset(inputs=pandas.DataFrame, targets=pandas.Series)"
    assert repr(jt.Dataset([1, 2.5], {"a": "x"})) == "Dataset(inputs=[1, 2.5], targets={a: str})"
    assert len(repr(jt.Dataset(list(range(10**5))))) < 500
    for inputs in ([1, 2], {}, 3.0):
        with pytest.raises(jt.errors.InputError, match="expected"):
            len(jt.Dataset(inputs))


def test_a_split_refuses_unequal_lengths_and_empty_parts() -> None:
    key = jax.random.key(0)
    message = r"inputs has 50 examples and dataset\.targets has 40"
    with pytest.raises(jt.errors.InputError, match=message):
        jt.Dataset(jnp.arange(50), jnp.arange(40)).split(0.2, key)
    with pytest.raises(jt.errors.InputError, match="leaves at least one example in each part"):
        jt.Dataset(jnp.arange(50)).split(0.005, key)
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(jt.errors.InputError, match=f"fraction is {fraction}"):
            jt.Dataset(jnp.arange(50)).split(fraction, key)


def test_the_key_determines_the_split() -> None:
    data = jt.Dataset(jnp.arange(100), jnp.arange(100))
    parts = [np.asarray(data.split(0.3, jax.random.key(seed))[1].inputs) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(parts[0], parts[1])
    assert (parts[0] != parts[2]).any()


def test_digits_are_those_of_scikit_learn_scaled_to_28_by_28(digits: jt.data.Resolved) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert len(digits.train) + len(digits.test) == len(bunch.images) == 1797
    images = np.concatenate([digits.train.inputs, digits.test.inputs])
    labels = np.concatenate([digits.train.targets, digits.test.targets])
    assert images.shape[1:] == (28, 28)
    assert images.dtype == np.uint8
    # Each pixel of the original is a block of 3 × 3, its grey level 0 … 16 scaled to 0 … 255.
    small = np.rint(images[:, 3:27:3, 3:27:3] * (16 / 255)).astype(int)
    originals = [image.tobytes() for image in bunch.images.astype(int)]
    label_of = dict(zip(originals, bunch.target, strict=True))
    assert [label_of[image.tobytes()] for image in small] == labels.tolist()
    assert np.abs(np.bincount(digits.test.targets) - 36).max() <= 1


def test_a_dataset_is_sliced_and_counted_like_an_array() -> None:
    inputs = {"image": jnp.arange(12).reshape(6, 2), "age": np.arange(6)}
    data = jt.Dataset(inputs, jnp.arange(6), jnp.arange(6.0))
    assert len(data) == 6
    part = data[1:3]
    assert len(part) == 2
    np.testing.assert_array_equal(part.inputs["age"], [1, 2])
    np.testing.assert_array_equal(part.weights, [1, 2])
    assert data[:2].replace(targets=None).targets is None
    assert len(jt.Dataset(inputs).take(jnp.array([5, 0, 0]))) == 3
    with pytest.raises(jt.errors.InputError, match=r"the index is 3; expected a slice"):
        data[3]
