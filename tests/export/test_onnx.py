"""A model as an ONNX file gives the outputs of `predict` in onnxruntime."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain as jt

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 12, 12), dtype=np.uint8)


def state_of(model) -> jt.TrainState:
    return jt.init_state(model, jt.optimizers.adam(0.01), IMAGES[:1], key=jax.random.key(0))


def run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    (inputs,) = session.get_inputs()
    assert (inputs.type, inputs.shape) == ("tensor(uint8)", ["B", 12, 12])
    return session.run(None, {inputs.name: images})[0]


class Convolutions(nn.Module):
    """Has strides, batch statistics and both kinds of pooling."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (3, 3), strides=2)(images[..., None].astype(jnp.float32) / 255)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Recurrent(nn.Module):
    """Reads an image row by row."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(nn.RNN(nn.LSTMCell(5))(images.astype(jnp.float32) / 255)[:, -1])


class Counting(nn.Module):
    """Needs the number of examples as an integer, which is symbolic in an export."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(len(images), -1) / 255)


MODELS = {
    "T2": jt.models.FeedForward(),
    "CNN": Convolutions(),
    "LSTM": Recurrent(),
    "len": Counting(),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_onnxruntime_gives_the_outputs_of_predict(tmp_path: Path, model) -> None:
    state = state_of(model)
    statistics = jax.tree.map(lambda leaf: leaf + 0.5, state.model_state)  # of a trained model
    state = state.replace(model_state=statistics)
    jt.export.onnx(state, tmp_path / "model.onnx", IMAGES[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    for count in (1, 7, 100):
        found = run(tmp_path / "model.onnx", IMAGES[:count])
        np.testing.assert_allclose(found, jt.predict(state, IMAGES[:count]), atol=1e-5, rtol=1e-5)


def test_processing_before_and_after_the_model_is_in_the_file(tmp_path: Path) -> None:
    state = state_of(jt.models.FeedForward((8, 3)))
    jt.export.onnx(
        state,
        tmp_path / "model.onnx",
        IMAGES[:1],
        preprocess=lambda images: 255 - images,
        postprocess=jax.nn.softmax,
    )
    expected = jax.nn.softmax(jt.predict(state, 255 - IMAGES[:7]))
    np.testing.assert_allclose(run(tmp_path / "model.onnx", IMAGES[:7]), expected, atol=1e-5)


def test_the_opset_and_the_names_are_as_asked(tmp_path: Path) -> None:
    import onnx

    state, path = state_of(jt.models.FeedForward((8, 3))), tmp_path / "model.onnx"
    options: Any = {"opset": 18, "input_names": ["images"], "output_names": ["scores"]}
    jt.export.onnx(state, path, IMAGES[:1], **options)
    assert [each.version for each in onnx.load(path).opset_import if not each.domain] == [18]
    session = onnxruntime.InferenceSession(path)
    (scores,) = session.run(["scores"], {"images": IMAGES[:7]})
    np.testing.assert_allclose(scores, jt.predict(state, IMAGES[:7]), atol=1e-5, rtol=1e-5)
    for wrong in ({"input_names": ["a", "b"]}, {"output_names": []}, {"opset": 0}):
        (name,) = wrong
        with pytest.raises(jt.errors.InputError, match=rf"{name} is .*; expected ") as raised:
            jt.export.onnx(state, path, IMAGES[:1], **options | wrong)
        assert raised.value.argument == name


def test_outputs_may_be_nan_where_those_of_jax_are(tmp_path: Path) -> None:
    state = state_of(jt.models.FeedForward((8, 3)))
    path = tmp_path / "model.onnx"
    jt.export.onnx(state, path, IMAGES[:1], postprocess=lambda x: jnp.log(-1 - jnp.abs(x)))
    assert np.isnan(run(path, IMAGES[:3])).all()


def test_a_conversion_that_mixes_up_examples_is_refused(tmp_path: Path, monkeypatch) -> None:
    import jax2onnx

    convert = jax2onnx.to_onnx
    monkeypatch.setattr(
        jax2onnx,
        "to_onnx",
        lambda f, specs, **options: convert(lambda *x: [y - y + y[:1] for y in f(*x)], specs),
    )
    state = state_of(jt.models.FeedForward((8, 3)))
    with pytest.raises(
        jt.errors.InputError, match=r"the ONNX model differs from that in JAX by 0\.\d+; "
    ):
        jt.export.onnx(state, tmp_path / "model.onnx", IMAGES[:3])
    assert not list(tmp_path.iterdir())


class Noisy(nn.Module):
    """Draws random numbers, which jax2onnx does not convert."""

    @nn.compact
    def __call__(self, images):
        noise = jax.random.normal(jax.random.key(0), (1, *images.shape[1:]))
        return nn.Dense(3)((images + noise).reshape(images.shape[0], -1))


def test_a_model_that_cannot_be_converted_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(
        jt.errors.InputError, match=r"jax2onnx cannot convert the model: .*; use jaxtrain"
    ):
        jt.export.onnx(state_of(Noisy()), path, IMAGES[:1])
    state = state_of(jt.models.FeedForward((8, 3)))
    with pytest.raises(
        jt.errors.InputError, match=r"inputs.0 is a str; expected a NumPy or JAX array"
    ):
        jt.export.onnx(state, path, ["image.png"])
    with pytest.raises(
        jt.errors.InputError, match=r"cannot be exported \(inputs has uint8\[B,5\]\): "
    ):
        jt.export.onnx(state, path, IMAGES[:1, 0, :5])
    assert not list(tmp_path.iterdir())


def attributes() -> dict[tuple[str, str, str], Any]:
    """The functions, classes and primitives in JAX's and Flax's modules and classes."""
    return {
        (module_name, owner.__name__, name): value
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] in ("jax", "flax")
        for owner in [module, *(each for each in vars(module).values() if isinstance(each, type))]
        for name, value in vars(owner).items()
        if callable(value) or name.endswith("_p")
    }


def test_an_export_leaves_the_process_as_it_is(tmp_path: Path, capfd) -> None:
    """jax2onnx replaces functions of JAX and Flax, some of them when it is imported."""
    state = state_of(jt.models.FeedForward((8, 3)))
    root = logging.getLogger()
    logs = list(root.handlers), root.level, root.manager.disable
    before = attributes()
    jt.export.onnx(state, tmp_path / "model.onnx", IMAGES[:1])
    after = attributes()
    assert not {place for place in before if after.get(place) is not before[place]}
    for place, value in after.items():
        assert not str(getattr(value, "__module__", "")).startswith("jax2onnx"), place
    assert not hasattr(jnp, "cumsum_p")
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), root.level, root.manager.disable) == logs


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="types are checked before")
def test_a_path_that_is_not_one_is_named_before_the_model_is_traced() -> None:
    def fail(images: object) -> None:
        raise AssertionError("traced")

    state = state_of(jt.models.FeedForward((8, 3)))
    with pytest.raises(jt.errors.InputError, match="path is 3; expected a path"):
        jt.export.onnx(state, 3, IMAGES[:1], preprocess=fail)
