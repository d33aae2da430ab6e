"""Extra losses that training adds to the mean nll: activation regularisation, and auxiliary losses of inner layers.

Letters: B batch, T time, O channels of the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.lm.model.embedding import widened


@dataclasses.dataclass(frozen=True)
class ExtraLosses:
    """The weights of the extra losses of training; with all weights 0 training adds nothing to the mean nll."""

    activation: float = 0.0
    """α: weight of the mean square of the output after dropout (Merity, McCann and Socher 2017)."""
    temporal_activation: float = 0.0
    """β: weight of the mean squared change of the output from position to position, before dropout (ibid.)."""
    auxiliary: float = 0.0
    """Weight of the mean nll of each auxiliary output (Bai, Kolter and Koltun 2019, Trellis networks)."""

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            if not weight >= 0:
                raise ValueError(f"ExtraLosses({name}={weight}): a weight is at least 0; try 0 for none.")

    def of(
        self,
        output: Float[Tensor, "B T O"],
        kept: Float[Tensor, "B T O"],
        auxiliary: Iterable[Float[Tensor, "B T"]] = (),
    ) -> Float[Tensor, ""] | None:
        """α·mean(kept²) + β·mean((output_{t+1} − output_t)²) + auxiliary·Σ_l mean(nll_l), in float32 or wider.

        None if there is no term: a weight of 0 has none, and a single position has no change.

        Args:
            output: the output at the scored positions.
            kept: the output after dropout.
            auxiliary: the nll of each inner layer; the iterator is not read if its weight is 0.
        """
        terms: list[Tensor] = []
        if self.activation:
            terms.append(self.activation * widened(kept).square().mean())
        if self.temporal_activation and output.shape[1] > 1:
            terms.append(self.temporal_activation * widened(output).diff(dim=1).square().mean())
        if self.auxiliary:
            terms += [self.auxiliary * nll.mean() for nll in auxiliary]
        return torch.stack(terms).sum() if terms else None


NO_LOSSES = ExtraLosses()
"""No extra losses."""
