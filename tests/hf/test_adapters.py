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
from equilibria.layers.matrices import weights_of

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


def prompted(model, kind="PromptTuningConfig"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = model.config
    sizes = {"token_dim": config.hidden_size, "num_attention_heads": config.num_attention_heads}
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes)
    return peft.get_peft_model(model, settings, autocast_adapter_dtype=False).double()


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # peft leaves them out
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_learned_prompts_are_vectors_before_the_text(kind, tmp_path):
    peft = pytest.importorskip("peft")
    base, text = copy.deepcopy(small("transformer")), tokens(2, 7)
    model = prompted(base, kind)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("prompt_encoder")
    }
    loss = model.train()(input_ids=text, labels=text, attention_mask=torch.ones_like(text)).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.prompt_encoder.parameters())
    with torch.no_grad():
        vectors = torch.cat([model.eval().get_prompt(2), base.get_input_embeddings()(text)], dim=1)
        wanted = base(inputs_embeds=vectors, labels=torch.cat([torch.full((2, 4), -100), text], dim=1))
        found = model(input_ids=text, labels=text)
    assert_close(found.logits, wanted.logits, rtol=0, atol=1e-12)
    assert_close(loss.detach(), wanted.loss, rtol=0, atol=1e-9)
    told = model.generate(input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=5, do_sample=False)
    greedy = text
    with torch.no_grad():
        for _ in range(5):
            greedy = torch.cat([greedy, model(input_ids=greedy).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(told, greedy)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(small("transformer")), tmp_path).double().eval()
    assert_close(logits(again, text), found.logits, rtol=0, atol=1e-6)  # peft stores the prompt in float32


def test_a_learned_prefix_of_the_cache_is_refused():
    """It would be a cache with a gradient."""
    text = tokens(2, 7)
    with pytest.raises(ValueError, match="a cache has no gradient"):
        prompted(copy.deepcopy(small("transformer")), "PrefixTuningConfig").train()(input_ids=text, labels=text)


def test_the_embedding_is_found_by_the_name_that_peft_asks_for():
    """Otherwise peft guesses: a parameter with as many rows as ids, and the edge has no row."""
    model = small("transformer")
    assert model.get_submodule("embeddings.word_embeddings") is model.get_input_embeddings()
    assert model.get_submodule("model.embedding") is model.get_input_embeddings()
    with pytest.raises(AttributeError):
        model.get_submodule("embeddings")


def test_the_dropout_of_an_adapter_drops_whole_inputs():
    """One matrix per forward pass: the map has a fixed point, and the same inputs are dropped for all tokens."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.5, target_modules=["inner"])
    model = moved(peft.get_peft_model(folded("transformer"), settings, autocast_adapter_dtype=False).double(), size=0.5)
    (module,) = (m for name, m in model.named_modules() if name.endswith("cell.inner"))
    plain = module.base_layer.weight
    whole = weights_of(module.eval(), inputs=16, like=plain).weight - plain
    dropped = weights_of(module.train(), inputs=16, like=plain).weight - plain
    kept = dropped.abs().amax(dim=0) > 0
    assert 0 < int(kept.sum()) < 16
    assert_close(dropped[:, kept], 2 * whole[:, kept], rtol=0, atol=1e-12)
    text = tokens(2, 7)
    assert bool(model.train()(text).converged.all())
