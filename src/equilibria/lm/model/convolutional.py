"""The convolutional baseline: a TCN (temporal convolutional network) instead of the equilibrium.

Letters: B batch, T time, I width of the input, C channels, K kernel, d dilation.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from equilibria.core.maps import FunctionMap
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.layer import Layer, LayerOutput, check_no_method
from equilibria.layers.sequence import check_streams
from equilibria.lm.model.baseline import BaselineConfig, no_map


@dataclasses.dataclass(frozen=True)
class ConvolutionalConfig(BaselineConfig):
    """The hyper-parameters of a convolutional language model: embedding, TCN, untied head.

    With the defaults, which are those of Bai, Kolter and Koltun (2019, table 1) as far as they are published, it has
    15,550 parameters on ten symbols, not counting the ten numbers, and sees the last 4,591 positions.
    """

    channels: int = 10
    """C, channels of every convolution."""
    levels: int = 8
    """Blocks of two convolutions each; the dilation of block i is 2^i, from i = 0."""
    kernel: int = 10
    """K, taps of every convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("channels", "levels", "kernel")

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


class Convolutional(Layer):
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
        """The outputs [B T C] for input ``x`` after the inputs in the memory, or after zeros."""
        check_no_method(self, method)
        if memory is not None:
            check_streams(len(memory.pasts[0]), x)
        pasts = iter(()) if memory is None else iter(memory.pasts)
        kept: list[Tensor] = []
        z = x.transpose(1, 2)
        for block in self.blocks:
            z = block(z, pasts, kept)
        z = z.transpose(1, 2)
        return LayerOutput(output=z, z=z, memory=ConvolutionalMemory(tuple(kept)), f=FunctionMap(no_map), solution=None)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Tensor | None = None,
        memory: ConvolutionalMemory | None = None,
        warm: bool = False,
    ) -> ConvolutionalMemory | None:
        """``memory`` itself: it holds all that the next position needs.

        Raises:
            ValueError: a padding or a length is given.
        """
        if padding is not None or length is not None:
            raise ValueError(
                "Convolutional has no cache: it cannot skip the padding of prompts of different lengths, and its "
                "memory has one length; give prompts of one length, and no length of the memory."
            )
        return memory


class _Block(nn.Module):
    """Two convolutions and the residual connection around them."""

    def __init__(self, inputs: int, channels: int, kernel: int, *, dilation: int) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(inputs, channels, kernel, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation))
        self.skip = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1)

    def forward(self, x: Float[Tensor, "B I T"], pasts: object, kept: list[Tensor]) -> Float[Tensor, "B C T"]:
        y = x
        for convolution in (self.first, self.second):
            y = torch.relu(_causal(convolution, y, next(pasts, None), kept))  # pyright: ignore
        return torch.relu(y + self.skip(x))


def _causal(convolution: nn.Module, x: Tensor, past: Tensor | None, kept: list[Tensor]) -> Tensor:
    """The convolution over ``x`` after its past; appends the past of the next segment to ``kept``."""
    (kernel,), (dilation,) = convolution.kernel_size, convolution.dilation  # pyright: ignore
    length: int = (kernel - 1) * dilation  # pyright: ignore
    before = x.new_zeros(x.shape[0], x.shape[1], length) if past is None else past.to(x.dtype)
    whole = torch.cat([before, x], dim=-1)
    kept.append(whole[..., whole.shape[-1] - length :].detach())
    return convolution(whole)
