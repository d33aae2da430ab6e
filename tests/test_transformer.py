"""The transformer cell against its equations, written out one by one and without any hoisting."""

from __future__ import annotations

import collections
import dataclasses
import math

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria import Anderson, Equilibrium, Implicit, Picard, Stop, Unroll
from equilibria.cells import TransformerConfig, TransformerMemory
from equilibria.cells.transformer.positions import Rotation, slopes
from equilibria.cells.transformer.relative import relative_shift, sinusoids
from equilibria.layers.dropout import dropout_mask
from equilibria.layers.linear import NormedLinear
from slow_cases import some_slow

SMALL = TransformerConfig(width=12, heads=3, inner=20, memory=16, longest=32)
B, T = 2, 5


def noisy(config, *, training=False):
    cell = config.build().double().train(training)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return cell


def past(config, length):
    if length == 0:
        return None
    z, u = (torch.randn(B, length, size, dtype=torch.float64) for size in (config.width, 3 * config.width))
    return TransformerMemory(z=z, u=u)


def normed(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def weight(linear):
    v = linear.direction
    return v if linear.gain is None else linear.gain[:, None] * v / v.norm(dim=1, keepdim=True)


def scores_one_by_one(cell, q, k, memory):
    """A_ij for one sample and head after another; q [B T H C], k [B K H C]."""
    config = cell.config
    window = config.window or 1000
    attention, positions = cell.attention, cell.attention.positions
    batch, queries, heads, size = q.shape
    scores = torch.full((batch, heads, queries, k.shape[1]), -math.inf, dtype=q.dtype)
    omega = 10000 ** (-torch.arange(0, config.width, 2, dtype=q.dtype) / config.width)
    for i in range(queries):
        for j in range(k.shape[1]):
            distance = memory + i - j
            if not 0 <= distance < window:
                continue
            queried = q[:, i] + attention.u
            if config.positions == "rotary":
                queried = rotated(queried, 100 + memory + i)  # any common offset
                scores[:, :, i, j] = (queried * rotated(k[:, j], 100 + j)).sum(-1) / math.sqrt(size)
                continue
            content = torch.einsum("bhc,bhc->bh", queried, k[:, j]) / math.sqrt(size)
            if config.positions == "decay":
                scores[:, :, i, j] = content + positions.bias[:, distance]
            else:
                r = torch.cat([(distance * omega).sin(), (distance * omega).cos()])
                p = (weight(positions.project) @ r).view(heads, size)
                scores[:, :, i, j] = content + ((q[:, i] + positions.v) * p).sum(-1) / math.sqrt(size)
    return scores


def rotated(x, position):
    """The channels of a head in pairs (f, F + f), each turned by a matrix of two rows (Su et al. 2021, eq. 15)."""
    half, result = x.shape[-1] // 2, torch.zeros_like(x)
    for f in range(half):
        angle = position * 10000 ** (-2 * f / x.shape[-1])
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=x.dtype)
        result[..., [f, half + f]] = x[..., [f, half + f]] @ turn.t()
    return result


def equations(cell, z, x, memory):
    """f as it stands in the paper, with nothing computed beforehand."""
    config, attention = cell.config, cell.attention
    u = x @ cell.inject.direction.t() + cell.inject.bias
    c, injections, length = z, u, 0
    if memory is not None:
        c, injections = torch.cat([memory.z, z], 1), torch.cat([memory.u, u], 1)
        length = memory.z.shape[1]
    c = c if config.norm == "post" else normed(c)
    q, k, v = ((c @ weight(attention.qkv).t()) + injections).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (config.heads, -1)) for part in (q[:, length:], k, v))
    weights = scores_one_by_one(cell, q, k, length).softmax(-1)
    heads = torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2)
    o = heads @ weight(attention.out).t() + attention.out.bias

    def network(a):
        hidden = torch.relu(a @ weight(cell.inner).t() + cell.inner.bias)
        return hidden @ weight(cell.outer).t() + cell.outer.bias

    if config.norm == "post":
        a = normed(z + o)
        return normed(a + network(a))
    if config.norm == "pre":
        a = z + o
        return a + network(normed(a))
    b = normed(z + o)
    return b + network(b)


