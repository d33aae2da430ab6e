"""What spawned processes run: they import it by its name, which a test file does not have for them."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import torch
from torch import Tensor, nn

from equilibria import Anderson, Cell, Equilibrium, Implicit, Prepared, Stop
from equilibria.commands.errors import explain
from equilibria.lm.ranks import Ranks

TIGHT = Stop(rtol=1e-12, atol=1e-13, max_evals=200)


class TanhCell(Cell):
    """f(z) = tanh(z Wᵀ + x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def prepare(self, x: Tensor) -> Prepared:
        return Prepared(rows=x)

    def start(self, prepared: Prepared) -> Tensor:
        return torch.zeros_like(prepared.rows)

    def forward(self, z: Tensor, prepared: Prepared) -> Tensor:
        return torch.tanh(0.7 * self.linear(z) + prepared.rows)


class Wrapped(nn.Module):
    """DDP hands through tensors only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Equilibrium(TanhCell(6).double(), Anderson(), TIGHT, Implicit(Anderson(), TIGHT))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        assert out.solution is not None
        self.evals = out.solution.evals
        return out.z


def inputs() -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    x[:2] *= 1e-3  # the first rank's samples are easy
    return x


def half_a_batch(rank: int, store: str, results: Any) -> None:
    """The gradients of one of two ranks, and the evaluations that it needed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = Wrapped()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        parallel(inputs()[2 * rank : 2 * rank + 2]).square().mean().backward()
    results.put((rank, model.evals, [p.grad.tolist() for p in model.parameters()]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def waiting(rank: int, port: int, results: Any) -> None:
    """Rank 1 does not come; what rank 0 would say."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.suppress(RuntimeError), Ranks.joined("ddp", "cpu", timeout=3) as ranks:
        if rank == 1:
            time.sleep(10)
            return
        began = time.monotonic()
        try:
            ranks.wait()
        except Exception as error:
            results.put((explain(error), time.monotonic() - began))
