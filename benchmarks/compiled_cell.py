"""f, its VJP and a training step of the trained `tiny`: what torch.compile of the cell changes, on one core.

taskset -c 1 python benchmarks/compiled_cell.py [--rounds N]   prints the table, writes results/compiled_cell.json and
                                                               its part of docs/howto/speed.md

Two sizes: the batch of the recipe, 8 segments of 64 characters, and 1 segment of 4, in which the calls of operators
take more time than what they compute. "VJP" is one of those of the adjoint solve; "all gradients" is the VJP that also
computes those of parameters and input. The last rows are for a ReLU between two products: a compiled one keeps a mask
of booleans for the backward pass, which compiled code for a CPU reads and writes slowly. Rounds are interleaved, in
random order; times are processor times: the median, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
from machine import publish
from torch import Tensor

import equilibria
from equilibria import Equilibrium, Method
from equilibria.layers.cell import Cell, CellMap
from equilibria.lm.corpora import Segments

Calls = dict[str, Callable[[], Any]]


def given(samples: int, length: int) -> tuple[Cell, Method, Tensor, Any]:
    """The trained cell, its method, and the embedding and the memory of held-out text."""
    loaded = equilibria.load("tiny")
    stream, model = Segments(loaded.stream("valid"), batch_size=samples, length=length), loaded.model.train()
    with torch.no_grad():
        memory = model(stream.at(20).tokens, stream.at(20).targets).memory
        x = model.embedding(stream.at(21).tokens)
    return model.layer.cell, loaded.experiment.stages[-1].method, x.requires_grad_(), memory


def calls(cell: Cell, method: Method, x: Tensor, memory: Any) -> Calls:
    """What is timed, by name."""
    f = CellMap(cell, cell.prepare(x, memory))
    layer = Equilibrium(cell, method.solver, method.stop, method.gradient, on_failure="ignore")
    z = layer(x, memory).z.detach()
    g, wanted = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), [x, *cell.parameters()]
    point = f.linearise(z)
    products = point.for_products()

    def without_graph() -> None:
        with torch.no_grad():
            f(z)

    def gradients(value: Any, *, retain: bool) -> None:
        torch.autograd.grad(value, wanted, g, retain_graph=retain, allow_unused=True)

    return {
        "f": without_graph,
        "f, with graph": lambda: f.linearise(z),
        "VJP": lambda: products.vjp(g),
        "all gradients": lambda: gradients(point.value, retain=True),
        "training step": lambda: gradients(layer(x, memory).z, retain=False),
    }


def relus() -> tuple[Calls, Calls]:
    """A ReLU between two products of `tiny`'s size, compiled and eager."""
    generator = torch.Generator().manual_seed(0)
    shapes = (512, 128), (512, 128), (128, 512), (512, 128)
    x, inner, outer, g = (torch.randn(shape, generator=generator) for shape in shapes)
    x.requires_grad_()

    def function(x: Tensor) -> Tensor:
        return torch.relu_(x @ inner.t()) @ outer.t()

    def of(function: Callable[[Tensor], Tensor]) -> Calls:
        value = function(x)

        def vjp() -> None:
            torch.autograd.grad(value, x, g, retain_graph=True)

        return {"with graph": lambda: function(x), "VJP": vjp}

    return of(torch.compile(function)), of(function)


def milliseconds(call: Callable[[], Any], *, repeat: int) -> float:
    begin = time.process_time()
    for _ in range(repeat):
        call()
    return 1e3 * (time.process_time() - begin) / repeat


def compared(ours: Calls, others: Calls, rounds: int) -> dict[str, dict[str, float]]:
    """By name: the median times of both, and the median of their ratios."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    for count in range(rounds + 3):
        for name in random.sample(list(ours), len(ours)):
            pair = [ours[name], others[name]]
            order = random.sample((0, 1), 2)
            found = {which: milliseconds(pair[which], repeat=1 if "step" in name else 5) for which in order}
            if count >= 3:  # the first ones compile
                times[name].append((found[0], found[1]))
    return {
        name: {
            "eager": statistics.median(b for _, b in pairs),
            "compiled": statistics.median(a for a, _ in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }
        for name, pairs in times.items()
    }


def of_size(samples: int, length: int, rounds: int) -> dict[str, Any]:
    """One size: the compiled cell beside the same one that is not compiled."""
    torch._dynamo.reset()
    cell, *others = given(samples, length)
    eager = copy.deepcopy(cell)
    cell.compile()
    times = compared(calls(cell, *others), calls(eager, *others), rounds)
    return {"samples": samples, "length": length, "times": times}


def text(rows: dict[str, Any]) -> str:
    """The table of the documentation."""
    named = [(f"{row['samples']} × {row['length']}", row["times"]) for row in rows["sizes"]]
    lines = ["| segments | | eager | compiled | compiled / eager |", "|---|---|---:|---:|---:|"]
    for what, times in [*named, ("ReLU between two products", rows["relu"])]:
        for name, found in times.items():
            cells = f"{found['eager']:.2f} ms | {found['compiled']:.2f} ms | {found['ratio']:.2f}"
            lines.append(f"| {what} | {name} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30, help="number of rounds that are compared")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    functorch.donated_buffer = False  # backward passes are repeated
    rows: dict[str, Any] = {"sizes": [of_size(8, 64, rounds), of_size(1, 4, rounds)]}
    rows["relu"] = compared(*relus(), rounds)
    publish("compiled_cell", rows, text(rows), page="howto/speed")


if __name__ == "__main__":
    main()
