"""Adaptive softmax: p(word) = p(cluster of the word) · p(word | cluster).

At most positions only the logits of the frequent words are computed, so a large vocabulary costs little more than its
frequent part (Grave et al. 2017).

Letters: B batch, T time, N positions of all streams, D width, V vocabulary, C words of a cluster, d_i its width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.layers.dropout import BatchSlice
from equilibria.layers.linear import linear
from equilibria.lm.model.clusters import AdaptiveEmbedding, Clusters
from equilibria.lm.model.tables import Dropped, Head, Init, started, widened

Readers = list[Callable[[Tensor], Tensor]]
"""One function per cluster, from states [N D] to the logits [N C] of its words; cluster 0 has in addition one slot for
each other cluster, after its words and in the order of the clusters."""


class AdaptiveHead(Head[AdaptiveEmbedding], ABC):
    """States to log-probabilities, cluster by cluster (Grave et al. 2017, eq. 8); log-softmax in float32 or wider.

        log p(w) = log softmax(head)[w]                                     for a word of cluster 0
        log p(w) = log softmax(head)[slot i] + log softmax(tail_i)[w]       for a word of cluster i

    Every call uses every parameter: where a cluster has no target, its parameters get the gradient 0 and not None.
    """

    def __init__(self, clusters: Clusters, *, dropout: float = 0.0, output_dropout: Dropped = "channel") -> None:
        super().__init__(dropout=dropout, output_dropout=output_dropout)
        self.clusters = clusters

    @abstractmethod
    def readers(self, embedding: AdaptiveEmbedding) -> Readers:
        """One function per cluster, from states to logits; see ``Readers``."""

    def logits(self, h: Float[Tensor, "B T D"], embedding: AdaptiveEmbedding) -> Float[Tensor, "B T V"]:
        """The log-probabilities of all words, for generation; costs as much as a plain softmax."""
        read, *others = self.readers(embedding)
        head = widened(read(h)).log_softmax(dim=-1)
        words, *slots = head.split([self.clusters.sizes[0], *(1 for _ in others)], dim=-1)
        tails = [widened(other(h)).log_softmax(dim=-1) for other in others]
        return torch.cat([words, *(slot + tail for slot, tail in zip(slots, tails, strict=True))], dim=-1)

    def nll(
        self,
        h: Float[Tensor, "B T D"],
        targets: Int[Tensor, "B T"],
        embedding: AdaptiveEmbedding,
        part: BatchSlice | None = None,
    ) -> Float[Tensor, "B T"]:
        """−log p(target) at each position, in nats; a tail is evaluated only where its cluster has the target."""
        states, words = h.flatten(0, 1), targets.flatten()
        read, *others = self.readers(embedding)
        _, *pieces = self.clusters.pieces(words)
        slots = self.clusters.sizes[0] - 1 + self.clusters.of(words)
        nll = _nll(read(states), torch.where(words < self.clusters.cutoffs[0], words, slots))
        rare = [
            _nll(other(states.index_select(0, piece.positions)), piece.words)
            for other, piece in zip(others, pieces, strict=True)
        ]
        positions = torch.cat([piece.positions for piece in pieces])
        return nll.index_add(0, positions, torch.cat(rare)).view(targets.shape)

    def extra_repr(self) -> str:
        """Sizes and dropout."""
        return (
            f"vocabulary_size={self.clusters.vocabulary_size}, cutoffs={self.clusters.cutoffs}, {super().extra_repr()}"
        )


class TiedAdaptiveHead(AdaptiveHead):
    """Logits E_i (Q_iᵀ h) + b_i, where E_i are the embedding's tables and Q_i, for i ≥ 1, its projections P_i.

    Q_0 is a Parameter of the head (Dai et al. 2019, whose code ties all projections but the first). If the embedding
    has no projections, neither has the head. If the embedding has one projection for all clusters (division 1,
    width ≠ D), that is Q_i for all i ≥ 1, and Q_0 is still the head's own. As in ``SoftmaxHead``, tied tensors are read
    from the embedding at each call, so each is one Parameter. The authors' slots are in reverse order: to use their
    weights, reverse the rows of their cluster weights.

    Args:
        embedding: the embedding to which the head is tied; the head keeps only its sizes.
        width: D, channels of the state.
        dropout: share of h that is dropped.
        output_dropout: "channel" or "token", as in ``Head``.
        std: initial standard deviation of the slots' weights; all biases start at 0.
        projection_std: Q_0 starts from N(0, projection_std²).
        init: draw the slots' weights from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
        slot_std: draw the slots' weights from N(0, slot_std²) instead; None for ``std`` and ``init``.
    """

    def __init__(
        self,
        embedding: AdaptiveEmbedding,
        *,
        width: int,
        dropout: float = 0.0,
        output_dropout: Dropped = "channel",
        std: float = 0.01,
        projection_std: float = 0.01,
        init: Init = "normal",
        slot_std: float | None = None,
    ) -> None:
        super().__init__(embedding.clusters, dropout=dropout, output_dropout=output_dropout)
        slots, first = len(self.clusters.cutoffs), embedding.tables[0].shape[1]
        self.std, self.projection_std, self.slot_std = std, projection_std, slot_std
        self.init: Init = init
        self.projection = None if embedding.projection(0) is None else nn.Parameter(torch.empty(width, first))
        self.bias = nn.Parameter(torch.empty(self.clusters.vocabulary_size))
        self.slot_weight = nn.Parameter(torch.empty(slots, first))
        self.slot_bias = nn.Parameter(torch.empty(slots))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters again: Q_0 and the weights of the slots are drawn, and the biases are 0."""
        if self.projection is not None:
            nn.init.normal_(self.projection, std=self.projection_std)
        std, init = (self.std, self.init) if self.slot_std is None else (self.slot_std, "normal")
        started(self.slot_weight, std=std, init=init)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.slot_bias)

    def readers(self, embedding: AdaptiveEmbedding) -> Readers:
        """h ↦ E_i (Q_iᵀ h) + b_i."""
        weights, biases = embedding.weights(), list(self.bias.split(self.clusters.sizes))
        weights[0], biases[0] = torch.cat([weights[0], self.slot_weight]), torch.cat([biases[0], self.slot_bias])
        projections = [self.projection, *(embedding.projection(i) for i in range(1, len(weights)))]
        return [
            partial(_logits, weight=weight, bias=bias, projection=projection)
            for weight, bias, projection in zip(weights, biases, projections, strict=True)
        ]


