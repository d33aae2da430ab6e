"""Sharded checkpoints: each rank writes its own part, with PyTorch's distributed checkpoints in safetensors files.

    checkpoints/step-00000500/shards/*.safetensors   weights and the optimiser's tensors, in pieces
                              memory.safetensors     the memory of the streams of all ranks
                              optimiser.pt           the rest of the optimiser, and random generators
                              state.json             step, position, best value, and the SHA-256 of the other files

When a checkpoint is read, its tensors are sharded like the model that reads it, so a run can continue with another
number of ranks. A rank reads its own shards only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from equilibria.lm.ranks import Ranks, is_sharded
from equilibria.lm.runs.checkpoint import SHARDS, Checkpoint, being_written, write_rest
from equilibria.lm.runs.pieces import Piece, pieces_in, quiet, whole


def save_sharded(folder: Path, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Write the checkpoint; all ranks call it together."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(being_written(folder, checkpoint)) if ranks.first else None
        place = Path(ranks.of_first(unfinished)) / SHARDS
        optimiser, pieces = _taken_out(checkpoint.optimiser["optimiser"])
        pieces |= {f"model.{name}": whole(tensor) for name, tensor in checkpoint.model.items()}
        with quiet():
            save(pieces, storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True))
        if unfinished is not None:
            write_rest(unfinished, checkpoint.memory, {**checkpoint.optimiser, "optimiser": optimiser})


def load_sharded(place: Path, optimiser: Mapping[str, Any]) -> tuple[dict[str, Piece], dict[str, Any]]:
    """The weights by name, and ``optimiser`` with its sharded tensors inserted, all as pieces that are not read yet."""
    pieces = pieces_in(place)
    stored = optimiser["optimiser"]
    state = {
        index: {name: pieces[_piece(index, name)] if value is None else value for name, value in values.items()}
        for index, values in stored["state"].items()
    }
    model = {name.removeprefix("model."): piece for name, piece in pieces.items() if name.startswith("model.")}
    return model, {**optimiser, "optimiser": {**stored, "state": state}}


def _taken_out(stored: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimiser's state with None instead of each sharded tensor, and the sharded tensors by name."""
    pieces: dict[str, Tensor] = {}
    state: dict[Any, dict[str, Any]] = {}
    for index, values in stored["state"].items():
        state[index] = {name: None if is_sharded(value) else value for name, value in values.items()}
        pieces |= {_piece(index, name): value for name, value in values.items() if is_sharded(value)}
    return {**stored, "state": state}, pieces


def _piece(index: int, name: str) -> str:
    return f"optimiser.{index}.{name}"
