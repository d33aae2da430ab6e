"""The tests that need a GPU, run as a part of ``gpu.py``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]


class NotRun(Exception):
    """A measurement cannot be made here; the message says why."""


def run() -> dict[str, Any]:
    """The outcome of each test that is marked ``gpu``; the files that have such tests are those that name the mark.

    Raises:
        AssertionError: a test failed, or none was found.
        NotRun: pytest did not come to its end.
    """
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junit-xml={report}", *map(str, files)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise NotRun(f"pytest wrote no report: {(ended.stdout + ended.stderr)[-2000:]}")
        found = [outcome(case) for case in ElementTree.parse(report).iter("testcase")]
    failed = [test for test in found if test["outcome"] == "failed"]
    if failed or not found or ended.returncode != 0:
        raise AssertionError(f"{len(failed)} of {len(found)} tests failed: {failed} {ended.stdout[-1000:]}")
    return {"tests": found}


def outcome(case: ElementTree.Element) -> dict[str, str]:
    """Name and result of a test."""
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = [(kinds[child.tag], child.get("message", "")) for child in case if child.tag in kinds]
    result, message = found[0] if found else ("passed", "")
    return {"test": f"{case.get('classname')}::{case.get('name')}", "outcome": result, "message": message[:500]}
