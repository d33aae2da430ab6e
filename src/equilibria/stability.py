"""How stable an equilibrium is: Jacobian penalty, spectral radius, error estimate; checks of gradient and independence.

Letters: B batch, N flattened state. Map ``f``, Jacobian ``J`` at ``z``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.checks import check_flag, check_whole
from equilibria.core.evaluator import Evaluator
from equilibria.core.gradient import GradientRule
from equilibria.core.graph import kept, refused_if_lacking, without_graph
from equilibria.core.maps import AffineMap, Map, as_map
from equilibria.core.solve import solve
from equilibria.core.solver import Solver
from equilibria.core.state import Layout, State
from equilibria.core.stop import Status, Stop, relative, row_norm
from equilibria.core.tracing import untraced
from equilibria.core.trees import map_pairs, map_tensors, tensors_in
from equilibria.fixed_point import Method
from equilibria.solvers.arnoldi import KRYLOV, largest_modulus, unit
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.picard import Picard


@untraced
def jacobian_penalty(
    f: Map | Callable[[State], State],
    z: State,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    draw: Callable[[Tensor], Tensor] | None = None,
    coupled: bool = False,
) -> Float[Tensor, " B"]:
    """‖εᵀJ‖²/N with ε ~ N(0, I): an unbiased estimate of ‖J‖_F²/N at z, differentiable in the parameters of f.

    S. Bai, V. Koltun, J. Z. Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization" (2021), eq. 7. z is a
    constant, so the term costs one evaluation of f and one double backward, and no solve; add it to the loss before the
    one backward pass. f must allow double backward: PyTorch's fused attention kernels do not, and the backward pass of
    the penalty then raises a RuntimeError that says what to do.

    Args:
        f: the map.
        z: the equilibrium.
        samples: number of ε to average over.
        generator: random numbers for ε; the default generator if None.
        draw: returns ε for one leaf of f(z); by default ε is standard normal and comes from ``generator``.
        coupled: f mixes the samples; the result is then one number for all of them.
    """
    check_whole("jacobian_penalty", samples=samples)
    check_flag("jacobian_penalty", coupled=coupled)
    if samples < 1:
        raise ValueError(f"jacobian_penalty(samples={samples}): at least one random vector is needed; try 1.")
    layout = Layout.of(z, coupled=coupled)
    with torch.enable_grad():
        with kept():
            point = as_map(f).linearise(z, create_graph=True)
        total = torch.zeros(len(layout.pack(z)), dtype=layout.dtype, device=layout.device)
        draw = draw or (lambda leaf: torch.randn(leaf.shape, dtype=leaf.dtype, device=leaf.device, generator=generator))
        for _ in range(samples):
            product = layout.pack(point.vjp(map_tensors(draw, point.value)))
            if product.shape[1]:  # the mean of no numbers is NaN
                total = total + product.square().mean(dim=1)
    return refused_if_lacking(_FUSED, total / samples)


_FUSED = (
    "The Jacobian penalty has no gradient: f contains an operation whose derivative PyTorch cannot differentiate, "
    "mostly a fused attention kernel. Compute the penalty inside `with torch.nn.attention.sdpa_kernel("
    'torch.nn.attention.SDPBackend.MATH):`, or let f write its attention out (attn_implementation="eager" in '
    "transformers)."
)


@untraced
def spectral_radius(
    f: Map | Callable[[State], State],
    z: State,
    *,
    iterations: int = 60,
    generator: torch.Generator | None = None,
    coupled: bool = False,
) -> Float[Tensor, " B"]:
    """The largest modulus of an eigenvalue of J at z, for each sample, from a random vector and VJPs.

    Power iteration with A = Jᵀ leads the vector into the space of the leading eigenvalues. Its last VJPs span a Krylov
    space of up to 20 dimensions, whose Ritz values by the Arnoldi iteration tell real and complex eigenvalues of
    (nearly) the same modulus apart; the result is the largest of their moduli, except for values that a far more
    accurate one beside them belies. NaN where J is not finite. Costs one evaluation of f and ``iterations`` VJPs, and
    stores 20 vectors like z.

    It is an estimate: too small, by up to a tenth, where more than 20 eigenvalues have nearly the largest modulus, too
    large where J is far from normal, and about ⁿ√eps off for a defective eigenvalue of multiplicity n. More iterations
    help, except in the last case.

    Args:
        f: the map.
        z: the point, usually the equilibrium.
        iterations: number of VJPs, at least three.
        generator: random numbers for the first vector; the default generator if None.
        coupled: f mixes the samples; the result is then one number for all of them.
    """
    check_whole("spectral_radius", iterations=iterations)
    check_flag("spectral_radius", coupled=coupled)
    if iterations < 3:
        raise ValueError(f"spectral_radius(iterations={iterations}): at least three VJPs are needed; try 60.")
    layout = Layout.of(z, coupled=coupled)
    with kept():
        point = as_map(f).linearise(z).for_products()

    def product(v: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        return layout.pack(point.vjp(layout.unpack(v)))

    with torch.no_grad():
        batch, width = len(layout.pack(z)), sum(layout.sizes)
        v = torch.randn(batch, width, dtype=layout.dtype, device=layout.device, generator=generator)
        size = min(KRYLOV, width, iterations)
        for _ in range(iterations - size):
            v = product(unit(v))
        return largest_modulus(product, v, size=size).to(layout.dtype)


@untraced
def error_estimate(
    f: Map | Callable[[State], State], z: State, *, products: int = 20, coupled: bool = False
) -> Float[Tensor, " B"]:
    """‖z − z*‖ / ‖z‖ to first order: (I − J)⁻¹ (f(z) − z), by GMRES, relative to z, for each sample.

    A residual says how far one step of f still moves z, not how far z is from z*: where the spectral radius is 0.999,
    a residual of 1e-3 can hide an error of 50 %. Costs one evaluation of f and at most ``products`` + 2 products J·v.

    Args:
        f: the map.
        z: the point, usually the result of a solve.
        products: largest number of products J·v in GMRES; if it needs more, the estimate is off, mostly too small.
        coupled: f mixes the samples; the result is then one number for all of them.

    Returns:
        One number per sample: infinite where z is 0 and z* is not, and where (I − J) d = f(z) − z is found to have no
        solution (f(z) = z + 1); NaN where f(z) or a product is not finite.
    """
    check_whole("error_estimate", products=products)
    check_flag("error_estimate", coupled=coupled)
    if products < 1:
        raise ValueError(f"error_estimate(products={products}): at least one product J·v is needed; try 20.")
    f, layout = as_map(f), Layout.of(z, coupled=coupled)
    with without_graph():
        z = map_tensors(Tensor.detach, z)
        evaluate = Evaluator(f, layout, 2 + products)
        flat = layout.pack(z)
        fz = evaluate(flat)
        r = fz - flat
        system = AffineMap(lambda v: evaluate.jvp(flat, v, fz=fz), r)
        accuracy = max(1e-8, 100 * torch.finfo(r.dtype).eps)
        stop = Stop(rtol=accuracy, max_evals=2 + products, best=False)
        solved = solve(system, torch.zeros_like(r), NewtonKrylov(inner=products, forcing=accuracy), stop)
        found = relative(row_norm(solved.z), row_norm(flat))
        # A Krylov space of N dimensions holds every solution, and one without a direction holds none.
        whole = torch.full_like(found, r.shape[1] <= products, dtype=torch.bool) | (row_norm(solved.z) == 0)
        missed = row_norm(solved.fz - solved.z) > 1e-2 * row_norm(r)
        found = torch.where(whole & missed, torch.inf, found)
        return torch.where(solved.status == Status.NONFINITE, torch.nan, found)


@dataclasses.dataclass(frozen=True)
class IndependenceCheck:
    """The result of ``check_independence``."""

    leak: Float[Tensor, " B"]
    """For each sample, its part of ‖Jᵀu‖ where u is zero there, relative to that part where u is not: the largest of
    all u. Infinite if f(z) depends on the sample, but not in the sample itself."""

    @property
    def independent(self) -> bool:
        """True if every leak is at the level of rounding; False if a leak is larger or NaN."""
        return bool((self.leak <= 100 * torch.finfo(self.leak.dtype).eps).all())


@untraced
def check_independence(
    f: Map | Callable[[State], State], z: State, *, generator: torch.Generator | None = None
) -> IndependenceCheck:
    """Test whether each sample of f(z) depends on the same sample of z alone; if not, solve with ``coupled=True``.

    Half of the samples get random cotangents u, and Jᵀu must vanish in the other half. The halves follow the binary
    digits of the sample numbers, so that every two samples are in different halves at least once. Costs one evaluation
    of f and about 2·log₂ B VJPs. A dependence whose derivative is zero at this point goes unnoticed.

    Args:
        f: the map.
        z: the point, with the batch as first axis.
        generator: random numbers for the cotangents; the default generator if None.
    """
    layout = Layout.of(z)
    with kept():
        point = as_map(f).linearise(z).for_products()
    with torch.no_grad():
        flat = layout.pack(z)
        leak, own = flat.new_zeros(2, len(flat))
        number = torch.arange(len(flat), device=flat.device)
        for digit in range(max(1, (len(flat) - 1).bit_length())):
            for half in (0, 1):
                chosen = ((number >> digit) & 1) == half
                u = torch.randn(flat.shape, dtype=flat.dtype, device=flat.device, generator=generator)
                size = row_norm(layout.pack(point.vjp(layout.unpack(u * chosen[:, None]))))
                # Relative to the whole batch, the leak of a small sample would vanish beside a large one.
                leak = torch.maximum(leak, torch.where(chosen, 0.0, size))
                own = torch.maximum(own, torch.where(chosen, size, 0.0))
    return IndependenceCheck(leak=relative(leak, own))


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """The difference between the gradient of a rule and that of a long unroll."""

    relative_error: float
    """‖g_rule − g_unroll‖ / ‖g_unroll‖ over all tensors together."""
    each: tuple[float, ...]
    """The same error for each tensor by itself."""
    residual: float
    """Largest relative residual of the rule's forward solve."""
    unroll_residual: float
    """Largest relative residual after the unroll: the comparison means little if this is not small."""


