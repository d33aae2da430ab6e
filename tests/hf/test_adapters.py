"""Adapters and quantised weights inside a folded model: the cell reads W from whatever module stands there."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("transformers")

from equilibria.hf import EquilibriumForCausalLM
from equilibria.layers.linear import fold

from .models import CELLS, METHOD, configuration, small, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

LINEAR = {
    "transformer": ["qkv", "out", "inner", "outer", "inject"],
    "decay": ["qkv", "out", "inner", "outer", "inject"],
    "rotary": ["qkv", "out", "inner", "outer", "inject"],
    "chain": ["qkv", "out", "inner", "outer", "inject"],
    "trellis": ["state", "input"],
}


def folded(kind: str) -> EquilibriumForCausalLM:
    model = copy.deepcopy(small(kind))
    fold(model.model)
    model.config.folded = True
    return model


def logits(model, text):
    with torch.no_grad():
        return model(text).logits


def generated(model, text):
    return model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=8, do_sample=False)


def chosen(kind, name, module):
    return isinstance(module, nn.Linear) and name.split(".")[-1] in LINEAR[kind]


def adapted(kind):
    """A LoRA model in float64, and its adapters' B, which begin at zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=LINEAR[kind], task_type="CAUSAL_LM")
    model = peft.get_peft_model(folded(kind), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    return model


def moved(model, size=0.02):
    """Give every B a value, so that the adapters do something, and the cell stays a contraction."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return model


@pytest.mark.parametrize("kind", CELLS)
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(kind):
    model, text = adapted(kind), tokens(2, 7)
    assert_close(logits(model, text), logits(folded(kind), text), rtol=0, atol=1e-9)
    wanted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    assert len(wanted) == 2 * sum(chosen(kind, *named) for named in folded(kind).named_modules())
    model.train()(text, labels=text).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(grads) == wanted
    for name, grad in grads.items():
        assert bool(grad.any()) == ("lora_B" in name), name  # B is zero, so that A has no gradient yet


@pytest.mark.parametrize("kind", CELLS)
def test_the_gradients_are_those_of_the_merged_matrices(kind):
    """W = W₀ + 2 B A, so dB = 2 dW Aᵀ and dA = 2 Bᵀ dW."""
    model, text = moved(adapted(kind)), tokens(2, 7)
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    model.train()(text, labels=text).loss.backward()
    merged.train()(text, labels=text).loss.backward()
    plain = dict(merged.named_modules())
    found = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            dw = plain[name.removeprefix("base_model.model.")].weight.grad
            assert_close(b.grad, 2 * dw @ a.T, rtol=1e-6, atol=1e-8, msg=name)
            assert_close(a.grad, 2 * b.T @ dw, rtol=1e-6, atol=1e-8, msg=name)
            found += 1
    assert found >= 2


@pytest.mark.parametrize("kind", CELLS)
def test_merged_saved_and_switched_off(kind, tmp_path):
    peft = pytest.importorskip("peft")
    model, text = moved(adapted(kind)).eval(), tokens(2, 7)
    wanted, start = logits(model, text), logits(folded(kind), text)
    assert (wanted - start).abs().max() > 1e-3
    told = generated(model, text)
    with model.disable_adapter():  # no parameter changes, so nothing computed from the adapter may be left
        assert torch.equal(generated(model, text), generated(folded(kind), text))
        assert_close(logits(model, text), start, rtol=0, atol=1e-9)
    assert torch.equal(generated(model, text), told)
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    again = peft.PeftModel.from_pretrained(folded(kind), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(logits(again, text), wanted, rtol=0, atol=1e-9)
    whole = model.merge_and_unload()
    assert isinstance(whole, EquilibriumForCausalLM)
    assert all(type(m) is nn.Linear for name, m in whole.named_modules() if chosen(kind, name, m))
    assert_close(logits(whole, text), wanted, rtol=0, atol=1e-9)
    assert torch.equal(generated(whole, text), told)
    whole.save_pretrained(tmp_path / "whole")
    found = EquilibriumForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(found, text), logits(whole, text))


@pytest.mark.parametrize("kind", CELLS)
def test_dynamic_quantisation(kind):
    """int8 weights: one of 256 steps of the largest weight of a matrix, which the solve multiplies by little."""
    model, text = folded(kind).float(), tokens(2, 7)
    loose = dataclasses.replace(METHOD, stop=dataclasses.replace(METHOD.stop, rtol=1e-5))
    model.model.layer.method = loose
    wanted = logits(model, text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch moves it to another package
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        found = logits(quantised, text)
        told = generated(quantised, text)
    kinds = {type(m).__module__ for name, m in quantised.named_modules() if name.split(".")[-1] in LINEAR[kind]}
    assert kinds == {"torch.ao.nn.quantized.dynamic.modules.linear"}
    edge = model.config.edge_token_id
    assert (found[..., edge] == torch.finfo(torch.float32).min).all()
    error = (found - wanted)[..., :edge].norm() / wanted[..., :edge].norm()
    assert 0 < error < 0.02
    assert told.shape == (2, 15)


ADAPTED_TABLES = {
    "an adapter": {"target_modules": ["embedding"]},
    "some rows": {"target_modules": ["inner"], "trainable_token_indices": {"embedding": [1, 2]}},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("what", ADAPTED_TABLES)
def test_adapters_of_the_embedding_are_refused(what, tied):
    """A tied head would not see the adapter, and merged it would be √D times as large."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = EquilibriumForCausalLM(configuration("transformer", tied=tied)).double()
    fold(model.model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **ADAPTED_TABLES[what]))
    with pytest.raises(ValueError, match=r"modules_to_save=\['embedding'\]"):
        model(input_ids=tokens(2, 5))


def test_the_whole_embedding_may_be_trained_beside_an_adapter(unhooked):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["inner"], modules_to_save=["embedding"])
    model, text = peft.get_peft_model(folded("transformer"), config, autocast_adapter_dtype=False).eval(), tokens(2, 5)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = logits(model, text)
    assert (found - logits(folded("transformer"), text)).abs().max() > 1e-3
    assert torch.equal(logits(model.merge_and_unload(), text), found)
