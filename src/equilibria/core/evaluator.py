"""The map as solvers see it: flat, counted, checked, in the dtype of the algebra.

Letters: B batch, R chosen samples, N flattened state. State ``z``, map ``f``, Jacobian ``J``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.core.maps import Autocast, Map
from equilibria.core.products import JVP, Products
from equilibria.core.state import Layout, State, described
from equilibria.core.trees import tensors_in
from equilibria.torch_private import task, version


class Evaluator:
    """f on rows ``[B N]`` in float32 or wider; every evaluation is counted against the budget."""

    def __init__(self, f: Map, layout: Layout, max_evals: int) -> None:
        self._f, self._layout = f, layout
        self.autocast = Autocast(layout.device.type)
        self.evals, self._max_evals = 0, max_evals
        self._divisible: bool | None = None
        self._products: dict[JVP, Products] = {}

    @property
    def remaining(self) -> int:
        """Evaluations left in the budget."""
        return self._max_evals - self.evals

    def forfeit(self, count: int) -> None:
        """Remove ``count`` unused evaluations from the budget.

        A solver whose steps differ in cost between samples charges the full cost of a step even if some samples needed
        less, so that no sample's budget depends on its batch.
        """
        self._max_evals -= count

    @property
    def divisible(self) -> bool:
        """True if samples can be dropped; False while autograd records, since it would record the selection as well."""
        if torch.is_grad_enabled():
            return False
        if self._divisible is None:  # an empty index is enough, and never waits for a GPU
            self._divisible = self._f.rows(torch.empty(0, dtype=torch.long, device=self._layout.device)) is not None
        return self._divisible

    def take(self, index: Int[Tensor, " R"]) -> None:
        """Continue with these samples alone."""
        narrowed = self._f.rows(index)
        assert narrowed is not None  # the caller has checked ``divisible``
        self._f, self._products = narrowed, {}

    def rounded(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """z rounded to the dtypes of the leaves: the point at which f is really evaluated."""
        return z if self._layout.exact else self._layout.pack(self._layout.unpack(z))

    def __call__(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """f(z), counted."""
        self.evals += 1
        given = self._layout.unpack(z)
        tensors = self._tensors(given)
        versions = [0 if tensor.is_inference() else version(tensor) for tensor in tensors]
        with self.autocast.on():
            value = self._layout.aligned(self._value(given))
        for tensor, before, fz in zip(tensors, versions, self._tensors(value), strict=True):
            self._check(fz, tensor)
            if not tensor.is_inference() and version(tensor) != before:
                raise ValueError(
                    "f changed its argument z in place, and the iteration would continue from a wrong value; return a "
                    "new tensor (no z.mul_(…), no inplace=True in the first layer), or begin f with z = z.clone()."
                )
        return self._layout.pack(value)

    def _value(self, z: State) -> State:
        try:
            return self._f(z)
        except Exception as error:
            if self.evals == 1 and task() < 0:  # a backward pass solves linear systems
                error.add_note(
                    f"f was called with the start z0 = {described(z, coupled=True)} of {self._layout.dtypes()}. If the "
                    "error is about shapes or dtypes, give a z0 (start= of a layer, whose default is zeros like the "
                    "input) with the shape and the dtype of what f returns. If it is about the number of arguments: f "
                    "is called with the state first, f(z, *inputs)."
                )
            raise

    def _tensors(self, state: State) -> list[Tensor]:
        return [state] if self._layout.single else tensors_in(state)

    def jvp(
        self,
        z: Float[Tensor, "B N"],
        v: Float[Tensor, "B N"],
        *,
        fz: Float[Tensor, "B N"] | None = None,
        how: JVP = "auto",
    ) -> Float[Tensor, "B N"]:
        """J(z)·v, counted as one evaluation.

        Args:
            z: the point.
            v: the direction.
            fz: f(z), if it is known. Finite differences need it, and otherwise evaluate and count it once per point.
            how: "forward" mode, "double" backward, finite "differences", or "auto": the first that works for f.
        """
        self.evals += 1
        if how not in self._products:
            self._products[how] = Products(self._flat, self._forward_jvp, self._counted, how)
        return self._products[how](z, v, fz)

    def _counted(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        self.evals += 1
        return self._flat(z)

    def _flat(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        with self.autocast.on():
            value = self._layout.aligned(self._f.eager()(self._layout.unpack(z)))
        return self._layout.pack(value)

    def _forward_jvp(self, z: Float[Tensor, "B N"], v: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        with self.autocast.on():
            product = self._f.jvp(self._layout.unpack(z), self._layout.unpack(v))
        return self._layout.pack(self._layout.aligned(product))

    def _check(self, fz: Tensor, z: Tensor) -> None:
        if fz.shape != z.shape:
            raise ValueError(
                f"f changed the shape from {tuple(z.shape)} to {tuple(fz.shape)}; a fixed point needs f(z) of the "
                "shape of z: look at the last layer of f, or at z0."
            )
        if fz.device != z.device:
            raise ValueError(
                f"f moved the state from {z.device} to {fz.device}; put z0 and all that f uses on one device."
            )
        if fz.dtype != z.dtype and not (self.autocast.enabled and fz.dtype.is_floating_point):
            raise TypeError(f"f changed the dtype from {z.dtype} to {fz.dtype}; {_dtype_advice(fz.dtype)}.")

    @property
    def computes_in(self) -> tuple[torch.dtype, ...]:
        """The dtypes in which f computes its matrix products, as far as they are known."""
        if self.autocast.enabled:
            return (self.autocast.dtype,)
        return tuple(leaf.dtype for leaf in self._layout.leaves)


def _dtype_advice(found: torch.dtype) -> str:
    """The advice about an f whose value has another dtype than the state, which is real and floating."""
    if found.is_complex:
        return "a state is real: end f with torch.view_as_real, and begin it with torch.view_as_complex"
    if not found.is_floating_point:
        return "a state is floating: let f compute with floating numbers, or end it with .to(z.dtype)"
    return f"make z0 {found}, or end f with .to(z.dtype)"
