"""Text, token by token: the prompt is one segment, and each new token one of length 1 with memory.

By the exactness law (two segments joined by memory have the equilibrium of one) this is the same as solving the whole
text again for every token, as long as the memory holds all of it.

Letters: B batch, T time, V vocabulary, L tokens generated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.equilibrium import Memory
from equilibria.language.modes import evaluating


@runtime_checkable
class Speaker(Protocol):
    """What generation needs of a model, which is an ``nn.Module`` too."""

    @property
    def vocabulary_size(self) -> int:
        """V."""
        ...

    def logits(self, tokens: Int[Tensor, "B T"], memory: Memory = None) -> tuple[Float[Tensor, "B T V"], Memory]:
        """The logits after each token, and the memory for the tokens that follow."""
        ...


def generate(
    model: Speaker,
    prompt: Int[Tensor, "B T"],
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    memory: Memory = None,
    segment: int | None = None,
) -> Int[Tensor, "B L"]:
    """``length`` tokens that continue each row of the prompt; the model's training mode is as before afterwards.

    Args:
        model: in evaluation mode meanwhile, and without gradients.
        prompt: at least one token a row.
        length: L, tokens to generate.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: choose among the k likeliest tokens only.
        top_p: choose among the fewest likeliest tokens that have this probability together (Holtzman et al. 2020).
        seed: of the choices; the global generators are not touched.
        memory: of what comes before the prompt.
        segment: solve the prompt in pieces of at most so many tokens; in one if None.
    """
    if length < 1:
        raise ValueError(f"generate(length={length}): length counts the tokens to generate and is at least 1.")
    tokens = stream(
        model,
        prompt,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        memory=memory,
        segment=segment,
    )
    return torch.stack(list(itertools.islice(tokens, length)), dim=1)


def stream(
    model: Speaker,
    prompt: Int[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    memory: Memory = None,
    segment: int | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """One token a row after another, without end, for showing text while it is made; arguments as of ``generate``."""
    _check(model, prompt, temperature=temperature, top_k=top_k, top_p=top_p, segment=segment)
    generator = torch.Generator(prompt.device).manual_seed(seed)

    def continued() -> Iterator[Tensor]:
        past = memory
        *before, tokens = prompt.split(segment or prompt.shape[1], dim=1)
        for piece in before:
            past = _read(model, piece, past)[1]
        while True:
            logits, past = _read(model, tokens, past)
            token = _choose(logits[:, -1], generator, temperature=temperature, top_k=top_k, top_p=top_p)
            yield token
            tokens = token[:, None]

    return continued()


def likeliest(
    logits: Float[Tensor, "B V"], *, top_k: int | None = None, top_p: float | None = None
) -> Bool[Tensor, "B V"]:
    """True for the tokens among which to choose: the ``top_k`` likeliest, and the fewest that reach ``top_p``."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None:
        probabilities = logits.gather(1, order).softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        kept[:, 1:] &= before[:, 1:] < top_p
    return torch.zeros_like(kept).scatter(1, order, kept)


def _choose(
    logits: Float[Tensor, "B V"],
    generator: torch.Generator,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Tensor, " B"]:
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are NaN or infinite, so no token can be chosen; look at its weights.")
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None or top_p is not None:
        logits = logits.masked_fill(~likeliest(logits, top_k=top_k, top_p=top_p), -math.inf)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


def _read(model: Speaker, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """``model.logits`` in evaluation mode without gradients; each submodule gets its own mode back."""
    with evaluating(model):
        return model.logits(tokens, memory)


def _check(
    model: Speaker,
    prompt: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    segment: int | None,
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"generate(temperature={temperature}): a temperature is finite and ≥ 0; try 0.8, or 0 for greedy."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate(top_k={top_k}): top_k counts the tokens to choose among, at least 1, or is None.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate(top_p={top_p}): top_p is a probability, 0 < top_p ≤ 1, or None; try 0.9.")
    if segment is not None and segment < 1:
        raise ValueError(f"generate(segment={segment}): segment counts the tokens of a piece, at least 1, or is None.")
    if prompt.ndim != 2 or prompt.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"the prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}, and must be [rows, tokens] of "
            "torch.int64; for one row give Vocabulary.encode(text)[None]."
        )
    if prompt.numel() == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt.shape)}; give at least one row and one token a row.")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= model.vocabulary_size:
        raise ValueError(
            f"the prompt has token {low if low < 0 else high}, but the model knows 0 … {model.vocabulary_size - 1}; "
            "encode it with the vocabulary that the model was trained with."
        )
