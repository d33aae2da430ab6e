"""The printable characters that stand for bytes in the tokens of byte-level byte-pair encoding."""

from __future__ import annotations


def _symbols() -> dict[str, int]:
    """The byte of each symbol: printable bytes of Latin-1 stand for themselves, the others for characters from Ā on.

    Reference: Radford et al. 2019, the code of GPT-2, ``bytes_to_unicode``.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES: dict[str, int] = _symbols()
"""The byte of each of the 256 symbols, such as 32, the space, of "Ġ"."""
