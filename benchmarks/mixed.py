"""A batch of mixed difficulty: what dropping the samples that have converged saves in a forward solve.

python benchmarks/mixed.py           prints the table, writes results/mixed.json and its part of
    docs/evidence/measured.md

The block of ``block.py`` with eight samples, of which some get a stronger input: most of them become easy, one hard.
Anderson(6) and Broyden(20) to 1e-3, with and without dropping samples, rounds interleaved; the solutions are compared
as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from block import BATCH, block
from machine import publish

from equilibria import Anderson, Broyden, Solution, Solver, Stop, solve
from equilibria.layers.cell import CellMap

STRONGER = 6.0
"""Times the input of the other samples."""
AS_THEY_ARE = (8, 4, 2, 1)
"""Samples of a batch that are left as they are."""
SOLVERS: dict[str, Solver] = {"Anderson(6)": Anderson(), "Broyden(20)": Broyden()}


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per batch and solver."""
    rows = []
    cell, x = block(0.92)
    stop = Stop(rtol=1e-3, atol=0, max_evals=200)
    for kept in AS_THEY_ARE:
        gains = torch.full((BATCH, 1, 1), STRONGER)
        gains[:kept] = 1.0
        f = CellMap(cell, cell.prepare(gains * x))
        for name, solver in SOLVERS.items():
            seconds: dict[str, list[float]] = {"whole": [], "selecting": []}
            found: dict[str, Solution] = {}
            for _ in range(rounds):
                for way in seconds:
                    began = time.perf_counter()
                    found[way] = solve(f, torch.zeros_like(x), solver, stop, drop_converged=way == "selecting")
                    seconds[way].append(time.perf_counter() - began)
            row: dict[str, Any] = {"as_they_are": kept, "solver": name, "evals": found["selecting"].evals}
            row |= {way: statistics.median(several) for way, several in seconds.items()}
            steps = found["selecting"].steps
            row |= {"steps": steps.tolist(), "work": float((steps + 1).sum()) / (BATCH * row["evals"])}
            row["ratio"] = row["selecting"] / row["whole"]
            row["difference"] = float((found["whole"].z - found["selecting"].z).norm() / found["whole"].z.norm())
            assert found["whole"].evals == row["evals"]
            assert found["whole"].steps.equal(steps)
            print(row, flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| samples as they are | solver | evaluations | fewest steps | time, whole batch | leaving out | ratio "
        "| share of the samples' own evaluations | difference of the solutions |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['as_they_are']} | {row['solver']} | {row['evals']} | {min(row['steps'])} | {row['whole']:.2f} s "
        f"| {row['selecting']:.2f} s | {row['ratio']:.2f} | {row['work']:.2f} | {row['difference']:.0e} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    with torch.no_grad():
        found = measure(parser.parse_args().rounds)
    publish("mixed", found, table(found), page="evidence/measured")
