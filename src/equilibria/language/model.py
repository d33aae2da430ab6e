"""A language model: an embedding, a layer (an equilibrium or an explicit stack) and a head.

Letters: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.cells.transformer import TransformerShape
from equilibria.equilibrium import Equilibrium, GradientRule, LayerOutput, Memory, Stack
from equilibria.language.embeddings import Embedding
from equilibria.language.generate import generate
from equilibria.language.heads import SoftmaxHead
from equilibria.solve import Solution, Solver, Stop


@dataclasses.dataclass(frozen=True)
class LanguageShape:
    """The hyper-parameters of a ``LanguageModel`` with an equilibrium layer."""

    cell: TransformerShape = dataclasses.field(default_factory=TransformerShape)
    """The cell; its width is the width of embedding and head too."""
    tied: bool = True
    """Whether the head uses the embedding's table, or one of its own."""
    dropout: float = 0.0
    """Share of channels dropped from the embedding and from the output; the cell has its own rates."""
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
        """The model over ``vocabulary_size`` tokens, with fresh parameters."""
        width = self.cell.width
        sizes = {"width": width, "vocabulary_size": vocabulary_size, "dropout": self.dropout, "std": self.std}
        layer = Equilibrium(self.cell.build(), solver, stop, gradient, eval_stop)
        return LanguageModel(Embedding(**sizes), layer, SoftmaxHead(**sizes, tied=self.tied))


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
        layer: vectors to states, with memory: ``Equilibrium`` or ``Stack``.
        head: states to logits; it is handed the embedding, to which it may be tied.
    """

    def __init__(self, embedding: Embedding, layer: Equilibrium | Stack, head: SoftmaxHead) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = embedding, layer, head

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return len(self.embedding.weight)

    def forward(self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], memory: Memory = None) -> LanguageOutput:
        """The nats of the targets, under the memory of the previous segment."""
        out = self.layer(self.embedding(tokens), memory)
        return LanguageOutput(nats=self.head.nats(out.z, targets, self.embedding), memory=out.memory, layer=out)

    def logits(self, tokens: Int[Tensor, "B T"], memory: Memory = None) -> tuple[Float[Tensor, "B T V"], Memory]:
        """The logits after each token, and the memory for the tokens that follow."""
        out = self.layer(self.embedding(tokens), memory)
        return self.read(out.z), out.memory

    def read(self, z: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The logits that the head reads off states z."""
        return self.head(z, self.embedding)

    def generate(self, prompt: Int[Tensor, "B T"], *, length: int, **choices: Any) -> Int[Tensor, "B L"]:
        """``length`` tokens that continue the prompt; for the choices see ``language.generate``."""
        return generate(self, prompt, length=length, **choices)
