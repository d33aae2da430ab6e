"""Weights that hooks of PyTorch compute before a module is called, also where the module itself is never called."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from equilibria import Anderson, Cell, Equilibrium, Implicit, Method, Prepared, Stack, Stop, Unrolled
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.layers.linear import NormedLinear
from equilibria.lm.model import AdaptiveConfig, LanguageConfig, MixtureConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
TIGHT = Stop(1e-12, max_evals=100)
METHOD = Method(Anderson(), Stop(max_evals=6), Implicit(stop=Stop(max_evals=6)), on_failure="ignore")
SMALL = TransformerConfig(width=8, heads=2, inner=12, memory=4)
MODELS = {
    "transformer": LanguageConfig(SMALL, tied=False),
    "unnormalised": LanguageConfig(dataclasses.replace(SMALL, weight_norm=False)),
    "decay": LanguageConfig(dataclasses.replace(SMALL, positions="decay", longest=16)),
    "trellis": LanguageConfig(TrellisConfig(width=4, hidden=3, outputs=4, std=0.3)),
    "adaptive": LanguageConfig(SMALL, tied=False, adaptive=AdaptiveConfig(cutoffs=(4, 8), division=2)),
    "adaptive-tied": LanguageConfig(SMALL, adaptive=AdaptiveConfig(cutoffs=(4, 8), division=2)),
    "mixture": LanguageConfig(SMALL, mixture=MixtureConfig(experts=2)),
}
V = 11
V = 11


def built(name):
    torch.manual_seed(1)
    config = MODELS[name]
    return config.build(V, method=METHOD).double()


def loss(model):
    generator = torch.Generator().manual_seed(5)
    tokens, targets = (torch.randint(V, (2, 5), generator=generator) for _ in range(2))
    return model(tokens, targets).loss


def place_of(model, place):
    owner, _, name = place.rpartition(".")
    return model.get_submodule(owner), name


@pytest.mark.parametrize("name", MODELS)
def test_pruned_parameters_are_the_masked_ones_of_this_step(name):
    """In evaluation, then in training, over two steps of an optimiser; the other model is masked by hand."""
    model, other = built(name), built(name)
    masks = {}
    for place, own in other.named_parameters():
        if "embedding." in place:  # an embedding is called, and PyTorch does not prune the lists inside it
            continue
        owner, attribute = place_of(model, place)
        prune.random_unstructured(owner, attribute, 0.4)
        masks[place] = getattr(owner, f"{attribute}_mask")
        with torch.no_grad():
            own.mul_(masks[place])
    steps = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, other)]
    for _ in range(2):
        for each in (model, other):
            each.eval()
        with torch.no_grad():
            assert_close(loss(model), loss(other), rtol=1e-9, atol=1e-9)
        for each, step in zip((model, other), steps, strict=True):
            each.train()
            step.zero_grad()
            loss(each).backward()
        for place, mask in masks.items():
            own = other.get_parameter(place).grad
            assert own is not None
            own.mul_(mask)
            assert_close(model.get_parameter(f"{place}_orig").grad, own, rtol=1e-7, atol=1e-9, msg=place)
        for step in steps:
            step.step()


@pytest.mark.parametrize("place", ["layer.cell.inner.direction", "layer.cell.attention.positions.v", "head.weight"])
def test_the_older_weight_norm_is_the_newer_one(place):
    model = dataclasses.replace(MODELS["unnormalised"], tied=False).build(V, method=METHOD).double()
    other = copy.deepcopy(model)
    nn.utils.weight_norm(*place_of(model, place))
    parametrizations.weight_norm(*place_of(other, place))
    steps = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, other)]
    for _ in range(3):
        losses = [loss(each) for each in (model, other)]
        assert_close(*losses, rtol=1e-9, atol=1e-9)
        for value, step in zip(losses, steps, strict=True):
            step.zero_grad()
            value.backward()
            step.step()


class Injecting(Cell):
    """f(z; x) = tanh(z/2 + x W), where ``prepare`` reads W."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).double())

    def prepare(self, x):
        return Prepared(shared=(x @ self.weight,))

    def forward(self, z, prepared):
        return torch.tanh(z / 2 + prepared.shared[0])


