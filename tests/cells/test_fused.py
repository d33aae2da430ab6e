"""Fused attention is the exact form: values, gradients of every order, padding, memory, windows and caches."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from equilibria import Anderson, Equilibrium, Implicit, Stop
from equilibria.cells import KeyValues, TransformerConfig, TransformerMemory
from equilibria.cells.transformer import fused, kernel
from equilibria.cells.transformer.fused import prepare_fused
from equilibria.cells.transformer.kernel import attention
from equilibria.layers.cell import CellMap
from equilibria.peak_memory import PeakMemory
from equilibria.stability import jacobian_penalty

B, T, M = 3, 9, 6
SMALL = TransformerConfig(width=12, heads=3, inner=16, memory=M, longest=32)
KINDS = {
    "relative": SMALL,
    "relative, window": dataclasses.replace(SMALL, window=5),
    "relative, channels dropped": dataclasses.replace(SMALL, dropout=0.3),
    "decay": dataclasses.replace(SMALL, positions="decay"),
    "decay, window": dataclasses.replace(SMALL, positions="decay", window=5, longest=8),
    "rotary": dataclasses.replace(SMALL, positions="rotary", dropout=0.3, variational=False),
    "rotary, window": dataclasses.replace(SMALL, positions="rotary", window=5),
}
KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
PAST = pytest.mark.parametrize("past", ["none", "memory", "padding", "padding and memory", "keys and values"])


def both(config, *, noise=0.3):
    """The cell in its exact and in its fused form, with the same parameters."""
    exact = config.build().double()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    fast = dataclasses.replace(config, attention="fused").build().double()
    fast.load_state_dict(exact.state_dict())
    return exact, fast


def prepared(cell, x, past):
    """Prepared values with the same dropout masks and the same past for every cell."""
    torch.manual_seed(3)
    padded, mask, memory = "padding" in past, None, None
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, :4] = True  # before the text of a row
    last = torch.zeros(B, T, dtype=torch.bool)
    last[2, -3:] = True  # after that of another
    if padded:
        mask = last if "memory" in past else first | last
    if "memory" in past:
        earlier = torch.randn(B, T, 12, dtype=torch.float64)
        before = cell.prepare(earlier, key_padding_mask=first if padded else None)
        memory = cell.remember(torch.randn_like(earlier), before)
    if past == "keys and values":
        memory = KeyValues(*torch.randn(2, B, 3, 7, 4, dtype=torch.float64).unbind(0))
    return cell.prepare(x, memory, key_padding_mask=mask)


def leaves_of(cell, x, z):
    """Input, state and parameters, for their gradients."""
    return [x.clone().requires_grad_(), z.clone().requires_grad_(), *cell.parameters()]


def is_fused(values):
    return values.shared.attention.fused is not None


@PAST
@KIND
def test_values_and_gradients_are_those_of_the_exact_form(config, past):
    """To 1e-12 in float64, those of all parameters, of the input and of the state."""
    x, z, g = torch.randn(3, B, T, 12, dtype=torch.float64).unbind(0)
    found = []
    for cell in both(config):
        leaves = leaves_of(cell, x, z)
        values = prepared(cell, leaves[0], past)
        assert is_fused(values) == (cell.config.attention == "fused")
        f = cell(leaves[1], values)
        with torch.no_grad():
            assert_close(cell(z, prepared(cell, x, past)), f, rtol=0, atol=1e-13)
        found.append([f, *torch.autograd.grad(f, leaves, g)])
    for exact, fast in zip(*found, strict=True):
        assert_close(fast, exact, rtol=1e-12, atol=1e-12)


@PAST
@KIND
def test_second_derivatives_are_those_of_the_exact_form(config, past):
    """The gradient of ‖Jᵀg‖² in all parameters, the input and the state."""
    x, z, g = torch.randn(3, B, T, 12, dtype=torch.float64).unbind(0)
    found = []
    for cell in both(config):
        leaves = leaves_of(cell, x, z)
        f = cell(leaves[1], prepared(cell, leaves[0], past))
        first = torch.autograd.grad(f, leaves, g, create_graph=True)
        total = torch.stack([gradient.square().sum() for gradient in first]).sum()
        found.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for exact, fast in zip(*found, strict=True):
        assert_close(fast, exact, rtol=1e-11, atol=1e-11)


@PAST
@KIND
def test_jacobian_vector_products_are_those_of_the_exact_form(config, past):
    """In forward mode, and in forward mode over a backward pass."""
    x, z, v = torch.randn(3, B, T, 12, dtype=torch.float64).unbind(0)
    found = []
    for cell in both(config):
        values = prepared(cell, x, past)
        once = CellMap(cell, values).jvp(z, v)
        gradient = torch.func.grad(lambda z, cell=cell, values=values: cell(z, values).sin().sum())
        found.append(
            [once, *torch.func.jvp(gradient, (z,), (v,)), torch.func.vmap(gradient)(z[:, None].expand(-1, B, -1, -1))]
        )
    for exact, fast in zip(*found, strict=True):
        assert_close(fast, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["relative", "decay", "rotary"])
def test_many_cotangents_at_once(positions):
    """As ``is_grads_batched`` and ``torch.func.vmap`` over a VJP give them."""
    x, z = torch.randn(2, B, T, 12, dtype=torch.float64).unbind(0)
    g, found = torch.randn(4, B, T, 12, dtype=torch.float64), []
    for cell in both(dataclasses.replace(SMALL, positions=positions)):
        state = z.clone().requires_grad_()
        f = cell(state, prepared(cell, x, "memory"))
        wanted = [state, *cell.attention.parameters()]
        older = torch.autograd.grad(f, wanted, g, is_grads_batched=True, retain_graph=True)
        product = partial(torch.autograd.grad, f, state, retain_graph=True)
        newer = torch.func.vmap(lambda u, product=product: product(u)[0])(g)
        found.append([*older, newer])
    for exact, fast in zip(*found, strict=True):
        assert_close(fast, exact, rtol=1e-12, atol=1e-12)


@KIND
def test_equilibria_and_their_gradients(config):
    """The whole layer in training: solve, adjoint solve, gradients of the parameters; then a Jacobian penalty."""
    x, found = torch.randn(B, T, 12, dtype=torch.float64), []
    for cell in both(config, noise=0.05):
        with torch.no_grad():
            cell.inject.direction.mul_(20)  # a strong input makes f a contraction
        stop = Stop(rtol=1e-13, atol=1e-13, max_evals=200)
        layer = Equilibrium(cell, Anderson(), stop, Implicit(Anderson(), stop))
        torch.manual_seed(1)
        out = layer(x)
        assert out.solution.converged.all()
        penalty = jacobian_penalty(CellMap(cell, prepared(cell, x, "none")), out.z, generator=torch.manual_seed(5))
        loss = out.z.square().sum() + penalty.sum()
        found.append([out.z, *torch.autograd.grad(loss, list(cell.parameters()))])
    for exact, fast in zip(*found, strict=True):
        assert_close(fast, exact, rtol=1e-8, atol=1e-9)


@PAST
@pytest.mark.parametrize("kind", ["relative", "relative, window", "relative, channels dropped"])
def test_further_channels_exist_for_a_few_samples_at_a_time(kind, past, monkeypatch):
    """The values of groups are those of one call bit for bit, and derivatives of first and second order are equal."""
    cell = both(KINDS[kind])[1]
    x, z, g = torch.randn(3, B, T, 12, dtype=torch.float64).unbind(0)
    plain, sizes, found = fused.attention, [], []
    monkeypatch.setattr(fused, "attention", lambda q, *others: sizes.append(len(q)) or plain(q, *others))
    for numbers in (fused.NUMBERS, 1):
        monkeypatch.setattr(fused, "NUMBERS", numbers)
        leaves = leaves_of(cell, x, z)
        f = cell(leaves[1], prepared(cell, leaves[0], past))
        first = torch.autograd.grad(f, leaves, g, create_graph=True)
        total = torch.stack([gradient.square().sum() for gradient in first]).sum()
        second = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append([f, *first, *second])
    assert sizes == [B, *[1] * B]
    assert torch.equal(found[0][0], found[1][0])
    for one, groups in zip(*found, strict=True):
        assert_close(groups, one, rtol=1e-12, atol=1e-12)


def test_groups_of_samples_take_less_memory(monkeypatch):
    """The peak of a VJP falls, since the gradients of the further channels exist for a few samples at a time."""
    cell = TransformerConfig(width=64, heads=8, inner=64, memory=0, attention="fused").build()
    z, peaks = torch.randn(16, 64, 64), []
    values = cell.prepare(torch.randn_like(z))
    for numbers in (1 << 30, 1):
        monkeypatch.setattr(fused, "NUMBERS", numbers)
        with PeakMemory(z.device) as measured:
            state = z.clone().requires_grad_()
            torch.autograd.grad(cell(state, values).sum(), state)
        peaks.append(measured.peak)
    assert peaks[1] < 0.75 * peaks[0]


@pytest.mark.parametrize("positions", ["relative", "decay", "rotary"])
def test_caches(positions):
    """Pieces of a text from a cache, one position or several, with texts that begin later."""
    x = torch.randn(B, 8, 12, dtype=torch.float64)
    found = []
    for cell in both(dataclasses.replace(SMALL, positions=positions)):
        cache, pieces = cell.eval().cache(B, length=7, padding=torch.tensor([0, 2, 5])), []
        with torch.no_grad():
            for piece in x.split([3, 1, 1, 3], dim=1):
                values = cell.prepare(piece, cache)
                assert is_fused(values) == (cell.config.attention == "fused" and piece.shape[1] > 1)
                z = cell(piece.cos(), values)
                cache = cell.remember(z, values)
                pieces.append(z)
        found.append(torch.cat(pieces, dim=1))
    assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{"attention_dropout": 0.2}, {"dropout": 0.2, "variational": False}], ids=["weights", "distances"]
)
def test_takes_the_exact_form_where_no_other_is_right(changes):
    """Bit for bit, with the same random numbers; in evaluation there are none, and it is fused."""
    x, z = torch.randn(2, B, T, 12, dtype=torch.float64).unbind(0)
    exact, fast = both(dataclasses.replace(SMALL, **changes))
    one, other = (prepared(cell, x, "memory") for cell in (exact, fast))
    assert not is_fused(other)
    assert torch.equal(exact(z, one), fast(z, other))
    assert is_fused(prepared(fast.eval(), x, "memory"))


def test_the_same_random_numbers_in_both_forms():
    """After a forward pass with dropout the generators are in the same state."""
    states = []
    for cell in both(KINDS["relative, channels dropped"]):
        prepared(cell, torch.randn(B, T, 12, dtype=torch.float64), "memory")
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(("positions", "passes"), [("relative", 0), ("decay", 1), ("rotary", 0)])
def test_scores_are_written_for_the_gradient_of_a_bias_alone(positions, passes, monkeypatch):
    """Neither f nor its VJPs in the state write them, and one full backward pass writes them once, for the decay."""
    plain, calls = kernel.__dict__["_weights"], []
    monkeypatch.setattr(kernel, "_weights", lambda *given: calls.append(1) or plain(*given))
    _, cell = both(dataclasses.replace(SMALL, positions=positions))
    x, z = torch.randn(2, B, T, 12, dtype=torch.float64).unbind(0)
    values, state = prepared(cell, x, "memory"), z.clone().requires_grad_()
    with torch.no_grad():
        cell(z, values)
    f = cell(state, values)
    torch.autograd.grad(f.sum(), state, retain_graph=True)
    assert not calls
    f.square().sum().backward()
    assert len(calls) == passes


def test_long_angles_are_those_of_float64():
    """In float32, at positions around 900, the fused form is nearer to the truth than the exact one."""
    exact, fast = both(dataclasses.replace(SMALL, memory=900))
    x, z = torch.randn(2, 1, T, 12, dtype=torch.float64).unbind(0)
    past, injection = torch.randn(1, 900, 48, dtype=torch.float64).split([12, 36], dim=2)
    truth = exact(z, exact.prepare(x, TransformerMemory(z=past, u=injection)))
    memory = TransformerMemory(z=past.float(), u=injection.float())
    off = [(cell.float()(z.float(), cell.prepare(x.float(), memory)) - truth).abs().max() for cell in (exact, fast)]
    assert off[1] < min(off[0], 1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (3, 2), None])
def test_the_kernel_against_finite_differences(shape):
    """First and second derivatives, those of a bias included, shared by samples or by heads or by none."""
    q, k, v = (torch.randn(3, 2, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 4, 4))
    bias, hidden = None, torch.ones(4, 4, dtype=torch.bool).triu(1)
    if shape is not None:
        bias = torch.randn(*shape, 4, 4, dtype=torch.float64).requires_grad_()

    def f(q, k, v, bias):
        return attention(q, k, v, bias if bias is None else bias.masked_fill(hidden, -math.inf))

    inputs: Any = (q, k, v, bias)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize(("width", "expected"), [(204, True), (206, False)])
def test_wide_heads_take_the_exact_form_on_a_gpu(width, expected):
    """Heads of 51 + 204 = 255 channels are fused, those of 103 + 206 are not; decided without a GPU."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    attention = dataclasses.replace(SMALL, width=width, heads=4 if expected else 2, attention="fused").build().attention
    like = torch.zeros(1).as_subclass(OnGpu)
    found = prepare_fused(attention.positions, attention.u, if_quicker=False, batch=1, queries=4, memory=0, like=like)
    assert (found is not None) == expected


