"""A model as a StableHLO file predicts the same in a process that has JAX alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import jaxtrain as jt

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 12, 12), dtype=np.uint8)
# Predicts for several numbers of examples with JAX alone, and saves the outputs.
BARE = """
import sys
import jax, jax.export
import numpy as np
images = np.load("images.npy")
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    np.savez(name + ".npz", **{str(n): exported.call(images[:n]) for n in (1, 7, 40)})
    assert exported.platforms == ("cpu", "cuda"), exported.platforms
assert not {"jaxtrain", "flax", "optax"} & set(sys.modules)
"""


class Convolutions(nn.Module):
    """Has strides, overlapping and other pooling, and batch statistics."""

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Conv(4, (3, 3))(images[..., None].astype(jnp.float32) / 255)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x))
        x = nn.max_pool(x, (3, 3), padding="SAME")
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Recurrent(nn.Module):
    """Reads an image row by row."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(5))(images.astype(jnp.float32) / 255)[:, -1])


class Nnx(nnx.Module):
    """A convolution and a normalization in NNX."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.convolution = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, images):
        x = self.norm(self.convolution(images[..., None].astype(jnp.float32) / 255))
        return self.dense(x.mean(axis=(1, 2)))


class Equinox(eqx.Module):
    """One image per call, as is usual in Equinox."""

    convolution: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    dense: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(1))
        self.convolution = eqx.nn.Conv2d(1, 4, 3, key=keys[0])
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.dense = eqx.nn.Linear(100, 3, key=keys[1])

    def __call__(self, image):
        return self.dense(self.pool(self.convolution(image[None] / 255)).reshape(-1))


MODELS = {
    "feed forward": lambda: jt.models.FeedForward((8, 3)),
    "convolutions": Convolutions,
    "recurrent": Recurrent,
    "nnx": Nnx,
    "equinox": Equinox,
    "bfloat16": lambda: jt.mixed_precision(Convolutions(), "bfloat16"),
}


def trained(model, inputs=IMAGES) -> jt.TrainState:
    optimizer = jt.optimizers.average_parameters(jt.optimizers.adam(0.01), 0.9)
    state = jt.init_state(model, optimizer, inputs[:1], key=jax.random.key(0))
    data = jt.Dataset(inputs, np.arange(len(inputs)) % 3)
    return jt.train_epoch(state, data, jt.losses.cross_entropy, batch_size=20)[0]


@pytest.fixture(scope="module")
def states() -> dict[str, jt.TrainState]:
    """A trained state of each model."""
    return {name: trained(make()) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def state(states) -> jt.TrainState:
    """A small network."""
    return states["feed forward"]


@pytest.fixture(scope="module")
def folder(states, tmp_path_factory) -> Path:
    """The files of all models, and what a process without jaxtrain predicts with them."""
    path = tmp_path_factory.mktemp("models")
    for name, state in states.items():
        jt.export.stablehlo(state, path / name, IMAGES[:1])
    np.save(path / "images.npy", IMAGES)
    subprocess.run([sys.executable, "-c", BARE, *states], cwd=path, check=True)
    return path


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """The file of the small network."""
    return folder / "feed forward"


@pytest.mark.parametrize("name", MODELS)
def test_a_process_without_jaxtrain_predicts_the_same(states, folder: Path, name: str) -> None:
    with np.load(folder / f"{name}.npz") as arrays:
        found = dict(arrays)
    loaded = jt.export.load_stablehlo(folder / name)
    # XLA chooses other roundings of half precision for other shapes.
    tolerance = 0.02 if name == "bfloat16" else 2e-6
    for count in (1, 7, 40):
        expected = jt.predict(states[name], IMAGES[:count])
        assert found[str(count)].dtype == np.float32
        np.testing.assert_allclose(found[str(count)], expected, atol=tolerance, rtol=tolerance)
        np.testing.assert_array_equal(loaded(IMAGES[:count]), found[str(count)])


def test_processing_before_and_after_the_model_is_in_the_file(tmp_path: Path) -> None:
    model = jt.models.FeedForward((8, 3), mean=0.0, std=1.0)
    floats = np.asarray(IMAGES, np.float32) / 100 - 1
    state = trained(model, floats)
    jt.export.stablehlo(
        state,
        tmp_path / "m",
        {"pixels": IMAGES[:1]},
        preprocess=lambda inputs: inputs["pixels"].astype(jnp.float32) / 100 - 1,
        postprocess=lambda logits: {"p": jax.nn.softmax(logits), "label": jnp.argmax(logits, -1)},
    )
    found = jt.export.load_stablehlo(tmp_path / "m")({"pixels": IMAGES[:9]})
    logits = jt.predict(state, floats[:9])
    np.testing.assert_allclose(found["p"], jax.nn.softmax(logits), atol=1e-6)
    np.testing.assert_array_equal(found["label"], jnp.argmax(logits, -1))


def test_a_model_that_counts_its_examples_is_mapped_over_them(state, tmp_path: Path) -> None:
    """`len` of a symbolic number of examples is an error in JAX."""

    def normalized(logits):
        return jax.nn.softmax(logits.reshape(len(logits), -1))

    jt.export.stablehlo(state, tmp_path / "m", IMAGES[:1], postprocess=normalized)
    found = jt.export.load_stablehlo(tmp_path / "m")(IMAGES[:9])
    np.testing.assert_allclose(found, normalized(jt.predict(state, IMAGES[:9])), atol=1e-6)

    def centered(logits):  # depends on the other examples
        return logits - logits.sum(axis=0, keepdims=True) / len(logits)

    with pytest.raises(jt.errors.InputError, match=r"does not depend on the others: x\.shape"):
        jt.export.stablehlo(state, tmp_path / "other", IMAGES[:1], postprocess=centered)


def test_a_state_on_a_mesh_gives_the_same_file(state, tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("data",))
    jt.export.stablehlo(state, tmp_path / "one", IMAGES[:1])
    with jax.set_mesh(mesh):
        jt.export.stablehlo(jt.parallel.replicate(state, mesh), tmp_path / "mesh", IMAGES[:1])
    assert export.deserialize(bytearray((tmp_path / "mesh").read_bytes())).nr_devices == 1
    np.testing.assert_array_equal(
        jt.export.load_stablehlo(tmp_path / "mesh")(IMAGES),
        jt.export.load_stablehlo(tmp_path / "one")(IMAGES),
    )


def test_a_file_that_is_cut_short_or_changed_is_refused(file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "model.stablehlo"
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    cut = [content[:count] for count in (0, 10, middle, len(content) - 40, len(content) - 1)]
    for damaged in (*cut, changed, content + b"\0", b"GIF89a" * 100):
        path.write_bytes(damaged)
        with pytest.raises(
            jt.errors.InputError, match="is cut short, damaged or another kind of file"
        ):
            jt.export.load_stablehlo(path)


def test_a_path_that_is_not_a_file_is_named(state, tmp_path: Path) -> None:
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(it is a directory, not a"):
        jt.export.load_stablehlo(tmp_path)
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(No such file or directory"):
        jt.export.load_stablehlo(tmp_path / "missing")
    with pytest.raises(jt.errors.InputError, match=r"cannot be read \(it is a device, not a"):
        jt.export.load_stablehlo("/dev/zero")
    with pytest.raises(jt.errors.InputError, match="expected a path"):
        jt.export.load_stablehlo("a\0b")
    with pytest.raises(jt.errors.InputError, match="cannot be written"):
        jt.export.stablehlo(state, tmp_path, IMAGES[:1])


def test_inputs_of_another_shape_dtype_or_structure_are_refused(file: Path) -> None:
    predict = jt.export.load_stablehlo(file)
    for inputs, found in ((IMAGES[:7, :11], "uint8[7,11,12]"), (IMAGES / 255, "float64[40,12,12]")):
        with pytest.raises(jt.errors.InputError) as raised:
            predict(inputs)
        assert str(raised.value) == (
            f"inputs has {found}, where {file} takes uint8[batch,12,12]; expected the shape and "
            "dtype that the model was exported with"
        )
    with pytest.raises(jt.errors.InputError, match="inputs has the structure"):
        predict({"images": IMAGES})
    with pytest.raises(jt.errors.InputError, match="at least one example"):
        predict(IMAGES[:0])
    with pytest.raises(jt.errors.InputError, match="inputs is a str"):
        predict("image.png")


def test_a_file_for_another_platform_is_refused(state, tmp_path: Path) -> None:
    jt.export.stablehlo(state, tmp_path / "m", IMAGES[:1], platforms="tpu")
    with pytest.raises(jt.errors.InputError, match="m is for tpu, and JAX runs on "):
        jt.export.load_stablehlo(tmp_path / "m")
    with pytest.raises(
        jt.errors.InputError, match=r"platforms is .'gpu',.; expected some of cpu, cuda"
    ):
        jt.export.stablehlo(state, tmp_path / "m", IMAGES[:1], platforms=("gpu",))


def test_a_file_that_this_jax_cannot_load_is_named(tmp_path: Path) -> None:
    import hashlib

    content = b"of a later version" * 10
    (tmp_path / "m").write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(
        jt.errors.InputError, match=r"JAX .* cannot load .*m: .*update JAX, or export"
    ):
        jt.export.load_stablehlo(tmp_path / "m")


def test_a_model_that_cannot_be_exported_is_one_sentence(state, tmp_path: Path) -> None:
    path = tmp_path / "model.stablehlo"
    with pytest.raises(
        jt.errors.InputError, match=r"exported \(inputs has uint8\[batch,5\]\): .*; exp"
    ):
        jt.export.stablehlo(state, path, IMAGES[:1, 0, :5])
    with pytest.raises(jt.errors.InputError, match="the model cannot be exported"):
        jt.export.stablehlo(state, path, IMAGES[:1], postprocess=lambda x: x @ np.ones((7, 3)))
    with pytest.raises(
        jt.errors.InputError, match=r"returns float32\[7,3\] for uint8\[batch,12,12\]; exp"
    ):
        jt.export.stablehlo(state, path, IMAGES[:1], postprocess=lambda x: x.reshape(7, 3))
    with pytest.raises(jt.errors.InputError, match=r"at least one example"):
        jt.export.stablehlo(state, path, IMAGES[:0])
    with pytest.raises(
        jt.errors.InputError, match=r"inputs.0 is a str; expected a NumPy or JAX array"
    ):
        jt.export.stablehlo(state, path, ["image.png"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(hasattr(jt.init_state, "__wrapped__"), reason="types are checked before")
def test_wrong_arguments_are_named_before_the_model_is_traced(state, tmp_path: Path) -> None:
    def fail(images: object) -> None:
        raise AssertionError("traced")

    for platforms in (3, None, [["cpu"]], [], ["cpu", 3]):
        with pytest.raises(
            jt.errors.InputError, match=r"platforms is .*; expected (some of cpu, cuda|a string)"
        ):
            jt.export.stablehlo(
                state, tmp_path / "m", IMAGES[:1], platforms=platforms, preprocess=fail
            )
    for path in (None, 3, "a\0b"):
        with pytest.raises(jt.errors.InputError, match=r"path is .*; expected a path"):
            jt.export.stablehlo(state, path, IMAGES[:1], preprocess=fail)
