"""What is particular to the trellis cell; the laws of all cells are in cells/test_conformance.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from equilibria import Anderson, Equilibrium, Implicit, Picard, Stop, Unroll, solve
from equilibria.cells import TrellisCell, TrellisConfig, TrellisMemory
from equilibria.cells.trellis.scan import _doubling, _one_by_one, scan
from equilibria.layers.explicit import Unrolled
from equilibria.layers.linear import NormedLinear
from equilibria.lm.model import Explicit

B, T = 3, 7
SMALL = TrellisConfig(width=4, hidden=3, outputs=2)
EXACT = Stop(rtol=1e-13, atol=1e-13, max_evals=200)
RECURRENCES = pytest.mark.parametrize("recurrence", ["delayed", "scan"])


def built(*, scale=1.0, **choices) -> TrellisCell:
    """A cell in float64 whose parameters are large enough for every path to show."""
    cell = dataclasses.replace(SMALL, **choices).build().double()
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if name.endswith("gain"):
                parameter.copy_(scale * (0.5 + torch.rand_like(parameter)))
            else:
                parameter.copy_(scale * torch.randn_like(parameter))
    return cell


def inputs(*, time=T):
    return torch.randn(B, time, SMALL.width, dtype=torch.float64)


def some_memory(cell, *, z_scale=0.5):
    z = z_scale * torch.randn(B, 1, 2 * cell.config.channels, dtype=torch.float64)
    return TrellisMemory(z=z, x=torch.randn(B, 1, cell.config.width, dtype=torch.float64))


def equilibrium(cell, x, memory=None):
    with torch.no_grad():
        out = Equilibrium(cell, Anderson(), EXACT, Implicit())(x, memory)
    assert out.solution.converged.all()
    return out


def lstm_of(cell) -> nn.LSTM:
    """PyTorch's LSTM, gates i, f, g, o, with the weights of a cell whose W¹ is 0; its input is [x_{t−1}, x_t]."""
    channels, width = cell.config.channels, cell.config.width
    lstm = nn.LSTM(2 * width, channels, batch_first=True).double()

    def reordered(rows):
        i, o, g, f = rows.chunk(4)
        return torch.cat([i, f, g, o])

    with torch.no_grad():
        lstm.weight_hh_l0.copy_(reordered(cell.state.effective()[:, :channels]))
        lstm.weight_ih_l0.copy_(reordered(cell.input.effective()))
        lstm.bias_ih_l0.copy_(reordered(cell.state.bias))
        lstm.bias_hh_l0.zero_()
    return lstm


