"""Maps that mix the samples of a batch: right with ``coupled=True``, and detected without it."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch.nn import functional

from equilibria import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Equilibrium,
    Implicit,
    Method,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    Unroll,
    fixed_point,
    solve,
)
from equilibria.core.maps import as_map
from equilibria.stability import check_gradient

TIGHT = Stop(rtol=1e-12, max_evals=400)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph(nodes: int = 10):
    """A chain whose nodes are the batch axis: the map, its start and the tensors that it reads."""
    adjacency = torch.diag(torch.ones(nodes - 1, dtype=torch.float64), 1)
    adjacency = adjacency + adjacency.mT
    adjacency = adjacency / adjacency.sum(dim=1, keepdim=True)
    weight, x = (0.3 * numbers(5, 5)).requires_grad_(), numbers(nodes, 5, seed=1).requires_grad_()
    return lambda z: torch.tanh(adjacency @ z @ weight + x), torch.zeros(nodes, 5).double(), [weight, x]


def attention():
    """Softmax attention over the batch."""
    weight, x = (0.25 * numbers(4, 4)).requires_grad_(), numbers(6, 4, seed=1).requires_grad_()
    return (
        lambda z: torch.tanh(torch.softmax(z @ z.mT, dim=1) @ z @ weight + x),
        torch.zeros(6, 4).double(),
        [weight, x],
    )


def batch_norm():
    """Batch norm with the statistics of the batch."""
    weight, x = (0.4 * numbers(4, 4)).requires_grad_(), numbers(6, 4, seed=1).requires_grad_()
    return (
        lambda z: 0.5 * functional.batch_norm(z @ weight + x, None, None, training=True),
        torch.zeros(6, 4).double(),
        [weight, x],
    )


MAPS = {"graph": graph, "attention": attention, "batch norm": batch_norm}
METHODS = {
    "Implicit, Anderson": (Anderson(), Implicit(Anderson(), TIGHT)),
    "Implicit, Broyden": (Broyden(rank=50), Implicit(Broyden(rank=50), TIGHT)),
    "Implicit, NewtonKrylov": (NewtonKrylov(), Implicit(NewtonKrylov(), TIGHT)),
    "Neumann": (Anderson(), Neumann(200)),
    "Unroll": (Picard(), Unroll()),
}


def of_labels(f, z0, tensors, method: Method, rows: slice):
    """The gradients of a loss on some of the samples, whose cotangents differ in size; most are 0."""
    z = method.run(as_map(f), z0).z
    return torch.autograd.grad((z[rows] * numbers(*z[rows].shape, seed=7)).sum(), tensors)


@functools.cache
def unrolled(which):
    """The gradients of the loss on the first sample, and on all of them, through plain iteration without tolerance."""
    exact = Method(Picard(), Stop(rtol=0, max_evals=300, best=False), Unroll(), coupled=True)
    return [of_labels(*MAPS[which](), exact, rows) for rows in (slice(0, 1), slice(None))]


def far(found, exact) -> float:
    parts = [torch.cat([g.flatten() for g in side]) for side in (found, exact)]
    return float((parts[0] - parts[1]).norm() / parts[1].norm())


@pytest.mark.parametrize("which", MAPS)
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_coupled_samples_is_exact(which, name):
    f, z0, tensors = MAPS[which]()
    solver, rule = METHODS[name]
    stop = Stop(rtol=0, max_evals=300, best=False) if isinstance(rule, Unroll) else TIGHT
    method = Method(solver, stop, rule, coupled=True, on_failure="raise")
    for rows, exact in zip((slice(0, 1), slice(None)), unrolled(which), strict=True):
        assert far(of_labels(f, z0, tensors, method, rows), exact) < 1e-9


@pytest.mark.parametrize("which", MAPS)
def test_coupling_that_is_not_said_is_noticed_in_the_backward_pass(which):
    f, z0, _ = MAPS[which]()
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        z = fixed_point(f, z0, stop=TIGHT, gradient=Implicit(Anderson(), TIGHT)).z
    with pytest.warns(ConvergenceWarning, match="adjoint solve.*pass coupled=True"):
        (z[0] * numbers(z.shape[1], seed=7)).sum().backward()
    strict = Method(Anderson(), TIGHT, Implicit(Anderson(), TIGHT), on_failure="raise")

    def backward():
        strict.run(as_map(f), z0).z[0].square().sum().backward()

    with pytest.raises(ConvergenceError, match="pass coupled=True"):
        backward()


def test_a_sample_that_was_frozen_too_early_is_noticed():
    """The first sample starts at its own solution, and changes of the other samples never reach it."""
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    mixing = torch.tensor([[0.2, 0.3, 0.3], [0.1, 0.2, 0.2], [0.3, 0.1, 0.1]], dtype=torch.float64)

    def f(z):
        return mixing @ z + x

    with pytest.warns(ConvergenceWarning, match="changed in 2 of 3 samples.*pass coupled=True"):
        fixed_point(f, torch.zeros(3, 1).double(), stop=TIGHT, gradient=Phantom())
    with pytest.warns(ConvergenceWarning, match="pass coupled=True"):
        wrong = fixed_point(f, torch.zeros(3, 1).double(), stop=TIGHT).z
    exact = torch.linalg.solve(torch.eye(3).double() - mixing, x)
    assert float((wrong - exact).detach().abs().max()) > 0.1
    right = fixed_point(f, torch.zeros(3, 1).double(), stop=TIGHT, coupled=True)
    assert right.status.shape == right.residual.shape == right.steps.shape == (1,)
    torch.testing.assert_close(right.z, exact, rtol=1e-10, atol=1e-10)


def test_independent_samples_are_silent():
    x = numbers(5, 4, seed=3).requires_grad_()
    weight = (0.3 * numbers(4, 4)).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, stop in (
            (torch.float64, TIGHT),
            (torch.float32, Stop(rtol=1e-5)),
            (torch.bfloat16, Stop(rtol=2e-2)),
        ):
            w, y = weight.detach().to(dtype).requires_grad_(), x.detach().to(dtype)
            z = fixed_point(
                lambda z, w, y: torch.tanh(z @ w + y),
                torch.zeros_like(y),
                w,
                y,
                stop=stop,
                gradient=Implicit(Anderson(), stop),
            ).z
            (z * torch.tensor([1.0, 1e-6, 0.0, 1e6, 1.0], dtype=dtype)[:, None]).sum().backward()


@pytest.mark.parametrize(
    "stop",
    [Stop(rtol=3e-2, norm="max"), Stop(rtol=3e-2, norm=lambda z: z.abs().sum(dim=1)), Stop(rtol=3e-2)],
    ids=["max", "function", "l2"],
)
def test_phantom_compares_residuals_in_the_norm_of_the_solve(stop):
    """It measured its first tracked step by the Euclidean norm, and took the difference of two norms for coupling."""
    x, weight = numbers(5, 4, seed=3), (0.2 * numbers(4, 4)).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed_point(
            lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), solver=Picard(), stop=stop, gradient=Phantom(2)
        )


def test_phantom_compares_the_residuals_of_leaves():
    x, weight = numbers(5, 4, seed=3), (0.2 * numbers(4, 4)).requires_grad_()

    def f(z):
        return {"a": torch.tanh(z["a"] @ weight + x), "b": 1e-3 * torch.tanh(z["a"] + z["b"])}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stop, z0 = Stop(rtol=3e-2, per_leaf=True), {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        fixed_point(f, z0, solver=Picard(), stop=stop, gradient=Phantom(2))


def test_randomness_inside_f_is_noticed():
    weight = (0.3 * numbers(4, 4)).requires_grad_()
    x = numbers(5, 4, seed=3)

    def f(z):
        return functional.dropout(torch.tanh(z @ weight + x), 0.1)

    for coupled in (False, True):
        with pytest.warns(ConvergenceWarning, match="same bits twice"):
            fixed_point(f, torch.zeros_like(x), coupled=coupled, stop=Stop(rtol=0.5))


def test_an_adjoint_solve_without_budget_is_heard():
    weight = (0.5 * numbers(4, 4)).requires_grad_()
    rule = Implicit(Picard(), Stop(rtol=1e-12, max_evals=3))
    x = numbers(5, 4, seed=3)
    z = fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), stop=TIGHT, gradient=rule).z
    with pytest.warns(ConvergenceWarning, match=r"adjoint solve of Implicit\(\): 0 of 5 samples"):
        z.sum().backward()


def test_a_stop_without_tolerance_never_warns():
    x = numbers(5, 4, seed=3).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stop = Stop(rtol=0, max_evals=3)
        rule = Implicit(Picard(), stop)
        fixed_point(
            lambda z: 3 * z + x, torch.zeros_like(x), solver=Picard(), stop=stop, gradient=rule
        ).z.sum().backward()


def test_the_warning_names_the_line_that_called():
    x = numbers(5, 4, seed=3)
    with pytest.warns(ConvergenceWarning) as heard:
        fixed_point(lambda z: 3 * z + x, torch.zeros_like(x), solver=Picard(), stop=Stop(max_evals=4))
    assert heard[0].filename == __file__


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden(), NewtonKrylov(), Reversible(0.8)], ids=lambda s: type(s).__name__
)
def test_leaves_of_coupled_states_have_any_shape(solver):
    """A number, a vector and an image that is stored channels last, found together."""
    c = numbers(2, 3, 4, 5, seed=2).contiguous(memory_format=torch.channels_last)

    def f(z):
        return {
            "number": 0.3 * z["image"].mean() + 1,
            "vector": 0.5 * z["number"] + 0.1 * z["vector"],
            "image": torch.tanh(0.2 * z["image"] + z["vector"].sum() * c),
        }

    z0 = {"number": torch.zeros(()).double(), "vector": torch.zeros(3).double(), "image": torch.zeros_like(c)}
    with torch.no_grad():
        found = solve(f, z0, solver, Stop(rtol=1e-11, max_evals=300), coupled=True)
        for leaf, again in zip(found.z.values(), f(found.z).values(), strict=True):
            torch.testing.assert_close(leaf, again)
    assert found.converged.tolist() == [True]
    assert found.z["number"].shape == ()
    assert found.z["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("solver", "rule"),
    [
        (Anderson(), Implicit(Anderson(), TIGHT)),
        (Picard(), Unroll()),
        (Anderson(), Phantom(60)),
        (Anderson(), Neumann(100)),
        (Broyden(), Shine()),
        (Reversible(0.5), ReversibleGradient()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_rules_take_a_tree_of_coupled_leaves(solver, rule):
    weight, bias = (0.2 * numbers(4, 4)).requires_grad_(), numbers(3, 4, seed=4).requires_grad_()

    def f(z):
        return {"scale": 0.2 * z["nodes"].mean() + 0.3, "nodes": torch.tanh(z["scale"] * (z["nodes"] @ weight) + bias)}

    z0 = {"scale": torch.zeros(()).double(), "nodes": torch.zeros(3, 4).double()}
    stop = Stop(rtol=1e-12, max_evals=61)
    check = check_gradient(f, z0, [weight, bias], solver=solver, stop=stop, gradient=rule, coupled=True, steps=80)
    assert check.relative_error < {Shine: 0.2, ReversibleGradient: 1e-6}.get(type(rule), 1e-8)


def test_a_nan_of_coupled_samples_is_the_status_of_all():
    f, z0, (_, x) = graph()
    x.data[3] = torch.nan
    with pytest.warns(ConvergenceWarning, match="NaN or infinite"):
        found = fixed_point(f, z0, coupled=True)
    assert found.status.tolist() == [2]


class Chain(torch.nn.Module):
    """The label of a chain, which only its first node carries, with the nodes as the batch axis."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(width, width, bias=False)
        torch.nn.init.orthogonal_(self.mix.weight, gain=0.95)

    def forward(self, z, x, adjacency):
        return torch.tanh(self.mix(adjacency @ z) + x)


