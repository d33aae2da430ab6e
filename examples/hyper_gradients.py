"""Hyper-gradients of ridge regression: 40 penalties are learned from the validation error.

The inner problem finds the weights w*(λ) that minimise ½·mean (Xw − y)² + ½·Σ_j exp(λ_j)·w_j² on the training data.
They are the fixed point of a step of gradient descent, so any loss on w* has a gradient with respect to λ, whatever
method found w*. The outer problem lowers the validation error by that gradient. Ten of forty features matter, and the
penalties learn which. Here w* and its derivatives have a closed form, and the program prints the errors against it.

python examples/hyper_gradients.py          five seconds on one core
"""

import argparse

import torch

from equilibria import Implicit, NewtonKrylov, Stop, fixed_point

SAMPLES, FEATURES, USEFUL = 60, 40, 10
STOP = Stop(rtol=1e-12, max_evals=1000)


def descended(w: torch.Tensor, penalty: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """f(w): a step of gradient descent, whose length is 1 over a bound of the curvature."""
    gradient = x.mT @ (x @ w - y) / len(y) + penalty.exp() * w
    curvature = x.square().sum() / len(y) + penalty.exp().max()
    return w - gradient / curvature.detach()


def fitted(penalty: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """w*(λ), as a fixed point: the weights are one problem without a batch axis."""
    start = torch.zeros(x.shape[1], dtype=x.dtype)
    solver = NewtonKrylov(inner=FEATURES)  # f is linear, so one Newton step suffices
    rule = Implicit(solver, STOP)
    return fixed_point(descended, start, penalty, x, y, solver=solver, stop=STOP, gradient=rule, coupled=True).z


def closed(penalty: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """w*(λ) by a linear system."""
    return torch.linalg.solve(x.mT @ x / len(y) + torch.diag(penalty.exp()), x.mT @ y / len(y))


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float(((found - exact).norm() / exact.norm()).detach())


def main(steps: int = 60, seed: int = 0) -> None:
    """Compare first and second derivatives with those of the closed form, then learn the penalties."""
    torch.manual_seed(seed)
    truth = torch.cat([torch.randn(USEFUL), torch.zeros(FEATURES - USEFUL)]).double()
    x = torch.randn(3, SAMPLES, FEATURES, dtype=torch.float64)
    y = x @ truth + torch.randn(3, SAMPLES, dtype=torch.float64)

    def error(w: torch.Tensor, part: int) -> torch.Tensor:
        return (x[part] @ w - y[part]).square().mean()

    def validation(penalty: torch.Tensor, solved=fitted) -> torch.Tensor:
        return error(solved(penalty, x[0], y[0]), 1)

    penalty = torch.full((FEATURES,), -3.0, dtype=torch.float64, requires_grad=True)
    w, exact = fitted(penalty, x[0], y[0]), closed(penalty, x[0], y[0])
    print(f"the weights differ from those of the linear system by {distance(w, exact):.1e}")
    (gradient,) = torch.autograd.grad(validation(penalty), penalty)
    (expected,) = torch.autograd.grad(validation(penalty, closed), penalty)
    print(f"the gradient of the validation error by {distance(gradient, expected):.1e}")
    second = torch.func.hessian(validation)(penalty.detach())
    expected = torch.func.hessian(lambda p: validation(p, closed))(penalty.detach())
    print(f"its matrix of second derivatives by {distance(second, expected):.1e}")

    optimiser = torch.optim.Adam([penalty], lr=0.2)
    for step in range(steps + 1):
        loss = validation(penalty)
        if step % 20 == 0:
            test = error(fitted(penalty, x[0], y[0]), 2).item()
            print(f"step {step}: validation error {loss.item():.3f}, test error {test:.3f}, of the noise alone 1")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    useful, useless = penalty[:USEFUL].mean().item(), penalty[USEFUL:].mean().item()
    print(f"mean λ of the features that matter {useful:.1f}, of the others {useless:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hyper-gradients of ridge regression")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
