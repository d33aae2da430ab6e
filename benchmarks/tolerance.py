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

from equilibria import Anderson, Broyden, Implicit, Neumann, NewtonKrylov, Shine, Stop
from equilibria.commands.loading import trained
from equilibria.corpora import Segments
from equilibria.equilibrium import GradientRule
from equilibria.solve import Solver

SOLVERS = (Anderson(), Broyden(), NewtonKrylov())
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


def gradient(model, segments, solver: Solver, stop: Stop, rule: GradientRule):
    """The gradient of the mean loss on the second segment, all parameters in one vector, and the solution."""
    layer = model.layer
    first, second = segments
    layer.solver, layer.stop, layer.eval_stop, layer.gradient = Broyden(memory=60), Stop(1e-6, 0, 200), None, Implicit()
    with torch.no_grad():
        memory = model(first.tokens, first.targets).memory
    layer.solver, layer.stop, layer.gradient = solver, stop, rule
    output = model(second.tokens, second.targets, memory)
    found = torch.autograd.grad(output.nats.mean(), list(model.parameters()))
    return torch.cat([g.double().flatten() for g in found]), output.solution


def rows(run: Path):
    """One row a rule, solver and tolerance."""
    torch.set_num_threads(1)
    loaded = trained(run)
    model = loaded.model.train()
    stream = Segments(loaded.corpus.valid, batch_size=8, length=loaded.experiment.training.segment_length)
    segments = (stream.at(20), stream.at(21))
    tight = Stop(rtol=1e-10, atol=0, max_evals=600)
    accurate = Broyden(memory=200)
    exact, reference = gradient(copy.deepcopy(model).double(), segments, accurate, tight, Implicit(accurate, tight))
    assert reference.converged.all()
    cases = [(s, t, Implicit(s, Stop(rtol=t, atol=0, max_evals=200))) for s in SOLVERS for t in TOLERANCES]
    cases += [(Broyden(), 1e-3, rule) for rule in (Neumann(0), Neumann(5), Shine())]
    for solver, rtol, rule in cases:
        found, solution = gradient(model, segments, solver, Stop(rtol=rtol, atol=0, max_evals=200), rule)
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
