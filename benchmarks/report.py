"""How long `equilibria report` takes for a log of a million lines, and how much memory its process has at most.

The logs have the lines that a training of the recipe tiny writes: 20 training steps, a validation, a spectral radius.
Usage: python -m benchmarks.report [LINES]
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import keep

from equilibria.lm.recipes import tiny
from equilibria.lm.runs.run import Run

IMPORTS = "import torch, matplotlib.figure, matplotlib.backends.backend_agg, equilibria.commands.report"


def main(lines: int = 10**6) -> None:
    """Measures the imports alone, a short log, and long ones with and without validations."""
    rows = [measured("the imports alone", 0, [sys.executable, "-c", IMPORTS])]
    rows += [reported("a short log", 100, every=20), reported("with validations", lines, every=20)]
    rows += [reported("training steps only", lines, every=lines)]
    print(f"\n{keep('report', rows)}")


def reported(name: str, lines: int, *, every: int) -> dict[str, Any]:
    """The report of a log of so many lines, with a validation after ``every`` lines of steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder) / "run", tiny())
        with run.metrics.open("w", encoding="utf-8") as log:
            for number, event in enumerate(events(lines, every)):
                log.write(json.dumps(event) + "\n")
                if number + 1 == lines:
                    break
        size = run.metrics.stat().st_size
        command = [sys.executable, "-m", "equilibria", "report", str(run.path)]
        return {**measured(name, lines, command), "log_mib": size / 2**20}


def measured(name: str, lines: int, command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of a process with one thread."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{' '.join(command)} failed, with status {status}.")
    row = {"name": name, "lines": lines, "seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    row["peak_mib"] = usage.ru_maxrss / 1024
    print(
        f"| {name} | {lines:,} | {seconds:.1f} s | {row['cpu_seconds']:.1f} s | {row['peak_mib']:.0f} MiB |", flush=True
    )
    return row


def events(lines: int, every: int) -> Iterator[dict[str, Any]]:
    """What the training writes, with ``every`` lines of steps before each validation; more than ``lines``."""
    noise, steps = random.Random(0), 20 * lines
    corpus = {"name": "python_docs", "unit": "character", "vocabulary": 103, "train": 418472, "valid": 23247}
    yield {"event": "start", "step": 0, "parameters": 265575, "ranks": 1, "corpus": corpus, "device": "cpu"}
    yield {"event": "baseline", "step": 0, "rows": [{"label": "Witten–Bell order 1", "bits": 3.43}]}
    yield {"event": "stage", "step": 0, "stage": "shallow", "from": None}
    for line in range(1, lines):
        number, stage = 20 * line, "shallow" if 2 * line < lines else "implicit"
        if 2 * (line - 1) < lines <= 2 * line:
            yield {"event": "stage", "step": number, "stage": stage, "from": "shallow"}
        yield step(number, stage, 1.2 + 3.0 / (1 + 50 * number / steps) + noise.gauss(0, 0.05), noise)
        if line % every == 0:
            yield valid(number, stage, 1.3 + 3.0 / (1 + 50 * number / steps), noise)
            yield {"event": "spectral_radius", "step": number, "stage": stage, "mean": 0.8, "max": 0.8 + noise.random()}


def step(number: int, stage: str, loss: float, noise: random.Random) -> dict[str, Any]:
    """The line of a training step."""
    return {
        "event": "step",
        "step": number,
        "stage": stage,
        "loss": loss,
        "bits": loss / math.log(2),
        "learning_rate": 1e-3 * noise.random(),
        "gradient_norm": noise.random(),
        "tokens": 512,
        "seconds": 0.05 * number + noise.random(),
        "tokens_per_second": 4000 * noise.random(),
        "forward": solve(10, noise),
        "backward": solve(9, noise) if stage == "implicit" else None,
        "rank_evals": None,
        "extra": None,
        "penalty": None,
    }


def valid(number: int, stage: str, nats: float, noise: random.Random) -> dict[str, Any]:
    """The line of a validation."""
    sizes = {"batch_size": 8, "segment_length": 64, "overlap": 0, "max_segments": None, "memory_length": 64}
    return {
        "event": "valid",
        "step": number,
        "stage": stage,
        "nats": nats,
        "bits": nats / math.log(2),
        "perplexity": math.exp(nats),
        "accuracy": None,
        "tokens": 23240,
        "forward": solve(10, noise),
        "seconds": 0.05 * number,
        "best": True,
        "setting": {**sizes, "max_evals": 30, "rtol": 0.01, "atol": 0.0, "tokens": 23240, "stream_tokens": 23247},
    }


def solve(evals: int, noise: random.Random) -> dict[str, float]:
    """Cost and success of a solve."""
    residual, steps = math.exp(noise.gauss(-5, 0.5)), evals - 2 + noise.random()
    return {"evals": evals + noise.random(), "residual": residual, "converged": 1 - noise.random() ** 8, "steps": steps}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
