"""Explicit networks of cells: what their memories, shared weights and checkpoints must keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from equilibria import Anderson, ConvergenceWarning, Equilibrium, Implicit, Picard, Stack, Stop, Unroll, Unrolled
from equilibria.cells import ChainConfig, TransformerConfig
from equilibria.layers import dropout
from equilibria.stability import jacobian_penalty

# Small models with random weights are solved here, and whether their solves converge is not the subject.
pytestmark = pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")

B, T = 2, 6
SMALL = TransformerConfig(width=12, heads=3, inner=20, memory=16)
XL = dataclasses.replace(
    SMALL, injection=False, affine=True, weight_norm=False, variational=False, init="normal", std=0.3
)


def noisy(config, scale=0.1):
    cell = config.build().double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return cell


def inputs(time=T):
    return torch.randn(B, time, 12, dtype=torch.float64)


def stacks():
    shared = noisy(SMALL)
    return {
        "untied": Stack([noisy(SMALL) for _ in range(3)]),
        "tied": Stack([shared] * 4),
        "transformer-xl": Stack([noisy(XL) for _ in range(3)]),
        "chains": Stack([noisy(ChainConfig(cells=(SMALL, SMALL))) for _ in range(2)]),
    }


@pytest.mark.parametrize("name", ["untied", "tied", "transformer-xl", "chains"])
def test_segments_joined_by_the_memory_of_a_stack_are_one(name):
    stack, x = stacks()[name].eval(), inputs()
    memory, pieces = None, []
    for piece in x.split([2, 1, 3], dim=1):
        out = stack(piece, memory)
        memory = out.memory
        pieces.append(out.z)
    torch.testing.assert_close(torch.cat(pieces, dim=1), stack(x).z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["untied", "tied", "transformer-xl"])
def test_a_stack_is_causal(name):
    stack, x = stacks()[name].eval(), inputs()
    before = stack(x).z
    for t in range(T):
        later = x.clone()
        later[:, t:] += 1
        after = stack(later).z
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("time", [1, 3])
def test_unrolled_is_picard_with_back_propagation(time):
    cell, x = noisy(SMALL), inputs(time)
    stop = Stop(rtol=0, atol=0, max_evals=6, best=False)
    first, ours = Equilibrium(cell, Picard(), stop, Unroll())(x), Unrolled(cell, 5)(x)
    assert torch.equal(first.z, ours.z)
    assert ours.solution is None
    for mine, theirs in ((ours.memory.z, first.memory.z), (ours.memory.u, first.memory.u)):
        assert torch.equal(mine, theirs)
    second, more = Equilibrium(cell, Picard(), stop, Unroll())(x, first.memory), Unrolled(cell, 5)(x, ours.memory)
    assert torch.equal(second.z, more.z)


def test_unrolled_to_great_depth_is_the_equilibrium():
    cell, x = SMALL.build().double(), inputs()
    with torch.no_grad():
        cell.inject.direction.mul_(3000)  # a strong input and little of z make the cell a contraction
        cell.attention.qkv.gain.mul_(0.3)
        cell.attention.out.gain.mul_(3)
        tight = Stop(rtol=1e-13, atol=1e-13, max_evals=200)
        exact = Equilibrium(cell, Anderson(), tight, Implicit())(x)
        assert exact.solution.converged.all()
        torch.testing.assert_close(Unrolled(cell, 300)(x).z, exact.z, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["unrolled", "tied", "untied"])
def test_checkpoints_change_no_gradient(kind):
    """The layers are evaluated again, under the same dropout masks, and only the states are kept."""
    config = dataclasses.replace(SMALL, dropout=0.3, attention_dropout=0.2)
    cells = [noisy(config) for _ in range(3)]
    make = {
        "unrolled": lambda checkpoint: Unrolled(cells[0], 3, checkpoint=checkpoint),
        "tied": lambda checkpoint: Stack([cells[0]] * 3, checkpoint=checkpoint),
        "untied": lambda checkpoint: Stack(cells, checkpoint=checkpoint),
    }[kind]
    x, found, calls = inputs(), [], []
    cells[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpoint in (False, True):
        calls.clear()
        network = make(checkpoint).train()
        torch.manual_seed(1)
        z = network(x).z
        forward = len(calls)
        found.append(torch.autograd.grad(z.square().sum(), list(network.parameters())))
        assert len(calls) == (2 if checkpoint else 1) * forward
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Unrolled, lambda module, depth, **how: Stack([module] * depth, **how)])
@pytest.mark.filterwarnings("error::equilibria.ConvergenceWarning")
def test_checkpoints_notice_a_weight_that_has_changed(make):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = nn.Linear(4, 4)

        def forward(self, z, x):
            return torch.tanh(self.mixed(z) + x)

    module, x = Module(), torch.randn(3, 4)
    network = make(module, 3, checkpoint=True)
    network(x).output.sum().backward()  # without a change nothing is said
    loss = network(x).output.sum()
    module.mixed.weight.data.mul_(1.5)
    with pytest.warns(ConvergenceWarning, match="What f reads was changed between the two passes") as heard:
        loss.backward()
    assert len(heard) == 1


class Injected(nn.Module):
    """tanh(½ W z + x), whose checkpoint does not store x."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


