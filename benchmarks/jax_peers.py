r"""A training step of a DEQ-Transformer's layer beside jitted JAX programs of jaxopt and optimistix, on one core.

pip install jax jaxopt optimistix          in an environment that has torch, best one of its own
equilibria train tiny --out wide --model.cell.width 512 --model.cell.heads 8 --model.cell.inner 2048 \
    --stages.0.steps 200 --stages.1.steps 60
taskset -c 1 python benchmarks/jax_peers.py wide --compiled
    prints the table, writes results/jax_peers.json and its part of docs/evidence/measured.md

The layers have the size of the recipe `tiny` (8 × 64 positions, memory 64, width 128), and that of each RUN. Beside
jaxopt's Anderson method stands ours on the weights of the trained model and a segment of its held-out text. optimistix
has no Anderson method, and plain iteration does not converge on these models, so beside its ``FixedPointIteration``
stands ``Picard`` on weights as drawn, which contract.

All stop by the same test: the residual of the whole batch, ‖f(z) − z‖ ≤ rtol·‖z*‖ forward and ‖Jᵀu + g − u‖ ≤
rtol·‖g‖ backward, both constants (here ``coupled=True``, since jaxopt and optimistix solve one problem). "per sample"
is how the layer is used: each sample has its own test, relative to its own norm. A step is a forward and an adjoint
solve and the gradients of all parameters and of the input; a random linear functional of z* is the loss. Nothing is
timed unless f agrees to 1e-5, and the gradients to 1e-3 where both solve to 1e-5. Rounds are interleaved; times are
those of the process. jaxopt's ridge is absolute: with 1e-11 it needs the fewest evaluations here.
XLA replaces denormal numbers by 0, and so does PyTorch here, as in a training with ``Trainer``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"  # before JAX is imported

import jax
import jax.numpy as jnp
import jaxopt
import optimistix
import torch
from jax_block import as_torch, f, fixed_point, parameters, prepare
from machine import publish

import equilibria
from equilibria import Anderson, Equilibrium, Implicit, Picard, Solver, Stop
from equilibria.cells import TransformerCell, TransformerConfig
from equilibria.cells.transformer.past import TransformerMemory
from equilibria.lm.corpora import Segments
from equilibria.lm.training.compilation import compile_cells

LIMIT, WINDOW, TIGHT = 200, 6, 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A cell, its input, its memory, and the cotangent g of z*."""

    name: str
    cell: TransformerCell
    x: torch.Tensor
    memory: TransformerMemory
    g: torch.Tensor

    @classmethod
    def trained(cls, run: str) -> Problem:
        """A trained model, and two segments of its held-out text."""
        loaded = equilibria.load(run)
        stream, model = Segments(loaded.stream("valid"), batch_size=8, length=64), loaded.model
        with torch.no_grad():
            memory = model(stream.at(20).tokens, stream.at(20).targets).memory
            x = model.embedding(stream.at(21).tokens)
        return cls.of(f"trained, width {x.shape[2]}", model.layer.cell, x, memory)

    @classmethod
    def drawn(cls) -> Problem:
        """The same cell with weights as drawn and a strong injection, and random numbers for a text."""
        torch.manual_seed(0)
        config: TransformerConfig = equilibria.load("tiny").experiment.model.cell
        cell = config.build()
        assert cell.inject is not None
        with torch.no_grad():
            cell.inject.direction.normal_(std=config.width**-0.5)
            cell.inject.direction[2 * config.width :].mul_(8)  # values: z then matters less for attention's output
            x = torch.randn(8, 64, config.width)
            u = cell.injected(x)
        memory = TransformerMemory.joined(None, torch.randn(x.shape), u, None, length=config.memory)
        return cls.of(f"as drawn, width {config.width}", cell, x, memory)

    @classmethod
    def of(cls, name: str, cell: TransformerCell, x: torch.Tensor, memory: TransformerMemory) -> Problem:
        """With a cotangent of norm 1."""
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return cls(name, cell.train(), x.detach().requires_grad_(), memory, g / g.norm())


