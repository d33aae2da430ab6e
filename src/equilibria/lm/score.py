"""Evaluation: the score of a model on a text, with the settings on which it depends."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings on which a score depends, besides weights and text; report them with every perplexity."""

    batch_size: int
    """Streams that were read side by side; each begins without a past."""
    segment_length: int
    """Tokens of each stream per solve."""
    overlap: int
    """Tokens that a segment shares with the previous one, instead of a memory; 0 if the memory was carried."""
    max_segments: int | None
    """Number of segments to which the evaluation was limited; None for all."""
    memory_length: int | None
    """Past positions that the cell remembers; 0 with overlap, None for a layer whose memory has no length."""
    max_evals: int | None
    """Budget of a solve in evaluations of f; None for a layer that solves nothing."""
    rtol: float | None
    """Relative tolerance of a solve; None for a layer that solves nothing."""
    atol: float | None
    """Absolute tolerance of a solve, or None likewise; with both 0 the budget is the depth of a network."""
    tokens: int
    """Tokens that were scored."""
    stream_tokens: int
    """Tokens in the stream."""
    official: bool = False
    """True if the tokens were divided into rows before the targets were taken, as in published scores."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The score of a model on a stream, and the cost of its solves. Means are weighted by tokens."""

    nll_per_token: float
    """Mean negative log-likelihood per token, in nats."""
    setting: Setting
    """The settings of the measurement."""
    forward: dict[str, float] | None
    """Means over the solves: evals, residual (relative), converged (share of samples), steps; None without solves."""
    accuracy: float | None
    """Share of right answers of a synthetic task: of ``Stream.answers`` in each episode; None for text."""
    seconds: float
    """Duration of the evaluation."""
    bytes: int | None = None
    """UTF-8 bytes of the text that was scored; None for a synthetic task, or if no vocabulary was given.

    The bytes are those of the text that ``Vocabulary.decode`` returns, which with characters and BPE tokens is the text
    of the corpus, byte for byte. Of words each counts its own bytes and the one space before it, unless it begins a
    line; ``<eos>`` counts one, for the line feed; ``<unk>`` counts five, since that is the text which was predicted,
    whatever stood there before.
    """

    @property
    def tokens(self) -> int:
        """Tokens that were scored."""
        return self.setting.tokens

    @property
    def bits(self) -> float:
        """Bits per token."""
        return self.nll_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """The bits of all tokens over the bytes of their text, which compares vocabularies; None without bytes."""
        return self.bits * self.tokens / self.bytes if self.bytes else None

    @property
    def perplexity(self) -> float:
        """exp(nll per token), for at most 700 nats."""
        return math.exp(min(self.nll_per_token, 700.0))

    @property
    def evals(self) -> float | None:
        """Mean number of evaluations of f per segment; None without solves."""
        return self.forward["evals"] if self.forward else None

    @property
    def residual(self) -> float | None:
        """Mean relative residual; None without solves."""
        return self.forward["residual"] if self.forward else None

    @property
    def converged(self) -> float | None:
        """Share of samples that met the tolerance; None without solves."""
        return self.forward["converged"] if self.forward else None
