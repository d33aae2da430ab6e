"""The cell of the DEQ-Transformer: one block of relative attention with memory, and a feed-forward network.

The input enters through an injection into queries, keys and values (Bai, Kolter and Koltun 2019, §4.2). Everything that
does not depend on z is computed in ``prepare``: effective weights, injection, the keys and values of the memory, the
position term, the masks. One call of f is then six matrix products (seven with relative positions). Without injection
and with the options of ``explicit`` it is a layer of Transformer-XL (Dai et al. 2019).

Letters: B batch, T time, M memory, D width, I inner width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equilibria.cells.transformer.attention import Attention
from equilibria.cells.transformer.cache import KeyValueCache
from equilibria.cells.transformer.fused import Form
from equilibria.cells.transformer.past import (
    KeyValues,
    TransformerCache,
    TransformerMemory,
    TransformerPast,
    check_past,
    joined_padding,
)
from equilibria.cells.transformer.positions import DecayPositions, Positions, Rotation
from equilibria.cells.transformer.prepared import (
    PastRead,
    TransformerKept,
    TransformerRows,
    TransformerShared,
    TransformerWeights,
)
from equilibria.cells.transformer.relative import RelativePositions
from equilibria.cells.transformer.rotary import RotaryPositions
from equilibria.checks import check_at_least, check_fields
from equilibria.core.graph import recordable
from equilibria.layers.cell import Prepared
from equilibria.layers.dropout import BatchSlice, add_masked, check_rate, dropout_mask, masked
from equilibria.layers.held import Held
from equilibria.layers.linear import Init, NormedLinear, linear, weights_of
from equilibria.layers.matrices import LinearWeights
from equilibria.layers.sequence import SequenceCell, check_cache_use, check_new_cache, check_width


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The hyper-parameters of a ``TransformerCell``."""

    width: int = 128
    """D, channels of the state; a multiple of heads, and even with relative positions, of 2·heads with rotary ones."""
    heads: int = 4
    """H, attention heads."""
    inner: int = 512
    """I, width of the feed-forward network."""
    memory: int = 64
    """M, the number of past positions that are remembered between segments; 0 for none."""
    window: int = 0
    """Number of positions that a query sees, itself included; 0 means 1000."""
    positions: Literal["relative", "decay", "rotary"] = "relative"
    """The term of Transformer-XL ("relative"), a learned bias per head and distance ("decay"), quick to train, or
    queries and keys turned by their positions, without parameters ("rotary", Su et al. 2021)."""
    longest: int = 1024
    """Only with "decay": the number of distances that have a bias; memory and segment together may not be longer,
    unless the window is at most this."""
    norm: Literal["post", "pre", "pre-normalised"] = "post"
    """Where the layer norms are: "post" (the paper), "pre" (the textbook), or "pre-normalised" (see the cell)."""
    dropout: float = 0.0
    """Share of channels dropped from attention output, inner layer, feed-forward output and position table."""
    attention_dropout: float = 0.0
    """Share of attention weights dropped."""
    weight_norm: bool = True
    """Normalise the weights of the five matrices in f; without it solves cease to converge in long runs."""
    init: Init = "default_fan_in"
    """How these matrices start: from U(±1/√fan_in) ("default_fan_in"), or from N(0, std²) ("normal")."""
    std: float = 0.01
    """Standard deviation from which the injection, the biases u and v, and matrices with init "normal" start."""
    injection: bool = True
    """Add the input to queries, keys and values; otherwise it is the first state, as in an explicit layer."""
    affine: bool = False
    """Give the layer norms a gain and a bias."""
    attention_norm: bool = False
    """Apply one more layer norm before the output matrix of the attention."""
    variational: bool = True
    """Use one dropout mask of channels for all positions; otherwise each position has its own."""
    attention: Form = "exact"
    """Write the attention scores to memory ("exact"), or let PyTorch's fused kernels compute the same function up to
    rounding without them: wherever they can ("fused"), or where they are also quicker ("auto": from 100,000 scores per
    channel on, where a batch has B·H·T·(M + T) scores, and a head width / heads channels, and width more with relative
    positions). They cannot for one new position, with dropout of attention weights or of the table of each distance
    (``variational=False``) in training, and on a GPU with relative positions if width / heads + width > 256; the exact
    form is then taken."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, width=1, heads=1, inner=1, longest=1, memory=0, window=0, std=0)
        if self.width % self.heads:
            divisors = [heads for heads in range(1, self.width + 1) if self.width % heads == 0]
            raise ValueError(
                f"TransformerConfig(width={self.width}, heads={self.heads}): the heads share the width evenly; "
                f"try heads={min(divisors, key=lambda heads: abs(heads - self.heads))}."
            )
        if self.positions == "relative" and self.width % 2:
            raise ValueError(
                f"TransformerConfig(width={self.width}, positions='relative'): the sinusoids come in pairs of sine and "
                f"cosine, so the width is even; try width={self.width + 1}, or positions='decay'."
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"TransformerConfig(width={self.width}, heads={self.heads}, positions='rotary'): channels are turned "
                f"in pairs, so a head has an even number of them and not {self.width // self.heads}; try "
                f"width={self.width + self.heads}, or positions='decay'."
            )
        check_rate("TransformerConfig", "dropout", self.dropout)
        check_rate("TransformerConfig", "attention_dropout", self.attention_dropout)

    @property
    def outputs(self) -> int:
        """D, the number of channels that later layers read: the whole state."""
        return self.width

    @property
    def reach(self) -> int:
        """The number of positions that a query sees, itself included."""
        return self.window or 1000

    def build(self) -> TransformerCell:
        """The cell, with fresh parameters."""
        return TransformerCell(self)

    def build_positions(self) -> Positions:
        """The part of the attention that knows positions, with fresh parameters."""
        common = {"heads": self.heads, "window": self.reach}
        if self.positions == "decay":
            return DecayPositions(**common, longest=self.longest)
        if self.positions == "rotary":
            return RotaryPositions(**common, width=self.width)
        names = ("width", "dropout", "variational", "weight_norm", "init", "std")
        return RelativePositions(**common, **{name: getattr(self, name) for name in names})


class TransformerCell(SequenceCell):
    """z ↦ f(z; x), the block of Bai, Kolter and Koltun 2019, §4.2, with layer norms LN that have no parameters.

    Keys and values are of c = [Z0; z], queries of z; in both pre-norm variants, of LN(c).

        post            a = LN(z + Attention(c)),      f = LN(a + FFN(a))
        pre             a = z + Attention(LN(c)),      f = a + FFN(LN(a))
        pre-normalised  a = LN(z + Attention(LN(c))),  f = a + FFN(a)

    With "pre", J = I + …: it needs a solver that does not rely on a contraction, or a Jacobian penalty. The residual of
    "pre-normalised" is bounded.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self._held = Held()
        width, kind = config.width, {"init": config.init, "std": config.std}
        self.inject = None
        if config.injection:
            self.inject = NormedLinear(inputs=width, outputs=3 * width, normed=False, init="normal", std=config.std)
        self.attention = Attention(
            width=width,
            heads=config.heads,
            positions=config.build_positions(),
            form=config.attention,
            dropout=config.attention_dropout,
            weight_norm=config.weight_norm,
            norm=config.attention_norm,
            affine=config.affine,
            **kind,
        )
        self.inner = NormedLinear(inputs=width, outputs=config.inner, normed=config.weight_norm, **kind)
        self.outer = NormedLinear(inputs=config.inner, outputs=width, normed=config.weight_norm, **kind)
        # The first norm comes before the feed-forward network, the second at the end or at the beginning of f.
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=config.affine) for _ in range(2))

    def injected(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 3*D"] | None:
        """U = x W_in + b_in; None from a cell without injection."""
        check_width(x, self.config.width)
        return None if self.inject is None else linear(x, *self._matrix(self.inject, self.config.width))

    def prepare(
        self,
        x: Float[Tensor, "B T D"],
        memory: TransformerPast | None = None,
        *,
        warm: bool = False,
        part: BatchSlice | None = None,
        key_padding_mask: Bool[Tensor, "B T"] | None = None,
        injection: Float[Tensor, "B T 3*D"] | None = None,
    ) -> Prepared:
        """Computes what f reads: weights, injection, keys and values of the memory, position term and masks.

        Several cells may share an ``injection``; without one, the cell computes its own.
        """
        injection = self.injected(x) if injection is None else injection
        memory, time = recordable(memory) if isinstance(memory, TransformerMemory) else memory, x.shape[1]
        read = self._read(x, memory, key_padding_mask)
        weights, mask = read.weights, read.key_padding_mask
        attention = self.attention.prepare(
            x,
            injection,
            read.past,
            first=read.first,
            weights=weights.attention,
            table=read.table,
            key_padding_mask=mask,
            part=part,
        )
        rows = TransformerRows(
            attention=attention.rows,
            drop_attention=self._mask(x, self.config.width, part),
            drop_inner=self._mask(x, self.config.inner, part),
            drop_outer=self._mask(x, self.config.width, part),
            valid=None if mask is None else (~mask[:, -time:, None]).to(x.dtype),
        )
        kept = TransformerKept(
            start=self._start(x, memory, warm=warm),
            injection=None if injection is None else injection.detach(),
            weights=weights,
            memory=dataclasses.replace(memory, past=read.past) if isinstance(memory, TransformerCache) else memory,
            key_padding_mask=mask,
        )
        shared = TransformerShared(weights=weights, attention=attention.shared)
        return Prepared(shared=shared, rows=rows, kept=kept, droppable=time > 1)

    def _read(
        self, x: Float[Tensor, "B T D"], memory: TransformerPast | None, mask: Bool[Tensor, "B T"] | None
    ) -> PastRead:
        """The weights, and what attention reads of the memory."""
        check_past(memory, x, mask, heads=self.config.heads)
        time = x.shape[1]
        if isinstance(memory, TransformerCache):
            check_cache_use(self)
            past = memory.past.with_room(time)
            weights, table = self._of_generation(past.length)
            mask = past.key_padding_mask(time)
            return PastRead(weights, past, past.next, mask, table if time == 1 else None)  # a table is for one position
        if isinstance(memory, KeyValues):
            return self._read_keys_and_values(memory, time, mask)
        weights = self._weights()
        if memory is None:
            return PastRead(weights, None, 0, mask)
        length = memory.z.shape[1]
        past = self._keys_and_values(memory.z, memory.u, weights, self._rotation(length))
        mask = joined_padding(memory.key_padding_mask, mask, past=length, time=time)
        return PastRead(weights, past, length, mask)

    def _read_keys_and_values(self, memory: KeyValues, time: int, mask: Bool[Tensor, "B T"] | None) -> PastRead:
        seen = memory.last(self.config.reach - 1)
        rotation = self._rotation(seen.length)
        mask = joined_padding(seen.key_padding_mask, mask, past=seen.length, time=time)
        seen = seen if rotation is None else dataclasses.replace(seen, k=rotation(seen.k))
        if self.training or torch.is_grad_enabled():
            return PastRead(self._weights(), seen.stacked(), seen.length, mask)
        if seen.length == 0:  # the beginning of a text
            self._held.renew()
        # A table for more distances than there are also serves the tokens that follow.
        longest = max(seen.length, min(self.config.longest - 1, max(64, 1 << seen.length.bit_length())))
        weights, table = self._of_generation(longest)
        past = KeyValueCache.of(seen.k, seen.v, room=time)
        return PastRead(weights, past, seen.length, mask, table if time == 1 else None)

    def _start(
        self, x: Float[Tensor, "B T D"], memory: TransformerPast | None, *, warm: bool
    ) -> Float[Tensor, "B T D"]:
        if isinstance(memory, TransformerCache) and memory.last is not None and x.shape[1] == 1:
            return memory.last
        start = torch.zeros_like(x) if self.config.injection else x
        if warm and isinstance(memory, TransformerMemory):
            return memory.z[:, -1:].expand_as(start).to(start)
        return start

    def start(self, prepared: Prepared) -> Float[Tensor, "B T D"]:
        """Zero; without injection the input; if warm, the last state of the memory at all positions.

        In generation with ``cache(warm=True)``, the state of the previous position.
        """
        return prepared.kept.start

    def forward(self, z: Float[Tensor, "B T D"], prepared: Prepared) -> Float[Tensor, "B T D"]:
        """f(z)."""
        post, weights, rows = self.config.norm == "post", prepared.shared.weights, prepared.rows
        middle, other = self.norms
        attention = Prepared(shared=prepared.shared.attention, rows=rows.attention)
        attended = self.attention(z if post else other(z), attention)
        a = add_masked(z, attended, rows.drop_attention)
        b = middle(a)
        # The products are left flat: one view less, and relu in place on a view would make autograd copy it back.
        inner = torch.relu_(linear(b.flatten(0, 1), *weights.inner))
        if rows.drop_inner is not None:
            inner = masked(inner.unflatten(0, z.shape[:2]), rows.drop_inner).flatten(0, 1)
        update = linear(inner, *weights.outer).view(z.shape)
        f = add_masked(a if self.config.norm == "pre" else b, update, rows.drop_outer)
        return masked(other(f) if post else f, rows.valid)

    def remember(self, z: Float[Tensor, "B T D"], prepared: Prepared) -> TransformerPast | None:
        """The last M positions of [Z0; z] and of [U0; U], detached.

        With a cache, the cache extended by z; with ``KeyValues``, these followed by those of z, detached.
        """
        kept: TransformerKept = prepared.kept
        length, memory, mask = self.config.memory, kept.memory, kept.key_padding_mask
        if isinstance(memory, TransformerCache):
            rotation = prepared.shared.attention.rotation
            past = memory.past.advanced(self._keys_and_values(z, kept.injection, kept.weights, rotation))
            return dataclasses.replace(memory, past=past, last=z[:, -1:] if memory.warm else None)
        if isinstance(memory, KeyValues):
            with torch.no_grad():
                new = self._keys_and_values(z, kept.injection, kept.weights, None)
            return memory.followed_by(new, None if mask is None else mask[:, -z.shape[1] :])
        if length == 0:
            return None
        return TransformerMemory.joined(memory, z.detach(), kept.injection, mask, length=length)

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

        It can replace a ``TransformerMemory``, without gradients: by the exactness law, solving from it position by
        position gives the equilibrium of the whole text, as far as its length and the window reach. The cache holds no
        weights; the cell keeps those that it computed last (see ``Held``).

        Args:
            batch: number of streams.
            length: number of positions to remember.
            padding: number of positions before the text of each stream begins; f is 0 there, and no query sees them.
            memory: the memory of the text before.
            warm: start each single position from the state of the previous one instead of zero. It can help where
                neighbours resemble each other; on text it saved nothing.
        """
        config = self.config
        check_new_cache(self, batch, kind=TransformerMemory, memory=memory, padding=padding)
        length = min(config.memory if length is None else length, self.config.reach - 1)
        self._held.renew()
        with torch.no_grad():
            past = KeyValueCache.empty(
                heads=config.heads,
                batch=batch,
                width=config.width // config.heads,
                length=length,
                padding=padding,
                like=self.attention.u,
            )
            cache = TransformerCache(past=past, last=None, warm=warm)
            weights, _ = self._of_generation(length)
            if memory is not None:
                known = memory.z.shape[1]
                new = self._keys_and_values(memory.z, memory.u, weights, self._rotation(known))
                cache = dataclasses.replace(cache, past=past.with_room(known).advanced(new))
        return cache

    def _of_generation(self, length: int) -> tuple[TransformerWeights, Tensor | None]:
        """The weights, and the table of positions for one new position after ``length`` others."""

        def computed() -> tuple[TransformerWeights, Tensor | None]:
            weights = self._weights()
            return weights, self.attention.positions.table(queries=1, memory=length, like=self.attention.u)

        return self._held.of(self, computed, length)

    def _weights(self) -> TransformerWeights:
        config = self.config
        return TransformerWeights(
            attention=self.attention.weights(),
            inner=self._matrix(self.inner, config.width),
            outer=self._matrix(self.outer, config.inner),
        )

    def _matrix(self, linear: nn.Module, inputs: int) -> LinearWeights:
        return weights_of(linear, inputs=inputs, like=self.attention.u)

    def _keys_and_values(
        self, z: Tensor, injection: Tensor | None, weights: TransformerWeights, rotation: Rotation | None
    ) -> Tensor:
        z = z if self.config.norm == "post" else self.norms[1](z)
        return self.attention.keys_and_values(z, injection, weights.attention, rotation)

    def _rotation(self, count: int) -> Rotation | None:
        """The turns of the first ``count`` positions."""
        return self.attention.positions.rotation(first=0, count=count, like=self.attention.u)

    def _mask(self, x: Tensor, width: int, part: BatchSlice | None) -> Tensor | None:
        shape = (x.shape[0], 1 if self.config.variational else x.shape[1], width)
        return dropout_mask(shape, rate=self.config.dropout, training=self.training, like=x, part=part)
