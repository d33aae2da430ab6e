"""A language model: an embedding, a layer (an equilibrium or an explicit stack) and a head.

Letters: B batch, T time, S scored positions, O channels of the layer's output, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.core.solve import Solution
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.layer import Layer, LayerOutput
from equilibria.layers.sequence import Memory
from equilibria.lm.model.adaptive_heads import AdaptiveHead
from equilibria.lm.model.clusters import AdaptiveEmbedding
from equilibria.lm.model.embedding import Embedding
from equilibria.lm.model.generate import generate
from equilibria.lm.model.heads import SoftmaxHead
from equilibria.lm.model.losses import NO_LOSSES, ExtraLosses
from equilibria.lm.model.mixture import MixtureHead


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageOutput:
    """What a language model gives back for one segment."""

    nats: Float[Tensor, "B S"]
    """−log p(target) at each scored position, with gradient; its mean is the loss, nats/ln 2 are bits."""
    memory: Memory
    """For the next segment of the same streams."""
    layer: LayerOutput
    """The layer's own output: z, f and the solution."""
    extra: Float[Tensor, ""] | None = None
    """What training adds to the mean of ``nats``, with gradient; None where that is nothing."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The mean of the nats, and the model's own losses in training; a Jacobian penalty comes on top."""
        loss = self.nats.mean()
        return loss if self.extra is None else loss + self.extra

    @property
    def solution(self) -> Solution | None:
        """How the solve went; None from an explicit stack."""
        return self.layer.solution


class LanguageModel(nn.Module):
    """p(next token | all tokens before), one segment at a time.

    Args:
        embedding: tokens to vectors.
        layer: vectors to states, with memory: ``Equilibrium``, ``Unrolled``, ``Stack``, or a ``Layer`` of your own.
        head: outputs to logits, or to log-probabilities; it receives the embedding, to which it may be tied. Its
            ``dropped`` applies output dropout once, before the logits and the auxiliary losses.
        losses: what training adds to the mean of the nats.
    """

    def __init__(
        self,
        embedding: Embedding | AdaptiveEmbedding,
        layer: Layer,
        head: SoftmaxHead | AdaptiveHead | MixtureHead,
        losses: ExtraLosses = NO_LOSSES,
    ) -> None:
        super().__init__()
        self.embedding, self.layer, self.losses = embedding, layer, losses
        self.head: Any = head  # which takes the embedding of its own kind

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.embedding.vocabulary_size

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        memory: Memory = None,
        *,
        skip: int = 0,
        method: Method | None = None,
        warm: bool = False,
        depth: int | None = None,
        part: BatchSlice | None = None,
    ) -> LanguageOutput:
        """The nats of the targets, under the memory of the previous segment.

        Args:
            tokens: of one segment.
            targets: the token that follows each.
            memory: of the segment before.
            skip: positions, the first ones, that are read and not scored: S = T − skip.
            method: how to solve this time; None for the layer's own way.
            warm: start the solve from what is remembered of the segment before.
            depth: layers of an explicit network that are used this time; None for all.
            part: which rows of the whole batch these are, for random numbers.
        """
        if not 0 <= skip < tokens.shape[1]:
            raise ValueError(
                f"skip={skip} positions of a segment of {tokens.shape[1]}: at least one is scored; give 0 ≤ skip < "
                f"{tokens.shape[1]}."
            )
        options: dict[str, Any] = {"warm": True} if warm else {}
        options |= {name: value for name, value in (("part", part), ("depth", depth)) if value is not None}
        layer = self.layer(self.embedding(tokens, part), memory, method=method, **options)
        output, wanted = layer.output[:, skip:], targets[:, skip:]
        kept = self.head.dropped(output, part)
        nats = self.head.nats(kept, wanted, self.embedding)
        extra = None
        if self.training:
            between = (self.head.dropped(between[:, skip:], part) for between in layer.auxiliary)
            extra = self.losses.of(output, kept, (self.head.nats(h, wanted, self.embedding) for h in between))
        return LanguageOutput(nats=nats, memory=layer.memory, layer=layer, extra=extra)

    def logits(
        self, tokens: Int[Tensor, "B T"], memory: Memory = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ V"], Memory]:
        """The logits after each token, or after the ``last`` one only, and the memory for the tokens that follow.

        An adaptive head and a mixture give log-probabilities.
        """
        out = self.layer(self.embedding(tokens), memory)
        return self.read(out.output[:, -1:] if last else out.output), out.memory

    def read(self, h: Float[Tensor, "B T O"]) -> Float[Tensor, "B T V"]:
        """The logits that the head reads off outputs h of the layer."""
        return self.head(self.head.dropped(h), self.embedding)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: Memory = None,
        warm: bool = False,
    ) -> Memory:
        """A memory for generation, which keeps what is computed of each position; see ``SequenceCell.cache``."""
        return self.layer.cache(batch, length=length, padding=padding, memory=memory, warm=warm)

    def generate(
        self, prompt: Int[Tensor, "B T"] | Sequence[Int[Tensor, " _"]], *, length: int, **choices: Any
    ) -> Int[Tensor, "B L"]:
        """``length`` tokens that continue the prompt; for the choices see ``language.generate``."""
        return generate(self, prompt, length=length, **choices)
