"""What training adds to the mean of the nats: activation regularisation, and the losses of layers in between.

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
    """The weights of what training adds to the loss; with all at 0 it adds nothing."""

    activation: float = 0.0
    """α, of the mean square of the output after dropout (Merity, McCann and Socher 2017)."""
    temporal_activation: float = 0.0
    """β, of the mean square of the output's change from position to position, before dropout (the same)."""
    auxiliary: float = 0.0
    """Of the mean nats of each auxiliary output (Bai, Kolter and Koltun 2019, Trellis networks)."""

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
        """α·mean(kept²) + β·mean((output_{t+1} − output_t)²) + auxiliary·Σ_l mean(nats_l), in float32 or wider.

        None where nothing is added; one position alone has no change.

        Args:
            output: at the scored positions.
            kept: the same after dropout.
            auxiliary: the nats of each layer in between, computed only where they have a weight.
        """
        terms: list[Tensor] = []
        if self.activation:
            terms.append(self.activation * widened(kept).square().mean())
        if self.temporal_activation and output.shape[1] > 1:
            terms.append(self.temporal_activation * widened(output).diff(dim=1).square().mean())
        if self.auxiliary:
            terms += [self.auxiliary * nats.mean() for nats in auxiliary]
        return torch.stack(terms).sum() if terms else None


NO_LOSSES = ExtraLosses()
"""Nothing is added."""
