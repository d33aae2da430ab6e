"""An equilibrium layer of any module: ten lines, a status, and what it cost.

python examples/layer.py
"""

import torch

from equilibria import Equilibrium

torch.manual_seed(0)
layer = Equilibrium(torch.nn.RNNCell(64, 64))  # f(z, x) = tanh(W z + U x + b); W is its weight_ih
out = layer(torch.randn(8, 64))
out.z.square().mean().backward()

print("forward: ", out.solution)
print("backward:", out.solution.adjoint[0])