@pytest.mark.parametrize("norm", ["post", "pre", "pre-normalised"])
@pytest.mark.parametrize("positions", ["relative", "decay", "rotary"])
@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("length", [0, 7])
@pytest.mark.parametrize("window", [0, 4])
def test_value_and_gradients_are_those_of_the_equations(norm, positions, weight_norm, length, window):
    config = dataclasses.replace(SMALL, norm=norm, positions=positions, weight_norm=weight_norm, window=window)
    cell, memory = noisy(config), past(config, length)
    x, z = (torch.randn(B, T, config.width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    actual, expected = cell(z, cell.prepare(x, memory)), equations(cell, z, x, memory)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    g, wanted = torch.randn_like(z), [x, z, *cell.parameters()]
    gradients = torch.autograd.grad(actual, wanted, g)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, wanted, g), rtol=1e-9, atol=1e-9)


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.counts[name] for name in ("mm", "addmm", "bmm", "baddbmm", "matmul"))


@pytest.mark.parametrize(("positions", "products"), [("relative", 7), ("decay", 6), ("rotary", 6)])
@pytest.mark.parametrize("length", [0, 7])
def test_products_of_one_call(positions, products, length):
    """qkv of the current rows, QK, (positions), AV, W_o, W_1, W_2, and nothing besides."""
    config = dataclasses.replace(SMALL, positions=positions, dropout=0.1, attention_dropout=0.1)
    cell = config.build().double().train()
    prepared = cell.prepare(torch.randn(B, T, config.width, dtype=torch.float64), past(config, length))
    z = torch.randn(B, T, config.width, dtype=torch.float64)
    with Products() as products_of_call:
        cell(z, prepared)
    assert products_of_call.total == products
    assert products_of_call.counts["bernoulli_"] == 0


@pytest.mark.parametrize("length", [0, 1, 6])
def test_relative_shift_gathers_by_distance(length):
    keys = length + T
    raw = torch.randn(3, T, keys + 1)
    shifted = relative_shift(raw)
    assert shifted.shape == (3, T, keys)
    for i in range(T):
        for j in range(length + i + 1):
            assert torch.equal(shifted[:, i, j], raw[:, i, 1 + keys - 1 - (length + i - j)])


def test_sinusoids_count_down():
    table = sinusoids(4, 6, torch.zeros(1, dtype=torch.float64))
    omega = 10000 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    for row, distance in enumerate((3, 2, 1, 0)):
        expected = torch.cat([(distance * omega).sin(), (distance * omega).cos()])
        torch.testing.assert_close(table[row], expected)


class TestWindow:
    @pytest.mark.parametrize("positions", ["relative", "decay", "rotary"])
    def test_reaches_exactly_so_far(self, positions):
        config = dataclasses.replace(SMALL, positions=positions, window=3)
        cell = noisy(config)
        x, z = (torch.randn(B, 8, config.width, dtype=torch.float64) for _ in range(2))
        before = cell(z, cell.prepare(x, None))
        x[:, 2] += 1
        changed = (cell(z, cell.prepare(x, None)) != before).any(-1).any(0)
        assert changed.tolist() == [False, False, True, True, True, False, False, False]


class TestRotary:
    def test_turns_are_exact_at_far_positions(self):
        """In float32 as in float64, at positions where an angle of float32 is off by 0.06."""
        x = torch.randn(2, 3, 4, 6)
        for dtype, off in ((torch.float64, 1e-9), (torch.float32, 1e-6), (torch.bfloat16, 0.05)):
            near = x.to(dtype)
            turned = Rotation.of(first=10**6, count=4, width=6, like=near)(near)
            assert turned.dtype == dtype
            for t in range(4):
                expected = rotated(near[:, :, t].double(), 10**6 + t)
                torch.testing.assert_close(turned[:, :, t].double(), expected, rtol=0, atol=off)

    def test_has_no_parameters_of_its_own(self):
        cell = dataclasses.replace(SMALL, positions="rotary").build()
        assert not list(cell.attention.positions.parameters())


