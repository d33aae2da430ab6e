"""The adaptive embedding and softmax of Transformer-XL's code, which the codes of DEQ and of TorchDEQ contain.

Names: ``word_emb.emb_layers.i.weight`` are the tables, ``word_emb.emb_projs.i`` their projections,
``crit.out_layers.i`` the tied words with their biases, ``crit.out_projs.i`` the head's projections, of which only the
first is its own, and ``crit.cluster_weight`` with ``crit.cluster_bias`` the slots of the clusters, the last one first.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from equilibria.lm.convert.tensors import ConversionError, Tensors
from equilibria.lm.model import AdaptiveConfig, LanguageConfig

TABLE, WORDS = "word_emb.emb_layers.{}.weight", "crit.out_layers.{}.{}"
SLOTS = "crit.cluster_weight"


def vocabulary_size(tensors: Tensors) -> int:
    """V, the rows of all tables together."""
    return sum(len(_table(tensors, index)) for index in range(tensors.count(TABLE)))


def with_clusters(tensors: Tensors, config: LanguageConfig) -> LanguageConfig:
    """``config`` with the clusters of the file; their cutoffs are no shape where there is one table.

    Raises:
        ConversionError: the cutoffs of ``config`` are not as many as the file's clusters, or it is untied.
    """
    tables, width = tensors.count(TABLE), config.cell.width
    first = _table(tensors, 0).shape[1]
    if SLOTS not in tensors:
        if first != width:
            raise ConversionError(
                f"{tensors.source} has word vectors of width {first} in a model of width {width} and no clusters, and "
                "a plain softmax here has vectors of the model's width."
            )
        return dataclasses.replace(config, adaptive=None, scaled=True)
    if not config.tied:
        raise ConversionError(
            "--model.tied False: an untied adaptive softmax has other parameters here than in the authors' code; leave "
            "it out if embedding and softmax share their tables."
        )
    clusters = dict.fromkeys(("width", "division", "cutoffs"))
    clusters["width"] = None if first == width else first
    if tables > 1:
        sizes = [len(_table(tensors, index)) for index in range(tables)]
        clusters["cutoffs"] = tuple(itertools.accumulate(sizes[:-1]))
        clusters["division"] = _division(tensors, tables, config.adaptive)
    else:
        clusters["division"] = 1
        clusters["cutoffs"] = _stated_cutoffs(tensors, config.adaptive)
    adaptive = dataclasses.replace(config.adaptive or AdaptiveConfig(), **clusters)
    return dataclasses.replace(config, adaptive=adaptive, scaled=True)


def clustered(tensors: Tensors, config: LanguageConfig) -> dict[str, Tensor]:
    """The parameters of the embedding and of the head."""
    found, tables = {}, tensors.count(TABLE)
    adaptive = config.adaptive is not None
    for index in range(tables):
        name = f"embedding.tables.{index}" if adaptive else "embedding.weight"
        found[name] = tensors.take(TABLE.format(index))
        if config.tied:
            tensors.check_same(WORDS.format(index, "weight"), TABLE.format(index))
        else:
            found["head.weight"] = tensors.take(WORDS.format(index, "weight"))
    found["head.bias"] = torch.cat([tensors.take(WORDS.format(index, "bias"), axes=(1,)) for index in range(tables)])
    if not adaptive:
        return found
    found["head.slot_weight"] = tensors.take(SLOTS, axes=(2,)).flip(0)
    found["head.slot_bias"] = tensors.take("crit.cluster_bias", axes=(1,)).flip(0)
    return found | _projections(tensors, 1 + len(found["head.slot_bias"]))


def _table(tensors: Tensors, index: int) -> Tensor:
    """The vectors of the words of a cluster, by rows."""
    return tensors.look(TABLE.format(index), axes=(2,))


def _projections(tensors: Tensors, clusters: int) -> dict[str, Tensor]:
    """P_i, and the head's own Q_0; the others are P_i again, or P_0 where there is one projection for all clusters."""
    inside = list(itertools.takewhile(lambda i: _projection(tensors, "word_emb.emb_projs", i), itertools.count()))
    if not inside:
        return {}
    found = {
        f"embedding.projections.{index}": tensors.take(_projection(tensors, "word_emb.emb_projs", index) or "")
        for index in inside
    }
    outside = [
        _projection(tensors, "crit.out_projs", index) or f"crit.out_projs.{index}.weight" for index in range(clusters)
    ]
    for index, name in enumerate(outside[1:], 1):
        origin = _projection(tensors, "word_emb.emb_projs", min(index, inside[-1]))
        tensors.check_same(name, origin or "")
    found["head.projection"] = tensors.take(outside[0])
    return found


def _projection(tensors: Tensors, below: str, index: int) -> str | None:
    """The name of a projection, which is a linear module or a parameter of a list; None if there is none."""
    names = (f"{below}.{index}.weight", f"{below}.{index}")
    return next((name for name in names if name in tensors), None)


def _division(tensors: Tensors, tables: int, stated: AdaptiveConfig | None) -> int:
    """The division that gives the widths of the tables, the stated one if it does."""
    widths = [_table(tensors, index).shape[1] for index in range(tables)]
    candidates = [*([] if stated is None else [stated.division]), *range(2, widths[0] + 1)]
    for division in candidates:
        if [widths[0] // division**index for index in range(tables)] == widths:
            return division
    raise ConversionError(
        f"{tensors.source} has word vectors of the widths {', '.join(map(str, widths))}, which no division of the "
        "first gives."
    )


def _stated_cutoffs(tensors: Tensors, stated: AdaptiveConfig | None) -> tuple[int, ...]:
    """The cutoffs of the recipe: one table says nothing of them, but how many there are."""
    clusters = len(tensors.look(SLOTS, axes=(2,)))
    known = () if stated is None else stated.cutoffs
    if len(known) != clusters:
        raise ConversionError(
            f"{tensors.source} has {clusters} clusters over one table, and the recipe has the cutoffs {known}; where "
            "the clusters begin is in no file, so choose a recipe that has as many, such as wikitext103-small, and "
            "give them with --model.adaptive.cutoffs."
        )
    return known
