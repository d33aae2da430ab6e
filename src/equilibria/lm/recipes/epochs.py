"""steps_per_epoch: the number of steps per epoch, computed from the number of tokens without reading the corpus."""

from __future__ import annotations

from math import ceil


def steps_per_epoch(tokens: int, *, batch_size: int, length: int, overlap: int = 0) -> int:
    """1 + ⌈(L − T) / (T − overlap)⌉ segments per epoch, where each stream has L = ⌊(N − 1) / B⌋ targets.

    Args:
        tokens: N, including the first token, which is not a target.
        batch_size: B, number of streams.
        length: T, tokens per segment.
        overlap: tokens that a segment shares with the previous one.
    """
    targets = (tokens - 1) // batch_size
    return 1 + max(0, ceil((targets - length) / (length - overlap)))