def test_a_layer_takes_its_coupling_from_the_method():
    adjacency = torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
    adjacency = adjacency / adjacency.sum(dim=1, keepdim=True)
    layer = Equilibrium(Chain(), coupled=True)
    out = layer(torch.randn(5, 16), adjacency)
    assert out.solution is not None
    assert out.solution.converged.shape == (1,)
    assert "coupled=True" in repr(layer)


def test_an_empty_batch_gives_an_empty_solution():
    weight = torch.eye(4, requires_grad=True)
    found = fixed_point(lambda z: torch.tanh(z @ weight), torch.zeros(0, 4))
    assert found.z.shape == (0, 4)
    assert found.status.shape == found.residual.shape == found.steps.shape == (0,)
    assert "no samples" in str(found)
    found.z.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("stop", [Stop(max_evals=21), Stop(rtol=0, max_evals=4, best=False)], ids=str)
@pytest.mark.parametrize(
    ("solver", "rule"),
    [
        (Anderson(), Implicit()),
        (Picard(), Neumann(5)),
        (Picard(), Phantom(5)),
        (Broyden(), Shine()),
        (Picard(), Unroll()),
        (Anderson(), Unroll()),
        (Broyden(), Unroll(checkpoint=True)),
        (NewtonKrylov(), Unroll()),
        (Reversible(0.5), ReversibleGradient()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_an_empty_state_has_a_gradient_of_zeros_by_every_rule(solver, rule, stop, coupled):
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fixed_point(
            lambda z: torch.tanh(weight * z + 1),
            torch.zeros(0, 3, dtype=torch.float64),
            solver=solver,
            stop=stop,
            gradient=rule,
            coupled=coupled,
        )
        found.z.sum().backward()
    assert found.z.shape == (0, 3)
    assert weight.grad == 0


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), NewtonKrylov(), Picard(), Reversible()], ids=str)
@pytest.mark.parametrize("stop", [Stop(), Stop(norm="max"), Stop(per_leaf=True, norm="max"), Stop(rtol=0)], ids=str)
@pytest.mark.parametrize("rows", [0, 3])
def test_leaves_without_numbers_are_solved(solver, stop, rows):
    """A graph without edges, and one without nodes."""
    bias, shape = torch.ones(2, dtype=torch.float64, requires_grad=True), (rows, 2)
    z0 = {"nodes": torch.zeros(shape, dtype=torch.float64), "edges": torch.zeros(0, 5, dtype=torch.float64)}
    found = fixed_point(
        lambda z: {"nodes": 0.5 * z["nodes"] + bias, "edges": z["edges"].sin()},
        z0,
        solver=solver,
        stop=stop,
        gradient=Implicit(solver, stop),
        coupled=True,
    )
    assert found.z["nodes"].shape == shape
    assert found.z["edges"].shape == (0, 5)
    assert found.converged.all() or stop.rtol == 0
    found.z["nodes"].sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2 * rows), rtol=2e-3, atol=0)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=lambda s: type(s).__name__)
