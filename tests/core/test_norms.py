"""The norms of a stop: built in, per leaf, and given by the user."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from equilibria import Anderson, Broyden, Implicit, NewtonKrylov, Picard, Status, Stop, fixed_point, solve
from equilibria.core.stop import row_norm
from equilibria.solvers.history import TINY


def halving(z):
    return z / 2 + 1


def two_scales(z):
    """A large leaf that is nearly converged and a small one that is far from it."""
    return {"large": 0.1 * z["large"] + 900, "small": 0.9 * z["small"] + 1e-4}


def start():
    return {"large": torch.full((2, 5), 999.0, dtype=torch.float64), "small": torch.zeros(2, 3, dtype=torch.float64)}


@pytest.mark.parametrize(("norm", "size"), [("l2", math.sqrt(4)), ("max", 1.0)])
def test_absolute_tolerances_are_in_units_of_the_norm(norm, size):
    # After k steps from 0 every entry of the residual is 2^-k.
    stop = Stop(rtol=0, atol=size * 2.0**-7 * 1.0001, max_evals=50, norm=norm)
    solution = solve(halving, torch.zeros(1, 4, dtype=torch.float64), Picard(), stop)
    assert solution.steps.tolist() == [7]


def test_the_residual_is_relative_in_the_same_norm():
    z0 = torch.tensor([[1.0, 0.0]])
    assert solve(lambda z: z / 2, z0, Picard(), Stop(max_evals=1, norm="max")).residual.item() == 1.0
    skew = solve(lambda z: z + torch.tensor([[3.0, 4.0]]), z0, Picard(), Stop(max_evals=1, norm="max"))
    assert skew.residual.item() == 1.0  # 4 / max(4, 4)


def test_a_small_leaf_is_hidden_by_a_large_one_unless_each_is_measured():
    together = solve(two_scales, start(), Picard(), Stop(rtol=1e-3, atol=0, max_evals=500))
    apart = solve(two_scales, start(), Picard(), Stop(rtol=1e-3, atol=0, max_evals=500, per_leaf=True))
    assert together.converged.all()
    assert apart.converged.all()
    assert (together.z["small"] < 0.5e-3).all()  # its solution is 1e-3
    torch.testing.assert_close(apart.z["small"], torch.full((2, 3), 1e-3, dtype=torch.float64), rtol=1e-2, atol=0)
    assert (apart.steps > together.steps).all()


def test_the_residual_per_leaf_is_the_largest_of_the_leaves():
    f0, z0 = two_scales(start()), start()
    ratios = [float((f0[k] - z0[k])[0].norm() / f0[k][0].norm()) for k in z0]
    found = solve(two_scales, z0, Picard(), Stop(max_evals=1, per_leaf=True))
    assert found.residual[0].item() == pytest.approx(max(ratios))


def test_of_one_tensor_a_leaf_is_the_whole():
    z0 = torch.zeros(3, 4)
    plain, each = (solve(halving, z0, Anderson(), Stop(per_leaf=flag)) for flag in (False, True))
    assert torch.equal(plain.z, each.z)
    assert torch.equal(plain.trace, each.trace)


def test_a_nan_in_one_leaf_ends_its_sample_alone():
    x = torch.tensor([1.0, torch.nan]).double()[:, None]

    def f(z):
        return {"a": 0.5 * z["a"] + 1, "b": 0.5 * z["b"] + x}

    z0 = {"a": torch.zeros(2, 3).double(), "b": torch.zeros(2, 2).double()}
    for stop in (Stop(max_evals=60), Stop(max_evals=60, per_leaf=True)):
        solution = solve(f, z0, Picard(), stop)
        assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]


def test_a_norm_of_a_user_gets_the_state():
    seen = []

    def energy(z):
        seen.append({name: tuple(leaf.shape) for name, leaf in z.items()})
        return z["large"].abs().amax(dim=1) + 1e6 * z["small"].abs().amax(dim=1)

    solution = solve(two_scales, start(), Picard(), Stop(rtol=1e-3, atol=0, max_evals=500, norm=energy))
    assert seen[0] == {"large": (2, 5), "small": (2, 3)}
    torch.testing.assert_close(solution.z["small"], torch.full((2, 3), 1e-3, dtype=torch.float64), rtol=3e-2, atol=0)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Stop(norm="l1"), r"Stop\(norm='l1'\): the norm is 'l2', 'max' or a function"),
        (lambda: Stop(norm=torch.linalg.norm, per_leaf=True), "give one of these"),
        (lambda: solve(halving, torch.zeros(3, 4), Picard(), Stop(norm=torch.linalg.norm)), r"returned \(\); .*\[3\]"),
        (lambda: solve(halving, torch.zeros(3, 4), Picard(), Stop(norm=lambda z: 1.0)), "returned float"),
    ],
)
def test_wrong_norms_get_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), NewtonKrylov()], ids=str)
def test_norms_hold_for_the_adjoint_as_well(solver):
    """A leaf with a small cotangent converges late; a stop that measures each leaf waits for it."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    seen = []

    def f(z):
        return {"large": 0.1 * z["large"] + 9 * x.sum(), "small": 0.9 * z["small"] + 1e-4 * x}

    def small(z):
        seen.append(sorted(z))
        return z["small"].abs().amax(dim=1)

    grads, steps = [], []
    for choices in ({}, {"per_leaf": True}, {"norm": small}):
        rule = Implicit(solver, Stop(rtol=1e-4, atol=0, max_evals=400, **choices))
        solution = fixed_point(f, start(), stop=Stop(rtol=1e-12, max_evals=400), gradient=rule)
        (solution.z["large"].sum() + 1e-6 * solution.z["small"].sum()).backward()
        steps.append(int(solution.adjoint[0].steps.max()))
        grads.append(solution.adjoint[0].z["small"])
    for found in grads[1:]:
        torch.testing.assert_close(found, torch.full((2, 3), 1e-5, dtype=torch.float64), rtol=1e-2, atol=0)
    assert seen[0] == ["large", "small"]
    if solver == Picard():
        assert steps[1] > steps[0]