@RECURRENCES
@pytest.mark.parametrize("remembering", [False, True])
def test_without_weights_of_the_present_it_is_an_lstm_after_so_many_iterations_as_times(recurrence, remembering):
    cell = built(recurrence=recurrence)
    with torch.no_grad():
        cell.state.direction[:, cell.config.channels :] = 0
    x, memory = inputs(), some_memory(cell) if remembering else None
    before = torch.zeros_like(x[:, :1]) if memory is None else memory.x
    state = None if memory is None else tuple(part.transpose(0, 1).contiguous() for part in memory.z.chunk(2, dim=-1))
    expected, (_, last) = lstm_of(cell)(torch.cat([torch.cat([before, x[:, :-1]], dim=1), x], dim=-1), state)
    prepared = cell.prepare(x, memory)
    stop = Stop(rtol=0, atol=1e-14, max_evals=T + 1)  # T iterations and the evaluation that tells the residual
    solution = solve(lambda z: cell(z, prepared), cell.start(prepared), Picard(), stop)
    h, c = solution.z.chunk(2, dim=-1)
    assert solution.converged.all()
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(c[:, -1], last[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(cell.output(solution.z), expected[..., 3:], rtol=0, atol=1e-12)
    if recurrence == "delayed":  # and not before
        early = solve(
            lambda z: cell(z, prepared), cell.start(prepared), Picard(), dataclasses.replace(stop, max_evals=T)
        )
        assert not early.converged.any()


@RECURRENCES
def test_equilibrium_is_that_of_a_solve_sequential_in_time(recurrence):
    cell = built(recurrence=recurrence, scale=0.7).eval()
    x, memory = inputs(), some_memory(cell)
    joint, columns = equilibrium(cell, x, memory), []
    for t in range(T):
        prepared = cell.prepare(x[:, t : t + 1], memory)

        def column(z, prepared=prepared):
            return cell(z, prepared)

        stop = Stop(rtol=0, atol=1e-13, max_evals=3000)
        found = solve(column, cell.start(prepared), Picard(damping=0.7), stop)
        assert found.converged.all()
        columns.append(found.z)
        memory = cell.remember(found.z, prepared)
    torch.testing.assert_close(torch.cat(columns, dim=1), joint.z, rtol=0, atol=1e-10)


def test_both_recurrences_have_one_equilibrium():
    delayed = built(scale=0.7)
    carried = TrellisCell(dataclasses.replace(SMALL, recurrence="scan")).double()
    carried.load_state_dict(delayed.state_dict())
    x, memory = inputs(), some_memory(delayed)
    torch.testing.assert_close(equilibrium(delayed, x, memory).z, equilibrium(carried, x, memory).z, rtol=0, atol=1e-10)


@RECURRENCES
@pytest.mark.parametrize("carry", [True, False])
def test_split_is_joint_exactly_when_the_input_is_carried(recurrence, carry):
    cell = built(recurrence=recurrence, carry_input=carry, scale=0.7).eval()
    x, memory, pieces = inputs(), None, []
    for piece in x.split([3, 1, 3], dim=1):
        out = equilibrium(cell, piece, memory)
        memory = out.memory
        pieces.append(out.z)
    difference = (torch.cat(pieces, dim=1) - equilibrium(cell, x).z).abs().amax(dim=(0, 2))
    assert difference[:3].max() < 1e-10
    assert (difference[3:].max() < 1e-10) == carry


@RECURRENCES
@pytest.mark.parametrize("weight_norm", [True, False])
def test_implicit_gradient_is_that_of_a_deep_unrolled_network(recurrence, weight_norm):
    cell = built(recurrence=recurrence, weight_norm=weight_norm, dropout=0.3, weight_dropout=0.4, scale=0.5).train()
    x, memory = inputs().requires_grad_(), some_memory(cell)

    def gradients(layer):
        torch.manual_seed(5)  # the same masks
        out = layer(x, memory)
        wanted = [*cell.parameters(), x]
        return torch.autograd.grad((out.output * torch.linspace(0, 1, T)[:, None]).square().sum(), wanted)

    implicit = gradients(Equilibrium(cell, Anderson(), EXACT, Implicit(stop=EXACT)))
    for found, expected in zip(implicit, gradients(Unrolled(cell, 600)), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_layers_are_iterates_and_give_auxiliary_outputs_in_training():
    cell = built(dropout=0.2, weight_dropout=0.2)
    x, memory = inputs(), some_memory(cell)
    network = Unrolled(cell, 7, auxiliary_every=3).train()
    torch.manual_seed(3)
    out = network(x, memory)
    torch.manual_seed(3)
    prepared = cell.prepare(x, memory)
    z, outputs = torch.zeros(B, T, 2 * SMALL.channels, dtype=torch.float64), []
    for _ in range(7):
        z = cell(z, prepared)
        outputs.append(z[..., 3:5])
    assert torch.equal(out.output, outputs[-1])
    assert [torch.equal(a, b) for a, b in zip(out.auxiliary, [outputs[2], outputs[5]], strict=True)] == [True, True]
    assert network.eval()(x, memory).auxiliary == ()
    with pytest.raises(ValueError, match="auxiliary_every=8"):
        Unrolled(cell, 7, auxiliary_every=8)


def test_recomputed_layers_have_the_same_gradient_under_dropout():
    cell = built(dropout=0.2, weight_dropout=0.2).train()
    x = inputs()
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        Unrolled(cell, 5, checkpoint=checkpoint, auxiliary_every=2)(x).output.sum().backward()
        found.append([parameter.grad.clone() for parameter in cell.parameters()])
        cell.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weight_dropout_spares_the_present_and_scales_what_it_keeps():
    cell = built(weight_dropout=0.5, weight_norm=False).train()
    weights, (h, e) = cell.prepare(inputs(), None).shared, (cell.config.channels, cell.config.width)
    for dropped, linear, width in ((weights.state, cell.state, h), (weights.input, cell.input, e)):
        raw = linear.direction
        assert torch.equal(dropped[:, width:], raw[:, width:])
        kept = dropped[:, :width] != 0
        assert 0.3 < kept.double().mean() < 0.7
        torch.testing.assert_close(dropped[:, :width][kept], 2 * raw[:, :width][kept])
    whole = cell.eval().prepare(inputs(), None).shared
    assert torch.equal(whole.state, cell.state.direction)


def test_weight_dropout_comes_before_weight_norm():
    cell = built(weight_dropout=0.5).train()
    weights = cell.prepare(inputs(), None).shared
    torch.testing.assert_close(weights.state.norm(dim=1), cell.state.gain)


def test_one_mask_of_the_hidden_state_for_all_times_and_the_past():
    cell, x = built(dropout=0.5).train(), inputs()
    memory = some_memory(cell)

    def after(z):
        torch.manual_seed(0)
        return cell.prepare(x, TrellisMemory(z=z, x=memory.x))

    prepared = after(memory.z)
    drop = prepared.rows.drop
    assert drop.shape == (B, 1, SMALL.channels)
    dropped = torch.cat([drop == 0, torch.zeros_like(drop, dtype=torch.bool)], dim=-1)
    assert dropped.any()
    z = torch.randn(B, T, 2 * SMALL.channels, dtype=torch.float64)
    torch.testing.assert_close(cell(z, after(memory.z + dropped)), cell(z, prepared))
    assert not torch.allclose(cell(z, after(memory.z + ~dropped)), cell(z, prepared))
    torch.testing.assert_close(cell(z + dropped, prepared), cell(z, prepared))


def test_masks_are_drawn_once_per_step(monkeypatch):
    draws = []
    bernoulli = torch.Tensor.bernoulli_
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda t, p: (draws.append(t.shape), bernoulli(t, p))[1])
    cell = built(dropout=0.2, weight_dropout=0.2, scale=0.5).train()
    out = Equilibrium(cell, Anderson(), Stop(), Implicit())(inputs())
    out.output.sum().backward()
    assert out.solution.evals > 4
    assert len(draws) == 3  # W⁰, X⁰ and h


def test_solver_needs_fewer_evaluations_with_the_scan():
    """A cell that remembers: its forget gates are open, and what c carries goes a time step an iteration."""
    x = torch.randn(2, 60, 4, dtype=torch.float64)
    evals = {}
    for recurrence in ("delayed", "scan"):
        torch.manual_seed(0)
        cell = built(recurrence=recurrence, scale=0.4)
        with torch.no_grad():
            cell.state.bias[-cell.config.channels :] = 4.0
            prepared = cell.prepare(x, None)
            stop = Stop(rtol=1e-6, max_evals=200)
            solution = solve(lambda z: cell(z, prepared), cell.start(prepared), Picard(), stop)  # noqa: B023
        assert solution.converged.all()
        evals[recurrence] = solution.evals
    assert 2 * evals["scan"] < evals["delayed"]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dropping", [True, False])
def test_effective_weights_are_differentiable_twice(normed, dropping):
    linear = NormedLinear(inputs=6, outputs=4, normed=normed, init="normal", std=1.0).double()
    kept = torch.rand(4, 3) > 0.5 if dropping else None
    parameters = [p for p in (linear.direction, linear.gain) if p is not None]

    def effective(*values):
        names = ("direction", "gain")[: len(values)]
        choices = {"kept": kept, "rate": 0.5} if dropping else {}
        call = torch.func.functional_call
        return call(Effective(linear), {f"linear.{n}": v for n, v in zip(names, values, strict=True)}, (), choices)

    assert torch.autograd.gradcheck(effective, parameters)
    assert torch.autograd.gradgradcheck(effective, parameters)


class Effective(nn.Module):
    """A module whose output is W."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, **choices):
        return self.linear.effective(**choices)


# the scan itself


def scanned(*, dtype=torch.float64):
    a, b = torch.rand(2, 5, 3, dtype=dtype), torch.randn(2, 5, 3, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_(), torch.randn(2, 1, 3, dtype=dtype).requires_grad_()


def test_scan_is_the_recurrence():
    a, b, first = scanned()
    c, expected = first[:, 0], []
    for t in range(5):
        c = a[:, t] * c + b[:, t]
        expected.append(c)
    torch.testing.assert_close(scan(a, b, first), torch.stack(expected, dim=1))


def test_scan_is_differentiable_twice_and_forwards():
    assert torch.autograd.gradcheck(scan, scanned(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scan, scanned())


@pytest.mark.parametrize("time", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("reverse", [False, True])
def test_both_ways_to_scan_agree(time, reverse):
    a, b = torch.rand(2, time, 3, dtype=torch.float64), torch.randn(2, time, 3, dtype=torch.float64)
    first = torch.randn(2, 1, 3, dtype=torch.float64)
    found, expected = (way(a, b, first, reverse=reverse) for way in (_doubling, _one_by_one))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# what is refused


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"width": 0}, "width is at least 1"),
        ({"hidden": -1}, "hidden is at least 0"),
        ({"outputs": 0}, "outputs is at least 1"),
        ({"dropout": 1.0}, "0 ≤ dropout < 1"),
        ({"weight_dropout": -0.1}, "0 ≤ weight_dropout < 1"),
        ({"recurrence": "skip"}, "'delayed' or 'scan'"),
        ({"injection_init": "zeros"}, "injection_init is"),
        ({"std": float("nan")}, "finite"),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_a_wrong_configuration_is_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        TrellisConfig(**wrong)


def test_inputs_and_memories_that_do_not_fit_are_refused():
    cell = built()
    with pytest.raises(ValueError, match="has 5 channels and the cell reads 4"):
        cell.prepare(torch.randn(B, T, 5, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="of 3 streams and the input of 2"):
        cell.prepare(inputs()[:2], some_memory(cell))


def test_a_cache_is_refused_where_it_cannot_be_right():
    cell = built().eval()
    with pytest.raises(ValueError, match="one state, of all the text"):
        cell.cache(2, length=10)
    with pytest.raises(ValueError, match="padding stands before"):
        cell.cache(B, padding=torch.tensor([0, 1, 2]), memory=some_memory(cell))
    with pytest.raises(ValueError, match="no gradient"):
        cell.prepare(inputs(), cell.cache(B))
    with pytest.raises(ValueError, match="evaluation mode"):
        cell.train().cache(2)


def test_unroll_rule_gives_the_gradient_of_the_scan():
    cell = built(recurrence="scan", scale=0.5)
    x = inputs()
    stop = Stop(rtol=0, atol=0, max_evals=6, best=False)
    found = torch.autograd.grad(Equilibrium(cell, Picard(), stop, Unroll())(x).output.sum(), cell.input.direction)
    expected = torch.autograd.grad(Unrolled(cell, 5)(x).output.sum(), cell.input.direction)
    torch.testing.assert_close(found, expected)


# by what a reader of the code might get wrong


def test_c_is_taken_without_dropout():
    cell = built(dropout=0.5).train()
    prepared = cell.prepare(inputs(), some_memory(cell))
    drop = prepared.rows.drop
    assert (drop == 0).any()
    z = torch.randn(B, T, 2 * SMALL.channels, dtype=torch.float64)
    changed = z.clone()
    changed[..., SMALL.channels :] += drop == 0
    difference = (cell(changed, prepared) - cell(z, prepared)).abs()[..., SMALL.channels :]
    dropped = (drop == 0).expand(B, T - 1, -1)
    assert (difference[:, 1:][dropped] > 1e-6).all()


@RECURRENCES
def test_one_time_alone_is_the_first_of_two(recurrence):
    cell = built(recurrence=recurrence, dropout=0.4, weight_dropout=0.4).train()
    x, memory = inputs(time=2), some_memory(cell)
    prepared = []
    for time in (1, 2):
        torch.manual_seed(7)
        prepared.append(cell.prepare(x[:, :time], memory))
    assert torch.equal(prepared[0].rows.drop, prepared[1].rows.drop)
    z = torch.randn(B, 2, 2 * SMALL.channels, dtype=torch.float64)
    alone, both = cell(z[:, :1], prepared[0]), cell(z, prepared[1])
    torch.testing.assert_close(alone, both[:, :1], rtol=0, atol=1e-12)


def test_the_start_is_what_the_configuration_says():
    config = TrellisConfig(width=100, hidden=60, outputs=40, std=0.05)
    cell, other = config.build(), dataclasses.replace(config, injection_init="normal").build()
    bound = 1 / 200**0.5
    assert float(cell.state.direction.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert float(cell.state.bias.detach().std()) == pytest.approx(0.05, rel=0.2)
    assert 0.95 * bound < cell.input.direction.abs().max() <= bound
    assert float(other.input.direction.detach().std()) == pytest.approx(0.05, rel=0.05)
    torch.testing.assert_close(cell.state.gain, cell.state.direction.norm(dim=1))
    assert cell.input.bias is None


@pytest.mark.parametrize("warm", [False, True])
def test_generation_starts_from_the_last_state_if_it_is_to(warm):
    cell = built().eval()
    with torch.no_grad():
        cache = cell.cache(B, memory=some_memory(cell), warm=warm)
        single, several = (cell.start(cell.prepare(inputs(time=time), cache)) for time in (1, 2))
    assert torch.equal(single, cache.memory.z if warm else torch.zeros_like(single))
    assert not several.any()


def test_a_cache_is_refused_after_a_change_of_mode_and_as_a_memory_of_another(unhooked):
    cell = built().eval()
    cache = cell.cache(B)
    with pytest.raises(ValueError, match="continue with that"):
        cell.cache(B, memory=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="evaluation mode"):
        cell.train().prepare(inputs(), cache)


def test_a_memory_of_another_precision_is_taken():
    cell = built()
    single = TrellisMemory(**{name: value.float() for name, value in vars(some_memory(cell)).items()})
    assert cell.prepare(inputs(), single).rows.past_c.dtype == torch.float64


def test_layers_that_remember_their_inputs_are_refused_for_a_scan():
    layers = Explicit(depth=3, memory="layers")
    with pytest.raises(ValueError, match="recurrence='delayed'"):
        layers.build(dataclasses.replace(SMALL, recurrence="scan"))
    stack = layers.build(SMALL).double().eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn_like(parameter))
        x, memory, pieces = inputs(), None, []
        for piece in x.split([3, 1, 3], dim=1):
            out = stack(piece, memory)
            memory = out.memory
            pieces.append(out.output)
        torch.testing.assert_close(torch.cat(pieces, dim=1), stack(x).output, rtol=0, atol=1e-12)


def test_dropped_weights_have_an_exact_gradient_under_autocast():
    linear = NormedLinear(inputs=64, outputs=32, normed=True, init="normal", std=1.0)
    kept, g = torch.rand(32, 32) > 0.5, torch.randn(32, 64)
    wanted = [linear.direction, linear.gain]
    expected = torch.autograd.grad(linear.effective(kept, 0.5), wanted, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(linear.effective(kept, 0.5), wanted, g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_jacobian_of_the_scan_by_torch_func():
    a, b, first = (value.detach() for value in scanned())
    for way in (torch.func.jacrev, torch.func.jacfwd):
        found = way(scan, argnums=1)(a, b, first)
        expected = torch.autograd.functional.jacobian(lambda b: scan(a, b, first), b)
        torch.testing.assert_close(found, expected)
