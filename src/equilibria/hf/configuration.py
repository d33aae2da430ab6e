"""EquilibriumConfig: a language model of this library as a configuration of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from equilibria.cells import CellConfig
from equilibria.cells.chain import ChainConfig
from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.checks import check_flag, check_whole
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.lm.experiments.serialise import part_from_json, part_to_json
from equilibria.lm.model import LanguageConfig
from equilibria.lm.suggestions import nearest

MODEL_TYPE = "equilibrium"
_OBJECTS = ("language", "method", "eval_stop")
"""The fields that hold objects of this library as dictionaries."""


class EquilibriumConfig(PreTrainedConfig):
    """The model, its methods, and the sizes that transformers reads.

    The dictionaries are the values of ``experiment.json``: ``language`` is a ``LanguageConfig``, ``method`` a
    ``Method``, ``eval_stop`` a ``Stop``. ``EquilibriumConfig.of`` makes them from the objects.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values", "cache", "evals", "residual", "converged"]  # noqa: RUF012

    vocab_size: int = 256
    """Number of ids, ``edge_token_id`` included."""
    language: dict | None = None
    """The ``LanguageConfig``; None for its defaults."""
    method: dict | None = None
    """The ``Method`` of training, and of evaluation but for ``eval_stop``; None for ``Method()``."""
    eval_stop: dict | None = None
    """The ``Stop`` of evaluation; None for that of the method."""
    folded: bool = False
    """True if normalised weights are stored as the plain matrices that they make."""
    edge_token_id: int | None = None
    """An id for the edges of a text, before its beginning, after its end and in padding: no token of the vocabulary."""
    edge_reads_as: int | None = None
    """The token that the model reads in its place, such as the end of a line."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    """False: a tied head reads the table of the embedding, so there is one parameter and nothing to tie."""
    use_cache: bool = True

    @classmethod
    def of(
        cls,
        language: LanguageConfig,
        vocabulary_size: int,
        *,
        method: Method | None = None,
        eval_stop: Stop | None = None,
        edge_reads_as: int | None = None,
        folded: bool = False,
        **more: Any,
    ) -> EquilibriumConfig:
        """The configuration of a model over ``vocabulary_size`` tokens, and of one more id for the edges of texts.

        Args:
            language: the hyper-parameters of the model.
            vocabulary_size: V, number of tokens.
            method: the method of the solves; None for ``Method()``.
            eval_stop: the stop of evaluation; None for that of the method.
            edge_reads_as: the token to read at edges; None for no such id.
            folded: store normalised weights as plain matrices.
            more: other fields of a ``PreTrainedConfig``.

        Raises:
            ValueError: the model solves nothing, or its layer cannot be built from a configuration.
        """
        edge = None if edge_reads_as is None else vocabulary_size
        fields: dict[str, Any] = {
            "vocab_size": vocabulary_size + (edge is not None),
            "language": language,
            "method": Method() if method is None else method,
            "eval_stop": eval_stop,
            "folded": folded,
            "edge_token_id": edge,
            "edge_reads_as": edge_reads_as,
            "bos_token_id": edge,
            "eos_token_id": edge,
            "pad_token_id": edge,
        }
        config = cls(**(fields | more))
        config.check()
        return config

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy the source of this module beside the weights."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **changes: Any) -> Any:
        """As in transformers, which silently drops unknown fields; a misspelt or misplaced one is an error here."""
        _refuse_ignored(changes)
        return super().from_dict(config_dict, **changes)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; ``language``, ``method`` and ``eval_stop`` also take the object instead of its dictionary.

        Raises:
            ValueError: the name is a misspelt field, belongs inside one, or follows from the cell. Any other name is
                kept, as in transformers.
        """
        _refuse_ignored({name: value})
        as_object = name in _OBJECTS and dataclasses.is_dataclass(value) and not isinstance(value, type)
        super().__setattr__(name, part_to_json(value) if as_object else value)

    def check(self) -> None:
        """Raise a ValueError unless the configuration is that of an equilibrium of a cell of this library."""
        name = type(self).__name__
        check_whole(name, vocab_size=self.vocab_size)
        check_whole(name, optional=True, edge_token_id=self.edge_token_id, edge_reads_as=self.edge_reads_as)
        check_flag(name, folded=self.folded)
        self._check_edge()
        language = self.decoded_language()
        if not language.solves:
            raise ValueError(
                "EquilibriumConfig(language=LanguageConfig(explicit=Explicit(…))): an explicit network needs a slot "
                "per layer and position, and this model has one per position; export it as safetensors instead."
            )
        if isinstance(language.cell, ChainConfig) and language.cell.memory == "last":
            raise ValueError(
                "EquilibriumConfig(language=LanguageConfig(ChainConfig(memory='last'))): its blocks read final states "
                "of the past and inputs of blocks in the segment at hand, so the same text has other values with a "
                "cache than without, and transformers takes them for equal; use `equilibria generate` and `evaluate`, "
                "or export it as safetensors."
            )

    def _check_edge(self) -> None:
        edge, read = self.edge_token_id, self.edge_reads_as
        if edge is not None and not 0 <= edge < self.vocab_size:
            raise ValueError(
                f"EquilibriumConfig(edge_token_id={edge}): the ids of this model are 0 … {self.vocab_size - 1}; leave "
                "the edge as the model was saved with it."
            )
        if edge is not None and (read is None or not 0 <= read < self.table_rows):
            raise ValueError(
                f"EquilibriumConfig(edge_reads_as={read}): the model reads the edge as one of the tokens 0 … "
                f"{self.table_rows - 1}, such as the end of a line."
            )

    def decoded_language(self) -> LanguageConfig:
        """The ``LanguageConfig``."""
        return LanguageConfig() if self.language is None else part_from_json(self.language, LanguageConfig)

    def decoded_method(self) -> Method:
        """The ``Method``."""
        return Method() if self.method is None else part_from_json(self.method, Method)

    def decoded_eval_stop(self) -> Stop | None:
        """The ``Stop`` of evaluation; None for that of the method."""
        return None if self.eval_stop is None else part_from_json(self.eval_stop, Stop)

    @property
    def cell(self) -> CellConfig:
        """The cell of the model."""
        return self.decoded_language().cell

    @property
    def table_rows(self) -> int:
        """The number of rows of embedding and head: one per id. The edge has a row only after a resize added ids."""
        return self.vocab_size - (self.edge_token_id == self.vocab_size - 1)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the cache: one per block, however many evaluations a solve needs."""
        return len(blocks_of(self.cell)) or 1

    @property
    def hidden_size(self) -> int:
        """D, channels of embedding and state; of a trellis, those of its input."""
        return self.cell.width

    @property
    def num_attention_heads(self) -> int:
        """H, heads of the first block; 1 for a trellis."""
        blocks = blocks_of(self.cell)
        return blocks[0].heads if blocks else 1

    @property
    def num_key_value_heads(self) -> int:
        """As ``num_attention_heads``."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """C, channels of a slot per head."""
        cell = self.cell
        if isinstance(cell, TrellisConfig):
            return max(cell.width, 2 * cell.channels)
        return self.hidden_size // self.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """Number of positions that a text may have.

        Raises:
            AttributeError: there is no such number, since positions enter by distances inside a window.
        """
        decays = [block for block in blocks_of(self.cell) if block.positions == "decay"]
        limits = [block.longest for block in decays if block.reach > block.longest]
        if not limits:
            raise AttributeError("max_position_embeddings: a text may have any number of positions")
        return min(limits)


def blocks_of(cell: CellConfig) -> tuple[TransformerConfig, ...]:
    """The blocks of attention in a cell, each with keys and values of its own; none in a trellis."""
    return cell.cells if isinstance(cell, ChainConfig) else () if isinstance(cell, TrellisConfig) else (cell,)


def seen_in_training(language: LanguageConfig, segment_length: int) -> LanguageConfig:
    """The model with a window of the distances that its training had: those of memory and segment together.

    Without a cut between segments a position would see more of the past than in any step of the training, at distances
    whose weights were never trained.
    """
    cell = language.cell
    if isinstance(cell, TrellisConfig):
        return language
    if isinstance(cell, ChainConfig):
        cells = tuple(_narrowed(block, segment_length) for block in cell.cells)
        return dataclasses.replace(language, cell=dataclasses.replace(cell, cells=cells))
    return dataclasses.replace(language, cell=_narrowed(cell, segment_length))


def _narrowed(cell: TransformerConfig, segment_length: int) -> TransformerConfig:
    return dataclasses.replace(cell, window=min(cell.reach, cell.memory + segment_length))


def _refuse_ignored(given: Mapping[str, Any]) -> None:
    """Raise a ValueError for a name that transformers would keep or drop without effect."""
    for name, value in given.items():
        if (advice := _advice(name)) is not None:
            raise ValueError(f"EquilibriumConfig({name}={value!r:.60}): {advice}")


def _advice(name: str) -> str | None:
    if name in _INSIDE:
        kind, field = _INSIDE[name]
        return f"{name} is a field of {kind}; give {field}={kind}({name}=…)."
    known = getattr(EquilibriumConfig, name, None)
    if isinstance(known, property) and known.fset is None:
        return f"{name} follows from the cell; give language=LanguageConfig(…) with another cell, or leave it out."
    if known is not None or name in _OWN or name.endswith("_token_id"):
        return None
    question = nearest(name, _OWN, least=0.8)
    return f"there is no such field; {question}" if question else None


_OWN = (*_OBJECTS, "vocab_size", "folded", "edge_token_id", "edge_reads_as")
"""The fields that configurations of other models do not have."""
_INSIDE = {
    field.name: (kind.__name__, place)
    for place, kind in (("language", LanguageConfig), ("method", Method), ("eval_stop", Stop))
    for field in dataclasses.fields(kind)
}
"""The fields inside those that hold objects, by name: the kind of the object, and where it is."""


AutoConfig.register(MODEL_TYPE, EquilibriumConfig)
