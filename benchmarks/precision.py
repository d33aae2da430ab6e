"""How small a residual can become where f computes in bfloat16 or float16, on the block of the solver benchmarks.

python benchmarks/precision.py       prints the table, writes results/precision.json and its part of
    docs/evidence/measured.md

The whole budget is spent; what is printed is the smallest residual ‖f(z) − z‖/‖f(z)‖ that was met, of the best and of
the worst sample.
"""

from __future__ import annotations

from typing import Any

import torch
from block import GAINS, block
from machine import publish

from equilibria import Anderson, Broyden, Stop, solve

BUDGET = 60


def measure(device: str = "cpu", *, budget: int = BUDGET) -> list[dict[str, Any]]:
    """One row per map, arithmetic and solver."""
    rows = []
    for radius in GAINS:
        for dtype in (torch.bfloat16, torch.float16):
            for autocast in (True, False):
                cell, x = block(radius, dtype=torch.float32 if autocast else dtype, device=device)
                x = x[:4]
                for solver in (Anderson(), Broyden()):
                    with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=autocast):
                        prepared = cell.prepare(x)
                        stop = Stop(rtol=0, atol=0, max_evals=budget)
                        residual = solve(lambda z: cell(z, prepared), torch.zeros_like(x), solver, stop).residual  # noqa: B023
                    rows.append(
                        {
                            "radius": radius,
                            "arithmetic": f"{'autocast to' if autocast else 'state of'} {str(dtype)[6:]}",
                            "solver": type(solver).__name__,
                            "best": float(residual.min()),
                            "worst": float(residual.max()),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = ["| radius | arithmetic | solver | smallest residual, best sample | worst |", "|---:|---|---|---:|---:|"]
    lines += [
        f"| {row['radius']} | {row['arithmetic']} | {row['solver']} | {row['best']:.1e} | {row['worst']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    measured = measure()
    publish("precision", measured, table(measured), page="evidence/measured")