@pytest.mark.parametrize(("positions", "channels"), [("relative", 4 + 12), ("decay", 4), ("rotary", 4)])
def test_auto_is_fused_from_a_number_of_scores_per_channel_on(positions, channels, monkeypatch):
    """Those of all samples and heads count, with the keys of the memory; further channels ask for more of them."""
    cell = dataclasses.replace(SMALL, positions=positions, attention="auto").build().double()
    x, number = torch.randn(B, T, 12, dtype=torch.float64), 3 * B * T * (T + M) / channels
    for least, expected in ((number, True), (number + 0.1, False)):
        monkeypatch.setattr(fused, "LEAST_SCORES", least)
        assert is_fused(prepared(cell, x, "memory")) == expected


@pytest.mark.parametrize(
    ("width", "batch", "time", "expected"),
    [(32, 32, 420, True), (32, 32, 120, False), (128, 4, 1024, True), (128, 8, 512, False), (128, 8, 64, False)],
)
def test_auto_takes_the_quicker_form_of_the_measured_sizes(width, batch, time, expected):
    """Those of benchmarks/attention.py."""
    attention = TransformerConfig(width=width, heads=4, attention="auto", window=1024).build().attention
    span = {"batch": batch, "queries": time, "memory": 0, "like": torch.zeros(1)}
    assert (prepare_fused(attention.positions, attention.u, if_quicker=True, **span) is not None) == expected
