"""The command `equilibria`, also as `python -m equilibria`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXTRA = ("tyro", "rich", "safetensors", "numpy", "matplotlib")
"""What the command line needs beyond the mathematics: the extra [train]."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        from equilibria.commands.main import run
    except ModuleNotFoundError as error:
        name = (error.name or "").split(".")[0]
        if name not in EXTRA:
            raise
        print(
            f'equilibria: the command line needs {name}, which is not installed: pip install "equilibria[train]"',
            file=sys.stderr,
        )
        return 1
    return run(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    sys.exit(main())
