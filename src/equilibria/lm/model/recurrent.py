"""The recurrent baselines: PyTorch's LSTM or GRU instead of the equilibrium.

Letters: B batch, T time, I width of the input, H hidden channels.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from equilibria.checks import check_at_least
from equilibria.core.maps import FunctionMap
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.equilibrium import LayerOutput, check_no_method
from equilibria.lm.model.baseline import BaselineConfig, BaselineLayer, check_memory, no_map

Network = Literal["lstm", "gru"]
_NETWORKS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclasses.dataclass(frozen=True)
class RecurrentConfig(BaselineConfig):
    """The hyper-parameters of a recurrent language model: embedding, one layer of LSTM or GRU, untied head.

    The baselines of Bai, Kolter and Koltun (2019, table 1) have 14 thousand parameters: on ten symbols, each read as
    one number, an LSTM of 57 channels has 14,260 and a GRU of 65 channels 13,920, not counting the ten numbers.
    """

    kind: ClassVar = "a recurrent network"
    """The kind of network."""
    network: Network = "lstm"
    """LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho et al. 2014), with PyTorch's gates and initialisation."""
    hidden: int = 57
    """H, channels of the state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, hidden=1)

    @property
    def outputs(self) -> int:
        """H."""
        return self.hidden

    def layer(self) -> Recurrent:
        """The LSTM or GRU, with fresh parameters."""
        return Recurrent(network=self.network, inputs=self.inputs, hidden=self.hidden)


@dataclasses.dataclass(frozen=True, eq=False)
class RecurrentMemory:
    """The state of the streams after their last token, detached."""

    h: Float[Tensor, "B H"]
    """The hidden state."""
    c: Float[Tensor, "B H"] | None
    """The cell state of an LSTM; None for a GRU."""


class Recurrent(BaselineLayer):
    """One layer of ``torch.nn.LSTM`` or ``torch.nn.GRU`` that returns a ``LayerOutput``.

    Weights and biases start from U(±1/√H), including the bias of the forget gate, as in PyTorch. There is no fixed
    point: ``solution`` of the output is None, and calling its ``f`` raises a TypeError.

    Args:
        network: "lstm" or "gru".
        inputs: I, channels of the input.
        hidden: H, channels of the state.
    """

    def __init__(self, *, network: Network, inputs: int, hidden: int) -> None:
        super().__init__()
        self.network = _NETWORKS[network](inputs, hidden, batch_first=True)

    def forward(
        self,
        x: Float[Tensor, "B T I"],
        memory: RecurrentMemory | None = None,
        *,
        method: Method | None = None,
        part: BatchSlice | None = None,
    ) -> LayerOutput:
        """The states [B T H] for input ``x``, starting from the state of the previous segment, or from zero."""
        check_no_method(self, method)
        lstm = isinstance(self.network, nn.LSTM)
        state = None
        if memory is not None:
            shapes = [(self.network.hidden_size,)] * (2 if lstm else 1)
            check_memory(memory, x, kind=RecurrentMemory, shapes=shapes)
            state = self._state(memory)
        z, last = self.network(x, state)
        h, c = last if lstm else (last, None)
        kept = RecurrentMemory(h=h[0].detach(), c=None if c is None else c[0].detach())
        return LayerOutput(output=z, z=z, memory=kept, f=FunctionMap(no_map), solution=None)

    @staticmethod
    def _state(memory: RecurrentMemory) -> Tensor | tuple[Tensor, Tensor]:
        """The memory as PyTorch expects it, with a leading axis for the layers."""
        h = memory.h[None].contiguous()
        return h if memory.c is None else (h, memory.c[None].contiguous())
