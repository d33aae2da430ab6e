"""The pasts of a ``TransformerCell``: its memory, a cache of its own, or keys and values from elsewhere.

Letters: B batch, T time, M memory, S stored positions, K = M + T, D width, H heads, C width of a head.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.cells.transformer.cache import KeyValueCache
from equilibria.layers.sequence import check_key_padding_mask, check_streams


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerMemory:
    """The past of the streams, detached: the state and the injection at the same M positions."""

    z: Float[Tensor, "B M D"]
    u: Float[Tensor, "B M 3*D"] | None
    """None without an injection."""
    key_padding_mask: Bool[Tensor, "B M"] | None = None
    """True at padding, which no later position sees; None if there is none."""

    @classmethod
    def joined(
        cls,
        past: TransformerMemory | None,
        z: Float[Tensor, "B T D"],
        u: Float[Tensor, "B T 3*D"] | None,
        key_padding_mask: Bool[Tensor, "B K"] | None,
        *,
        length: int,
    ) -> TransformerMemory:
        """The last ``length`` positions of the past and of a segment with state z and injection u, detached.

        ``key_padding_mask`` is that of past and segment together. Padding after a text is moved before it, because the
        distance to the next segment must not count it.
        """
        mask = key_padding_mask
        if past is not None and (z.shape[1] < length or mask is not None):
            z = torch.cat([past.z, z], dim=1)
            u = None if u is None or past.u is None else torch.cat([past.u, u], dim=1)
        if mask is not None:
            order = _text_last(mask)
            z, mask = z.take_along_dim(order[..., None], dim=1), mask.take_along_dim(order, dim=1)[:, -length:]
            u = None if u is None else u.take_along_dim(order[..., None], dim=1)
        return cls(z=z[:, -length:], u=None if u is None else u[:, -length:], key_padding_mask=mask)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyValues:
    """The past of the streams as its keys and values, such as another library's cache stores them.

    It can replace a ``TransformerMemory``. The memory that comes back is a ``KeyValues`` of past and segment together,
    of any length: with ``window`` − 1 positions or more, two segments joined by it are one long segment.
    """

    k: Float[Tensor, "B H S C"]
    """Keys without positions: neither turned nor with a term, so that the past may begin anywhere in the text."""
    v: Float[Tensor, "B H S C"]
    """Values."""
    key_padding_mask: Bool[Tensor, "B S"] | None = None
    """True at padding, which no later position sees; None if there is none."""

    @property
    def length(self) -> int:
        """S, the number of past positions."""
        return self.k.shape[2]

    def last(self, length: int) -> KeyValues:
        """The last ``length`` positions, or all if there are fewer."""
        if length >= self.length:
            return self
        first, mask = self.length - length, self.key_padding_mask
        return KeyValues(self.k[:, :, first:], self.v[:, :, first:], None if mask is None else mask[:, first:])

    def stacked(self) -> Float[Tensor, "2 H B S C"]:
        """Keys and values in one tensor, heads before the batch."""
        return torch.stack([self.k, self.v]).transpose(1, 2)

    def followed_by(self, new: Float[Tensor, "2 H B T C"], key_padding_mask: Bool[Tensor, "B T"] | None) -> KeyValues:
        """This past and the keys and values of new positions, with their padding."""
        k, v = new.transpose(1, 2)
        mask = joined_padding(self.key_padding_mask, key_padding_mask, past=self.length, time=k.shape[2])
        return KeyValues(torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2), mask)


def _text_last(mask: Bool[Tensor, "B K"]) -> Int[Tensor, "B K"]:
    """The order of positions in which the padding at the end of a row comes first."""
    length = mask.shape[1]
    times = torch.arange(1, length + 1, device=mask.device)
    after = length - torch.where(mask, 0, times).amax(dim=1, keepdim=True)
    return (times - 1 - after) % length


def joined_padding(
    before: Bool[Tensor, "B M"] | None, mask: Bool[Tensor, "B T"] | None, *, past: int, time: int
) -> Bool[Tensor, "B K"] | None:
    """The padding mask of ``past`` positions and of ``time`` new ones together; None if neither has padding."""
    some = mask if before is None else before
    if some is None:
        return None
    before = some.new_zeros(some.shape[0], past) if before is None else before
    return torch.cat([before, some.new_zeros(some.shape[0], time) if mask is None else mask], dim=1)


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerCache:
    """The past of the streams for generation: a tree of tensors with the batch first, and no weights in it."""

    past: KeyValueCache
    """Keys and values in slots, one per position."""
    last: Float[Tensor, "B 1 D"] | None
    """The state at the last position, from which the next one starts; None for a start at zero."""
    warm: bool
    """True to store the last state for a warm start."""


TransformerPast = TransformerMemory | TransformerCache | KeyValues
"""The pasts that a ``TransformerCell`` can continue from."""


def check_past(
    past: TransformerPast | None,
    x: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"] | None,
    *,
    heads: int,
) -> None:
    """Raise a ValueError unless the padding mask is valid for x and the past can come right before x."""
    begun = None if mask is None else _begun(past)
    check_key_padding_mask(mask, x, begun)
    if isinstance(past, TransformerCache):
        check_streams(len(past.past.slots), x)
        if mask is not None:
            raise ValueError(
                "a cache knows the padding of its streams from the beginning; give cache(batch, padding=…) and leave "
                "key_padding_mask out."
            )
    elif isinstance(past, KeyValues):
        check_streams(len(past.k), x)
        width = x.shape[2] // heads
        if (past.k.shape[1], past.k.shape[3]) != (heads, width):
            raise ValueError(
                f"the memory has keys of the shape {tuple(past.k.shape)}, and this cell reads [B, {heads}, S, "
                f"{width}]; give keys and values that this cell has written."
            )
        _check_continued(past, mask)
    elif past is not None:
        check_streams(len(past.z), x)


def _begun(memory: TransformerPast | None) -> Bool[Tensor, " B"] | None:
    """True for the rows whose memory holds text; None without a memory."""
    if memory is None or isinstance(memory, TransformerCache):
        return None
    mask, like = memory.key_padding_mask, memory.z if isinstance(memory, TransformerMemory) else memory.k[:, 0]
    return ~(like.new_zeros(like.shape[:2], dtype=torch.bool) if mask is None else mask).all(dim=1)


def _check_continued(past: KeyValues, mask: Bool[Tensor, "B T"] | None) -> None:
    """Raise a ValueError if the memory ends in padding where its text continues."""
    before = past.key_padding_mask
    if before is None or past.length == 0:
        return
    apart = before[:, -1] & ~before.all(dim=1)
    if mask is not None:
        apart = apart & ~mask.all(dim=1)
    if bool(apart.any()):
        raise ValueError(
            f"{int(apart.sum())} rows have padding between the text of the memory and the text that continues it, and "
            "the distance of two positions would count it; put the padding before the text (padding_side='left')."
        )