@untraced
def check_gradient(
    f: Map | Callable[[State], State],
    z0: State,
    tensors: Iterable[Tensor],
    *,
    solver: Solver = Method.solver,
    stop: Stop = Method.stop,
    gradient: GradientRule = Method.gradient,
    coupled: bool = False,
    steps: int = 300,
    damping: float = 1.0,
) -> GradientCheck:
    """Compares the gradient of L = Σ w⊙z (w fixed, random) through ``gradient`` with that through a long plain unroll.

    Args:
        f: the map; the unroll must converge, if necessary with ``damping`` below 1.
        z0: the start.
        tensors: the parameters and inputs to differentiate with respect to.
        solver: for the forward solve of the rule.
        stop: for the forward solve of the rule.
        gradient: the rule to be checked.
        coupled: f mixes the samples.
        steps: depth of the unroll; its memory grows with it.
        damping: damping of the unroll.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    check_whole("check_gradient", steps=steps)
    check_flag("check_gradient", coupled=coupled)
    if steps < 1 or not tensors or not all(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise ValueError(
            f"check_gradient(steps={steps}) of {len(tensors)} tensors: give at least one step and at least one tensor, "
            "each with requires_grad=True; try steps=300 and model.parameters()."
        )
    generator = torch.Generator().manual_seed(0)
    weights = map_tensors(lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf), z0)

    def gradients(z: State) -> list[Tensor]:
        total = sum(product.sum() for product in tensors_in(map_pairs(torch.mul, weights, z)))
        assert isinstance(total, Tensor)
        if not total.requires_grad:
            raise ValueError("check_gradient: f uses no tensor that requires a gradient; give one that it uses.")
        found = torch.autograd.grad(total, tensors, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]

    with torch.enable_grad():
        method = Method(solver=solver, stop=stop, gradient=gradient, coupled=coupled, on_failure="ignore")
        solution = method.run(as_map(f), z0)
        got = gradients(solution.z)
        fixed = Stop(rtol=0, atol=0, max_evals=steps + 1, best=False)
        unrolled = solve(f, z0, Picard(damping), fixed, coupled=coupled)
        expected = gradients(unrolled.z)
    return GradientCheck(
        relative_error=_relative(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in expected])),
        each=tuple(_relative(g, e) for g, e in zip(got, expected, strict=True)),
        residual=float(solution.residual.max()),
        unroll_residual=float(unrolled.residual.max()),
    )


def _relative(got: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((got - expected).norm()) / size if size > 0 else float(got.norm())
