"""Keys and values of past positions, one slot each, for generation: each is projected once.

Letters: B batch, T time (new positions), K visible keys, H heads, C width of a head, S slots.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from equilibria.torch_private import is_forward_mode


@dataclasses.dataclass(frozen=True, eq=False)
class KeyValueCache:
    """A tree of batch-first tensors: slots, filled from the left; those before ``end`` hold the past.

    The slots are written in place and shared by successive versions of the cache. ``with_room`` claims those after the
    newest version for one solve. A version that has a successor already, or whose next slots another solve has claimed,
    perhaps in another thread, or that is used with gradients, is copied first: every version keeps its content, and
    only the newest one is fast.
    """

    slots: Float[Tensor, "B 2 H S C"]
    """Keys and values, the keys turned by their positions in the text; in memory the heads stand before the batch, as
    attention reads them."""
    written: list[int]
    """Shared by all versions of the cache: the number of slots written, and the claim on those that follow, or 0."""
    length: int
    """Largest number of past positions that a new position sees."""
    end: int
    """Number of slots written by this version and those before it."""
    moved: int
    """Position of the first slot in the text: how far the slots have slid."""
    padding: Int[Tensor, " B"] | None
    """Number of positions before the text of each stream begins, which no query sees; None if all are 0."""
    padded: int
    """The largest of them."""
    claim: int = 0
    """The claim of this version on the slots after its past; 0 for none."""

    @classmethod
    def empty(
        cls, *, heads: int, batch: int, width: int, length: int, padding: Int[Tensor, " B"] | None, like: Tensor
    ) -> KeyValueCache:
        """A cache without a past; ``width`` is C, ``like`` gives dtype and device."""
        slots = _batch_first(like.new_empty(2, heads, batch, 0, width))
        padded = 0 if padding is None else int(padding.max())
        return cls(
            slots=slots,
            written=[0, 0],
            length=length,
            end=0,
            moved=0,
            padding=padding if padded else None,
            padded=padded,
        )

    @classmethod
    def of(cls, k: Float[Tensor, "B H M C"], v: Float[Tensor, "B H M C"], *, room: int) -> KeyValueCache:
        """A cache of these past positions, all of which are seen, with room for ``room`` new ones."""
        batch, heads, length, width = k.shape
        slots = _batch_first(k.new_empty(2, heads, batch, length + room, width))
        slots[:, 0, :, :length], slots[:, 1, :, :length] = k, v
        slots[:, :, :, length:] = 0
        cache = cls(slots=slots, written=[length, 0], length=length, end=length, moved=0, padding=None, padded=0)
        return cache.with_room(room)

    @property
    def next(self) -> int:
        """Position in the text at which new ones begin."""
        return self.moved + self.end

    @property
    def seen(self) -> int:
        """Number of past positions that new positions see."""
        return min(self.end, self.length)

    def with_room(self, time: int) -> KeyValueCache:
        """The same past with room for ``time`` new positions, in slots that no other version writes.

        Reallocates and drops unseen slots now and then; amortised O(1) per token.
        """
        # Outside of inference mode nothing may be written into a tensor that was made in it.
        writable = torch.is_inference_mode_enabled() or not self.slots.is_inference()
        fits = writable and self.end + time <= self.slots.shape[3]
        if fits and self._claimed:
            return self
        claim = next(_CLAIMS)
        if fits:
            with _LOCK:
                free = self.written == [self.end, 0]
                if free:
                    self.written[1] = claim
            if free:
                return dataclasses.replace(self, claim=claim)
        past = self.past
        # Room in proportion to the slots that are copied spreads the cost of the copy over as many tokens.
        room = max(time, min(self.length, max(64, 2 * self.seen)))
        slots = _batch_first(torch.cat([past, past.new_zeros(*past.shape[:3], room, past.shape[4])], dim=3))
        moved, written = self.moved + self.end - self.seen, [self.seen, claim]
        return dataclasses.replace(self, slots=slots, written=written, end=self.seen, moved=moved, claim=claim)

    @property
    def _claimed(self) -> bool:
        """True if the slots after the past are this version's to write."""
        return self.claim > 0 and self.written == [self.end, self.claim]

    @property
    def past(self) -> Float[Tensor, "2 H B M C"]:
        """Keys and values that new positions see."""
        return self._heads_first[:, :, :, self.end - self.seen : self.end]

    @property
    def _heads_first(self) -> Float[Tensor, "2 H B S C"]:
        return self.slots.permute(1, 2, 0, 3, 4)

    def joined(
        self, k: Float[Tensor, "H B T C"], v: Float[Tensor, "H B T C"]
    ) -> tuple[Float[Tensor, "H B K C"], Float[Tensor, "H B K C"]]:
        """The stored keys and values followed by the new ones k and v; where possible these are views of the slots."""
        derived = is_forward_mode() and forward_ad.unpack_dual(k).tangent is not None  # a Jacobian–vector product
        if derived or torch.is_grad_enabled() or not self._claimed:
            keys, values = self.past.unbind(0)
            return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        (new_keys, new_values), joined = self._with_one if k.shape[2] == 1 else self._with_new(k.shape[2])
        new_keys.copy_(k)
        new_values.copy_(v)
        return joined

    @functools.cached_property
    def _with_one(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """``_with_new`` for one position: the views are the same in each evaluation of f."""
        return self._with_new(1)

    def _with_new(self, time: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Views of the slots of new keys and values, and of all visible ones, the new ones included."""
        keys, values = self._heads_first.unbind(0)
        first, end = self.end - self.seen, self.end + time
        new = keys[:, :, self.end : end], values[:, :, self.end : end]
        return new, (keys[:, :, first:end], values[:, :, first:end])

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: the views of a copy from a pickle would be of other memory than its slots."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def advanced(self, new: Float[Tensor, "2 H B T C"]) -> KeyValueCache:
        """The cache with the ``new`` keys and values added to its past."""
        time = new.shape[3]
        cache = self.with_room(time)
        cache._heads_first[:, :, :, cache.end : cache.end + time].copy_(new)
        cache.written[:] = cache.end + time, 0
        return dataclasses.replace(cache, end=cache.end + time, claim=0)

    def key_padding_mask(self, time: int) -> Bool[Tensor, "B K"] | None:
        """True for visible keys before the text of their stream, ``time`` new ones included; None if there are none."""
        first = self.moved + self.end - self.seen
        if self.padding is None or self.padded <= first:
            return None
        positions = torch.arange(first, first + self.seen + time, device=self.padding.device)
        return positions < self.padding[:, None]


_CLAIMS = itertools.count(1)
_LOCK = threading.Lock()


def _batch_first(slots: Float[Tensor, "2 H B S C"]) -> Float[Tensor, "B 2 H S C"]:
    return slots.permute(2, 0, 1, 3, 4)
