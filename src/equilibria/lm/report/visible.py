"""visible: text without the characters that would steer a terminal, or hide what is written."""

from __future__ import annotations

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
"""C0, DEL and C1: escape sequences begin with one of them."""
_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""Bidirectional marks, embeddings, overrides and isolates, which show text in another order than it has."""
_BREAKS = [0x2028, 0x2029]
"""Separators of lines and paragraphs."""
_LONE = range(0xD800, 0xE000)
"""Halves of surrogate pairs: bytes of a path or an argument that are no UTF-8."""
_ESCAPED = {
    code: repr(chr(code))[1:-1] for code in [*_CONTROLS, *_DIRECTIONS, *_BREAKS, *_LONE] if chr(code) not in "\n\t"
}


def visible(text: str) -> str:
    r"""``text`` with its control characters as ``repr`` writes them, "\x1b" for one; "\n" and "\t" stay."""
    return text.translate(_ESCAPED)
