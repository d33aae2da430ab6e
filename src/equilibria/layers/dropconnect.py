"""DropConnect: a matrix whose parameters are dropped before normalisation, without a second copy of them.

L. Wan et al., "Regularization of Neural Networks using DropConnect" (ICML 2013).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dropped_weight(v: Tensor, gain: Tensor | None, kept: Tensor, *, rate: float) -> Tensor:
    """W = g·e/‖e‖ per output row, or W = e without a gain, where e is v with dropped entries.

    Args:
        v: the parameter [out in].
        gain: g, one number per row; None for no normalisation.
        kept: False for the entries of the first columns of v to drop.
        rate: the share that is dropped; the other entries of these columns are multiplied by 1/(1 − rate).
    """
    return _Dropped.apply(v, gain, kept, 1 / (1 - rate))  # pyright: ignore


ROWS = 512
"""Number of rows of v that are copied at a time."""


class _Dropped(torch.autograd.Function):
    """W from a v with dropped entries; autograd keeps no second copy of v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor | None, kept: Tensor, scale: float) -> Tensor:
        w = _drop(v.clone(), kept, scale)
        norm = None if gain is None else torch.linalg.vector_norm(w, dim=1)
        ctx.save_for_backward(v, gain, kept, norm)
        ctx.scale = scale
        return w if gain is None or norm is None else w.mul_((gain / norm).unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """With the unit rows e = v/‖v‖: dg = dW·e, dv = g/‖v‖ (dW − (dW·e) e)."""
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_gradients(grads[0], *ctx.saved_tensors, scale=ctx.scale), None, None


def _gradients(
    grad: Tensor, v: Tensor, gain: Tensor | None, kept: Tensor, norm: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor | None]:
    """The gradients of v and of the gain."""
    if gain is None or norm is None:
        return _drop(grad.clone(), kept, scale), None
    if torch.is_grad_enabled():  # for a second derivative: recorded by autograd, with its intermediate results
        v = _drop(v.clone(), kept, scale)
        size = torch.linalg.vector_norm(v, dim=1)
        inner = (grad * v).sum(dim=1) / size
        dv = (grad - v * (inner / size).unsqueeze(1)) * (gain / size).unsqueeze(1)
        return _drop(dv.clone(), kept, scale), inner
    dv, inner = torch.empty_like(grad), torch.empty_like(gain)
    pieces = zip(*(x.split(ROWS) for x in (grad, v, gain, kept, norm, dv, inner)), strict=True)
    for grad_rows, v_rows, g, kept_rows, size, out, along in pieces:
        e = _drop(v_rows.clone(), kept_rows, scale)
        along.copy_(torch.bmm(grad_rows[:, None], e[:, :, None])[:, 0, 0] / size)
        torch.mul(grad_rows, (g / size).unsqueeze(1), out=out)
        _drop(out.addcmul_(e, (g * along / size.square()).unsqueeze(1), value=-1), kept_rows, scale)
    return dv, inner


def _drop(v: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Multiply the first columns of v by ``kept``·``scale``, in place."""
    v[:, : kept.shape[1]].mul_(kept).mul_(scale)
    return v
