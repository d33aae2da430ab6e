"""What a GPU would wait for or refuse, found without one: training steps on a device where no number can be read.

PyTorch's fake tensors on the device "meta" know their shape, dtype and device, and hold nothing. To read one, as in
``float(x)``, ``if x.any():`` or ``x.nonzero()``, is an error, and on a GPU it would make the host wait. An operator
that gets tensors of two devices is an error on both.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from equilibria import (
    Anderson,
    Broyden,
    Equilibrium,
    Implicit,
    Method,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Stop,
    fixed_point,
)
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.core import solve as solving
from equilibria.core.maps import Autocast
from equilibria.core.progress import _Flags
from equilibria.lm.recipes import RECIPES
from slow_cases import one_in, some_slow

STOP = Stop(rtol=1e-2, max_evals=9)
SOLVERS = [Anderson(window=3), Picard(), Broyden(rank=3), Anderson(window=3), Picard()]
"""One for each of the cells."""
SMALL = TransformerConfig(width=8, heads=2, inner=12, memory=4)
CELLS = {
    "relative, dropout": {"dropout": 0.1, "attention_dropout": 0.1},
    "decay": {"positions": "decay"},
    "relative, fused": {"attention": "fused"},
    "decay, fused": {"attention": "fused", "positions": "decay"},
    "pre": {"norm": "pre", "affine": True, "attention_norm": True},
}


@pytest.fixture
def elsewhere(monkeypatch):
    """A context in which tensors on "meta" are fake, and a solve reads what it reads on a GPU: nothing per evaluation.

    Modules are built and moved outside.
    """
    prepared, autocast = Autocast.__init__, torch.autocast  # there is no autocast for "meta"
    monkeypatch.setattr(Autocast, "__init__", lambda self, _: prepared(self, "cpu"))
    monkeypatch.setattr(torch, "autocast", lambda _, **choices: autocast("cpu", **choices))
    monkeypatch.setattr(solving, "check_finite", lambda *_, **__: None)  # one read, before the first evaluation
    monkeypatch.setattr(_Flags, "__init__", lambda self, *, late: setattr(self, "late", True))
    monkeypatch.setattr(_Flags, "read", lambda self, flags: [1, sys.maxsize])  # what it says before it knows anything
    with functorch.patch(fake_tensor_allow_meta=True):
        yield FakeTensorMode(allow_non_fake_inputs=True)


def numbers(*shape):
    return torch.zeros(shape, device="meta")


STEPS = [*zip(CELLS, SOLVERS, strict=True), ("decay", Broyden(rank=3))]


@pytest.mark.parametrize(("name", "solver"), one_in(2, STEPS))
def test_a_training_step_of_a_transformer_reads_nothing(name, solver, elsewhere):
    config = TransformerConfig(**{**vars(SMALL), **CELLS[name]})
    layer = Equilibrium(config.build().to("meta"), solver, STOP, Implicit(solver, STOP), on_failure="ignore").train()
    with elsewhere:
        out = layer(numbers(3, 6, 8), layer(numbers(3, 6, 8)).memory)
        out.output.square().sum().backward()
    assert out.solution.evals > 5
    assert out.solution.adjoint[0].evals > 5
    assert all(parameter.grad.device.type == "meta" for parameter in layer.parameters())


@pytest.mark.parametrize("recurrence", ["scan", "delayed"])
def test_a_training_step_of_a_trellis_reads_nothing(recurrence, elsewhere):
    config = TrellisConfig(width=8, hidden=12, outputs=8, recurrence=recurrence)
    layer = Equilibrium(config.build().to("meta"), Picard(), STOP, Implicit(Anderson(), STOP), on_failure="ignore")
    with elsewhere:
        out = layer(numbers(3, 6, 8), layer(numbers(3, 6, 8)).memory)
        out.output.square().sum().backward()
    assert all(parameter.grad.device.type == "meta" for parameter in layer.parameters())


@pytest.mark.parametrize("rule", ["Implicit", *some_slow("Phantom", "Neumann")])
def test_a_training_step_of_a_language_model_reads_nothing(rule, elsewhere):
    gradient = {"Implicit": Implicit(stop=STOP), "Phantom": Phantom(), "Neumann": Neumann(3)}[rule]
    model = RECIPES["tiny"]().model.build(20, method=Method(Anderson(), STOP, gradient, on_failure="ignore"))
    model, tokens = model.to("meta").train(), torch.zeros(2, 6, dtype=torch.long, device="meta")
    with elsewhere:
        memory = model(tokens, tokens).memory
        model(tokens, tokens, memory).nll.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_read_is_noticed(elsewhere):
    def reading(z):
        return 0.5 * z if float(z.sum()) > 0 else z

    with elsewhere, pytest.raises(DataDependentOutputException):
        fixed_point(reading, numbers(3, 4), stop=STOP)


def test_another_device_is_noticed(elsewhere):
    with elsewhere, pytest.raises(RuntimeError, match="two devices"):
        fixed_point(lambda z: 0.5 * z + torch.ones(4), numbers(3, 4), stop=STOP)


def test_newton_krylov_reads_whether_its_inner_solve_is_done(elsewhere):
    """docs/howto/devices.md says so."""
    with elsewhere, pytest.raises(DataDependentOutputException):
        fixed_point(lambda z: 0.5 * z, numbers(3, 4), solver=NewtonKrylov(), stop=STOP)
