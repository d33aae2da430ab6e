"""The command `equilibria`. A module of its own, so that Ctrl-C is heard while PyTorch is still being loaded."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run one verb; returns the exit code, 130 if Ctrl-C ended it. Ctrl-C has no effect on the way out."""
    # Threads that wait for each other sleep instead of spinning, which beside other programs costs most of the speed.
    # OpenMP reads this once, when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from equilibria.__main__ import main as run

        return run()
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
