from __future__ import annotations

import math

import pytest
import torch

from equilibria import Anderson, Implicit, Method, Stop
from equilibria.cells import TransformerConfig
from equilibria.lm.corpora import Language, Vocabulary
from equilibria.lm.model import LanguageConfig, generate, stream
from equilibria.lm.model.generate import top_k_top_p_mask
from equilibria.lm.runs.continuation import continuation
from slow_cases import some_slow

V, B = 13, 3


def built(memory=32, positions="relative"):
    """A model in float64 whose equilibria are solved to the last digit, with logits far from equal."""
    cell = TransformerConfig(width=16, heads=2, inner=24, memory=memory, positions=positions, longest=64)
    tight = Method(Anderson(), Stop(rtol=1e-13, atol=1e-13, max_evals=100), Implicit())
    model = LanguageConfig(cell=cell, dropout=0.2, std=1.0).build(V, method=tight)
    with torch.no_grad():
        model.layer.cell.inject.direction.mul_(100)
    return model.double()


def prompt(time=5):
    return torch.randint(V, (B, time))


@pytest.mark.parametrize("positions", ["relative", *some_slow("decay", "rotary")])
@pytest.mark.parametrize("segment", [None, 2])
def test_greedy_equals_solving_the_whole_prefix_again(positions, segment):
    model = built(positions=positions).eval()
    text = start = prompt()
    tokens = generate(model, start, length=8, temperature=0, segment=segment)
    with torch.no_grad():
        memory, logits = None, None
        for piece in (start, *tokens.split(1, dim=1)):
            whole, _ = model.logits(text)
            logits, memory = model.logits(piece, memory)
            torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=0, atol=1e-8)
            text = torch.cat([text, whole[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, text[:, 5:13])


def test_choices_follow_the_seed():
    model, start = built(), prompt()
    global_state = torch.get_rng_state()
    first = generate(model, start, length=6, seed=1)
    assert torch.equal(first, generate(model, start, length=6, seed=1))
    assert not torch.equal(first, generate(model, start, length=6, seed=2))
    assert torch.equal(global_state, torch.get_rng_state())
    assert first.shape == (B, 6)
    assert torch.equal(first, model.generate(start, length=6, seed=1))


def test_one_candidate_is_greedy():
    model, start = built(), prompt()
    greedy = generate(model, start, length=5, temperature=0)
    assert torch.equal(generate(model, start, length=5, top_k=1), greedy)
    assert torch.equal(generate(model, start, length=5, top_p=1e-9), greedy)
    for temperature in (1e-6, 1e-45, 5e-324):
        assert torch.equal(generate(model, start, length=5, temperature=temperature), greedy)
        assert torch.equal(generate(model.float(), start, length=5, temperature=temperature), greedy)


def test_memory_continues_what_came_before():
    model, start = built().eval(), prompt(6)
    with torch.no_grad():
        _, memory = model.logits(start[:, :4])
    whole = generate(model, start, length=5, temperature=0)
    assert torch.equal(generate(model, start[:, 4:], length=5, temperature=0, memory=memory), whole)


def test_each_token_is_one_solve():
    model, calls = built(), []
    model.layer.register_forward_hook(lambda *_: calls.append(1))
    generate(model, prompt(), length=3)
    assert len(calls) == 3


class TestCandidates:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35], [0.25, 0.25, 0.25, 0.25]]))

    def test_top_k(self):
        assert top_k_top_p_mask(self.logits, top_k=2).tolist() == [
            [False, True, False, True],
            [True, True, False, False],
        ]
        assert top_k_top_p_mask(self.logits, top_k=9).all()

    def test_top_p(self):
        assert top_k_top_p_mask(self.logits, top_p=0.5)[0].tolist() == [False, True, False, False]
        assert top_k_top_p_mask(self.logits, top_p=0.6)[0].tolist() == [False, True, False, True]
        assert top_k_top_p_mask(self.logits, top_p=0.9)[0].tolist() == [True, True, False, True]
        assert top_k_top_p_mask(self.logits, top_p=1.0).all()
        assert top_k_top_p_mask(3 * torch.randn(2, 200_000), top_p=1.0).all()  # whatever their rounded sum is

    def test_both(self):
        assert top_k_top_p_mask(self.logits, top_k=3, top_p=0.6).sum(1).tolist() == [2, 3]

    def test_frequencies(self):
        class Fixed(torch.nn.Module):
            vocabulary_size = 4

            def logits(self, tokens, memory=None, *, last=False):
                return TestCandidates.logits[:1].expand(len(tokens), 1, 4), None

        tokens = generate(Fixed(), torch.zeros(4000, 1, dtype=torch.long), length=1, temperature=0.5, top_k=3)
        expected = torch.tensor([0.1, 0.5, 0.0, 0.35]) ** 2
        frequencies = tokens.flatten().bincount(minlength=4) / 4000
        torch.testing.assert_close(frequencies, expected / expected.sum(), rtol=0, atol=0.03)

    @pytest.mark.parametrize("temperature", [1e-45, 0.5, 1.0, 1e38, 1e308])
    @pytest.mark.parametrize("scale", [1.0, 1e37])
    def test_no_temperature_overflows(self, temperature, scale):
        class Fixed(torch.nn.Module):
            vocabulary_size = 4

            def logits(self, tokens, memory=None, *, last=False):
                return scale * TestCandidates.logits[:1].expand(len(tokens), 1, 4), None

        tokens = generate(Fixed(), torch.zeros(4000, 1, dtype=torch.long), length=1, temperature=temperature)
        frequencies = tokens.flatten().bincount(minlength=4) / 4000
        expected = (scale / temperature * self.logits[0].double()).clamp(-1e300, 0)
        expected = (expected - expected.max()).softmax(0).float()
        torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.03)


