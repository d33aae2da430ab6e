"""LanguageConfig: the hyper-parameters of a language model around one cell."""

from __future__ import annotations

import dataclasses
from typing import Literal

from equilibria.cells import CellConfig
from equilibria.cells.chain import ChainConfig
from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.checks import check_at_least, check_fields
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.layers.dropout import check_rate
from equilibria.layers.equilibrium import Equilibrium, Layer
from equilibria.layers.explicit import Stack, Unrolled
from equilibria.lm.model.adaptive import AdaptiveConfig
from equilibria.lm.model.mixture import MixtureConfig
from equilibria.lm.model.model import ExtraLosses, LanguageModel
from equilibria.lm.model.tables import Dropped, Embedding, Init, SoftmaxHead


@dataclasses.dataclass(frozen=True)
class Explicit:
    """An explicit network instead of the equilibrium."""

    depth: int = 12
    """L, the number of layers: applications of the cell."""
    tied: bool = True
    """True if all layers share their weights."""
    memory: Literal["last", "layers"] = "last"
    """Memory of a layer: the last layer's state, as in the equilibrium, or its own input, as untied layers need."""
    checkpoint: bool = False
    """Keep only the states, and evaluate each layer again in the backward pass."""
    auxiliary_every: int = 0
    """k: in training, layers k, 2k, … have an auxiliary loss, with the weight of ``ExtraLosses``; 0 for none."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.depth < 1:
            raise ValueError(f"Explicit(depth={self.depth}): a network has at least one layer; try depth=12.")
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
        """The network with fresh parameters; a call uses the first ``depth`` of its layers, None for all.

        Raises:
            ValueError: the cell cannot be untied, or cannot remember the inputs of its layers.
        """
        if isinstance(cell, ChainConfig) and cell.memory == "last" and self.memory == "layers":
            raise ValueError(
                "Explicit(memory='layers') of a ChainConfig(memory='last'): the layers remember their own inputs and "
                "the blocks would read the final state; give one kind of memory, ChainConfig(memory='blocks') or "
                "Explicit(memory='last')."
            )
        if not self.tied:
            if isinstance(cell, TrellisConfig):
                raise ValueError(
                    "Explicit(tied=False) of a TrellisConfig: a TrellisNet is weight-tied by definition; give "
                    "tied=True."
                )
            return Stack([cell.build() for _ in range(self.depth)], checkpoint=self.checkpoint, depth=depth)
        if self.memory == "layers":
            if isinstance(cell, TrellisConfig) and cell.recurrence == "scan":
                raise ValueError(
                    "Explicit(memory='layers') of a TrellisConfig(recurrence='scan'): such a layer needs the past "
                    "values of its own c, and memory='layers' stores the layer's input; give recurrence='delayed' or "
                    "memory='last'."
                )
            return Stack([cell.build()] * self.depth, checkpoint=self.checkpoint, depth=depth)
        choices = {"checkpoint": self.checkpoint, "auxiliary_every": self.auxiliary_every}
        return Unrolled(cell.build(), depth or self.depth, **choices)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The hyper-parameters of a ``LanguageModel``: an equilibrium, or an explicit network, of one cell."""

    cell: CellConfig = dataclasses.field(default_factory=TransformerConfig)
    """The cell; its width is that of the embedding, and the head reads its outputs."""
    explicit: Explicit | None = None
    """The explicit network to use as layer; None for the equilibrium."""
    adaptive: AdaptiveConfig | None = None
    """Clusters of words by frequency, for embedding and head; None for one table of all words."""
    mixture: MixtureConfig | None = None
    """A mixture of softmaxes as head; None for one softmax."""
    tied: bool = True
    """True if the head uses the embedding's table, False for a table of its own."""
    dropout: float = 0.0
    """Share of channels dropped from the embedding and from the output; the cell has its own rates."""
    input_dropout: float | None = None
    """Share of channels dropped from the embedding; None for ``dropout``."""
    word_dropout: float = 0.0
    """Share of the words whose embedding is dropped, each at all its occurrences in a segment."""
    output_dropout: Dropped = "channel"
    """Dropout of the output: "channel", the same ones at all positions, or "token", as in the authors' code."""
    scaled: bool = True
    """True if embeddings are multiplied by √width."""
    std: float = 0.01
    """Initial standard deviation of the embedding and of an untied head."""
    init: Init = "normal"
    """Initial distribution: "normal" for N(0, std²), "uniform" for U(−√3·std, √3·std)."""
    losses: ExtraLosses = dataclasses.field(default_factory=ExtraLosses)
    """Weights of the extra losses that training adds to the mean nll."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, std=0)
        for name in ("dropout", "input_dropout", "word_dropout"):
            rate = getattr(self, name)
            if rate is not None:
                check_rate("LanguageConfig", name, rate)
        if self.mixture is not None and self.adaptive is not None:
            raise ValueError(
                "LanguageConfig(adaptive=AdaptiveConfig(…), mixture=MixtureConfig(…)): a head either has "
                "clusters or is a mixture over the whole vocabulary; give one of the two."
            )
        outputs = self.cell.outputs
        if self.tied and self.mixture is None and outputs != self.cell.width:
            raise ValueError(
                f"LanguageConfig(tied=True) of a cell of width {self.cell.width} with {outputs} outputs: a "
                "tied head reads as many channels as an embedding has; make the two equal, or give tied=False or a "
                "MixtureConfig."
            )

    @property
    def solves(self) -> bool:
        """True if the layer is an equilibrium, False if it is an explicit network."""
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
            method: the layer's own method, which a call may replace; None for ``Method()``. An explicit network has
                none.
            eval_stop: tolerances and budget in evaluation mode; None for those of the method.
            depth: number of layers of an explicit network to use, which a call may replace; None for all.

        Raises:
            ValueError: the layer cannot have the given method, auxiliary losses or memory.
        """
        layer = self._layer(method, eval_stop, depth)
        inside, outputs = self.cell.width, self.cell.outputs
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
        """The layer between embedding and head, with fresh parameters."""
        if self.losses.auxiliary and (self.explicit is None or not self.explicit.auxiliary_every):
            raise ValueError(
                f"LanguageConfig(losses=ExtraLosses(auxiliary={self.losses.auxiliary})) without layers that have "
                "auxiliary outputs; give explicit=Explicit(auxiliary_every=…), or auxiliary=0."
            )
        if self.explicit is not None:
            if method is not None or eval_stop is not None:
                raise ValueError(
                    "LanguageConfig(explicit=Explicit(…)).build(method=…): an explicit network solves nothing; "
                    "leave method and eval_stop out."
                )
            return self.explicit.build(self.cell, depth)
        if isinstance(self.cell, TransformerConfig) and not self.cell.injection:
            raise ValueError(
                "LanguageConfig(cell=TransformerConfig(injection=False), explicit=None): without injection "
                "the equilibrium does not depend on the text; give injection=True, or Explicit(…)."
            )
        return Equilibrium(self.cell.build(), **vars(method or Method()), eval_stop=eval_stop)
