"""The line of the user that a warning of the library names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import jaxtyping
import torch


def caller() -> tuple[FrameType, int]:
    """The first frame outside the library and PyTorch, and the ``stacklevel`` of a warning that names it.

    The warning has to be given by the function that calls this one.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<"):  # checks of types around this function
        frame = frame.f_back
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame, level = frame.f_back, level + 1
    return frame, level


_OWN = (*(str(Path(path).parent) for path in (torch.__file__, jaxtyping.__file__)), str(Path(__file__).parents[1]), "<")
"""Prefixes of files that are not the user's."""
