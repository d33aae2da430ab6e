"""The linear recurrence c_t = a_t c_{t−1} + b_t at all times at once, as one differentiable operation.

As a chain of PyTorch operations it would be three graph nodes per time step; here it is one node, whose backward
pass is the same recurrence from right to left.

Letters: B batch, T time, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def scan(a: Float[Tensor, "B T C"], b: Float[Tensor, "B T C"], first: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B T C"]:
    """c_t = a_t c_{t−1} + b_t for t = 0 … T − 1, with c_{−1} = ``first``; differentiable twice, and forwards."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), first.dtype)
    a, b, first = a.to(dtype), b.to(dtype), first.to(dtype)
    if torch.compiler.is_compiling():  # torch.compile does not know the forward-mode rule of a Function
        return _doubling(a, b, first, reverse=False)
    return _Scan.apply(a, b, first, False)  # pyright: ignore


class _Scan(torch.autograd.Function):
    """The recurrence from left to right; with ``reverse``, c_t = a_t c_{t+1} + b_t from c_T = first."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, first: Tensor, reverse: bool) -> Tensor:
        return (_doubling if a.is_cuda else _one_by_one)(a, b, first, reverse=reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
        a, _, first, ctx.reverse = inputs
        ctx.save_for_backward(a, output, first)
        ctx.save_for_forward(a, output, first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """db_t = g_t + a_{t+1} db_{t+1}, da_t = db_t c_{t−1}, dc_{−1} = a_0 db_0."""
        (grad,), (a, c, first) = grads, ctx.saved_tensors
        end = torch.zeros_like(first)
        # db runs in the other direction, so its factor at t is the a of the neighbour that comes after t.
        db = _Scan.apply(_neighbour(a, end, right=not ctx.reverse), grad, end, not ctx.reverse)
        edge = slice(-1, None) if ctx.reverse else slice(0, 1)
        return db * _neighbour(c, first, right=ctx.reverse), db, a[:, edge] * db[:, edge], None  # pyright: ignore

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """dc_t = a_t dc_{t−1} + (da_t c_{t−1} + db_t)."""
        (a, c, first), (da, db, start, _) = ctx.saved_tensors, tangents
        db = torch.zeros_like(c) if db is None else db
        start = torch.zeros_like(first) if start is None else start
        if da is not None:
            db = torch.addcmul(db, da, _neighbour(c, first, right=ctx.reverse))
        return _Scan.apply(a, db, start, ctx.reverse)  # pyright: ignore

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """A further axis is folded into the batch."""
        *tensors, reverse = inputs
        pairs = zip(tensors, in_dims[:3], strict=True)
        rows = [t.expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0) for t, axis in pairs]
        c = _Scan.apply(*(t.flatten(0, 1) for t in rows), reverse)
        return c.unflatten(0, rows[0].shape[:2]), 0  # pyright: ignore


def _neighbour(c: Tensor, edge: Tensor, *, right: bool) -> Tensor:
    """c_{t+1}, or c_{t−1}, with ``edge`` beyond the last one."""
    return torch.cat([c[:, 1:], edge], dim=1) if right else torch.cat([edge, c[:, :-1]], dim=1)


def _one_by_one(a: Tensor, b: Tensor, first: Tensor, *, reverse: bool) -> Tensor:
    """T small operations, each number read once: for a CPU."""
    c, past = torch.empty_like(b), first[:, 0]
    times = range(b.shape[1])
    for t in reversed(times) if reverse else times:
        past = torch.addcmul(b[:, t], a[:, t], past, out=c[:, t])
    return c


def _doubling(a: Tensor, b: Tensor, first: Tensor, *, reverse: bool) -> Tensor:
    """log₂ T large operations, each over all times (Hillis and Steele 1986): for a GPU."""
    if reverse:
        return _doubling(a.flip(1), b.flip(1), first, reverse=False).flip(1)
    # After a pass with distance d, (a_t, b_t) maps c_{t−2d} to c_t; c_{−1} is put in front, with a = 0.
    a, b = torch.cat([torch.zeros_like(first), a], dim=1), torch.cat([first, b], dim=1)
    distance = 1
    while distance < b.shape[1]:
        b = torch.cat([b[:, :distance], torch.addcmul(b[:, distance:], a[:, distance:], b[:, :-distance])], dim=1)
        a = torch.cat([a[:, :distance], a[:, distance:] * a[:, :-distance]], dim=1)
        distance *= 2
    return b[:, 1:]
