"""Jacobian–vector products J(z)·v: by forward mode, by double backward, or by finite differences.

Letters: B batch, N flattened state. Map ``f``, Jacobian ``J`` at ``z``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

JVP = Literal["auto", "forward", "double", "differences"]
"""How J·v is computed; "auto" takes the first way, in this order, that works for f."""
WAYS = ("auto", "forward", "double", "differences")

_Rows = Float[Tensor, "B N"]


class Products:
    """J(z)·v on rows, at one point after the other; successive v at one point share the work that only z needs.

    Args:
        f: the map.
        forward: J(z)·v by forward mode; raises an error if an operation of f has none.
        value: f(z) as an evaluation of its own, for finite differences whose f(z) is not given.
        how: the way; "auto" remembers the first one that works.
    """

    def __init__(
        self,
        f: Callable[[_Rows], _Rows],
        forward: Callable[[_Rows, _Rows], _Rows],
        value: Callable[[_Rows], _Rows],
        how: JVP,
    ) -> None:
        self._f, self._forward, self._value = f, forward, value
        self._ways = list(WAYS[1:]) if how == "auto" else [how]
        self._z: _Rows | None = None
        self._pullback: tuple[Tensor, Tensor] | None = None
        self._fz: _Rows | None = None

    def __call__(self, z: _Rows, v: _Rows, fz: _Rows | None) -> _Rows:
        """J(z)·v; ``fz`` is f(z), if it is known."""
        if self._z is not z:
            self._z, self._pullback, self._fz = z, None, fz
        while True:
            try:
                return {"forward": self._forward, "double": self._double, "differences": self._differences}[
                    self._ways[0]
                ](z, v)
            except (RuntimeError, NotImplementedError):
                if len(self._ways) == 1:
                    raise
                del self._ways[0]

    def _double(self, z: _Rows, v: _Rows) -> _Rows:
        """J·v as the derivative of the linear u ↦ Jᵀu: no operation of f needs a forward-mode derivative."""
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            if self._pullback is None:
                point = z.view_as(z) if recorded and z.requires_grad else z.detach().requires_grad_()
                value = self._f(point)
                u = torch.zeros_like(value, requires_grad=True)
                (product,) = torch.autograd.grad(value, point, u, create_graph=True, materialize_grads=True)
                self._pullback = (product, u)
            product, u = self._pullback
            if not product.requires_grad:  # f does not depend on z
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(
                product, u, v, retain_graph=True, create_graph=recorded, materialize_grads=True
            )
        return found

    def _differences(self, z: _Rows, v: _Rows) -> _Rows:
        """(f(z + h·v) − f(z)) / h with the h that balances rounding and curvature; accurate to about √eps."""
        if self._fz is None:
            self._fz = self._value(z)
        length = torch.linalg.vector_norm(v.detach(), dim=1, keepdim=True)
        size = 1 + torch.linalg.vector_norm(z.detach(), dim=1, keepdim=True)
        h = torch.finfo(z.dtype).eps ** 0.5 * size / torch.where(length > 0, length, 1.0)
        return (self._f(z + h * v) - self._fz) / h