@pytest.mark.parametrize("change", [torch.Tensor.neg_, lambda x: x.copy_(x.flip(0)), torch.Tensor.normal_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_notice_an_input_of_the_same_size(dtype, change):
    """In half precision the norm of a changed value is that of the first one, up to rounding."""
    fixed = Stop(rtol=0, atol=0, max_evals=5, best=False)
    networks = (
        Unrolled(Injected(), 4, checkpoint=True),
        Equilibrium(Injected(), Picard(), fixed, Unroll(checkpoint=True)),
    )
    for network in networks:
        x = torch.randn(16, 32).to(dtype)
        z = network.to(dtype)(x).z
        change(x)
        with pytest.warns(ConvergenceWarning, match="f was evaluated once more at the end, and its value has changed"):
            z.sum().backward()


@pytest.mark.parametrize("kind", ["batch norm", "spectral norm", "dropout"])
@pytest.mark.parametrize("make", [Unrolled, lambda module, depth, **how: Stack([module] * depth, **how)])
def test_checkpoints_restore_what_a_module_writes_and_draws(kind, make):
    """Running statistics moved twice, and the second evaluation had other weights or another mask than the first."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            mixed = nn.Linear(6, 6)
            self.mixed = spectral_norm(mixed) if kind == "spectral norm" else mixed
            self.norm = nn.BatchNorm1d(6) if kind == "batch norm" else nn.Identity()
            self.dropout = nn.Dropout(0.5 if kind == "dropout" else 0.0)

        def forward(self, z, x):
            return torch.tanh(self.dropout(self.norm(self.mixed(z))) + x)

    found = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        network = make(Module().double(), 4, checkpoint=checkpoint).train()
        network(torch.randn(8, 6, dtype=torch.float64)).z.square().sum().backward()
        found.append([*(parameter.grad for parameter in network.parameters()), *network.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_a_layer_without_injection_begins_with_its_input():
    cell, x = noisy(XL).eval(), inputs()
    prepared = cell.prepare(x, None)
    assert torch.equal(cell.start(prepared), x)
    assert prepared.rows.attention.injection is prepared.kept.injection is None
    assert cell.remember(x, prepared).u is None
    z = torch.randn_like(x)
    other = cell.prepare(torch.randn_like(x), None)
    assert torch.equal(cell(z, prepared), cell(z, other))


def test_the_layer_of_transformer_xl():
    """Against the library's own transformer layer, where positions do not count."""
    cell = noisy(XL).eval()
    with torch.no_grad():
        cell.attention.positions.project.direction.zero_()
        cell.attention.u.zero_()
    theirs = torch.nn.TransformerEncoderLayer(12, 3, 20, dropout=0, batch_first=True, dtype=torch.float64)
    pairs = {
        "self_attn.in_proj_weight": cell.attention.qkv.direction,
        "self_attn.in_proj_bias": torch.zeros(36),
        "self_attn.out_proj.weight": cell.attention.out.direction,
        "self_attn.out_proj.bias": cell.attention.out.bias,
        "linear1.weight": cell.inner.direction,
        "linear1.bias": cell.inner.bias,
        "linear2.weight": cell.outer.direction,
        "linear2.bias": cell.outer.bias,
        "norm1.weight": cell.norms[0].weight,
        "norm1.bias": cell.norms[0].bias,
        "norm2.weight": cell.norms[1].weight,
        "norm2.bias": cell.norms[1].bias,
    }
    theirs.load_state_dict({name: value.detach() for name, value in pairs.items()})
    x = inputs()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    torch.testing.assert_close(cell(x, cell.prepare(x, None)), theirs(x, src_mask=future), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("unhooked")
def test_a_stack_refuses_memories_and_inputs_that_it_cannot_use():
    stack, x = Stack([SMALL.build(), SMALL.build()]).eval(), torch.randn(B, T, SMALL.width)
    memory = stack(x).memory
    for wrong, found in ((memory[:1], "1 memories"), ((*memory, None), "3 memories"), (memory[0], "TransformerMemory")):
        for use in (lambda m=wrong: stack(x, m), lambda m=wrong: stack.cache(B, memory=m)):
            with pytest.raises(ValueError, match=f"the memory of a Stack of 2 layers is .*{found}"):
                use()
    with pytest.raises(TypeError, match="positional arguments"):
        stack(x, memory, x)


def test_masks_of_positions_and_of_channels():
    for variational, places in ((True, 1), (False, T)):
        cell = dataclasses.replace(SMALL, dropout=0.5, variational=variational).build().double().train()
        prepared = cell.prepare(inputs(), None)
        assert prepared.rows.drop_attention.shape == (B, places, 12)
        assert prepared.rows.drop_inner.shape == (B, places, 20)


def test_a_chain_injects_once():
    cell = ChainConfig(cells=(SMALL, SMALL, SMALL)).build()
    names = [name for name, _ in cell.named_parameters() if "inject" in name]
    assert names == ["blocks.0.inject.direction", "blocks.0.inject.bias"]
    with pytest.raises(ValueError, match="differ in their width"):
        ChainConfig(cells=(SMALL, dataclasses.replace(SMALL, width=24)))
    with pytest.raises(ValueError, match="at least one block"):
        ChainConfig(cells=())


def test_masks_are_drawn_once_per_step(monkeypatch):
    """However often f is evaluated: three of channels, one of positions, one of attention."""
    draws = []
    draw = dropout.dropout_mask

    def counted(*arguments, **choices):
        mask = draw(*arguments, **choices)
        draws.append(mask is not None)
        return mask

    for module in ("attention", "relative", "cell"):
        monkeypatch.setattr(f"equilibria.cells.transformer.{module}.dropout_mask", counted)
    cell = dataclasses.replace(SMALL, dropout=0.2, attention_dropout=0.2).build().double().train()
    counts, evals = [], []
    for budget in (3, 20):
        draws.clear()
        stop = Stop(rtol=1e-12, atol=0, max_evals=budget)
        out = Equilibrium(cell, Anderson(), stop, Implicit(stop=stop))(inputs())
        before = torch.get_rng_state()
        out.z.sum().backward()
        assert torch.equal(before, torch.get_rng_state())
        counts.append(sum(draws))
        evals.append(out.solution.evals + out.solution.adjoint[0].evals)
    assert counts == [5, 5]
    assert evals[1] > evals[0]


@pytest.mark.slow
def test_the_mean_penalty_is_the_norm_of_the_dense_jacobian():
    cell, x = noisy(SMALL).eval(), inputs(3)
    prepared = cell.prepare(x, cell.remember(inputs(4), cell.prepare(inputs(4), None)))
    z = torch.randn(B, 3, 12, dtype=torch.float64)

    def f(z):
        return cell(z, prepared)

    for sample in range(B):
        dense = torch.autograd.functional.jacobian(f, z)[sample, :, :, sample].reshape(36, 36)
        estimate = jacobian_penalty(f, z, samples=4000)[sample].detach()
        assert float(estimate) == pytest.approx(float(dense.square().sum()) / 36, rel=0.05)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda cell: Unrolled(cell, 0), "depth=0.*at least one layer"),
        (lambda cell: Unrolled(cell, 2.5), r"Unrolled\(depth=2.5\): depth is a whole number"),
        (lambda cell: Unrolled(cell, "3"), r"Unrolled\(depth='3'\): depth is a whole number"),
        (lambda cell: Unrolled(cell, 3, auxiliary_every=1.5), "auxiliary_every is a whole number"),
        (lambda cell: Unrolled(cell, 3, checkpoint="no"), r"Unrolled\(checkpoint='no'\): checkpoint is True or False"),
        (lambda cell: Unrolled(cell, 3)(inputs(3), depth=1.5), "depth is a whole number"),
        (lambda cell: Stack([cell], depth=0.5), "depth is a whole number"),
        (lambda cell: Stack([cell], checkpoint="no"), r"Stack\(checkpoint='no'\): checkpoint is True or False"),
        (lambda cell: Stack(cell), r"Stack\(cells=TransformerCell\): give a list of modules"),
    ],
)
def test_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(SMALL.build().double())
