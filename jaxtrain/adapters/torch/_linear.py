"""Matrix products, embeddings and attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.adapters.torch._rules import add_all, family, promoted
from jaxtrain.models import dropout

register = family("Matrix products, embeddings and attention")


@register("aten.linear")
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    input, weight = promoted(input, weight)
    output = lax.dot_general(input, weight, (((input.ndim - 1,), (1,)), ((), ())))
    return output if bias is None else output + jnp.broadcast_to(bias, output.shape)


@register("aten.addmm", "aten.baddbmm")
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = alpha * (mat1 @ mat2)
    return product if beta == 0 else beta * input + product


@register("aten.bilinear")
def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    output = jnp.einsum("...i,oij,...j->...o", input1, weight, input2)
    return output if bias is None else output + bias


@register("aten.einsum")
def einsum(equation: str, tensors: Any, *, path: Any = None) -> Any:
    return jnp.einsum(equation, *tensors)


@register("aten.embedding")
def embedding(
    weight: Any, indices: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, *_: Any
) -> Any:
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq is True")
    rows = jnp.take(weight, indices, axis=0)
    if padding_idx < 0:
        return rows
    return jnp.where((indices == padding_idx)[..., None], lax.stop_gradient(rows), rows)


@register("aten.scaled_dot_product_attention", random=True)
def attention(
    query: Any,
    key_: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key: Any,
) -> Any:
    if enable_gqa:
        repeats = query.shape[-3] // key_.shape[-3]
        key_, value = (jnp.repeat(x, repeats, axis=-3) for x in (key_, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("...qd,...kd->...qk", query * scale, key_)
    if is_causal:
        attn_mask = jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool)
    if attn_mask is not None and attn_mask.dtype == bool:
        scores = jnp.where(attn_mask, scores, -jnp.inf)
    elif attn_mask is not None:
        scores += attn_mask.astype(scores.dtype)
    weights = jax.nn.softmax(scores, axis=-1)
    if attn_mask is not None:  # a query without any key
        weights = jnp.where(jnp.max(scores, -1, keepdims=True) == -jnp.inf, 0, weights)
    return (dropout(weights, dropout_p, key) if dropout_p else weights) @ value


add_all(
    register,
    {
        "matmul mm bmm mv": jnp.matmul,
        "dot vdot": jnp.dot,
        "tril": lambda self, diagonal=0: jnp.tril(self, diagonal),
        "triu": lambda self, diagonal=0: jnp.triu(self, diagonal),
    },
)
