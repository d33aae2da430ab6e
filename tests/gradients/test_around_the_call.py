"""What happens around a call, such as a change between the passes, gives the right gradient, an error or a warning."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from equilibria import (
    ConvergenceWarning,
    Equilibrium,
    Implicit,
    Method,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Stack,
    Stop,
    Unroll,
    Unrolled,
    fixed_point,
    implicit,
)
from equilibria.core.maps import as_map
from equilibria.stability import error_estimate

TIGHT = Stop(rtol=1e-12, max_evals=60)
DEEP = Stop(rtol=0, max_evals=25, best=False)
RULES = {
    "implicit": Method(gradient=Implicit(stop=TIGHT), stop=TIGHT),
    "neumann": Method(gradient=Neumann(30), stop=TIGHT),
    "phantom": Method(gradient=Phantom(30), stop=TIGHT),
    "unroll": Method(Picard(), DEEP, Unroll()),
    "checkpointed": Method(Picard(), DEEP, Unroll(checkpoint=True)),
    "reversible": Method(Reversible(0.8), Stop(rtol=1e-9, max_evals=31), ReversibleGradient(), on_failure="ignore"),
}
REVERSIBLE = RULES["reversible"]
CONTRACTIVE = 0.15


def settings(method):
    return {"solver": method.solver, "stop": method.stop, "gradient": method.gradient, "on_failure": method.on_failure}


def run(method, f, z0):
    return method.run(as_map(f), z0)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def gradients(z, tensors, **options):
    return torch.autograd.grad(z.square().sum(), tensors, **options)


def by_unrolling(f, tensors, z):
    for _ in range(40):
        z = f(z)
    return gradients(z, tensors)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


class Tanh(nn.Module):
    """tanh(W z + b + x)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        with torch.no_grad():
            self.linear.weight.copy_(CONTRACTIVE * draw(4, 4))

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_solve_without_graph_leaves_nothing_in_the_cache_of_parametrizations(rule, backward_inside):
    module, x = Tanh(), draw(3, 4)
    parametrize.register_parametrization(module.linear, "weight", Halved())
    tensors = list(module.parameters())
    expected = by_unrolling(lambda z: module(z, x), tensors, torch.zeros_like(x))
    layer = Equilibrium(module, **settings(RULES[rule]))
    with parametrize.cached():
        z = layer(x).z
        found = gradients(z, tensors) if backward_inside else None
    assert_equal(found or gradients(z, tensors), expected)


def test_a_cached_parametrization_is_computed_twice_in_a_solve():
    """Once without and once with a graph, as docs/howto/converge.md says; without the cache in each evaluation."""

    class Counted(Halved):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return super().forward(weight)

    module, x, counted = Tanh(), draw(3, 4), Counted()
    parametrize.register_parametrization(module.linear, "weight", counted)
    layer, calls = Equilibrium(module), []
    for context in (contextlib.nullcontext, parametrize.cached):
        counted.calls = 0
        with context():
            evals = layer(x).solution.evals
        calls.append(counted.calls)
    assert calls == [evals, 2]


@pytest.mark.parametrize("way", ["decorator", "estimate", "transform"])
def test_other_evaluations_leave_nothing_in_that_cache_either(way):
    module, x = Tanh(), draw(3, 4)
    parametrize.register_parametrization(module.linear, "weight", Halved())
    names, tensors = zip(*module.named_parameters(), strict=True)
    start = torch.zeros_like(x)
    expected = by_unrolling(lambda z: module(z, x), tensors, start)

    def solved(*tensors):
        weights = dict(zip(names, tensors, strict=True))
        f = lambda z, x, *tensors: torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (z, x))  # noqa: E731
        return fixed_point(f, start, x, *weights.values(), **settings(RULES["implicit"])).z.square().sum()

    with parametrize.cached():
        if way == "transform":
            found = torch.func.grad(solved, argnums=tuple(range(len(names))))(*tensors)
        elif way == "decorator":
            f = implicit(module, gradient=Implicit(stop=TIGHT))(
                lambda x: run(RULES["unroll"], lambda z: module(z, x), start).z
            )
            found = gradients(f(x), tensors)
        else:
            error_estimate(lambda z: module(z, x), start)
            found = by_unrolling(lambda z: module(z, x), tensors, start)
    assert_equal(found, expected)


