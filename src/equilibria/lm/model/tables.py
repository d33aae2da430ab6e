"""The tables of a vocabulary: the embedding that reads tokens, and the heads that score them.

Letters: B batch, T time, O channels of the layer's output, D width, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Generic, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.layers.dropout import BatchSlice, check_rate, dropout_mask, masked
from equilibria.layers.linear import linear, with_own_weights

Dropped = Literal["channel", "token"]
Init = Literal["normal", "uniform"]


def started(tensor: Tensor, *, std: float, init: Init = "normal") -> Tensor:
    """The tensor, filled in place from N(0, std²), or from U(−√3·std, √3·std), which has the same variance.

    Raises:
        ValueError: ``init`` is neither "normal" nor "uniform".
    """
    if init not in ("normal", "uniform"):
        raise ValueError(f"init={init!r}: tables start from a 'normal' or a 'uniform' distribution; try 'normal'.")
    bound = math.sqrt(3) * std
    return nn.init.normal_(tensor, std=std) if init == "normal" else nn.init.uniform_(tensor, -bound, bound)


def dropped(
    x: Float[Tensor, "B T D"],
    *,
    rate: float,
    training: bool,
    kind: Dropped = "channel",
    part: BatchSlice | None = None,
) -> Float[Tensor, "B T D"]:
    """x ⊙ mask; in training the mask is 0 for a random share of the channels, or of the positions.

    Args:
        x: vectors of B streams.
        rate: the share that is dropped, 0 ≤ rate < 1; the rest is multiplied by 1/(1 − rate).
        training: the module's mode; in evaluation nothing is dropped.
        kind: "channel" for masks of shape (B, 1, D), "token" for masks of shape (B, T, 1).
        part: position of this batch inside a larger one; see ``BatchSlice``.
    """
    batch, time, width = x.shape
    shape = (batch, 1, width) if kind == "channel" else (batch, time, 1)
    return masked(x, dropout_mask(shape, rate=rate, training=training, like=x, part=part))


def words_dropped(
    rows: Float[Tensor, "*tokens D"],
    tokens: Int[Tensor, "*tokens"],
    *,
    rate: float,
    training: bool,
    vocabulary_size: int,
) -> Float[Tensor, "*tokens D"]:
    """The vectors with, in training, those of a random share of all words set to 0 (Gal and Ghahramani 2016, §4.2).

    A word is dropped at all its occurrences or at none. One number per word is drawn and looked up, so the table is
    neither changed nor copied; Merity, Keskar and Socher (2017, §4.3) copy it.

    Args:
        rows: the vectors of the tokens.
        tokens: the tokens.
        rate: the share that is dropped, 0 ≤ rate < 1; the rest is multiplied by 1/(1 − rate).
        training: the module's mode; in evaluation nothing is dropped.
        vocabulary_size: V, number of words.
    """
    mask = dropout_mask((vocabulary_size, 1), rate=rate, training=training, like=rows, rows=None)
    return masked(rows, None if mask is None else functional.embedding(tokens, mask))


def widened(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x in float32 or wider, for losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Embedding(nn.Embedding):
    """Rows of a learned table times √D (Vaswani et al. 2017, §3.4), with whole words and whole channels dropped.

    Args:
        vocabulary_size: V, rows of the table.
        width: D, width of the vectors.
        dropout: share of the channels that is dropped, the same channels at all positions of a segment.
        std: initial standard deviation of the table.
        word_dropout: share of the words that is dropped, each at all its occurrences; a tied head still sees them.
        scaled: multiply the vectors by √D.
        init: draw the table from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        dropout: float = 0.0,
        std: float = 0.01,
        word_dropout: float = 0.0,
        scaled: bool = True,
        init: Init = "normal",
    ) -> None:
        check_rate("Embedding", "dropout", dropout)
        check_rate("Embedding", "word_dropout", word_dropout)
        if vocabulary_size < 1:
            raise ValueError(f"Embedding(vocabulary_size={vocabulary_size}): a vocabulary has at least one token.")
        super().__init__(vocabulary_size, width, _weight=torch.empty(vocabulary_size, width))
        self.dropout, self.word_dropout, self.scale = dropout, word_dropout, math.sqrt(width) if scaled else 1.0
        self.std = std
        self.init: Init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table again."""
        started(self.weight, std=self.std, init=self.init)

    def forward(self, input: Int[Tensor, "B T"], part: BatchSlice | None = None) -> Float[Tensor, "B T D"]:
        """E[input]·√D ⊙ masks, where ``input`` are tokens; ``part``: see ``BatchSlice``."""
        tokens, rows = input, functional.embedding(input, self.weight) * self.scale
        choices = {"rate": self.word_dropout, "training": self.training, "vocabulary_size": self.vocabulary_size}
        return dropped(words_dropped(rows, tokens, **choices), rate=self.dropout, training=self.training, part=part)

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return len(self.weight)

    def extra_repr(self) -> str:
        """Sizes and dropout rates."""
        sizes = f"vocabulary_size={self.vocabulary_size}, width={self.weight.shape[1]}"
        return f"{sizes}, dropout={self.dropout}, word_dropout={self.word_dropout}"


Table = TypeVar("Table", bound=nn.Module)
"""The kind of embedding to which a head may be tied."""


class Head(nn.Module, ABC, Generic[Table]):
    """The interface of a head. ``dropped`` is applied first, once, and its result goes to ``logits`` and ``nll``.

    Args:
        dropout: share of h that is dropped.
        output_dropout: "channel" drops the same channels at all positions of a segment; "token" drops all channels of
            some positions, as the code of Bai, Kolter and Koltun (2019) does with the output of its Transformer.
    """

    def __init__(self, *, dropout: float, output_dropout: Dropped = "channel") -> None:
        super().__init__()
        owner = type(self).__name__
        check_rate(owner, "dropout", dropout)
        if output_dropout not in ("channel", "token"):
            raise ValueError(
                f"{owner}(output_dropout={output_dropout!r}): output_dropout is 'channel', which drops the same "
                "channels at all positions, or 'token', which drops whole positions; try 'channel'."
            )
        self.dropout = dropout
        self.output_dropout: Dropped = output_dropout

    def dropped(self, h: Float[Tensor, "B T O"], part: BatchSlice | None = None) -> Float[Tensor, "B T O"]:
        """h ⊙ mask, the input of ``logits`` and ``nll``; in evaluation h itself. ``part``: see ``BatchSlice``."""
        with_own_weights(self)  # a head is not called, and this is the first of its methods that is
        return dropped(h, rate=self.dropout, training=self.training, kind=self.output_dropout, part=part)

    @abstractmethod
    def logits(self, h: Float[Tensor, "*shape O"], embedding: Table) -> Float[Tensor, "*shape V"]:
        """Logits, or log-probabilities, of the next token; a tied head reads the tables of ``embedding``."""

    @abstractmethod
    def nll(
        self,
        h: Float[Tensor, "B T O"],
        targets: Int[Tensor, "B T"],
        embedding: Table,
        part: BatchSlice | None = None,
    ) -> Float[Tensor, "B T"]:
        """−log p(target) at each position, in nats, in float32 or wider.

        ``part`` is for heads that draw random numbers of their own, see ``BatchSlice``; it is given if there is one.
        """

    def extra_repr(self) -> str:
        """Dropout rate and kind."""
        return f"dropout={self.dropout}, output_dropout={self.output_dropout!r}"


LOGITS = 2**22
"""At most this many logits are computed at a time, so that few of them are in memory at once."""


class TableHead(Head[Embedding], ABC):
    """A head with one row of a table and one bias per token, whose table may be the embedding's."""

    weight: nn.Parameter | None
    """The head's own table; None if it is tied."""
    bias: nn.Parameter

    def _add_table(self, vocabulary_size: int, width: int, *, tied: bool, std: float, init: Init) -> None:
        """Add the table, unless it is tied, and the bias; a subclass calls it once, at the end of ``__init__``."""
        self.std = std
        self.init: Init = init
        self.weight = None if tied else nn.Parameter(torch.empty(vocabulary_size, width))
        self.bias = nn.Parameter(torch.empty(vocabulary_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an untied table again, and set the bias to 0; modules inside the head draw their own parameters."""
        if self.weight is not None:
            started(self.weight, std=self.std, init=self.init)
        nn.init.zeros_(self.bias)

    def _scores(self, h: Float[Tensor, "*shape D"], embedding: Embedding) -> Float[Tensor, "*shape V"]:
        """The product of h with the head's table, or with the embedding's, plus the bias."""
        return linear(h, embedding.weight if self.weight is None else self.weight, self.bias)


class SoftmaxHead(TableHead):
    """logits = W h + b over the whole vocabulary.

    A tied head has no W: it reads the embedding's table at each call (Press and Wolf 2017). So there is one Parameter,
    with one gradient and one entry in the state dict, also after moving, casting, copying or sharding the model.

    Args:
        width: D, channels of the state.
        vocabulary_size: V, logits.
        tied: W is the table of the embedding that each call receives.
        dropout: share of h that is dropped.
        output_dropout: "channel" or "token", as in ``Head``.
        std: initial standard deviation of an untied W; b starts at 0.
        init: draw an untied W from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
    """

    def __init__(
        self,
        *,
        width: int,
        vocabulary_size: int,
        tied: bool = True,
        dropout: float = 0.0,
        output_dropout: Dropped = "channel",
        std: float = 0.01,
        init: Init = "normal",
    ) -> None:
        super().__init__(dropout=dropout, output_dropout=output_dropout)
        self._add_table(vocabulary_size, width, tied=tied, std=std, init=init)

    def logits(self, h: Float[Tensor, "*shape D"], embedding: Embedding) -> Float[Tensor, "*shape V"]:
        """W h + b."""
        return self._scores(h, embedding)

    def nll(
        self,
        h: Float[Tensor, "B T D"],
        targets: Int[Tensor, "B T"],
        embedding: Embedding,
        part: BatchSlice | None = None,
    ) -> Float[Tensor, "B T"]:
        """−log p(target) at each position, in nats, in float32 or wider."""
        positions = max(1, LOGITS // len(self.bias))
        pieces = zip(h.flatten(0, 1).split(positions), targets.flatten().split(positions), strict=True)
        nll = [
            functional.cross_entropy(widened(self.logits(states, embedding)), words, reduction="none")
            for states, words in pieces
        ]
        return torch.cat(nll).view(targets.shape)

    def extra_repr(self) -> str:
        """Sizes, tying and dropout."""
        return f"vocabulary_size={len(self.bias)}, tied={self.weight is None}, {super().extra_repr()}"
