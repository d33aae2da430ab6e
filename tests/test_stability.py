"""Jacobian penalty, spectral radius, gradient check: against dense Jacobians."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from equilibria import Anderson, Equilibrium, Implicit, Layout, Neumann, Stop, fixed_point, stability
from equilibria.stability import check_gradient, jacobian_penalty, spectral_radius
from equilibria.testing.problems import TreeProblem, flat, tanh_map

TIGHT = Stop(rtol=1e-12, atol=1e-13, max_evals=200)


def dense_jacobian(f, z):
    """[B N N], one sample after the other."""
    full = torch.autograd.functional.jacobian(f, z)
    return torch.stack([full[i, :, i] for i in range(len(z))])


def test_the_mean_penalty_is_the_frobenius_norm():
    _, x, f = tanh_map(n=6)
    z = fixed_point(f, torch.zeros_like(x)).z.detach()
    expected = dense_jacobian(f, z).square().sum(dim=(1, 2)) / 6
    estimate = jacobian_penalty(f, z, samples=4000)
    torch.testing.assert_close(estimate, expected, rtol=0.06, atol=0)
    one = jacobian_penalty(f, z, generator=torch.Generator().manual_seed(3))
    assert one.shape == (3,)
    assert torch.equal(one, jacobian_penalty(f, z, generator=torch.Generator().manual_seed(3)))


def test_the_penalty_is_differentiable_and_z_is_constant():
    weight, _, _ = tanh_map(n=6)
    z = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    penalty = jacobian_penalty(lambda z: z @ weight, z, samples=2000)
    (g,) = torch.autograd.grad(penalty.mean(), weight, retain_graph=True)
    torch.testing.assert_close(g, 2 * weight.detach() / 6, rtol=0.2, atol=0.02)
    with pytest.raises(RuntimeError, match="have been used in the graph"):
        torch.autograd.grad(penalty.mean(), z)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, z, x):
        q, k, v = self.qkv(z).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.tanh(self.out(attended) + x)


def test_the_penalty_through_a_fused_kernel_says_what_to_do():
    torch.manual_seed(0)
    layer, x = Equilibrium(Attention()), torch.randn(2, 5, 8)
    out = layer(x)
    penalty = jacobian_penalty(out.f, out.z, generator=torch.Generator().manual_seed(0))
    assert penalty.isfinite().all()
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        (out.z.sum() + penalty.sum()).backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        same = jacobian_penalty(out.f, out.z, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(same, penalty)
    same.sum().backward()
    assert layer.cell.module.qkv.weight.grad.isfinite().all()


def matrix_map(matrix):
    return lambda z: z @ matrix.mT


def rotation(angle, scale):
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def test_spectral_radius_of_a_complex_pair():
    # The Rayleigh quotient of a quarter turn is zero.
    for angle in (math.pi / 2, 2.0, 0.3):
        block = torch.block_diag(rotation(angle, 1.2), torch.diag(torch.linspace(-0.9, 0.9, 8, dtype=torch.float64)))
        basis = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))[0]
        found = spectral_radius(matrix_map(basis @ block @ basis.mT), torch.randn(3, 10, dtype=torch.float64))
        torch.testing.assert_close(found, torch.full((3,), 1.2, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "values", [[0.9, 0.5, 0.1], [-0.9, 0.5, 0.1], [0.9, -0.9, 0.1], [0.9, 0.9, 0.1], [0.0, 0.0, 0.0]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_radius_of_real_eigenvalues(values, dtype):
    basis = torch.randn(3, 3, dtype=torch.float64)
    matrix = (basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ torch.linalg.inv(basis)).to(dtype)
    found = spectral_radius(matrix_map(matrix), torch.zeros(4, 3, dtype=dtype))
    expected = torch.full((4,), max(abs(v) for v in values), dtype=dtype)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def jordan(value, size):
    return value * torch.eye(size, dtype=torch.float64) + torch.ones(size - 1, dtype=torch.float64).diag(1)


def real(*values):
    return torch.tensor(values, dtype=torch.float64).diag()


PLANTED = {
    # (blocks of J, relative error that is allowed in float64)
    "real pair ±": ([real(0.9, -0.9)], 1e-6),
    "complex pair": ([rotation(1.0, 0.9)], 1e-6),
    "real pair and complex pair": ([real(0.9, -0.9), rotation(1.0, 0.9)], 1e-6),
    "fourth roots": ([real(0.9, -0.9), rotation(math.pi / 2, 0.9)], 1e-6),
    "three complex pairs": ([rotation(0.5, 0.9), rotation(1.3, 0.9), rotation(2.5, 0.895)], 1e-6),
    "cluster of complex pairs": ([rotation(0.3 + 0.3 * i, 0.9 - 0.002 * i) for i in range(8)], 1e-3),
    "40 eigenvalues": ([rotation(0.1 + 0.14 * i, 0.9 - 0.0005 * i) for i in range(20)], 0.05),
    "cluster of real ones": ([real(*(0.9 - 0.005 * i for i in range(12)))], 1e-3),
    "defective": ([jordan(0.9, 3)], 1e-3),
    "one": ([real(0.99)], 1e-6),
    "zero": ([torch.zeros(60, 60, dtype=torch.float64)], 0),
    "nilpotent": ([jordan(0.0, 4), torch.zeros(56, 56, dtype=torch.float64)], 0),
}


@pytest.mark.parametrize("condition", [1, 10])
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", range(3))
def test_spectral_radius_of_planted_eigenvalues(name, condition, seed):
    """The other eigenvalues lie in [−0.5, 0.5]; ``condition`` is that of the eigenvectors."""
    blocks, allowed = PLANTED[name]
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    planted = torch.block_diag(*blocks)
    others = torch.rand(60 - len(planted), generator=generator, dtype=torch.float64) - 0.5
    basis = left @ torch.logspace(0, math.log10(condition), 60, dtype=torch.float64).diag() @ right
    matrix = basis @ torch.block_diag(planted, others.diag()) @ torch.linalg.inv(basis)
    expected = torch.linalg.eigvals(planted).abs().max().expand(8)
    found = spectral_radius(matrix_map(matrix), torch.zeros(8, 60, dtype=torch.float64), generator=generator)
    torch.testing.assert_close(found, expected, rtol=allowed * (1 if condition == 1 else 4), atol=1e-2 * (not allowed))


@pytest.mark.parametrize("seed", range(6))
def test_spectral_radius_of_nonnormal_maps(seed):
    _, x, f = tanh_map(n=16, batch=4, gain=1.1, seed=seed)
    z = torch.randn_like(x)
    expected = torch.linalg.eigvals(dense_jacobian(f, z.detach())).abs().amax(dim=1)
    torch.testing.assert_close(spectral_radius(f, z), expected.detach(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "iterations"), [(100, 60), (300, 40), (300, 20)])
def test_spectral_radius_of_random_matrices(size, iterations):
    """Their eigenvalues fill a disc, so that many have nearly the largest modulus."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(8, size, size, generator=generator) / size**0.5
    expected = torch.linalg.eigvals(matrices.double()).abs().amax(dim=1).float()
    z = torch.zeros(8, size)
    found = spectral_radius(
        lambda z: torch.einsum("bij,bj->bi", matrices, z), z, iterations=iterations, generator=generator
    )
    torch.testing.assert_close(found, expected, rtol=0.03 if iterations > size // 8 else 0.15, atol=0)
    together = torch.block_diag(*matrices[:2])
    coupled = spectral_radius(
        lambda z: (z.flatten() @ together.mT).view(2, size), z[:2], iterations=iterations, generator=generator,
        coupled=True,
    )  # fmt: skip
    assert coupled.shape == (1,)
    torch.testing.assert_close(coupled, expected[:2].amax(0, keepdim=True), rtol=0.15, atol=0)


@pytest.mark.parametrize("iterations", [3, 19, 20, 21, 60])
def test_the_radius_costs_one_evaluation_and_as_many_vjps_as_it_says(iterations):
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            counts[0] += 1
            return 0.5 * z

        @staticmethod
        def backward(ctx, *cotangents):
            counts[1] += 1
            return 0.5 * cotangents[0]

    counts = [0, 0]
    found = spectral_radius(Counted.apply, torch.zeros(2, 50), iterations=iterations)
    assert counts == [1, iterations]
    torch.testing.assert_close(found, torch.full((2,), 0.5), rtol=1e-5, atol=0)


def test_the_radius_of_an_empty_batch_is_empty():
    assert spectral_radius(lambda z: z / 2, torch.zeros(0, 3)).shape == (0,)


def test_what_is_not_finite_is_not_called_stable():
    x = torch.tensor([[1.0, 1.0], [torch.nan, 1.0]])
    found = spectral_radius(lambda z: 2 * x * z, torch.ones(2, 2))
    assert found[0].item() == pytest.approx(2.0)
    assert found[1].isnan()


def test_half_precision_does_not_overflow():
    z = torch.ones(2, 8, dtype=torch.float16)
    assert jacobian_penalty(lambda z: 300 * z, z).isfinite().all()
    torch.testing.assert_close(spectral_radius(lambda z: 300 * z, z), torch.full((2,), 300.0), rtol=1e-3, atol=0)


def test_check_gradient_tells_an_exact_rule_from_a_rough_one():
    weight, x, f = tanh_map()
    start = torch.zeros_like(x)
    exact = check_gradient(f, start, [weight, x], gradient=Implicit(Anderson(), TIGHT), solver=Anderson(), stop=TIGHT)
    rough = check_gradient(f, start, [weight, x], gradient=Neumann(0), solver=Anderson(), stop=TIGHT)
    assert exact.relative_error < 1e-10
    assert 0.05 < rough.relative_error < 1
    assert len(exact.each) == 2
    assert exact.residual < 1e-11


def test_a_tree_is_measured_as_its_rows_are():
    """Penalty and radius of a state of three tensors, against the dense Jacobian of the rows."""
    problem = TreeProblem.make(batch=2)
    f, z, layout = problem.map(), problem.exact, Layout.of(problem.exact)

    def rows(z):
        return layout.pack(layout.aligned(f(layout.unpack(z))))

    dense = torch.func.vmap(torch.func.jacrev(lambda row: rows(row[None])[0]), chunk_size=1)(flat(z))
    width = dense.shape[-1]
    expected = dense.square().sum(dim=(1, 2)) / width
    torch.testing.assert_close(jacobian_penalty(f, z, samples=300), expected, rtol=0.1, atol=0)
    radii = [
        spectral_radius(g, start, generator=torch.Generator().manual_seed(0)) for g, start in ((f, z), (rows, flat(z)))
    ]
    torch.testing.assert_close(radii[0], radii[1], rtol=1e-9, atol=0)


def test_a_map_that_reads_nothing_of_z_has_radius_and_penalty_zero():
    x = torch.ones(2, 3)
    assert torch.equal(spectral_radius(lambda z: x, x), torch.zeros(2))
    assert torch.equal(jacobian_penalty(lambda z: x, x), torch.zeros(2))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="at least one random vector"):
        jacobian_penalty(torch.tanh, torch.zeros(1, 2), samples=0)
    with pytest.raises(ValueError, match="three VJPs"):
        spectral_radius(torch.tanh, torch.zeros(1, 2), iterations=2)