class Ours:
    """A training step of ``Equilibrium``."""

    def __init__(self, problem: Problem, solver: Solver, forward: Stop, backward: Stop, *, coupled: bool) -> None:
        rule = Implicit(solver, backward)
        self.problem = problem
        self.layer = Equilibrium(problem.cell, solver, forward, rule, coupled=coupled, on_failure="raise")

    def step(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The solution, and the gradients by name."""
        given = self.problem
        named = {"x": given.x, **dict(given.cell.named_parameters())}
        out = self.layer(given.x, given.memory)
        found = torch.autograd.grad(out.z, list(named.values()), given.g)
        return out.solution, dict(zip(named, found, strict=True))

    def counts(self) -> tuple[int, int]:
        """Evaluations of f and VJPs of the two solves; the evaluation with graph is one of the first."""
        solution, _ = self.step()
        return solution.evals, solution.adjoint[-1].evals


class Theirs:
    """A jitted training step, with an iterative solver for the forward and for the adjoint system."""

    def __init__(self, problem: Problem, solver: str, forward: float, backward: float) -> None:
        memory = problem.memory
        given = (problem.x.detach(), memory.z, memory.u, problem.g)
        assert memory.u is not None
        self.x, self.z0, self.u0, self.g = (jnp.asarray(tensor.numpy()) for tensor in given)
        self.p = parameters(problem.cell)
        self.solve = {"jaxopt": by_jaxopt, "optimistix": by_optimistix}[solver]
        self.tolerances = forward, backward
        self.jitted = jax.jit(jax.grad(self.loss, argnums=(0, 1)))

    def loss(self, p: dict[str, Any], x: Any) -> Any:
        """gᵀz*, by the implicit function theorem: one evaluation at z*, and its VJP with the adjoint solution."""
        prepared = prepare(p, x, self.z0, self.u0)
        return (self.g * fixed_point(self.solve, self.tolerances, jnp.zeros_like(x), prepared)).sum()

    def step(self) -> dict[str, Any]:
        """The gradients by name."""
        of_p, of_x = self.jitted(self.p, self.x)
        return jax.block_until_ready({"x": of_x, **of_p})

    def gradients(self) -> torch.Tensor:
        """All of them in one vector."""
        return flat({name: as_torch(value) for name, value in self.step().items()})

    def counts(self) -> tuple[int, int]:
        """Evaluations of f and VJPs of the two solves."""
        forward, backward = self.tolerances
        prepared = prepare(self.p, self.x, self.z0, self.u0)
        z, evals = jax.jit(lambda values: self.solve(f, jnp.zeros_like(self.x), values, forward))(prepared)
        _, vjp = jax.vjp(lambda z: f(z, prepared), z)
        _, products = jax.jit(lambda g: self.solve(lambda u, g: vjp(u)[0] + g, g, g, backward))(self.g)
        return int(evals) + 1, int(products)  # and one evaluation with graph at z*


def by_jaxopt(function: Callable[[Any, Any], Any], z0: Any, operands: Any, tolerance: float) -> tuple[Any, Any]:
    """Anderson's method, without a gradient of its own."""
    found = jaxopt.AndersonAcceleration(
        function, history_size=WINDOW, maxiter=LIMIT, tol=tolerance, ridge=1e-11, implicit_diff=False, unroll=False
    ).run(z0, operands)
    return found.params, found.state.iter_num  # each iteration evaluates f once; XLA drops the one before the loop


def by_optimistix(function: Callable[[Any, Any], Any], z0: Any, operands: Any, tolerance: float) -> tuple[Any, Any]:
    """Plain iteration, without a gradient of its own."""
    solver = optimistix.FixedPointIteration(rtol=0.0, atol=tolerance, norm=optimistix.two_norm)
    found = optimistix.fixed_point(function, solver, z0, args=operands, max_steps=LIMIT)
    return found.value, found.stats["num_steps"]


def compare(problem: Problem, peer: str, solver: Solver, *, rtol: float, rounds: int, compiled: bool) -> dict[str, Any]:
    """One row: counts and seconds of a step, after f and the gradients were seen to agree."""
    tight = Stop(rtol=TIGHT, max_evals=LIMIT)
    solution, gradients = Ours(problem, solver, tight, tight, coupled=True).step()
    size, exact = float(solution.z.detach().norm()), flat(gradients)
    row: dict[str, Any] = {"weights": problem.name, "solver": str(solver), "peer": peer, "rtol": rtol}
    row["difference of f"], row["difference of the gradients"] = agreement(problem, peer, size, exact)
    whole = [Stop(rtol=0, atol=rtol * scale, max_evals=LIMIT) for scale in (size, 1.0)]
    own = Stop(rtol=rtol, max_evals=LIMIT)
    theirs = Theirs(problem, peer, rtol * size, rtol)
    ours = {
        "ours": Ours(problem, solver, *whole, coupled=True),
        "ours, per sample": Ours(problem, solver, own, own, coupled=False),
    }
    row["error of the gradient, theirs"] = apart(theirs.gradients(), exact)
    for name, step in ours.items():
        row[f"error of the gradient, {name}"] = apart(flat(step.step()[1]), exact)
        row[f"evaluations, {name}"] = step.counts()
    row["evaluations, theirs"] = theirs.counts()
    print(row, flush=True)
    calls: dict[str, Callable[[], Any]] = {name: step.step for name, step in ours.items()} | {"theirs": theirs.step}
    row |= timed(calls, rounds)
    if compiled:
        compile_cells(problem.cell)
        row |= {
            f"compiled, {key}": value
            for key, value in timed({"ours": ours["ours"].step, "theirs": theirs.step}, rounds).items()
        }
    print(row, flush=True)
    return row


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """One vector, in one order."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative difference of two tensors."""
    return float((found - expected).norm() / expected.norm())


def agreement(problem: Problem, peer: str, size: float, exact: torch.Tensor) -> tuple[float, float]:
    """How far f at a random state, and the gradients of accurate solves, differ between the two programs.

    Raises:
        SystemExit: they differ by more than rounding, so that no time would mean anything.
    """
    theirs = Theirs(problem, peer, TIGHT * size, TIGHT)
    z = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = problem.cell(z, problem.cell.prepare(problem.x, problem.memory))
    found = f(jnp.asarray(z.numpy()), prepare(theirs.p, theirs.x, theirs.z0, theirs.u0))
    differences = apart(as_torch(found), expected), apart(theirs.gradients(), exact)
    if not (differences[0] < 1e-5 and differences[1] < 1e-3):
        raise SystemExit(f"{problem.name}, {peer}: f and its gradients differ by {differences}; nothing was timed.")
    return differences


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median seconds of the process, and the median over the rounds of each ratio to theirs."""
    for call in calls.values():
        for _ in range(2):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    found: dict[str, Any] = {f"seconds, {name}": statistics.median(several) for name, several in seconds.items()}
    for name in calls:
        pairs = zip(seconds[name], seconds["theirs"], strict=True)
        found[f"ratio, {name}"] = statistics.median(mine / other for mine, other in pairs)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| weights | method, peer | rtol | evaluations + VJPs | per sample | peer's | step | per sample | peer's "
        "| ratio | ratio, per sample | ratio, compiled | error of the gradient, ours | peer's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        names = ("ours", "ours, per sample", "theirs")
        evals = " | ".join("{} + {}".format(*row[f"evaluations, {name}"]) for name in names)
        seconds = " | ".join(f"{1e3 * row[f'seconds, {name}']:.0f} ms" for name in names)
        compiled = f"{row['compiled, ratio, ours']:.2f}" if "compiled, ratio, ours" in row else "–"
        lines.append(
            f"| {row['weights']} | {row['solver'].split('(')[0]}, {row['peer']} | {row['rtol']:g} | {evals} "
            f"| {seconds} | {row['ratio, ours']:.2f} | {row['ratio, ours, per sample']:.2f} | {compiled} "
            f"| {row['error of the gradient, ours']:.0e} | {row['error of the gradient, theirs']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="trained runs beside the shipped `tiny`, with decay positions")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile for the cell")
    parser.add_argument("--name", default="jax_peers", help="of the result, such as jax_peers_intel for that processor")
    given = parser.parse_args()
    if len(os.sched_getaffinity(0)) > 1:  # XLA would use the others
        raise SystemExit("this comparison is on one core: start it with taskset -c 1 python benchmarks/jax_peers.py")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as XLA does for its own programs
    choices = {"rounds": given.rounds, "compiled": given.compiled}
    rows = []
    anderson = Anderson(window=WINDOW)
    for rtol in (1e-2, 1e-3):
        for run in ("tiny", *given.runs):
            rows.append(compare(Problem.trained(run), "jaxopt", anderson, rtol=rtol, **choices))
        rows.append(compare(Problem.drawn(), "optimistix", Picard(), rtol=rtol, **choices))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "jaxopt", "optimistix")}
    publish(given.name, {"versions": versions, "rows": rows}, table(rows), page="evidence/measured")


if __name__ == "__main__":
    main()
