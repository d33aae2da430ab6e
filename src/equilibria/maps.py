"""Maps as solvers see them: flat, counted, in the dtype of the algebra; and what a map may know of itself.

Letters: B batch, N flattened state. State ``z``, map ``f``, Jacobian ``J``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Map = Callable[[Float[Tensor, "B *state"]], Float[Tensor, "B *state"]]


class SelectableMap(ABC):
    """A map that can go on with some of its samples alone, so that those that are done cost nothing."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """f(z)."""

    @property
    def selectable(self) -> bool:
        """Whether it can now."""
        return True

    @abstractmethod
    def select(self, rows: Int[Tensor, " R"]) -> SelectableMap:
        """The map of these samples, in this order."""


class CompilableMap(ABC):
    """A map that may be compiled, and knows what to do where that would be slow or impossible."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """f(z)."""

    @abstractmethod
    def eager(self) -> Map:
        """f as it was written: what is compiled has neither forward-mode nor second derivatives."""

    @abstractmethod
    def of_z_alone(self) -> Map | None:
        """f, compiled, of which only z has a gradient; None if that is not to be had, and ``eager`` serves.

        The backward pass of a compiled function computes the gradients of all its inputs, whatever is asked for.
        """


class DifferentiableMap(ABC):
    """A map that brings its own Jacobian–vector product; of any other, ``torch.func.jvp`` is taken."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """f(z)."""

    @abstractmethod
    def jvp(self, z: Float[Tensor, "B *state"], v: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """J(z)·v."""


@dataclasses.dataclass(frozen=True)
class AffineMap(DifferentiableMap):
    """u ↦ L(u) + factor·offset with a known linear part, so that Jacobian–vector products need no derivative."""

    linear: Map
    offset: Tensor
    factor: Tensor | None = None
    """One number a sample, [B 1 … 1], with which nobody has to keep the product; None for 1."""

    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """L(z) + factor·offset."""
        linear = self.linear(z)
        return linear + self.offset if self.factor is None else torch.addcmul(linear, self.offset, self.factor)

    def jvp(self, z: Float[Tensor, "B *state"], v: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """L(v)."""
        return self.linear(v)


class Evaluator:
    """The map as solvers see it: flat ``[B N]``, counted, in the dtype of the algebra (float32 or wider).

    ``active`` tells which samples still move, ``remaining`` how many evaluations are left, and ``gap`` is f(z) − z.
    """

    def __init__(self, f: Map, z0: Tensor, max_evals: int) -> None:
        check_start(z0)
        self._f, self._shape, self.dtype, self._device = f, z0.shape, z0.dtype, z0.device
        self.algebra = algebra_dtype(z0.dtype)
        self.autocast = Autocast(z0.device.type)
        self.evals, self._max_evals = 0, max_evals
        self.active = torch.ones(len(z0), dtype=torch.bool, device=z0.device)
        self.gap = z0.new_empty(0)

    @property
    def computes_in(self) -> torch.dtype:
        """The dtype of the products inside f, as far as that is known."""
        return self.autocast.dtype if self.autocast.enabled else self.dtype

    @property
    def selectable(self) -> bool:
        """Whether ``select`` is possible; not while autograd records, which would have to record that as well."""
        f = self._f
        return isinstance(f, SelectableMap) and f.selectable and not torch.is_grad_enabled()

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Goes on with these samples alone; all of them move."""
        assert isinstance(self._f, SelectableMap)
        self._f, self._shape = self._f.select(rows), torch.Size([len(rows), *self._shape[1:]])
        self.active = torch.ones(len(rows), dtype=torch.bool, device=rows.device)

    @property
    def remaining(self) -> int:
        """Evaluations left in the budget."""
        return self._max_evals - self.evals

    def forfeit(self, count: int) -> None:
        """Takes unused evaluations out of the budget.

        A solver whose steps differ in cost between samples gives back nothing of what it did not need: otherwise the
        budget of a sample would depend on the other samples of its batch.
        """
        self._max_evals -= count

    def shaped(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B *state"]:
        """The iterate in the shape and dtype of the state."""
        return z.to(self.dtype).view(len(z), *self._shape[1:])

    def rounded(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The nearest value that the state's dtype can hold: the point at which f is really evaluated."""
        return z if self.dtype == self.algebra else z.to(self.dtype).to(self.algebra)

    def __call__(self, z: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """f(z), counted."""
        self.evals += 1
        given = self.shaped(z)
        version = 0 if given.is_inference() else given._version
        with self.autocast.on():
            fz = self._f(given)
        self._check_value(fz)
        if not given.is_inference() and given._version != version:
            raise ValueError(
                "f changed its argument z in place, and the iteration would go on from a wrong value; return a new "
                "tensor (no z.mul_(…), no inplace=True in the first layer), or begin f with z = z.clone()."
            )
        return fz.reshape(z.shape).to(self.algebra)

    def jvp(self, z: Float[Tensor, "B N"], v: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """J(z)·v, counted as one evaluation."""
        self.evals += 1
        with self.autocast.on():
            if isinstance(self._f, DifferentiableMap):
                jv = self._f.jvp(self.shaped(z), self.shaped(v))
            else:
                f = self._f.eager() if isinstance(self._f, CompilableMap) else self._f
                jv = torch.func.jvp(f, (self.shaped(z),), (self.shaped(v),))[1]
        return jv.reshape(z.shape).to(self.algebra)

    def _check_value(self, fz: Any) -> None:
        if not isinstance(fz, Tensor):
            raise TypeError(f"f returned {type(fz).__name__}; it must return one tensor of the state's shape.")
        if fz.shape != self._shape:
            raise ValueError(
                f"f changed the shape from {tuple(self._shape)} to {tuple(fz.shape)}; a fixed point needs f(z) of the "
                "shape of z: look at the last layer of f, or at z0."
            )
        if fz.device != self._device:
            raise ValueError(
                f"f moved the state from {self._device} to {fz.device}; put z0 and all that f uses on one device."
            )
        if fz.dtype != self.dtype and not (self.autocast.enabled and fz.dtype.is_floating_point):
            raise TypeError(
                f"f changed the dtype from {self.dtype} to {fz.dtype}; make z0 {fz.dtype}, or end f with .to(z.dtype)."
            )


class Autocast:
    """The autocast state of one device type at the time of construction, to be entered again later."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """The captured state, whatever the state of the caller."""
        same_dtype = torch.get_autocast_dtype(self._device) == self.dtype
        if self.enabled == torch.is_autocast_enabled(self._device) and (same_dtype or not self.enabled):
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self.dtype, enabled=self.enabled)

    def off(self) -> contextlib.AbstractContextManager[Any]:
        """No autocast: for the solver's algebra."""
        return torch.autocast(self._device, enabled=False) if self.enabled else contextlib.nullcontext()


def select_rows(value: Any, rows: Int[Tensor, " R"]) -> Any:
    """A value with these samples alone: of every tensor in it, also inside dataclasses and tuples, these rows."""
    return map_tensors(lambda tensor: tensor.index_select(0, rows), value)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with every tensor in it changed, also inside dataclasses and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: map_tensors(change, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    if isinstance(value, tuple):
        return tuple(map_tensors(change, part) for part in value)
    return value


def algebra_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, inner products and histories for states of ``dtype``: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def row_norm(x: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Euclidean norm of each sample."""
    return torch.linalg.vector_norm(x, dim=1)


def check_start(z0: Any) -> None:
    """Refuse a start that is none.

    Raises:
        ValueError, TypeError: z0 is no tensor, has no batch axis, is empty, not real and floating, or not finite.
    """
    if not isinstance(z0, Tensor):
        raise TypeError(
            f"z0 is {type(z0).__name__}; the state is one tensor (B, *state): torch.stack or cat its parts."
        )
    if z0.ndim < 2:
        raise ValueError(
            f"z0 has shape {tuple(z0.shape)}; a state has a batch axis first and at least one axis after it, "
            "(B, *state): try z0[None] for one problem, z0[:, None] for a batch of scalar ones."
        )
    if z0.numel() == 0:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}, which is empty; give at least one sample with one number.")
    if not z0.dtype.is_floating_point:
        raise TypeError(f"z0 has dtype {z0.dtype}; a state is real and floating: float64, float32, bfloat16, float16.")
    if not torch.isfinite(z0).all():
        bad = (~torch.isfinite(z0.detach().reshape(len(z0), -1)).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"z0 is NaN or infinite in {len(bad)} of {len(z0)} samples ({bad[:8]}); start from finite values."
        )
