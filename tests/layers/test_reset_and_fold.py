"""Every module can draw its parameters anew; normalised weights fold into plain matrices; modules may be replaced."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from equilibria.cells import CELLS, TransformerConfig, TrellisConfig
from equilibria.layers.linear import NormedLinear, fold
from equilibria.lm.model import AdaptiveConfig, ConvolutionalConfig, LanguageConfig, MixtureConfig, RecurrentConfig

WIDE = TransformerConfig(width=32, heads=4, inner=64, memory=8)
MODELS = {
    "softmax": LanguageConfig(WIDE),
    "untied": LanguageConfig(WIDE, tied=False),
    "mixture": LanguageConfig(WIDE, mixture=MixtureConfig(experts=3)),
    "adaptive": LanguageConfig(WIDE, adaptive=AdaptiveConfig(cutoffs=(20, 40), division=2)),
    "adaptive-untied": LanguageConfig(WIDE, tied=False, adaptive=AdaptiveConfig(cutoffs=(20, 40), division=2)),
    "decay": LanguageConfig(TransformerConfig(width=32, heads=4, inner=64, positions="decay", longest=16, affine=True)),
    "trellis": LanguageConfig(TrellisConfig(width=32, hidden=16, outputs=32)),
    "lstm": RecurrentConfig(hidden=32),
    "tcn": ConvolutionalConfig(levels=2),
}


def redrawn(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_can_be_drawn_anew(name):
    """Memory that was never written, here NaN, is gone, and each parameter has the spread of a fresh one."""
    model = MODELS[name].build(80)
    fresh = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.apply(redrawn)
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        if fresh[key].numel() > 30:
            assert_close(value.std(), fresh[key].std(), rtol=0.5, atol=1e-12, msg=key)
            assert_close(value.mean(), fresh[key].mean(), rtol=0.5, atol=0.5 * float(fresh[key].std()) + 1e-12, msg=key)


@pytest.mark.parametrize("config", [config for config in CELLS if type(config).__name__ != "AffineConfig"], ids=str)
def test_a_folded_cell_is_the_same_map(config):
    cell = config.build().double().eval()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    plain = copy.deepcopy(cell)
    fold(plain)
    assert not any(isinstance(module, NormedLinear) for module in plain.modules())
    x = torch.randn(2, 4, config.width, dtype=torch.float64)
    z = torch.randn_like(cell.start(cell.prepare(x)))
    memory = cell.remember(z, cell.prepare(x))
    assert_close(plain(z, plain.prepare(x, memory)), cell(z, cell.prepare(x, memory)), rtol=1e-13, atol=1e-13)


class LowRank(nn.Module):
    """W x + B A x, as a library of adapters puts it in the place of W."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear
        self.a = nn.Parameter(torch.randn(2, linear.in_features).to(linear.weight))
        self.b = nn.Parameter(torch.randn(linear.out_features, 2).to(linear.weight))

    def forward(self, x):
        return self.base(x) + x @ self.a.t() @ self.b.t()


@pytest.mark.parametrize(
    "config", [TransformerConfig(width=8, heads=2, inner=12), TrellisConfig(width=6, hidden=3, outputs=2)]
)
def test_an_adapter_in_the_place_of_a_matrix_takes_part(config):
    """The map and its gradients are those of the sum of both matrices."""
    cell = config.build().double()
    fold(cell)
    merged = copy.deepcopy(cell)
    for parent in list(cell.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                adapter = LowRank(child)
                setattr(parent, name, adapter)
                target = merged.get_submodule(next(key for key, m in cell.named_modules() if m is parent))
                getattr(target, name).weight.data += adapter.b.detach() @ adapter.a.detach()
    x = torch.randn(2, 4, config.width, dtype=torch.float64)
    z = torch.randn_like(cell.start(cell.prepare(x)))
    f = cell(z, cell.prepare(x))
    assert_close(f, merged(z, merged.prepare(x)), rtol=1e-12, atol=1e-12)
    f.square().sum().backward()
    merged(z, merged.prepare(x)).square().sum().backward()
    for name, module in cell.named_modules():
        if isinstance(module, LowRank):
            wanted = merged.get_submodule(name).weight.grad @ module.a.detach().t()
            assert_close(module.b.grad, wanted, rtol=1e-9, atol=1e-10)


def test_a_bias_where_there_must_be_none_is_refused():
    cell = TransformerConfig(width=8, heads=2, inner=12).build()
    cell.attention.qkv = nn.Sequential(nn.Linear(8, 24))
    with pytest.raises(ValueError, match="adds a bias"):
        cell.prepare(torch.randn(1, 2, 8))


def test_dropped_weights_of_a_folded_trellis_are_refused():
    cell = TrellisConfig(width=4, hidden=2, outputs=2, weight_dropout=0.3).build()
    fold(cell)
    with pytest.raises(ValueError, match="train it with weight_dropout=0"):
        cell.prepare(torch.randn(1, 2, 4))
    cell.eval().prepare(torch.randn(1, 2, 4))
