"""The cell of the DEQ-Transformer: one block of relative attention with memory, and a feed-forward network.

The input enters through an injection into queries, keys and values (Bai, Kolter and Koltun 2019, §4.2). All that does
not depend on z is computed in ``prepare``: effective weights, injection, the keys and values of the memory, the
position term, the masks. One call of f is then six matrix products (seven with relative positions). Without injection
and with the options of ``explicit`` it is a layer of Transformer-XL (Dai et al. 2019).

Letters: B batch, T time, M memory, D width, I inner width.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.attention import Attention
from equilibria.cells.cache import KeyValueCache
from equilibria.cells.masks import add_masked, dropout_mask, masked
from equilibria.cells.memory import check_cache_use, check_new_cache, check_streams
from equilibria.cells.positions import DecayPositions, RelativePositions
from equilibria.cells.transformer_context import (
    TransformerCache,
    TransformerContext,
    TransformerMemory,
    TransformerWeights,
)
from equilibria.cells.transformer_shape import TransformerShape
from equilibria.cells.weight_norm import NormedLinear
from equilibria.equilibrium import Cell
from equilibria.solve import select_rows


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
        width, kind = shape.width, {"init": shape.init, "std": shape.std}
        self.inject = None
        if shape.injection:
            self.inject = NormedLinear(inputs=width, outputs=3 * width, normed=False, init="normal", std=shape.std)
        self.attention = Attention(
            width=width,
            heads=shape.heads,
            positions=_positions(shape),
            dropout=shape.attention_dropout,
            weight_norm=shape.weight_norm,
            norm=shape.attention_norm,
            affine=shape.affine,
            **kind,
        )
        self.inner = NormedLinear(inputs=width, outputs=shape.inner, normed=shape.weight_norm, **kind)
        self.outer = NormedLinear(inputs=shape.inner, outputs=width, normed=shape.weight_norm, **kind)
        # The first norm stands before the feed-forward network, the second at the end or at the beginning of f.
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=shape.affine) for _ in range(2))

    def prepare(
        self, x: Float[Tensor, "B T D"], memory: TransformerMemory | TransformerCache | None
    ) -> TransformerContext:
        """Weights, injection, keys and values of the memory, position term and masks."""
        return self.prepare_injected(x, self.injected(x), memory)

    def injected(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 3*D"] | None:
        """U = x W_in + b_in; None from a cell without injection."""
        self._check_width(x)
        return None if self.inject is None else functional.linear(x, self.inject.effective(), self.inject.bias)

    def prepare_injected(
        self,
        x: Float[Tensor, "B T D"],
        injection: Float[Tensor, "B T 3*D"] | None,
        memory: TransformerMemory | TransformerCache | None,
    ) -> TransformerContext:
        """``prepare`` with an injection from elsewhere: several cells may share one."""
        self._check_memory(x, memory)
        table, last, hidden = None, None, None
        if isinstance(memory, TransformerCache):
            weights, table, last = memory.weights, memory.table, memory.last
            past = memory.past.with_room(x.shape[1])
            hidden = past.hidden(x.shape[1])
            table = table if x.shape[1] == 1 else None  # it reaches back from one new position only
            memory = dataclasses.replace(memory, past=past)
        else:
            weights = self._weights()
            past = None if memory is None else self._keys_and_values(memory.z, memory.u, weights)
        start = torch.zeros_like(x) if last is None or x.shape[1] > 1 else last
        return TransformerContext(
            weights=weights,
            attention=self.attention.prepare(x, injection, past, weights=weights.attention, table=table, hidden=hidden),
            start=start if self.shape.injection else x,
            injection=None if injection is None else injection.detach(),
            drop_attention=self._mask(x, self.shape.width),
            drop_inner=self._mask(x, self.shape.inner),
            drop_outer=self._mask(x, self.shape.width),
            present=None if hidden is None else (~hidden[:, -x.shape[1] :, None]).to(x.dtype),
            memory=memory,
        )

    def start(self, context: TransformerContext) -> Float[Tensor, "B T D"]:
        """Zero; without injection the input; in generation the state of the position before."""
        return context.start

    def warm_start(self, context: TransformerContext) -> Float[Tensor, "B T D"]:
        """The last state of the memory, at all positions; without one, ``start``."""
        memory, start = context.memory, context.start
        return memory.z[:, -1:].expand_as(start).to(start) if isinstance(memory, TransformerMemory) else start

    def forward(self, z: Float[Tensor, "B T D"], context: TransformerContext) -> Float[Tensor, "B T D"]:
        """f(z)."""
        post, weights = self.shape.norm == "post", context.weights
        attended = self.attention(z if post else self.norms[1](z), context.attention)
        a = add_masked(z, attended, context.drop_attention)
        b = self.norms[0](a)
        # The product is left flat, because relu in place on a view would make autograd copy it back and forth.
        hidden = torch.relu_(functional.linear(b.flatten(0, 1), weights.inner, self.inner.bias))
        hidden = masked(hidden.unflatten(0, z.shape[:2]), context.drop_inner)
        update = functional.linear(hidden, weights.outer, self.outer.bias)
        f = add_masked(a if self.shape.norm == "pre" else b, update, context.drop_outer)
        return masked(self.norms[1](f) if post else f, context.present)

    def select(self, context: TransformerContext, rows: Int[Tensor, " R"]) -> TransformerContext:
        """The context of these samples; not what ``remember`` needs, which is given the whole one."""
        masks = ("drop_attention", "drop_inner", "drop_outer", "present")
        chosen = {name: select_rows(getattr(context, name), rows) for name in masks}
        return dataclasses.replace(
            context,
            attention=context.attention.select(rows, batch=len(context.start)),
            start=context.start[rows],
            injection=None,
            memory=None,
            **chosen,
        )

    def remember(
        self, z: Float[Tensor, "B T D"], context: TransformerContext
    ) -> TransformerMemory | TransformerCache | None:
        """The last M positions of [Z0; z] and of [U0; U], detached; a cache, with the keys and values of z."""
        length, memory = self.shape.memory, context.memory
        if isinstance(memory, TransformerCache):
            past = memory.past.advanced(self._keys_and_values(z, context.injection, context.weights))
            return dataclasses.replace(memory, past=past, last=z[:, -1:] if memory.warm else None)
        if length == 0:
            return None
        z, u = z.detach(), context.injection
        if memory is not None and z.shape[1] < length:
            z = torch.cat([memory.z, z], dim=1)
            u = None if u is None or memory.u is None else torch.cat([memory.u, u], dim=1)
        return TransformerMemory(z=z[:, -length:], u=None if u is None else u[:, -length:])

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: TransformerMemory | None = None,
        warm: bool = False,
    ) -> TransformerCache:
        """A memory of up to ``length`` positions (M if None) whose keys and values are computed once, for generation.

        It stands wherever a ``TransformerMemory`` does, without gradients: by the exactness law, what is solved from it
        position by position is the equilibrium of the whole text, as far as its length and the window reach. The
        weights may not change meanwhile.

        Args:
            batch: rows.
            length: positions that are remembered.
            padding: positions at which the text of each row has not begun; f is 0 there, and nobody sees them.
            memory: of what came before.
            warm: start each single position from the state of the one before it, instead of zero: worth a try where
                neighbours resemble each other; on text it saved nothing.
        """
        shape = self.shape
        check_new_cache(self, batch, kind=TransformerMemory, memory=memory, padding=padding)
        length = min(shape.memory if length is None else length, (shape.window or 1000) - 1)
        with torch.no_grad():
            weights = self._weights()
            like = weights.inner
            past = KeyValueCache.empty(
                heads=shape.heads,
                batch=batch,
                width=shape.width // shape.heads,
                length=length,
                padding=padding,
                like=like,
            )
            if memory is not None:
                known = self._keys_and_values(memory.z, memory.u, weights)
                past = past.with_room(known.shape[3]).advanced(known)
            table = self.attention.positions.table(queries=1, memory=length, like=like)
        return TransformerCache(past=past, weights=weights, table=table, last=None, warm=warm)

    def _weights(self) -> TransformerWeights:
        return TransformerWeights(
            attention=self.attention.weights(), inner=self.inner.effective(), outer=self.outer.effective()
        )

    def _keys_and_values(self, z: Tensor, injection: Tensor | None, weights: TransformerWeights) -> Tensor:
        z = z if self.shape.norm == "post" else self.norms[1](z)
        return self.attention.keys_and_values(z, injection, weights.attention)

    def _mask(self, x: Tensor, width: int) -> Tensor | None:
        shape = (len(x), 1 if self.shape.variational else x.shape[1], width)
        return dropout_mask(shape, rate=self.shape.dropout, training=self.training, like=x)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[2] != self.shape.width:
            raise ValueError(
                f"the input has {x.shape[2]} channels and the cell {self.shape.width}; give both the same width."
            )

    def _check_memory(self, x: Tensor, memory: TransformerMemory | TransformerCache | None) -> None:
        if isinstance(memory, TransformerCache):
            check_cache_use(self)
            check_streams(memory.past.slots.shape[2], x)
        elif memory is not None:
            check_streams(len(memory.z), x)


def _positions(shape: TransformerShape) -> RelativePositions | DecayPositions:
    window = shape.window or 1000
    if shape.positions == "decay":
        return DecayPositions(heads=shape.heads, window=window, longest=shape.longest)
    return RelativePositions(
        width=shape.width,
        heads=shape.heads,
        window=window,
        dropout=shape.dropout,
        variational=shape.variational,
        weight_norm=shape.weight_norm,
        init=shape.init,
        std=shape.std,
    )
