"""The command `equilibria`. A module of its own, so that Ctrl-C is heard while PyTorch is still being loaded.

Importing the package loads PyTorch, which takes a second or two. The help, the version and the answer to a mistyped
verb do without: the package is loaded for a verb only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator


def main() -> int:
    """Run one verb; returns the exit code, 130 if Ctrl-C ended it. Ctrl-C has no effect on the way out."""
    # Threads that wait for each other sleep instead of spinning, which beside other programs costs most of the speed.
    # OpenMP reads this once, when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with _postponed() as load:
            from equilibria.commands.main import VERBS, run

            words = sys.argv[1:]
            if not VERBS.keys().isdisjoint(words):
                load()
            return run(words)
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped.\n")
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _postponed() -> Iterator[Callable[[], None]]:
    """Within it, modules of `equilibria` can be imported without the package; yields the function that loads it.

    Such modules must need Python alone. If the package is not loaded in the end, no trace of it stays.
    """
    if "equilibria" in sys.modules:
        yield lambda: None
        return
    spec = importlib.util.find_spec("equilibria")
    assert spec is not None
    assert spec.loader is not None
    package, loader, loaded = importlib.util.module_from_spec(spec), spec.loader, False
    sys.modules["equilibria"] = package

    def load() -> None:
        nonlocal loaded
        loader.exec_module(package)
        loaded = True

    try:
        yield load
    finally:
        if not loaded:
            for name in [name for name in sys.modules if name.partition(".")[0] == "equilibria"]:
                del sys.modules[name]
