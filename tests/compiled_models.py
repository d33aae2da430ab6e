"""Compiles whole models that contain solves, and prints, as JSON, what came out; run as a program by test_compile.py.

In a process of its own, since the shape checks that the tests put around every function cannot be compiled.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from equilibria import Anderson, Equilibrium, Implicit, Method, Stop, Unrolled, fixed_point, implicit, solve
from equilibria.cells import TransformerConfig
from equilibria.lm.model import Explicit, LanguageConfig
from equilibria.stability import check_independence, error_estimate, jacobian_penalty, spectral_radius

WIDTH, TIGHT = 12, Stop(rtol=1e-10, max_evals=80)
METHOD = Method(stop=TIGHT, gradient=Implicit(stop=TIGHT))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.inject = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.recurrent.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.inject(x))


class Around(nn.Module):
    """A user's model: layers of its own before and after what it is built around."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.3 / WIDTH**0.5)
        self.layer: Any = Equilibrium(Block(), stop=TIGHT, gradient=METHOD.gradient)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(torch.relu(self.before(x)))).square()

    def between(self, h: Tensor) -> Tensor:
        return self.layer(h).output


class Function(Around):
    """With a fixed point of a function that reads results of the compiled part before it."""

    def between(self, h: Tensor) -> Tensor:
        weight = 0.9 * self.weight
        start = torch.zeros_like(h)
        return fixed_point(lambda z: torch.tanh(z @ weight + h), start, stop=TIGHT, gradient=METHOD.gradient).z


class Checkpointed(Around):
    def between(self, h: Tensor) -> Tensor:
        return checkpoint(lambda h: self.layer(h).output, h, use_reentrant=False)


class Measured(Around):
    """With measures of f beside the output."""

    def between(self, h: Tensor) -> Tensor:
        out, generator = self.layer(h), torch.Generator().manual_seed(0)
        measures = jacobian_penalty(out.f, out.z.detach(), generator=generator).mean()
        measures = measures + spectral_radius(out.f, out.z, generator=generator, iterations=10).mean()
        measures = measures + error_estimate(out.f, out.z).mean()
        return out.output + measures + check_independence(out.f, out.z, generator=generator).leak.mean()


class Deep(Around):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Unrolled(Block(), depth=6)


class Language(nn.Module):
    """A language model in a user's model; around an equilibrium it has a memory, and starts from the last state."""

    def __init__(self, **choices: Any) -> None:
        super().__init__()
        cell = TransformerConfig(width=8, heads=2, inner=12, memory=4, dropout=0.2)
        method = {} if choices else {"method": METHOD}
        self.model, self.memory = LanguageConfig(cell=cell, dropout=0.1, **choices).build(11, **method), None
        with torch.no_grad():
            for own in self.model.layer.modules():
                if hasattr(own, "inject"):
                    own.inject.direction.mul_(10_000)  # a contraction

    def forward(self, x: Tensor) -> Tensor:
        tokens = (4 * x[:, :7]).long() % 11
        memory = self.memory if self.memory is not None and len(tokens) == len(self.memory.z) else None
        out = self.model(tokens[:, :-1], tokens[:, 1:], memory, **({} if memory is None else {"warm": True}))
        self.memory = out.memory if self.model.layer.__class__ is Equilibrium else None
        return out.nll.square()


def fresh(kind: Callable[[], nn.Module]) -> nn.Module:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    return kind().double()


