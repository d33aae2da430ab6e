"""Tensors of a checkpoint that are read on demand, so that a rank reads its own shards only."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equilibria.lm.ranks import sharded_as

if TYPE_CHECKING:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader as _Reader  # takes a second to import
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A tensor in the shards of a checkpoint, which is read on demand."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    reader: _Reader

    def whole(self) -> Tensor:
        """The full tensor, read into the memory of this process."""
        return self.read_into(torch.empty(self.shape, dtype=self.dtype))

    def read_into(self, target: Tensor) -> Tensor:
        """Fill ``target`` and return it; if it is sharded, only this rank's shard is read."""
        from torch.distributed.checkpoint.state_dict_loader import load

        with quiet():
            load({self.name: target}, storage_reader=self.reader, no_dist=True)
        return target


def whole(stored: Tensor | Piece) -> Tensor:
    """The full tensor for a tensor or piece of a checkpoint."""
    return stored.whole() if isinstance(stored, Piece) else stored


def like(stored: Tensor | Piece, target: Tensor) -> Tensor:
    """The stored tensor, on the device of ``target`` and sharded like it."""
    if isinstance(stored, Piece):
        return stored.read_into(torch.empty_like(target))
    return sharded_as(stored, target)


def pieces_in(place: Path) -> dict[str, Piece]:
    """The tensors in a folder of shards by name; reads only the headers of its files.

    Raises:
        ValueError: the shards of a tensor do not cover it completely, each place once.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with quiet():
        reader = HuggingFaceStorageReader(str(place))
        described = reader.read_metadata()
    reader.read_metadata = lambda: described  # the headers are read once, not once per tensor
    pieces: dict[str, Piece] = {}
    for name, found in described.state_dict_metadata.items():
        if isinstance(found, TensorStorageMetadata):
            if sum(chunk.sizes.numel() for chunk in found.chunks) != found.size.numel() or _overlap(found.chunks):
                raise ValueError(f"the shards of {name} do not fill a tensor of shape {list(found.size)}")
            pieces[name] = Piece(name, found.size, found.properties.dtype, reader)
    return pieces


def _overlap(chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """True if two of the shards share a place, so that the last one read would decide."""
    boxes = sorted(
        [(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in chunks
        if chunk.sizes.numel()
    )
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            if box and other[0][0] >= box[0][1]:
                break  # and so do all after it
            if all(low < end and start < high for (low, high), (start, end) in zip(box, other, strict=True)):
                return True
    return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, warnings are silenced: PyTorch warns about its own use of deprecated functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