class TestMemory:
    def test_grows_until_it_is_full(self):
        cell, memory, seen = noisy(SMALL), None, []
        for _ in range(5):
            x, z = (torch.randn(B, T, SMALL.width, dtype=torch.float64) for _ in range(2))
            prepared = cell.prepare(x, memory)
            memory = cell.remember(z, prepared)
            seen.append((z, prepared.kept.injection))
            for kept, parts in ((memory.z, [z for z, _ in seen]), (memory.u, [u for _, u in seen])):
                assert torch.equal(kept, torch.cat(parts, 1)[:, -SMALL.memory :])

    def test_shorter_than_a_segment(self):
        cell = noisy(dataclasses.replace(SMALL, memory=2))
        x, z = (torch.randn(B, T, SMALL.width, dtype=torch.float64) for _ in range(2))
        prepared = cell.prepare(x, past(SMALL, 2))
        assert torch.equal(cell.remember(z, prepared).z, z[:, -2:])

    def test_none(self):
        cell = noisy(dataclasses.replace(SMALL, memory=0))
        x, z = (torch.randn(B, T, SMALL.width, dtype=torch.float64) for _ in range(2))
        assert cell.remember(z, cell.prepare(x, None)) is None

    def test_of_other_streams_is_refused(self):
        cell = noisy(SMALL)
        with pytest.raises(ValueError, match=r"memory is of 2 streams and the input of 3"):
            cell.prepare(torch.randn(3, T, SMALL.width, dtype=torch.float64), past(SMALL, 4))


class TestDecay:
    config = dataclasses.replace(SMALL, heads=4, positions="decay", longest=9)

    def test_start(self):
        bias = self.config.build().attention.positions.bias
        torch.testing.assert_close(bias[:, 3].detach(), torch.tensor([-6.0, -2.1, -0.6, -0.15]))
        assert bias.shape == (4, 9)

    def test_other_numbers_of_heads(self):
        torch.testing.assert_close(slopes(3), torch.tensor([2.0, math.sqrt(0.1), 0.05]))
        assert slopes(1).shape == (1,)

    def test_too_long(self):
        cell = self.config.build()
        cell.prepare(torch.randn(B, 9, 12), None)
        with pytest.raises(ValueError, match=r"6 \+ 4 = 10 positions.*longest=10"):
            cell.prepare(torch.randn(B, 4, 12), TransformerMemory(z=torch.randn(B, 6, 12), u=torch.randn(B, 6, 36)))


class TestWeightNorm:
    def test_starts_as_drawn_and_separates_length_from_direction(self):
        linear = NormedLinear(inputs=50, outputs=40, init="default_fan_in")
        torch.testing.assert_close(linear.effective(), linear.direction)
        assert 0.99 / math.sqrt(50) < float(linear.direction.abs().max().detach()) <= 1 / math.sqrt(50)
        with torch.no_grad():
            linear.direction.mul_(3)
            linear.gain.mul_(2)
        torch.testing.assert_close(linear.effective().norm(dim=1), linear.gain)

    def test_normal_start_is_really_applied(self):
        linear = NormedLinear(inputs=50, outputs=40, init="normal")
        assert abs(float(linear.effective().std().detach()) - 0.01) < 0.001

    def test_follows_loaded_weights(self):
        first, second = noisy(SMALL), noisy(SMALL)
        second.load_state_dict(first.state_dict())
        x, z = (torch.randn(B, T, SMALL.width, dtype=torch.float64) for _ in range(2))
        assert torch.equal(first(z, first.prepare(x, None)), second(z, second.prepare(x, None)))

    def test_start_of_the_cell(self):
        cell = TransformerConfig(width=128).build()
        assert abs(float(cell.inject.direction.std().detach()) - 0.01) < 0.001
        assert float(cell.inner.direction.abs().max().detach()) > 0.08
        assert not any(parameter.any() for name, parameter in cell.named_parameters() if name.endswith("bias"))


