"""Tokenizers of transformers with the ids and the text of a vocabulary of this library."""

from __future__ import annotations

import json
import typing
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from equilibria.hf.configuration import EquilibriumConfig
from equilibria.hf.edges import EDGE
from equilibria.lm.corpora import Vocabulary
from equilibria.lm.corpora.byte_pairs import check_utf8
from equilibria.lm.corpora.vocabulary import lines_in

_SPACES = "".join(re for re in map(chr, range(0x3001)) if re.isspace() and re != "\n")
"""The characters at which ``str.split`` separates words; the regular expressions of ``tokenizers`` know fewer."""


class EquilibriumTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that names the words or characters that its vocabulary lacks."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: transformers would copy the source of this module beside the tokenizer."""

    def _encode_plus(self, text: Any, *args: Any, **choices: Any) -> Any:
        try:
            return super()._encode_plus(text, *args, **choices)
        except Exception as error:  # tokenizers raises plain Exception
            for part in _texts(text):
                for number, line in enumerate(lines_in(part), 1):
                    check_utf8(line, number)
            if "WordLevel" not in str(error):
                raise
            raise ValueError(self._missing(text)) from None

    def _decode(self, token_ids: Any, *args: Any, **choices: Any) -> str:
        """As in transformers, whose tokenizers leave out an id that they do not know; here it is an error."""
        for place in [token_ids] if isinstance(token_ids, int) else list(token_ids):
            if not 0 <= place < len(self):
                raise ValueError(
                    f"decode: the id {place} is outside 0 … {len(self) - 1}; decode ids that this tokenizer made, and "
                    f"labels without their −100, or with {self.pad_token_id} instead."
                )
        return super()._decode(token_ids, *args, **choices)

    def _missing(self, text: Any) -> str:
        backend, known = self.backend_tokenizer, self.get_vocab()
        texts = _texts(text)
        found: dict[str, None] = {}
        for part in texts:
            plain = part if backend.normalizer is None else backend.normalizer.normalize_str(part)
            found |= dict.fromkeys(token for token, _ in backend.pre_tokenizer.pre_tokenize_str(plain))
        missing = [token for token in found if token not in known]
        listed = ", ".join(map(repr, missing[:8]))
        return (
            f"the vocabulary of this model has no {listed}{' …' if len(missing) > 8 else ''}, and no token for unknown "
            "ones; leave them out of the text."
        )


def tokenizer_of(vocabulary: Vocabulary) -> EquilibriumTokenizer:
    """The tokenizer with the ids of ``vocabulary``, and with one more for the edges of texts and for padding.

    It encodes a text as a prompt: the last line of words ends in ``<eos>`` only if it ends in a line feed. Padding goes
    to the left.

    Raises:
        ValueError: the vocabulary has a token that is called like the one for edges.
    """
    units = {"character": _characters, "word": _words, "bpe": _byte_pairs}
    tokenizer = units[vocabulary.unit](vocabulary)
    tokenizer.add_special_tokens([AddedToken(EDGE, normalized=False, special=True)])
    edges = {"bos_token": EDGE, "eos_token": EDGE, "pad_token": EDGE}
    return EquilibriumTokenizer(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **edges
    )


def _characters(vocabulary: Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(_listed(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _words(vocabulary: Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(_listed(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[ \n{_SPACES}]+"), "removed")
    spaced = [decoders.WordPiece(prefix="\n", cleanup=False), decoders.Fuse()]  # no word begins with a line feed
    if vocabulary.end is not None:
        tokenizer.normalizer = normalizers.Replace("\n", f" {vocabulary.end} ")
        spaced.append(decoders.Replace(Regex(f" ?(?<![^ ]){vocabulary.end}(?![^ ]) ?"), "\n"))
    tokenizer.decoder = decoders.Sequence(spaced)
    return tokenizer


def _byte_pairs(vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(vocabulary.to_json()["tokenizer"]))


def _listed(vocabulary: Vocabulary) -> Any:
    places = {token: place for place, token in enumerate(vocabulary.tokens)}
    if EDGE in places:
        raise ValueError(
            f"the vocabulary has the token {EDGE!r}, which stands for the edges of texts here; call it otherwise in "
            "the text, and train again."
        )
    # Without a token for unknown words the model reports them; it must not get the name of one.
    return models.WordLevel(places, **({} if vocabulary.unknown is None else {"unk_token": vocabulary.unknown}))


def _texts(text: Any) -> list[str]:
    return [text] if isinstance(text, str) else [part for row in text for part in _parts(row)]


def _parts(row: Any) -> list[str]:
    return [row] if isinstance(row, str) else [part for part in typing.cast(list[str], row) if isinstance(part, str)]


AutoTokenizer.register(EquilibriumConfig, fast_tokenizer_class=EquilibriumTokenizer)
