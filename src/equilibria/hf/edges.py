"""The id for the edges of texts, and tables of another size.

transformers deletes padding and the beginning and end of a text from what it shows, so these need an id that is no
token of the vocabulary. The model reads it as another token, such as the end of a line, and never predicts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from equilibria.checks import check_whole
from equilibria.hf.configuration import EquilibriumConfig
from equilibria.lm.model import Embedding
from equilibria.lm.model.tables import TableHead

EDGE = "<|edge|>"
"""The token that stands for beginning, end and padding."""


def with_edges_read(tokens: Int[Tensor, "B T"], config: EquilibriumConfig) -> Int[Tensor, "B T"]:
    """The tokens, with the one that the model reads instead of edges."""
    edge, read = config.edge_token_id, config.edge_reads_as
    return tokens if edge is None or read is None else tokens.masked_fill(tokens == edge, read)


class EdgesRead:
    """A hook that runs before an embedding and replaces each edge by the token that the model reads in its place.

    Args:
        config: the configuration, which names the edge.
    """

    def __init__(self, config: EquilibriumConfig) -> None:
        self.config = config

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the embedding, with the tokens that are read."""
        return tuple(with_edges_read(tokens, self.config) for tokens in args[:1]) + args[1:]


def lowest_at_edge(logits: Float[Tensor, "B T _"], config: EquilibriumConfig) -> Float[Tensor, "B T V"]:
    """The logits, with the least finite number for the edge: its probability is exactly 0."""
    edge, lowest = config.edge_token_id, torch.finfo(logits.dtype).min
    if edge is None:
        return logits
    if logits.shape[-1] == edge:  # the tables of a trained model have no row for it
        return functional.pad(logits, (0, 1), value=lowest)
    return logits.index_fill(-1, torch.tensor(edge, device=logits.device), lowest)


def resized(
    model: Any,
    rows: int | None,
    resize: Callable[..., nn.Embedding],
    pad_to_multiple_of: int | None = None,
    **choices: Any,
) -> nn.Embedding:
    """The embedding of ``model`` with ``rows`` rows, after the same change of its head; see the model's method.

    Args:
        model: an ``EquilibriumForCausalLM``.
        rows: number of ids; None to change nothing.
        resize: transformers' own method, which changes the embedding and the configuration.
        pad_to_multiple_of: raise the number of ids to a multiple of this.
        choices: the other arguments of ``resize``.
    """
    check_whole("resize_token_embeddings", optional=True, new_num_tokens=rows, pad_to_multiple_of=pad_to_multiple_of)
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(
            f"resize_token_embeddings(pad_to_multiple_of={pad_to_multiple_of}): it is at least 1; try 8, or None."
        )
    language, config = model.model, model.config
    head, known = language.head, config.vocab_size
    if not isinstance(language.embedding, Embedding) or not isinstance(head, TableHead):
        raise ValueError(
            f"resize_token_embeddings({rows}): this model has an {type(language.embedding).__name__}, whose words are "
            "divided into clusters by frequency, so no token can be added at the end."
        )
    if rows is not None and rows < known:
        raise ValueError(f"resize_token_embeddings({rows}): the model has {known} ids, and none can be taken away.")
    rows = int(known if rows is None else rows)
    if pad_to_multiple_of is not None:
        rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
    if rows == known:  # a row for the edge alone would be one that a saved configuration does not tell
        return language.embedding
    embedding = resize(rows, **choices)
    count = embedding.num_embeddings
    with torch.no_grad():
        head.bias = _longer(head.bias, count)
        if head.weight is not None:
            head.weight = _longer(head.weight, count)
    return embedding


def _longer(parameter: nn.Parameter, rows: int) -> nn.Parameter:
    """The parameter with ``rows`` rows; the new ones are the mean of the old."""
    new = parameter.mean(dim=0, keepdim=True).expand(rows - len(parameter), *parameter.shape[1:])
    return nn.Parameter(torch.cat([parameter, new]), requires_grad=parameter.requires_grad)
