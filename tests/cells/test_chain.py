"""A chain whose blocks all read the final state of the past."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from equilibria import Anderson, Method, Stop
from equilibria.cells import ChainConfig, TransformerCache, TransformerConfig, TransformerMemory
from equilibria.lm.experiments import explicit
from equilibria.lm.model import Explicit, LanguageConfig, generate
from small_experiment import experiment

BLOCK = TransformerConfig(width=8, heads=2, inner=12, memory=6, norm="pre", affine=True, attention_norm=True)
OTHER = dataclasses.replace(BLOCK, heads=4, inner=16, norm="post")
LAST = ChainConfig((BLOCK, OTHER, BLOCK), memory="last")
BLOCKS = dataclasses.replace(LAST, memory="blocks")


def built(config, *, seed=0, contracting=False):
    """A cell with random parameters, the same for the same seed; with a strong input it has one equilibrium."""
    torch.manual_seed(seed)
    cell = config.build().double().eval()
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if contracting else 0.2))
            if contracting and name.endswith("inject.direction"):
                parameter.mul_(100)
            if contracting and name.endswith(("qkv.gain", "out.gain", "outer.gain", "norms.1.weight")):
                parameter.mul_(0.3)
    return cell


def test_the_first_segment_is_that_of_the_other_kind_and_the_second_is_not():
    x, z = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    last, blocks = built(LAST), built(BLOCKS)
    one, two = last.prepare(x), blocks.prepare(x)
    assert torch.equal(last(z, one), blocks(z, two))
    memory, each = last.remember(z, one), blocks.remember(z, two)
    assert isinstance(memory, TransformerMemory)
    assert torch.equal(memory.z, z[:, -6:])
    assert torch.equal(memory.u, each[0].u)
    later = torch.randn_like(x)
    first, second = last(z, last.prepare(later, memory)), blocks(z, blocks.prepare(later, each))
    assert not torch.allclose(first, second, rtol=1e-3)
    # Blocks of the other kind that are given the final state, each, are blocks of this kind.
    assert torch.equal(first, blocks(z, blocks.prepare(later, (memory,) * 3)))


@pytest.mark.slow
def test_generation_from_a_cache_is_that_from_the_memory():
    """Prompt and tokens are segments, whose past is read from slots or computed again from the final states."""
    model = LanguageConfig(LAST, std=1.0).build(11, method=Method(Anderson(), Stop(rtol=1e-12, max_evals=300)))
    model.layer.cell = built(LAST, contracting=True)
    model.double().eval()
    prompt = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
    tokens = generate(model, prompt, length=9, temperature=0, memory_length=6)
    memory, unread, found, from_memory, from_cache = None, prompt, [], [], []
    cache = model.cache(3, length=6)
    assert [type(one) for one in cache] == [TransformerCache] * 3
    with torch.no_grad():
        for _ in range(9):
            mine, memory = model.logits(unread, memory, last=True)
            theirs, cache = model.logits(unread, cache, last=True)
            from_memory.append(mine)
            from_cache.append(theirs)
            unread = mine[:, -1:].argmax(-1)
            found.append(unread)
        again, _ = model.logits(unread, model.cache(3, length=6, memory=memory), last=True)
        mine, _ = model.logits(unread, memory, last=True)
    assert torch.equal(torch.cat(found, dim=1), tokens)
    assert_close(torch.stack(from_cache), torch.stack(from_memory), rtol=0, atol=1e-8)
    assert_close(again, mine, rtol=0, atol=1e-8)
    # The same text in one segment has other logits: here the division into segments is a part of the model.
    with torch.no_grad():
        whole, _ = model.logits(torch.cat([prompt, tokens[:, :-1]], dim=1), last=True)
    assert not torch.allclose(whole, from_memory[-1], rtol=1e-3)


def test_memories_of_the_other_kind_are_refused():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    last, blocks = built(LAST), built(BLOCKS)
    one, each = (cell.remember(x, cell.prepare(x)) for cell in (last, blocks))
    for cell, wrong in ((last, each), (blocks, one)):
        for use in (lambda: cell.prepare(x, wrong), lambda: cell.cache(2, memory=wrong)):  # noqa: B023
            with pytest.raises(ValueError, match="give the memory that this chain has returned"):
                use()


def test_without_memory_nothing_is_remembered():
    cell = built(ChainConfig((dataclasses.replace(BLOCK, memory=0),) * 2, memory="last"))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert cell.remember(x, cell.prepare(x)) is None


def test_layers_that_remember_their_own_inputs_are_refused_and_untied_ones_have_blocks_that_do():
    with pytest.raises(ValueError, match="give one kind of memory"):
        Explicit(depth=2, memory="layers").build(LAST)
    value = experiment()
    value = dataclasses.replace(value, model=dataclasses.replace(value.model, cell=LAST))
    assert explicit(value, 2, tied=False).model.cell.memory == "blocks"
    assert explicit(value, 2).model.cell.memory == "last"
