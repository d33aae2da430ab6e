"""Under DistributedDataParallel the gradient is that of one process, though ranks need different numbers of steps."""

import pytest
import torch
from torch import nn

from equilibria import Anderson, Cell, Equilibrium, Implicit, Stop

TIGHT = Stop(rtol=1e-12, atol=1e-13, max_evals=200)


class TanhCell(Cell):
    """f(z) = tanh(z Wᵀ + x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def prepare(self, x, memory):
        return x

    def start(self, context):
        return torch.zeros_like(context)

    def forward(self, z, context):
        return torch.tanh(0.7 * self.linear(z) + context)

    def remember(self, z, context):
        return None


class Wrapped(nn.Module):
    """DDP hands through tensors only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Equilibrium(TanhCell(6).double(), Anderson(), TIGHT, Implicit(Anderson(), TIGHT))

    def forward(self, x):
        out = self.layer(x)
        assert out.solution is not None
        self.evals = out.solution.evals
        return out.z


def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    x[:2] *= 1e-3  # the first rank's samples are easy
    return x


def worker(rank: int, store: str, results) -> None:
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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp_equals_one_process(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    torch.multiprocessing.spawn(worker, (str(tmp_path / "store"), results), nprocs=2)
    ranks = sorted(results.get(timeout=10) for _ in range(2))
    model = Wrapped()
    model(inputs()).square().mean().backward()
    assert ranks[0][1] != ranks[1][1]
    for _, _, grads in ranks:
        for p, g in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(torch.tensor(g, dtype=torch.float64), p.grad, rtol=1e-9, atol=1e-12)