class Product(torch.autograd.Function):
    """z @ weight, which hides the weight from function modes."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        return z @ weight

    @staticmethod
    def backward(ctx, *cotangents):
        z, weight = ctx.saved_tensors
        return cotangents[0] @ weight.T, z.T @ cotangents[0]


@pytest.mark.parametrize("kind", ["leaf", "parameter", "computed"])
def test_the_reversible_gradient_refuses_tensors_that_it_cannot_see(kind):
    leaf, x = (CONTRACTIVE * draw(4, 4)).requires_grad_(), draw(3, 4).requires_grad_()
    weight = {"leaf": leaf, "parameter": nn.Parameter(leaf.detach()), "computed": 1.0 * leaf}[kind]
    z = run(REVERSIBLE, lambda z: torch.tanh(Product.apply(z, weight) + x), torch.zeros(3, 4).double()).z
    with pytest.raises(RuntimeError, match=r"cannot see a tensor of shape \(4, 4\)"):
        gradients(z, [x])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated")
def test_the_reversible_gradient_refuses_to_return_a_constant_that_is_none():
    weight, x = (CONTRACTIVE * draw(4, 4)).requires_grad_(), draw(3, 4)
    hidden: Any = torch.jit.trace(lambda z, w: torch.tanh(z @ w + x), (torch.zeros(3, 4).double(), weight.detach()))
    with pytest.raises(RuntimeError, match=r"cannot see a tensor of shape \(4, 4\)"):
        run(REVERSIBLE, lambda z: hidden(z, weight), torch.zeros(3, 4).double())
    constant = weight.detach()
    frozen = run(REVERSIBLE, lambda z: torch.tanh(z @ constant + x), torch.zeros(3, 4).double())
    assert not frozen.z.requires_grad


def test_leaves_that_f_makes_for_itself_are_no_constants():
    weight, x = (CONTRACTIVE * draw(4, 4)).requires_grad_(), draw(3, 4).requires_grad_()

    def f(z):
        own = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        return torch.tanh(z @ weight + x + Product.apply(own[None], torch.eye(4).double()))

    found = gradients(run(REVERSIBLE, f, torch.zeros(3, 4).double()).z, [weight, x])
    assert_equal(found, by_unrolling(f, [weight, x], torch.zeros(3, 4).double()))


@pytest.mark.parametrize("f", [lambda z, c: c, lambda z, c: (c, 0.3 * torch.sin(z[1]) + z[0])], ids=["alone", "leaf"])
def test_the_reversible_gradient_reaches_a_tensor_that_f_returns(f):
    c = draw(3, 4).requires_grad_()
    start = f(0.0, c) if f(torch.zeros(2), c) is c else (torch.zeros(3, 4).double(), torch.zeros(3, 4).double())
    start = torch.zeros(3, 4).double() if isinstance(start, torch.Tensor) else start

    def last(z):
        return (z if isinstance(z, torch.Tensor) else z[1]).square().sum()

    z = start
    for _ in range(40):
        z = f(z, c)
    expected = torch.autograd.grad(last(z), c)
    assert_equal(torch.autograd.grad(last(run(REVERSIBLE, lambda z: f(z, c), start).z), c), expected)


@pytest.mark.slow
def test_a_reversible_solve_inside_a_reversible_solve():
    w, v = ((CONTRACTIVE * draw(4, size)[:, :4]).requires_grad_() for size in (4, 5))
    x = draw(3, 4).requires_grad_()

    def inner(z, rule):
        return run(rule, lambda y: torch.tanh(y @ v + z @ w + x), torch.zeros_like(z)).z

    start, short = torch.zeros(3, 4).double(), dataclasses.replace(REVERSIBLE, stop=Stop(rtol=1e-9, max_evals=27))
    expected = by_unrolling(lambda z: 0.5 * inner(z, RULES["unroll"]), [w, v, x], start)
    found = run(short, lambda z: 0.5 * inner(z, short), start).z
    assert_equal(gradients(found, [w, v, x]), expected)


EXPLICIT = {
    "equilibrium": lambda module: Equilibrium(module, **settings(RULES["checkpointed"])),
    "unrolled": lambda module: Unrolled(module, 25, checkpoint=True),
    "stack": lambda module: Stack([module] * 25, checkpoint=True),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch, while it compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", EXPLICIT)
def test_what_is_evaluated_again_has_the_weights_of_functional_call(kind, compiled):
    module, x = Tanh(), draw(3, 4)
    layer = EXPLICIT[kind](module)
    if compiled and kind != "stack":
        layer.cell.compile(backend="eager")
    weights = {name: (0.5 * weight.detach() + 0.1).requires_grad_() for name, weight in layer.named_parameters()}
    w, b = weights.values()
    expected = by_unrolling(lambda z: torch.tanh(z @ w.T + b + x), [w, b], torch.zeros_like(x))
    assert_equal(gradients(torch.func.functional_call(layer, weights, (x,)).z, [w, b]), expected)


@pytest.mark.parametrize("kind", ["unrolled", "stack"])
def test_buffers_that_f_replaces_stay_replaced_under_a_checkpoint(kind):
    class Counting(Tanh):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, z, x):
            self.count = self.count + 1
            return super().forward(z, x)

    module = Counting()
    EXPLICIT[kind](module)(draw(3, 4))
    assert module.count == 25


CHANGES = {
    "input": lambda parts: parts["x"].add_(1.0),
    "bias": lambda parts: parts["b"].add_(1.0),
    "number": lambda parts: parts.update(k=2.0),
    "weight": lambda parts: parts["w"].data.mul_(0.5),
}


def changeable() -> Any:
    """What f reads in the tests of such changes."""
    return {
        "w": (CONTRACTIVE * draw(4, 4)).requires_grad_(),
        "b": draw(4).requires_grad_(),
        "x": draw(3, 4),
        "k": 1.0,
    }


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_a_backward_pass_that_evaluates_f_again_is_heard(change):
    parts = changeable()

    def f(z):
        return torch.tanh(z @ parts["w"] + parts["b"] + parts["k"] * parts["x"])

    z = fixed_point(f, torch.zeros(3, 4).double()).z
    gradients(z, [parts["b"]], create_graph=True)
    with torch.no_grad():
        CHANGES[change](parts)
    with pytest.warns(ConvergenceWarning, match=r"create_graph=True: f was evaluated once more .* was changed between"):
        gradients(z, [parts["b"]], create_graph=True)


@pytest.mark.parametrize("stop", [Stop(), Stop(rtol=0, max_evals=10, best=False)], ids=str)
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_a_checkpoint_evaluates_f_again_is_heard(change, coupled, stop):
    parts = changeable()

    def f(z):
        value = torch.tanh(z["a"] @ parts["w"] + parts["b"] + parts["k"] * parts["x"])
        return {"a": value, "b": z["a"].sum(dim=1)}

    z0 = {"a": torch.zeros(3, 4).double(), "b": torch.zeros(3).double()}
    method = Method(Picard(), stop, Unroll(checkpoint=True), coupled=coupled)
    samples = "1 of 1" if coupled else "3 of 3"
    heard = pytest.warns(ConvergenceWarning, match=f"of a checkpoint: f was .* changed in {samples} samples")
    for on_failure, changed in (("warn", False), ("ignore", True), ("warn", True)):
        z = run(dataclasses.replace(method, on_failure=on_failure), f, z0)
        if changed:
            with torch.no_grad():
                CHANGES[change](parts)
        with heard if changed and on_failure == "warn" else contextlib.nullcontext():
            gradients(z.z["b"], [parts["b"]])
        parts["k"] = 1.0


def test_an_error_in_a_backward_pass_has_no_advice_about_the_start():
    w = (CONTRACTIVE * draw(4, 4)).requires_grad_()
    z = fixed_point(lambda z: torch.tanh(z @ w + 1), torch.zeros(3, 4).double()).z
    with torch.no_grad():
        w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        z.sum().backward()
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("inside", [True, False])
def test_the_rounding_of_autocast_is_no_change_of_f(inside):
    module, x = Tanh().float(), draw(3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = Equilibrium(module, stop=Stop(rtol=2e-2), gradient=Implicit(stop=Stop(rtol=2e-3)))(x).z
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        gradients(z, list(module.parameters()))
