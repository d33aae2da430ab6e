"""Norms of rows that are accurate even where squares under- or overflow.

Letters: B batch, N flattened state.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def row_norm(x: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Euclidean norm of each row, accurate even where squares under- or overflow (1e-30 in float32)."""
    if x.is_cuda and x.dtype == torch.float32:  # float64 needs no look at the numbers, which would wait for the device
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).to(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=1)
    if x.shape[1] == 1 or x.device.type != "cpu" or not len(x):
        return norm
    small = _SMALL[x.dtype]
    least, most = (float(bound) for bound in norm.detach().aminmax())
    if least > small and most < math.inf:  # False if a number is NaN
        return norm
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    precise = scale[:, 0] * torch.linalg.vector_norm(x / scale, dim=1)
    return torch.where((norm > small) & torch.isfinite(norm), norm, precise)


_SMALL = {
    dtype: math.sqrt(torch.finfo(dtype).tiny / torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64)
}
"""A computed norm below this may come from squares that have lost digits."""
