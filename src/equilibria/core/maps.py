"""Maps: what solvers, gradient rules and stability measures may ask of f.

Letters: B batch, R chosen samples. State ``z``, map ``f``, Jacobian ``J``, cotangent ``u``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from equilibria.core.autocast import Autocast
from equilibria.core.capture import leaves_below
from equilibria.core.state import Layout, State
from equilibria.core.trees import map_tensors, tensors_in, with_tensors


class Map(ABC):
    """f: State -> State. Only the call must be written; every other method has a default that is right for any f."""

    @abstractmethod
    def __call__(self, z: State) -> State:
        """f(z)."""

    def jvp(self, z: State, v: State) -> State:
        """J(z)·v, here by ``torch.func.jvp``."""
        return torch.func.jvp(self.__call__, (z,), (v,))[1]

    def linearise(self, z: State, *, create_graph: bool = False) -> Linearised:
        """f(z) with graph, and products with Jᵀ there: one evaluation of f.

        Args:
            z: the point; it is a constant of the result.
            create_graph: the products shall be differentiable themselves.
        """
        return linearised(self, z, create_graph=create_graph)

    def eager(self) -> Map:
        """The map without compilation, which alone shows what it reads and can be differentiated twice."""
        return self

    def reads(self) -> tuple[Tensor, ...]:
        """The tensors that f depends on and can be given in another form, for ``torch.func``; here none are known."""
        return ()

    def given(self, tensors: Sequence[Tensor]) -> Map:
        """The map that reads these tensors in the place of ``reads()``."""
        return self

    def pinned(self) -> Map:
        """The map of what it reads now, whatever is put into its place until a backward pass asks for it again."""
        return self

    def rows(self, index: Int[Tensor, " R"]) -> Map | None:
        """The map of these samples alone, in this order; here None, which says that there is no such map.

        A solver uses it to leave converged samples out. Whether it is None may not depend on ``index``, which can be
        empty.
        """
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Linearised:
    """f at one point: its value, with the graph to everything that f reads, and vector–Jacobian products (VJPs)."""

    value: State
    """f(z), every leaf in the dtype of z's leaf."""
    start: tuple[GradientEdge, ...]
    """Where the leaves of z enter the graph, which keeps z itself only if f needs it again."""
    anchor: Tensor
    """The one leaf of the graph that is not an input of f."""
    autocast: Autocast
    create_graph: bool = False
    compiled: bool = False
    """True if f was compiled: its backward pass must not overwrite the tensors that it saved for the next VJP."""
    arrival: Arrival = dataclasses.field(default_factory=lambda: Arrival())
    """What is done with the cotangent of z at the end of a backward pass."""
    again: Callable[[], Linearised] | None = None
    """Evaluates f once more for VJPs alone, where that makes them cheaper."""

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
        with self.autocast.on(), _kept_whole() if self.compiled else contextlib.nullcontext():
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


def linearised(f: Callable[[State], State], z: State, *, create_graph: bool = False) -> Linearised:
    """f(z) with graph; see ``Map.linearise``."""
    at = map_tensors(Tensor.detach, z)
    return _linearised(f, at, Arrival(), Autocast(tensors_in(z)[0].device.type), create_graph=create_graph)


def linearised_through(f: Callable[[State], State], z: State, autocast: Autocast) -> Linearised:
    """f(z) with graph, as ``linearised`` gives it, but z keeps its own graph and its tangent, and Jᵀu depends on z."""
    return _linearised(f, z, Arrival(passed_on=True), autocast, create_graph=True)


def _linearised(
    f: Callable[[State], State], z: State, arrival: Arrival, autocast: Autocast, *, create_graph: bool
) -> Linearised:
    layout = Layout.of(z, coupled=True)  # the structure alone is needed, and any leaf has one
    with torch.enable_grad(), autocast.on():
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
        arrival=arrival,
    )


def linearised_for_products(f: Callable[[State], State], z: State, autocast: Autocast) -> Linearised:
    """The linearisation of a compiled f of which only z requires a gradient."""
    with autocast.on(), _kept_whole():
        return dataclasses.replace(linearised(f, z), compiled=True)


def _kept_whole() -> contextlib.AbstractContextManager[Any]:
    """Disable donated buffers: a compiled backward runs once per VJP and must not overwrite its saved tensors.

    The setting is read when f is compiled and at each backward pass, in the thread where that runs.
    """
    return functorch_config.patch(donated_buffer=False)


class Arrival:
    """Where the cotangents of z's leaves arrive when a backward pass goes through the whole graph of f(z).

    Args:
        passed_on: z has a graph of its own, and they go on to it.
    """

    def __init__(self, *, passed_on: bool = False) -> None:
        self.awaited: Callable[[tuple[Tensor | None, ...]], None] | None = None
        """Called once with Jᵀu, leaf by leaf, where u is what f(z) received; then forgotten. None stands for zeros."""
        self.passed_on = passed_on

    def arrived(self, cotangents: tuple[Tensor | None, ...]) -> None:
        """Hand the cotangents on to whoever waits for them."""
        if all(cotangent is None for cotangent in cotangents):  # a backward pass on its way to other tensors
            return
        awaited, self.awaited = self.awaited, None
        if awaited is not None:
            awaited(cotangents)


class _Begin(torch.autograd.Function):
    """The leaves of z, as the place where the graph of f(z) begins: a backward pass tells ``Arrival`` and ends here."""

    @staticmethod
    def forward(ctx: Any, arrival: Arrival, anchor: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.arrival = arrival
        ctx.set_materialize_grads(False)
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrival.arrived(cotangents)
        return (None, None, *(cotangents if ctx.arrival.passed_on else (None,) * len(cotangents)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tangent is None else tangent.view_as(tangent) for tangent in tangents[2:])


@dataclasses.dataclass(frozen=True)
class FunctionMap(Map):
    """Any callable as a map."""

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
    """``f`` as a ``Map``: itself if it is one, else a ``FunctionMap``; the one door for plain callables.

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
