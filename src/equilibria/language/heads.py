"""States to log-probabilities of the next token.

Letters: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.cells.masks import check_rate
from equilibria.language.embeddings import Dropped, Embedding, Init, dropped, started, widened


class SoftmaxHead(nn.Module):
    """logits = W h + b over the whole vocabulary, from an output that ``dropped`` has masked.

    A tied head has no W: it reads the embedding's table at each call (Press and Wolf 2017), so there is one Parameter,
    with one gradient and one entry in the state dict, whatever is moved, cast, copied or sharded.

    Args:
        width: D, channels of the state.
        vocabulary_size: V, logits.
        tied: W is the table of the embedding that is handed to each call.
        dropout: share of h that is dropped.
        output_dropout: what of h: a "channel", the same ones at all positions of a segment, or a "token", which loses
            all its channels (what the code of Bai, Kolter and Koltun 2019 does to the output of its Transformer).
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
        super().__init__()
        check_rate("SoftmaxHead", "dropout", dropout)
        check_output_dropout("SoftmaxHead", output_dropout)
        self.dropout = dropout
        self.output_dropout: Dropped = output_dropout
        self.weight = None if tied else nn.Parameter(started(torch.empty(vocabulary_size, width), std=std, init=init))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def dropped(self, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """h ⊙ mask: what ``forward`` and ``nats`` are given; in evaluation h itself."""
        return dropped(h, rate=self.dropout, training=self.training, kind=self.output_dropout)

    def forward(self, h: Float[Tensor, "B T D"], embedding: Embedding) -> Float[Tensor, "B T V"]:
        """The logits."""
        weight = embedding.weight if self.weight is None else self.weight
        return functional.linear(h, weight, self.bias)

    def nats(
        self, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"], embedding: Embedding
    ) -> Float[Tensor, "B T"]:
        """−log p(target), in float32 or wider, position by position."""
        logits = widened(self(h, embedding)).flatten(0, 1)
        return functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        sizes = f"vocabulary_size={len(self.bias)}, tied={self.weight is None}"
        return f"{sizes}, dropout={self.dropout}, output_dropout={self.output_dropout!r}"


def check_output_dropout(owner: str, kind: str) -> None:
    """Refuse a kind of output dropout that is none.

    Raises:
        ValueError: the kind is not "channel" or "token".
    """
    if kind not in ("channel", "token"):
        raise ValueError(
            f"{owner}(output_dropout={kind!r}): output_dropout is 'channel', which drops the same channels at all "
            "positions, or 'token', which drops whole positions; try 'channel'."
        )