class UntiedAdaptiveHead(AdaptiveHead):
    """The logits of ``torch.nn.AdaptiveLogSoftmaxWithLoss``, with its parameters; the embedding is not used.

    Tail i maps D to ⌊D/division^i⌋ channels and these to logits without bias. Torch's own ``forward`` gives the same
    numbers, but its log-softmax is in the dtype of h, it rejects float32 states under autocast, and it skips clusters
    without target, for whose gradients distributed training then waits.

    Args:
        clusters: the clusters of the words.
        width: D, channels of the state.
        division: factor by which the width shrinks from cluster to cluster.
        dropout: share of h that is dropped.
        output_dropout: "channel" or "token", as in ``Head``.
        std: initial standard deviation of the weights of words and slots; the bias of cluster 0 and the slots starts
            at 0.
        projection_std: the tails' projections of D channels start from N(0, projection_std²).
        init: draw the weights of words and slots from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
        slot_std: draw the slots' weights from N(0, slot_std²) instead; None for ``std`` and ``init``.
    """

    def __init__(
        self,
        clusters: Clusters,
        *,
        width: int,
        division: int,
        dropout: float = 0.0,
        output_dropout: Dropped = "channel",
        std: float = 0.01,
        projection_std: float = 0.01,
        init: Init = "normal",
        slot_std: float | None = None,
    ) -> None:
        super().__init__(clusters, dropout=dropout, output_dropout=output_dropout)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(
            width, clusters.vocabulary_size, clusters.cutoffs, div_value=division, head_bias=True
        )
        self.std, self.projection_std, self.slot_std = std, projection_std, slot_std
        self.init: Init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights again, and set the bias to 0."""
        for name, parameter in self.softmax.named_parameters():
            if name == "head.bias":
                nn.init.zeros_(parameter)
            elif name.startswith("tail") and name.endswith(".0.weight"):
                started(parameter, std=self.projection_std)
            else:
                started(parameter, std=self.std, init=self.init)
        if self.slot_std is not None:
            started(self.softmax.head.weight.detach()[self.clusters.sizes[0] :], std=self.slot_std)

    def readers(self, embedding: AdaptiveEmbedding) -> Readers:
        """h ↦ W_i h; cluster 0 has a bias."""
        del embedding
        return [self.softmax.head, *self.softmax.tail]


def _logits(h: Tensor, *, weight: Tensor, bias: Tensor, projection: Tensor | None) -> Tensor:
    return linear(h if projection is None else linear(h, projection.t()), weight, bias)


def _nll(logits: Float[Tensor, "N C"], words: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return functional.cross_entropy(widened(logits), words, reduction="none")
