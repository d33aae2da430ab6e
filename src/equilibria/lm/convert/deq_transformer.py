"""The DEQ-Transformer of locuslab/deq (2019, 2020 and 2021), and deq-seq of TorchDEQ, which has the same names.

The codes of 2019 and 2020 register the block three times; ``func.`` is the one that is trained. Convolutions of width 1
and linear maps are the same here. Where layer norm stands is in no file: it has no parameters there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.lm.convert.format import Change, Format, Row, check_cell, filled, is_normed, linear
from equilibria.lm.convert.softmax import clustered, vocabulary_size, with_clusters
from equilibria.lm.convert.tensors import ConversionError, Tensors
from equilibria.lm.model import LanguageConfig

BIASES = (Row("attention.u", "r_w_bias"), Row("attention.positions.v", "r_r_bias"))
"""Below the attention."""
ATTENTION = (("attention.positions.project", "r_net", False), ("attention.out", "o_net", True))
"""Linear maps below the attention: ours, theirs, and whether they have a bias; queries, keys and values are apart."""
FEED_FORWARD = (("inner", "ff1_net", True), ("outer", "ff2_net", True))
"""Linear maps below the feed-forward network."""


def block(tensors: Tensors, attention: str, feed_forward: str, *, under: str, change: Change) -> dict[str, Tensor]:
    """The parameters of a block, without its layer norms.

    Args:
        tensors: the file.
        attention: the name of their attention, with its dot at the end.
        feed_forward: the name of their feed-forward network.
        under: the name of our cell.
        change: brings the rows of queries, keys and values into our order.
    """
    found = filled(tensors, BIASES, below=attention, under=under)
    found |= linear(tensors, f"{attention}qkv_net.", f"{under}attention.qkv", bias=False, change=change)
    for below, table in ((attention, ATTENTION), (feed_forward, FEED_FORWARD)):
        for ours, theirs, bias in table:
            found |= linear(tensors, f"{below}{theirs}.", f"{under}{ours}", bias=bias)
    return found


def sizes(tensors: Tensors, attention: str, feed_forward: str, *, injection: str) -> dict[str, Any]:
    """The fields of a ``TransformerConfig`` that a block's shapes give.

    Raises:
        ConversionError: the heads together have another width than the model.
    """
    heads, width = tensors.look(f"{attention}r_w_bias", axes=(2,)).shape
    model = tensors.look(injection, axes=(2, 3)).shape[1]
    if heads * width != model:
        raise ConversionError(
            f"{tensors.source} has {heads} heads of width {width} in a model of width {model}, and here the heads "
            "share the model's width."
        )
    normed = is_normed(tensors, f"{feed_forward}ff1_net.")
    inner = len(tensors.look(f"{feed_forward}ff1_net.{'weight_v' if normed else 'weight'}", axes=(2, 3)))
    return {"width": model, "heads": heads, "inner": inner, "weight_norm": normed, "positions": "relative"}


def check_frequencies(tensors: Tensors, width: int) -> None:
    """Raise a ConversionError if the file has other frequencies of its sinusoids than 10000^(−2i/width)."""
    tensors.check_computed("pos_emb.inv_freq", 10000 ** (-torch.arange(0, width, 2) / width))


class DEQTransformer(Format):
    """One block, one injection, an adaptive or a plain softmax."""

    name: ClassVar[str] = "the DEQ-Transformer of locuslab/deq or of TorchDEQ's deq-seq"
    copies: ClassVar[tuple[str, ...]] = ("func_copy.", "deq.", "deqback.")

    def matches(self, tensors: Tensors) -> bool:
        """True with one block below ``func.dec_attn``."""
        return "func.dec_attn.r_w_bias" in tensors

    def vocabulary_size(self, tensors: Tensors) -> int:
        """V."""
        return vocabulary_size(tensors)

    def model(self, tensors: Tensors, config: LanguageConfig) -> LanguageConfig:
        """Width, heads, inner width, weight norm and clusters."""
        check_cell(self, config, TransformerConfig, recipes="wikitext103-v2, wikitext103-seq or ptb")
        known = sizes(tensors, "func.dec_attn.", "func.pos_ff.", injection="inject_conv.weight")
        known |= {"injection": True, "affine": False, "attention_norm": False}
        cell = dataclasses.replace(config.cell, **known)
        return with_clusters(tensors, dataclasses.replace(config, cell=cell, mixture=None))

    def weights(self, tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
        """The block, its injection, embedding and head."""
        check_frequencies(tensors, config.cell.width)
        found = block(tensors, "func.dec_attn.", "func.pos_ff.", under="layer.cell.", change=Tensor.clone)
        found |= linear(tensors, "inject_conv.", "layer.cell.inject")
        return found | clustered(tensors, config)
