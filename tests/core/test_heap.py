"""Freed memory stays with the process, so that no evaluation of f has to ask the system for it again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
if {imported}:
    import equilibria
def used():
    several = [torch.ones(2**20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({before}):
    before = used()
for _ in range(10):
    after = used()
print(after - before)
"""


def faults(*, imported, before):
    """The page faults of ten rounds, after so many ``before``, that fill 16 MiB each, which are 4096 pages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imported=imported, before=before)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_the_heap_keeps_what_a_step_frees():
    """The heap first grows to its size; without the library glibc may find its limits in later rounds."""
    assert faults(imported=True, before=5) < 1000 < faults(imported=False, before=1)
