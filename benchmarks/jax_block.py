"""The block of the DEQ-Transformer with decay positions in JAX, from the parameters of a cell, and its fixed point.

It computes what the cell computes with weight norm, layer norms last and no dropout: ``prepare`` once per forward pass,
``f`` at each evaluation. Letters: B batch, T time, M memory, K = M + T keys, D width, H heads,
C = D/H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from equilibria.cells import TransformerCell


class Prepared(NamedTuple):
    """What is constant during a solve."""

    qkv: Any
    """[D 3D], the queries' part multiplied by 1/√C."""
    added: Any
    """[B T 3D]: injection and bias u."""
    past: Any
    """[2 B M H C]: keys and values of the memory."""
    bias: Any
    """[H T K]: b by distance, −∞ where a query does not see a key."""
    out: tuple[Any, Any]
    inner: tuple[Any, Any]
    outer: tuple[Any, Any]


def parameters(cell: TransformerCell) -> dict[str, Any]:
    """The cell's parameters by name, as JAX arrays.

    Raises:
        ValueError: the cell computes something else than this block.
    """
    config = cell.config
    wrong = {
        name: getattr(config, name)
        for name, value in (("positions", "decay"), ("norm", "post"), ("weight_norm", True), ("injection", True))
        if getattr(config, name) != value
    }
    if wrong or config.affine or config.attention_norm or config.dropout or config.attention_dropout:
        raise ValueError(f"this block has no counterpart of {wrong or config}; take a cell like that of `tiny`.")
    return {name: jnp.asarray(value.detach().numpy()) for name, value in cell.named_parameters()}


def prepare(p: dict[str, Any], x: Any, z0: Any, u0: Any) -> Prepared:
    """The values of one solve: x [B T D] under the memory of states z0 [B M D] and injections u0 [B M 3D]."""
    (batch, time, width), (heads, head) = x.shape, p["attention.u"].shape
    memory = z0.shape[1]
    scale = jnp.where(jnp.arange(3 * width) < width, 1 / math.sqrt(head), 1.0)
    qkv = (_normed(p, "attention.qkv") * scale[:, None]).T
    injection = x @ p["inject.direction"].T + p["inject.bias"]
    u = jnp.pad(p["attention.u"].ravel(), (0, 2 * width))
    past = (z0 @ qkv[:, width:] + u0[..., width:]).reshape(batch, memory, 2, heads, head)
    distance = memory + jnp.arange(time)[:, None] - jnp.arange(memory + time)
    seen = p["attention.positions.bias"][:, jnp.clip(distance, 0)]
    return Prepared(
        qkv=qkv,
        added=(u + injection) * scale,
        past=past.transpose(2, 0, 1, 3, 4),
        bias=jnp.where(distance >= 0, seen, -jnp.inf),
        **{name: (_normed(p, place), p[f"{place}.bias"]) for name, place in _PLACES.items()},
    )


_PLACES = {"out": "attention.out", "inner": "inner", "outer": "outer"}


def f(z: Any, prepared: Prepared) -> Any:
    """f(z) [B T D]."""
    batch, time, width = z.shape
    heads = prepared.past.shape[3]
    added = (z @ prepared.qkv + prepared.added).reshape(batch, time, 3, heads, -1)
    k, v = (jnp.concatenate([prepared.past[i], added[:, :, 1 + i]], axis=1) for i in range(2))
    scores = jnp.einsum("bthc,bkhc->bhtk", added[:, :, 0], k) + prepared.bias
    attended = jnp.einsum("bhtk,bkhc->bthc", jax.nn.softmax(scores, axis=-1), v).reshape(batch, time, width)
    b = _layer_norm(z + _linear(attended, prepared.out))
    return _layer_norm(b + _linear(jax.nn.relu(_linear(b, prepared.inner)), prepared.outer))


Solve = Callable[[Callable[[Any, Any], Any], Any, Any, float], tuple[Any, Any]]
"""(f, z0, operands, tolerance) to the solution and the number of evaluations."""


def fixed_point(solve: Solve, tolerances: tuple[float, float], z0: Any, prepared: Prepared) -> Any:
    """z* of f, with the implicit gradient; the adjoint system is solved by the same method."""

    @jax.custom_vjp
    def found(prepared: Prepared) -> Any:
        return solve(f, z0, prepared, tolerances[0])[0]

    def forward(prepared: Prepared) -> tuple[Any, Any]:
        z = found(prepared)
        return jax.vjp(f, z, prepared)

    def backward(vjp: Any, g: Any) -> tuple[Any]:
        u = solve(lambda u, g: vjp(u)[0] + g, g, g, tolerances[1])[0]
        return (vjp(u)[1],)

    found.defvjp(forward, backward)
    return found(prepared)


def as_torch(x: Any) -> torch.Tensor:
    """A copy of a JAX array."""
    return torch.from_numpy(jax.device_get(x).copy())


def _normed(p: dict[str, Any], name: str) -> Any:
    direction = p[f"{name}.direction"]
    return direction * (p[f"{name}.gain"] / jnp.linalg.norm(direction, axis=1))[:, None]


def _linear(x: Any, weights: tuple[Any, Any]) -> Any:
    return x @ weights[0].T + weights[1]


def _layer_norm(x: Any) -> Any:
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + 1e-5)
