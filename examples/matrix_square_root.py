"""A classical algorithm, differentiated as a black box: the square root of a matrix.

The Denman-Beavers iteration finds Z with Z Z = A in a few steps. Z is a fixed point of f(Z) = Z + (A - Z Z)/2, and with
that line ``implicit`` gives the algorithm its derivatives of every order, in reverse and in forward mode. The program
compares them with derivatives through the eigenvectors of A.

python examples/matrix_square_root.py         five seconds on one core
"""

import torch

from equilibria import Broyden, Implicit, Stop, implicit

STOP = Stop(rtol=1e-12, max_evals=200)


def f(z: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Z + (A − Z Z)/2, whose fixed points are the square roots of A."""
    return z + 0.5 * (a - z @ z)


@implicit(f, gradient=Implicit(Broyden(rank=100), STOP), stop=STOP)
def square_root(a: torch.Tensor) -> torch.Tensor:
    """The square root of each matrix [B N N], by E. Denman and A. Beavers (1976)."""
    y, z = a, torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)
    for _ in range(12):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y


def by_eigenvectors(a: torch.Tensor) -> torch.Tensor:
    """The square root of each symmetric matrix."""
    values, vectors = torch.linalg.eigh(a)
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    a = (x @ x.mT + torch.eye(4)).requires_grad_()
    weight = torch.randn(4, 4, dtype=torch.float64)

    def loss(root: torch.Tensor) -> torch.Tensor:
        return (root * (weight + weight.mT)).sum().square()

    def derivatives(root_of) -> tuple[torch.Tensor, torch.Tensor]:
        (first,) = torch.autograd.grad(loss(root_of(a)), a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), a)
        return (first + first.mT).detach() / 2, (second + second.mT) / 2

    root = square_root(a).detach()
    print(f"‖Z Z − A‖ / ‖A‖ = {float((root @ root - a.detach()).norm() / a.detach().norm()):.1e}")
    pairs = zip(("gradient", "second derivative"), derivatives(square_root), derivatives(by_eigenvectors), strict=True)
    for name, found, exact in pairs:
        print(f"{name}: differs from that by eigenvectors by {float((found - exact).norm() / exact.norm()):.1e}")
    direction = torch.eye(4, dtype=torch.float64).expand_as(a)
    _, slope = torch.func.jvp(square_root, (a.detach(),), (direction,))
    _, exact = torch.func.jvp(by_eigenvectors, (a.detach(),), (direction,))
    print(f"forward mode: {float((slope - exact).norm() / exact.norm()):.1e}")


if __name__ == "__main__":
    main()