@pytest.mark.parametrize("products", [1, 5])
def test_the_cost_of_the_error_estimate(products):
    calls = []

    def f(z):
        calls.append(1)
        return torch.tanh(z.roll(1, dims=1)) + 0.1

    stability.error_estimate(f, torch.randn(2, 30), products=products)
    assert len(calls) == 1 + products + 2


def test_the_error_estimate_is_accurate_where_the_system_is_ill_conditioned():
    # A Jordan block: ‖(I − J)⁻¹‖ is about 1000, and GMRES to 1e-3 was wrong by 16 %.
    jacobian = torch.diag(torch.full((3,), 0.9)).double() + torch.diag(torch.ones(2), 1).double()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - jacobian, x.mT).mT
    z = solution * (1 + 1e-2 * torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    expected = (z - solution).norm(dim=1) / z.norm(dim=1)
    assert_close(stability.error_estimate(lambda z: z @ jacobian.mT + x, z), expected, rtol=1e-4, atol=0)


def test_the_error_is_infinite_where_there_is_no_solution():
    rates = torch.tensor([1.0, 0.5])
    assert (stability.error_estimate(lambda z: z + 1, torch.ones(2, 50)) == torch.inf).all()
    assert (stability.error_estimate(lambda z: rates * z + 1, torch.ones(2, 2)) == torch.inf).all()
    assert (stability.error_estimate(lambda z: z, torch.ones(2, 2)) == 0).all()


def test_the_leak_of_a_small_sample_is_not_hidden_by_large_ones():
    scale, reading = torch.tensor([[1.0], [1e6], [1e6], [1.0]]), torch.eye(4)
    reading[0, 3] = 1.0  # half of the samples with the first and without the last contain one of the large ones
    assert not stability.check_independence(lambda z: reading @ (scale * z), torch.ones(4, 5)).independent
    assert stability.check_independence(lambda z: scale * z, torch.ones(4, 5)).independent


def test_check_gradient_names_what_is_wrong_with_its_arguments():
    x, z = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
    for tensors, steps in (([], 300), ([torch.ones(2)], 300), ([x], 0)):
        with pytest.raises(ValueError, match="give at least one step and at least one tensor, each with requires_grad"):
            check_gradient(lambda z: 0.5 * z + x, z, tensors, steps=steps)
    with pytest.raises(ValueError, match="f uses no tensor that requires a gradient"):
        check_gradient(lambda z: 0.5 * z + 1, z, [x])


NOT_WHOLE = """
import torch
from equilibria import Anderson, Broyden, Neumann, NewtonKrylov, Phantom, stability

z = torch.ones(1, 2)
for call in (
    lambda: Anderson(window=2.5), lambda: Broyden(rank=float("nan")), lambda: NewtonKrylov(inner="6"),
    lambda: Phantom(steps=1.5), lambda: Neumann(terms=1.5),
    lambda: stability.spectral_radius(torch.tanh, z, iterations=3.5),
    lambda: stability.error_estimate(torch.tanh, z, products=2.5),
    lambda: stability.jacobian_penalty(torch.tanh, z, samples=1.5),
    lambda: stability.check_gradient(torch.tanh, z, [z], steps=1.5),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_counts_are_whole_numbers():
    # In another process, since the type checker of the tests would be first.
    found = subprocess.run([sys.executable, "-c", NOT_WHOLE], capture_output=True, text=True, check=True).stdout
    assert found.count("is a whole number") == 9


def test_a_coupled_state_without_numbers_has_no_jacobian():
    """The penalty of a graph without nodes was NaN, and made the loss so."""
    weight, z = torch.tensor(0.5, requires_grad=True), torch.zeros(0, 3)
    for measure in (jacobian_penalty, spectral_radius):
        assert measure(lambda z: torch.tanh(weight * z), z, coupled=True).tolist() == [0.0]
