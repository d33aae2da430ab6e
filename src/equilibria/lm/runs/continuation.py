"""continuation: the text that a model generates after a prompt, piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from jaxtyping import Int
from torch import Tensor

from equilibria.checks import check_whole
from equilibria.lm.corpora import Language, Vocabulary
from equilibria.lm.corpora.vocabulary import noun
from equilibria.lm.model import LanguageModel
from equilibria.lm.model.generate import stream


def continuation(
    model: LanguageModel,
    language: Language,
    prompts: Sequence[str],
    *,
    length: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | None = None,
    segment: int | None = None,
) -> Iterator[tuple[str, ...]]:
    """An iterator over the generated text: at each step one piece per prompt, empty for a text that has ended.

    Args:
        model: in evaluation mode.
        language: the vocabulary of the model.
        prompts: texts to continue side by side, each with at least one token.
        length: number of tokens to generate.
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: choose among the k most probable tokens only.
        top_p: choose among the fewest most probable tokens whose probabilities add up to at least this.
        seed: the same seed gives the same text.
        stop: a token that ends the text; a backslash and an n are a line feed.
        segment: tokens of the prompts per solve; None for all.

    Raises:
        ValueError: a prompt is empty or has tokens that the model does not know, or a setting is out of its range.
    """
    vocabulary = language.vocabulary
    if language.unit == "symbol":
        raise ValueError(f"The corpus {language.name} is a synthetic task, not text; generate needs a run on text.")
    check_whole("generate", length=length)
    if length < 1:
        raise ValueError(f"The length {length} is the number of tokens to generate and is at least 1; try 400.")
    if isinstance(prompts, str):  # whose letters would be the prompts
        raise TypeError(f"The prompts are the text {prompts!r:.60}, and are a list of texts; try [{prompts!r:.60}].")
    if not prompts:
        raise ValueError("There is no prompt, and the model needs something to continue; try 'The '.")
    end = None if stop is None else _token(vocabulary, stop)
    device = next(model.parameters()).device
    tokens = stream(
        model,
        [_encoded(vocabulary, prompt).to(device) for prompt in prompts],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=end,
        segment=segment,
    )
    texts = [Detokeniser(vocabulary, prompt, end) for prompt in prompts]
    return _pieces(itertools.islice(tokens, length), texts, length)


def _pieces(steps: Iterator[Int[Tensor, " B"]], texts: Sequence[Detokeniser], length: int) -> Iterator[tuple[str, ...]]:
    """The pieces of the texts; the last of ``length`` steps also shows what was held back."""
    for number, step in enumerate(steps, 1):
        pieces = [text.piece(place) for text, place in zip(texts, step.tolist(), strict=True)]
        if number == length:
            pieces = [piece + text.rest() for text, piece in zip(texts, pieces, strict=True)]
        yield tuple(pieces)


class Detokeniser:
    """Turns the tokens of one text into pieces of text, as the vocabulary spells them, until a token that ends it.

    Args:
        vocabulary: the vocabulary of the tokens.
        before: the text before the first token.
        stop: the token after which every piece is empty; None for no such token.
    """

    def __init__(self, vocabulary: Vocabulary, before: str, stop: int | None) -> None:
        self._speller, self._stop, self._ended = vocabulary.speller(before), stop, False

    def piece(self, place: int) -> str:
        """The text of the next token; empty once the text has ended."""
        if self._ended:
            return ""
        if place == self._stop:
            return self.rest()
        return self._speller.piece(place)

    def rest(self) -> str:
        """The text of what was held back: bytes that are no whole character. It ends the text."""
        rest, self._ended = "" if self._ended else self._speller.rest(), True
        return rest


def _encoded(vocabulary: Vocabulary, prompt: str) -> Int[Tensor, " T"]:
    if not isinstance(prompt, str):
        raise TypeError(f"The prompt is a {type(prompt).__name__}, and is a text; try 'The '.")
    if not prompt:
        raise ValueError("The prompt is empty, and the model needs something to continue; try 'The '.")
    try:
        ids = vocabulary.encode(prompt, finish=False)
    except ValueError as error:
        raise ValueError(f"The prompt: {error}") from None
    if not len(ids):
        raise ValueError(f"The prompt {prompt!r} has no word in it; try 'The '.")
    return ids


def _token(vocabulary: Vocabulary, text: str) -> int:
    """The id of the token ``text``, or of a line feed for a backslash and an n, as shells pass it on."""
    if not isinstance(text, str):
        raise TypeError(f"stop={text!r}: stop is a text, the token that ends the text; try '\\n'.")
    place = vocabulary.place_of("\n" if text == "\\n" else text)
    if place is None:
        raise ValueError(
            f"stop={text!r} is not one of the {len(vocabulary):,} {noun(vocabulary.unit)}s that the model knows; give "
            "one of these, such as \\n for the end of a line."
        )
    return place