def stepped(model: Any, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The value of the model and all its gradients as one vector."""
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.grad = None
    x = x.clone().requires_grad_()
    value = model(x)
    value.mean().backward()
    found = [t.grad for t in (x, *parameters) if t.grad is not None]
    return torch.cat([value.detach().flatten(), *(t.flatten() for t in found)])


def batch(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def followed(kind: Callable[[], nn.Module], sizes: Sequence[int] = (4, 4, 4, 6, 6, 5, 7), **choices: Any) -> Any:
    """The largest difference from the eager model in a number of steps, and the number of graphs after each."""
    eager = fresh(kind)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, **choices)
    differences, graphs = [], []
    for step, size in enumerate(sizes):
        x = batch(size, step)
        a, b = stepped(compiled, x, list(model.parameters())), stepped(eager, x, list(eager.parameters()))
        differences.append(far(a, b))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"difference": max(differences), "graphs": graphs}


def compared(function: Callable[..., Any], *arguments: Any, backend: str = "aot_eager") -> float:
    """How far a compiled function, which returns tensors, is from itself."""
    torch._dynamo.reset()
    torch.manual_seed(2)
    expected = function(*arguments)
    torch.manual_seed(2)
    found = torch.compile(function, backend=backend)(*arguments)
    together = [torch.cat([t.detach().flatten() for t in tensors]) for tensors in (found, expected)]
    return far(*together)


def whole_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(x).mean()
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def first_gradient(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return [*torch.autograd.grad(model(x).sum(), [x, *model.parameters()], allow_unused=True)[:1]]


def evaluated(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x)]


def by_solve(model: Any, x: Tensor) -> list[Tensor]:
    return [solve(lambda z: torch.tanh(z @ model.weight + x), torch.zeros_like(x), Anderson(), TIGHT).z]


def by_procedure(model: Any, x: Tensor) -> list[Tensor]:
    def f(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    @implicit(f, gradient=METHOD.gradient, stop=TIGHT)
    def iterated(x: Tensor, weight: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        while (f(z, x, weight) - z).norm() > 1e-11:
            z = f(z, x, weight)
        return z

    return [torch.autograd.grad(iterated(x, model.weight).sum(), model.weight)[0]]


def transformed(model: Any, x: Tensor) -> list[Tensor]:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        solution = fixed_point(
            lambda z, weight, x: torch.tanh(z @ weight + x), torch.zeros_like(x), weight, x, **vars(METHOD)
        )
        return solution.z.sum()

    weights = torch.stack([model.weight, 0.5 * model.weight]).detach()
    return [torch.func.grad(loss)(weights[0], x), torch.func.vmap(loss, (0, None))(weights, x)]


def second(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def calls_of_a_compiled_cell() -> list[int]:
    """How often the graphs of a compiled cell run inside a compiled model, and the evaluations and VJPs of a step."""
    model: Any = fresh(Around)
    calls = [0]

    def counting(graph: Any, _: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls[0] += 1
            return graph(*arguments)

        return run

    model.layer.cell.compile(backend=counting)
    seen = []
    model.layer.register_forward_hook(lambda *given: seen.append(given[-1].solution.evals))
    torch.compile(model, backend="eager")(batch(4)).mean().backward()
    return [calls[0], seen[0]]


def results() -> dict[str, Any]:
    kinds = {"layer": Around, "function": Function, "checkpoint": Checkpointed, "language": Language}
    steps = {f"{name} / aot_eager": followed(kind, backend="aot_eager") for name, kind in kinds.items()}
    steps["layer / eager"] = followed(Around, backend="eager")
    steps["layer / inductor"] = followed(Around, backend="inductor")
    steps["measured / aot_eager"] = followed(Measured, backend="aot_eager")
    whole = {"backend": "aot_eager", "fullgraph": True}
    steps["unrolled / fullgraph"] = followed(Deep, **whole)
    explicit = {f"explicit {memory} / fullgraph": Explicit(depth=4, memory=memory) for memory in ("last", "layers")}
    for name, choice in explicit.items():
        steps[name] = followed(lambda choice=choice: Language(explicit=choice), (4, 4, 4), **whole)
    model, x = fresh(Around), batch(4)
    functions = (whole_step, first_gradient, evaluated, by_solve, by_procedure, transformed)
    return {
        "steps": steps,
        "functions": {function.__name__: compared(function, model, x) for function in functions},
        "second": {
            "eager": far(second(torch.compile(model, backend="eager"), x), second(model, x)),
            "aot_eager": error_of(lambda: second(torch.compile(model, backend="aot_eager"), x)),
        },
        "fullgraph": [error_of(lambda k=k: torch.compile(fresh(k), fullgraph=True)(x)) for k in (Around, Function)],
        "cell": calls_of_a_compiled_cell(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    print(json.dumps(results()))  # noqa: T201
