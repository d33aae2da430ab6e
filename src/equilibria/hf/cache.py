"""Reading and writing a cache of transformers as the memory of a cell: one layer per block, one slot per position.

A solve reads a layer as a constant past; the layer is updated once, after the solve, with the values of z*. So every
kind of cache that stores what it is given (dynamic or static) works, and beams, crops and offloading are its own.

Letters: B batch, T time, S stored positions, H heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from equilibria.cells import CellConfig
from equilibria.cells.chain import ChainConfig
from equilibria.cells.transformer.past import KeyValues
from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.cells.trellis.prepared import TrellisMemory
from equilibria.hf.configuration import blocks_of
from equilibria.layers.equilibrium import LayerOutput
from equilibria.layers.sequence import Memory


def seen(cache: Cache | None) -> int:
    """S, the number of positions in the cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def read(
    cache: Cache | None, cell: CellConfig, *, like: Float[Tensor, "B T D"], mask: Bool[Tensor, "B S"] | None
) -> Memory:
    """The memory of the cell that the cache holds; None without a cache.

    Args:
        cache: the cache, possibly empty.
        cell: the configuration of the cell.
        like: the input, which gives batch, dtype and device.
        mask: True at padding in the cache; None if there is none.

    Raises:
        ValueError: the cache has no room for the positions of ``like``, or does not hold what a solve reads.
    """
    if cache is None:
        return None
    length = seen(cache)
    _check_room(cache, length + like.shape[1])
    if isinstance(cell, TrellisConfig):
        return _state(cache, cell, length, like)
    pasts = []
    for index, block in enumerate(blocks_of(cell)):
        none = like.new_zeros(len(like), block.heads, 0, block.width // block.heads)
        k, v = (none, none) if length == 0 else _slots(cache, index, length)
        pasts.append(KeyValues(k.to(like), v.to(like), mask))
    return tuple(pasts) if isinstance(cell, ChainConfig) else pasts[0]


def write(cache: Cache, cell: CellConfig, out: LayerOutput, *, x: Float[Tensor, "B T D"]) -> None:
    """Add the positions of a solve to the cache."""
    first, time = seen(cache), x.shape[1]
    place: dict[str, Any] = {"cache_position": torch.arange(first, first + time, device=x.device)}
    if isinstance(cell, TrellisConfig):
        cache.update(*_widened(x, out.z.detach()), 0, place)
        return
    memories = out.memory if isinstance(out.memory, tuple) else (out.memory,)
    for index, memory in enumerate(memories):
        cache.update(memory.k[:, :, -time:], memory.v[:, :, -time:], index, place)


def _check_room(cache: Any, needed: int) -> None:
    for layer in cache.layers:
        fixed = isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer)
        if fixed and layer.max_cache_len < needed:
            raise ValueError(
                f"the StaticCache has room for {layer.max_cache_len} positions, and {needed} are needed; make it with "
                f"max_cache_len={needed} or more, or take a DynamicCache."
            )


def _slots(cache: Any, index: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first ``length`` positions in a layer.

    Raises:
        ValueError: the cache does not store all of them as they were given, such as a quantised or a sliding one.
    """
    layer = cache.layers[index]
    if layer.keys.ndim != 4 or layer.keys.shape[2] < length:
        raise ValueError(
            f"a {type(layer).__name__} holds {layer.keys.shape[2] if layer.keys.ndim == 4 else 0} of {length} "
            "positions as they were given, and a solve reads all of them; use a DynamicCache or a StaticCache of "
            "transformers."
        )
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def _state(cache: Cache, cell: TrellisConfig, length: int, like: Tensor) -> TrellisMemory | None:
    """h, c and x of the last position: all that a trellis needs, although each position has a slot, as a crop needs."""
    if length == 0:
        return None
    x, z = _slots(cache, 0, length)
    if x.shape[1] != 1 or x.shape[3] != max(cell.width, 2 * cell.channels):
        raise ValueError(
            f"the cache has slots of the shape {tuple(x.shape)}, and this model reads [B, 1, S, "
            f"{max(cell.width, 2 * cell.channels)}]; give a cache that this model has written."
        )
    x, z = (slots[:, 0, -1:].to(like) for slots in (x, z))
    return TrellisMemory(z=z[..., : 2 * cell.channels].clone(), x=x[..., : cell.width].clone())


def _widened(
    x: Float[Tensor, "B T E"], z: Float[Tensor, "B T H2"]
) -> tuple[Float[Tensor, "B 1 T C"], Float[Tensor, "B 1 T C"]]:
    """x and z as keys and values of one head; the narrower one is filled with zeros."""
    width = max(x.shape[2], z.shape[2])
    x, z = (functional.pad(tensor, (0, width - tensor.shape[2])) for tensor in (x, z))
    return x[:, None], z[:, None]
