"""A million scalar equations: the time of a solve beside that of a bare loop that evaluates f as often.

python benchmarks/kepler.py     a minute; prints the table, writes results/kepler.json and its part of
    docs/evidence/measured.md

Kepler's equation E = M + e·sin E, with M from [0, 2π] and e from [0, 0.5], at Stop()'s tolerance. The bare loop
evaluates f, takes the norm of f(z) − z over all samples, and continues with f(z); it knows neither which samples are
done nor how they ended. Both take turns in one process with one thread, and the fastest of each counts: an allocation
that the system has to fill with zeros first can double a time.

f is so cheap that the residual of each sample costs several times as much. "At a time" says how often f is applied
within one evaluation of the solver: f∘f has the same fixed point, and its residual is measured half as often.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import publish
from torch import Tensor

from equilibria import Anderson, Broyden, Picard, Stop, solve

SAMPLES = 10**6
CASES = ((Picard(), 1), (Picard(), 2), (Picard(), 4), (Anderson(), 1), (Anderson(), 2), (Anderson(), 4), (Broyden(), 1))
"""Solvers, and how often f is applied at a time."""


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bare(f: Callable[[Tensor], Tensor], z: Tensor, evals: int) -> float:
    """Plain iteration, and one norm per evaluation."""
    norm = z.new_zeros(())
    for _ in range(evals):
        fz = f(z)
        norm = torch.linalg.vector_norm(fz - z)
        z = fz
    return float(norm)


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per dtype and case."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        mean = (2 * math.pi * torch.rand(SAMPLES, 1, dtype=torch.float64)).to(dtype)
        eccentricity = (0.5 * torch.rand(SAMPLES, 1, dtype=torch.float64)).to(dtype)
        z0, stop = torch.zeros_like(mean), Stop(max_evals=100)

        def f(z: Tensor, mean: Tensor = mean, eccentricity: Tensor = eccentricity) -> Tensor:
            return mean + eccentricity * z.sin()

        solution = z0
        for _ in range(100):
            solution = f(solution)
        for solver, times in CASES:

            def repeated(z: Tensor, f: Callable[[Tensor], Tensor] = f, times: int = times) -> Tensor:
                for _ in range(times):
                    z = f(z)
                return z

            found = solve(repeated, z0, solver, stop)
            evals = times * found.evals
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(seconds(lambda: solve(repeated, z0, solver, stop)))  # noqa: B023
                theirs.append(seconds(lambda: bare(f, z0, evals)))  # noqa: B023
            row = {"solver": str(solver), "at a time": times, "dtype": str(dtype)[6:], "evals": evals}
            row |= {
                "converged": float(found.converged.double().mean()),
                "error": float((found.z - solution).abs().max()),
            }
            row |= {"seconds": min(ours), "bare": min(theirs), "ratio": min(ours) / min(theirs)}
            print(row, flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = ["| dtype | solver | f at a time | evaluations of f | largest error | time | bare loop | ratio |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {row['dtype']} | {row['solver'].partition('(')[0]} | {row['at a time']} | {row['evals']} "
        f"| {row['error']:.4f} | {row['seconds']:.3f} s | {row['bare']:.3f} s | {row['ratio']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    torch.set_num_threads(1)
    with torch.no_grad():
        measured = measure(parser.parse_args().rounds)
    publish("kepler", measured, table(measured), page="evidence/measured")
