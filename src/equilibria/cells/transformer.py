"""The cell of the DEQ-Transformer: one block of relative attention with memory, and a feed-forward network.

The input enters through an injection into queries, keys and values (Bai, Kolter and Koltun 2019, §4.2). All that does
not depend on z is computed in ``prepare``: effective weights, injection, the keys and values of the memory, the
position term, the masks. One call of f is then six matrix products (seven with relative positions).

Letters: B batch, T time, M memory, D width, I inner width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from equilibria.cells.attention import Attention, AttentionContext
from equilibria.cells.masks import add_masked, check_rate, dropout_mask, masked
from equilibria.cells.positions import DecayPositions, RelativePositions
from equilibria.cells.weight_norm import INITS, Init, NormedLinear
from equilibria.equilibrium import Cell

Norm = Literal["post", "pre", "pre-normalised"]
Positions = Literal["relative", "decay"]
_CHOICES = {"norm": ("post", "pre", "pre-normalised"), "positions": ("relative", "decay"), "init": INITS}


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """The hyper-parameters of a ``TransformerCell``."""

    width: int = 128
    """D, channels of the state; a multiple of heads, and even with relative positions."""
    heads: int = 4
    """H, attention heads."""
    inner: int = 512
    """I, width of the feed-forward network."""
    memory: int = 64
    """M, positions of the past that are remembered between segments; 0 for none."""
    window: int = 0
    """How many positions back a query sees, itself included; 0 means 1000."""
    positions: Positions = "relative"
    """The term of Transformer-XL ("relative"), or a learned bias per head and distance ("decay"), quick to train."""
    longest: int = 1024
    """Only with "decay": the number of distances that have a bias; memory and segment together may not be longer."""
    norm: Norm = "post"
    """Where layer norm stands: "post" (the paper), "pre" (the textbook), or "pre-normalised" (see the cell)."""
    dropout: float = 0.0
    """Share of channels dropped from attention output, inner layer, feed-forward output and position table."""
    attention_dropout: float = 0.0
    """Share of attention weights dropped."""
    weight_norm: bool = True
    """Whether the five matrices inside f are weight-normed; without it f stops being solvable in long runs."""
    init: Init = "default_fan_in"
    """How these matrices start: from U(±1/√fan_in), or "normal", from N(0, 0.01²)."""

    def __post_init__(self) -> None:
        for name, low in (("width", 1), ("heads", 1), ("inner", 1), ("longest", 1), ("memory", 0), ("window", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"TransformerShape({name}={getattr(self, name)}): {name} is at least {low}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"TransformerShape({name}={getattr(self, name)!r}): {name} is one of {choices}.")
        if self.width % self.heads:
            divisors = [heads for heads in range(1, self.width + 1) if self.width % heads == 0]
            raise ValueError(
                f"TransformerShape(width={self.width}, heads={self.heads}): the heads share the width evenly; "
                f"try heads={min(divisors, key=lambda heads: abs(heads - self.heads))}."
            )
        if self.positions == "relative" and self.width % 2:
            raise ValueError(
                f"TransformerShape(width={self.width}, positions='relative'): the sinusoids come in pairs of sine and "
                f"cosine, so the width is even; try width={self.width + 1}, or positions='decay'."
            )
        check_rate("TransformerShape", "dropout", self.dropout)
        check_rate("TransformerShape", "attention_dropout", self.attention_dropout)

    def build(self) -> TransformerCell:
        """The cell, with fresh parameters."""
        return TransformerCell(self)


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerMemory:
    """The past of the streams, detached: the state and the injection at the same M positions."""

    z: Float[Tensor, "B M D"]
    u: Float[Tensor, "B M 3*D"]


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerContext:
    """What is constant during a solve, with graph where it depends on parameters or input."""

    attention: AttentionContext
    inner: Float[Tensor, "I D"]
    """Effective weights of the feed-forward network."""
    outer: Float[Tensor, "D I"]
    drop_attention: Float[Tensor, "B 1 D"] | None
    """Dropout masks: of the attention output, of the inner layer, of the feed-forward output."""
    drop_inner: Float[Tensor, "B 1 I"] | None
    drop_outer: Float[Tensor, "B 1 D"] | None
    memory: TransformerMemory | None
    """As it came, for ``remember``."""


class TransformerCell(Cell):
    """z ↦ f(z; x), the block of Bai, Kolter and Koltun 2019, §4.2, with layer norms LN that have no parameters.

    Keys and values are of c = [Z0; z], queries of z; in both pre-norm variants, of LN(c).

        post            a = LN(z + Attention(c)),      f = LN(a + FFN(a))
        pre             a = z + Attention(LN(c)),      f = a + FFN(LN(a))
        pre-normalised  a = LN(z + Attention(LN(c))),  f = a + FFN(a)

    With "pre", J = I + …, so that only a solver that needs no contraction, or a Jacobian penalty, makes it a good
    equilibrium; the residual of "pre-normalised" is bounded.
    """

    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention = Attention(
            width=shape.width,
            heads=shape.heads,
            positions=_positions(shape),
            dropout=shape.attention_dropout,
            weight_norm=shape.weight_norm,
            init=shape.init,
        )
        self.inner = NormedLinear(inputs=shape.width, outputs=shape.inner, normed=shape.weight_norm, init=shape.init)
        self.outer = NormedLinear(inputs=shape.inner, outputs=shape.width, normed=shape.weight_norm, init=shape.init)

    def prepare(self, x: Float[Tensor, "B T D"], memory: TransformerMemory | None) -> TransformerContext:
        """Weights, injection, keys and values of the memory, position term and masks."""
        self._check(x, memory)
        z0, u0 = (None, None) if memory is None else (memory.z, memory.u)
        if z0 is not None and self.shape.norm != "post":
            z0 = _layer_norm(z0)

        def channels(width: int) -> Tensor | None:
            return dropout_mask((len(x), 1, width), rate=self.shape.dropout, training=self.training, like=x)

        return TransformerContext(
            attention=self.attention.prepare(x, z0, u0),
            inner=self.inner.effective(),
            outer=self.outer.effective(),
            drop_attention=channels(self.shape.width),
            drop_inner=channels(self.shape.inner),
            drop_outer=channels(self.shape.width),
            memory=memory,
        )

    def start(self, context: TransformerContext) -> Float[Tensor, "B T D"]:
        """Zero."""
        batch, time, _ = context.attention.u.shape
        return context.attention.u.new_zeros(batch, time, self.shape.width)

    def forward(self, z: Float[Tensor, "B T D"], context: TransformerContext) -> Float[Tensor, "B T D"]:
        """f(z)."""
        post, pre = self.shape.norm == "post", self.shape.norm == "pre"
        attended = self.attention(z if post else _layer_norm(z), context.attention)
        a = add_masked(z, attended, context.drop_attention)
        b = _layer_norm(a)
        # The product is left flat, because relu in place on a view would make autograd copy it back and forth.
        hidden = torch.relu_(functional.linear(b.flatten(0, 1), context.inner, self.inner.bias))
        hidden = masked(hidden.unflatten(0, z.shape[:2]), context.drop_inner)
        update = functional.linear(hidden, context.outer, self.outer.bias)
        f = add_masked(a if pre else b, update, context.drop_outer)
        return _layer_norm(f) if post else f

    def remember(self, z: Float[Tensor, "B T D"], context: TransformerContext) -> TransformerMemory | None:
        """The last M positions of [Z0; z] and of [U0; U], detached."""
        length, memory = self.shape.memory, context.memory
        if length == 0:
            return None
        z, u = z.detach(), context.attention.u
        if memory is not None and z.shape[1] < length:
            z, u = torch.cat([memory.z, z], dim=1), torch.cat([memory.u, u], dim=1)
        return TransformerMemory(z=z[:, -length:], u=u[:, -length:])

    def _check(self, x: Tensor, memory: TransformerMemory | None) -> None:
        if x.shape[2] != self.shape.width:
            raise ValueError(
                f"the input has {x.shape[2]} channels and the cell {self.shape.width}; give both the same width."
            )
        if memory is not None and len(memory.z) != len(x):
            raise ValueError(
                f"the memory is of {len(memory.z)} streams and the input of {len(x)}; a memory continues the streams "
                "that it came from, so pass memory=None where new ones begin."
            )


def _positions(shape: TransformerShape) -> RelativePositions | DecayPositions:
    window = shape.window or 1000
    if shape.positions == "decay":
        return DecayPositions(heads=shape.heads, window=window, longest=shape.longest)
    return RelativePositions(
        width=shape.width,
        heads=shape.heads,
        window=window,
        dropout=shape.dropout,
        weight_norm=shape.weight_norm,
        init=shape.init,
    )


def _layer_norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])
