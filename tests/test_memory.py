import dataclasses
import gc
import itertools

import pytest
import torch
from torch import nn

from equilibria import Anderson, Implicit, Method, Picard, Stop
from equilibria.cells import TransformerConfig
from equilibria.core.state import Layout
from equilibria.gradients import Unroll
from equilibria.gradients.linearise import solve_linear
from equilibria.lm.experiments.stage import network_of
from equilibria.lm.model import LanguageConfig
from equilibria.lm.training import Trainer, memory_comparison
from equilibria.peak_memory import PeakMemory
from small_experiment import corpus, experiment, with_stage

# Small models with random weights are solved here, and whether their solves converge is not the subject.
pytestmark = pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")


def test_the_peak_is_the_worst_moment_not_the_sum():
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(10):
            torch.zeros(5000)
    assert memory.peak == 4 * 6000
    assert kept.numel() == 1000


def test_what_was_there_before_and_its_views_count_nothing():
    before = torch.ones(1000)
    with PeakMemory() as memory:
        before.view(10, 100).t().add_(1.0)
        before.detach().mul_(2.0)
    assert memory.peak == 0


def test_what_autograd_keeps_counts_until_the_backward_pass():
    def peak(depth: int) -> int:
        weight = torch.full((1000,), 0.5, requires_grad=True)
        with PeakMemory() as memory:
            z = torch.zeros(1000)
            for _ in range(depth):
                z = torch.tanh(weight * z)
            z.sum().backward()
        return memory.peak

    peaks = [peak(depth) for depth in (4, 8, 16, 32)]
    assert [b - a for a, b in itertools.pairwise(peaks)] == [16_000, 32_000, 64_000]


def test_memory_that_is_freed_inside_leaves_nothing_behind():
    gc.collect()
    with PeakMemory() as memory:
        layer = nn.Linear(10, 10)
        layer(torch.ones(3, 10)).sum().backward()
        del layer
        gc.collect()
        assert memory.peak > 0
    assert memory._watch.live == 0


def model_and_batch(**stop):
    config = LanguageConfig(cell=TransformerConfig(width=16, heads=2, inner=32, memory=8, dropout=0.1))
    solver, stop = Anderson(window=3), Stop(rtol=0, atol=0, **stop)
    model = config.build(9, method=Method(solver, stop, Implicit(solver=solver, stop=stop)))
    tokens = torch.randint(9, (3, 12))
    return model, tokens


@pytest.mark.parametrize("rule", ["implicit", "unroll"])
def test_the_memory_of_a_step_grows_with_the_solve_only_if_it_is_unrolled(rule):
    """Slope 0 once the solver's window is full, in bytes."""

    def peak(evals: int) -> int:
        model, tokens = model_and_batch(max_evals=evals)
        method = model.layer.method
        if rule == "unroll":
            method = dataclasses.replace(method, gradient=Unroll())
        model(tokens, tokens, method=method).nll.mean().backward()
        model.zero_grad()
        with PeakMemory() as memory:
            model(tokens, tokens, method=method).nll.mean().backward()
        return memory.peak

    peaks = [peak(evals) for evals in (8, 16, 32)]
    if rule == "implicit":
        assert max(peaks) - min(peaks) < 1000  # the trace: one number a sample and evaluation
    else:
        assert peaks[2] - peaks[1] > 1.9 * (peaks[1] - peaks[0]) > 100_000


def test_the_comparison_has_a_row_a_network_and_grows_along_them():
    trainer = Trainer(experiment(), None, corpus())
    rows = trainer.memory_comparison(depths=(4, 8, 16))
    assert [(row["label"], row["depth"]) for row in rows[1:]] == [("unrolled", depth) for depth in (4, 8, 16)]
    assert rows[0]["label"] == "equilibrium"
    bytes_ = [row["peak_bytes"] for row in rows]
    assert bytes_[1] < bytes_[2] < bytes_[3]


def test_the_comparison_changes_nothing():
    value = with_stage(experiment(), 0, steps=2)
    trainer, segments = Trainer(value, None, corpus()), None
    segments = iter(trainer._segments())
    trainer.step(next(segments))
    layer = trainer.model.layer
    trainer.model(torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 5, dtype=torch.long)).nll.sum().backward()
    trainer.model.eval()
    trainer.model.head.train()  # each part's own mode, not the root's
    modes = [module.training for module in trainer.model.modules()]

    def everything():
        gradients = [None if p.grad is None else p.grad.clone() for p in trainer.model.parameters()]
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        memory = [trainer.memory.z.clone(), trainer.memory.u.clone()]
        return [*weights, *gradients, *memory, torch.get_rng_state()], (layer.method, layer.eval_stop)

    tensors, settings = everything()
    trainer.memory_comparison(depths=(2,))
    after, settings_after = everything()
    assert all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))
    assert all(a is b for a, b in zip(settings, settings_after, strict=True))
    assert [module.training for module in trainer.model.modules()] == modes


def test_a_network_of_some_depth_applies_the_cell_that_often():
    model, tokens = model_and_batch(max_evals=5)
    model.eval()
    rows = memory_comparison(model, segment_of(tokens), None, depths=(3,))
    assert rows[1]["evals"] == network_of(3).method.stop.max_evals == 4


@pytest.mark.parametrize("warm", [False, True])
def test_the_comparison_solves_as_a_step_of_the_stage_would(warm):
    trainer, seen = Trainer(with_stage(experiment(), 0, warm=warm), None, corpus()), []
    trainer.policy.raise_budget()
    trainer.model.register_forward_pre_hook(lambda model, given, options: seen.append(options), with_kwargs=True)
    trainer.memory_comparison(depths=(2,))
    trainer.step(next(iter(trainer._segments())))
    ours, unrolled, step = [(options["method"], options["warm"]) for options in seen]
    assert ours == step == (trainer.policy.method(trainer.stage), warm)
    assert unrolled == (network_of(2).method, False)


def segment_of(tokens):
    from equilibria.lm.corpora import Segment

    return Segment(tokens=tokens, targets=tokens, resets=True, epoch=0, index=0, position=0)


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked():
    with PeakMemory("cuda") as memory:
        torch.zeros(1 << 20, device="cuda")
    assert 4 << 20 <= memory.peak < 5 << 20


@pytest.mark.parametrize("norm", ["l2", lambda u: u.norm(dim=1)])
def test_the_start_of_an_adjoint_solve_is_free_after_its_first_step(norm):
    """At the peak there are the scaled g, u, Jᵀu and the residual; a start that a frame held would be a fifth."""
    g = torch.ones(8, 10_000)
    with PeakMemory() as memory:
        solve_linear(lambda u: 0.5 * u, g, Layout.of(g), Picard(), Stop(rtol=1e-5, max_evals=40, norm=norm))
    assert memory.peak < 4.1 * g.numel() * g.element_size()