def test_a_stop_with_a_norm_is_a_frozen_value():
    stop = Stop(norm="max", per_leaf=True)
    assert dataclasses.replace(stop) == stop
    assert hash(stop) == hash(Stop(norm="max", per_leaf=True))


SCALES = [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-200), (torch.float64, 1e200)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), NewtonKrylov()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("width", [1, 3, 30])
def test_states_whose_squares_no_dtype_holds_are_solved_like_others(dtype, scale, solver, width):
    """They used to count as converged with an error of 100 %, or as not finite."""
    generator = torch.Generator().manual_seed(0)
    matrix, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((width, width), (4, width)))
    matrix = 0.5 * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = scale * x
    found = solve(lambda z: z @ matrix + x, torch.zeros_like(x), solver, Stop(rtol=1e-5, max_evals=200))
    if isinstance(solver, Broyden) and width > TINY and scale > 1:  # its inner products overflow, which is reported
        assert (found.status == Status.NONFINITE).all()
        return
    assert found.converged.all()
    exact = torch.linalg.solve(torch.eye(width).double() - matrix.double().mT, (x.double() / scale).mT).mT
    torch.testing.assert_close(found.z.double() / scale, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-39, 1e-30, 1e30])  # the inverse of 1e-39 is no float32
def test_a_gradient_does_not_depend_on_the_scale_of_the_loss(scale):
    generator = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(6, 6, generator=generator)).requires_grad_()
    x = torch.randn(4, 6, generator=generator)

    def gradient(factor):
        z = fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), stop=Stop(rtol=1e-6)).z
        return torch.autograd.grad(factor * z.sum(), weight)[0]

    torch.testing.assert_close(gradient(scale) / scale, gradient(1.0), rtol=1e-4, atol=1e-5)


def test_the_norms_of_other_rows_keep_their_bits():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    plain = torch.linalg.vector_norm(x, dim=1)
    for value in (0.0, 1e-30, 1e30, math.nan, math.inf):
        mixed = torch.cat([x, torch.full((1, 7), value)])
        found = row_norm(mixed)
        assert torch.equal(found[:5], plain)
        expected = torch.linalg.vector_norm(mixed[5:].double(), dim=1).float()
        torch.testing.assert_close(found[5:], expected, equal_nan=True)
