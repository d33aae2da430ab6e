"""BaselineConfig: the part that language models without an equilibrium share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from equilibria.checks import check_at_least, check_fields
from equilibria.core.stop import Stop
from equilibria.core.trees import tensors_in
from equilibria.fixed_point import Method
from equilibria.layers.dropout import check_rate
from equilibria.layers.equilibrium import Layer
from equilibria.layers.sequence import check_streams
from equilibria.lm.model.model import LanguageModel
from equilibria.lm.model.tables import Embedding, SoftmaxHead


@dataclasses.dataclass(frozen=True)
class BaselineConfig(ABC):
    """The hyper-parameters of a language model without an equilibrium: embedding, one network, untied head.

    The baselines of Bai, Kolter and Koltun (2019, table 1) read each symbol as one number. With ``inputs=1`` that
    number is learned, one per symbol.
    """

    kind: ClassVar[str]
    """The kind of network, with its article, for messages."""
    inputs: int = 1
    """I, width of the embedding."""
    dropout: float = 0.0
    """Share of channels dropped from the embedding and from the output."""
    std: float = 1.0
    """The embedding starts from N(0, std²) and is multiplied by √inputs; the head from N(0, 1/outputs)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, inputs=1, std=0)
        check_rate(type(self).__name__, "dropout", self.dropout)
        if self.dropout and self.inputs == 1:
            raise ValueError(
                f"{type(self).__name__}(inputs=1, dropout={self.dropout}): dropping the only channel of the embedding "
                "leaves nothing to read; try dropout=0, or wider inputs."
            )

    @property
    def solves(self) -> bool:
        """False: there is no equilibrium."""
        return False

    @property
    def explicit(self) -> None:
        """None: it is not an explicit network of a cell."""
        return None

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Channels of the network's output."""

    @abstractmethod
    def layer(self) -> Layer:
        """The network between embedding and head, with fresh parameters."""

    def build(
        self,
        vocabulary_size: int,
        *,
        method: Method | None = None,
        eval_stop: Stop | None = None,
        depth: int | None = None,
    ) -> LanguageModel:
        """The model over ``vocabulary_size`` tokens, with fresh parameters.

        Raises:
            ValueError: a method, a stop or a depth is given; such a network has none of them.
        """
        if not method is eval_stop is depth is None:
            raise ValueError(
                f"{type(self).__name__}.build(method=…, depth=…): this network solves nothing and has one depth; leave "
                "them out."
            )
        embedding = Embedding(vocabulary_size=vocabulary_size, width=self.inputs, dropout=self.dropout, std=self.std)
        head = SoftmaxHead(
            vocabulary_size=vocabulary_size,
            width=self.outputs,
            tied=False,
            dropout=self.dropout,
            std=self.outputs**-0.5,
        )
        return LanguageModel(embedding, self.layer(), head)


class BaselineLayer(Layer):
    """A network that keeps its memory from token to token by itself, and solves nothing."""

    def cache(
        self, batch: int, *, length: int | None = None, padding: Any = None, memory: Any = None, warm: bool = False
    ) -> Any:
        """``memory`` itself: it holds all that the next position needs.

        Raises:
            ValueError: a padding or a length is given.
        """
        if padding is not None or length is not None:
            raise ValueError(
                f"{type(self).__name__} has no cache: it cannot skip the padding of prompts of different lengths, and "
                "its memory has one size; give prompts of one length, and no length of the memory."
            )
        return memory


def check_memory(memory: Any, x: Tensor, *, kind: type, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise a ValueError unless the network itself has returned this memory, for the streams of ``x``.

    Args:
        memory: the memory.
        x: the input.
        kind: the type of the network's memories.
        shapes: the shapes of the tensors in them, without the batch axis.
    """
    tensors = tensors_in(memory)
    found = [tuple(tensor.shape[1:]) for tensor in tensors]
    if not isinstance(memory, kind) or found != list(shapes):
        raise ValueError(
            f"the memory is a {type(memory).__name__} with tensors of the shapes {found} per stream, and this network "
            f"reads a {kind.__name__} with {list(shapes)}; a memory continues only the network that returned it, so "
            "pass memory=None, or load that network."
        )
    check_streams(len(tensors[0]), x)


def no_map(z: Tensor) -> NoReturn:
    """The ``LayerOutput.f`` of a network without a fixed point.

    Raises:
        TypeError: always.
    """
    raise TypeError(
        f"this network has no map to apply to a state of shape {tuple(z.shape)}: only an equilibrium has a "
        "Jacobian, a spectral radius and a penalty; leave these out for this model."
    )