LAYERS = {
    "Equilibrium": lambda cell: Equilibrium(cell, stop=TIGHT, gradient=Implicit(stop=TIGHT)),
    "Unrolled": lambda cell: Unrolled(cell, 60),
    "Stack": lambda cell: Stack([cell] * 60),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_what_prepare_reads_is_of_the_weights_that_were_loaded(layer):
    cell = Injecting()
    prune.random_unstructured(cell, "weight", 0.4)
    x, net = torch.randn(3, 4).double(), LAYERS[layer](cell)
    with torch.no_grad():
        net(x)
    state = net.state_dict()
    loaded = {key: torch.randn_like(value) if key.endswith("_orig") else value for key, value in state.items()}
    net.load_state_dict(loaded)
    other = Injecting()
    with torch.no_grad():
        other.weight.copy_(cell.weight_orig * cell.weight_mask)
    z, wanted = net(x).output, LAYERS[layer](other)(x).output
    assert_close(z, wanted, rtol=1e-9, atol=1e-9)
    z.square().sum().backward()
    wanted.square().sum().backward()
    assert_close(cell.weight_orig.grad, other.weight.grad * cell.weight_mask, rtol=1e-8, atol=1e-8)


def test_a_cache_is_of_the_weights_that_were_loaded():
    model, other = built("transformer").eval(), built("transformer").eval()
    prune.random_unstructured(*place_of(model, "layer.cell.attention.qkv.direction"), 0.4)
    prompt = torch.randint(V, (2, 4))
    model.generate(prompt, length=3)
    direction = torch.randn_like(model.layer.cell.attention.qkv.direction_orig)
    with torch.no_grad():
        model.layer.cell.attention.qkv.direction_orig.copy_(direction)
        other.layer.cell.attention.qkv.direction.copy_(direction * model.layer.cell.attention.qkv.direction_mask)
        memory = model.logits(prompt)[1]
        pairs = []
        for each, past in ((model, memory), (other, other.logits(prompt)[1])):
            with torch.no_grad():
                cached = each.cache(2, memory=past)
                pairs.append(each.logits(prompt[:, :1], cached)[0])
    assert_close(*pairs, rtol=1e-9, atol=1e-9)


def test_a_pruned_trellis_with_dropped_weights_is_trained():
    cell = TrellisConfig(width=4, hidden=3, outputs=4, std=0.3, weight_dropout=0.3).build().double()
    prune.random_unstructured(cell.state, "direction", 0.4)
    layer, x = Unrolled(cell, 6), torch.randn(2, 5, 4).double()
    step = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        step.zero_grad()
        layer(x).output.square().sum().backward()
        assert not cell.state.direction_orig.grad[cell.state.direction_mask == 0].any()
        step.step()


def halved(module, _inputs, value):
    return value / 2


ON_CALLS = {
    "forward hook": lambda matrix: matrix.register_forward_hook(halved),
    "pre-hook": lambda matrix: matrix.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,)),
    "forward": lambda matrix: setattr(matrix, "forward", lambda x, own=matrix.forward: own(x) / 2),
}
MATRICES = [
    (config, name)
    for config in (SMALL, dataclasses.replace(SMALL, weight_norm=False), MODELS["trellis"].cell)
    for name, module in config.build().named_modules()
    if isinstance(module, NormedLinear)
]


