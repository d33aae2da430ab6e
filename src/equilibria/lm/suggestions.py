"""Did-you-mean suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, least: float = 0.5) -> str:
    """The question "did you mean …?" with up to three names of ``known`` at least so similar; "" if there is none."""
    likeness = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in known}
    best = max(likeness.values(), default=0.0)
    close = [other for other in likeness if likeness[other] >= max(least, best - 0.05)]
    close = sorted(close, key=lambda other: -likeness[other])[:3]
    return f"did you mean {' or '.join(close)}?" if close else ""


def nearest_or_all(name: str, known: Iterable[str]) -> str:
    """The suggestion of ``nearest``, or the list of all known names if none is similar."""
    known = sorted(known)
    return nearest(name, known) or f"there are {', '.join(known)}."
