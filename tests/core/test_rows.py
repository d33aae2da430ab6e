"""A solve that drops the samples that are done is cheaper and has the same results."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from equilibria import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Map,
    Method,
    NewtonKrylov,
    Picard,
    Prepared,
    Reversible,
    ReversibleGradient,
    Shine,
    Stop,
    solve,
)
from equilibria.cells import AffineCell, AffineConfig, TransformerConfig
from equilibria.core import progress
from equilibria.layers.cell import CellMap


def same_solution(a, b):
    """All per-sample results."""
    for name in ("z", "fz", "residual", "trace"):
        assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-10, equal_nan=True)
    for name in ("status", "steps"):
        assert torch.equal(getattr(a, name), getattr(b, name))


SOLVERS = [Picard(), Anderson(), Broyden(), Broyden(rank=3), NewtonKrylov(inner=4), Reversible(0.6)]
BATCH, WIDTH = 8, 12


@dataclasses.dataclass
class Mixed(Map):
    """tanh(a ⊙ z W + x): the larger a of a sample, the longer its solve; every evaluation of a sample is counted."""

    a: Tensor
    x: Tensor
    weight: Tensor
    count: list[int]

    def __call__(self, z):
        self.count.append(len(z))
        return torch.tanh(self.a * (z @ self.weight) + self.x)

    def rows(self, index):
        return dataclasses.replace(self, a=self.a[index], x=self.x[index])


def mixed(*, dtype=torch.float64, broken=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=dtype) / WIDTH**0.5
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype)
    a = torch.linspace(0.05, 0.9, BATCH, dtype=dtype)[torch.randperm(BATCH, generator=generator)][:, None]
    if broken:
        x[3] = torch.nan
    return Mixed(a, x, weight, [])


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("stop", [Stop(rtol=1e-9, max_evals=150), Stop(rtol=1e-3, max_evals=13)], ids=["free", "bound"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_results_are_those_of_the_whole_batch(solver, stop, broken):
    f, z0 = mixed(broken=broken), torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        selected = solve(f, z0, solver, stop)
        cost = sum(f.count)
        f.count.clear()
        whole = solve(f, z0, solver, stop, drop_converged=False)
    same_solution(selected, whole)
    assert selected.evals == whole.evals
    assert cost < sum(f.count) or stop.max_evals == 13
    assert set(f.count) == {BATCH}  # in the second solve


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("selecting", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_flags_that_are_read_late_change_nothing(solver, selecting, broken, monkeypatch):
    f, z0 = mixed(broken=broken), torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    stop, given = Stop(rtol=1e-9, max_evals=150), f if selecting else lambda z: f(z)
    with torch.no_grad():
        now = solve(given, z0, solver, stop)
        flags = progress._Flags
        monkeypatch.setattr(progress, "_Flags", lambda late: flags(late=True))
        late = solve(given, z0, solver, stop)
    assert now.evals < late.evals <= now.evals + max(2, getattr(solver, "inner", 0) + 1)
    same_solution(dataclasses.replace(late, residuals=late.residuals[: len(now.residuals)]), now)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # said once, by the first use of it
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_a_gpu_is_not_waited_for(solver):
    f, z0 = mixed(dtype=torch.float32), torch.zeros(BATCH, WIDTH, device="cuda")
    a, x, weight = f.a.cuda(), f.x.cuda(), f.weight.cuda()
    expected = solve(lambda z: f(z), z0.cpu(), solver, Stop(rtol=1e-5, max_evals=60))

    def watched(z):
        torch.cuda.set_sync_debug_mode("error")  # from the first evaluation on
        return torch.tanh(a * (z @ weight) + x)

    try:
        with torch.no_grad():
            found = solve(watched, z0, solver, Stop(rtol=1e-5, max_evals=60))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(found.z.cpu(), expected.z, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_a_gpu_is_not_waited_for_where_samples_could_be_dropped(solver):
    cell = TransformerConfig(width=16, heads=2, inner=32, memory=0).build().cuda()
    x = torch.randn(3, 8, 16, device="cuda")

    class Watched(CellMap):
        def __call__(self, z):
            torch.cuda.set_sync_debug_mode("error")
            return super().__call__(z)

    with torch.no_grad():
        f = Watched(cell, cell.prepare(x))
        try:
            found = solve(f, torch.zeros_like(x), solver, Stop(rtol=0, max_evals=30))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found.evals == 30
    assert torch.isfinite(found.z).all()


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_a_training_step_waits_for_a_gpu_as_often_with_many_evaluations_as_with_few(solver):
    cell = TransformerConfig(width=16, heads=2, inner=32, memory=4).build().cuda()
    x, counts = torch.randn(3, 8, 16, device="cuda"), []
    for evals in (10, 10, 30):  # the first time handles and pinned memory are made
        stop = Stop(rtol=0, max_evals=evals)
        layer = Equilibrium(cell, solver, stop, Implicit(solver, stop))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = layer(x)
                out.z.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("called a synchronizing" in str(warning.message) for warning in heard))
        assert out.solution.adjoint[0].evals == evals
    assert counts[1] == counts[2]


def test_most_of_the_work_of_done_samples_is_saved():
    f, z0 = mixed(), torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(f, z0, Picard(), Stop(rtol=1e-9, max_evals=200))
    needed = int((solution.steps + 1).sum())
    assert solution.converged.all()
    assert needed <= sum(f.count) < 1.25 * needed
    assert sum(f.count) < 0.7 * BATCH * solution.evals


def test_nothing_is_left_out_while_autograd_records():
    f, z0 = mixed(), torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    f.x.requires_grad_()
    solve(f, z0, Picard(), Stop(rtol=1e-9, max_evals=60)).z.sum().backward()
    assert set(f.count) == {BATCH}
    assert torch.isfinite(f.x.grad).all()


class Whole(AffineCell):
    """An affine cell that counts its samples, and prepares nothing that could be divided by samples."""

    def __init__(self, config):
        super().__init__(config)
        self.count = []

    def prepare(self, x):
        return Prepared(shared=(self.inject(x),))

    def forward(self, z, prepared):
        self.count.append(len(z))
        return super().forward(z, Prepared(rows=prepared.shared[0]))


class Divided(Whole):
    """A counting cell whose samples can be dropped."""

    def prepare(self, x):
        return Prepared(rows=self.inject(x))

    def start(self, prepared):
        return torch.zeros_like(prepared.rows)

    def forward(self, z, prepared):
        self.count.append(len(z))
        return AffineCell.forward(self, z, prepared)


class Undroppable(Divided):
    """A counting cell with ``droppable=False``."""

    def prepare(self, x):
        return dataclasses.replace(super().prepare(x), droppable=False)


def mixed_input():
    return (
        torch.randn(BATCH, 3, 5, dtype=torch.float64) * 10.0 ** torch.arange(BATCH, dtype=torch.float64)[:, None, None]
    )


@pytest.mark.parametrize(("kind", "fewest"), [(Divided, 1), (Whole, BATCH), (Undroppable, BATCH)])
def test_the_layer_leaves_samples_out_where_its_cell_can(kind, fewest):
    cell, x = kind(AffineConfig(width=5, norm=0.9)).double(), mixed_input()
    layer = Equilibrium(cell, Picard(), Stop(rtol=0, atol=1e-3, max_evals=300), Implicit())
    out = layer(x, start=torch.zeros_like(x))
    assert min(cell.count) == fewest
    assert_close(out.z, cell.equilibrium(x), rtol=0, atol=1e-2)
    out.z.sum().backward()


@pytest.mark.parametrize(
    ("solver", "gradient"), [(Broyden(), Shine()), (Reversible(0.5), ReversibleGradient())], ids=["Shine", "Reversible"]
)
def test_rules_that_read_the_history_get_that_of_all_samples(solver, gradient):
    cell = Divided(AffineConfig(width=5, norm=0.9)).double()
    stop = Stop(rtol=0, atol=1e-3, max_evals=30)
    method = Method(solver, stop, gradient, on_failure="ignore")
    Equilibrium(cell)(mixed_input(), method=method).z.sum().backward()
    assert set(cell.count) == {BATCH}


def test_what_cannot_be_divided_is_refused_and_not_passed_through():
    class Opaque:
        """Holds a tensor that no tree function can find."""

    class Hiding(Divided):
        def prepare(self, x):
            return Prepared(rows={"injection": self.inject(x), "hidden": Opaque()})

        def start(self, prepared):
            return torch.zeros_like(prepared.rows["injection"])

        def forward(self, z, prepared):
            return AffineCell.forward(self, z, Prepared(rows=prepared.rows["injection"]))

    layer = Equilibrium(
        Hiding(AffineConfig(width=5, norm=0.9)).double(), Picard(), Stop(rtol=0, atol=1e-3, max_evals=300)
    )
    with pytest.raises(TypeError, match="a tree whose samples are chosen holds a Opaque"):
        layer(mixed_input())