@pytest.mark.parametrize("kind", ON_CALLS)
@pytest.mark.parametrize(("config", "name"), MATRICES, ids=str)
def test_what_acts_on_the_calls_of_a_matrix_acts_in_f(config, name, kind):
    """A matrix is read and not called; a hook that halves its results halves W and b."""
    cell = config.build().double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = copy.deepcopy(cell)
    ON_CALLS[kind](cell.get_submodule(name))
    half = other.get_submodule(name)
    with torch.no_grad():
        (half.direction if half.gain is None else half.gain).div_(2)
        if half.bias is not None and kind != "pre-hook":
            half.bias.div_(2)
    x = torch.randn(2, 3, config.width).double()
    z = torch.randn_like(cell.start(cell.prepare(x)))
    assert_close(cell(z, cell.prepare(x)), other(z, other.prepare(x)), rtol=1e-12, atol=1e-12)


class Bottleneck(nn.Module):
    """W x + U relu(D W x), which is not linear."""

    def __init__(self, matrix: nn.Module, width: int) -> None:
        super().__init__()
        self.matrix, self.down, self.up = matrix, nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        y = self.matrix(x)
        return y + self.up(torch.relu(self.down(y)))


@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_linear_is_refused_in_the_place_of_a_matrix(training):
    cell, x = SMALL.build().train(training), torch.randn(2, 3, 8)
    inner = cell.inner
    cell.inner = Bottleneck(inner, 12)
    with pytest.raises(ValueError, match=r"Bottleneck.*is not linear.*such as LoRA"):
        cell.prepare(x)
    cell.inner = inner
    inner.register_forward_hook(lambda module, inputs, value: torch.tanh(9 * value))
    with pytest.raises(ValueError, match=r"NormedLinear.*or a hook on it, is not linear"):
        cell.prepare(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [0.1, 1.0, 30.0])
def test_a_clamp_is_refused_whatever_its_bound(bound, dtype):
    """The result for a sum of unit vectors may lie within the bound, and those in f beyond it."""
    cell = SMALL.build().to(dtype)
    cell.inner.register_forward_hook(lambda module, inputs, value: value.clamp(-bound, bound))
    with pytest.raises(ValueError, match=r"NormedLinear.*or a hook on it, is not linear"):
        cell.prepare(torch.randn(2, 3, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_deviation_from_a_linear_map(dtype):
    cell = TransformerConfig(width=256, heads=2, inner=512).build().to(dtype)
    for matrix in (cell.inner, cell.outer, cell.attention.qkv):
        matrix.register_forward_hook(lambda module, inputs, value: value * 1)
        with torch.no_grad():
            matrix.direction.abs_()  # sums in which all numbers have one sign are rounded most
    cell.prepare(torch.randn(1, 2, 256, dtype=dtype))


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_on_the_backward_pass_of_a_matrix_is_refused(kind):
    """Such as a library for gradients per sample registers: it would get gradients for the rows of the identity."""
    x = torch.randn(2, 3, 8)
    for place in ("inner", "attention.qkv", "attention.positions.project"):
        cell = SMALL.build()
        getattr(cell.get_submodule(place), kind)(lambda *_: None)
        with pytest.raises(ValueError, match=r"NormedLinear has a hook on its backward pass.*Give the hook to the"):
            cell.prepare(x)


def test_a_hook_on_dropped_weights_is_refused():
    cell = TrellisConfig(width=4, hidden=2, outputs=2, weight_dropout=0.3).build()
    cell.state.register_forward_hook(halved)
    with pytest.raises(ValueError, match="has a hook on its NormedLinear; train it with weight_dropout=0"):
        cell.prepare(torch.randn(1, 2, 4))


@pytest.mark.parametrize("name", ["transformer", "trellis"])
def test_weights_without_numbers_are_named(name):
    """As the libraries leave them that move a weight to the device only while its own module is called."""
    layer, x = built(name).layer, torch.randn(2, 3, MODELS[name].cell.width).double()
    layer.cell.to("meta")
    for each in (layer, Unrolled(layer.cell, 3), Stack([layer.cell])):
        with pytest.raises(ValueError, match=r"The parameter \w+.*is on the meta device.*cpu_offload"):
            each(x)
    assert Unrolled(layer.cell, 3)(x.to("meta")).output.is_meta
