"""Small models for transformers: one per kind of cell, each a contraction, in float64 at a tight tolerance."""

from __future__ import annotations

import functools

import torch

from equilibria import Anderson, Implicit, Method, Stop
from equilibria.cells import ChainConfig, TransformerConfig, TrellisConfig
from equilibria.hf import EquilibriumConfig, EquilibriumForCausalLM
from equilibria.lm.model import LanguageConfig

VOCABULARY = 30
EXACT = Stop(rtol=1e-12, max_evals=300)
METHOD = Method(Anderson(), EXACT, Implicit(stop=EXACT), on_failure="raise")
BLOCK = TransformerConfig(width=16, heads=2, inner=32, memory=8, window=24)
CELLS = {
    "transformer": BLOCK,
    "decay": TransformerConfig(width=16, heads=4, inner=32, memory=8, positions="decay", longest=16, window=16),
    "rotary": TransformerConfig(width=16, heads=2, inner=32, memory=8, positions="rotary", window=16),
    "chain": ChainConfig((BLOCK, TransformerConfig(width=16, heads=4, inner=32, memory=8))),
    "trellis": TrellisConfig(width=8, hidden=8, outputs=8),
}


def configuration(kind: str, *, edge: int | None = 0, **changes) -> EquilibriumConfig:
    language = LanguageConfig(CELLS[kind], **changes)
    return EquilibriumConfig.of(language, VOCABULARY, method=METHOD, edge_reads_as=edge)


def contractive(model):
    """A strong input makes fresh cells contractions, whose equilibrium is unique."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embedding.weight"):
                parameter.mul_(30)
            if name.endswith("inject.direction"):
                parameter.mul_(30)
            if name.endswith("attention.out.gain"):
                parameter.mul_(20)
            if name.endswith("attention.qkv.gain"):
                parameter.mul_(0.2)
    return model


@functools.cache
def small(kind: str) -> EquilibriumForCausalLM:
    """A model in evaluation mode; tests must not change it."""
    torch.manual_seed(sorted(CELLS).index(kind))
    return contractive(EquilibriumForCausalLM(configuration(kind)).double()).eval()


def tokens(*shape: int, seed: int = 0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
