"""A multiscale equilibrium: one state of three resolutions, solved together, that reads handwritten digits.

The state is a dict of tensors, {"fine": [B C 8 8], "coarse": [B C 4 4], "token": [B D]}, and f is a plain ``nn.Module``:
every scale hears itself, the other two, and the finest one the picture (after Bai, Koltun, Kolter, *Multiscale Deep
Equilibrium Models*, 2020). Only the token is read by the classifier. The digits are the 8×8 ones of scikit-learn,
which come with the package; a quarter of them, always the same, is the test.

python examples/multiscale.py                              needs pip install scikit-learn matplotlib
python examples/multiscale.py --epochs 4 --seed 1 --picture residuals.png
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from torch.nn.utils.parametrizations import weight_norm

from equilibria import Equilibrium, Implicit, Stop

FINE, COARSE, TOKEN = 16, 32, 64


class Scales(nn.Module):
    """f(z, x). The products with z are small at the start, and group norm bounds what f returns: f is a contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Conv2d(1, FINE, 3, padding=1)
        self.fine, self.coarse, self.token = _conv(FINE, FINE), _conv(COARSE, COARSE), _linear(TOKEN, TOKEN)
        self.fine_to_coarse, self.coarse_to_fine = _conv(FINE, COARSE, stride=2), _conv(COARSE, FINE, size=1)
        self.coarse_to_token, self.token_to_coarse = _linear(16 * COARSE, TOKEN), _linear(TOKEN, COARSE)
        self.norms = nn.ModuleDict({"fine": nn.GroupNorm(4, FINE), "coarse": nn.GroupNorm(4, COARSE), "token": nn.GroupNorm(4, TOKEN)})

    def forward(self, z: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
        fine, coarse, token = z["fine"], z["coarse"], z["token"]
        heard = {
            "fine": self.picture(x) + self.fine(fine) + interpolate(self.coarse_to_fine(coarse), scale_factor=2),
            "coarse": self.fine_to_coarse(fine) + self.coarse(coarse) + self.token_to_coarse(token)[:, :, None, None],
            "token": self.coarse_to_token(coarse.flatten(1)) + self.token(token),
        }
        return {scale: torch.relu(self.norms[scale](value)) for scale, value in heard.items()}
