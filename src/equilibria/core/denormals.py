"""Denormal numbers, which take some processors many times as long as others, replaced by 0."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Within it, numbers smaller than every normal one (1e-38 in float32) are 0 on the CPU.

    It holds for this thread, and for the threads that PyTorch starts within it; the thread's own setting comes back.
    """
    before = _LEAST * _ONE == 0  # Python's own numbers obey the setting of the thread
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


_LEAST, _ONE = math.ulp(0.0), 1.0
