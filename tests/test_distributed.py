"""Under DistributedDataParallel the gradient is that of one process, though ranks need different numbers of steps."""

import pytest
import torch

from spawned import Wrapped, half_a_batch, inputs


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_ddp_equals_one_process(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    torch.multiprocessing.spawn(half_a_batch, (str(tmp_path / "store"), results), nprocs=2)
    ranks = sorted(results.get(timeout=10) for _ in range(2))
    model = Wrapped()
    model(inputs()).square().mean().backward()
    assert ranks[0][1] != ranks[1][1]
    for _, _, grads in ranks:
        for p, g in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(torch.tensor(g, dtype=torch.float64), p.grad, rtol=1e-9, atol=1e-12)
