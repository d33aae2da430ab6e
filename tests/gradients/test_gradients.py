"""Properties of single rules beyond the laws of the suite, and their equality in common limits."""

import contextlib
from typing import NamedTuple

import pytest
import torch

from equilibria import (
    AffineMap,
    Anderson,
    Broyden,
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
from equilibria.core.solve import solve_without_graph
from equilibria.stability import spectral_radius
from equilibria.testing.problems import tanh_map


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


TIGHT = Stop(rtol=1e-12, atol=1e-13, max_evals=300)


def run(rule, f, z0, solver, stop):
    return Method(solver, stop, rule, on_failure="ignore").run(as_map(f), z0)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), NewtonKrylov()], ids=lambda s: type(s).__name__)
def test_implicit_passes_gradcheck_beyond_contraction(solver):
    weight, x, f = tanh_map(n=2, batch=1, gain=1.0)  # each number costs solves
    with torch.no_grad():
        weight.mul_(1.3 / torch.linalg.eigvals(weight).abs().max())
    x.data.mul_(0.05)  # near the origin J is W itself

    def z_of(weight, x):
        def f(z):
            return torch.tanh(z @ weight.mT + x)

        solution = fixed_point(f, torch.zeros_like(x), solver=solver, stop=TIGHT, gradient=Implicit(solver, TIGHT))
        assert solution.converged.all()
        return solution.z

    assert (spectral_radius(f, z_of(weight, x)) > 1).all()
    assert torch.autograd.gradcheck(z_of, (weight, x))


