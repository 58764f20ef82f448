"""The CPU lowerings give XLA's own values and gradients, and act on CPUs alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxtrain as jt
from jaxtrain import lowerings

LAYOUTS = {
    1: [("NHC", "HIO", "NHC"), ("NCH", "OIH", "NCH")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HWNC", "OHWI", "CNHW")],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution: shapes of images and kernel in the given layout, and its parameters."""

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    params: dict[str, Any]


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    rank = draw(st.sampled_from([1, 2, 2]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    names = draw(st.sampled_from(LAYOUTS[rank]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 2, 17]))
    sizes = dict(zip("HW", per_axis(4, 9), strict=False)) | {
        "N": draw(st.integers(1, 3)),
        "C": channels,
    }
    window = dict(zip("HW", per_axis(1, 4), strict=False))
    window |= {"I": channels // groups, "O": groups * draw(st.integers(1, 3))}
    dilation = per_axis(1, 2)
    for name, d in zip("HW", dilation, strict=False):
        sizes[name] = max(sizes[name], (window[name] - 1) * d + 1)
    padding: Any = draw(st.sampled_from(["VALID", "SAME", None]))
    lhs_dilation = None
    if padding is None:
        padding = list(zip(per_axis(0, 3), per_axis(0, 3), strict=True))
        lhs_dilation = per_axis(1, 2)
    params = dict(
        window_strides=per_axis(1, 3),
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=dilation,
        dimension_numbers=names,
        feature_group_count=groups,
    )
    images = tuple(sizes[name] for name in names[0])
    return Case(images, tuple(window[name] for name in names[1]), params)


def values_and_gradients(
    function: Callable[..., jax.Array], arguments: tuple[Any, ...], seed: int = 0
) -> tuple[Any, ...]:
    """Returns the output of a function and its gradients with a random cotangent."""

    @jax.jit
    def run(*arguments: Any) -> Any:
        with lowerings.scope():
            out, vjp = jax.vjp(function, *arguments)
        cotangent = np.random.default_rng(seed).normal(size=out.shape)
        return out, *vjp(jnp.asarray(cotangent, out.dtype))

    return tuple(map(np.asarray, run(*arguments)))


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def assert_same_as_float64(function: Callable[..., jax.Array], *arguments: np.ndarray) -> None:
    """Compares with XLA's own convolution in float64, which the lowering does not take."""
    single = [argument.astype(np.float32) for argument in arguments]
    ours = values_and_gradients(function, tuple(single))
    with jax.enable_x64(True):
        theirs = values_and_gradients(function, tuple(a.astype(np.float64) for a in single))
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert ours_.dtype == np.float32
        assert theirs_.dtype == np.float64
        assert ours_.shape == theirs_.shape
        np.testing.assert_allclose(ours_, theirs_, rtol=0, atol=1e-5 * (np.abs(theirs_).max() + 1))


@settings(max_examples=30)
@given(convolutions())
def test_values_and_gradients_are_those_of_xla(case: Case) -> None:
    def convolve(images: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, **case.params)

    assert_same_as_float64(convolve, random(case.images, 1), random(case.kernel, 2))


@pytest.fixture(scope="module")
def with_numba() -> Iterator[None]:
    pytest.importorskip("numba")
    jt.use_cpu_lowerings(numba=True)
    yield
    jt.use_cpu_lowerings()


@settings(max_examples=20)
@given(convolutions(), st.sampled_from([1, 4, 24]), st.integers(1, 3))
def test_compiled_by_numba_they_give_the_values_and_gradients_of_xla(
    with_numba: None, case: Case, inputs: int, vectors: int
) -> None:
    def convolve(images: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, **case.params)

    params = case.params | {"feature_group_count": 1}
    names = params["dimension_numbers"]
    sizes = {"C": inputs, "I": inputs, "O": 16 * vectors, "N": 11}  # 11: two images in some parts
    images, kernel = (
        random(tuple(sizes.get(name, size) for name, size in zip(layout, shape, strict=True)), seed)
        for layout, shape, seed in ((names[0], case.images, 1), (names[1], case.kernel, 2))
    )
    case = Case(images.shape, kernel.shape, params)
    assert_same_as_float64(convolve, images, kernel)


def test_numba_compiles_what_fills_vector_registers(with_numba: None) -> None:
    assert stablehlo("cpu").count("@jaxtrain_convolution") == 3
    text = stablehlo("cpu", channels=17)
    assert "@jaxtrain_convolution" not in text
    assert text.count("stablehlo.convolution") == 2


@settings(max_examples=8)
@given(convolutions())
def test_vmapped_kernels_give_the_values_and_gradients_of_xla(case: Case) -> None:
    def convolve(images: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, **case.params)

    kernels = random((3, *case.kernel), 2)
    assert_same_as_float64(jax.vmap(convolve), random((3, *case.images), 1), kernels)
    in_axes = jax.vmap(convolve, in_axes=(None, 0))
    assert_same_as_float64(in_axes, random(case.images, 1), kernels)


@pytest.mark.parametrize("taps", [5, 12])  # folded into the channels, and one product per tap
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_many_channels_give_the_values_and_gradients_of_xla(taps: int, padding: str) -> None:
    def convolve(signal: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(
            signal, kernel, (1,), padding, dimension_numbers=("NHC", "HIO", "NHC")
        )

    assert_same_as_float64(convolve, random((2, 40, 80), 1), random((taps, 80, 2), 2))


@pytest.mark.parametrize("layout", LAYOUTS[2], ids=lambda names: names[0])
@pytest.mark.parametrize("window", [(9, 9), (9, 3), (3, 9)])
def test_large_windows_give_the_values_and_gradients_of_xla(
    window: tuple[int, int], layout: tuple[str, str, str]
) -> None:
    def convolve(images: Any, kernel: Any) -> jax.Array:
        return lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", rhs_dilation=(2, 1), dimension_numbers=layout
        )

    sizes = dict(zip("HWIONC", (*window, 2, 3, 2, 2), strict=True))
    kernel = tuple(sizes[name] for name in layout[1])
    images = tuple((sizes | {"H": 31, "W": 20})[name] for name in layout[0])
    assert_same_as_float64(convolve, random(images, 1), random(kernel, 2))


@pytest.mark.parametrize(
    ("images", "kernel", "dtype"),
    [
        ((1, 16, 6, 6), (16, 16, 3, 3), jnp.bfloat16),
        ((1, 2, 5, 5, 5), (2, 2, 3, 3, 3), jnp.float32),
        ((1, 2, 640), (2, 2, 300), jnp.float32),
    ],
    ids=["bfloat16", "3-D", "300 taps"],
)
def test_other_convolutions_are_left_to_xla(
    images: tuple[int, ...], kernel: tuple[int, ...], dtype: Any
) -> None:
    def loss(images: jax.Array, kernel: jax.Array) -> jax.Array:
        strides = (1,) * (images.ndim - 2)
        with lowerings.scope():
            return jnp.sum(lax.conv_general_dilated(images, kernel, strides, "VALID") ** 2)

    arguments = jnp.ones(images, dtype), jnp.ones(kernel, dtype)
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).as_text()
    assert text.count("stablehlo.convolution") == 3


@pytest.mark.parametrize(("size", "window"), [((2, 6, 6, 3), (2, 2)), ((1, 7, 9, 2), (3, 2))])
def test_the_gradient_of_max_pooling_is_that_of_xla(
    size: tuple[int, ...], window: tuple[int, int]
) -> None:
    def pool(x: Any) -> jax.Array:
        return nn.max_pool(x, window, window)

    images = random(size, 3)
    for values in (images, np.floor(2 * images)):  # whole numbers have many ties
        jt.use_cpu_lowerings(False)
        try:
            theirs = values_and_gradients(pool, (values,))
        finally:
            jt.use_cpu_lowerings()
        for found, expected in zip(values_and_gradients(pool, (values,)), theirs, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_pytorch_resolves_ties_of_max_pooling_in_the_same_way() -> None:
    torch = pytest.importorskip("torch")
    images = np.floor(2 * random((2, 3, 8, 8), 4)).astype(np.float32)
    weights = random((2, 3, 4, 4), 5).astype(np.float32)
    theirs = torch.tensor(images, requires_grad=True)
    (torch.nn.functional.max_pool2d(theirs, 2) * torch.tensor(weights)).sum().backward()

    def loss(x: jax.Array) -> jax.Array:
        pooled = nn.max_pool(x.transpose(0, 2, 3, 1), (2, 2), (2, 2))
        return jnp.sum(pooled.transpose(0, 3, 1, 2) * weights)

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(images), theirs.grad.numpy())


def test_a_nan_in_a_pooling_window_passes_its_gradient_on() -> None:
    images = jnp.array([[1.0, jnp.nan, 2.0, 3.0]])[..., None]
    (_, gradient) = values_and_gradients(lambda x: nn.max_pool(x, (2,), (2,)).sum(), (images,))
    assert np.count_nonzero(gradient) == 2


@pytest.fixture
def lowerings_off() -> Iterator[None]:
    jt.use_cpu_lowerings(False)
    yield
    jt.use_cpu_lowerings()


def stablehlo(platform: str, channels: int = 16, scope: Callable[[], Any] = lowerings.scope) -> str:
    """Returns the program of both gradients of a padded convolution and of max pooling."""

    def loss(images: jax.Array, kernel: jax.Array) -> jax.Array:
        with scope():
            out = lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.sum(nn.max_pool(out, (2, 2), (2, 2)) ** 2)

    arguments = jnp.ones((2, 8, 8, channels)), jnp.ones((3, 3, channels, channels))
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_on_a_cpu_only_unpadded_convolutions_remain() -> None:
    text = stablehlo("cpu")
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 2  # of the output, and of the gradient of the images
    for line in convolutions:
        assert "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line
        assert "pad = [[0, 0], [0, 0]]" in line
    assert text.count("stablehlo.dot_general") == 1  # the gradient of the kernel
    assert "select_and_scatter" not in text


def test_a_nan_stays_at_its_position() -> None:
    images = np.ones((2, 6, 6, 3), np.float32)
    images[1, 5, 5, 0] = np.nan
    kernel = jnp.ones((3, 3, 3, 4))

    def convolve(images: jax.Array) -> jax.Array:
        with lowerings.scope():
            return lax.conv_general_dilated(
                images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

    out = jax.jit(convolve)(images)
    assert np.isnan(out[1, 3, 3]).all()
    out = out.at[1, 3, 3].set(27)
    np.testing.assert_array_equal(out, np.full((2, 4, 4, 4), 27))


def test_programs_outside_the_scope_stay_as_they_are() -> None:
    assert stablehlo("cpu", scope=contextlib.nullcontext).count("stablehlo.convolution") == 3


def test_on_a_gpu_the_program_stays_as_it_is() -> None:
    text = stablehlo("cuda")
    assert text.count("stablehlo.convolution") == 3
    assert "select_and_scatter" in text


def test_turned_off_they_leave_the_program_as_it_is(lowerings_off: None) -> None:
    text = stablehlo("cpu")
    assert text.count("stablehlo.convolution") == 3
    assert "select_and_scatter" in text
