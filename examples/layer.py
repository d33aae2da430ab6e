"""An equilibrium layer inside a model of your own: five lines, with its status and cost.

python examples/layer.py
"""

import torch

from equilibria import fixed_point

torch.manual_seed(0)
linear, x = torch.nn.Linear(64, 64), torch.randn(8, 64)

solution = fixed_point(lambda z: torch.tanh(linear(z) + x), torch.zeros(8, 64))
solution.z.square().mean().backward()

print("forward: ", solution)
print("backward:", solution.adjoint[0])
print("gradient:", linear.weight.grad.norm().item())