def test_small_states_are_not_converged_by_their_size(solver):
    x = 1e-8 * numbers(3, 4)
    found = fixed_point(lambda z: 0.9 * z + x, torch.zeros_like(x), solver=solver, stop=Stop(max_evals=200))
    torch.testing.assert_close(found.z, 10 * x, rtol=2e-2, atol=0)
    assert found.converged.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_that_is_zero_is_reached(dtype):
    found = fixed_point(lambda z: 0.5 * z, torch.ones(3, 4, dtype=dtype), solver=Picard(), stop=Stop(max_evals=100))
    assert found.converged.all()
    assert float(found.z.abs().max()) <= 20 * torch.finfo(dtype).eps


def test_iterates_on_the_way_are_kept():
    x = numbers(2, 3)
    found = fixed_point(
        lambda z: 0.5 * z + x, torch.zeros_like(x), solver=Picard(), stop=Stop(rtol=1e-3), keep=(2, 5, 99)
    )
    torch.testing.assert_close(found.iterates[0], 1.5 * x)
    torch.testing.assert_close(found.iterates[1], (2 - 2**-4) * x)
    assert len(found.iterates) == 3
    with pytest.raises(ValueError, match="increasing"):
        Method(keep=(5, 2))


@pytest.mark.parametrize("how", ["backward", "inputs", "grad"])
def test_samples_coupled_by_f_are_noticed_in_whatever_way_the_backward_pass_is_asked_for(how):
    """``torch.autograd.grad`` goes to the named tensors only, where Jᵀu does not arrive by itself."""
    torch.manual_seed(0)
    mix, weight = torch.softmax(torch.randn(6, 6), 1), (0.3 * torch.randn(8, 8)).requires_grad_()
    x, stop = torch.randn(6, 8), Stop(rtol=1e-2, max_evals=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        rule = Implicit(stop=stop)
        z = fixed_point(lambda z: torch.tanh(mix @ z @ weight + x), torch.zeros(6, 8), stop=stop, gradient=rule).z
    loss = z.square().sum()
    ways = {"backward": lambda: loss.backward(), "inputs": lambda: loss.backward(inputs=[weight])}
    ways["grad"] = lambda: torch.autograd.grad(loss, weight)
    with pytest.warns(ConvergenceWarning, match=r"adjoint solve.*its value has changed"):
        ways[how]()
