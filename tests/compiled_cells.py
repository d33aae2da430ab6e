"""Compiles small cells and prints, as JSON, how far they are from the eager ones; run as a program by test_compile.py.

In a process of its own, since the shape checks that the tests put around every function cannot be compiled.
"""

from __future__ import annotations

import json

import torch

from equilibria import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    Unroll,
)
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.core.graph import leaves_below
from equilibria.layers import linear as product
from equilibria.lm.training import Trainer
from equilibria.stability import jacobian_penalty, spectral_radius
from small_experiment import corpus, experiment, trained_weights

TIGHT, SHORT = Stop(rtol=1e-10, max_evals=80), Stop(rtol=0, atol=0, max_evals=5)
RULES = {
    "Implicit": (Anderson(), Implicit(Anderson(), TIGHT), TIGHT),
    "Neumann": (Anderson(), Neumann(3), TIGHT),
    "Phantom": (Anderson(), Phantom(2, 0.7), TIGHT),
    "Shine": (Broyden(), Shine(), TIGHT),
    "Unroll": (Picard(), Unroll(), SHORT),
    "Unroll, checkpointed": (Picard(), Unroll(checkpoint=True), SHORT),
    "ReversibleGradient": (Reversible(0.5), ReversibleGradient(), Stop(rtol=0, atol=0, max_evals=7)),
    "NewtonKrylov": (NewtonKrylov(), Implicit(Anderson(), TIGHT), TIGHT),
}
SHAPES = {
    "transformer": TransformerConfig(width=8, heads=2, inner=12, memory=4, dropout=0.2),
    "decay": TransformerConfig(width=8, heads=2, inner=12, memory=4, positions="decay", longest=16),
    "rotary": TransformerConfig(width=8, heads=2, inner=12, memory=4, positions="rotary"),
    "trellis": TrellisConfig(width=4, hidden=3, outputs=4, dropout=0.2, weight_dropout=0.2),
    "scan": TrellisConfig(width=4, hidden=3, outputs=4, recurrence="scan"),
}


CASES = [(rule, shape) for rule in RULES for shape in SHAPES if rule == "Implicit" or shape in ("transformer", "scan")]


def layer_of(shape, rule):
    solver, gradient, stop = RULES[rule]
    torch.manual_seed(0)
    cell = SHAPES[shape].build().double()
    if shape in ("transformer", "decay", "rotary"):
        with torch.no_grad():
            cell.inject.direction.mul_(300)  # a contraction
    return Equilibrium(cell, solver, stop, gradient), torch.randn(2, 4, SHAPES[shape].width, dtype=torch.float64)


def gradients(layer, x, memory):
    layer.zero_grad()
    torch.manual_seed(1)  # the same masks
    x = x.clone().requires_grad_()
    out = layer(x, memory)
    out.z.square().sum().backward()
    return out, torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in layer.parameters() if p.grad is not None)])


def compare(shape, rule, **choices):
    """Of the compiled cell, against the eager one; a break of the graph is an error."""
    torch._dynamo.reset()
    layer, x = layer_of(shape, rule)
    memory = layer(x).memory
    eager, expected = gradients(layer, x, memory)
    layer.cell.compile(fullgraph=True, **choices)
    compiled, found = gradients(layer, x, memory)
    return {
        "z": float((compiled.z - eager.z).norm() / eager.z.norm()),
        "gradient": float((found - expected).norm() / expected.norm()),
        "evals": [compiled.solution.evals, eager.solution.evals],
    }


def leaves_of_products():
    """How many leaves the graph of the products has, eager (None: there is no such graph) and compiled."""
    torch._dynamo.reset()
    layer, x = layer_of("transformer", "Implicit")
    found = []
    for _ in range(2):
        out = layer(x)
        again = out.f.linearise(out.z.detach()).again
        found.append(again and len(list(leaves_below([again().value]))))
        layer.cell.compile(backend="aot_eager", fullgraph=True)
    return found


def eager_where_it_must_be():
    """The gradient of a Jacobian penalty, and spectral radii, of a compiled cell."""
    torch._dynamo.reset()
    layer, x = layer_of("transformer", "Implicit")
    layer.eval().cell.compile(backend="aot_eager", fullgraph=True)
    out = layer(x)
    jacobian_penalty(out.f, out.z.detach()).mean().backward()
    largest = max(float(p.grad.abs().max()) for p in layer.parameters() if p.grad is not None)
    return {"largest": largest, "radii": spectral_radius(out.f, out.z).tolist()}


def trained_with_it():
    """How far the weights are from those of a training without it; nothing may fall back to eager calls."""
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        trainer = Trainer(experiment(compile=compiled), None, corpus())
        assert (trainer.model.layer.cell._compiled_call_impl is not None) == compiled
        torch._dynamo.config.fail_on_recompile_limit_hit = compiled
        if compiled:
            trainer.model.layer.cell.compile(backend="aot_eager")
        trainer.fit()
        weights.append(torch.cat([weight.flatten() for weight in trained_weights(trainer).values()]))
    return float((weights[1] - weights[0]).norm() / weights[0].norm())


def products():
    """How far compiled products by oneDNN, and their gradients, are from those of PyTorch; None without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return None
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((3, 7, 5), (6, 5), (6,))]

    def function(x, weight, bias):
        return product.linear(product.linear(x, weight, bias).sin(), weight.t(), x).tanh()

    found = []
    for holds_back in (False, True):
        product.MKL_HOLDS_BACK, product.LEAST_MULTIPLICATIONS = holds_back, 1
        called = torch.compile(function, fullgraph=True) if holds_back else function
        value = called(*given)
        found.append(torch.cat([t.flatten() for t in (value, *torch.autograd.grad(value.square().sum(), given))]))
    return float((found[1] - found[0]).detach().norm() / found[0].detach().norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {f"{rule} / {shape}": compare(shape, rule, backend="aot_eager") for rule, shape in CASES}
    results["inductor"] = compare("transformer", "Implicit")
    found = {"cases": results, "leaves": leaves_of_products(), "eager": eager_where_it_must_be()}
    print(json.dumps(found | {"training": trained_with_it(), "product": products()}))  # noqa: T201
