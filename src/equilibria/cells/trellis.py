"""The cell of TrellisNet: a causal convolution over two times, and the gates of an LSTM.

S. Bai, J. Z. Kolter, V. Koltun, "Trellis Networks for Sequence Modeling" (2019); as an equilibrium, Bai, Kolter and
Koltun 2019, §4.1. All that does not depend on z is computed in ``prepare``: effective weights, the injection of the
input, what the last state of the past adds to the first time, the masks. One call of f is one matrix product.

Letters: B batch, T time, E channels of the input, H channels of h and of c, O channels of the output; H2 = 2·H.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.masks import dropout_mask, masked
from equilibria.cells.memory import check_cache_use, check_new_cache, check_streams
from equilibria.cells.scan import scan
from equilibria.cells.trellis_context import TrellisCache, TrellisContext, TrellisMemory, TrellisWeights
from equilibria.cells.trellis_shape import TrellisShape
from equilibria.cells.weight_norm import NormedLinear
from equilibria.equilibrium import Cell
from equilibria.solve import select_rows


class TrellisCell(Cell):
    """z = [h; c] ↦ f(z; x), for all times t at once; ĥ = h ⊙ D.

        i, o, g, f = σ, σ, tanh, σ of  W⁰ ĥ_{t−1} + W¹ ĥ_t + X⁰ x_{t−1} + X¹ x_t + b
        c'_t = f ⊙ c_{t−1} + i ⊙ g,    h'_t = o ⊙ tanh c'_t

    Left of the first time stand the last h, c and x of the past, or zeros. Layer ℓ of TrellisNet is the ℓ-th iterate
    from zero. With W¹ = 0 the equilibrium is the LSTM (Bai, Kolter, Koltun, "Trellis Networks", theorem 1).

    With ``recurrence="delayed"`` c_{t−1} is that of the iterate, as in TrellisNet: what c carries needs an iteration a
    time step. With "scan" it is c'_{t−1}, so that it is carried to all times in one evaluation. Both maps have the same
    equilibria, since there c' = c; their networks of finite depth differ.

    Deviations from the authors' code: (1) one bias instead of two that are added; (2) the input is carried over the
    borders of segments like h and c, so that two segments joined by memory are one long one; ``carry_input=False`` has
    their zero.
    """

    def __init__(self, shape: TrellisShape) -> None:
        super().__init__()
        self.shape = shape
        channels, common = (
            shape.channels,
            {"outputs": 4 * shape.channels, "normed": shape.weight_norm, "std": shape.std},
        )
        self.state = NormedLinear(inputs=2 * channels, init="normal", **common)
        self.input = NormedLinear(inputs=2 * shape.width, init=shape.injection_init, bias=False, **common)
        assert self.state.bias is not None
        nn.init.normal_(self.state.bias, std=shape.std)

    def prepare(self, x: Float[Tensor, "B T E"], memory: TrellisMemory | TrellisCache | None) -> TrellisContext:
        """Weights, injection, the share of the past, and the masks."""
        cache, present = None, None
        if isinstance(memory, TrellisCache):
            cache, memory = memory, memory.memory
            present = _present(cache.padding, x)
            x = masked(x, present)
        self._check(x, memory, cache)
        shape, channels = self.shape, self.shape.channels
        weights = self._weights() if cache is None else cache.weights
        z = x.new_zeros(len(x), 1, 2 * channels) if memory is None else memory.z.to(x.dtype)
        h, c = z.split(channels, dim=-1)
        drop = dropout_mask((len(x), 1, channels), rate=shape.dropout, training=self.training, like=x)
        before = x.new_zeros(len(x), 1, shape.width) if memory is None or memory.x is None else memory.x.to(x.dtype)
        pairs = torch.cat([torch.cat([before, x[:, :-1]], dim=1), x], dim=-1)
        injection = functional.linear(pairs, weights.input, self.state.bias)
        h = masked(h, drop)
        if x.shape[1] == 1 and memory is not None:  # as in generation: then W⁰ has nothing more to do
            injection = injection + functional.linear(h, weights.state[:, :channels])
        return TrellisContext(
            weights=weights,
            injection=injection,
            past_h=h,
            past_c=c,
            drop=drop,
            present=present,
            last=x[:, -1:].detach().clone() if shape.carry_input or cache is not None else None,
            cache=cache,
        )

    def start(self, context: TrellisContext) -> Float[Tensor, "B T H2"]:
        """Zero; in generation, if asked for, the state of the position before."""
        cache, (batch, time, gates) = context.cache, context.injection.shape
        if cache is not None and cache.warm and time == 1:
            return cache.memory.z
        return context.past_c.new_zeros(batch, time, gates // 2)

    def warm_start(self, context: TrellisContext) -> Float[Tensor, "B T H2"]:
        """The last state of the past, at all times."""
        last = torch.cat([context.past_h, context.past_c], dim=-1)
        return last.expand(-1, context.injection.shape[1], -1)

    def forward(self, z: Float[Tensor, "B T H2"], context: TrellisContext) -> Float[Tensor, "B T H2"]:
        """f(z)."""
        h, c = z.split(self.shape.channels, dim=-1)
        gates = self._preactivation(masked(h, context.drop), context)
        i, o, g, f = gates.split(self.shape.channels, dim=-1)
        update, keep = i.sigmoid() * g.tanh(), f.sigmoid()
        if self.shape.recurrence == "scan" and z.shape[1] > 1:
            c = scan(masked(keep, context.present), masked(update, context.present), context.past_c)
        else:
            c = torch.addcmul(update, keep, torch.cat([context.past_c.to(c.dtype), c[:, :-1]], dim=1))
        return masked(torch.cat([o.sigmoid() * c.tanh(), c], dim=-1), context.present)

    def _preactivation(self, h: Float[Tensor, "B T H"], context: TrellisContext) -> Float[Tensor, "B T H4"]:
        """W⁰ ĥ_{t−1} + W¹ ĥ_t + injection."""
        weight, channels = context.weights.state, self.shape.channels
        if h.shape[1] == 1:
            h, weight = h[:, 0], weight[:, channels:]
        else:
            h = torch.cat([torch.cat([context.past_h.to(h.dtype), h[:, :-1]], dim=1), h], dim=-1).flatten(0, 1)
        return torch.addmm(context.injection.flatten(0, 1), h, weight.t()).view_as(context.injection)

    def output(self, z: Float[Tensor, "B T H2"]) -> Float[Tensor, "B T O"]:
        """The last O channels of h."""
        return z[..., self.shape.hidden : self.shape.channels]

    def select(self, context: TrellisContext, rows: Int[Tensor, " R"]) -> TrellisContext:
        """The context of these samples; not what ``remember`` needs, which is given the whole one."""
        of_samples = ("injection", "past_h", "past_c", "drop", "present")
        chosen = {name: select_rows(getattr(context, name), rows) for name in of_samples}
        return dataclasses.replace(context, last=None, cache=None, **chosen)

    def remember(self, z: Float[Tensor, "B T H2"], context: TrellisContext) -> TrellisMemory | TrellisCache:
        """h, c and x at the last time, detached; a cache, with them."""
        memory = TrellisMemory(z=z[:, -1:].detach().clone(), x=context.last)  # a view would keep all of z
        if context.cache is None:
            return memory
        padding = context.cache.padding
        if padding is not None:
            padding = (padding - z.shape[1]).clamp(min=0)
            padding = padding if padding.any() else None
        return dataclasses.replace(context.cache, memory=memory, padding=padding)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: TrellisMemory | None = None,
        warm: bool = False,
    ) -> TrellisCache:
        """The memory for generation: one state a stream, exact for text of any length, beside the weights.

        It stands wherever a ``TrellisMemory`` does, without gradients; the weights may not change meanwhile. The input
        is always carried, as from time to time inside a segment.

        Args:
            batch: rows.
            length: None: there is no number of positions that could be chosen.
            padding: positions at which the text of each row has not begun; f is 0 there.
            memory: of what came before.
            warm: start each single position from the state of the one before it, instead of zero.
        """
        check_new_cache(self, batch, kind=TrellisMemory, memory=memory, padding=padding)
        if length is not None:
            raise ValueError(
                f"cache(length={length}): a trellis remembers one state, of all the text before it, and not a number "
                "of positions; leave the length of the memory out."
            )
        with torch.no_grad():
            weights = self._weights()
        if memory is None:
            memory = TrellisMemory(z=weights.state.new_zeros(batch, 1, 2 * self.shape.channels), x=None)
        return TrellisCache(memory=memory, weights=weights, padding=padding, warm=warm)

    def _weights(self) -> TrellisWeights:
        return TrellisWeights(state=self._dropped(self.state), input=self._dropped(self.input))

    def _dropped(self, linear: NormedLinear) -> Tensor:
        """The effective matrix, with DropConnect on the raw weights of the past (Merity, McCann, Socher 2017)."""
        rate, (rows, columns) = self.shape.weight_dropout, linear.direction.shape
        if rate == 0 or not self.training:
            return linear.effective()
        kept = torch.empty(rows, columns // 2, dtype=torch.bool, device=linear.direction.device).bernoulli_(1 - rate)
        return linear.effective(kept, rate)

    def _check(self, x: Tensor, memory: TrellisMemory | None, cache: TrellisCache | None) -> None:
        if x.shape[2] != self.shape.width:
            raise ValueError(
                f"the input has {x.shape[2]} channels and the cell reads {self.shape.width}; give both the same width."
            )
        if cache is not None:
            check_cache_use(self)
        if memory is not None:
            check_streams(len(memory.z), x)


def _present(padding: Tensor | None, x: Tensor) -> Float[Tensor, "B T 1"] | None:
    """1 where the text of a row has begun, 0 before; None if all have."""
    if padding is None:
        return None
    times = torch.arange(x.shape[1], device=x.device)
    return (times >= padding[:, None]).to(x.dtype)[..., None]
