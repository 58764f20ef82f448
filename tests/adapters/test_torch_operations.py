"""Operations of PyTorch that none of the tested networks has, against live PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxtrain as jt

torch = pytest.importorskip("torch")


def square(x: Any) -> Any:
    """Returns positive definite matrices [batch, 4, 4]."""
    return x @ x.mT + torch.eye(4)


def spectra(x: Any) -> tuple[Any, ...]:
    half = torch.fft.rfft2(x, norm="ortho")
    frames = torch.stft(x.flatten(1), 8, return_complex=True, window=torch.ones(8))
    return (
        torch.view_as_real(torch.fft.fft(x, norm="forward")).flatten(1),
        torch.fft.irfft2(half, s=(4, 5), norm="ortho"),
        torch.fft.ifft(torch.fft.fft(x) * torch.complex(x, 1 - x)).imag,
        frames.abs(),
        torch.polar(x.abs(), x).real,
        half.angle().cos(),
    )


def linear_algebra(x: Any) -> tuple[Any, ...]:
    matrix = square(x)
    return (
        torch.linalg.inv(matrix),
        torch.linalg.solve(matrix, x),
        torch.linalg.solve(matrix, x[:, :, 0]),
        torch.linalg.det(matrix),
        torch.linalg.slogdet(matrix).logabsdet,
        torch.linalg.cholesky(matrix),
        torch.linalg.qr(x)[1].abs(),
        torch.linalg.solve(matrix[0], x),
        torch.linalg.svdvals(x),
        torch.linalg.eigvalsh(matrix),
        torch.cdist(x, x + 1),
        torch.linalg.matrix_norm(x),
    )


def sorting(x: Any) -> tuple[Any, ...]:
    index = (x > 0).long()
    reduced = [
        x.scatter_reduce(1, index, x, kind, include_self=own)
        for kind, own in (("amax", True), ("amin", False), ("mean", True), ("sum", True))
    ]
    return (
        *reduced,
        x.scatter_reduce(1, index, x, "mean", include_self=False),
        (9 * x).long().scatter_reduce(1, index, (9 * x).long(), "amax", include_self=False),
        x.median(1)[0],
        x.kthvalue(2, 1)[1],
        x.round().cummax(1)[1],
        x.cummin(2)[0],
        x.logcumsumexp(1),
        torch.roll(x, (1, -1), (1, 2)),
        torch.roll(x, 1, 2),
        x.clone().transpose_(1, 2),
    )


def special(x: Any) -> tuple[Any, ...]:
    return (
        torch.lgamma(x),
        torch.digamma(x.abs() + 1),
        torch.erfinv(x.tanh()),
        torch.special.i0(x),
        torch.hypot(x, x + 1),
        torch.copysign(x, -x),
    )


class Module(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.scale = function, torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Any) -> Any:
        return self.function(x * self.scale)


@pytest.mark.parametrize("function", [spectra, linear_algebra, sorting, special])
def test_outputs_and_gradients_are_those_of_pytorch(function: Any) -> None:
    module = Module(function)
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    theirs = module(torch.from_numpy(x))
    state = jt.init_state(module, jt.optimizers.sgd(1.0), x, key=jax.random.key(0))
    for ours, expected in zip(jt.predict(state, x), theirs, strict=True):
        np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=1e-4, atol=1e-4)

    floats = [each for each in theirs if each.dtype.is_floating_point]
    sum(each.reshape(len(each), -1).mean(1) for each in floats).mean().backward()

    def loss(predictions: Any, targets: Any) -> Any:
        parts = [each for each in predictions if jax.numpy.issubdtype(each.dtype, np.floating)]
        return sum(each.reshape(len(each), -1).mean(1) for each in parts)

    _, gradients = jt.gradients(state, (x, None), loss)
    np.testing.assert_allclose(gradients["scale"], module.scale.grad.numpy(), rtol=1e-3, atol=1e-3)


def test_multinomial_draws_without_replacement_in_proportion() -> None:
    def draw(x: Any) -> Any:
        return torch.multinomial(x.sigmoid(), 2)

    logits = np.log(np.array([[0.1, 0.2, 0.9]] * 2000, np.float32) / [0.9, 0.8, 0.1])
    state = jt.init_state(
        Module(draw), None, logits[:1], key=jax.random.key(0), draws_in_evaluation=True
    )
    drawn = np.asarray(jt.predict(state, logits, key=jax.random.key(1)))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    first = np.bincount(drawn[:, 0], minlength=3) / len(drawn)
    np.testing.assert_allclose(first, np.array([0.1, 0.2, 0.9]) / 1.2, atol=0.04)
