"""Map: the interface through which solvers, gradient rules and stability measures use f.

Letters: B batch, R chosen samples. State ``z``, map ``f``, Jacobian ``J``, cotangent ``u``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from equilibria.core.graph import SavedTensors, leaves_below
from equilibria.core.state import Layout, State
from equilibria.core.tracing import untraced
from equilibria.core.trees import map_tensors, tensors_in, with_tensors
from equilibria.torch_private import without_donated_buffers


class Autocast:
    """The autocast state of one device type at the time of construction."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.enabled = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def on(self) -> contextlib.AbstractContextManager[Any]:
        """A context with the captured state, whatever the state of the caller."""
        same_dtype = torch.get_autocast_dtype(self._device) == self.dtype
        if self.enabled == torch.is_autocast_enabled(self._device) and (same_dtype or not self.enabled):
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self.dtype, enabled=self.enabled)

    def off(self) -> contextlib.AbstractContextManager[Any]:
        """A context without autocast, for the algebra of a solver."""
        return torch.autocast(self._device, enabled=False) if self.enabled else contextlib.nullcontext()


def rounding_unit(tensors: Sequence[Tensor], autocast: Autocast | None = None) -> float:
    """The largest eps of the tensors' dtypes and, where f ran under autocast, of its dtype; None for that of now."""
    dtypes = {tensor.dtype for tensor in tensors}
    autocast = Autocast(tensors[0].device.type) if autocast is None else autocast
    if autocast.enabled:
        dtypes.add(autocast.dtype)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


