"""The convolutional baseline: a TCN (temporal convolutional network) instead of the equilibrium.

Letters: B batch, T time, I width of the input, C channels, K kernel, d dilation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from equilibria.checks import check_at_least
from equilibria.core.maps import FunctionMap
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.equilibrium import LayerOutput, check_no_method
from equilibria.lm.model.baseline import BaselineConfig, BaselineLayer, check_memory, no_map


@dataclasses.dataclass(frozen=True)
class ConvolutionalConfig(BaselineConfig):
    """The hyper-parameters of a convolutional language model: embedding, TCN, untied head.

    With the defaults, which are those of Bai, Kolter and Koltun (2019, table 1) as far as they are published, it has
    15,550 parameters on ten symbols, not counting the ten numbers, and sees the last 4,591 positions.
    """

    kind: ClassVar = "a convolutional network"
    """The kind of network."""
    channels: int = 10
    """C, channels of every convolution."""
    levels: int = 8
    """Blocks of two convolutions each; the dilation of block i is 2^i, from i = 0."""
    kernel: int = 10
    """K, taps of every convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, channels=1, levels=1, kernel=1)

    @property
    def outputs(self) -> int:
        """C."""
        return self.channels

    @property
    def seen(self) -> int:
        """Number of positions that an output depends on, its own included: 1 + 2 (K − 1) (2^levels − 1)."""
        return 1 + 2 * (self.kernel - 1) * (2**self.levels - 1)

    def layer(self) -> Convolutional:
        """The TCN, with fresh parameters."""
        return Convolutional(inputs=self.inputs, channels=self.channels, levels=self.levels, kernel=self.kernel)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvolutionalMemory:
    """The last inputs of every convolution, detached."""

    pasts: tuple[Float[Tensor, "B C P"], ...]
    """P = (K − 1) d inputs of each convolution, in the order of the network; zeros stand for a missing past."""


class Convolutional(BaselineLayer):
    """A TCN that returns a ``LayerOutput``: blocks of two causal, dilated convolutions with a residual connection.

    With x the input of a block, ⋆ a causal convolution with weight norm, and V a matrix where the channels change and
    the identity elsewhere:

        y = ReLU(ReLU(W₂ ⋆ ReLU(W₁ ⋆ x + b₁) + b₂) + V x)

    Reference: Bai, Kolter, Koltun 2018, "An empirical evaluation of generic convolutional and recurrent networks for
    sequence modeling". Deviation: no dropout between the convolutions. There is no fixed point: ``solution`` of the
    output is None, and calling its ``f`` raises a TypeError.

    Args:
        inputs: I, channels of the input.
        channels: C, channels of every convolution.
        levels: number of blocks; the dilation of block i is 2^i.
        kernel: K, taps of every convolution.
    """

    def __init__(self, *, inputs: int, channels: int, levels: int, kernel: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(inputs if level == 0 else channels, channels, kernel, dilation=2**level) for level in range(levels)
        )

    def forward(
        self,
        x: Float[Tensor, "B T I"],
        memory: ConvolutionalMemory | None = None,
        *,
        method: Method | None = None,
        part: BatchSlice | None = None,
    ) -> LayerOutput:
        """The outputs [B T C] of the network, which reads the inputs in the memory, or zeros, and then ``x``."""
        check_no_method(self, method)
        if memory is not None:
            check_memory(memory, x, kind=ConvolutionalMemory, shapes=self._shapes)
        pasts = (None,) * (2 * len(self.blocks)) if memory is None else memory.pasts
        z, kept = x.transpose(1, 2), []
        for block, first, second in zip(self.blocks, pasts[::2], pasts[1::2], strict=True):
            z, new = block(z, first, second)
            kept += new
        z = z.transpose(1, 2)
        kept = ConvolutionalMemory(tuple(kept))
        return LayerOutput(output=z, z=z, memory=kept, f=FunctionMap(no_map), solution=None)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors in a memory, per stream."""
        convolutions = (module for module in self.modules() if isinstance(module, _Causal))
        return [(convolution.in_channels, convolution.past) for convolution in convolutions]


class _Block(nn.Module):
    """Two convolutions and the residual connection around them."""

    def __init__(self, inputs: int, channels: int, kernel: int, *, dilation: int) -> None:
        super().__init__()
        self.first = weight_norm(_Causal(inputs, channels, kernel, dilation=dilation))
        self.second = weight_norm(_Causal(channels, channels, kernel, dilation=dilation))
        self.skip = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1)

    def forward(
        self, x: Float[Tensor, "B I T"], *pasts: Float[Tensor, "B _ P"] | None
    ) -> tuple[Float[Tensor, "B C T"], list[Tensor]]:
        """The block's output y, and the pasts of both convolutions for the next segment."""
        y, kept = x, []
        for convolution, past in zip((self.first, self.second), pasts, strict=True):
            y, new = convolution(y, past)
            y = torch.relu(y)
            kept.append(new)
        return torch.relu(y + self.skip(x)), kept


class _Causal(nn.Conv1d):
    """A convolution whose last tap is the present."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again, as ``nn.Conv1d`` does, and gain and direction from the weight that was drawn."""
        weight = self.weight  # with weight norm a new tensor, and filling it would change no parameter
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if is_parametrized(self, "weight"):
            self.weight = weight
        assert self.bias is not None
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def past(self) -> int:
        """P, the number of inputs before the present one that an output depends on."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "B I T"], past: Float[Tensor, "B I P"] | None
    ) -> tuple[Float[Tensor, "B C T"], Float[Tensor, "B I P"]]:
        """The convolution over x after its past, or after zeros, and the past of the next segment, detached."""
        before = x.new_zeros(x.shape[0], x.shape[1], self.past) if past is None else past.to(x.dtype)
        whole = torch.cat([before, x], dim=-1)
        return super().forward(whole), whole[..., whole.shape[-1] - self.past :].detach()
