"""The view of a cache that a layer of transformers reads during a solve, and the padding that its mask shows.

Letters: B batch, T new positions, S stored positions, K positions that a mask covers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_REPLACED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers whose ``update`` makes new tensors, and leaves those that it had as they are."""
_WRITTEN = (StaticLayer, StaticSlidingWindowLayer)
"""Layers whose ``update`` writes into their tensors."""


def view(cache: Cache, layers: Sequence[int]) -> Cache:
    """A cache for one evaluation: its ``update`` returns past and present side by side; ``cache`` stays as it is.

    Args:
        cache: the cache; its tensors are constants of the solve.
        layers: the numbers of the layers that will update the view.
    """
    found: Any = copy.copy(cache)
    found.layers = [_copied(layer) if i in layers else layer for i, layer in enumerate(found.layers)]
    return found


def check_cache(cache: Any, layers: Sequence[int]) -> None:
    """Raise a ValueError if there is no view of the cache: its layers store something else than keys and values."""
    if getattr(cache, "offloading", False):
        raise ValueError(
            "the cache offloads its layers, and a solve would read them back at each evaluation; give a cache with "
            "offloading=False, or use_cache=False."
        )
    known = (*_REPLACED, *_WRITTEN)
    for index in layers:
        if index < len(cache.layers) and type(cache.layers[index]) not in known:
            raise ValueError(
                f"layer {index} of the cache is a {type(cache.layers[index]).__name__}, and a solve can read a "
                f"{' or a '.join(kind.__name__ for kind in known)}; give a DynamicCache or a StaticCache, or "
                "use_cache=False."
            )


def _copied(layer: Any) -> Any:
    found = copy.copy(layer)
    if type(layer) in _WRITTEN:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(found, name, value.clone())
    return found


def padding(mask: Any, *, new: int, seen: int) -> Bool[Tensor, "B T"] | None:
    """True at the new positions that no position sees, which are padding; None if the mask shows none.

    Args:
        mask: what the layer is given as ``attention_mask``: 1 at text [B K], or for pairs of positions [B 1 T K], as
            bools or as numbers to add.
        new: T.
        seen: S. The mask may cover fewer positions, as inside a window, or more, as of a static cache.
    """
    if not isinstance(mask, Tensor):
        return None
    first = min(seen, mask.shape[-1] - new)
    columns = mask[..., first : first + new]
    if mask.ndim == 2:
        return columns == 0
    visible = columns if mask.dtype == torch.bool else columns > torch.finfo(mask.dtype).min / 2
    return ~visible.diagonal(dim1=-2, dim2=-1).any(dim=1)
