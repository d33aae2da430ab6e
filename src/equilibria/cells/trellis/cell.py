"""The cell of TrellisNet: a causal convolution over two times, and the gates of an LSTM.

S. Bai, J. Z. Kolter, V. Koltun, "Trellis Networks for Sequence Modeling" (2019); as an equilibrium, Bai, Kolter and
Koltun 2019, §4.1. Everything that does not depend on z is computed in ``prepare``: effective weights, the injection of
the input, the contribution of the past to the first time, the masks. One call of f is one matrix product.

Letters: B batch, T time, E channels of the input, H channels of h and of c, O channels of the output; H2 = 2·H.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equilibria.cells.trellis.prepared import (
    TrellisCache,
    TrellisKept,
    TrellisMemory,
    TrellisRows,
    TrellisWeights,
    last_of,
    valid_of,
)
from equilibria.cells.trellis.scan import scan
from equilibria.checks import check_at_least, check_fields
from equilibria.core.graph import recordable
from equilibria.layers.cell import Prepared
from equilibria.layers.dropout import BatchSlice, check_rate, dropout_mask, masked
from equilibria.layers.held import Held
from equilibria.layers.linear import Init, NormedLinear, does_more_when_called, linear, weights_of
from equilibria.layers.matrices import LinearWeights, like_of
from equilibria.layers.sequence import (
    SequenceCell,
    check_cache_use,
    check_key_padding_mask,
    check_new_cache,
    check_streams,
    check_width,
)


@dataclasses.dataclass(frozen=True)
class TrellisConfig:
    """The hyper-parameters of a ``TrellisCell``: kernels of two times, without dilation, as in the language models.

    The state has 2·(hidden + outputs) channels, half of them of h and half of c.
    """

    width: int = 400
    """E, channels of the input."""
    hidden: int = 1000
    """Number of channels of h that stay inside the cell."""
    outputs: int = 400
    """O, the number of channels of h, the last ones, that later layers read."""
    dropout: float = 0.0
    """Share of the channels of h that is dropped inside the cell: the same at all times and in all iterations."""
    weight_dropout: float = 0.0
    """Share of the weights of the past, W⁰ and X⁰, that is dropped per step (DropConnect)."""
    weight_norm: bool = True
    """Normalise the weights of the two matrices."""
    carry_input: bool = True
    """A segment reads the last input of the previous one, as it reads its state; TrellisNet's code reads 0."""
    recurrence: Literal["delayed", "scan"] = "delayed"
    """The c_{t−1} in c_t comes from the iterate ("delayed", TrellisNet) or from the same evaluation ("scan")."""
    std: float = 0.01
    """The weights of h and the bias start from N(0, std²)."""
    injection_init: Init = "default_fan_in"
    """The weights of the input start from U(±1/√(2·width)), or with "normal" from N(0, std²), as in TrellisNet."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, width=1, hidden=0, outputs=1, std=0)
        check_rate("TrellisConfig", "dropout", self.dropout)
        check_rate("TrellisConfig", "weight_dropout", self.weight_dropout)

    @property
    def channels(self) -> int:
        """H = hidden + outputs, channels of h, and of c."""
        return self.hidden + self.outputs

    def build(self) -> TrellisCell:
        """The cell, with fresh parameters."""
        return TrellisCell(self)


class TrellisCell(SequenceCell):
    """z = [h; c] ↦ f(z; x), for all times t at once; ĥ = h ⊙ D.

        i, o, g, f = σ, σ, tanh, σ of  W⁰ ĥ_{t−1} + W¹ ĥ_t + X⁰ x_{t−1} + X¹ x_t + b
        c'_t = f ⊙ c_{t−1} + i ⊙ g,    h'_t = o ⊙ tanh c'_t

    Before the first time come the last h, c and x of the past, or zeros. Layer ℓ of TrellisNet is the ℓ-th iterate
    from zero. With W¹ = 0 the equilibrium is the LSTM (Bai, Kolter, Koltun, "Trellis Networks", theorem 1).

    With ``recurrence="delayed"`` c_{t−1} is that of the iterate, as in TrellisNet, so information in c needs one
    iteration per time step. With "scan" it is c'_{t−1}, and one evaluation carries it to all times. Both maps have the
    same equilibria, since c' = c there; their networks of finite depth differ.

    Deviations from the authors' code: (1) one bias instead of the sum of two; (2) the input is carried over the border
    of segments like h and c, so that two segments joined by memory are one long segment; ``carry_input=False`` reads 0
    there, as the authors do.
    """

    def __init__(self, config: TrellisConfig) -> None:
        super().__init__()
        self.config = config
        self._held = Held()
        channels = config.channels
        common = {"outputs": 4 * channels, "normed": config.weight_norm, "std": config.std}
        self.state = NormedLinear(inputs=2 * channels, init="normal", **common)
        self.input = NormedLinear(inputs=2 * config.width, init=config.injection_init, bias=False, **common)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias again; the matrices draw their own parameters."""
        assert self.state.bias is not None
        nn.init.normal_(self.state.bias, std=self.config.std)

    def prepare(
        self,
        x: Float[Tensor, "B T E"],
        memory: TrellisMemory | TrellisCache | None = None,
        *,
        warm: bool = False,
        part: BatchSlice | None = None,
        key_padding_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Prepared:
        """Shared: the weights. Rows: the injection, the contribution of the past, and the masks."""
        cache, valid = None, None if key_padding_mask is None else (~key_padding_mask[..., None]).to(x.dtype)
        if isinstance(memory, TrellisCache):
            cache, memory = memory, memory.memory
            _check_one_padding(key_padding_mask, cache.padding)
            valid = valid_of(cache.padding, x) if valid is None else valid
        memory = recordable(memory)
        self._check(x, memory, cache)
        begun = None if memory is None or key_padding_mask is None else memory.z.flatten(1).bool().any(dim=1)
        check_key_padding_mask(key_padding_mask, x, begun)
        x = masked(x, valid)
        config, channels = self.config, self.config.channels
        weights = self._weights() if cache is None else self._held.of(self, self._weights)
        z = x.new_zeros(x.shape[0], 1, 2 * channels) if memory is None else memory.z.to(x.dtype)
        h, c = z.split(channels, dim=-1)
        drop = dropout_mask((x.shape[0], 1, channels), rate=config.dropout, training=self.training, like=x, part=part)
        before = (
            x.new_zeros(x.shape[0], 1, config.width) if memory is None or memory.x is None else memory.x.to(x.dtype)
        )
        pairs = torch.cat([torch.cat([before, x[:, :-1]], dim=1), x], dim=-1)
        injection = linear(pairs, weights.input, weights.bias)
        h = masked(h, drop)
        if x.shape[1] == 1 and memory is not None:  # as in generation: here W⁰ acts on the past alone
            injection = injection + linear(h, weights.state[:, :channels])
        starts_warm = warm if cache is None else cache.warm and x.shape[1] == 1
        kept = TrellisKept(
            start=torch.cat([h, c], dim=-1) if starts_warm else None,
            like=injection,
            last=last_of(x, before, valid).detach().clone() if config.carry_input or cache is not None else None,
            cache=cache,
            past=z.detach(),
        )
        rows = TrellisRows(injection=injection, past_h=h, past_c=c, drop=drop, valid=valid)
        return Prepared(shared=weights, rows=rows, kept=kept, droppable=x.shape[1] > 1)

    def start(self, prepared: Prepared) -> Float[Tensor, "B T H2"]:
        """Zero; if warm, the last state of the past, at all times."""
        kept: TrellisKept = prepared.kept
        batch, time, gates = kept.like.shape
        if kept.start is None:
            return kept.like.new_zeros(batch, time, gates // 2)
        return kept.start.expand(-1, time, -1)

    def forward(self, z: Float[Tensor, "B T H2"], prepared: Prepared) -> Float[Tensor, "B T H2"]:
        """f(z)."""
        rows: TrellisRows = prepared.rows
        h, c = z.split(self.config.channels, dim=-1)
        gates = self._preactivation(masked(h, rows.drop), prepared.shared, rows)
        i, o, g, f = gates.split(self.config.channels, dim=-1)
        update, keep = i.sigmoid() * g.tanh(), f.sigmoid()
        if self.config.recurrence == "scan" and z.shape[1] > 1:
            c = scan(masked(keep, rows.valid), masked(update, rows.valid), rows.past_c)
        else:
            c = torch.addcmul(update, keep, torch.cat([rows.past_c.to(c.dtype), c[:, :-1]], dim=1))
        return masked(torch.cat([o.sigmoid() * c.tanh(), c], dim=-1), rows.valid)

    def _preactivation(
        self, h: Float[Tensor, "B T H"], weights: TrellisWeights, rows: TrellisRows
    ) -> Float[Tensor, "B T H4"]:
        """W⁰ ĥ_{t−1} + W¹ ĥ_t + injection."""
        weight, channels = weights.state, self.config.channels
        if h.shape[1] == 1:
            weight = weight[:, channels:]
        else:
            h = torch.cat([torch.cat([rows.past_h.to(h.dtype), h[:, :-1]], dim=1), h], dim=-1)
        return linear(h, weight, rows.injection)

    def output(self, z: Float[Tensor, "B T H2"]) -> Float[Tensor, "B T O"]:
        """The last O channels of h."""
        return z[..., self.config.hidden : self.config.channels]

    def remember(self, z: Float[Tensor, "B T H2"], prepared: Prepared) -> TrellisMemory | TrellisCache:
        """h, c and x at the last time of the text, detached; with a cache, the cache that holds them."""
        kept: TrellisKept = prepared.kept
        last = last_of(z.detach(), kept.past, prepared.rows.valid).clone()  # a view would keep all of z alive
        memory = TrellisMemory(z=last, x=kept.last)
        if kept.cache is None:
            return memory
        padding = kept.cache.padding
        if padding is not None:
            padding = (padding - z.shape[1]).clamp(min=0)
            padding = padding if padding.any() else None
        return dataclasses.replace(kept.cache, memory=memory, padding=padding)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: TrellisMemory | None = None,
        warm: bool = False,
    ) -> TrellisCache:
        """The memory for generation: one state per stream, exact for text of any length.

        It can replace a ``TrellisMemory``, without gradients. It always carries the input over, as happens inside a
        segment.

        Args:
            batch: number of streams.
            length: must be None, since a trellis remembers one state and not a number of positions.
            padding: number of positions before the text of each stream begins; f is 0 there.
            memory: the memory of the text before.
            warm: start each single position from the state of the previous one instead of zero.
        """
        check_new_cache(self, batch, kind=TrellisMemory, memory=memory, padding=padding)
        if length is not None:
            raise ValueError(
                f"cache(length={length}): a trellis remembers one state, of all the text before it, and not a number "
                "of positions; leave the length of the memory out."
            )
        self._held.renew()
        if memory is None:
            zero = like_of(self).new_zeros(batch, 1, 2 * self.config.channels)
            memory = TrellisMemory(z=zero, x=None)
        return TrellisCache(memory=memory, padding=padding, warm=warm)

    def _weights(self) -> TrellisWeights:
        channels, width = self.config.channels, self.config.width
        state, bias = self._dropped(self.state, 2 * channels, bias=True)
        return TrellisWeights(state=state, input=self._dropped(self.input, 2 * width, bias=False).weight, bias=bias)

    def _dropped(self, linear: nn.Module, inputs: int, *, bias: bool) -> LinearWeights:
        """The effective matrix, with DropConnect on the raw weights of the past (Merity, McCann, Socher 2017)."""
        rate = self.config.weight_dropout
        if rate == 0 or not self.training:
            return weights_of(linear, inputs=inputs, like=like_of(self), bias=bias)
        if not isinstance(linear, NormedLinear) or does_more_when_called(linear):
            hooked = "a hook on its NormedLinear" if isinstance(linear, NormedLinear) else ""
            raise ValueError(
                f"TrellisConfig(weight_dropout={rate}) drops entries of weights before they are normalised, and this "
                f"cell has {hooked or f'a {type(linear).__name__} instead of a NormedLinear'}; train it with "
                "weight_dropout=0."
            )
        shape = (len(linear.direction), inputs // 2)
        kept = torch.empty(shape, dtype=torch.bool, device=linear.direction.device).bernoulli_(1 - rate)
        return LinearWeights(linear.effective(kept, rate), linear.bias)

    def _check(self, x: Tensor, memory: TrellisMemory | None, cache: TrellisCache | None) -> None:
        check_width(x, self.config.width)
        if cache is not None:
            check_cache_use(self)
        if memory is not None:
            check_streams(len(memory.z), x)


def _check_one_padding(mask: Tensor | None, padding: Tensor | None) -> None:
    if mask is not None and padding is not None:
        raise ValueError(
            "this cache knows the padding of its streams from the beginning; leave key_padding_mask out, or make the "
            "cache without padding."
        )
