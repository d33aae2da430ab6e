"""Generation from a cache is solving the whole text again for every token."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from equilibria import Anderson, Implicit, Method, NewtonKrylov, Stop, take_rows
from equilibria.cells import ChainConfig, TransformerCell, TransformerConfig, TrellisCache, TrellisCell, TrellisConfig
from equilibria.cells.transformer.relative import RelativePositions
from equilibria.core.trees import tensors_in
from equilibria.layers.cell import CellMap, Prepared
from equilibria.lm.model import Explicit, LanguageConfig, generate, stream
from equilibria.stability import spectral_radius
from slow_cases import all_but, one_in, some_slow

V = 13
TIGHT = Stop(rtol=1e-13, atol=1e-13, max_evals=100)
SMALL = TransformerConfig(width=16, heads=2, inner=24, memory=64)
CELLS = {
    "relative": SMALL,
    "decay": dataclasses.replace(SMALL, positions="decay", longest=80),
    "rotary": dataclasses.replace(SMALL, positions="rotary"),
    "rotary, window": dataclasses.replace(SMALL, positions="rotary", window=6),
    "pre-normalised": dataclasses.replace(SMALL, norm="pre-normalised", affine=True),
    "window": dataclasses.replace(SMALL, window=6),
    "chain": ChainConfig(cells=(SMALL, dataclasses.replace(SMALL, heads=4, positions="decay", longest=80))),
    "trellis": TrellisConfig(width=10, hidden=8, outputs=10),
    "trellis, scan": TrellisConfig(width=10, hidden=8, outputs=10, recurrence="scan"),
    "trellis, input not carried": TrellisConfig(width=10, hidden=8, outputs=10, carry_input=False),
}
MOST = all_but(("relative", "decay", "chain", "trellis"), CELLS)
FEW = all_but(("relative", "trellis"), CELLS)
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


def solved_once(model, row, tokens):
    """As ``solved_again``, all prefixes at once: position t of the whole text is the end of prefix t."""
    with torch.no_grad():
        logits, _ = model.logits(torch.cat([row, tokens])[None])
    return logits[0, len(row) - 1 : -1].argmax(-1), logits[0, len(row) - 1 : -1]


@pytest.mark.parametrize("name", MOST)
def test_logits_are_those_of_the_whole_text(name):
    model, rows = built(CELLS[name]), ragged((5,))
    (tokens,), (logits,) = cached(model, rows, 8)
    for expected, whole in (solved_again(model, rows[0], 8), solved_once(model, rows[0], tokens)):
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-8)


def test_a_copy_of_a_cache_is_written_in_its_own_slots():
    """Also after an evaluation at one position, when the cache has the views that all others write through."""
    model, (row,) = built(CELLS[next(iter(CELLS))]), ragged((6,))
    cell = model.layer.cell
    with torch.no_grad():
        _, memory = model.logits(row[None, :4], model.cache(1, length=9))
        prepared = cell.prepare(model.embedding(row[None, 4:5]), memory)
        cell(torch.ones_like(cell.start(prepared)), prepared)
        past = prepared.rows.attention.past
        assert past._claimed
        assert "_with_one" in vars(past)
        copies = [dataclasses.replace(memory, past=made(past)) for made in (copy.deepcopy, through_a_pickle)]
        first, memory = model.logits(row[None, 4:5], memory)
        second, _ = model.logits(row[None, 5:6], memory)
        for copied in copies:
            again, after = model.logits(row[None, 4:5], copied)
            assert torch.equal(again, first)
            assert torch.equal(model.logits(row[None, 5:6], after)[0], second)


@pytest.mark.parametrize("name", FEW)
def test_a_past_of_inference_mode_is_continued_outside_of_it(name):
    """Under no_grad from a cache, and with gradients from a memory."""
    model, (row,) = built(CELLS[name]), ragged((6,))
    prompt, token = row[None, :5], row[None, 5:]
    with torch.inference_mode():
        made = [model.logits(prompt, past)[1] for past in (model.cache(1), None)]
    with torch.no_grad():
        same = [model.logits(prompt, past)[1] for past in (model.cache(1), None)]
        assert torch.equal(model.logits(token, made[0])[0], model.logits(token, same[0])[0])
    assert torch.equal(*(generate(model, token, length=3, memory=memory[1]) for memory in (made, same)))
    first, second = (model(token, token, memory[1]).loss for memory in (made, same))
    for mine, expected in zip(
        *(torch.autograd.grad(x, list(model.parameters())) for x in (first, second)), strict=True
    ):
        assert torch.equal(mine, expected)


def through_a_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("name", MOST)
def test_logits_of_eight_texts_are_those_of_each(name):
    model, rows = built(CELLS[name]), ragged()
    tokens, logits = cached(model, rows, 12)
    del model.logits
    for row, mine, seen in zip(rows, tokens, logits, strict=True):
        expected, whole = solved_once(model, row, mine)
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
    assert torch.equal(tokens, solved_once(model, row, tokens)[0])
    assert len(tokens.unique()) > 3
    for step in (0, 100, 255):
        prefix = torch.cat([row, tokens[:step]])
        assert solved_again(model, prefix, 1)[0] == tokens[step]


@pytest.mark.slow
def test_256_tokens_in_float32_of_a_ragged_batch():
    cell = dataclasses.replace(SMALL, memory=300)
    model = built(cell, stop=Stop(rtol=1e-6, atol=1e-6, max_evals=60), dtype=torch.float32)
    rows = ragged()
    tokens = generate(model, rows, length=256, temperature=0)
    for row, mine in zip(rows, tokens, strict=True):
        with torch.no_grad():
            logits, _ = model.logits(torch.cat([row, mine])[None])
        assert torch.equal(mine, logits[0, len(row) - 1 : -1].argmax(-1))


@pytest.mark.parametrize("memory", [5, *some_slow(0, 1)])
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
        expected, whole = solved_once(model, row, mine)
        assert torch.equal(mine, expected)
        torch.testing.assert_close(seen, whole, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")  # its stop is the last digit
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


@pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")  # at a few positions of 256
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


def padded(rows):
    """The rows side by side, ending together, and how far each was moved."""
    longest = max(map(len, rows))
    tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    return tokens, torch.tensor([longest - len(row) for row in rows])


def read(model, rows, **choices):
    """The cache of a model that has read these rows."""
    tokens, padding = padded(rows)
    with torch.no_grad():
        return model.logits(tokens, model.cache(len(rows), padding=padding, **choices))[1]


def ends_of(model, texts):
    """The logits at the end of each text, solved as a whole."""
    tokens, padding = padded(texts)
    with torch.no_grad():
        return model.logits(tokens, model.cache(len(texts), padding=padding), last=True)[0][:, -1]


def held(model):
    """Where the cells of a model keep the weights of a generation."""
    return [module._held for module in model.modules() if hasattr(module, "_held")]


class TestTree:
    """A cache is a tree of tensors with the batch first, and without weights."""

    @pytest.mark.parametrize("name", CELLS)
    def test_every_tensor_has_the_batch_first_and_none_is_a_weight(self, name):
        model, rows = built(CELLS[name]), ragged()[:5]
        caches = [read(model, rows, warm=True)]
        with torch.no_grad():
            for token in torch.randint(V, (3, 5, 1)):
                caches.append(model.logits(token, caches[-1])[1])
        weights = tensors_in([*model.parameters(), *map(vars, held(model))])
        assert len(weights) > len(list(model.parameters()))
        kept = {tensor.untyped_storage().data_ptr() for tensor in weights if tensor.numel()}
        for cache in caches:
            tensors = tensors_in(cache)
            assert tensors
            assert {len(tensor) for tensor in tensors} == {5}
            assert not any(tensor.requires_grad for tensor in tensors)
            assert kept.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel())

    @pytest.mark.parametrize("name", ["relative", "decay", "rotary", "chain", "trellis"])
    def test_copies_and_pickles_continue_the_text(self, name):
        model, rows = built(CELLS[name]), ragged()
        cache, token = read(model, rows), torch.randint(V, (8, 1))
        with torch.no_grad():
            expected, _ = model.logits(token, cache)
            for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
                assert torch.equal(model.logits(token, other)[0], expected)

    def test_the_slots_of_chosen_rows_lie_in_memory_as_attention_reads_them(self):
        cache = take_rows(read(built(), ragged()), torch.tensor([3, 0, 3]))
        assert cache.past.slots.shape[:3] == (3, 2, 2)
        assert cache.past.slots.permute(1, 2, 0, 3, 4).is_contiguous()


class TestBeams:
    """``take_rows`` reorders, repeats and drops the rows of a cache, as a search with beams does."""

    @pytest.mark.parametrize(
        ("name", "warm"), one_in(3, [*((name, False) for name in CELLS), ("relative", True), ("trellis", True)])
    )
    def test_reordered_at_every_step_they_have_the_logits_of_the_whole_texts(self, name, warm):
        model, texts = built(CELLS[name]), ragged()
        cache = read(model, texts, warm=warm)
        for beams in (8, 9, 4):
            index, tokens = torch.randint(len(texts), (beams,)), torch.randint(V, (beams, 1))
            texts = [torch.cat([texts[i], token]) for i, token in zip(index, tokens, strict=True)]
            with torch.no_grad():
                logits, cache = model.logits(tokens, take_rows(cache, index))
            torch.testing.assert_close(logits[:, -1], ends_of(model, texts), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("name", ["relative", "decay", "rotary", "chain", "trellis"])
    def test_they_have_the_logits_of_reordered_prompts(self, name):
        model, rows = built(CELLS[name]), ragged()
        index = torch.tensor([5, 2, 2, 7, 0, 3])
        some, token = [rows[i] for i in index], torch.randint(V, (6, 1))
        with torch.no_grad():
            expected, _ = model.logits(token, read(model, some))
            found, _ = model.logits(token, take_rows(read(model, rows), index))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("name", FEW)
    def test_before_the_text_of_every_row_has_begun(self, name):
        """In the middle of the padding of the short rows."""
        model, rows = built(CELLS[name]), ragged()
        tokens, padding = padded(rows)
        index = torch.tensor([0, 3, 1, 6, 4, 0])
        with torch.no_grad():
            _, cache = model.logits(tokens[:, :4], model.cache(8, padding=padding))
            logits, cache = model.logits(tokens[index, 4:], take_rows(cache, index))
            token = torch.randint(V, (6, 1))
            more, _ = model.logits(token, cache)
        some = [rows[i] for i in index]
        torch.testing.assert_close(logits[:, -1], ends_of(model, some), rtol=0, atol=1e-8)
        some = [torch.cat(pair) for pair in zip(some, token, strict=True)]
        torch.testing.assert_close(more[:, -1], ends_of(model, some), rtol=0, atol=1e-8)

    @pytest.mark.parametrize("name", ["relative", "decay", "rotary", "chain", "trellis"])
    def test_the_cache_they_come_from_stays_as_it_is(self, name):
        """Before and after it has a successor, and whichever of them is continued first."""
        model, rows = built(CELLS[name]), ragged()
        first, index, token = read(model, rows), torch.tensor([1, 1, 6]), torch.randint(V, (8, 1))
        with torch.no_grad():
            chosen = take_rows(first, index)
            expected_rows, _ = model.logits(token[index], chosen)
            expected, second = model.logits(token, first)
            later = torch.randint(V, (8, 3))
            expected_later, _ = model.logits(later, second)  # written behind what the first one holds
            again = take_rows(first, index)
            assert torch.equal(model.logits(token[index], again)[0], expected_rows)
            assert torch.equal(model.logits(token[index], chosen)[0], expected_rows)
            torch.testing.assert_close(model.logits(token, first)[0], expected, rtol=0, atol=1e-10)
            model.logits((token + 1) % V, first)  # another successor, where the second one has its place
            torch.testing.assert_close(model.logits(later, second)[0], expected_later, rtol=0, atol=1e-10)

    def test_of_a_memory_that_slides(self):
        """As with the memory of training, whose rows are chosen in the same way."""
        model = built(dataclasses.replace(SMALL, memory=5))
        tokens = torch.randint(V, (3, 4))
        with torch.no_grad():
            cache, past = model.cache(3), None
            for _ in range(16):
                logits, cache = model.logits(tokens, cache, last=True)
                expected, past = model.logits(tokens, past, last=True)
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)
                index = torch.randint(3, (3,))
                cache, past = take_rows(cache, index), take_rows(past, index)
                tokens = torch.randint(V, (3, 1))

    def test_of_the_layers_of_a_stack(self):
        cell = dataclasses.replace(SMALL, injection=False, affine=True)
        model, rows = built(cell, explicit=Explicit(depth=3, tied=False, memory="layers")), ragged()
        index, token = torch.tensor([7, 7, 0, 3]), torch.randint(V, (4, 1))
        with torch.no_grad():
            logits, _ = model.logits(token, take_rows(read(model, rows), index))
        texts = [torch.cat([rows[i], end]) for i, end in zip(index, token, strict=True)]
        torch.testing.assert_close(logits[:, -1], ends_of(model, texts), rtol=0, atol=1e-8)


class TestRows:
    """Of what a cell prepares, ``take_rows`` gives what it would prepare of the chosen samples."""

    INDEX = torch.tensor([6, 1, 1, 4])

    def check(self, cell, prepared):
        z = torch.randn_like(cell.start(prepared))
        expected = cell(z, prepared)[self.INDEX]
        rows = take_rows(prepared.rows, self.INDEX)
        assert {len(tensor) for tensor in tensors_in(rows)} == {len(self.INDEX)}
        found = cell(z[self.INDEX], Prepared(shared=prepared.shared, rows=rows))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        if prepared.droppable:
            some = CellMap(cell, prepared).rows(self.INDEX)
            torch.testing.assert_close(some(z[self.INDEX]), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", CELLS)
    @pytest.mark.parametrize("time", [1, 4])
    def test_with_a_memory_and_dropout(self, name, time):
        cell = dropping(CELLS[name]).build().double().train()
        with torch.no_grad():
            x = torch.randn(8, 5, cell.config.width, dtype=torch.float64)
            begun = cell.prepare(x)
            memory = cell.remember(torch.randn_like(cell.start(begun)), begun)
            self.check(cell, cell.prepare(x[:, :time], memory))
            self.check(cell, begun)

    @pytest.mark.parametrize("name", CELLS)
    @pytest.mark.parametrize("time", [1, 4])
    def test_with_a_cache_of_ragged_rows(self, name, time):
        model = built(CELLS[name])
        with torch.no_grad():
            x = model.embedding(torch.randint(V, (8, time)))
            self.check(model.layer.cell, model.layer.cell.prepare(x, read(model, ragged())))
            begun = model.cache(8, padding=torch.tensor([0, 2, 5, 1, 3, 0, 4, 1]))  # nothing is cached yet
            self.check(model.layer.cell, model.layer.cell.prepare(x, begun))


def dropping(cell):
    if isinstance(cell, ChainConfig):
        return ChainConfig(cells=tuple(map(dropping, cell.cells)))
    other = {"weight_dropout": 0.3} if isinstance(cell, TrellisConfig) else {"attention_dropout": 0.3}
    return dataclasses.replace(cell, dropout=0.3, **other)


class TestWeights:
    """A cell keeps its effective weights from one position to the next, and never beyond their change."""

    CELLS = pytest.mark.parametrize("name", ["relative", "trellis"])

    def continued(self, model, cache, token):
        """The logits after a token under a cache made before, which are those of the weights as they are now."""
        with torch.no_grad():
            logits, _ = model.logits(token, cache)
            for one in held(model):
                one.renew()
            assert torch.equal(model.logits(token, cache)[0], logits)
        return logits

    def check(self, model, rows, *, than):
        """What is generated is what solving the whole text again gives, and it is another text ``than`` before."""
        tokens, logits = cached(model, rows, 2)
        del model.logits
        for row, mine, seen in zip(rows, tokens, logits, strict=True):
            expected, whole = solved_again(model, row, 2)
            assert torch.equal(mine, expected)
            torch.testing.assert_close(seen, whole, rtol=0, atol=1e-8)
        assert not torch.allclose(logits, than, rtol=0, atol=1e-3)

    def generated(self, model, rows):
        """The logits of a generation, and a cache with a token to continue it."""
        _, logits = cached(model, rows, 2)
        del model.logits
        return logits, read(model, rows), torch.randint(V, (len(rows), 1))

    @CELLS
    @pytest.mark.parametrize("way", ["optimiser", "loaded", "assigned", "replaced", "in place"])
    def test_after_a_change_generation_uses_those_of_now(self, name, way):
        model, rows = built(CELLS[name]), ragged()[1:3]
        before, cache, token = self.generated(model, rows)
        old = self.continued(model, cache, token)
        change(model, way)
        assert not torch.allclose(self.continued(model, cache, token), old, rtol=0, atol=1e-3)
        self.check(model, rows, than=before)

    def test_after_a_change_that_pytorch_does_not_count_they_are_those_of_a_new_cache(self):
        model, rows = built(), ragged()[1:3]
        before, _, _ = self.generated(model, rows)
        change(model, "fused optimiser")
        self.check(model, rows, than=before)

    @CELLS
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_has_its_own(self, name, copied):
        model, rows = built(CELLS[name]), ragged()[1:3]
        size = len(pickle.dumps(model))
        before, cache, token = self.generated(model, rows)
        assert len(pickle.dumps(model)) == size  # without what is kept
        twin, old = copied(model), self.continued(model, cache, token)
        assert torch.equal(self.continued(twin, cache, token), old)
        change(twin, "in place")
        assert not torch.allclose(self.continued(twin, cache, token), old, rtol=0, atol=1e-3)
        self.check(twin, rows, than=before)
        assert torch.equal(self.continued(model, cache, token), old)

    @CELLS
    def test_of_another_precision(self, name):
        model, rows = built(CELLS[name], stop=Stop(rtol=1e-6, atol=1e-6, max_evals=60)), ragged()[1:3]
        self.generated(model, rows)
        assert generate(model.float(), rows, length=3, temperature=0).shape == (2, 3)
        assert {tensor.dtype for tensor in tensors_in([vars(one) for one in held(model)])} == {torch.float32}

    def test_for_one_call_only(self):
        """Of ``torch.func.functional_call``, whose tensors may come to lie where those of the last call did."""
        model, token = built(), torch.randint(V, (2, 1))
        cache, gain = read(model, ragged((3, 5))), model.layer.cell.outer.gain.detach().clone()
        logits, factors, name = Logits(model), (0.5, 2, 3, 0.1), "model.layer.cell.outer.gain"
        with torch.no_grad():
            found = [torch.func.functional_call(logits, {name: gain * factor}, (token, cache)) for factor in factors]
            for factor, seen in zip(factors, found, strict=True):
                model.layer.cell.outer.gain.copy_(gain * factor)
                assert torch.equal(model.logits(token, cache)[0], seen)

    @CELLS
    def test_of_inference_mode(self, name):
        """Such parameters count no changes, so nothing is kept of them."""
        model, rows = built(CELLS[name]), ragged()[1:3]
        expected = generate(model, rows, length=4, temperature=0)
        with torch.inference_mode():
            twin = built(CELLS[name])
            twin.load_state_dict(model.state_dict())
            assert torch.equal(generate(twin, rows, length=4, temperature=0), expected)
            cache, token = read(twin, rows), torch.randint(V, (2, 1))
            old = self.continued(twin, cache, token)
            change(twin, "in place")
            assert not torch.allclose(self.continued(twin, cache, token), old, rtol=0, atol=1e-3)


class Logits(torch.nn.Module):
    """A module whose output are the logits of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, memory):
        return self.model.logits(tokens, memory)[0]


