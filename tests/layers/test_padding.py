"""Padding masks and pasts of keys and values: what cells accept, and what they refuse in a sentence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from equilibria import Anderson, Equilibrium, Stop
from equilibria.cells import ChainConfig, TransformerConfig, TrellisConfig
from equilibria.cells.transformer.past import KeyValues
from equilibria.layers.sequence import check_key_padding_mask

EXACT = Stop(rtol=1e-13, atol=1e-13, max_evals=200)
RELATIVE = TransformerConfig(width=8, heads=2, inner=16, memory=16, window=6)
DECAY = TransformerConfig(width=8, heads=2, inner=16, memory=16, positions="decay", longest=20, norm="pre-normalised")
ROTARY = TransformerConfig(width=8, heads=2, inner=16, memory=16, positions="rotary", window=6)
KINDS = pytest.mark.parametrize("config", [RELATIVE, DECAY, ROTARY], ids=["relative", "decay", "rotary"])


def contraction(config):
    cell = config.build().double().eval()
    with torch.no_grad():
        cell.inject.direction.mul_(300)
        cell.attention.qkv.gain.mul_(0.3)
    return cell


def layer(config):
    return Equilibrium(contraction(config), Anderson(), EXACT, on_failure="raise")


def empty(config, batch=2):
    none = torch.zeros(batch, config.heads, 0, config.width // config.heads, dtype=torch.float64)
    return KeyValues(none, none)


@KINDS
@pytest.mark.parametrize("gradients", [False, True])
def test_a_past_of_keys_and_values_is_exact(config, gradients):
    """Pieces of any length joined by keys and values have the equilibrium of the whole, beyond the window too."""
    model, x = layer(config), torch.randn(2, 12, 8, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        whole = model(x)
        memory, pieces = empty(config), []
        for piece in x.split([3, 1, 1, 4, 1, 2], dim=1):
            out = model(piece, memory)
            memory = out.memory
            pieces.append(out.z)
    assert memory.length == 12
    assert not memory.k.requires_grad
    assert_close(torch.cat(pieces, dim=1), whole.z, rtol=0, atol=1e-10)


@KINDS
def test_the_beginning_of_keys_and_values_may_be_cut_off(config):
    """As far as the window does not reach: a past may begin anywhere in its text."""
    config = dataclasses.replace(config, window=6)
    model, x = layer(config), torch.randn(2, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        memory = model(x[:, :9], empty(config)).memory
        whole = model(x[:, 9:], memory)
        cut = model(x[:, 9:], KeyValues(memory.k[:, :, 4:], memory.v[:, :, 4:]))
    assert_close(cut.z, whole.z, rtol=0, atol=1e-12)


@KINDS
def test_keys_and_values_see_no_padding(config):
    """A left-padded row continues as it does alone."""
    model, x = layer(config), torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    with torch.no_grad():
        first = model(x[:, :4], empty(config), key_padding_mask=mask)
        second = model(x[:, 4:], first.memory)
        alone = model(x[1:, 2:])
    assert_close(second.z[1:], alone.z[:, 2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "config", [RELATIVE, TrellisConfig(width=8, hidden=4, outputs=4)], ids=["transformer", "trellis"]
)
def test_padding_inside_a_text_is_refused(config):
    cell, x = config.build(), torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"padding inside the text of 1 rows"):
        cell.prepare(x, key_padding_mask=torch.tensor([[False, True, False, False], [False] * 4]))
    prepared = cell.prepare(x)
    memory = cell.remember(cell(torch.randn_like(cell.start(prepared)), prepared), prepared)
    with pytest.raises(ValueError, match=r"of 2 rows, or between a memory and the text"):
        cell.prepare(x, memory, key_padding_mask=torch.tensor([[True, False, False, False]] * 2))
    cell.prepare(x, memory, key_padding_mask=torch.tensor([[False, False, True, True], [True] * 4]))


@pytest.mark.parametrize(
    ("mask", "said"),
    [(torch.zeros(2, 3, dtype=torch.bool), r"shape \(2, 3\)"), (torch.ones(2, 4), r"dtype torch.float32")],
)
def test_masks_of_another_shape_or_dtype_are_refused(mask, said):
    with pytest.raises(ValueError, match=said):
        check_key_padding_mask(mask, torch.randn(2, 4, 8))


def test_keys_that_end_in_padding_are_not_continued():
    model, x = layer(RELATIVE), torch.randn(2, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        memory = model(x, empty(RELATIVE), key_padding_mask=mask).memory
        with pytest.raises(ValueError, match=r"1 rows have padding between the text"):
            model(x[:, :1], memory)
        wrong = KeyValues(torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8))
        with pytest.raises(ValueError, match=r"reads \[B, 2, S, 4\]"):
            model(x, wrong)


def test_a_cache_with_padding_takes_no_mask():
    for config in (RELATIVE, TrellisConfig(width=8, hidden=4, outputs=4)):
        cell = config.build().eval()
        cache, mask = cell.cache(2, padding=torch.tensor([1, 0])), torch.zeros(2, 4, dtype=torch.bool)
        with torch.no_grad(), pytest.raises(ValueError, match="leave key_padding_mask out"):
            cell.prepare(torch.randn(2, 4, 8), cache, key_padding_mask=mask)


def test_blocks_of_a_chain_see_no_padding():
    config = ChainConfig((RELATIVE, RELATIVE))
    cell = config.build().double()
    x, z = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    together = cell(z, cell.prepare(x, key_padding_mask=mask))
    assert_close(together[1:, 2:], cell(z[1:, 2:], cell.prepare(x[1:, 2:])), rtol=0, atol=1e-12)
