"""The command `equilibria`, also as `python -m equilibria`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. A library that is missing is named with the extra that brings it."""
    # Imported here, so that the entry point itself needs nothing: what a verb needs is loaded by the verb.
    from equilibria.commands.main import run

    return run(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    sys.exit(main())
