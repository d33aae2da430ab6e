"""The hyper-parameters of a ``TransformerCell``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from equilibria.cells.masks import check_rate
from equilibria.cells.weight_norm import INITS, Init

if TYPE_CHECKING:
    from equilibria.cells.transformer import TransformerCell

Norm = Literal["post", "pre", "pre-normalised"]
Positions = Literal["relative", "decay"]
_CHOICES = {"norm": ("post", "pre", "pre-normalised"), "positions": ("relative", "decay"), "init": INITS}


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """The hyper-parameters of a ``TransformerCell``."""

    width: int = 128
    """D, channels of the state; a multiple of heads, and even with relative positions."""
    heads: int = 4
    """H, attention heads."""
    inner: int = 512
    """I, width of the feed-forward network."""
    memory: int = 64
    """M, positions of the past that are remembered between segments; 0 for none."""
    window: int = 0
    """How many positions back a query sees, itself included; 0 means 1000."""
    positions: Positions = "relative"
    """The term of Transformer-XL ("relative"), or a learned bias per head and distance ("decay"), quick to train."""
    longest: int = 1024
    """Only with "decay": the number of distances that have a bias; memory and segment together may not be longer."""
    norm: Norm = "post"
    """Where layer norm stands: "post" (the paper), "pre" (the textbook), or "pre-normalised" (see the cell)."""
    dropout: float = 0.0
    """Share of channels dropped from attention output, inner layer, feed-forward output and position table."""
    attention_dropout: float = 0.0
    """Share of attention weights dropped."""
    weight_norm: bool = True
    """Whether the five matrices inside f are weight-normed; without it f stops being solvable in long runs."""
    init: Init = "default_fan_in"
    """How these matrices start: from U(±1/√fan_in), or "normal", from N(0, std²)."""
    std: float = 0.01
    """Of the injection and of the biases u and v, which start from N(0, std²), and of init "normal"."""
    injection: bool = True
    """Whether the input is added to queries, keys and values; if not, it is the first state, of an explicit layer."""
    affine: bool = False
    """Whether the layer norms have a gain and a bias."""
    attention_norm: bool = False
    """Whether one more layer norm stands before the output matrix of the attention."""
    variational: bool = True
    """Whether a dropout mask of channels holds for all positions, or each position has its own."""

    def __post_init__(self) -> None:
        for name, low in (("width", 1), ("heads", 1), ("inner", 1), ("longest", 1), ("memory", 0), ("window", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"TransformerShape({name}={getattr(self, name)}): {name} is at least {low}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ValueError(f"TransformerShape({name}={getattr(self, name)!r}): {name} is one of {choices}.")
        if self.width % self.heads:
            divisors = [heads for heads in range(1, self.width + 1) if self.width % heads == 0]
            raise ValueError(
                f"TransformerShape(width={self.width}, heads={self.heads}): the heads share the width evenly; "
                f"try heads={min(divisors, key=lambda heads: abs(heads - self.heads))}."
            )
        if self.positions == "relative" and self.width % 2:
            raise ValueError(
                f"TransformerShape(width={self.width}, positions='relative'): the sinusoids come in pairs of sine and "
                f"cosine, so the width is even; try width={self.width + 1}, or positions='decay'."
            )
        check_rate("TransformerShape", "dropout", self.dropout)
        check_rate("TransformerShape", "attention_dropout", self.attention_dropout)

    @property
    def outputs(self) -> int:
        """D, channels of what the layers after read: the whole state."""
        return self.width

    def build(self) -> TransformerCell:
        """The cell, with fresh parameters."""
        from equilibria.cells.transformer import TransformerCell  # which imports its shape

        return TransformerCell(self)
