"""``torch.export`` and ONNX: explicit networks are exported, equilibria are refused in a sentence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from equilibria import Equilibrium, Unrolled, fixed_point
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.cells.transformer import fused
from equilibria.lm.model import Explicit, LanguageConfig

pytestmark = [
    pytest.mark.usefixtures("unhooked"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace"),  # a FutureWarning from torch 2.14 on
]

CELLS = {
    "exact": TransformerConfig(width=8, heads=2, inner=12, memory=6),
    "fused": TransformerConfig(width=8, heads=2, inner=12, memory=6, attention="fused"),
    "trellis": TrellisConfig(width=8, hidden=8, outputs=8),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.inject = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.recurrent(z) + self.inject(x))


class OneTensor(nn.Module):
    """A layer as a module that returns a tensor."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).output


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.logits(tokens)[0]


def unrolled_equilibrium() -> tuple[Equilibrium, OneTensor]:
    layer = Equilibrium(Block()).eval()
    return layer, OneTensor(Unrolled(layer.cell, depth=30)).eval()


def test_an_equilibrium_unrolled_to_a_fixed_depth_is_exported():
    layer, network = unrolled_equilibrium()
    x = torch.randn(4, 5)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for batch in (4, 7):
        x = torch.randn(batch, 5)
        assert torch.equal(exported(x), network(x))
        torch.testing.assert_close(exported(x), layer(x).output, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "memory"), [("exact", "last"), ("fused", "layers"), ("trellis", "last")])
def test_language_models_of_fixed_depth_are_exported(cell, memory, monkeypatch):
    monkeypatch.setattr(fused, "NUMBERS", 1)  # a traced program does not divide its batch, however large
    model = Logits(LanguageConfig(cell=CELLS[cell], explicit=Explicit(depth=3, memory=memory)).build(11)).eval()
    tokens = torch.randint(0, 11, (3, 7))
    exported = torch.export.export(model, (tokens,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    for batch in (3, 5):
        tokens = torch.randint(0, 11, (batch, 7))
        torch.testing.assert_close(exported(tokens), model(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_language_model_is_unrolled_in_place():
    model = LanguageConfig(cell=CELLS["exact"]).build(11).eval()
    model.layer = Unrolled(model.layer.cell, depth=5)
    network, tokens = Logits(model).eval(), torch.randint(0, 11, (3, 7))
    torch.testing.assert_close(torch.export.export(network, (tokens,)).module()(tokens), network(tokens))


class ByFunction(nn.Module):
    def forward(self, x):
        return fixed_point(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros_like(x)).z


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")  # from PyTorch 2.14 on
@pytest.mark.parametrize("network", [OneTensor(Equilibrium(Block())), ByFunction()], ids=["layer", "function"])
def test_an_equilibrium_is_refused_with_what_to_do_instead(network):
    x = torch.randn(4, 5)
    advice = r"cannot be exported or traced, .* unroll .* to a fixed depth, Unrolled\(layer\.cell, depth=30\)"
    with pytest.raises(RuntimeError, match=advice):
        torch.export.export(network, (x,))
    with pytest.raises(RuntimeError, match="cannot be exported or traced"):
        torch.jit.trace(network, (x,))
    with pytest.raises(Exception, match=r"unroll .* to a fixed depth"):
        torch.export.export(network, (x,), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer", "language"])
def test_onnx(kind, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    if kind == "layer":
        network, x = unrolled_equilibrium()[1], torch.randn(4, 5)
    else:
        config = LanguageConfig(cell=CELLS["exact"], explicit=Explicit(depth=3))
        network, x = Logits(config.build(11)).eval(), torch.randint(0, 11, (3, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_refuses_an_equilibrium():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match="unroll the equilibrium to a fixed depth"):
            torch.onnx.export(OneTensor(Equilibrium(Block())), (torch.randn(4, 5),), dynamo=True, verbose=False)
