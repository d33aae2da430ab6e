"""Small models of transformers with random weights.

With SDPA they are in float64, but for the norms of Llama and Qwen3, which compute in float32: so a solve stalls at a
relative residual of about 2e-8, and values agree to about 1e-6. ``sharp`` replaces these norms. Eager attention has its
softmax in float32 and makes NaN of padding in float64, with and without a loop, so these models are in float32.
"""

from __future__ import annotations

import copy
import functools

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from equilibria import Implicit, Stop
from equilibria.hf import equilibrium_of

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3 = {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
MAKE = {
    "llama": lambda attention: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention)),
    "qwen3": lambda attention: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, attn_implementation=attention)),
    "mixed": lambda attention: Qwen3ForCausalLM(Qwen3Config(**SIZES, **QWEN3, attn_implementation=attention)),
    "window": lambda attention: MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=5, attn_implementation=attention)
    ),
}
"""By name: Llama; Qwen3; Qwen3 with a window of 5 positions in its last two layers; Mistral with it in all of them."""
LOOPS = {"one": 1, "two": range(1, 3)}
STOPS = {"sdpa": Stop(rtol=5e-8, max_evals=200), "eager": Stop(rtol=1e-6, max_evals=200)}
CLOSE = {"sdpa": {"rtol": 1e-6, "atol": 1e-6}, "eager": {"rtol": 2e-5, "atol": 2e-5}}


@functools.cache
def _plain(kind, attention):
    torch.manual_seed(sorted(MAKE).index(kind))
    model = MAKE[kind](attention).to(torch.float64 if attention == "sdpa" else torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # the std of 0.02 is for wide models; here attention would hardly matter
        model.model.embed_tokens.weight.mul_(5)  # vectors longer than what a layer adds, as in trained models
    return model


def plain(kind="llama", attention="sdpa"):
    """The pretrained network, in evaluation mode."""
    return copy.deepcopy(_plain(kind, attention))


def sharp(model):
    """The model with norms in float64, so that solves and gradients can be compared closely."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon).double()
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model


SHARP = Stop(rtol=1e-12, max_evals=300)
SHARPLY = {"stop": SHARP, "gradient": Implicit(stop=SHARP)}
"""Settings for ``sharp`` models."""


def looped(kind="llama", layers="two", attention="sdpa", inject=0.5, **changes):
    """The same network with a loop."""
    settings = {"stop": STOPS[attention], "gradient": Implicit(stop=STOPS[attention]), "on_failure": "raise", **changes}
    return equilibrium_of(plain(kind, attention), LOOPS[layers], inject, **settings)


def tokens(*shape, seed=0):
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded():
    """Two texts of different lengths, the second after padding."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    return tokens(2, 9).masked_fill(mask == 0, 0), mask
