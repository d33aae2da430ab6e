"""Mixture of softmaxes: several softmaxes over the whole vocabulary, weighted as the state says.

Letters: B batch, T time, O channels of the state, K experts, D width of a latent, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.checks import check_fields
from equilibria.layers.dropout import BatchSlice, check_rate
from equilibria.lm.model.tables import Dropped, Embedding, Init, TableHead, dropped, widened


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The hyper-parameters of a mixture of softmaxes (Yang et al. 2018)."""

    experts: int = 15
    """K, softmaxes."""
    width: int | None = None
    """D, width of each expert's latent; None for the embedding's width, which a tied head needs."""
    dropout: float = 0.0
    """Share of the latents' channels that is dropped, the same channels at all positions of a segment."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.experts < 1:
            raise ValueError(f"MixtureConfig(experts={self.experts}): a mixture has at least one expert; try 15.")
        if self.width is not None and self.width < 1:
            raise ValueError(f"MixtureConfig(width={self.width}): a width is at least 1, or None for the embedding's.")
        check_rate("MixtureConfig", "dropout", self.dropout)

    def build(
        self,
        vocabulary_size: int,
        *,
        width: int,
        outputs: int,
        tied: bool = True,
        dropout: float = 0.0,
        output_dropout: Dropped = "channel",
        std: float = 0.01,
        init: Init = "normal",
    ) -> MixtureHead:
        """The head with fresh parameters.

        Args:
            vocabulary_size: V.
            width: width of the embedding.
            outputs: O, channels of the states.
            tied: all experts read the embedding's table; otherwise they share a table of the head.
            dropout: share of the states that is dropped.
            output_dropout: "channel" or "token", as in ``Head``.
            std: initial standard deviation of the head's own table.
            init: draw that table from N(0, std²) ("normal") or from U(±√3·std) ("uniform").

        Raises:
            ValueError: a tied table has another width than the latents.
        """
        if tied and self.width not in (None, width):
            raise ValueError(
                f"MixtureConfig(width={self.width}) tied to an embedding of width {width}: a tied table is read by "
                "latents of its own width; give width=None, or tied=False."
            )
        read = {"dropout": dropout, "output_dropout": output_dropout, "latent_dropout": self.dropout}
        return MixtureHead(
            vocabulary_size=vocabulary_size,
            width=outputs,
            latent_width=self.width or width,
            experts=self.experts,
            tied=tied,
            std=std,
            init=init,
            **read,
        )


class MixtureHead(TableHead):
    """p(w) = Σ_k π_k softmax(E tanh(mask ⊙ (W_k h + b_k)) + b)[w], where π = softmax(W_π h + b_π).

    Yang, Dai, Salakhutdinov and Cohen (2018). The experts share E and b. Deviations: (1) log-probabilities are
    logsumexp_k(log π_k + log softmax_k) in float32 or wider instead of log(p + 1e-8), which is never below −18.4 and
    not normalised; (2) W_π has a bias and the mask is inside the tanh, as in the code of TrellisNet (Bai, Kolter and
    Koltun 2019); Yang et al. have no bias and apply dropout outside the tanh.

    Args:
        vocabulary_size: V.
        width: O, channels of the state.
        latent_width: D, width of each expert's latent; for a tied head the width of the embedding.
        experts: K.
        tied: E is the table of the embedding that each call receives; otherwise the head has its own.
        dropout: share of h that is dropped.
        output_dropout: "channel" or "token", as in ``Head``.
        latent_dropout: share of the latents' channels that is dropped; each expert has its own mask, the same at all
            positions.
        std: initial standard deviation of an untied E; b starts at 0, and W_π, W_k and their biases start as in
            ``torch.nn.Linear``.
        init: draw an untied E from N(0, std²) ("normal") or from U(±√3·std) ("uniform").
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        latent_width: int,
        experts: int,
        tied: bool = True,
        dropout: float = 0.0,
        output_dropout: Dropped = "channel",
        latent_dropout: float = 0.0,
        std: float = 0.01,
        init: Init = "normal",
    ) -> None:
        super().__init__(dropout=dropout, output_dropout=output_dropout)
        check_rate("MixtureHead", "latent_dropout", latent_dropout)
        self.experts, self.latent_dropout = experts, latent_dropout
        self.prior, self.latent = nn.Linear(width, experts), nn.Linear(width, experts * latent_width)
        self._add_table(vocabulary_size, latent_width, tied=tied, std=std, init=init)

    def logits(self, h: Float[Tensor, "B T O"], embedding: Embedding) -> Float[Tensor, "B T V"]:
        """The log-probabilities of all tokens."""
        each = widened(self._expert_logits(h, embedding)).log_softmax(dim=-1)
        return (self._log_priors(h)[..., None] + each).logsumexp(dim=-2)

    def nll(
        self,
        h: Float[Tensor, "B T O"],
        targets: Int[Tensor, "B T"],
        embedding: Embedding,
        part: BatchSlice | None = None,
    ) -> Float[Tensor, "B T"]:
        """−log p(target) at each position, in nats; only the probabilities of the targets are mixed."""
        logits = widened(self._expert_logits(h, embedding, part))
        words = targets[..., None].expand(logits.shape[:-1])
        each = functional.cross_entropy(logits.flatten(0, -2), words.flatten(), reduction="none").view(words.shape)
        return -(self._log_priors(h) - each).logsumexp(dim=-1)

    def _log_priors(self, h: Tensor) -> Float[Tensor, "B T K"]:
        return widened(self.prior(h)).log_softmax(dim=-1)

    def _expert_logits(
        self, h: Tensor, embedding: Embedding, part: BatchSlice | None = None
    ) -> Float[Tensor, "B T K V"]:
        latents = dropped(self.latent(h), rate=self.latent_dropout, training=self.training, part=part)
        return self._scores(latents.tanh().unflatten(-1, (self.experts, -1)), embedding)

    def extra_repr(self) -> str:
        """Sizes, tying and dropout."""
        sizes = f"vocabulary_size={len(self.bias)}, experts={self.experts}, tied={self.weight is None}"
        return f"{sizes}, {super().extra_repr()}, latent_dropout={self.latent_dropout}"
