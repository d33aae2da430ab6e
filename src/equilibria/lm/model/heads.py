"""States to log-probabilities of the next token.

Letters: B batch, T time, O channels of the layer's output, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.layers.dropout import BatchSlice, check_rate
from equilibria.lm.model.embedding import Dropped, Embedding, Init, dropped, started, widened


class Head(nn.Module):
    """What every head does first: dropout of the outputs that it reads.

    Args:
        dropout: share of h that is dropped.
        output_dropout: what of h: a "channel", the same ones at all positions of a segment, or a "token", which loses
            all its channels (what the code of Bai, Kolter and Koltun 2019 does to the output of its Transformer).
    """

    def __init__(self, *, dropout: float, output_dropout: Dropped) -> None:
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
        """h ⊙ mask: what ``forward`` and ``nats`` are given; in evaluation h itself."""
        return dropped(h, rate=self.dropout, training=self.training, kind=self.output_dropout, part=part)

    def extra_repr(self) -> str:
        """The rate."""
        return f"dropout={self.dropout}, output_dropout={self.output_dropout!r}"


LOGITS = 2**22
"""Logits that are computed at a time: of them all, training keeps log-probabilities alone."""


class SoftmaxHead(Head):
    """logits = W h + b over the whole vocabulary, from an output that ``dropped`` has masked.

    A tied head has no W: it reads the embedding's table at each call (Press and Wolf 2017), so there is one Parameter,
    with one gradient and one entry in the state dict, whatever is moved, cast, copied or sharded.

    Args:
        width: D, channels of the state.
        vocabulary_size: V, logits.
        tied: W is the table of the embedding that is handed to each call.
        dropout: share of h that is dropped.
        output_dropout: what of h, as in ``Head``.
        std: an untied W starts with this standard deviation; b starts at 0.
        init: whether it does from N(0, std²) or from U(±√3·std).
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
        self.weight = None if tied else nn.Parameter(started(torch.empty(vocabulary_size, width), std=std, init=init))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, h: Float[Tensor, "*shape D"], embedding: Embedding) -> Float[Tensor, "*shape V"]:
        """The logits."""
        weight = embedding.weight if self.weight is None else self.weight
        return functional.linear(h, weight, self.bias)

    def nats(
        self, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], embedding: Embedding
    ) -> Float[Tensor, "B T"]:
        """−log p(target), in float32 or wider, position by position."""
        positions = max(1, LOGITS // len(self.bias))
        pieces = zip(h.flatten(0, 1).split(positions), targets.flatten().split(positions), strict=True)
        nats = [
            functional.cross_entropy(widened(self(states, embedding)), words, reduction="none")
            for states, words in pieces
        ]
        return torch.cat(nats).view(targets.shape)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"vocabulary_size={len(self.bias)}, tied={self.weight is None}, {super().extra_repr()}"
