"""Format: how the tensors of one published code are named, and which model they belong to."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from equilibria.lm.convert.numbering import Numbering
from equilibria.lm.convert.tensors import ConversionError, Tensors
from equilibria.lm.corpora import PennTreebank, Source, WikiText2
from equilibria.lm.model import LanguageConfig

Change = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table of names."""

    ours: str
    """The name of a parameter here, or of a linear map, below the cell or block."""
    theirs: str
    """Its name in the file."""
    change: Change = torch.Tensor.clone
    """The function that makes our parameter of their tensor."""


class Format(ABC):
    """The published weights of one code. Subclasses have no state."""

    name: ClassVar[str]
    """The name in messages and in the run."""
    copies: ClassVar[tuple[str, ...]] = ()
    """The beginnings of the names of tensors that are copies of others, or that are computed here."""

    @abstractmethod
    def matches(self, tensors: Tensors) -> bool:
        """True if the tensors have the names of this format."""

    @abstractmethod
    def vocabulary_size(self, tensors: Tensors) -> int:
        """V, the number of words."""

    @abstractmethod
    def model(self, tensors: Tensors, config: LanguageConfig) -> LanguageConfig:
        """``config`` with everything that the shapes and names of the tensors say.

        Raises:
            ConversionError: ``config`` is of another kind of model, or lacks what no shape says.
        """

    @abstractmethod
    def weights(self, tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
        """The parameters of the model of ``config`` by their names here; marks the tensors that it has used."""

    def numbering(self, source: Source) -> Numbering:
        """The order in which the code numbers the words of a corpus.

        The loader of DEQ and TorchDEQ counts the words of the training text of WikiText-103, but those of all three
        texts of the Penn Treebank and of WikiText-2.
        """
        return "all" if isinstance(source, PennTreebank | WikiText2) else "train"


def filled(tensors: Tensors, rows: Iterable[Row], *, below: str = "", under: str = "") -> dict[str, Tensor]:
    """The parameters that the rows name, with ``under`` before our names and ``below`` before theirs."""
    return {f"{under}{row.ours}": row.change(tensors.take(f"{below}{row.theirs}")) for row in rows}


def linear(
    tensors: Tensors,
    theirs: str,
    ours: str,
    *,
    bias: bool = True,
    weight: str = "weight",
    change: Change = torch.Tensor.clone,
) -> dict[str, Tensor]:
    """Direction, gain and bias of a linear map or of a convolution.

    Args:
        tensors: the file.
        theirs: the name of their module, with its dot at the end.
        ours: the name of our ``NormedLinear``.
        bias: whether it has a bias.
        weight: the name of its weight, followed by _g and _v if it is normalised, and by _raw where entries of it are
            dropped.
        change: what becomes of the rows of each tensor; a kernel of width 1 has been made a matrix, and the gains a
            vector.
    """
    normed = is_normed(tensors, theirs, weight=weight)
    raw = "_raw" if f"{theirs}{weight}{'_v' if normed else ''}_raw" in tensors else ""
    direction = tensors.take(f"{theirs}{weight}{'_v' if normed else ''}{raw}")
    found = {f"{ours}.direction": change(direction.squeeze(2) if direction.shape[2:] == (1,) else direction)}
    if normed:
        found[f"{ours}.gain"] = change(_gain(tensors, f"{theirs}{weight}_g"))
    if bias:
        found[f"{ours}.bias"] = change(tensors.take(f"{theirs}bias"))
    return found


def _gain(tensors: Tensors, name: str) -> Tensor:
    """The gain of each row.

    Raises:
        ConversionError: it is not that of the rows, as after ``weight_norm(…, dim=1)``.
    """
    gain = tensors.take(name)
    if gain.ndim == 0 or gain.numel() != len(gain):
        raise ConversionError(
            f"{tensors.source} gives {name} the shape {tuple(gain.shape)}, and weight normalisation here has one gain "
            "per row of the weight; it was saved by a changed code."
        )
    return gain.flatten()


def is_normed(tensors: Tensors, theirs: str, *, weight: str = "weight") -> bool:
    """True if the weight of a module is normalised.

    Raises:
        ConversionError: it has a direction without a gain.
    """
    gain, direction = (f"{theirs}{weight}_{part}" for part in ("g", "v"))
    if gain not in tensors and (direction in tensors or f"{direction}_raw" in tensors):
        raise ConversionError(
            f"{tensors.source}: {direction} has no gain {gain} beside it, and weight normalisation here has one per "
            "row; it was trained with a fixed scale, which this library does not have."
        )
    return gain in tensors


def check_cell(format_: Format, config: LanguageConfig, kind: type, *, recipes: str, explicit: bool = False) -> None:
    """Raise a ConversionError unless the model of a recipe is of the kind of the file."""
    if not isinstance(config.cell, kind) or (config.explicit is not None) != explicit:
        layer = "an explicit network" if config.explicit is not None else "the equilibrium"
        raise ConversionError(
            f"These are weights of {format_.name}, and the recipe has {layer} of a {type(config.cell).__name__}; "
            f"choose a recipe such as {recipes} with --recipe."
        )
