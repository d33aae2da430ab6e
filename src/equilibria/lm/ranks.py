"""Ranks: the processes that train one model together, and their communication.

Nothing here is called during a solve: ranks need different numbers of iterations, and a rank that waited for another
inside a solve would wait forever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equilibria.lm.environment import VARIABLES, number_in
from equilibria.lm.sharding import without_false_alarm, without_maps
from equilibria.torch_private import drop_process_groups

Parallel = Literal["none", "ddp", "fsdp"]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process and the number of processes that train together; by default one alone."""

    rank: int = 0
    """The index of this process."""
    size: int = 1
    """The number of processes."""
    parallel: Parallel = "none"
    """How the model is distributed: each process has a replica ("ddp"), or a shard of every parameter ("fsdp")."""

    @classmethod
    @contextlib.contextmanager
    def joined(cls, parallel: Parallel, device: str, *, timeout: float) -> Iterator[Ranks]:
        """Within it, the process group that ``torchrun`` started; without ``torchrun``, one process alone.

        Args:
            parallel: how the model will be distributed.
            device: the device of the training; decides between gloo and NCCL.
            timeout: seconds after which a rank stops waiting for a lost one.

        Raises:
            ValueError: several processes would all train the same, there is no process group for ``parallel``, the
                port is in use, or a variable of torchrun is no number.
        """
        size = number_in("WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1
        if parallel == "none" and size == 1:
            yield cls()
            return
        if parallel == "none":
            raise ValueError(
                f"{size} processes were started, and each would train the same; add --training.parallel ddp (each has "
                "a replica) or fsdp (each has a shard)."
            )
        if any(name not in os.environ for name in VARIABLES):
            raise ValueError(
                f"--training.parallel {parallel} needs processes to train with: start torchrun --nproc-per-node 2 -m "
                "equilibria train …, or give --training.parallel none to train with one process."
            )
        local, _, _ = number_in("LOCAL_RANK", 0), number_in("RANK", 0, size - 1), number_in("MASTER_PORT", 1, 2**16 - 1)
        import torch.distributed.nn  # before the group exists: its default arguments would keep the group alive

        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(local)
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
            _drop_references_to_group()
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True for rank 0, which writes the run."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """True if there is one process only."""
        return self.size == 1

    def share_of(self, batch_size: int, *, parts: int = 1) -> int:
        """The number of streams that each rank gets, to be computed in ``parts`` equal parts.

        Raises:
            ValueError: the batch cannot be divided evenly.
        """
        if batch_size % self.size:
            nearest = max(1, batch_size // self.size) * self.size
            raise ValueError(
                f"Training(batch_size={batch_size}): {self.size} processes share the batch evenly; try "
                f"batch_size={nearest}, or another number of processes."
            )
        mine = batch_size // self.size
        if mine % parts:
            raise ValueError(
                f"Training(batch_size={batch_size}, accumulate={parts}): each of {self.size} processes has {mine} "
                f"streams, which cannot be divided into {parts} equal parts; give an accumulate that divides {mine}."
            )
        return mine

    def spread(self, model: nn.Module, *, bfloat16: bool) -> Callable[..., Any]:
        """The callable for training: the model wrapped for "ddp", sharded in place for "fsdp", else ``model`` itself.

        With "fsdp" the layer is one unit: it is gathered once at the beginning of a forward pass, which includes the
        solve, and sharded again at the end of the backward pass.

        Args:
            model: a model with the attribute ``layer``.
            bfloat16: gather the shards in bfloat16, and sum the gradients in float32.
        """
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if bfloat16 else None,
                reduce_dtype=torch.float32 if bfloat16 else None,
                cast_forward_inputs=False,
            )
            assert isinstance(model.layer, nn.Module)
            for module in (model.layer, model):
                without_maps(module, functools.partial(fully_shard, reshard_after_forward=False, mp_policy=policy))
            return without_false_alarm(model)
        return model

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
        """For each dictionary, the means over the ranks of its numbers; None for None.

        All ranks pass the same names, and None at the same places.
        """
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
        """The value of each rank, in the order of the ranks."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """The value of rank 0, on all ranks."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise a ValueError on all ranks unless every rank has the same ``facts``."""
        every = self.of_all(dict(facts))
        for rank, theirs in enumerate(every):
            names = [name for name in every[0].keys() | theirs.keys() if every[0].get(name) != theirs.get(name)]
            if names:
                name = min(names)
                raise ValueError(
                    f"Rank {rank} has {name} = {theirs.get(name)!r} and rank 0 has {every[0].get(name)!r}: start "
                    "all processes of a training with the same command on the same corpus."
                )

    def wait(self) -> None:
        """Wait until all ranks have reached this call."""
        if not self.alone:
            dist.barrier()

    def rows_of_all(self, mine: Tensor) -> Tensor:
        """The rows [B_total *] of all ranks, in the order of the ranks."""
        if self.alone:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    def my_rows(self, all_: Tensor) -> Tensor:
        """This rank's rows of the result of ``rows_of_all``."""
        each = len(all_) // self.size
        return all_[self.rank * each : (self.rank + 1) * each]


ALONE = Ranks()
"""One process alone."""


@runtime_checkable
class _Sharded(Protocol):
    """The interface of ``DTensor`` that is used here; importing the class itself takes a second."""

    device_mesh: Any
    placements: Any

    def full_tensor(self) -> Tensor: ...


@runtime_checkable
class _Fsdp(Protocol):
    """The interface of ``FSDPModule`` that is used here; importing the class itself takes a second."""

    def reshard(self) -> None: ...
    def set_requires_gradient_sync(self, requires_gradient_sync: bool, /) -> None: ...


@contextlib.contextmanager
def gradients_kept(model: nn.Module, replica: Any) -> Iterator[None]:
    """Within it, a backward pass leaves the gradients of this rank unsummed: for all parts of a batch but the last."""
    with replica.no_sync() if isinstance(replica, DistributedDataParallel) else contextlib.nullcontext():
        if isinstance(model, _Fsdp):
            model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            if isinstance(model, _Fsdp):
                model.set_requires_gradient_sync(True)


def _drop_references_to_group() -> None:
    """Drop all references to the process group except torch's own, so that destroying it also ends its threads.

    A gloo thread that still releases a tensor while the interpreter shuts down aborts the process. This was seen under
    load, after the job had finished its work.
    """
    for thing in gc.get_objects():
        if type(thing).__name__ == "DeviceMesh":  # DTensor's caches never release a mesh
            drop_process_groups(thing)
    gc.collect()


def reshard(model: nn.Module) -> None:
    """Shard the parameters again that a forward pass without backward pass has gathered."""
    for module in model.modules():
        if isinstance(module, _Fsdp):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all ranks if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, _Sharded) else tensor


def sharded_as(value: Tensor, target: Tensor) -> Tensor:
    """``value``, which every rank has in full, sharded like ``target``."""
    if not isinstance(target, _Sharded):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def is_sharded(value: object) -> bool:
    """True for a DTensor."""
    return isinstance(value, _Sharded)
