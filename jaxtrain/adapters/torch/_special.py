"""Fourier transforms, linear algebra, distances and special functions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy import special

from jaxtrain.adapters.torch._rules import add_all, family, pointwise

register = family("Fourier transforms, linear algebra and special functions")


_SUCCESS = jnp.int32(0)  # the error code of a decomposition


def _scaled(result: Any, sizes: Any, normalization: int, inverse: bool) -> Any:
    """Applies PyTorch's normalization (0 none, 1 by √n, 2 by n) to a transform of JAX."""
    count = math.prod(sizes)
    factor = {0: 1.0, 1: count**-0.5, 2: 1 / count}[normalization]
    return result * (factor * (count if inverse else 1))  # JAX divides inverse transforms by n


@register("aten._fft_r2c")
def fft_r2c(self: Any, dim: Any, normalization: int, onesided: bool) -> Any:
    transform = jnp.fft.rfftn if onesided else jnp.fft.fftn
    found = transform(self, axes=tuple(dim))
    return _scaled(found, [self.shape[d] for d in dim], normalization, False)


@register("aten._fft_c2c")
def fft_c2c(self: Any, dim: Any, normalization: int, forward: bool) -> Any:
    transform = jnp.fft.fftn if forward else jnp.fft.ifftn
    found = transform(self, axes=tuple(dim))
    return _scaled(found, [self.shape[d] for d in dim], normalization, not forward)


@register("aten._fft_c2r")
def fft_c2r(self: Any, dim: Any, normalization: int, last_dim_size: int) -> Any:
    sizes = [*(self.shape[d] for d in dim[:-1]), last_dim_size]
    return _scaled(jnp.fft.irfftn(self, sizes, tuple(dim)), sizes, normalization, True)


@register("aten.view_as_real")
def view_as_real(self: Any) -> Any:
    return jnp.stack([self.real, self.imag], axis=-1)


@register("aten.view_as_complex")
def view_as_complex(self: Any) -> Any:
    return jax.lax.complex(self[..., 0], self[..., 1])


@register("aten._cdist_forward")
def cdist(x1: Any, x2: Any, p: float, compute_mode: Any = None) -> Any:
    from jaxtrain.adapters.torch._reductions import vector_norm

    return vector_norm(x1[..., :, None, :] - x2[..., None, :, :], p, -1)


@register("aten.linalg_inv_ex")
def inverse(self: Any, *, check_errors: bool = False) -> Any:
    return jnp.linalg.inv(self), _SUCCESS


@register("aten.linalg_cholesky_ex")
def cholesky(self: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    return jnp.linalg.cholesky(self, upper=upper), _SUCCESS


@register("aten._linalg_solve_ex")
def solve(A: Any, B: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    if B.ndim == 1 or B.shape == A.shape[:-1]:  # vectors
        return jnp.linalg.solve(A, B[..., None])[..., 0], None, None, _SUCCESS
    found = jnp.linalg.solve(A, B) if left else jnp.linalg.solve(A.mT, B.mT).mT
    return found, None, None, _SUCCESS


@register("aten.linalg_qr")
def qr(A: Any, mode: str = "reduced") -> Any:
    found = jnp.linalg.qr(A, mode)
    return (jnp.zeros(0, A.dtype), found) if mode == "r" else tuple(found)


@register("aten._linalg_eigh")
def eigh(A: Any, UPLO: str = "L", compute_v: bool = True) -> Any:
    return tuple(jnp.linalg.eigh(A, UPLO, symmetrize_input=False))


add_all(
    register,
    {
        "complex": jax.lax.complex,
        "real": jnp.real,
        "imag": jnp.imag,
        "_conj _conj_physical": jnp.conj,
        "_linalg_check_errors": lambda *_, **__: None,
        "angle": jnp.angle,
        "copysign": jnp.copysign,
        "polar": lambda abs, angle: jax.lax.complex(abs * jnp.cos(angle), abs * jnp.sin(angle)),
        "_linalg_slogdet": lambda A: (*jnp.linalg.slogdet(A), None, None),
        "linalg_matrix_exp": jax.scipy.linalg.expm,
        "_linalg_det": lambda A: (jnp.linalg.det(A), None, None),
        "_linalg_svd": lambda A, full_matrices=False, compute_uv=True, *, driver=None: tuple(
            jnp.linalg.svd(A, full_matrices)
        ),
    },
)
_SPECIAL = {
    **{"lgamma": special.gammaln, "digamma": special.digamma, "erf_inv": special.erfinv},
    **{"bessel_i0": special.i0, "bessel_i1": special.i1, "hypot": jnp.hypot},
    **{"signbit": jnp.signbit, "abs": jnp.abs, "igamma": special.gammainc},
}
for _name, _function in _SPECIAL.items():
    register(f"prims.{_name}", layout=pointwise)(_function)
