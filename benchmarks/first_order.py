"""Has a change made the training step slower or larger? The steps of two trees, which take turns.

python benchmarks/first_order.py OLD        a commit beside the working tree
    --rounds N                              steps that are timed (60)
    --name NAME                             of the result (first_order), to keep one that the documentation cites

Each tree trains the equilibrium of `tiny` and of `tiny-trellis` by one thread in a process of its own. The processes
take turns step by step, so that other work on the machine slows both alike; the time is the processor's, and the
median of the ratios of two neighbouring steps counts. Memory is the largest peak of the tensors that a step makes,
measured in further steps. Both trees compute the same bits, or the evaluations in the table differ. Prints the table
and writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bits import checked_out, commit_of, home, per_step, recipe
from machine import keep

RECIPES = ("tiny", "tiny-trellis")
BEFORE = 20
"""Steps of the shallow stage before the equilibrium is trained."""
MEASURED = 5
"""Steps whose memory is measured."""


def work(name: str, rounds: int) -> None:
    """The worker: one step for each line of its input, and a line of output for each."""
    torch.set_num_threads(1)
    experiment = recipe(name, BEFORE, rounds + MEASURED + 2)
    trainer = home("equilibria.lm.training", "equilibria.training").Trainer(experiment, None, experiment.corpus.load())
    peak = home("equilibria.peak_memory", "equilibria.training.memory").PeakMemory
    take, number = trainer.step, 0

    def watched(segment: Any) -> Any:
        nonlocal number
        number += 1
        if number <= BEFORE + 2:
            return take(segment)
        sys.stdin.readline()
        if number <= BEFORE + 2 + MEASURED:
            with peak() as memory:
                step = take(segment)
            print(memory.peak, flush=True)
            return step
        began = time.process_time()
        step = take(segment)
        print(time.process_time() - began, *list(per_step(step).values())[2:], flush=True)
        return step

    trainer.step = watched
    trainer.fit()


def started(tree: Path, name: str, rounds: int) -> subprocess.Popen[str]:
    """The worker of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--rounds", str(rounds)]
    return subprocess.Popen(words, env=environment, cwd=tree, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def asked(worker: subprocess.Popen[str]) -> list[float]:
    """The numbers of one step."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        sys.exit("A worker ended; its message is above.")
    return [float(word) for word in line.split()]


def compared(trees: dict[str, Path], name: str, rounds: int) -> dict[str, Any]:
    """The row of a recipe."""
    workers = {which: started(tree, name, rounds) for which, tree in trees.items()}
    peaks = {which: max(asked(worker)[0] for _ in range(MEASURED)) for which, worker in workers.items()}
    steps = [{which: asked(worker) for which, worker in workers.items()} for _ in range(rounds)]
    for worker in workers.values():
        worker.communicate()
    row: dict[str, Any] = {"recipe": name, "rounds": rounds}
    for which in trees:
        seconds, forward, backward = (statistics.fmean(step[which][place] for step in steps) for place in range(3))
        row[which] = {"seconds": seconds, "forward": forward, "backward": backward, "peak_bytes": peaks[which]}
    row["time_ratio"] = statistics.median(step["new"][0] / step["old"][0] for step in steps)
    row["memory_ratio"] = peaks["new"] / peaks["old"]
    return row


def main() -> None:
    """Compare, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", nargs="?")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--name", default="first_order")
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.rounds)
        return
    old = commit_of(options.old)
    with checked_out(old) as before, checked_out(None) as now:
        rows = [compared({"old": before, "new": now}, name, options.rounds) for name in RECIPES]
    for row in rows:
        line = f"{row['recipe']:<13} time {row['time_ratio']:.3f}  memory {row['memory_ratio']:.3f}"
        print(line, *(f" {which}: {row[which]}" for which in ("old", "new")), sep="\n", flush=True)
    print(keep(options.name, {"old": old, "recipes": rows}))


if __name__ == "__main__":
    main()
