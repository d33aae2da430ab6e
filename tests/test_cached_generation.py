"""Generation from a cache is solving the whole text again for every token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from equilibria import Anderson, Implicit, Method, NewtonKrylov, Stop
from equilibria.cells import ChainConfig, TransformerCell, TransformerConfig, TrellisCache, TrellisCell, TrellisConfig
from equilibria.cells.transformer.positions import RelativePositions
from equilibria.language import Explicit, LanguageConfig, generate, stream
from equilibria.stability import spectral_radius

V = 13
TIGHT = Stop(rtol=1e-13, atol=1e-13, max_evals=100)
SMALL = TransformerConfig(width=16, heads=2, inner=24, memory=64)
CELLS = {
    "relative": SMALL,
    "decay": dataclasses.replace(SMALL, positions="decay", longest=80),
    "pre-normalised": dataclasses.replace(SMALL, norm="pre-normalised", affine=True),
    "window": dataclasses.replace(SMALL, window=6),
    "chain": ChainConfig(cells=(SMALL, dataclasses.replace(SMALL, heads=4, positions="decay", longest=80))),
    "trellis": TrellisConfig(width=10, hidden=8, outputs=10),
    "trellis, scan": TrellisConfig(width=10, hidden=8, outputs=10, recurrence="scan"),
    "trellis, input not carried": TrellisConfig(width=10, hidden=8, outputs=10, carry_input=False),
}
RAGGED = (1, 7, 3, 12, 5, 12, 2, 9)


def built(cell=SMALL, *, stop=TIGHT, dtype=torch.float64, solver=None, **options):
    """A model whose equilibria are solved to the last digit, with logits far from equal."""
    config = LanguageConfig(cell=cell, dropout=0.2, std=1.0, **options)
    model = config.build(V, method=Method(solver or Anderson(), stop, Implicit()) if config.solves else None)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TransformerCell):
                make_contraction(module)
            if isinstance(module, TrellisCell):
                module.state.gain.copy_(0.7 + 0.3 * torch.rand_like(module.state.gain))
                module.input.gain.mul_(3)
    return model.to(dtype).eval()


def make_contraction(cell):
    """A strong input to the values and little of z, so that there is one equilibrium; attention stays soft."""
    width = cell.config.width
    cell.attention.u.normal_(std=0.3)
    cell.attention.qkv.gain.mul_(0.3)
    if isinstance(cell.attention.positions, RelativePositions):
        cell.attention.positions.v.normal_(std=1.0)
    if cell.inject is not None:
        cell.inject.direction[: 2 * width].mul_(5)
        cell.inject.direction[2 * width :].mul_(300)


def ragged(lengths=RAGGED):
    return [torch.randint(V, (length,)) for length in lengths]


def solved_again(model, row, length):
    """Greedy tokens and logits, the whole text solved again for each."""
    text, found = row[None], []
    with torch.no_grad():
        for _ in range(length):
            logits, _ = model.logits(text)
            found.append(logits[0, -1])
            text = torch.cat([text, found[-1].argmax()[None, None]], dim=1)
    return text[0, len(row) :], torch.stack(found)


def cached(model, rows, length, **choices):
    """Greedy tokens and logits, position by position."""
    found, read = [], model.logits

    def listening(tokens, memory=None, **choices):
        logits, memory = read(tokens, memory, **choices)
        found.append(logits[:, -1])
        return logits, memory

    model.logits = listening
    tokens = generate(model, rows, length=length, temperature=0, **choices)
    return tokens, torch.stack(found[-length:], dim=1)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("lengths", [(5,), RAGGED], ids=["one", "eight"])
def test_logits_are_those_of_the_whole_text(name, lengths):
    model, rows = built(CELLS[name]), ragged(lengths)
    tokens, logits = cached(model, rows, 12)
    for row, mine, seen in zip(rows, tokens, logits, strict=True):
        expected, whole = solved_again(model, row, 12)
        assert torch.equal(mine, expected)
        torch.testing.assert_close(seen, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("segment", [1, 4])
def test_the_prompt_in_pieces(segment):
    model, rows = built(), ragged()
    whole, logits = cached(model, rows, 4)
    pieces, others = cached(built_like(model), rows, 4, segment=segment)
    assert torch.equal(whole, pieces)
    torch.testing.assert_close(logits, others, rtol=0, atol=1e-8)


def built_like(model):
    twin = built(model.layer.cell.config, stop=model.layer.method.stop)
    twin.load_state_dict(model.state_dict())
    return twin


def test_256_tokens_in_float32():
    cell = dataclasses.replace(SMALL, memory=300)
    model = built(cell, stop=Stop(rtol=1e-6, atol=1e-6, max_evals=60), dtype=torch.float32)
    (row,) = ragged((9,))
    tokens = generate(model, [row], length=256, temperature=0)[0]
    with torch.no_grad():  # all prefixes at once: position t of the whole text is the end of prefix t
        logits, _ = model.logits(torch.cat([row, tokens])[None])
    assert torch.equal(tokens, logits[0, len(row) - 1 : -1].argmax(-1))
    assert len(tokens.unique()) > 3
    for step in (0, 100, 255):
        prefix = torch.cat([row, tokens[:step]])
        assert solved_again(model, prefix, 1)[0] == tokens[step]


def test_256_tokens_in_float32_of_a_ragged_batch():
    cell = dataclasses.replace(SMALL, memory=300)
    model = built(cell, stop=Stop(rtol=1e-6, atol=1e-6, max_evals=60), dtype=torch.float32)
    rows = ragged()
    tokens = generate(model, rows, length=256, temperature=0)
    for row, mine in zip(rows, tokens, strict=True):
        with torch.no_grad():
            logits, _ = model.logits(torch.cat([row, mine])[None])
        assert torch.equal(mine, logits[0, len(row) - 1 : -1].argmax(-1))


@pytest.mark.parametrize("memory", [0, 1, 5])
def test_a_memory_that_slides(memory):
    """The cache forgets at the same place as the memory of training, and its slots are used again."""
    model = built(dataclasses.replace(SMALL, memory=memory))
    start = torch.randint(V, (3, 4))
    _, logits = cached(model, start, 40)
    del model.logits
    tokens, expected, past = start, [], None
    with torch.no_grad():
        for _ in range(40):
            seen, past = model.logits(tokens, past)
            expected.append(seen[:, -1])
            tokens = seen[:, -1:].argmax(-1)
    torch.testing.assert_close(logits, torch.stack(expected, dim=1), rtol=0, atol=1e-8)


def test_a_longer_memory_at_test_time():
    model, rows = built(dataclasses.replace(SMALL, memory=2)), ragged((8,))
    tokens, logits = cached(model, rows, 6, memory_length=40)
    expected, whole = solved_again(built_like(model), rows[0], 6)
    assert torch.equal(tokens[0], expected)
    torch.testing.assert_close(logits[0], whole, rtol=0, atol=1e-8)


def test_after_a_memory():
    model, start = built(), torch.randint(V, (2, 9))
    whole = generate(model, start, length=5, temperature=0)
    with torch.no_grad():
        _, memory = model.logits(start[:, :6])
    assert torch.equal(generate(model, start[:, 6:], length=5, temperature=0, memory=memory), whole)
    with pytest.raises(ValueError, match="one length, or no memory"):
        generate(model, ragged((2, 3)), length=1, memory=memory)


def test_each_token_is_a_solve_of_one_position():
    model, seen = built(), []
    model.layer.cell.register_forward_hook(lambda _, given, z: seen.append(z.shape[1]))
    tokens = stream(model, torch.randint(V, (2, 9)), temperature=0)
    next(tokens)
    assert set(seen) == {9}
    seen.clear()
    next(tokens)
    assert set(seen) == {1}


def test_a_start_at_the_last_state_saves_evaluations_where_tokens_repeat():
    evals = {}
    for warm in (False, True):
        torch.manual_seed(0)
        model = built(stop=Stop(rtol=1e-6, atol=0, max_evals=100))
        memory, total = model.cache(1, warm=warm), 0
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long), memory)
            for token in (3, 3, 4, 4, 4):
                token = torch.tensor([[token]])
                out = model(token, token, memory)
                memory, total = out.memory, total + out.solution.evals
        evals[warm] = total
    assert evals[True] < evals[False]


@pytest.mark.parametrize("tied", [True, False])
def test_explicit_networks(tied):
    """Layers that remember their own inputs are exact too."""
    explicit = Explicit(depth=3, tied=tied, memory="layers")
    cell = SMALL if tied else dataclasses.replace(SMALL, injection=False, affine=True)
    model, rows = built(cell, explicit=explicit), ragged()
    tokens, logits = cached(model, rows, 8)
    for row, mine, seen in zip(rows, tokens, logits, strict=True):
        expected, whole = solved_again(model, row, 8)
        assert torch.equal(mine, expected)
        torch.testing.assert_close(seen, whole, rtol=0, atol=1e-8)


def test_a_solver_with_jacobian_vector_products():
    model, row = built(solver=NewtonKrylov()), ragged((5,))
    expected, whole = solved_again(model, row[0], 4)
    tokens, logits = cached(model, row, 4)
    assert torch.equal(tokens[0], expected)
    torch.testing.assert_close(logits[0], whole, rtol=0, atol=1e-8)


class TestStop:
    def test_rows_end_one_by_one(self):
        model, rows = built(), ragged()
        free = generate(model, rows, length=30, temperature=0)
        stop = int(free[0, 4])
        tokens = generate(model, rows, length=30, temperature=0, stop=stop)
        for mine, before in zip(tokens, free, strict=True):
            place = int((before == stop).int().argmax()) if (before == stop).any() else len(before)
            assert torch.equal(mine[: place + 1], before[: min(place + 1, tokens.shape[1])])
            assert (mine[place:] == stop).all()

    def test_the_stream_ends_when_all_have(self):
        model, row = built(), ragged((5,))
        free = generate(model, row, length=6, temperature=0)
        stop = int(free[0, 2])
        first = int((free[0] == stop).int().argmax())
        assert len(list(stream(model, row, temperature=0, stop=stop))) == first + 1

    def test_refused(self):
        with pytest.raises(ValueError, match=r"stop=13.*0 … 12"):
            stream(built(), torch.zeros(1, 2, dtype=torch.long), stop=V)


class TestPadding:
    @pytest.mark.parametrize("segment", [None, 4])
    def test_a_row_is_the_same_alone(self, segment):
        """At a loose tolerance too: the solve of a short row is not disturbed by the places before it."""
        model, rows = built(stop=Stop(rtol=1e-2, max_evals=40)), ragged()
        together, logits = cached(model, rows, 6, segment=segment)
        for row, mine, seen in zip(rows, together, logits, strict=True):
            tokens, alone = cached(built_like(model), [row], 6, segment=segment)
            assert torch.equal(tokens[0], mine)
            torch.testing.assert_close(alone[0], seen, rtol=0, atol=1e-9)

    def test_f_is_zero_before_the_text(self):
        model = built()
        cell, x = model.layer.cell, torch.randn(2, 5, 16, dtype=torch.float64)
        with torch.no_grad():
            prepared = cell.prepare(x, cell.cache(2, padding=torch.tensor([0, 3])))
            f = cell(torch.randn_like(x), prepared)
        assert (f[1, :3] == 0).all()
        assert (f[0] != 0).all()
        assert (f[1, 3:] != 0).all()


def test_what_is_remembered_matters():
    """The cached states, the positions and the place of the newest: each changes the logits by far more than 1e-8."""
    for name in CELLS:
        model, text = built(CELLS[name]), torch.randint(V, (2, 12))
        with torch.no_grad():
            logits, memory = model.logits(text, model.cache(2))
            token = logits[:, -1:].argmax(-1)
            expected, _ = model.logits(token, memory)
            for block in memory if isinstance(memory, tuple) else (memory,):
                kept = block.memory.z if isinstance(block, TrellisCache) else block.past.slots
                kept.copy_(kept.roll(1, dims=-2 if kept.ndim == 5 else 0))  # a state is where its neighbour was
            changed, _ = model.logits(token, memory)
        assert float((changed - expected).abs().max()) > 1e-2, name


@pytest.mark.parametrize("part", ["z", "x"])
def test_both_parts_of_what_a_trellis_remembers_matter(part):
    model, text = built(CELLS["trellis"]), torch.randint(V, (2, 12))
    with torch.no_grad():
        logits, cache = model.logits(text, model.cache(2))
        token = logits[:, -1:].argmax(-1)
        expected, _ = model.logits(token, cache)
        changed = dataclasses.replace(cache.memory, **{part: torch.zeros_like(getattr(cache.memory, part))})
        other, _ = model.logits(token, dataclasses.replace(cache, memory=changed))
    assert float((other - expected).abs().max()) > 1e-2


def test_a_trellis_remembers_a_text_of_any_length_in_one_state():
    model = built(CELLS["trellis"], stop=Stop(rtol=1e-6, atol=1e-6, max_evals=60), dtype=torch.float32)
    (row,) = ragged((9,))
    sizes, read = set(), model.logits

    def listening(tokens, memory=None, **choices):
        logits, memory = read(tokens, memory, **choices)
        sizes.add(memory.memory.z.shape)
        return logits, memory

    model.logits = listening
    tokens = generate(model, [row], length=256, temperature=0)[0]
    assert sizes == {(1, 1, 36)}
    with torch.no_grad():
        logits, _ = read(torch.cat([row, tokens])[None])
    assert torch.equal(tokens, logits[0, len(row) - 1 : -1].argmax(-1))
    assert len(tokens.unique()) > 3


def test_a_trellis_has_no_length_of_memory_to_choose():
    with pytest.raises(ValueError, match="one state, of all the text before it"):
        generate(built(CELLS["trellis"]), torch.zeros(1, 2, dtype=torch.long), length=2, memory_length=5)


class TestCache:
    def test_has_no_gradient(self):
        model = built()
        with pytest.raises(ValueError, match=r"torch.no_grad"):
            model.logits(torch.zeros(1, 2, dtype=torch.long), model.cache(1))

    def test_is_for_evaluation(self):
        with pytest.raises(ValueError, match="evaluation mode"):
            built().train().cache(1)

    def test_is_not_made_from_a_cache(self, unhooked):
        model = built()
        with pytest.raises(ValueError, match="a TransformerCache, and a cache is made from a TransformerMemory"):
            model.cache(1, memory=model.cache(1))

    def test_a_value_may_be_used_twice(self):
        """As in a search over several continuations: each has the logits that it would have alone."""
        model, text = built(), torch.randint(V, (1, 5))
        first, second = torch.randint(V, (2, 1, 4))
        with torch.no_grad():
            _, memory = model.logits(text, model.cache(1))
            branches = [memory, memory]
            found = [[], []]
            for place in range(4):
                for branch, tokens in enumerate((first, second)):
                    logits, branches[branch] = model.logits(tokens[:, place : place + 1], branches[branch])
                    found[branch].append(logits[0, -1])
            for tokens, seen in zip((first, second), found, strict=True):
                whole, _ = model.logits(torch.cat([text, tokens], dim=1))
                torch.testing.assert_close(torch.stack(seen), whole[0, 5:], rtol=0, atol=1e-8)

    def test_is_not_changed_by_the_map_of_a_solve_that_is_over(self):
        model, text = built(), torch.randint(V, (1, 5))
        with torch.no_grad():
            _, memory = model.logits(text, model.cache(1))
            out = model(text[:, :1], text[:, :1], memory)
            before = out.memory.past.slots.clone()
            out.layer.f(torch.randn_like(out.layer.z))
        spectral_radius(out.layer.f, out.layer.z, iterations=5)
        assert torch.equal(out.memory.past.slots, before)
        assert not out.memory.past.slots.requires_grad


def test_models_without_cache():
    class Echo(torch.nn.Module):
        vocabulary_size = 4

        def logits(self, tokens, memory=None, *, last=False):
            return torch.nn.functional.one_hot(tokens[:, -1:], 4).double(), None

    tokens = generate(Echo(), torch.tensor([[1], [2]]), length=3, temperature=0)
    assert tokens.tolist() == [[1, 1, 1], [2, 2, 2]]
    with pytest.raises(ValueError, match="Echo has no cache"):
        generate(Echo(), ragged((1, 2)), length=1)
