"""LanguageConfig: the hyper-parameters of a language model around one cell."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from equilibria.cells.chain import ChainConfig
from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.layers.dropout import check_rate
from equilibria.layers.equilibrium import Equilibrium
from equilibria.layers.explicit import Stack, Unrolled
from equilibria.layers.layer import Layer
from equilibria.lm.model.adaptive import AdaptiveConfig
from equilibria.lm.model.embedding import Dropped, Embedding, Init
from equilibria.lm.model.heads import SoftmaxHead
from equilibria.lm.model.losses import ExtraLosses
from equilibria.lm.model.mixture import MixtureConfig
from equilibria.lm.model.model import LanguageModel

CellConfig = TransformerConfig | ChainConfig | TrellisConfig


@dataclasses.dataclass(frozen=True)
class Explicit:
    """An explicit network in the place of the equilibrium."""

    depth: int = 12
    """L, layers: applications of the cell."""
    tied: bool = True
    """All layers share their weights."""
    memory: Literal["last", "layers"] = "last"
    """What a layer remembers: the last state, as the equilibrium does, or its own input, as untied layers must."""
    checkpoint: bool = False
    """Only the states are kept, and each layer is evaluated again in the backward pass."""
    auxiliary_every: int = 0
    """k: in training layers k, 2k, … give their outputs, for losses whose weight ``ExtraLosses`` has; 0 for none."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"Explicit(depth={self.depth}): a network has at least one layer; try depth=12.")
        if self.memory not in ("last", "layers"):
            raise ValueError(f"Explicit(memory={self.memory!r}): it is 'last' or 'layers'.")
        if not self.tied and self.memory == "last":
            raise ValueError(
                "Explicit(tied=False, memory='last'): layers with weights of their own remember their own inputs; "
                "give memory='layers'."
            )
        if not 0 <= self.auxiliary_every <= self.depth:
            raise ValueError(
                f"Explicit(depth={self.depth}, auxiliary_every={self.auxiliary_every}): it counts layers, 1 … "
                f"{self.depth}, or is 0 for no auxiliary losses; try a fifth of the depth."
            )
        if self.auxiliary_every and self.memory == "layers":
            raise ValueError(
                f"Explicit(auxiliary_every={self.auxiliary_every}, memory='layers'): only a weight-tied network whose "
                "layers remember the last state has auxiliary outputs; give memory='last', or auxiliary_every=0."
            )

    def build(self, cell: CellConfig, depth: int | None = None) -> Unrolled | Stack:
        """The network, with fresh parameters; ``depth`` of its layers are used, all for None."""
        if not self.tied:
            if isinstance(cell, TrellisConfig):
                raise ValueError(
                    "Explicit(tied=False) of a TrellisConfig: a TrellisNet is weight-tied, and that is what makes it "
                    "one; give tied=True."
                )
            return Stack([cell.build() for _ in range(self.depth)], checkpoint=self.checkpoint, depth=depth)
        if self.memory == "layers":
            if isinstance(cell, TrellisConfig) and cell.recurrence == "scan":
                raise ValueError(
                    "Explicit(memory='layers') of a TrellisConfig(recurrence='scan'): what such a layer needs of the "
                    "past is the c that it computes itself, and a layer remembers its input; give recurrence='delayed' "
                    "or memory='last'."
                )
            return Stack([cell.build()] * self.depth, checkpoint=self.checkpoint, depth=depth)
        choices = {"checkpoint": self.checkpoint, "auxiliary_every": self.auxiliary_every}
        return Unrolled(cell.build(), depth or self.depth, **choices)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The hyper-parameters of a ``LanguageModel``: an equilibrium, or an explicit network, of one cell."""

    cell: CellConfig = dataclasses.field(default_factory=TransformerConfig)
    """The cell; its width is that of the embedding, and its outputs are what the head reads."""
    explicit: Explicit | None = None
    """The explicit network that the layer is; None for the equilibrium."""
    adaptive: AdaptiveConfig | None = None
    """Clusters of words by frequency, for embedding and head; None for one table of all words."""
    mixture: MixtureConfig | None = None
    """A mixture of softmaxes for a head; None for one softmax."""
    tied: bool = True
    """Whether the head uses the embedding's table, or one of its own."""
    dropout: float = 0.0
    """Share of channels dropped from the embedding and from the output; the cell has its own rates."""
    input_dropout: float | None = None
    """Another share for the embedding's channels; None for ``dropout``."""
    word_dropout: float = 0.0
    """Share of the words whose embedding is dropped, each at all its occurrences in a segment."""
    output_dropout: Dropped = "channel"
    """What is dropped from the output: the same channels at all positions, or, as in the authors' code, positions."""
    scaled: bool = True
    """Whether embeddings are multiplied by √width."""
    std: float = 0.01
    """Embedding and untied head start with this standard deviation."""
    init: Init = "normal"
    """They start from N(0, std²), or, with "uniform", from U(−√3·std, √3·std)."""
    losses: ExtraLosses = dataclasses.field(default_factory=ExtraLosses)
    """What training adds to the mean of the nats."""

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"LanguageConfig(std={self.std}): a standard deviation is a number from 0 on; try 0.01.")
        for name in ("dropout", "input_dropout", "word_dropout"):
            rate = getattr(self, name)
            if rate is not None:
                check_rate("LanguageConfig", name, rate)
        if self.mixture is not None and self.adaptive is not None:
            raise ValueError(
                "LanguageConfig(adaptive=AdaptiveConfig(…), mixture=MixtureConfig(…)): a head is either cut into "
                "clusters or a mixture over the whole vocabulary; give one of them."
            )
        outputs = outputs_of(self.cell)
        if self.tied and self.mixture is None and outputs != self.cell.width:
            raise ValueError(
                f"LanguageConfig(tied=True) of a cell of width {self.cell.width} with {outputs} outputs: a "
                "tied head reads as many channels as an embedding has; make the two equal, or give tied=False or a "
                "MixtureConfig."
            )

    @property
    def solves(self) -> bool:
        """True if the layer is an equilibrium; an explicit network solves nothing."""
        return self.explicit is None

    def build(
        self,
        vocabulary_size: int,
        *,
        method: Method | None = None,
        eval_stop: Stop | None = None,
        depth: int | None = None,
    ) -> LanguageModel:
        """The model over ``vocabulary_size`` tokens, with fresh parameters.

        Args:
            vocabulary_size: V.
            method: the layer's own way to solve, which a call may replace; None for ``Method()``, and for an explicit
                network, which solves nothing.
            eval_stop: tolerances and budget in evaluation mode; None for those of the method.
            depth: layers of an explicit network that are used if a call does not say otherwise; None for all.
        """
        layer = self._layer(method, eval_stop, depth)
        inside, outputs = self.cell.width, outputs_of(self.cell)
        start = {"std": self.std, "init": self.init}
        read = {"tied": self.tied, "dropout": self.dropout, "output_dropout": self.output_dropout, **start}
        embed = {"word_dropout": self.word_dropout, "scaled": self.scaled}
        share = self.dropout if self.input_dropout is None else self.input_dropout
        if self.adaptive is not None:
            sizes = {"width": inside, "outputs": outputs, "input_dropout": share}
            embedding, head = self.adaptive.build(vocabulary_size, **sizes, **embed, **read)
            return LanguageModel(embedding, layer, head, self.losses)
        sizes = {"vocabulary_size": vocabulary_size, "width": inside}
        embedding = Embedding(**sizes, dropout=share, **embed, **start)
        if self.mixture is None:
            head = SoftmaxHead(vocabulary_size=vocabulary_size, width=outputs, **read)
        else:
            head = self.mixture.build(vocabulary_size, width=inside, outputs=outputs, **read)
        return LanguageModel(embedding, layer, head, self.losses)

    def _layer(self, method: Method | None, eval_stop: Stop | None, depth: int | None) -> Layer:
        """What is between embedding and head, with fresh parameters."""
        if self.losses.auxiliary and (self.explicit is None or not self.explicit.auxiliary_every):
            raise ValueError(
                f"LanguageConfig(losses=ExtraLosses(auxiliary={self.losses.auxiliary})) without layers that have such "
                "a loss; give explicit=Explicit(auxiliary_every=…), or auxiliary=0."
            )
        if self.explicit is not None:
            if method is not None or eval_stop is not None:
                raise ValueError(
                    "LanguageConfig(explicit=Explicit(…)).build(method=…): an explicit network solves nothing; leave "
                    "the method out."
                )
            return self.explicit.build(self.cell, depth)
        if isinstance(self.cell, TransformerConfig) and not self.cell.injection:
            raise ValueError(
                "LanguageConfig(cell=TransformerConfig(injection=False), explicit=None): the equilibrium of a cell "
                "into which nothing is injected does not depend on the text; give injection=True, or Explicit(…)."
            )
        return Equilibrium(self.cell.build(), **vars(method or Method()), eval_stop=eval_stop)


def outputs_of(cell: Any) -> int:
    """Channels that the head reads: all of the state, if a shape of a user's own says nothing else."""
    return getattr(cell, "outputs", cell.width)