class TestDropout:
    def test_masks(self):
        config = dataclasses.replace(SMALL, dropout=0.3, attention_dropout=0.2)
        cell, x = config.build().train(), torch.randn(B, T, 12)
        rows = cell.prepare(x, None).rows
        assert rows.drop_attention.shape == rows.drop_outer.shape == (B, 1, 12)
        assert rows.drop_inner.shape == (B, 1, 20)
        assert rows.attention.drop.shape == (B, 3, T, T)
        evaluation = cell.eval().prepare(x, None).rows
        assert evaluation.drop_attention is evaluation.drop_inner is evaluation.attention.drop is None

    def test_rates(self):
        like = torch.zeros(1)
        assert dropout_mask((2, 1, 3), rate=0.0, training=True, like=like) is None
        assert dropout_mask((2, 1, 3), rate=0.5, training=False, like=like) is None
        mask = dropout_mask((100, 1, 1000), rate=0.2, training=True, like=like)
        assert set(mask.unique().tolist()) == {0.0, 1.25}
        assert abs(float(mask.mean()) - 1) < 0.01

    def test_no_attention_mask_without_a_rate(self):
        cell = dataclasses.replace(SMALL, dropout=0.3).build().train()
        assert cell.prepare(torch.randn(B, T, 12), None).rows.attention.drop is None


@pytest.mark.parametrize("positions", ["relative", *some_slow("decay", "rotary")])
def test_implicit_gradient_is_that_of_a_deep_network(positions):
    """With memory, weight norm and masks on, the implicit gradient equals that of 600 layers."""
    config = dataclasses.replace(SMALL, positions=positions, dropout=0.1, attention_dropout=0.1)
    cell, memory = config.build().double().train(), past(config, 4)
    with torch.no_grad():
        cell.inject.direction.mul_(300)  # a strong input and little of z make the cell a contraction
        cell.attention.qkv.gain.mul_(0.3)
    x = torch.randn(B, T, config.width, dtype=torch.float64)
    g, gradients = torch.randn_like(x), []
    tight = Stop(rtol=1e-12, atol=1e-12, max_evals=200)
    for layer in (
        Equilibrium(cell, Anderson(), tight, Implicit(stop=tight)),
        Equilibrium(cell, Picard(), Stop(rtol=0, atol=0, max_evals=601, best=False), Unroll()),
    ):
        torch.manual_seed(1)  # the same masks
        gradients.append(torch.autograd.grad(layer(x, memory).z, list(cell.parameters()), g))
    for implicit, deep in zip(*gradients, strict=True):
        assert float((implicit - deep).norm() / deep.norm()) < 1e-5


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"width": 10, "heads": 4}, r"width=10, heads=4.*try heads=5"),
        ({"width": 9, "heads": 3}, r"even; try width=10, or positions='decay'"),
        ({"width": 9, "heads": 3, "positions": "rotary"}, r"an even number of them and not 3; try width=12"),
        ({"positions": "absolute"}, r"positions is one of 'relative', 'decay', 'rotary'"),
        ({"norm": "none"}, r"norm is one of 'post', 'pre', 'pre-normalised'"),
        ({"attention": "flash"}, r"attention is one of 'exact', 'fused', 'auto'"),
        ({"init": "xavier"}, r"init is 'default_fan_in' or 'normal'"),
        ({"dropout": 1.0}, r"dropout=1.0.*0 ≤ dropout < 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0.1"),
        ({"heads": 0}, r"heads is at least 1"),
        ({"memory": -1}, r"memory is at least 0"),
    ],
)
def test_refuses(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        unchecked(**choice)


def unchecked(**choice):
    """The configuration as a user gets it, without the tests' type checks, which would speak before it."""
    config = object.__new__(TransformerConfig)
    for field in dataclasses.fields(TransformerConfig):
        object.__setattr__(config, field.name, choice.get(field.name, field.default))
    config.__post_init__()
    return config


def test_wrong_width_of_the_input():
    with pytest.raises(ValueError, match="13 channels and the cell reads 12"):
        SMALL.build().prepare(torch.randn(B, T, 13), None)


def test_layer_norm_has_the_equations_epsilon():
    x = torch.randn(3, 12, dtype=torch.float64) * 1e-3
    torch.testing.assert_close(functional.layer_norm(x, (12,)), normed(x))
