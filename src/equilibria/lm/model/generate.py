"""Generation token by token: the prompt is one segment, and each new token is a segment of length 1 with memory.

By the exactness law (two segments joined by memory have the equilibrium of one long segment) the result is the same as
solving the whole text again for every token, as long as the memory holds all of it. The model's cache stores the keys
and values of past positions, so that a token costs one solve of one position.

Letters: B batch, T time, V vocabulary, L tokens generated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.checks import check_number, check_whole, range_of
from equilibria.layers.sequence import Memory
from equilibria.lm.model.modes import eval_mode

Prompt = Int[Tensor, "B T"] | Sequence[Int[Tensor, " _"]]
"""B prompts of one length, or a list of prompts of any lengths."""


@runtime_checkable
class CausalLM(Protocol):
    """The interface that generation needs. If there is a ``cache`` as in ``SequenceCell``, generation uses it too."""

    @property
    def vocabulary_size(self) -> int:
        """V."""
        ...

    def logits(
        self, tokens: Int[Tensor, "B T"], memory: Memory = None, *, last: bool = False
    ) -> tuple[Float[Tensor, "B _ V"], Memory]:
        """The logits after each token, or after the last one only, and the memory for the tokens that follow."""
        ...


def generate(
    model: CausalLM,
    prompt: Prompt,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
    memory: Memory = None,
    memory_length: int | None = None,
    segment: int | None = None,
) -> Int[Tensor, "B L"]:
    """Up to ``length`` tokens that continue each prompt.

    Args:
        model: the model; it runs in evaluation mode without gradients, and its own mode is restored.
        prompt: at least one token per prompt; prompts of different lengths as a list.
        length: number of tokens to generate; L is smaller only if ``stop`` ends all texts earlier.
        temperature: divides the logits; 0 always takes the most probable token, and so do tiny values.
        top_k: choose among the k most probable tokens only.
        top_p: choose among the fewest most probable tokens whose probabilities sum to at least this (Holtzman et al.
            2020).
        seed: seed of the choices, from 0 to 2⁶³ − 1; PyTorch's global generators are not used.
        stop: a token that ends its text; a text that has ended repeats it until all have ended.
        memory: the memory of the text before the prompt.
        memory_length: number of past positions to remember; None for the model's own.
        segment: solve the prompt in pieces of at most this many tokens; None for one piece.

    Raises:
        ValueError: an argument is out of its range, the prompt has unknown tokens, or the logits are not finite.
        TypeError: the prompt is not made of tensors.
    """
    check_whole("generate", length=length)
    if length < 1:
        raise ValueError(f"generate(length={length}): length counts the tokens to generate and is at least 1.")
    tokens = stream(
        model,
        prompt,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        memory=memory,
        memory_length=memory_length,
        segment=segment,
    )
    return torch.stack(list(itertools.islice(tokens, length)), dim=1)


def stream(
    model: CausalLM,
    prompt: Prompt,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
    memory: Memory = None,
    memory_length: int | None = None,
    segment: int | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """An iterator over the next tokens [B], one position at a time, for showing text while it is generated.

    The arguments are those of ``generate``. Without ``stop`` the iterator never ends. The weights must not change while
    it is used.
    """
    check_whole("generate", seed=seed)
    check_whole("generate", optional=True, top_k=top_k, stop=stop, segment=segment, memory_length=memory_length)
    check_number("generate", temperature=temperature)
    check_number("generate", optional=True, top_p=top_p)
    _check_choices(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    _check_lengths(segment=segment, memory_length=memory_length)
    tokens, padding = _batch(prompt)
    _check_tokens(model, tokens, stop)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    past = _memory(model, len(tokens), length=memory_length, padding=padding, memory=memory)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def continued(past: Memory, ended: Tensor) -> Iterator[Tensor]:
        *before, unread = _pieces(tokens, segment)
        for piece in before:
            past = _read(model, piece, past)[1]
        while not (stop is not None and ended.all()):
            logits, past = _read(model, unread, past)
            token = _choose(logits[:, -1], generator, **choices)
            if stop is not None:
                token = torch.where(ended, stop, token)
                ended = ended | (token == stop)
            yield token
            unread = token[:, None]

    return continued(past, ended)


def top_k_top_p_mask(
    logits: Float[Tensor, "B V"], *, top_k: int | None = None, top_p: float | None = None
) -> Bool[Tensor, "B V"]:
    """True for the tokens to sample from: the ``top_k`` most probable, and the fewest that sum to ``top_p``."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None:
        kept[:, top_k:] = False
    if top_p is not None and top_p < 1:  # the rounded sum of all can pass 1 before its end
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
        raise ValueError("the model's logits are NaN or infinite, so no token can be chosen; check its weights.")
    if temperature == 0:
        return logits.argmax(dim=1)
    logits = _tempered(logits.to(torch.promote_types(logits.dtype, torch.float32)), temperature)
    if top_k is not None or top_p is not None:
        logits = logits.masked_fill(~top_k_top_p_mask(logits, top_k=top_k, top_p=top_p), -math.inf)
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1)


