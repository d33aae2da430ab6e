"""with_memory: an experiment whose cell remembers another number of positions."""

from __future__ import annotations

import dataclasses
from typing import Any

from equilibria.cells.chain import ChainConfig
from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.errors import UsageError
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.model import LanguageConfig


def with_memory(experiment: Experiment, length: int, *, segment: int | None = None) -> Experiment:
    """The experiment with a cell (or a chain of blocks) that remembers ``length`` positions.

    Raises:
        UsageError: the cell is of a kind whose memory has no length, or it has biases for fewer positions.
    """
    model = experiment.model
    cell = model.cell if isinstance(model, LanguageConfig) else model
    cell = _remembering(cell, length, experiment.training.batches.segment_length if segment is None else segment)
    return dataclasses.replace(experiment, model=dataclasses.replace(model, cell=cell))


def _remembering(cell: Any, length: int, segment: int) -> Any:
    if isinstance(cell, ChainConfig):
        return dataclasses.replace(cell, cells=tuple(_remembering(block, length, segment) for block in cell.cells))
    if not isinstance(cell, TransformerConfig):
        raise UsageError(
            f"--memory-length {length}: the memory of a {type(cell).__name__} has no length; leave it out for this "
            "model."
        )
    longest = cell.longest - segment
    # A cell with a bias for every position that it sees needs no more of them, however long its memory is.
    if cell.positions == "decay" and cell.reach > cell.longest and min(length, cell.reach - 1) > longest:
        advice = f"give at most {longest:,}" if longest >= 0 else f"give segments of at most {cell.longest:,}"
        raise UsageError(
            f"--memory-length {length}: this cell has position biases for {cell.longest:,} positions, for memory and "
            f"a segment of {segment:,} together; {advice}."
        )
    return dataclasses.replace(cell, memory=length)
