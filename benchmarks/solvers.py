"""Solvers beside those of torchdeq 0.1.0, on one map: evaluations, time, the solver's own share, states held.

pip install --no-deps torchdeq==0.1.0
python benchmarks/solvers.py         prints the tables, writes results/solvers.json and its part of
    docs/evidence/measured.md

Same map, start and tolerance, float32, rounds interleaved. torchdeq's cost grows with its limit, which is 60, and 150
for the last tolerance; here the limit is 200 evaluations. Residuals are ‖f(z) − z‖/‖f(z)‖ of the worst sample,
evaluated again at what was returned.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from block import GAINS, Counted, block, measured
from machine import publish
from torch import Tensor
from torchdeq.solver.anderson import anderson_solver
from torchdeq.solver.broyden import broyden_solver

from equilibria import Anderson, Broyden, Solver, Stop, solve
from equilibria.peak_memory import PeakMemory

Run = Callable[[Any, Tensor, float], Tensor]
"""From f, the start and a relative tolerance to the point that is returned."""
LIMITS = {1e-3: 60, 1e-4: 60, 1e-6: 150}
"""Tolerances, and torchdeq's limit for each."""


def ours(solver: Solver) -> Run:
    """A solver of this library."""
    return lambda f, z, rtol: solve(f, z, solver, Stop(rtol=rtol, atol=0, max_evals=200)).z


def theirs(solver: Callable[..., Any], **choices: Any) -> Run:
    """A solver of torchdeq, by its relative residual."""
    return lambda f, z, rtol: solver(f, z, max_iter=LIMITS[rtol], tol=rtol, stop_mode="rel", **choices)[0]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One method in both libraries."""

    name: str
    ours: Run
    theirs: Run


METHODS = (
    Pair("Anderson, window 6", ours(Anderson(window=6)), theirs(anderson_solver, m=6)),
    Pair("Broyden, all columns", ours(Broyden(rank=200)), theirs(broyden_solver)),
    Pair("Broyden, 20 columns", ours(Broyden(rank=20)), theirs(broyden_solver, LBFGS_thres=20)),
)


def once(run: Run, f: Callable[[Tensor], Tensor], z0: Tensor, rtol: float) -> dict[str, float]:
    """One solve."""
    counted = Counted(f)
    began = time.perf_counter()
    z = run(counted, z0, rtol)
    seconds = time.perf_counter() - began
    fz = f(z)
    residual = ((fz - z).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)).max()
    return {
        "evals": counted.calls,
        "seconds": seconds,
        "own": 1 - counted.seconds / seconds,
        "residual": float(residual),
    }


def states(run: Run) -> float:
    """States held at the worst moment of a solve, of a map that holds nothing but its result."""
    z0, factor = torch.zeros(8, 128 * 256), torch.linspace(0.5, 0.9, 128 * 256)
    offset = torch.linspace(-1, 1, 128 * 256)
    with PeakMemory() as memory:
        run(lambda z: torch.addcmul(offset, z, factor), z0, 1e-4)
    return memory.peak / (z0.numel() * z0.element_size())


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per map, tolerance and method."""
    rows = []
    held = {(m.name, who): states(getattr(m, who)) for m in METHODS for who in ("ours", "theirs")}
    for radius in GAINS:
        cell, x = block(radius)
        prepared, z0, rho = cell.prepare(x), torch.zeros_like(x), measured(radius)

        def f(z: Tensor, cell: Any = cell, prepared: Any = prepared) -> Tensor:
            return cell(z, prepared)

        for rtol in LIMITS:
            for method in METHODS:
                found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
                for _ in range(rounds):
                    for who, several in found.items():
                        several.append(once(getattr(method, who), f, z0, rtol))
                row: dict[str, Any] = {"radius": rho, "rtol": rtol, "method": method.name}
                for who, several in found.items():
                    row[who] = {key: statistics.median(one[key] for one in several) for key in several[0]}
                    row[who]["states"] = held[method.name, who]
                row["time_ratio"] = row["ours"]["seconds"] / row["theirs"]["seconds"]
                print(row, flush=True)
                rows.append(row)
    return rows


def reached(found: dict[str, Any], row: dict[str, Any]) -> str:
    """The evaluations of a solve, with its residual if that did not reach the tolerance."""
    if found["residual"] <= row["rtol"]:
        return f"{found['evals']:.0f}"
    return f"not reached in {found['evals']:.0f} ({found['residual']:.0e})"


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| radius | rtol | method | evaluations | torchdeq's | time | torchdeq's | ratio | solver's own time "
        "| torchdeq's | states held | torchdeq's |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mine, other = row["ours"], row["theirs"]
        lines.append(
            f"| {row['radius']:.2f} | {row['rtol']:g} | {row['method']} | {reached(mine, row)} | {reached(other, row)} "
            f"| {mine['seconds']:.2f} s | {other['seconds']:.2f} s | {row['time_ratio']:.2f} | {mine['own']:.1%} "
            f"| {other['own']:.1%} | {mine['states']:.1f} | {other['states']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    with torch.no_grad():
        found = measure(parser.parse_args().rounds)
    publish("solvers", found, table(found), page="evidence/measured")