def change(model, way):
    """Other weights, by far more than rounding and little enough to leave the cell a contraction."""
    torch.manual_seed(1)
    parameters = dict(model.layer.named_parameters())
    others = {name: weight.detach() + 0.02 * torch.randn_like(weight) for name, weight in parameters.items()}
    if way.endswith("optimiser"):
        for weight in parameters.values():
            weight.grad = torch.randn_like(weight)
        torch.optim.Adam(parameters.values(), lr=0.02, fused=way.startswith("fused")).step()
    elif way in ("loaded", "assigned"):
        model.layer.load_state_dict(others, assign=way == "assigned")
    elif way == "replaced":
        for name, value in others.items():
            module = model.layer.get_submodule(name.rpartition(".")[0])
            setattr(module, name.rpartition(".")[2], torch.nn.Parameter(value))
    else:
        with torch.no_grad():
            for name, value in others.items():
                parameters[name].copy_(value)


def test_models_without_cache():
    class Echo(torch.nn.Module):
        vocabulary_size = 4

        def logits(self, tokens, memory=None, *, last=False):
            return torch.nn.functional.one_hot(tokens[:, -1:], 4).double(), None

    tokens = generate(Echo(), torch.tensor([[1], [2]]), length=3, temperature=0)
    assert tokens.tolist() == [[1, 1, 1], [2, 2, 2]]
    with pytest.raises(ValueError, match="Echo has no cache"):
        generate(Echo(), ragged((1, 2)), length=1)
