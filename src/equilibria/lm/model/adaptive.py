"""AdaptiveConfig: an adaptive embedding and softmax, for large vocabularies in which most words are rare.

Letters: D width, V vocabulary, d_i width of cluster i.
"""

from __future__ import annotations

import dataclasses

from equilibria.checks import check_at_least, check_fields
from equilibria.lm.model.adaptive_heads import AdaptiveHead, TiedAdaptiveHead, UntiedAdaptiveHead
from equilibria.lm.model.clusters import AdaptiveEmbedding, Clusters
from equilibria.lm.model.tables import Dropped, Init


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
    """The hyper-parameters of an adaptive embedding and its head; token ids go from frequent to rare words.

    The split cross-entropy of Merity, Keskar and Socher (2018), used by TrellisNet on WikiText-103, is the special case
    of one table without projections: ``AdaptiveConfig(cutoffs=(2_800, 20_000, 76_000), division=1, slot_std=0.0)``.
    """

    cutoffs: tuple[int, ...] = (20_000, 40_000, 200_000)
    """The first token id of clusters 1, 2, …, increasing; the defaults are those of WikiText-103."""
    division: int = 4
    """Cluster i has vectors of width ⌊width/division^i⌋; 1 gives all words the same width."""
    width: int | None = None
    """Width of the vectors of cluster 0; None for the model's width."""
    projection_std: float = 0.01
    """The projections to the model's width start from N(0, projection_std²)."""
    slot_std: float | None = None
    """The head's weights of the slots start from N(0, slot_std²); None to start them like those of the words."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, projection_std=0)
        if not self.cutoffs or self.cutoffs[0] < 1 or list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise ValueError(
                f"AdaptiveConfig(cutoffs={self.cutoffs}): give at least one cutoff, each at least 1 and larger than "
                "the one before; try (20_000, 40_000, 200_000), or no AdaptiveConfig for a plain softmax."
            )
        if self.division < 1:
            raise ValueError(
                f"AdaptiveConfig(division={self.division}): the division is at least 1; try 4, or 1 for vectors of the "
                "same width in all clusters."
            )
        if self.slot_std is not None and self.slot_std < 0:
            raise ValueError(
                f"AdaptiveConfig(slot_std={self.slot_std}): a standard deviation is at least 0; try 0.01, or None for "
                "the standard deviation of the words."
            )
        if self.width is not None:
            self._widths(self.width)

    def build(
        self,
        vocabulary_size: int,
        *,
        width: int,
        outputs: int | None = None,
        tied: bool = True,
        dropout: float = 0.0,
        input_dropout: float | None = None,
        word_dropout: float = 0.0,
        output_dropout: Dropped = "channel",
        scaled: bool = True,
        std: float = 0.01,
        init: Init = "normal",
    ) -> tuple[AdaptiveEmbedding, AdaptiveHead]:
        """An embedding and a head with fresh parameters.

        Args:
            vocabulary_size: V, larger than the last cutoff.
            width: D, width of the model.
            outputs: channels of an untied head's input; None for D. A tied head has D.
            tied: the head reads the embedding's tables and projections; otherwise it has its own.
            dropout: share dropped from the embedding's channels and from the head's input.
            input_dropout: share dropped from the embedding's channels; None for ``dropout``.
            word_dropout: share of the words that the embedding drops.
            output_dropout: dropout of the head's input, "channel" or "token", as in ``Head``.
            scaled: multiply the embedding's vectors by √D.
            std: initial standard deviation of the tables and of the head's slots.
            init: draw them from N(0, std²) ("normal") or from U(±√3·std) ("uniform").

        Raises:
            ValueError: a cluster would have no word, or vectors of width 0.
        """
        clusters, widths = self._clusters(vocabulary_size), self._widths(self.width or width)
        common = {"std": std, "init": init, "projection_std": self.projection_std}
        embed = {"dropout": dropout if input_dropout is None else input_dropout, "word_dropout": word_dropout}
        embed |= {"width": width, "widths": widths, "division": self.division, "scaled": scaled}
        embedding = AdaptiveEmbedding(clusters, **embed, **common)
        common |= {"dropout": dropout, "output_dropout": output_dropout, "slot_std": self.slot_std}
        if tied:
            return embedding, TiedAdaptiveHead(embedding, width=width, **common)
        self._widths(outputs := outputs or width)  # raises if the head's last cluster would have width 0
        return embedding, UntiedAdaptiveHead(clusters, width=outputs, division=self.division, **common)

    def _clusters(self, vocabulary_size: int) -> Clusters:
        """The clusters of the vocabulary, each with at least one word."""
        if self.cutoffs[-1] >= vocabulary_size:
            raise ValueError(
                f"AdaptiveConfig(cutoffs={self.cutoffs}) over a vocabulary of {vocabulary_size}: each cluster has at "
                "least one word, so all cutoffs are below the size of the vocabulary; try fewer or smaller cutoffs, "
                "or no AdaptiveConfig for a plain softmax."
            )
        return Clusters(self.cutoffs, vocabulary_size)

    def _widths(self, width: int) -> tuple[int, ...]:
        """d_i of each cluster, each at least 1."""
        widths = tuple(width // self.division**i for i in range(len(self.cutoffs) + 1))
        if widths[-1] < 1:
            raise ValueError(
                f"AdaptiveConfig(cutoffs={self.cutoffs}, division={self.division}) on a width of {width}: the last "
                f"cluster would have vectors of width ⌊{width}/{self.division}^{len(self.cutoffs)}⌋ = {widths[-1]}, "
                "and every width is at least 1; try a smaller division, fewer cutoffs or a larger width."
            )
        return widths
