"""softmax(Q Kᵀ + bias) V without the scores in memory, with the derivatives that PyTorch's fused kernels lack.

These kernels have no second derivative, no forward mode and no rule for vmap, and none of them computes the gradient of
a bias. Where one of these is needed, the scores are written out.

Letters: B batch, H heads, T queries, K keys, C channels of a head; G is H, or 1 for a bias that all heads share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from equilibria.torch_private import is_forward_mode, is_last, is_many, is_transformed, is_wanted

Bias = Tensor | None
"""[B G T K] or [1 G T K]; None where query i sees the keys j ≤ i, of which there are as many as queries."""
SCORES = 2**21
"""Number of scores that the gradient of a bias holds at once, one sample at least."""


def attention(
    q: Float[Tensor, "B H T C"], k: Float[Tensor, "B H K C"], v: Float[Tensor, "B H K C"], bias: Bias
) -> Float[Tensor, "B H T C"]:
    """softmax(q kᵀ + bias) v, differentiable any number of times, backwards and forwards."""
    if torch.compiler.is_compiling():
        return _fused(q, k, v, bias)
    if is_forward_mode() or is_transformed():
        return _weights(q, k, bias) @ v
    if torch.is_grad_enabled():
        return _Fused.apply(q, k, v, bias)  # pyright: ignore[reportReturnType]
    # A bias that requires a gradient turns the kernel off, even without a graph.
    return _fused(q, k, v, None if bias is None else bias.detach())


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Bias) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=1.0)


def _weights(q: Tensor, k: Tensor, bias: Bias) -> Float[Tensor, "B H T K"]:
    if bias is None:
        queries, keys = q.shape[2], k.shape[2]
        bias = torch.full((queries, keys), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return torch.softmax(q @ k.transpose(2, 3) + bias, dim=-1)


class _Fused(torch.autograd.Function):
    """The fused kernel, with its own backward pass for first derivatives and the written-out one for all others."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Bias) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        fixed = None if bias is None else bias.detach()
        if not any(ctx.needs_input_grad):
            return _fused(q, k, v, fixed)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = _fused(inputs[0], inputs[1], inputs[2], fixed)
        ctx.inputs, ctx.out = inputs, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (q, k, v, bias) = grads, ctx.saved_tensors
        wanted = [is_wanted(node) for node, _ in ctx.next_functions]
        with torch.autocast(g.device.type, enabled=False):
            if torch.is_grad_enabled() or is_forward_mode() or is_many(g):
                return _gradients(q, k, v, bias, g)
            found: list[Tensor | None] = [None, None, None]
            if any(wanted[:3]):
                found = [*torch.autograd.grad(ctx.out, ctx.inputs, g, retain_graph=not is_last())]
            of_bias = _of_bias(q, k, v, bias, g) if bias is not None and wanted[3] else None
            return *found, of_bias


def _gradients(q: Tensor, k: Tensor, v: Tensor, bias: Bias, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and the bias, by operations that are differentiable in turn."""
    weights = _weights(q, k, bias)
    scores = _of_scores(weights, g @ v.transpose(2, 3))
    of_bias = None if bias is None else scores.sum_to_size(bias.shape)
    return scores @ k, scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ g, of_bias


def _of_scores(weights: Tensor, of_weights: Tensor) -> Tensor:
    """The gradient of the scores S from that of softmax(S)."""
    return weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True))


def _of_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, g: Tensor) -> Tensor:
    """The gradient of the bias. It is summed over groups of samples, so that few scores are in memory at once."""
    found = torch.zeros_like(bias)
    step = max(1, SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    for first in range(0, len(q), step):
        rows = slice(first, first + step)
        own = slice(None) if len(bias) == 1 else rows
        weights = _weights(q[rows], k[rows], bias[own])
        scores = _of_scores(weights, g[rows] @ v[rows].transpose(2, 3))
        found[own] += scores.sum_to_size(bias[own].shape)
    return found
