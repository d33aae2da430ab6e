"""Decoder layers of transformers as an equilibrium: the pretrained network at a = 0, caches, gradients, refusals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from equilibria import Anderson, Broyden, Implicit, Picard, Stop, Unroll
from equilibria.hf import equilibrium_of
from slow_cases import all_but, some_slow

from .pretrained import CLOSE, LOOPS, MAKE, SHARP, SHARPLY, looped, padded, plain, sharp, tokens

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ATTENTION = ("sdpa", "eager")
QUICK = {("llama", "sdpa"), ("mixed", "eager")}
"""The models that the quick tests try; "mixed" has a layer without and a layer with a window in its loop."""
MODELS = pytest.mark.parametrize(
    ("kind", "attention"),
    [
        pytest.param(kind, attention, marks=[] if (kind, attention) in QUICK else [pytest.mark.slow])
        for kind in MAKE
        for attention in ATTENTION
    ],
)


@pytest.mark.parametrize("layers", LOOPS)
@MODELS
def test_a_share_of_zero_is_the_pretrained_network_to_the_bit(kind, layers, attention):
    ids, mask = padded()
    before, after = plain(kind, attention), looped(kind, layers, attention, inject=0)
    text = mask.bool()
    for use_cache in (False, True):
        found = after(ids, attention_mask=mask, use_cache=use_cache).logits
        assert torch.equal(found[text], before(ids, attention_mask=mask, use_cache=use_cache).logits[text])
    found, wanted = (m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (after, before))
    assert torch.equal(found, wanted)


@MODELS
def test_the_state_is_a_fixed_point_of_the_layers(kind, attention):
    """x, z* and f(z*) are read from three plain networks that get their hidden states by a hook."""
    ids = tokens(2, 8)
    with torch.no_grad():
        model = looped(kind, attention=attention)
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        x, z = states[1], states[3]
        other = plain(kind, attention)
        other.model.layers[1].register_forward_pre_hook(lambda module, args: (0.5 * x + 0.5 * z, *args[1:]))
        value = other(ids, output_hidden_states=True, use_cache=False).hidden_states[3]
        first = plain(kind, attention)(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert_close(value, z, **CLOSE[attention])
    assert torch.equal(x, first[1])
    assert (z - first[3]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "mixed"])
def test_with_norms_in_float64_pieces_agree_closely(kind):
    model, ids = sharp(looped(kind, **SHARPLY)), tokens(2, 16)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = [model(piece, **{CACHE: cache}).logits for piece in ids.split([4, 1, 1, 7, 1, 2], dim=1)]
        assert_close(torch.cat(found, dim=1), model(ids, use_cache=False).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("past", ["dynamic", *some_slow("without configuration"), "static"])
@pytest.mark.parametrize("layers", LOOPS)
@MODELS
def test_pieces_with_a_cache_give_the_logits_of_the_whole(kind, layers, attention, past):
    model, ids = looped(kind, layers, attention), tokens(2, 16)
    if past == "without configuration" and kind in ("mixed", "window"):
        pytest.skip("transformers itself needs the configuration for layers with a window")
    caches = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "without configuration": DynamicCache,
        "static": lambda: StaticCache(model.config, max_cache_len=20),
    }
    cache, done, found = caches[past](), 0, []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for piece in ids.split([4, 1, 1, 7, 1, 2], dim=1):
            found.append(model(piece, **{CACHE: cache}).logits)
            done += piece.shape[1]
            assert int(cache.get_seq_length()) == done
    assert_close(torch.cat(found, dim=1), whole, **CLOSE[attention])
    assert len(cache.layers) == model.config.num_hidden_layers == 4


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 4},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 39},  # 5.0 needs the latter
}


def generated(model, ids, mask=None, **options):
    torch.manual_seed(1)
    mask = torch.ones_like(ids) if mask is None else mask
    choices = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(ids, attention_mask=mask, **{**choices, **options})


@pytest.mark.parametrize("mode", all_but(("greedy", "beams", "static cache"), MODES))
@pytest.mark.parametrize("kind", ["llama", pytest.param("mixed", marks=pytest.mark.slow)])
def test_generation_with_a_cache_is_generation_without(kind, mode):
    model, options = looped(kind), MODES[mode]
    ids, mask = padded()
    if mode == "prompt lookup":  # transformers has it for one text alone
        ids, mask = ids[:1], mask[:1]
    plain_options = {name: value for name, value in options.items() if "cache" not in name and "lookup" not in name}
    found = generated(model, ids, mask, **options)
    wanted = generated(model, ids, mask, use_cache=False, **plain_options)
    # With prompt lookup transformers 5.0 makes a token more than it was asked for.
    count = wanted.sequences.shape[1] if mode == "prompt lookup" else found.sequences.shape[1]
    assert torch.equal(found.sequences[:, :count], wanted.sequences)
    assert len(set(found.sequences[0, 9:].tolist())) > 1
    if mode == "beams":
        assert_close(found.sequences_scores, wanted.sequences_scores, **CLOSE["sdpa"])
    if mode != "prompt lookup":  # its scores are per guess
        for a, b in zip(found.scores, wanted.scores, strict=True):
            assert_close(a, b, **CLOSE["sdpa"])


@MODELS
def test_a_row_alone_is_the_row_in_the_batch(kind, attention):
    model = looped(kind, attention=attention)
    ids, mask = padded()
    together = generated(model, ids, mask)
    alone = generated(model, ids[1:, 3:])
    assert torch.equal(alone.sequences[0, 6:], together.sequences[1, 9:])
    for a, b in zip(alone.scores, together.scores, strict=True):
        assert_close(a[0], b[1], **CLOSE[attention])


@pytest.mark.parametrize("attention", ATTENTION)
def test_padding_adds_nothing_to_the_residual(attention):
    seen = []
    model = looped(attention=attention, watch=seen.append)
    ids, mask = padded()
    with torch.no_grad():
        model(ids, attention_mask=mask)
        model(ids[1:, 3:])
    both, alone = (out.solution for out in seen)
    assert (both.z[1, :3] == 0).all()
    assert_close(both.trace[:, 1][: len(alone.trace)], alone.trace[:, 0], rtol=1e-2, atol=1e-8)


def gradients(model, ids, mask=None):
    """The gradients of the mean loss, padding not scored, by name."""
    mask = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # scored from a padded position
    model.zero_grad()
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, wanted, error):
    assert found.keys() == wanted.keys()
    size = max(value.norm() for value in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= error * max(value.norm(), 1e-2 * size), name


LONG = {"solver": Picard(), "stop": Stop(rtol=0, max_evals=100, best=False), "gradient": Unroll()}


@pytest.mark.parametrize("layers", LOOPS)
@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "mixed"))]
)
def test_the_implicit_gradient_is_that_of_a_long_loop(kind, layers):
    ids, mask = padded()
    found = gradients(sharp(looped(kind, layers, **SHARPLY)).train(), ids, mask)
    assert_equal_gradients(found, gradients(sharp(looped(kind, layers, **LONG)).train(), ids, mask), 1e-9)
    once = gradients(sharp(plain(kind)).train(), ids, mask)
    name = "model.layers.1.mlp.up_proj.weight"
    assert (found[name] - once[name]).norm() > 0.1 * once[name].norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_with_norms_in_float32_the_gradients_agree_to_their_rounding(kind):
    ids, mask, seen = *padded(), []
    # Jᵀu rounds otherwise for another scale of u, which the check of the last evaluation reports.
    model = looped(kind, on_failure="ignore", watch=seen.append).train()
    found = gradients(model, ids, mask)
    assert seen[0].solution.converged.all()
    assert seen[0].solution.adjoint[0].converged.all()
    assert_equal_gradients(found, gradients(looped(kind, **LONG).train(), ids, mask), 1e-6)


def test_the_gradient_of_a_share_of_zero_is_that_of_the_pretrained_network():
    ids = tokens(2, 8)
    assert_equal_gradients(gradients(looped(inject=0).train(), ids), gradients(plain().train(), ids), 1e-12)


def test_the_gradient_with_padding_is_that_of_the_rows_alone():
    ids, mask = padded()
    model = sharp(looped(**SHARPLY)).train()
    together = gradients(model, ids, mask)
    first, second = gradients(model, ids[:1]), gradients(model, ids[1:, 3:])
    mean = {name: (8 * first[name] + 5 * second[name]) / 13 for name in first}
    assert_equal_gradients(together, mean, 3e-7)  # the loss and the angles of positions are in float32


def test_the_gradient_passes_through_the_cache():
    ids, model = tokens(2, 9), sharp(looped(**SHARPLY)).train()
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], **{CACHE: cache})
    model(ids[:, 5:], **{CACHE: cache}).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, use_cache=False).logits[:, 5:].square().sum().backward()
    assert_equal_gradients(found, {name: p.grad for name, p in model.named_parameters()}, 1e-9)


class LowRank(torch.nn.Module):
    """W x + B A x, of which only A and B are trained."""

    def __init__(self, linear):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = (2, linear.in_features), (linear.out_features, 2)
        a, b = (torch.randn(shape, generator=generator).to(linear.weight) / 4 for shape in shapes)
        self.linear = linear.requires_grad_(False)
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return self.linear(x) + x @ self.a.T @ self.b.T


def test_low_rank_adapters_inside_the_loop():
    ids, found = tokens(2, 8), []
    for model in (sharp(looped(**SHARPLY)), sharp(looped(**LONG))):
        model.requires_grad_(False)
        for layer in model.model.layers[1:3]:
            layer.self_attn.q_proj, layer.mlp.down_proj = LowRank(layer.self_attn.q_proj), LowRank(layer.mlp.down_proj)
        found.append(gradients(model.train(), ids))
    assert len(found[0]) == 8
    assert_equal_gradients(*found, 1e-9)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_lora_of_peft_inside_the_loop():
    peft = pytest.importorskip("peft")
    ids, found = tokens(2, 8), []
    for model in (sharp(looped(**SHARPLY)), sharp(looped(**LONG))):
        torch.manual_seed(0)
        choices = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 2}
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **choices))
        found.append(gradients(adapted.train(), ids))
    assert_equal_gradients(*found, 1e-9)


def test_save_and_load(tmp_path):
    ids, before = tokens(2, 6), list(plain().state_dict())
    model = looped(solver=Broyden(), inject=0.4, eval_stop=Stop(rtol=1e-6, max_evals=100))
    assert list(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        explicit = loaded(ids).logits
        assert torch.equal(explicit, plain()(ids).logits)
        again = equilibrium_of(loaded)(ids).logits
        assert torch.equal(again, model(ids).logits)
    assert not torch.equal(again, explicit)


def mix(z, x):
    return torch.lerp(x, z, 0.4)


def test_functions_are_given_again_after_loading(tmp_path):
    looped(inject=mix, norm=torch.nn.RMSNorm(16, elementwise_affine=False)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot hold the functions in inject and norm"):
        equilibrium_of(loaded)
    ids, norm = tokens(1, 5), torch.nn.RMSNorm(16, elementwise_affine=False)
    model = equilibrium_of(loaded, inject=mix, norm=norm)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, looped(inject=0.4, norm=norm)(ids).logits)


def test_a_second_call_changes_settings_and_keeps_the_others():
    seen = []
    model = looped(inject=0.3, watch=seen.append)
    assert equilibrium_of(model, inject=0.5) is model
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, looped(inject=0.5)(ids).logits)
    assert len(seen) == 1
    with pytest.raises(ValueError, match="a loop already"):
        equilibrium_of(model, layers=1)


def test_copies_and_pickles_are_independent():
    ids, model = tokens(1, 5), looped()
    other, stored = copy.deepcopy(model), io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    third = torch.load(stored, weights_only=False)
    with torch.no_grad():
        wanted = model(ids).logits
        model.model.layers[1].mlp.up_proj.weight.zero_()
        assert not torch.equal(model(ids).logits, wanted)
        assert torch.equal(other(ids).logits, wanted)
        assert torch.equal(third(ids).logits, wanted)


def test_watch_sees_the_solve_and_a_map_that_stays_what_it_was():
    """Also after its positions were added to the cache."""
    seen = []
    model, ids = looped(watch=seen.append), tokens(2, 7)
    with torch.no_grad():
        cache = model(ids)[CACHE]
        model(tokens(2, 3, seed=1), **{CACHE: cache})
        for out in seen:
            assert out.solution.converged.all()
            assert_close(out.f(out.z), out.z, **CLOSE["sdpa"])
    assert [out.z.shape[1] for out in seen] == [7, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_default_tolerances_are_reached(dtype):
    seen = []
    model = equilibrium_of(plain().to(dtype), layers=range(1, 3), on_failure="raise", watch=seen.append)
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    assert seen[0].solution.evals < 40
    assert seen[0].solution.adjoint[0].converged.all()


def test_dropout_in_training_is_refused():
    model, ids = looped(), tokens(1, 4)
    model.model.layers[2].self_attn.attention_dropout = 0.1
    with torch.no_grad():
        model(ids)
        model.train()
        with pytest.raises(ValueError, match=r"self_attn of layer 2 has attention_dropout=0\.1"):
            model(ids)
        model.model.layers[2].eval()
        model(ids)
        model.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.2))
        with pytest.raises(ValueError, match=r"mlp\.act_fn\.1 of layer 1 has p=0\.2"):
            model(ids)


def test_what_has_no_meaning_in_a_solve_is_refused():
    model, ids = looped(attention="eager"), tokens(1, 4)
    with pytest.raises(ValueError, match="output_attentions=True would collect"):
        model(ids, output_attentions=True)
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    with pytest.raises(ValueError, match="gradient checkpointing is on for layer 1"):
        model.train()(ids, labels=ids)
    for layer in model.model.layers[1:3]:
        layer.gradient_checkpointing = False
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("share", [1, 1.0, -0.1, 1.5])
def test_a_share_that_leaves_the_text_out_is_refused(share):
    with pytest.raises(ValueError, match="does not depend on the text"):
        equilibrium_of(plain(), 1, share)


REFUSED = {
    "a loop without injection": ((1, lambda z, x: z), {}, "would not depend on the text"),
    "a sum over positions": ((1, lambda z, x: (x + z).sum(1)), {}, "inject returned"),
    "a norm with parameters": ((1,), {"norm": torch.nn.RMSNorm(16)}, "norm is a RMSNorm with parameters"),
    "a gap": (([0, 2],), {}, "several in a row, from 0 to 3"),
    "too many": ((range(2, 5),), {}, "several in a row, from 0 to 3"),
    "none": (([],), {}, "several in a row, from 0 to 3"),
    "from the end": ((-1,), {}, "several in a row, from 0 to 3"),
    "no layers": ((), {}, "this model has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_equilibrium_are_refused(case):
    args, named, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        equilibrium_of(plain(), *args, **named)


def test_a_module_without_decoder_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(TypeError, match="got a GPT2LMHeadModel"):
        equilibrium_of(model, 1)


def test_hidden_states_changed_between_layers_are_refused():
    model = looped()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="changes the hidden states between the layers 1 and 2"):
        model(tokens(1, 4))


def test_a_cache_of_another_kind_is_refused():
    model = looped()

    class Other(type(DynamicCache(config=model.config).layers[0])):
        pass

    cache = DynamicCache(config=model.config)
    cache.layers = [Other() for _ in cache.layers]
    with torch.no_grad(), pytest.raises(ValueError, match="layer 1 of the cache is a Other"):
        model(tokens(1, 4), **{CACHE: cache})


def test_settings_reach_the_solve():
    model = looped(solver=Anderson(window=2), eval_stop=Stop(rtol=1e-2), gradient=Implicit(stop=SHARP))
    text = model.config.equilibrium_loop
    assert (text["method"]["solver"]["window"], text["eval_stop"]["rtol"]) == (2, 1e-2)
    seen = []
    equilibrium_of(model, watch=seen.append)
    with torch.no_grad():
        for training in (True, False):
            model.train(training)(tokens(1, 5))
    assert seen[0].solution.residual.max() <= 5e-8 < 1e-4 < seen[1].solution.residual.max()
