"""A language model: an embedding, a layer (an equilibrium or an explicit stack) and a head; and its losses.

Letters: B batch, T time, S scored positions, O channels of the layer's output, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equilibria.checks import check_at_least, check_fields
from equilibria.core.graph import refused_if_untracked
from equilibria.core.solve import Solution
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.equilibrium import Layer, LayerOutput
from equilibria.layers.sequence import Memory
from equilibria.lm.model.clusters import AdaptiveEmbedding
from equilibria.lm.model.generate import generate
from equilibria.lm.model.tables import Embedding, Head, widened

Table = TypeVar("Table", bound=Embedding | AdaptiveEmbedding)
"""The kind of embedding; the head takes the same kind."""


@dataclasses.dataclass(frozen=True)
class ExtraLosses:
    """The weights of the extra losses of training; with all weights 0 training adds nothing to the mean nll."""

    activation: float = 0.0
    """α: weight of the mean square of the output after dropout (Merity, McCann and Socher 2017)."""
    temporal_activation: float = 0.0
    """β: weight of the mean squared change of the output from position to position, before dropout (ibid.)."""
    auxiliary: float = 0.0
    """Weight of the mean nll of each auxiliary output (Bai, Kolter and Koltun 2019, Trellis networks)."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, activation=0, temporal_activation=0, auxiliary=0)

    def of(
        self,
        output: Float[Tensor, "B T O"],
        kept: Float[Tensor, "B T O"],
        auxiliary: Iterable[Float[Tensor, "B T"]] = (),
    ) -> Float[Tensor, ""] | None:
        """α·mean(kept²) + β·mean((output_{t+1} − output_t)²) + auxiliary·Σ_l mean(nll_l), in float32 or wider.

        None if there is no term: a weight of 0 has none, and a single position has no change.

        Args:
            output: the output at the scored positions.
            kept: the output after dropout.
            auxiliary: the nll of each inner layer; the iterator is not read if its weight is 0.
        """
        terms: list[Tensor] = []
        if self.activation:
            terms.append(self.activation * widened(kept).square().mean())
        if self.temporal_activation and output.shape[1] > 1:
            terms.append(self.temporal_activation * widened(output).diff(dim=1).square().mean())
        if self.auxiliary:
            terms += [self.auxiliary * nll.mean() for nll in auxiliary]
        return torch.stack(terms).sum() if terms else None


NO_LOSSES = ExtraLosses()
"""No extra losses."""


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageOutput:
    """The result of a language model for one segment."""

    nll: Float[Tensor, "B S"]
    """−log p(target) at each scored position, in nats, with gradient; nll/ln 2 are bits."""
    memory: Memory
    """The memory for the next segment of the same streams."""
    layer: LayerOutput
    """The layer's own output: z, f and the solution."""
    extra: Float[Tensor, ""] | None = None
    """The weighted sum of the model's extra losses, with gradient; None in evaluation and if it has none."""

    def __post_init__(self) -> None:
        for name in ("nll", "extra"):
            object.__setattr__(self, name, refused_if_untracked(getattr(self, name)))

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The mean nll plus ``extra``, in nats; the Jacobian penalty is not included."""
        loss = self.nll.mean()
        return loss if self.extra is None else loss + self.extra

    @property
    def solution(self) -> Solution | None:
        """The result of the solve; None from an explicit network."""
        return self.layer.solution


class LanguageModel(nn.Module, Generic[Table]):
    """p(next token | all tokens before), one segment at a time.

    Args:
        embedding: tokens to vectors.
        layer: vectors to states, with memory: ``Equilibrium``, ``Unrolled``, ``Stack``, or a ``Layer`` of your own.
        head: outputs to logits, or to log-probabilities; it receives the embedding, to which it may be tied. Its
            ``dropped`` applies output dropout once, before the logits and the auxiliary losses.
        losses: weights of the extra losses that training adds to the mean nll.
    """

    def __init__(self, embedding: Table, layer: Layer, head: Head[Table], losses: ExtraLosses = NO_LOSSES) -> None:
        super().__init__()
        self.embedding, self.layer, self.head, self.losses = embedding, layer, head, losses

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
        """The nll of the targets, given the memory of the previous segment.

        Args:
            tokens: one segment of B streams.
            targets: the token that follows each of ``tokens``.
            memory: the ``memory`` of the previous output; None where the streams begin.
            skip: number of positions at the beginning that are read but not scored: S = T − skip.
            method: the method of this solve; None for the layer's own.
            warm: start the solve from the last state in the memory.
            depth: number of layers of an explicit network to use; None for all.
            part: position of this batch inside a larger one, for random numbers; see ``BatchSlice``.

        Raises:
            ValueError: ``skip`` leaves no position to score.
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
        kept, drawn = self.head.dropped(output, part), {} if part is None else {"part": part}
        nll = self.head.nll(kept, wanted, self.embedding, **drawn)
        extra = None
        if self.training:
            between = (self.head.dropped(between[:, skip:], part) for between in layer.auxiliary)
            extra = self.losses.of(output, kept, (self.head.nll(h, wanted, self.embedding, **drawn) for h in between))
        return LanguageOutput(nll=nll, memory=layer.memory, layer=layer, extra=extra)

    def logits(
        self, tokens: Int[Tensor, "B T"], memory: Memory = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ V"], Memory]:
        """Logits after each token, or after the ``last`` one only, and the memory for the tokens that follow.

        Adaptive heads and mixtures return log-probabilities as logits.
        """
        out = self.layer(self.embedding(tokens), memory)
        return self.read(out.output[:, -1:] if last else out.output), out.memory

    def read(self, h: Float[Tensor, "B T O"]) -> Float[Tensor, "B T V"]:
        """The head's logits for outputs h of the layer."""
        return self.head.logits(self.head.dropped(h), self.embedding)

    def cache(
        self,
        batch: int,
        *,
        length: int | None = None,
        padding: Int[Tensor, " B"] | None = None,
        memory: Memory = None,
        warm: bool = False,
    ) -> Memory:
        """A memory for generation that stores the results of past positions; see ``SequenceCell.cache``."""
        return self.layer.cache(batch, length=length, padding=padding, memory=memory, warm=warm)

    def generate(
        self, prompt: Int[Tensor, "B T"] | Sequence[Int[Tensor, " _"]], *, length: int, **choices: Any
    ) -> Int[Tensor, "B L"]:
        """Up to ``length`` tokens that continue the prompt; the options are those of ``lm.model.generate``."""
        return generate(self, prompt, length=length, **choices)
