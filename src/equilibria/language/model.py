"""A language model: an embedding, a layer (an equilibrium or an explicit stack) and a head.

Letters: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.cells import ChainShape, TransformerShape
from equilibria.equilibrium import Equilibrium, GradientRule, LayerOutput, Memory, Stack, Unrolled
from equilibria.language.adaptive import AdaptiveShape
from equilibria.language.adaptive_heads import AdaptiveHead
from equilibria.language.clusters import AdaptiveEmbedding
from equilibria.language.embeddings import Dropped, Embedding
from equilibria.language.generate import generate
from equilibria.language.heads import SoftmaxHead
from equilibria.solve import Solution, Solver, Stop


@dataclasses.dataclass(frozen=True)
class Explicit:
    """An explicit network in the place of the equilibrium."""

    depth: int = 12
    """L, layers: applications of the cell."""
    tied: bool = True
    """Whether all layers share their weights."""
    memory: Literal["last", "layers"] = "last"
    """What a layer remembers: the last state, as the equilibrium does, or its own input, as untied layers must."""
    checkpoint: bool = False
    """Whether only the states are kept and each layer is evaluated again in the backward pass."""

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

    def build(self, cell: TransformerShape | ChainShape) -> Unrolled | Stack:
        """The network, with fresh parameters."""
        if not self.tied:
            return Stack([cell.build() for _ in range(self.depth)], checkpoint=self.checkpoint)
        if self.memory == "last":
            return Unrolled(cell.build(), self.depth, checkpoint=self.checkpoint)
        return Stack([cell.build()] * self.depth, checkpoint=self.checkpoint)


@dataclasses.dataclass(frozen=True)
class LanguageShape:
    """The hyper-parameters of a ``LanguageModel``: an equilibrium, or an explicit network, of one cell."""

    cell: TransformerShape | ChainShape = dataclasses.field(default_factory=TransformerShape)
    """The cell; its width is the width of embedding and head too."""
    explicit: Explicit | None = None
    """The explicit network that the layer is; None for the equilibrium."""
    adaptive: AdaptiveShape | None = None
    """Clusters of words by frequency, for embedding and head; None for one table of all words."""
    tied: bool = True
    """Whether the head uses the embedding's table, or one of its own."""
    dropout: float = 0.0
    """Share of channels dropped from the embedding and from the output; the cell has its own rates."""
    output_dropout: Dropped = "channel"
    """What is dropped from the output: the same channels at all positions, or, as in the authors' code, positions."""
    std: float = 0.01
    """Embedding and untied head start from N(0, std²); embeddings are then multiplied by √width."""

    def build(
        self,
        vocabulary_size: int,
        *,
        solver: Solver,
        stop: Stop,
        gradient: GradientRule,
        eval_stop: Stop | None = None,
    ) -> LanguageModel:
        """The model over ``vocabulary_size`` tokens, with fresh parameters; an explicit one solves nothing."""
        if self.explicit is None:
            if isinstance(self.cell, TransformerShape) and not self.cell.injection:
                raise ValueError(
                    "LanguageShape(cell=TransformerShape(injection=False), explicit=None): the equilibrium of a cell "
                    "into which nothing is injected does not depend on the text; give injection=True, or Explicit(…)."
                )
            layer = Equilibrium(self.cell.build(), solver, stop, gradient, eval_stop)
        else:
            layer = self.explicit.build(self.cell)
        sizes = {"width": self.cell.width, "dropout": self.dropout, "std": self.std}
        chosen = {"tied": self.tied, "output_dropout": self.output_dropout}
        if self.adaptive is not None:
            embedding, head = self.adaptive.build(vocabulary_size, **sizes, **chosen)
            return LanguageModel(embedding, layer, head)
        embedding = Embedding(vocabulary_size=vocabulary_size, **sizes)
        return LanguageModel(embedding, layer, SoftmaxHead(vocabulary_size=vocabulary_size, **sizes, **chosen))


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageOutput:
    """What a language model gives back for one segment."""

    nats: Float[Tensor, "B T"]
    """−log p(target) at each position, with gradient; its mean is the loss, nats/ln 2 are bits."""
    memory: Memory
    """For the next segment of the same streams."""
    layer: LayerOutput
    """The layer's own output: z, f and the solution."""

    @property
    def solution(self) -> Solution | None:
        """How the solve went; None from an explicit stack."""
        return self.layer.solution


class LanguageModel(nn.Module):
    """p(next token | all tokens before), one segment at a time.

    Args:
        embedding: tokens to vectors.
        layer: vectors to states, with memory: ``Equilibrium``, ``Unrolled``, ``Stack``, or any module that gives a
            ``LayerOutput``.
        head: states to logits, or to log-probabilities; it is handed the embedding, to which it may be tied.
    """

    def __init__(
        self, embedding: Embedding | AdaptiveEmbedding, layer: nn.Module, head: SoftmaxHead | AdaptiveHead
    ) -> None:
        super().__init__()
        self.embedding, self.layer = embedding, layer
        self.head: Any = head  # which takes the embedding of its own kind

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.embedding.vocabulary_size

    def forward(self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], memory: Memory = None) -> LanguageOutput:
        """The nats of the targets, under the memory of the previous segment."""
        out = self.layer(self.embedding(tokens), memory)
        return LanguageOutput(nats=self.head.nats(out.z, targets, self.embedding), memory=out.memory, layer=out)

    def logits(
        self, tokens: Int[Tensor, "B T"], memory: Memory = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ V"], Memory]:
        """The logits after each token, or after the ``last`` one only, and the memory for the tokens that follow.

        An adaptive head gives log-probabilities.
        """
        out = self.layer(self.embedding(tokens), memory)
        return self.read(out.z[:, -1:] if last else out.z), out.memory

    def read(self, z: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The logits that the head reads off states z."""
        return self.head(z, self.embedding)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: Memory = None,
        warm: bool = False,
    ) -> Memory:
        """A memory for generation, which keeps what is computed of each position; see ``Cell.cache``.

        A layer that has none of its own goes on with ``memory``.
        """
        if hasattr(self.layer, "cache"):
            layer: Any = self.layer
            return layer.cache(batch, length=length, padding=padding, memory=memory, warm=warm)
        if padding is not None or length is not None:
            raise ValueError(
                f"{type(self.layer).__name__} has no cache: it cannot tell where rows of different lengths begin, and "
                "its memory is as long as it is; give rows of one length, and no length of the memory."
            )
        return memory

    def generate(
        self, prompt: Int[Tensor, "B T"] | Sequence[Int[Tensor, " _"]], *, length: int, **choices: Any
    ) -> Int[Tensor, "B L"]:
        """``length`` tokens that continue the prompt; for the choices see ``language.generate``."""
        return generate(self, prompt, length=length, **choices)