def gradients(rule, solver, stop, f, x, tensors):
    z = run(rule, f, torch.zeros_like(x), solver, stop).z
    return torch.cat([g.flatten() for g in torch.autograd.grad((z * z.cos()).sum(), tensors)])


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_common_limits():
    weight, x, f = tanh_map()
    exact = gradients(Implicit(Broyden(), TIGHT), Anderson(), TIGHT, f, x, [weight, x])
    jfb = gradients(Neumann(0), Anderson(), TIGHT, f, x, [weight, x])
    errors = [relative(gradients(Neumann(k), Anderson(), TIGHT, f, x, [weight, x]), exact) for k in (0, 1, 3, 9, 27)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert relative(gradients(Phantom(1, 1.0), Anderson(), TIGHT, f, x, [weight, x]), jfb) < 1e-9
    # k = 1 damped by λ is the Jacobian-free gradient scaled by λ.
    assert relative(gradients(Phantom(1, 0.5), Anderson(), TIGHT, f, x, [weight, x]), 0.5 * jfb) < 1e-9
    # Unrolled phantom gradient at an exact fixed point = its Neumann form, λ Σ_{t<k} Bᵗᵀ g with B = λJ + (1 − λ)I.
    shine = gradients(Shine(), Broyden(rank=60), TIGHT, f, x, [weight, x])
    assert relative(shine, exact) < errors[0]


def test_phantom_equals_its_neumann_form():
    weight, x, f = tanh_map()
    steps, damping = 4, 0.5
    z = solve(f, torch.zeros_like(x), Broyden(), TIGHT).z.detach().requires_grad_()
    fz, g = f(z), torch.randn_like(z)
    total, term = torch.zeros_like(g), g
    for _ in range(steps):
        total = total + damping * term
        term = damping * torch.autograd.grad(fz, z, term, retain_graph=True)[0] + (1 - damping) * term
    expected = torch.autograd.grad(fz, weight, total)[0]
    for rule in (Phantom(steps, damping), Neumann(steps - 1, damping)):
        got = torch.autograd.grad(run(rule, f, torch.zeros_like(x), Broyden(), TIGHT).z, weight, g)[0]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert Neumann(3, 1.0) == Neumann(3)


def test_a_damped_series_converges_where_the_plain_one_does_not():
    # J = −1.5: Σ (−1.5)ⁱ diverges, and with λ = 0.4 B is 0.
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    f = lambda z: x - 1.5 * z  # noqa: E731
    plain, damped = (gradients(rule, Broyden(), TIGHT, f, x, [x]) for rule in (Neumann(30), Neumann(30, 0.4)))
    exact = gradients(Implicit(stop=TIGHT), Broyden(), TIGHT, f, x, [x])
    assert relative(damped, exact) < 1e-12
    assert relative(plain, exact) > 1e3


def test_a_series_of_no_terms_is_scaled_by_its_damping():
    weight, x, f = tanh_map()
    jfb, scaled = (gradients(Neumann(0, k), Anderson(), TIGHT, f, x, [weight, x]) for k in (1.0, 0.5))
    assert relative(scaled, 0.5 * jfb) < 1e-12


def test_reversible_gradient_is_that_of_its_own_truncated_recursion():
    weight, x, f = tanh_map()
    stop = Stop(rtol=0, atol=0, max_evals=13, best=False)
    undone = gradients(ReversibleGradient(), Reversible(0.5), stop, f, x, [weight, x])
    tracked = gradients(Unroll(), Reversible(0.5), stop, f, x, [weight, x])
    assert relative(undone, tracked) < 1e-12


def test_reversible_gradient_of_samples_that_stop_early():
    weight, x, f = tanh_map()
    x.data[0] *= 1e-3
    stop = Stop(rtol=1e-2, atol=0, max_evals=21, best=False)
    steps = solve(f, torch.zeros_like(x), Reversible(0.5), stop).steps
    assert steps.unique().numel() > 1
    undone = gradients(ReversibleGradient(), Reversible(0.5), stop, f, x, [weight, x])
    assert relative(undone, gradients(Unroll(), Reversible(0.5), stop, f, x, [weight, x])) < 1e-11


@pytest.mark.parametrize("rate", [0.9, 0.99, -0.9])
def test_reversible_gradient_is_right_or_an_error(rate):
    """Undoing amplifies by up to 1/(1 − β)² where J is near 1: the reverse pass must end at the start."""
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    verdicts = []
    for budget in (9, 15, 21, 33):
        stop = Stop(rtol=0, atol=0, max_evals=budget, best=False)

        def gradient(rule, stop=stop):
            z = run(rule, lambda z: torch.sin(rate * z + x) + 0.1 * z, torch.zeros_like(x), Reversible(0.8), stop).z
            return torch.autograd.grad(z.sum(), x)[0]

        got = None
        with contextlib.suppress(RuntimeError):
            got = gradient(ReversibleGradient())
        verdicts.append(got is not None)
        assert got is None or relative(got, gradient(Unroll())) < 1e-3
    assert verdicts[0]


def test_reversible_gradient_refuses_to_return_garbage():
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    stop = Stop(rtol=0, atol=0, max_evals=33, best=False)
    z = run(ReversibleGradient(), lambda z: 0.9 * z + x, torch.zeros_like(x), Reversible(0.8), stop).z
    with pytest.raises(RuntimeError, match=r"16 steps and missed the start.*Unroll\(checkpoint=True\)"):
        z.sum().backward()


def test_reversible_gradient_reaches_what_f_reads_indirectly():
    weight, x, _ = tanh_map()
    normed = weight / weight.norm()
    layer = torch.nn.Linear(10, 10).double()

    def f(z):
        return torch.tanh(layer(z) * 0.5 + z @ normed + x)

    tensors = [weight, x, *layer.parameters()]
    stop = Stop(rtol=0, atol=0, max_evals=9, best=False)
    z = run(ReversibleGradient(), f, torch.zeros_like(x), Reversible(0.5), stop).z
    got = torch.autograd.grad(z.sum(), tensors, retain_graph=True)
    expected = torch.autograd.grad(run(Unroll(), f, torch.zeros_like(x), Reversible(0.5), stop).z.sum(), tensors)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_reversible_gradient_refuses_what_it_cannot_do():
    _, x, f = tanh_map()
    with pytest.raises(ValueError, match=r"undo 14 steps of Reversible\(relaxation=0.8\) in torch.float32.*float64"):
        run(ReversibleGradient(), f, torch.zeros_like(x).float(), Reversible(0.8), Stop(max_evals=30))
    with pytest.raises(ValueError, match="bfloat16"):
        run(ReversibleGradient(), f, torch.zeros_like(x).bfloat16(), Reversible(0.5), Stop(max_evals=30))
    with pytest.raises(TypeError, match=r"Picard.*solver=Reversible"):
        run(ReversibleGradient(), f, torch.zeros_like(x), Picard(), Stop())
    with pytest.raises(TypeError, match=r"Anderson.*solver=Broyden"):
        run(Shine(), f, torch.zeros_like(x), Anderson(), Stop())


def test_shine_does_not_forget_the_samples_that_were_done_first():
    weight, x, _ = tanh_map(n=24, batch=2, gain=1.2)
    with torch.no_grad():
        x[0] *= 30  # saturated: done after a few steps

    def gradient(rows):
        solver, stop = Broyden(rank=3), Stop(rtol=1e-8, max_evals=60)
        f, start = lambda z: torch.tanh(z @ weight.mT + x[rows]), torch.zeros(len(rows), 24).double()
        solution = run(Shine(), f, start, solver, stop)
        return torch.autograd.grad(solution.z[0].sum(), x)[0][0], solution.steps

    alone, _ = gradient([0])
    together, steps = gradient([0, 1])
    assert steps[1] > steps[0] + 3
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_half_precision_states_have_a_full_precision_adjoint():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(32, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    solution = fixed_point(lambda z: torch.tanh(layer(z) + x), torch.zeros_like(x), stop=Stop(rtol=2e-2))
    solution.z.float().square().mean().backward()
    assert solution.adjoint[0].converged.all()
    assert layer.weight.grad.dtype == torch.bfloat16


def test_shine_makes_no_products():
    weight, x, f = tanh_map()
    solution = run(Shine(), f, torch.zeros_like(x), Broyden(), TIGHT)
    solution.z.sum().backward()
    assert solution.adjoint == []
    assert weight.grad is not None


def test_the_gradient_does_not_depend_on_the_scale_of_the_loss():
    weight, x, _ = tanh_map()
    weight, x = weight.detach().float().requires_grad_(), x.detach().float()

    def run(scale):
        solution = fixed_point(lambda z: torch.tanh(z @ weight.mT + x), torch.zeros_like(x))
        (g,) = torch.autograd.grad(scale * solution.z.sin().sum(), weight)
        return g / scale, solution.adjoint[0]

    expected, plain = run(1.0)
    for scale in (2.0**-40, 2.0**40):
        got, adjoint = run(scale)
        assert torch.equal(got, expected)
        assert adjoint.evals == plain.evals
        assert torch.equal(adjoint.residual, plain.residual)
    # A sample whose loss is zero has a zero gradient and costs nothing, with no absolute tolerance either.
    rule = Implicit(stop=Stop(rtol=1e-3, atol=0))
    solution = fixed_point(lambda z: torch.tanh(z @ weight.mT + x), torch.zeros_like(x), gradient=rule)
    solution.z[0].sum().backward()
    assert solution.adjoint[0].steps[1:].tolist() == [0, 0]
    assert solution.adjoint[0].converged.all()
    assert torch.equal(solution.adjoint[0].z[1:], torch.zeros(2, 10))


def test_the_adjoint_solution_solves_its_system():
    _, x, f = tanh_map()
    solution = run(Implicit(Broyden(), TIGHT), f, torch.zeros_like(x), Anderson(), TIGHT)
    g = torch.randn_like(x)
    solution.z.backward(g)
    (adjoint,) = solution.adjoint
    z = solution.z.detach().requires_grad_()
    (product,) = torch.autograd.grad(f(z), z, adjoint.z)
    torch.testing.assert_close(adjoint.z, product + g, rtol=1e-9, atol=1e-11)
    assert adjoint.converged.all()
    assert "3 of 3 samples converged" in str(adjoint)


@pytest.mark.parametrize("rule", [Implicit(), Neumann(3), ReversibleGradient()], ids=lambda r: type(r).__name__)
def test_a_nan_in_the_loss_stays_in_its_sample(rule):
    _, x, f = tanh_map()
    solver = Reversible(0.5) if isinstance(rule, ReversibleGradient) else Anderson()
    z = run(rule, f, torch.zeros_like(x), solver, Stop(max_evals=21)).z
    weights = torch.ones(3, 1, dtype=torch.float64)
    (good,) = torch.autograd.grad((weights * z).sum(), x, retain_graph=True)
    weights[1] = torch.nan
    (mixed,) = torch.autograd.grad((weights * z).sum(), x)
    assert mixed[1].isnan().all()
    torch.testing.assert_close(mixed[[0, 2]], good[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rule", "solver"),
    [
        (Implicit(Anderson(), TIGHT), Anderson()),
        (Neumann(80), Anderson()),
        (Unroll(), Picard()),
        (Unroll(checkpoint=True), Picard()),
        (Phantom(1, 1.0), Anderson()),
    ],
    ids=str,
)
def test_autocast(rule, solver):
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(16, 16), torch.randn(4, 16)
    layer.weight.data.mul_(0.8)

    def f(z):
        return layer(z).tanh() + 0.1 * x

    def gradient(*, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            solution = run(rule, f, torch.zeros(4, 16), solver, Stop(rtol=1e-2, max_evals=20))
            loss = solution.z.float().square().sum()
        assert solution.z.dtype == torch.float32
        layer.zero_grad()
        loss.backward()  # outside of autocast, as in every training loop
        return torch.cat([p.grad.flatten() for p in layer.parameters()])

    assert relative(gradient(enabled=True), gradient(enabled=False)) < 0.05


def test_a_map_that_ignores_z_or_has_no_parameters():
    x = torch.randn(2, 3, requires_grad=True)
    z = fixed_point(lambda z: x.sin(), torch.zeros(2, 3)).z
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], x.cos())
    assert not fixed_point(lambda z: torch.ones(2, 3), torch.zeros(2, 3)).z.requires_grad


def test_a_frozen_map_keeps_no_graph_and_solves_no_adjoint():
    assert not fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3)).z.requires_grad
    layer, head = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 1)
    solution = fixed_point(lambda z: torch.tanh(layer(z) + 1), torch.zeros(2, 3))
    head(solution.z).sum().backward()
    assert head.weight.grad is not None
    assert solution.adjoint == []
    # It is enough that an input requires a gradient.
    x = torch.ones(2, 3, requires_grad=True)
    fixed_point(lambda z: torch.tanh(layer(z) + x), torch.zeros(2, 3)).z.sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"solver": Anderson}, r"solver is the class Anderson; it must be a Solver, for example Anderson\(\)"),
        ({"solver": "anderson"}, "solver is 'anderson'"),
        ({"stop": 1e-4}, r"stop is 0.0001; it must be a Stop"),
        ({"gradient": Implicit}, "gradient is the class Implicit"),
    ],
)
def test_wrong_parts_are_named(choice, words):
    with pytest.raises(TypeError, match=words):
        fixed_point(torch.tanh, torch.zeros(1, 2), **choice)
    with pytest.raises(TypeError, match="f comes first"):
        fixed_point(torch.zeros(1, 2), torch.tanh)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"solver": Anderson}, r"solver is the class Anderson; it must be a Solver, for example Anderson\(\)"),
        ({"stop": 1e-4}, r"stop is 0.0001; it must be a Stop"),
    ],
)
def test_wrong_parts_of_a_rule_are_named_before_the_solve(choice, words):
    """Its own when it is made, and what it gives to the forward solve in place of the method's."""
    calls = []
    with pytest.raises(TypeError, match=words):
        Implicit(**choice)
    with pytest.raises(TypeError, match=words):
        solve_without_graph(as_map(calls.append), torch.zeros(1, 2), Method(), **choice)
    with pytest.raises(TypeError, match=words):
        solve(calls.append, torch.zeros(1, 2), **{"solver": Anderson(), "stop": Stop(), **choice})
    assert not calls


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda: Neumann(-1), "≥ 0"),
        (lambda: Neumann(3, 0.0), "the damping lies in"),
        (lambda: Phantom(0, 1.0), "at least 1"),
        (lambda: Phantom(1, 1.5), r"\(0, 1\]"),
    ],
)
def test_hyper_parameters_are_checked(rule, words):
    with pytest.raises(ValueError, match=words):
        rule()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unrolling_anderson_past_convergence_has_a_finite_gradient(dtype):
    """Then differences are exactly zero, and their columns of the small system are empty."""
    shift = torch.ones(3, dtype=dtype, requires_grad=True)
    stop = Stop(rtol=0, atol=0, max_evals=8, best=False)
    solution = run(Unroll(), lambda z: z + shift, torch.zeros(2, 3, dtype=dtype), Anderson(), stop)
    solution.z.sum().backward()
    assert torch.isfinite(shift.grad).all()
    weight = torch.eye(3, dtype=dtype, requires_grad=True)
    solution = run(
        Unroll(),
        lambda z: 0.1 * torch.tanh(z @ weight) + 1,
        torch.zeros(2, 3, dtype=dtype),
        Anderson(),
        Stop(rtol=0, atol=0, max_evals=40, best=False),
    )
    solution.z.sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_operands_of_fixed_point_receive_gradients():
    weight, x, f = tanh_map()
    closed = fixed_point(f, torch.zeros_like(x), stop=TIGHT, gradient=Implicit(Anderson(), TIGHT))

    def g(z, weight, x):
        return torch.tanh(z @ weight.mT + x)

    given = fixed_point(g, torch.zeros_like(x), weight, x, stop=TIGHT, gradient=Implicit(Anderson(), TIGHT))
    for a, b in zip(*(torch.autograd.grad(s.z.cos().sum(), [weight, x]) for s in (closed, given)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match="takes no operands"):
        fixed_point(AffineMap(torch.neg, x), torch.zeros_like(x), weight)


@pytest.mark.parametrize("kind", [dict, tuple, list, Pair, "nested"])
def test_every_kind_of_tree_is_a_state(kind):
    """The adjoint solve returns the same kind of container, too; f may order the entries of a dict in any way."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def parts(z):
        if kind == "nested":
            return z["a"][0], z["b"]["c"]
        return (z["a"], z["b"]) if kind is dict else (z[0], z[1])

    def built(a, b, *, swapped=False):
        if kind == "nested":
            return {"b": {"c": b}, "a": [a]} if swapped else {"a": [a], "b": {"c": b}}
        if kind is dict:
            return {"b": b, "a": a} if swapped else {"a": a, "b": b}
        return Pair(a, b) if kind is Pair else kind([a, b])

    def f(z):
        a, b = parts(z)
        mean = b.flatten(1).mean(dim=1, keepdim=True)
        return built(torch.tanh(0.5 * a + 0.3 * mean + x), torch.tanh(0.4 * b + 0.2 * a[:, :2, None]), swapped=True)

    start = built(torch.zeros(3, 4).double(), torch.zeros(3, 2, 5).double())
    found = []
    for rule in (Implicit(Anderson(), TIGHT), Unroll()):
        solution = fixed_point(f, start, stop=TIGHT, solver=Picard(), gradient=rule)
        assert solution.converged.all()
        assert type(solution.z) is type(start)
        a, b = parts(solution.z)
        assert a.shape == (3, 4)
        assert b.shape == (3, 2, 5)
        found.append(torch.autograd.grad(a.sum() + b.square().sum(), x)[0])
        assert not solution.adjoint or type(solution.adjoint[0].z) is type(start)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
