"""Ranks: the processes that train one model together, and what they tell each other.

Nothing here is called between the first and the last iteration of a solve: ranks need different numbers of iterations,
and one that waits for another inside a solve would wait for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["none", "ddp", "fsdp"]
KINDS: tuple[Parallel, ...] = ("none", "ddp", "fsdp")
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""What torchrun tells each process."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone without arguments."""

    rank: int = 0
    """Which one this is."""
    size: int = 1
    """How many there are."""
    parallel: Parallel = "none"
    """How the model is spread over them: a replica each ("ddp"), or a shard of every parameter each ("fsdp")."""

    @classmethod
    @contextlib.contextmanager
    def joined(cls, parallel: Parallel, device: str, *, timeout: float) -> Iterator[Ranks]:
        """The process group of a ``torchrun``, left at the end; one process alone where there is none.

        Args:
            parallel: how the model is to be spread.
            device: where it is to be: decides between gloo and NCCL.
            timeout: seconds after which a rank that waits for a lost one gives up.

        Raises:
            ValueError: several processes that would all do the same, or one where several were asked for.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if parallel == "none" and size == 1:
            yield cls()
            return
        if parallel == "none":
            raise ValueError(
                f"{size} processes were started, and each would train the same; add --training.parallel ddp (a replica "
                "each) or fsdp (a shard each)."
            )
        if any(name not in os.environ for name in _WORLD):
            raise ValueError(
                f"--training.parallel {parallel} needs processes to train with: torchrun --nproc-per-node 2 -m "
                "equilibria train …, or leave it out to train with one."
            )
        import torch.distributed.nn  # before there is a group, which its default arguments would keep for ever

        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout))
        except dist.DistNetworkError as error:
            if "in use" not in str(error).lower():
                raise
            raise ValueError(
                f"The port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is in use by another program; "
                "give torchrun another one with --master-port, or --standalone to have it find a free one."
            ) from None
        try:
            yield cls(rank=dist.get_rank(), size=dist.get_world_size(), parallel=parallel)
        finally:
            _forget_the_group()
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    def share_of(self, rows: int, *, parts: int = 1) -> int:
        """Rows of a batch that each rank gets, which it computes in ``parts``.

        Raises:
            ValueError: they cannot be divided evenly.
        """
        if rows % self.size:
            nearest = max(1, rows // self.size) * self.size
            raise ValueError(
                f"Training(batch_size={rows}): {self.size} processes share the rows evenly; try batch_size={nearest}, "
                "or another number of processes."
            )
        mine = rows // self.size
        if mine % parts:
            raise ValueError(
                f"Training(batch_size={rows}, accumulate={parts}): each of {self.size} processes has {mine} rows, "
                "which are divided evenly; give an accumulate that divides them."
            )
        return mine

    def spread(self, model: nn.Module, *, half: bool) -> Callable[..., Any]:
        """The model as training calls it: it is sharded in place, or wrapped.

        The layer is one unit, gathered once at the beginning of a forward pass, solve included, and let go at the end
        of the backward pass.

        Args:
            model: with a ``layer``.
            half: shards are gathered in bfloat16, and gradients summed in float32.
        """
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if half else None,
                reduce_dtype=torch.float32 if half else None,
                cast_forward_inputs=False,
            )
            layer = model.layer
            assert isinstance(layer, nn.Module)
            fully_shard(layer, reshard_after_forward=False, mp_policy=policy)
            fully_shard(model, reshard_after_forward=False, mp_policy=policy)
        return model

    @contextlib.contextmanager
    def called(self) -> Iterator[None]:
        """Around a call of what ``spread`` gave."""
        with warnings.catch_warnings():
            # The output of a layer is a view that nobody changes in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            yield

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks."""
        return values if self.alone else self.total(values) / self.size

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.alone:
            return values
        values = values.detach().clone()
        dist.all_reduce(values)
        return values

    def means(self, *several: Mapping[str, float] | None) -> list[dict[str, float] | None]:
        """The means over the ranks of numbers by name; of None, which is None on all ranks, None."""
        names = [(place, name) for place, values in enumerate(several) for name in values or ()]
        own = torch.tensor([(several[place] or {})[name] for place, name in names], dtype=torch.float64)
        if not self.alone and names:
            device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
            own = self.mean(own.to(device)).cpu()
        found: list[dict[str, float] | None] = [None if values is None else {} for values in several]
        for (place, name), value in zip(names, own.tolist(), strict=True):
            part = found[place]
            assert part is not None
            part[name] = value
        return found

    def of_all(self, value: Any) -> list[Any]:
        """What each rank has, in their order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """What the first rank has."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise a ValueError, on all ranks, unless all of them have these values."""
        every = self.of_all(dict(facts))
        for rank, theirs in enumerate(every):
            names = [name for name in every[0].keys() | theirs.keys() if every[0].get(name) != theirs.get(name)]
            if names:
                name = min(names)
                raise ValueError(
                    f"Rank {rank} has {name} = {theirs.get(name)!r} and rank 0 has {every[0].get(name)!r}: all "
                    "processes of one training are started with the same command on the same corpus."
                )

    def wait(self) -> None:
        """Until all ranks are here."""
        if not self.alone:
            dist.barrier()

    def rows_of_all(self, mine: Tensor) -> Tensor:
        """The rows of all ranks, in their order."""
        if self.alone:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    def my_rows(self, all_: Tensor) -> Tensor:
        """The rows of this rank of what ``rows_of_all`` gave."""
        each = len(all_) // self.size
        return all_[self.rank * each : (self.rank + 1) * each]


ALONE = Ranks()
"""One process."""


@contextlib.contextmanager
def gradients_kept(model: nn.Module, replica: Any, *, last: bool) -> Iterator[None]:
    """Within it, gradients are summed over the ranks in the ``last`` of several backward passes only."""
    if isinstance(replica, DistributedDataParallel) and not last:
        with replica.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):  # an FSDPModule, which takes a second to import
        model.set_requires_gradient_sync(last)  # pyright: ignore
    yield


def _forget_the_group() -> None:
    """Nothing but torch itself holds the process group afterwards, so that it ends, threads and all, when destroyed.

    A gloo thread that still lets go of a tensor while the interpreter is taken down aborts the process: seen under
    load, in a job that had done all its work.
    """
    for thing in gc.get_objects():
        if type(thing).__name__ == "DeviceMesh":  # DTensor's caches keep meshes for ever
            getattr(thing, "_pg_registry", {}).clear()
    gc.collect()


def let_go(model: nn.Module) -> None:
    """Shards again what a forward pass without a backward pass has gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # pyright: ignore


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore


def sharded_as(value: Tensor, target: Tensor) -> Tensor:
    """``value``, which is whole on every rank, sharded as ``target`` is."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # pyright: ignore
    return distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor."""
    return hasattr(value, "full_tensor")
