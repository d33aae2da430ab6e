"""What a tolerance costs and what it leaves: evaluations and gradient error on a trained model.

python benchmarks/tolerance.py RUN        (for instance the run of `make demo`: runs/demo)

One segment of the validation text, with memory. The reference is the implicit gradient of the same weights in float64
with both tolerances at 1e-10. Every solver and tolerance solves forward and backward alike. Writes
results/tolerance.json.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from machine import keep

from equilibria import Anderson, Broyden, Implicit, Method, Neumann, NewtonKrylov, Shine, Stop
from equilibria.lm.corpora import Segments
from equilibria.lm.runs.trained import load

SOLVERS = (Anderson(), Broyden(), NewtonKrylov())
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


PAST = Method(Broyden(rank=60), Stop(rtol=1e-6, atol=0, max_evals=200))
"""For the segment before, whose states are the memory."""


def gradient(model, segments, method: Method):
    """The gradient of the mean loss on the second segment, all parameters in one vector, and the solution."""
    first, second = segments
    with torch.no_grad():
        memory = model(first.tokens, first.targets, method=PAST).memory
    output = model(second.tokens, second.targets, memory, method=method)
    found = torch.autograd.grad(output.nll.mean(), list(model.parameters()))
    return torch.cat([g.double().flatten() for g in found]), output.solution


def rows(run: Path):
    """One row per rule, solver and tolerance."""
    torch.set_num_threads(1)
    loaded = load(run)
    model = loaded.model.train()
    stream = Segments(loaded.corpus.valid, batch_size=8, length=loaded.experiment.training.batches.segment_length)
    segments = (stream.at(20), stream.at(21))
    tight = Stop(rtol=1e-10, atol=0, max_evals=600)
    accurate = Method(Broyden(rank=200), tight, Implicit(Broyden(rank=200), tight))
    exact, reference = gradient(copy.deepcopy(model).double(), segments, accurate)
    assert reference.converged.all()
    cases = [(s, t, Implicit(s, Stop(rtol=t, atol=0, max_evals=200))) for s in SOLVERS for t in TOLERANCES]
    cases += [(Broyden(), 1e-3, rule) for rule in (Neumann(0), Neumann(5), Shine())]
    for solver, rtol, rule in cases:
        method = Method(solver, Stop(rtol=rtol, atol=0, max_evals=200), rule)
        found, solution = gradient(model, segments, method)
        backward = solution.adjoint[0] if solution.adjoint else None
        yield {
            "rule": type(rule).__name__ + (f"({rule.terms})" if isinstance(rule, Neumann) else ""),
            "solver": type(solver).__name__,
            "rtol": rtol,
            "forward_evals": solution.evals,
            "backward_evals": backward.evals if backward else 0,
            "converged": float(solution.converged.float().mean()),
            "gradient_error": float((found - exact).norm() / exact.norm()),
            "cosine": float(torch.cosine_similarity(found, exact, dim=0)),
        }


if __name__ == "__main__":
    table = []
    for row in rows(Path(sys.argv[1])):
        table.append(row)
        print(
            f"{row['rule']:<11} {row['solver']:<13} {row['rtol']:.0e}   forward {row['forward_evals']:>3}   "
            f"backward {row['backward_evals']:>3}   converged {row['converged']:.0%}   "
            f"gradient error {row['gradient_error']:.1%}   cosine {row['cosine']:.4f}"
        )
    print(keep("tolerance", table))