class TestModes:
    def test_training_mode_is_restored(self):
        model = built().train()
        model.embedding.eval()  # each module's own mode, not the root's
        modes = [module.training for module in model.modules()]
        tokens = stream(model, prompt())
        next(tokens)
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert not next(tokens).requires_grad

    def test_restored_after_an_error_too(self):
        model = built().train()
        with torch.no_grad():
            model.head.bias.fill_(math.nan)
        with pytest.raises(ValueError, match="NaN or infinite"):
            generate(model, prompt(), length=2)
        assert model.training
        assert torch.is_grad_enabled()

    def test_dropout_is_off(self):
        model = built().train()
        start = prompt()
        assert torch.equal(
            generate(model, start, length=4, temperature=0), generate(model.eval(), start, length=4, temperature=0)
        )


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"length": 0}, "length=0.*at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0.*≥ 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0.*at least 1"),
        ({"top_p": 0.0}, "top_p=0.0.*0 < top_p ≤ 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"seed": -1}, "seed=-1.*whole number from 0"),
        ({"seed": 2**63}, "seed=9223372036854775808.*whole number from 0"),
        ({"segment": 0}, "segment=0"),
    ],
)
def test_refuses(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(built(), prompt(), **({"length": 1} | choice))


@pytest.mark.parametrize("wrong", [None, "1", 1.5, True], ids=repr)
@pytest.mark.parametrize("name", ["length", "temperature", "top_k", "top_p", "seed", "stop", "segment"])
def test_refuses_values_of_another_kind(unhooked, name, wrong):
    """None stands for a default where there is one, and a temperature and a share may have a fraction."""
    if wrong is None and name in ("top_k", "top_p", "stop", "segment"):
        assert generate(built(), prompt(), length=1, **{name: wrong}).shape[1] == 1
    elif wrong == 1.5 and name == "temperature":
        assert generate(built(), prompt(), length=1, temperature=wrong).shape[1] == 1
    else:
        with pytest.raises(ValueError, match=rf"generate\({name}={wrong!r}\)"):
            generate(built(), prompt(), **({"length": 1} | {name: wrong}))


def test_a_stop_may_begin_with_the_letters_of_a_line_feed():
    words = ["<eos>", r"\nabla", *(f"word{number}" for number in range(V - 2))]
    vocabulary = Vocabulary.of_tokens(words, "word")
    language = Language(name="formulas", unit="word", vocabulary=vocabulary, sums={})
    model = built().eval()

    def text(stop):
        pieces = continuation(model, language, ["word1"], length=100, temperature=9.0, stop=stop)
        return "".join(piece for (piece,) in pieces)

    whole = text(None)
    assert text(r"\nabla") == whole.partition(r" \nabla")[0] != whole
    assert text(r"\n") == text("<eos>") == whole.partition("\n")[0] != whole


def test_refuses_lists_of_numbers(unhooked):
    with pytest.raises(TypeError, match="the prompt holds a list"):
        generate(built(), [[1, 2, 3], [4]], length=2)
    with pytest.raises(ValueError, match=r"cache\(batch=0\)"):
        built().eval().cache(0)


def test_refuses_prompts():
    with pytest.raises(ValueError, match=r"shape \(3, 0\)"):
        stream(built(), prompt(0))
    with pytest.raises(ValueError, match=r"token 13, but the model knows 0 … 12"):
        stream(built(), torch.full((1, 2), V))


@pytest.mark.parametrize("wrong", [torch.zeros(5, dtype=torch.long), torch.zeros(1, 5), torch.ones(1, 5).bool()])
def test_refuses_prompts_of_another_shape_or_type(unhooked, wrong):
    with pytest.raises(ValueError, match=r"must be \[prompts, tokens\] of torch.int64"):
        generate(built(), wrong, length=2)