class Map(ABC):
    """f: State -> State. Only ``__call__`` must be written; the default of every other method suits any f."""

    @abstractmethod
    def __call__(self, z: State) -> State:
        """f(z)."""

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v, by default with ``torch.func.jvp``."""
        return torch.func.jvp(self.__call__, (z,), (v,))[1]

    def linearise(self, z: State, *, create_graph: bool = False) -> Linearised:
        """f(z) with graph, and VJPs at z: one evaluation of f.

        Args:
            z: the point, which the result treats as a constant.
            create_graph: make the VJPs differentiable themselves.
        """
        return linearised(self, z, create_graph=create_graph)

    def eager(self) -> Map:
        """The map without compilation: compiled code hides the tensors that it reads and has no second derivative."""
        return self

    def reads(self) -> tuple[Tensor, ...]:
        """The tensors that f reads and that ``given`` can replace, for ``torch.func``; by default none."""
        return ()

    def given(self, tensors: Sequence[Tensor]) -> Map:
        """The map with these tensors instead of ``reads()``."""
        return self

    def pinned(self) -> Map:
        """The map bound to the tensors that it reads now, so that a later backward pass evaluates the same f."""
        return self

    def bound(self) -> Map:
        """The map with the parameters that it reads now, for a checkpoint, which evaluates it again as it is."""
        return self

    def rows(self, index: Int[Tensor, " R"]) -> Map | None:
        """The map of these samples alone, in this order, or None (the default) if f cannot drop samples.

        The loop uses it to drop converged samples. ``index`` may be empty, and must not decide whether the result is
        None.
        """
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Linearised:
    """f at one point: its value, with a graph to all tensors that f reads, and vector–Jacobian products (VJPs)."""

    value: State
    """f(z), each leaf in the dtype of the same leaf of z."""
    start: tuple[GradientEdge, ...]
    """The edges at which the leaves of z enter the graph; unlike z itself, they hold no values in memory."""
    anchor: Tensor
    """An extra leaf of the graph, so that f(z) has a graph even if no tensor that f reads requires a gradient."""
    autocast: Autocast
    create_graph: bool = False
    compiled: bool = False
    """True if f was compiled: its backward pass must then preserve its saved tensors for the next VJP."""
    saved: SavedTensors = dataclasses.field(default_factory=SavedTensors)
    """The tensors that the graph saves, if hooks pack them; a backward pass unpacks them before its VJPs."""
    arrival: Arrival = dataclasses.field(default_factory=lambda: Arrival())
    """Receives the cotangent of z at the end of a backward pass."""
    again: Callable[[], Linearised] | None = None
    """Evaluates f once more for cheaper VJPs; None where that would not help."""

    @property
    def constant(self) -> bool:
        """True if no tensor that f reads requires a gradient."""
        return all(leaf is self.anchor for leaf in leaves_below(tensors_in(self.value)))

    def for_products(self) -> Linearised:
        """A linearisation whose VJPs skip the gradients of the parameters; release it after the adjoint solve."""
        return self if self.again is None else self.again()

    def vjp(self, u: State) -> State:
        """Jᵀu, a state like u; the gradients of the parameters are not computed."""
        values, cotangents = tensors_in(self.value), tensors_in(u)
        reached = [(fz, c.to(fz.dtype)) for fz, c in zip(values, cotangents, strict=True) if fz.requires_grad]
        if not reached:
            return map_tensors(torch.zeros_like, u)
        with self.autocast.on(), without_donated_buffers() if self.compiled else contextlib.nullcontext():
            products = torch.autograd.grad(
                [fz for fz, _ in reached],
                self.start,
                [c for _, c in reached],
                retain_graph=True,
                create_graph=self.create_graph,
                allow_unused=True,
            )
        pairs = zip(products, cotangents, strict=True)
        return with_tensors(
            u, (torch.zeros_like(c) if product is None else product.to(c.dtype) for product, c in pairs)
        )


@untraced
def linearised(f: Callable[[State], State], z: State, *, create_graph: bool = False) -> Linearised:
    """f(z) with graph; see ``Map.linearise``."""
    at = map_tensors(Tensor.detach, z)
    return _linearised(f, at, Arrival(), Autocast(tensors_in(z)[0].device.type), create_graph=create_graph)


def linearised_through(f: Callable[[State], State], z: State, autocast: Autocast) -> Linearised:
    """Like ``linearised``, but z keeps its graph and its tangent, so that Jᵀu can be differentiated by z."""
    return _linearised(f, z, Arrival(passed_on=True), autocast, create_graph=True)


def _linearised(
    f: Callable[[State], State], z: State, arrival: Arrival, autocast: Autocast, *, create_graph: bool
) -> Linearised:
    layout = Layout.of(z, coupled=True)  # only the structure is needed, and coupled=True accepts leaves of any shape
    saved = SavedTensors()
    with torch.enable_grad(), autocast.on(), saved.recorded():
        anchor = torch.zeros((), device=layout.device, requires_grad=True)
        leaves = _Begin.apply(arrival, anchor, *tensors_in(z))
        edges = tuple(get_gradient_edge(leaf) for leaf in leaves)  # pyright: ignore
        value = layout.cast(layout.aligned(f(with_tensors(z, leaves))))  # pyright: ignore
    return Linearised(
        value=value,
        start=edges,
        anchor=anchor,
        autocast=autocast,
        create_graph=create_graph,
        saved=saved,
        arrival=arrival,
    )


def linearised_for_products(f: Callable[[State], State], z: State, autocast: Autocast) -> Linearised:
    """The linearisation of a compiled f in which only z requires a gradient, so that a VJP computes nothing else."""
    with autocast.on(), without_donated_buffers():
        return dataclasses.replace(linearised(f, z), compiled=True)


class Arrival:
    """Receives the cotangents of z's leaves when a backward pass has gone through the whole graph of f(z).

    Args:
        passed_on: True to pass the cotangents on to the graph of z, if z has one.
    """

    def __init__(self, *, passed_on: bool = False) -> None:
        self.awaited: Callable[[tuple[Tensor | None, ...]], None] | None = None
        """A callback for one call: it gets Jᵀu leaf by leaf, None for zeros, where u is the cotangent of f(z)."""
        self.passed_on = passed_on

    def arrived(self, cotangents: tuple[Tensor | None, ...]) -> None:
        """Call ``awaited`` with the cotangents, and forget it."""
        if all(cotangent is None for cotangent in cotangents):  # this pass computes the gradients of other tensors
            return
        awaited, self.awaited = self.awaited, None
        if awaited is not None:
            awaited(cotangents)


class _Begin(torch.autograd.Function):
    """Identity on the leaves of z, where the graph of f(z) begins; its backward notifies ``Arrival``."""

    @staticmethod
    def forward(ctx: Any, arrival: Arrival, anchor: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.arrival = arrival
        ctx.set_materialize_grads(False)
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrival.arrived(cotangents)
        return (None, None, *(cotangents if ctx.arrival.passed_on else (None,) * len(cotangents)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tangent is None else tangent.view_as(tangent) for tangent in tangents[2:])


@dataclasses.dataclass(frozen=True)
class FunctionMap(Map):
    """A map made of any callable."""

    function: Callable[..., State]
    operands: tuple[Any, ...] = ()
    """Further arguments of the function, constant during a solve."""

    def __call__(self, z: State) -> State:
        """function(z, *operands)."""
        return self.function(z, *self.operands)

    def reads(self) -> tuple[Tensor, ...]:
        """The tensors in the operands."""
        return tuple(tensors_in(self.operands))

    def given(self, tensors: Sequence[Tensor]) -> FunctionMap:
        """The map with other operands."""
        return FunctionMap(self.function, with_tensors(self.operands, tensors))

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v by ``torch.func.jvp``."""
        return torch.func.jvp(self.__call__, (z,), (v,))[1]


def as_map(f: Callable[[State], State]) -> Map:
    """``f`` as a ``Map``: itself if it is one, else a ``FunctionMap``. Every plain callable becomes a map here.

    Raises:
        TypeError: f cannot be called.
    """
    if isinstance(f, Map):
        return f
    if not callable(f):
        raise TypeError(
            f"f is {type(f).__name__}; it must be a function of the state, or a Map: f comes first, then z0."
        )
    return FunctionMap(f)


@dataclasses.dataclass(frozen=True)
class AffineMap(Map):
    """u ↦ L(u) + factor·offset with a known linear part, so that J(u)·v = L(v) needs no derivative."""

    linear: Callable[[Tensor], Tensor]
    offset: Tensor
    factor: Tensor | None = None
    """One number per sample, [B 1 … 1], so that the product need not be stored; None for 1."""

    def __call__(self, z: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """L(z) + factor·offset."""
        linear = self.linear(z)
        return linear + self.offset if self.factor is None else torch.addcmul(linear, self.offset, self.factor)

    def jvp(self, z: Float[Tensor, "B *state"], v: Float[Tensor, "B *state"]) -> Float[Tensor, "B *state"]:
        """L(v)."""
        return self.linear(v)
