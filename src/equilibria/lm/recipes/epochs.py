"""steps_per_epoch: how many steps a corpus lasts, of which only the number of tokens is known."""

from __future__ import annotations

from math import ceil


def steps_per_epoch(tokens: int, *, batch_size: int, length: int, overlap: int = 0) -> int:
    """Segments per epoch of a text of N tokens, in rows of R = ⌊(N − 1) / B⌋ targets: 1 + ⌈(R − T) / (T − overlap)⌉.

    Args:
        tokens: N, with the first one, which is no target.
        batch_size: B, rows.
        length: T, tokens a segment.
        overlap: tokens of a segment that the one before it has too.
    """
    row = (tokens - 1) // batch_size
    return 1 + max(0, ceil((row - length) / (length - overlap)))
