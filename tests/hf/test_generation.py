"""Every mode of ``generate`` gives the text of the solve of the whole text, with one slot per position and block."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache

from equilibria.hf.configuration import blocks_of
from equilibria.hf.modeling import CACHE

from .models import CELLS, VOCABULARY, small, tokens

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.5},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
FULL, FEW = ("transformer",), ("greedy", "beams")
"""The kind of cell that the quick tests try in every mode, and the modes in which they try every kind."""
WITHOUT_CACHE = ("cache_implementation", "prompt_lookup_num_tokens")


def generated(model, ids, mask=None, **options):
    torch.manual_seed(1)
    mask = torch.ones_like(ids) if mask is None else mask
    choices = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(ids, attention_mask=mask, **{**choices, **options})


def padded(kind):
    """Two texts of different lengths, and each of them alone."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    ids = tokens(2, 7).masked_fill(mask == 0, VOCABULARY)
    return ids, mask


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=[] if kind in FULL or mode in FEW else [pytest.mark.slow])
        for kind in CELLS
        for mode in MODES
    ],
)
def test_the_text_is_that_of_the_whole_solve(kind, mode):
    model, options = small(kind), MODES[mode]
    ids, mask = padded(kind)
    if mode == "prompt lookup":  # transformers has it for one text alone
        ids, mask = ids[:1], mask[:1]
    with_cache = generated(model, ids, mask, **options)
    plain = {name: value for name, value in options.items() if name not in WITHOUT_CACHE}
    without = generated(model, ids, mask, use_cache=False, **plain)
    found, wanted = with_cache.sequences, without.sequences
    if mode == "prompt lookup":  # transformers 5.0 makes a token more than it was asked for
        found = found[:, : wanted.shape[1]]
    assert torch.equal(found, wanted)
    if mode != "prompt lookup":  # its scores are per guess
        for a, b in zip(with_cache.scores, without.scores, strict=True):
            assert_close(a, b, rtol=0, atol=1e-8)
    if "beam" in mode:
        assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["transformer", "trellis"])
def test_assisted_generation(kind):
    """A worse model guesses, and the text is that of the better one."""
    model, guesser = small(kind), small("decay")
    ids = tokens(1, 6)
    found = generated(model, ids, assistant_model=guesser)
    assert torch.equal(found.sequences, generated(model, ids, use_cache=False).sequences)


@pytest.mark.parametrize("kind", CELLS)
def test_a_row_alone_is_the_row_in_the_batch(kind):
    model = small(kind)
    ids, mask = padded(kind)
    together = generated(model, ids, mask)
    for row in range(2):
        text = mask[row].bool()
        alone = generated(model, ids[row : row + 1, text])
        assert torch.equal(alone.sequences[0, text.sum() :], together.sequences[row, 7:])
        for a, b in zip(alone.scores, together.scores, strict=True):
            assert_close(a[0], b[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", CELLS)
def test_pieces_of_any_length_give_the_logits_of_the_whole(kind, cache):
    model, ids = small(kind), tokens(2, 30)
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=30)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        pieces = [model(piece, **{CACHE: past}) for piece in ids.split([9, 1, 1, 12, 1, 6], dim=1)]
    assert_close(torch.cat([piece.logits for piece in pieces], dim=1), whole.logits, rtol=0, atol=1e-8)
    assert int(past.get_seq_length()) == 30
    assert len(past.layers) == (len(blocks_of(CELLS[kind])) or 1)


def test_a_cropped_cache_continues_elsewhere():
    model, ids, other = small("chain"), tokens(1, 9), tokens(1, 3, seed=5)
    with torch.no_grad():
        past = model(ids)[CACHE]
        past.crop(-4)
        found = model(other, **{CACHE: past}).logits
        wanted = model(torch.cat([ids[:, :5], other], dim=1), use_cache=False).logits[:, 5:]
    assert_close(found, wanted, rtol=0, atol=1e-8)


def test_the_edge_is_read_as_its_token_and_never_chosen():
    model, ids = small("transformer"), tokens(1, 5)
    edge = torch.full((1, 1), model.config.edge_token_id)
    with torch.no_grad():
        found = model(torch.cat([edge, ids], dim=1), use_cache=False).logits
        wanted = model(torch.cat([torch.zeros_like(edge), ids], dim=1), use_cache=False).logits
    assert torch.equal(found, wanted)
    assert found.shape[-1] == VOCABULARY + 1
    assert (found[..., -1] == torch.finfo(torch.float64).min).all()
    assert (found.softmax(dim=-1)[..., -1] == 0).all()


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("mask", [[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
def test_a_prompt_that_ends_in_padding_is_refused(mask, new):
    """Its next token would be predicted from padding, where the state is 0."""
    model, ids = small("transformer"), tokens(2, 4)
    with pytest.raises(ValueError, match=r"padding at the end of 1 of 2 rows.*padding_side = 'left'"):
        model.generate(ids, attention_mask=torch.tensor(mask), max_new_tokens=new)
