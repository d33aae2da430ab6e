"""What the products of oneDNN save on this processor, beside those of PyTorch: time of f, of a VJP and of a step.

python benchmarks/product.py               prints the table, writes results/product.json and its part of
    docs/howto/speed.md
    --rounds 15                            repetitions of each measurement

One thread, and the time of the process. Both take turns on cells with the same parameters, and each ratio is the median
over the rounds. A step is a forward and a backward solve of four evaluations each, with the gradients of all
parameters. The last column is the page faults of a step, which are many where the C library returns freed memory to the
system.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from typing import Any

import torch
from attention import Measured, Size, timed
from machine import publish

from equilibria.cells import TransformerConfig
from equilibria.layers.linear import MKL_HOLDS_BACK
from equilibria.lm.experiments import Experiment
from equilibria.lm.recipes import ptb, tiny


def measure(experiment: Experiment, rounds: int) -> dict[str, Any]:
    """The row of a recipe's cell and batches."""
    batches, config = experiment.training.batches, experiment.model.cell
    assert isinstance(config, TransformerConfig)
    size = Size(batches.batch_size, batches.segment_length, config)
    cpu, row = torch.device("cpu"), {"name": experiment.name, "size": size.words}
    cells: dict[bool, Measured] = {}
    for enabled in (False, True):
        torch.backends.mkldnn.enabled = enabled
        cells[enabled] = Measured(size, "exact", cpu)
    for what in ("f", "vjp", "step"):
        pairs = []
        for _ in range(rounds + 1):
            seconds = {}
            for enabled, cell in cells.items():
                torch.backends.mkldnn.enabled = enabled
                seconds[enabled] = timed(getattr(cell, what), cpu)
            pairs.append(seconds)
        del pairs[0]  # the first evaluation compiles oneDNN's kernels
        row |= {f"{what}, PyTorch": statistics.median(pair[False] for pair in pairs)}
        row |= {f"{what}, oneDNN": statistics.median(pair[True] for pair in pairs)}
        row[f"{what}, ratio"] = statistics.median(pair[True] / pair[False] for pair in pairs)
    before = faults()
    cells[True].step()
    row["page faults of a step"] = faults() - before
    print(row, flush=True)
    return row


def faults() -> int:
    """Pages that the system has given to this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| | f, PyTorch | oneDNN | ratio | VJP, ratio | step, PyTorch | oneDNN | ratio | page faults of a step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        f, step = ([1e3 * row[f"{what}, {who}"] for who in ("PyTorch", "oneDNN")] for what in ("f", "step"))
        lines.append(
            f"| `{row['name']}`: {row['size']} | {f[0]:.1f} ms | {f[1]:.1f} ms | {row['f, ratio']:.2f} "
            f"| {row['vjp, ratio']:.2f} | {step[0]:.0f} ms | {step[1]:.0f} ms | {row['step, ratio']:.2f} "
            f"| {row['page faults of a step']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if not MKL_HOLDS_BACK:
        raise SystemExit("on this processor PyTorch multiplies as it always does, so there is nothing to compare.")
    torch.set_num_threads(1)
    found = [measure(recipe(), given.rounds) for recipe in (tiny, ptb)]
    publish("product", found, table(found), page="howto/speed")
