"""The environment variables that torchrun sets for each process."""

from __future__ import annotations

import os

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Which process it is, of how many, and where they meet."""


def number_in(name: str, least: int, most: int | None = None) -> int:
    """The whole number in the environment variable.

    Raises:
        ValueError: it is none, or below ``least``, or above ``most``.
    """
    said = os.environ[name]
    value = int(said) if said.strip().isdecimal() else -1
    if value < least or (most is not None and value > most):
        bounds = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ValueError(
            f"The environment variable {name} is {said!r}, and it is a whole number {bounds}: let torchrun set it, or "
            "unset it to train with one process."
        )
    return value


def restarts() -> int:
    """The number of times that torchrun has restarted this process; 0 without torchrun."""
    name = "TORCHELASTIC_RESTART_COUNT"
    return number_in(name, 0) if os.environ.get(name, "").strip() else 0
