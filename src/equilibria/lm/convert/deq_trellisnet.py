"""The DEQ-TrellisNet of locuslab/deq (2019 and 2020)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.lm.convert.format import Format, check_cell, is_normed, linear
from equilibria.lm.convert.tensors import ConversionError, Tensors
from equilibria.lm.model import LanguageConfig, MixtureConfig

MIXTURE = ("prior.weight", "prior.bias", "latent.weight", "latent.bias")
TAILS = ("tail_vectors", "tail_bias")
"""The slots of the split softmax, the last cluster first; they are in the state dict of the loss, not of the model."""


def both_times(kernel: Tensor) -> Tensor:
    """[past | present] from a kernel over two times; a vector as it is.

    Raises:
        ConversionError: the kernel has another width.
    """
    if kernel.ndim < 3:
        return kernel
    if kernel.shape[2] != 2:
        raise ConversionError(
            f"The convolution reads {kernel.shape[2]} times, and a TrellisCell reads two, as all of the authors' "
            "language models do."
        )
    return torch.cat([kernel[..., 0], kernel[..., 1]], dim=1)


def with_sizes(tensors: Tensors, config: LanguageConfig, *, channels: int, normed: bool) -> LanguageConfig:
    """``config`` with the widths of the file, and its mixture of softmaxes if it has one."""
    width, experts = tensors.look("encoder.weight", axes=(2,)).shape[1], None
    outputs = tensors.look("decoder.weight", axes=(2,)).shape[1]
    if "mixsoft.prior.weight" in tensors:
        experts, outputs = tensors.look("mixsoft.prior.weight", axes=(2,)).shape
    known = {"width": width, "hidden": channels - outputs, "outputs": outputs, "weight_norm": normed}
    cell = dataclasses.replace(config.cell, carry_input=False, **known)
    mixture = None
    if experts is not None:
        mixture = dataclasses.replace(config.mixture or MixtureConfig(), experts=experts, width=None)
    clusters = config.adaptive
    if clusters is not None:
        if mixture is not None or not config.tied:
            raise ConversionError(
                f"{tensors.source} has a mixture of softmaxes or an untied softmax, and the recipe has clusters of "
                "words; choose a recipe without clusters, such as ptb-trellis-mos."
            )
        if TAILS[0] not in tensors:
            raise ConversionError(
                f"{tensors.source} lacks {' and '.join(TAILS)}, the slots of the split softmax: the authors' script "
                "keeps them in its loss and does not save them with the model. Name a state dict of that loss "
                "(SplitCrossEntropyLoss) with --criterion FILE; without it the model cannot be scored."
            )
        clusters = dataclasses.replace(clusters, width=None, division=1)
        if (slots := len(tensors.look(TAILS[0], axes=(2,)))) != len(clusters.cutoffs):
            raise ConversionError(
                f"The split softmax has {slots} slots and the recipe {len(clusters.cutoffs)} "
                "cutoffs; give as many with --model.adaptive.cutoffs."
            )
    elif TAILS[0] in tensors:
        raise ConversionError(
            "The file has the slots of a split softmax, and the recipe has no clusters of words; choose a recipe with "
            "clusters, such as wikitext103-trellis."
        )
    return dataclasses.replace(config, cell=cell, mixture=mixture, adaptive=clusters, scaled=False)


def words(tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
    """The parameters of the embedding and of the head."""
    adaptive = config.adaptive is not None
    found = {"embedding.tables.0" if adaptive else "embedding.weight": tensors.take("encoder.weight")}
    if config.tied:
        tensors.check_same("decoder.weight", "encoder.weight")
    else:
        found["head.weight"] = tensors.take("decoder.weight")
    found["head.bias"] = tensors.take("decoder.bias")
    if adaptive:
        found["head.slot_weight"], found["head.slot_bias"] = (tensors.take(name).flip(0) for name in TAILS)
    if config.mixture is not None:
        found |= {f"head.{name}": tensors.take(f"mixsoft.{name}") for name in MIXTURE}
    return found


class DEQTrellisNet(Format):
    """The injection is a convolution of its own, whose bias is added to that of the state."""

    name: ClassVar[str] = "the DEQ-TrellisNet of locuslab/deq"
    copies: ClassVar[tuple[str, ...]] = ("mixsoft.decoder.",)

    def matches(self, tensors: Tensors) -> bool:
        """True with an injection beside the convolution of the state."""
        return f"{_below(tensors)}inject_conv.bias" in tensors

    def vocabulary_size(self, tensors: Tensors) -> int:
        """V."""
        return len(tensors.look("encoder.weight", axes=(2,)))

    def model(self, tensors: Tensors, config: LanguageConfig) -> LanguageConfig:
        """Widths, weight norm and mixture."""
        check_cell(self, config, TrellisConfig, recipes="wikitext103-trellis or ptb-trellis")
        below = _below(tensors)
        normed = is_normed(tensors, f"{below}func.full_conv.")
        channels = len(tensors.look(f"{below}func.full_conv.bias", axes=(1,))) // 4
        return with_sizes(tensors, config, channels=channels, normed=normed)

    def weights(self, tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
        """Both convolutions, with one bias, embedding and head."""
        below = _below(tensors)
        tensors.skip(f"{below}{copy}" for copy in ("func_copy.", "deq.", "deqback."))
        found = linear(tensors, f"{below}func.full_conv.", "layer.cell.state", change=both_times)
        found |= linear(tensors, f"{below}inject_conv.", "layer.cell.input", change=both_times)
        state, given = found["layer.cell.state.bias"], found.pop("layer.cell.input.bias")
        if state.shape != given.shape:  # a sum would fit one to the other
            raise ConversionError(
                f"{tensors.source} has biases of the shapes {tuple(state.shape)} and {tuple(given.shape)} for state "
                "and input, and in its format they are the same; it was saved by a changed code."
            )
        found["layer.cell.state.bias"] = state + given
        return found | words(tensors, config)


def _below(tensors: Tensors) -> str:
    """The beginning of the network's names, which is longer where DropConnect has wrapped the network in a module."""
    return "trellisnet.module." if "trellisnet.module.inject_conv.bias" in tensors else "trellisnet."