def _tempered(logits: Float[Tensor, "B V"], temperature: float) -> Float[Tensor, "B V"]:
    """(logits − max) / temperature: 0 for the most probable tokens, negative (possibly −∞) for the others.

    So no temperature can overflow; 0/0 and 0·∞ at the maximum are defined as 0.
    """
    below = logits - logits.amax(dim=1, keepdim=True)
    return torch.where(below == 0, 0.0, below / temperature)


def _read(model: CausalLM, tokens: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """``model.logits`` in evaluation mode without gradients; each submodule gets its own mode back."""
    with eval_mode(model):
        return model.logits(tokens, memory, last=True)


def _pieces(tokens: Int[Tensor, "B T"], segment: int | None) -> list[Int[Tensor, "B _"]]:
    """The prompt divided into segments from its end, so that the division of a text does not depend on the batch."""
    time = tokens.shape[1]
    if segment is None or segment >= time:
        return [tokens]
    first = time % segment
    return [*([tokens[:, :first]] if first else []), *tokens[:, first:].split(segment, dim=1)]


def _memory(model: CausalLM, batch: int, *, length: int | None, padding: Tensor | None, memory: Memory) -> Memory:
    """The memory that generation starts from: the model's cache, or ``memory`` itself if the model has no cache."""
    # Not by isinstance: wrappers such as that of torch.compile forward attributes that their class does not have.
    cache = getattr(model, "cache", None)
    if cache is not None:
        with eval_mode(model):
            return cache(batch, length=length, padding=padding, memory=memory)
    if padding is not None or length is not None:
        raise ValueError(
            f"{type(model).__name__} has no cache, so it needs prompts of one length and cannot change the length of "
            "its memory; give prompts of one length, and memory_length=None."
        )
    return memory


def _batch(prompt: Prompt) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"] | None]:
    """The prompts as one tensor, padded on the left, and the padding of each; None if there is none."""
    if isinstance(prompt, Tensor):
        _check_shape(prompt, axes=2)
        return prompt, None
    if not len(prompt):
        raise ValueError("the prompt is an empty list; give at least one prompt.")
    for row in prompt:
        _check_shape(row, axes=1)
    longest = max(map(len, prompt))
    lengths = torch.tensor([len(row) for row in prompt], device=prompt[0].device)
    batch = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in prompt])
    return batch, None if bool((lengths == longest).all()) else longest - lengths


def _check_choices(*, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"generate(temperature={temperature}): a temperature is finite and ≥ 0; try 0.8, or 0 for greedy."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate(top_k={top_k}): top_k counts the tokens to choose among, at least 1, or is None.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate(top_p={top_p}): top_p is a probability, 0 < top_p ≤ 1, or None; try 0.9.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"generate(seed={seed}): a seed is a whole number from 0 to 2⁶³ − 1; try 0.")


def _check_lengths(*, segment: int | None, memory_length: int | None) -> None:
    if segment is not None and segment < 1:
        raise ValueError(f"generate(segment={segment}): segment counts the tokens of a piece, at least 1, or is None.")
    if memory_length is not None and memory_length < 0:
        raise ValueError(f"generate(memory_length={memory_length}): it counts positions, at least 0, or is None.")


def _check_shape(tokens: Tensor, *, axes: int) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"the prompt holds a {type(tokens).__name__}, and must be a tensor [prompts, tokens] or a list of tensors "
            "[tokens]; for one prompt give [Vocabulary.encode(text)]."
        )
    if tokens.ndim != axes or tokens.dtype not in (torch.int32, torch.int64):
        wanted = "[prompts, tokens]" if axes == 2 else "[tokens] for each prompt of the list"
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, and must be {wanted} of "
            "torch.int64; for one prompt give Vocabulary.encode(text)[None]."
        )
    if tokens.numel() == 0:
        raise ValueError(f"the prompt has shape {tuple(tokens.shape)}; give at least one token per prompt.")


def _check_tokens(model: CausalLM, tokens: Tensor, stop: int | None) -> None:
    low, high = range_of(tokens)
    if low < 0 or high >= model.vocabulary_size:
        raise ValueError(
            f"the prompt has token {low if low < 0 else high}, but the model knows 0 … {model.vocabulary_size - 1}; "
            "encode it with the vocabulary that the model was trained with."
        )
    if stop is not None and not 0 <= stop < model.vocabulary_size:
        raise ValueError(
            f"generate(stop={stop}): stop is a token, 0 … {model.vocabulary_size - 1}, or None for no such token."
        )
