"""All measurements that need a GPU, in one call that stays inside its minutes.

python benchmarks/gpu.py --minutes 9          on a machine with a CUDA device; writes benchmarks/results/gpu/PART.json
    --only PART …                             these parts alone
    --again                                   measure again what has been measured
    --dry                                     the same code on a CPU with small sizes: two minutes; runs/gpu-dry

The parts run in order of value (see ``gpu_parts.py``), each in a process of its own, which ends with its minutes. The
file of a part is written after each case, so that nothing measured is lost when a run is killed, and the next run
continues: it measures the cases that are missing or failed. Results of another machine, or of a dry run, are not
continued. A case that fails leaves its error in the file, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_parts import PARTS, NotRun, Part, Setting
from machine import RESULTS, keep, machine

LEAST = 15.0
"""Seconds below which no part is begun: its process takes most of them to start."""


class Results:
    """The file of one part."""

    def __init__(self, part: Part, at: Setting, folder: Path) -> None:
        self.part, self.at, self.folder = part, at, folder
        self.cases: dict[str, Any] = self._stored()

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.folder / f"{self.part.name}.json"

    def missing(self) -> list[str]:
        """The names of the cases to be measured: those without a value."""
        names = self.part.cases(self.at)
        return [name for name in names if name not in self.cases or "error" in self.cases[name]]

    def failed(self) -> list[str]:
        """The names of the cases that failed."""
        return [name for name, case in self.cases.items() if "error" in case]

    def write(self) -> None:
        """Write what is known so far, all at once."""
        rows = {"dry": self.at.dry, "complete": not self.missing(), "cases": self.cases}
        written = keep(f".{self.part.name}", rows, self.folder)
        written.replace(self.path)

    def _stored(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        if _hardware(stored["machine"]) != _hardware(machine()) or stored["rows"]["dry"] != self.at.dry:
            raise SystemExit(
                f"{self.path} was measured on another machine ({stored['machine']}), or in a dry run, and one file has "
                "the results of one machine: give --again to measure again, or another --out."
            )
        return stored["rows"]["cases"]


def _hardware(described: dict[str, Any]) -> dict[str, Any]:
    """A machine's description without its threads, of which each process of this script has its own number."""
    return {name: value for name, value in described.items() if name != "threads"}


def measure(results: Results, seconds: float) -> None:
    """Measure the missing cases of a part, until the seconds are over; write after each."""
    end = time.monotonic() + seconds
    cases = results.part.cases(results.at)
    for name in results.missing():
        if time.monotonic() > end:
            break
        began = time.monotonic()
        case = outcome(cases[name])
        results.cases[name] = {**case, "seconds": time.monotonic() - began}
        results.write()
        print(f"{results.part.name}: {name}: {json.dumps(results.cases[name])[:400]}", flush=True)
    results.write()


def outcome(case: Any) -> dict[str, Any]:
    """Its value, or why it has none."""
    try:
        return {"value": case()}
    except NotRun as reason:
        return {"not run": str(reason)}
    except torch.OutOfMemoryError as error:
        found = {"out of memory": str(error).splitlines()[0]}
    except Exception:  # the other cases can still be measured
        found = {"error": traceback.format_exc()}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def in_processes(parts: list[Part], at: Setting, options: argparse.Namespace) -> int:
    """Run the parts one after the other, each in a process; returns the exit status."""
    end = time.monotonic() + 60 * options.minutes
    status = 0
    for part in parts:
        if options.again:
            (options.out / f"{part.name}.json").unlink(missing_ok=True)
        results = Results(part, at, options.out)
        left = end - time.monotonic()
        limit = min(left, 60 * part.share * options.minutes)
        if results.missing() and limit < LEAST:
            print(f"{part.name}: not begun, {left:.0f} seconds are left", flush=True)
            continue
        if results.missing():
            command = [sys.executable, __file__, "--run", part.name, "--seconds", str(0.8 * limit)]
            command += ["--out", str(options.out), *["--dry"] * options.dry]
            if not ends(command, limit):
                print(f"{part.name}: ended after {limit:.0f} seconds, with the cases that were measured", flush=True)
            results = Results(part, at, options.out)
        missing, failed = results.missing(), results.failed()
        status = 1 if failed else status
        print(
            f"{part.name}: {len(results.cases) - len(failed)} cases measured, missing: {missing or 'none'}", flush=True
        )
        for name in failed:
            print(f"{name} failed:\n{results.cases[name]['error']}", flush=True)
    return status


def ends(command: list[str], seconds: float) -> bool:
    """Run a command; False if it has not ended by then, and was killed with the processes that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:  # after Ctrl-C, too
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {part.name: part for part in PARTS}
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", choices=by_name, default=list(by_name))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", choices=by_name, help=argparse.SUPPRESS)  # the process of one part
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("this machine has no CUDA device that PyTorch can use: try --dry, which runs on a CPU.")
    at = Setting(torch.device("cpu" if options.dry else "cuda"), dry=options.dry)
    options.out = options.out or (Path("runs/gpu-dry") if options.dry else RESULTS / "gpu")
    if options.run:
        measure(Results(by_name[options.run], at, options.out), options.seconds)
        return 0
    return in_processes([by_name[name] for name in options.only], at, options)


if __name__ == "__main__":
    raise SystemExit(main())
