"""The map of the solver benchmarks: a causal post-norm transformer block near the edge of contraction.

Width 256, 8 heads, inner 1024, 8 × 128 positions; the gains of weights and input set the spectral radius of the
Jacobian at the equilibrium.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria import Broyden, Stop, solve
from equilibria.cells import TransformerCell, TransformerConfig
from equilibria.stability import spectral_radius

GAINS = {0.92: (1.0, 1.0), 0.95: (1.2, 1.5), 1.05: (1.35, 2.0)}
"""About the mean spectral radius over the samples, and the gains of the weights and of the input that give it."""
BATCH, TIME, WIDTH = 8, 128, 256


def block(
    radius: float, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[TransformerCell, Tensor]:
    """The cell and its input [B T D]; the same numbers in every dtype and on every device."""
    weights, inputs = GAINS[radius]
    torch.manual_seed(0)
    config = TransformerConfig(width=WIDTH, heads=8, inner=1_024, memory=0, weight_norm=False)
    cell = config.build().eval()
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if name == "inject.direction":
                parameter.normal_(std=WIDTH**-0.5)
            elif parameter.ndim == 2:
                parameter.mul_(weights)
    generator = torch.Generator().manual_seed(5)
    x = inputs * torch.randn(BATCH, TIME, WIDTH, generator=generator)
    return cell.to(device, dtype), x.to(device, dtype)


def measured(radius: float) -> float:
    """The mean over the samples of the spectral radius at the equilibrium."""
    cell, x = block(radius)
    with torch.no_grad():
        prepared = cell.prepare(x)
        z = solve(lambda z: cell(z, prepared), torch.zeros_like(x), Broyden(100), Stop(rtol=1e-4, max_evals=300)).z
    return float(spectral_radius(lambda z: cell(z, prepared), z).mean())


class Counted:
    """A function that counts its calls and the seconds that they took."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls, self.seconds = f, 0, 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        began = time.perf_counter()
        result = self.f(*given, **named)
        self.seconds += time.perf_counter() - began
        return result
