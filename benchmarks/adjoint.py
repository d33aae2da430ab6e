"""The backward pass of an implicit layer beside torchdeq 0.1.0: VJPs, time, states held, error of the gradient.

pip install --no-deps torchdeq==0.1.0
python benchmarks/adjoint.py         prints the table, writes results/adjoint.json and its part of
    docs/evidence/measured.md

From the same equilibrium (float64, 1e-10, rounded to float32) and the same cotangent. VJPs are products with Jᵀ;
errors are of the gradient of all parameters, against one in float64 at 1e-10. "Scaled" is the same with the loss times
1e-4, which must change nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from block import GAINS, Counted, block
from machine import publish
from torch import Tensor
from torchdeq.grad import backward_factory
from torchdeq.solver.anderson import anderson_solver
from torchdeq.solver.broyden import broyden_solver

from equilibria import Anderson, Broyden, Implicit, Picard, Solver, Stop, fixed_point, solve
from equilibria.peak_memory import PeakMemory

RTOL, LIMIT = 1e-3, 60
Layer = Callable[[Any, Tensor], Tensor]
"""From f and the equilibrium to f(z*) with its gradient rule."""


def ours(solver: Solver, rtol: float = RTOL, most: int = 100) -> Layer:
    """The implicit gradient of this library, of a forward solve that is done."""
    rule, done = Implicit(solver, Stop(rtol=rtol, atol=0, max_evals=most)), Stop(rtol=0, atol=0, max_evals=1)
    return lambda f, z: fixed_point(f, z, solver=Picard(), stop=done, gradient=rule).z


def theirs(solver: Callable[..., Any], **choices: Any) -> Layer:
    """That of torchdeq."""
    wanted = {"max_iter": LIMIT, "tol": RTOL, "stop_mode": "rel"} | choices
    rule = backward_factory(grad_type="ift", b_solver=solver, b_solver_kwargs=wanted)
    return lambda f, z: rule(None, f, z.clone())[0]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    layer: Layer


RULES = (
    Rule("Implicit(Anderson(6))", ours(Anderson(window=6))),
    Rule("torchdeq, Anderson 6", theirs(anderson_solver, m=6, max_iter=120)),
    Rule("torchdeq, Anderson 6, ridge 1e-10", theirs(anderson_solver, m=6, lam=1e-10)),
    Rule("Implicit(Broyden(20))", ours(Broyden(rank=20))),
    Rule("torchdeq, Broyden", theirs(broyden_solver)),
)


def gradient(layer: Layer, cell: Any, x: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The gradient of all parameters, and what the backward pass took."""
    cell.zero_grad(set_to_none=True)
    prepared = cell.prepare(x)
    out = layer(lambda z: cell(z, prepared), z)
    backward, products = Counted(out.backward), Counted(torch.autograd.grad)
    torch.autograd.grad = products  # both libraries take their products from it
    try:
        backward(g)
    finally:
        torch.autograd.grad = products.f
    flat = torch.cat([p.grad.flatten() for p in cell.parameters() if p.grad is not None])
    return flat, {"products": products.calls, "seconds": backward.seconds}


def states(layer: Layer) -> float:
    """States held at the worst moment of the backward pass, of a map that holds little."""
    z = torch.zeros(8, 128 * 256)
    factor = torch.linspace(0.5, 0.9, 128 * 256).requires_grad_()
    out = layer(lambda z: z * factor, z)
    g = torch.ones_like(out)
    with PeakMemory() as memory:
        out.backward(g)
    return memory.peak / (z.numel() * z.element_size())


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per map and rule."""
    rows = []
    for radius in GAINS:
        exact, x64 = block(radius, dtype=torch.float64)
        with torch.no_grad():
            prepared = exact.prepare(x64)
            tight = Stop(rtol=1e-10, atol=0, max_evals=500)
            z64 = solve(lambda z: exact(z, prepared), torch.zeros_like(x64), Broyden(60), tight).z  # noqa: B023
        torch.manual_seed(1)
        g64 = torch.randn_like(z64)
        reference, _ = gradient(ours(Broyden(60), rtol=1e-10, most=500), exact, x64, z64, g64)
        cell, x = block(radius)
        found: dict[str, list[dict[str, float]]] = {rule.name: [] for rule in RULES}
        for turn in range(rounds):
            for rule in RULES:
                scales = (1.0, 1e-4) if turn == 0 else (1.0,)
                for scale in scales:
                    flat, row = gradient(rule.layer, cell, x, z64.float(), scale * g64.float())
                    row["error"] = float((flat.double() / scale - reference).norm() / reference.norm())
                    found[rule.name].append(row | {"scale": scale})
        for rule in RULES:
            plain = [row for row in found[rule.name] if row["scale"] == 1]
            scaled = next(row for row in found[rule.name] if row["scale"] != 1)
            row = {"radius": radius, "rule": rule.name, "states": states(rule.layer)}
            row |= {key: statistics.median(one[key] for one in plain) for key in ("products", "seconds", "error")}
            row |= {f"scaled_{key}": scaled[key] for key in ("products", "error")}
            print(row, flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| radius | rule | VJPs | time | error of the gradient | VJPs, scaled | error, scaled | states held |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['radius']} | {row['rule']} | {row['products']:.0f} | {row['seconds']:.2f} s | {row['error']:.1e} "
        f"| {row['scaled_products']:.0f} | {row['scaled_error']:.1e} | {row['states']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    measured = measure(parser.parse_args().rounds)
    publish("adjoint", measured, table(measured), page="evidence/measured")
