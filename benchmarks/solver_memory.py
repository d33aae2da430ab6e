"""Peak memory of one training step by solver and gradient rule: constant in depth, but not the same for all of them.

The model is that of the recipe `tiny`, as in ``memory.py``; every solve, forward and backward, spends 32 evaluations.

python benchmarks/solver_memory.py   prints the table, writes results/solver_memory.json and its part of
                                     docs/evidence/measured.md
"""

from __future__ import annotations

from machine import publish
from memory import peak

from equilibria import (
    Anderson,
    Broyden,
    GradientRule,
    Implicit,
    Method,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Solver,
    Stop,
    Unroll,
)

EVALS = 32
STOP = Stop(rtol=0, atol=0, max_evals=EVALS)
PLAIN = Stop(rtol=0, atol=0, max_evals=EVALS, best=False)
"""Plain iteration is monotone where it converges, so it need not keep the best iterate."""
UNROLLED = Stop(rtol=0, atol=0, max_evals=EVALS + 1, best=False)


def both(solver: Solver, stop: Stop = STOP) -> Method:
    """The solver forward and backward."""
    return Method(solver, stop, Implicit(solver, stop))


def only(gradient: GradientRule) -> Method:
    """Anderson's method forward, and this rule."""
    return Method(Anderson(), STOP, gradient)


METHODS = {
    "`Picard()`, `Implicit`": both(Picard(), PLAIN),
    "`Anderson(3)`, `Implicit`": both(Anderson(3)),
    "`Anderson(6)`, `Implicit`": both(Anderson()),
    "`Broyden(10)`, `Implicit`": both(Broyden(10)),
    "`Broyden(20)`, `Implicit`": both(Broyden()),
    "`Broyden(32)`, `Implicit`": both(Broyden(EVALS)),
    "`NewtonKrylov()`, `Implicit`": both(NewtonKrylov()),
    "`Anderson(6)`, `Phantom(1)`": only(Phantom()),
    "`Anderson(6)`, `Phantom(5, 0.5)`": only(Phantom(5, 0.5)),
    "`Anderson(6)`, `Neumann(5)`": only(Neumann(5)),
    "`Picard()`, `Unroll(checkpoint=True)`": Method(Picard(), UNROLLED, Unroll(checkpoint=True)),
    "`Picard()`, `Unroll()`": Method(Picard(), UNROLLED, Unroll()),
}


def table(rows: list[dict[str, object]]) -> str:
    """One line per method."""
    lines = ["| solver, gradient rule | peak memory of a training step |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {row['method']} | {row['bytes'] / 2**20:.1f} MiB |" for row in rows)])


if __name__ == "__main__":
    found: list[dict[str, object]] = [{"method": name, "bytes": peak(method)} for name, method in METHODS.items()]
    publish("solver_memory", found, table(found), page="evidence/measured")
