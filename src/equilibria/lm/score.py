"""Evaluation: the score of a model on a text, with the settings on which it depends."""

from __future__ import annotations

import dataclasses
import math

from equilibria.lm.corpora.vocabulary import noun


def measure(unit: str) -> tuple[str, str]:
    """The name of the score that suits the unit of the text, as in the log, and the score in words."""
    if unit in ("word", "bpe"):
        return "perplexity", f"perplexity per {noun(unit)}"
    if unit == "character":
        return "bits", "bits per character"
    return "nats", f"nats per {unit}"


def in_words(value: float, unit: str) -> str:
    """The score of a text in this unit with the digits that mean something, and its measure."""
    digits = f"{value:,.1f}" if value >= 100 else f"{value:.3f}" if value >= 0.1 else f"{value:.2e}"
    return f"{digits} {measure(unit)[1]}"


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


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """The score of a model on a stream, and the cost of its solves. Means are weighted by tokens.

    It prints the score that is usual for the unit of the text: bits per character, or perplexity per word or BPE token.
    """

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
    unit: str = "token"
    """The unit of a token, in which the score is printed; "token" if no vocabulary was given, printed in nats."""

    def __str__(self) -> str:
        """The score in the measure of its unit, what was read, and the cost and success of the solves."""
        key, _ = measure(self.unit)
        parts = [in_words(self.nll_per_token if key == "nats" else getattr(self, key), self.unit)]
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.3f} bits per byte")
        if self.accuracy is not None:
            parts.append(f"{_percent(self.accuracy)} of the answers right")
        setting, forward = self.setting, self.forward
        streams = f"{setting.batch_size} stream" + "s" * (setting.batch_size > 1)
        read = (
            f"{setting.tokens:,} of {setting.stream_tokens:,} tokens, {streams}, segments of {setting.segment_length}"
        )
        solves = (
            ""
            if forward is None
            else (
                f"; {forward['evals']:.1f} evaluations per solve, residual {forward['residual']:.1e}, "
                f"{_percent(forward['converged'])} converged"
            )
        )
        return f"{', '.join(parts)} ({read}{solves})"

    __repr__ = __str__

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


def _percent(share: float) -> str:
    """0.9984 as 99.8 %, rounded down, so that 100 % is all."""
    return f"{math.floor(1000 * share) / 10:g} %"
