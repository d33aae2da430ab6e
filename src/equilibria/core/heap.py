"""The heap of the C library, which returns freed memory to the system and asks for it again at each evaluation of f.

The system fills every page with zeros before it lends it again, which takes up to a tenth of a training step on a CPU.
"""

from __future__ import annotations

import torch

LARGEST = 2**25 - 2**16
"""Bytes of a block that is just small enough to raise glibc's limits."""


def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory for the next tensors of this process.

    Its limit follows the largest block that the process has freed, and is set here by a block that is never written to;
    see M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in mallopt(3), which these environment variables override. Other libraries
    do as they did before.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
