from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch.nn import functional

from equilibria import Anderson, Equilibrium, Implicit, Method, Picard, Stack, Stop, Unroll
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.lm.model import (
    AdaptiveConfig,
    Embedding,
    Explicit,
    ExtraLosses,
    LanguageConfig,
    LanguageModel,
    MixtureConfig,
    SoftmaxHead,
)
from equilibria.lm.model.tables import Head

# Small models with random weights are solved here, and whether their solves converge is not the subject.
pytestmark = pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")

CELL = TransformerConfig(width=16, heads=2, inner=24, memory=8)
CONFIG = LanguageConfig(cell=CELL)
METHOD = Method(Anderson(), Stop(max_evals=12), Implicit())
TRELLIS = TrellisConfig(width=8, hidden=10, outputs=8, std=0.3)
V, B, T = 11, 3, 6


def built(config=CONFIG, *, method=METHOD, **choices):
    return config.build(V, method=method if config.solves else None, **choices)


def tokens(time=T):
    return torch.randint(V, (B, time))


def test_embedding_is_scaled_and_drops_whole_channels():
    embedding = Embedding(vocabulary_size=V, width=16, dropout=0.5, std=1.0)
    ids = tokens()
    torch.testing.assert_close(embedding.eval()(ids), embedding.weight[ids] * 4)
    out = embedding.train()(ids)
    dropped = (out == 0).all(dim=1)
    assert torch.equal(dropped, (out == 0).any(dim=1))
    kept = ~dropped[:, None].expand_as(out)
    torch.testing.assert_close(out[kept], (embedding.eval()(ids) * 2)[kept])


class TestWordDropout:
    def test_a_word_is_lost_at_all_its_occurrences_in_all_streams(self):
        embedding = Embedding(vocabulary_size=V, width=16, word_dropout=0.25, std=1.0)
        ids = torch.arange(V).repeat(B, 3)
        full, shares = embedding.eval()(ids), []
        for _ in range(200):
            out = embedding.train()(ids)
            lost = (out == 0).all(dim=2)
            torch.testing.assert_close(out, full / 0.75 * ~lost[..., None])
            words = lost[0, :V]
            assert torch.equal(lost, words.repeat(B, 3))
            shares.append(words.double().mean())
        assert 0.2 < torch.stack(shares).mean() < 0.3

    def test_nothing_is_lost_in_evaluation(self):
        embedding = Embedding(vocabulary_size=V, width=16, word_dropout=0.5)
        ids = tokens()
        assert torch.equal(embedding.eval()(ids), embedding.weight[ids] * 4)

    def test_a_lost_word_gets_no_gradient_as_input_and_the_tied_head_sees_it(self):
        model = built(dataclasses.replace(CONFIG, word_dropout=0.9))
        ids = torch.arange(V)[None]
        torch.manual_seed(3)
        vectors = model.embedding(ids)
        lost = (vectors == 0).all(dim=2)[0]
        assert 0 < lost.sum() < V
        (gradient,) = torch.autograd.grad(vectors.sum(), model.embedding.weight)
        assert torch.equal((gradient == 0).all(dim=1), lost)
        h = torch.randn(1, 1, 16)
        assert torch.equal(model.read(h), torch.nn.functional.linear(h, model.embedding.weight))

    def test_comes_with_the_dropout_of_channels(self):
        embedding = Embedding(vocabulary_size=V, width=64, dropout=0.5, word_dropout=0.5, std=1.0)
        out = embedding.train()(torch.arange(V).repeat(2, 1))
        words, channels = (out[0] == 0).all(dim=1), (out == 0).all(dim=1)
        assert 0 < words.sum() < V
        assert not torch.equal(channels[0], channels[1])
        assert torch.equal(out[0] == 0, words[:, None] | channels[0])


class TestStart:
    @pytest.mark.parametrize("tied", [True, False])
    def test_uniform_has_the_same_variance(self, tied):
        model = dataclasses.replace(CONFIG, init="uniform", std=0.1 / 3**0.5, tied=tied).build(5_000)
        tables = [model.embedding.weight] if tied else [model.embedding.weight, model.head.weight]
        for table in tables:
            table = table.detach()
            assert 0.0999 < table.abs().max() <= 0.1
            assert abs(float(table.std()) / (0.1 / 3**0.5) - 1) < 0.01

    def test_is_not_scaled_where_that_is_said(self):
        embedding, ids = Embedding(vocabulary_size=V, width=16, scaled=False), tokens()
        assert torch.equal(embedding(ids), embedding.weight[ids])
        assert built(dataclasses.replace(CONFIG, scaled=False)).embedding.scale == 1

    def test_another_distribution_is_refused(self, unhooked):
        with pytest.raises(ValueError, match=r"init='orthogonal'.*'normal' or a 'uniform'"):
            Embedding(vocabulary_size=V, width=16, init="orthogonal")


def test_nats_are_the_cross_entropy_of_the_logits():
    model = built()
    ids, targets = tokens(), tokens()
    out = model(ids, targets)
    logits, _ = model.logits(ids)
    assert out.nll.shape == (B, T)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    torch.testing.assert_close(out.nll, expected)
    torch.testing.assert_close(model.read(out.layer.z), logits)
    assert out.solution is out.layer.solution


@pytest.mark.filterwarnings("ignore:Stop:RuntimeWarning")  # of a tolerance that bfloat16 does not resolve
def test_nats_are_computed_in_float32_at_least():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out = built().to(dtype)(tokens(), tokens())
        assert out.nll.dtype == expected
        assert torch.isfinite(out.nll).all()


def test_a_fresh_model_knows_nothing():
    assert abs(float(built()(tokens(), tokens()).nll.mean().detach()) - math.log(V)) < 0.2


class TestTied:
    def test_is_one_parameter_whatever_happens_to_it(self):
        model = built()
        names = [name for name, _ in model.named_parameters() if "embedding" in name or "head" in name]
        assert names == ["embedding.weight", "head.bias"]
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
            ids = tokens()
            before, _ = twin.logits(ids)
            with torch.no_grad():
                twin.embedding.weight.mul_(2)
            assert not torch.allclose(twin.read(twin.layer(twin.embedding(ids)).z), before)

    def test_gradient_has_both_parts(self):
        model = built()
        unused = torch.full((B, T), V - 1)  # a token that is read and never a target gets gradient by both ways
        model(unused, torch.zeros_like(unused)).nll.mean().backward()
        assert (model.embedding.weight.grad.abs().amax(dim=1) > 0).all()

    def test_untied(self):
        model = built(dataclasses.replace(CONFIG, tied=False))
        assert model.head.weight.shape == model.embedding.weight.shape
        assert model.head.weight is not model.embedding.weight


def test_output_dropout_is_by_channel():
    head = SoftmaxHead(width=16, vocabulary_size=16, tied=False, dropout=0.5)
    with torch.no_grad():
        head.weight.copy_(torch.eye(16))
    out = head.train().dropped(torch.ones(B, T, 16))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    embedding = Embedding(vocabulary_size=16, width=16)
    assert torch.equal(head.logits(out, embedding), out)  # what is dropped is dropped once
    assert torch.equal(head.eval().dropped(out), out)


HEADS = {
    "one softmax": {},
    "untied": {"tied": False},
    "clusters": {"adaptive": AdaptiveConfig(cutoffs=(4,), division=2)},
    "untied clusters": {"adaptive": AdaptiveConfig(cutoffs=(4,), division=2), "tied": False},
    "mixture": {"mixture": MixtureConfig(experts=2)},
    "untied mixture": {"mixture": MixtureConfig(experts=2), "tied": False},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_options_reach_embedding_and_head(head):
    config = dataclasses.replace(CONFIG, word_dropout=0.1, output_dropout="token", scaled=False, init="uniform", **head)
    model = built(dataclasses.replace(config, dropout=0.25, input_dropout=0.5, std=3.0))
    assert (model.embedding.dropout, model.head.dropout) == (0.5, 0.25)
    assert (model.embedding.word_dropout, model.embedding.scale, model.head.output_dropout) == (0.1, 1.0, "token")
    assert built(dataclasses.replace(config, dropout=0.25)).embedding.dropout == 0.25
    assert built(dataclasses.replace(config, dropout=0.25, input_dropout=0.0)).embedding.dropout == 0
    for name, table in model.named_parameters():
        if any(part in name for part in ("embedding.weight", "tables", "head.weight", "slot_weight", "tail.0.1")):
            largest = float(table.detach().abs().max())
            assert 3 < largest <= 3 * 3**0.5, name  # of so many normal numbers some would be larger
    ids = tokens()
    model.eval()
    torch.testing.assert_close(
        model(ids, ids).nll, -model.logits(ids)[0].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    )


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_output_is_dropped_once(head):
    model, ids = built(dataclasses.replace(CONFIG, dropout=0.5, input_dropout=0.0, std=1.0, **head)), tokens()
    h = model.layer(model.embedding(ids)).output
    calls = {
        "nll": (lambda: model(ids, ids).nll, lambda h: model.head.nll(h, ids, model.embedding)),
        "logits": (lambda: model.logits(ids)[0], lambda h: model.head.logits(h, model.embedding)),
    }
    for name, (whole, read) in calls.items():
        torch.manual_seed(1)
        out = whole()
        torch.manual_seed(1)
        assert torch.equal(out, read(model.head.dropped(h))), name
        assert not torch.allclose(out, read(h)), name


def test_a_head_of_ones_own(unhooked):
    class Own(Head):
        def nll(self, h, targets, embedding):
            return h.sum(-1)

        def logits(self, h, embedding):
            return h

    layer = built().layer
    model = LanguageModel(Embedding(vocabulary_size=V, width=16), layer, Own(dropout=0.0))
    out = model(tokens(), tokens())
    torch.testing.assert_close(out.nll, out.layer.z.sum(-1))
    assert torch.equal(model.read(out.layer.z), out.layer.z)


class TestSkip:
    """Positions that are read and not scored."""

    @pytest.mark.parametrize("config", [CONFIG, LanguageConfig(cell=TRELLIS)])
    def test_leaves_the_nll_of_the_others(self, config):
        model, ids, targets = built(config).eval(), tokens(), tokens()
        joint, late = model(ids, targets), model(ids, targets, skip=2)
        assert late.nll.shape == (B, T - 2)
        assert torch.equal(late.nll, joint.nll[:, 2:])
        assert torch.equal(late.layer.z, joint.layer.z)

    def test_no_loss_reaches_the_head_from_them(self):
        model, ids = built(dataclasses.replace(CONFIG, tied=False)), tokens()
        targets = torch.full((B, T), 1)
        targets[:, :4] = 9
        model(ids, targets, skip=4).nll.sum().backward()
        assert (model.head.bias.grad[9] > 0).all()  # never a target that is scored
        assert (model.head.bias.grad[1] < 0).all()

    @pytest.mark.parametrize("skip", [-1, T, T + 1])
    def test_leaves_something(self, skip):
        with pytest.raises(ValueError, match=f"skip={skip} positions of a segment of 6: at least one"):
            built()(tokens(), tokens(), skip=skip)


class TestTrellis:
    @pytest.mark.parametrize("explicit", [None, Explicit(depth=9)])
    def test_the_head_reads_the_last_channels_of_h(self, explicit):
        model = built(LanguageConfig(cell=TRELLIS, explicit=explicit, std=0.5)).eval()
        ids, targets = tokens(), tokens()
        out = model(ids, targets)
        logits, memory = model.logits(ids)
        h = out.layer.z[..., 10:18]
        assert out.layer.z.shape == (B, T, 36)
        assert torch.equal(out.layer.output, h)
        torch.testing.assert_close(logits, torch.nn.functional.linear(h, model.embedding.weight, model.head.bias))
        torch.testing.assert_close(model.logits(ids, last=True)[0], logits[:, -1:])
        again = model(ids, targets, memory)
        assert not torch.allclose(again.nll, out.nll)

    def test_generates(self):
        model = built(LanguageConfig(cell=TRELLIS, std=0.5), method=Method(Anderson(), Stop(rtol=1e-6, max_evals=60)))
        assert model.generate(tokens(), length=4).shape == (B, 4)

    def test_an_untied_head_or_a_mixture_reads_as_many_outputs_as_there_are(self):
        cell = dataclasses.replace(TRELLIS, outputs=5)
        mixture = built(LanguageConfig(cell=cell, mixture=MixtureConfig(experts=2)))
        untied = built(LanguageConfig(cell=cell, tied=False))
        clusters = built(LanguageConfig(cell=cell, tied=False, adaptive=AdaptiveConfig(cutoffs=(4,), division=2)))
        for model in (mixture, untied, clusters):
            model(tokens(), tokens()).nll.mean().backward()
            assert all(p.grad is not None for p in model.parameters())
        assert untied.head.weight.shape == (V, 5)

    def test_every_option_at_once(self):
        config = LanguageConfig(
            cell=dataclasses.replace(TRELLIS, dropout=0.2, weight_dropout=0.3),
            explicit=Explicit(depth=6, auxiliary_every=2, checkpoint=True),
            mixture=MixtureConfig(experts=3, dropout=0.2),
            dropout=0.3,
            input_dropout=0.2,
            word_dropout=0.1,
            scaled=False,
            init="uniform",
            std=0.1,
            losses=ExtraLosses(activation=2, temporal_activation=1, auxiliary=0.05),
        )
        model = built(config)
        out = model(tokens(), tokens(), model(tokens(), tokens()).memory, skip=2)
        (out.nll.mean() + out.extra).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


class TestRefused:
    """In one sentence each."""

    narrow = dataclasses.replace(TRELLIS, outputs=5)

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"adaptive": AdaptiveConfig(cutoffs=(4,)), "mixture": MixtureConfig()}, "give one of the two"),
            ({"cell": narrow}, r"width 8 with 5 outputs.*tied=False or a MixtureConfig"),
            ({"cell": narrow, "adaptive": AdaptiveConfig(cutoffs=(4,))}, "width 8 with 5 outputs"),
        ],
    )
    def test_configurations(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            LanguageConfig(**fields)

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"explicit": Explicit(tied=False, memory="layers")}, "a TrellisNet is weight-tied.*give tied=True"),
            ({"losses": ExtraLosses(auxiliary=0.1)}, r"auxiliary=0\.1.*auxiliary_every"),
            ({"losses": ExtraLosses(auxiliary=0.1), "explicit": Explicit()}, r"auxiliary=0\.1.*auxiliary_every"),
            ({"word_dropout": 1.0}, r"word_dropout=1\.0"),
            ({"input_dropout": 1.0}, r"dropout=1\.0"),
        ],
    )
    def test_models(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            built(LanguageConfig(cell=TRELLIS, **fields))

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"auxiliary_every": -1}, r"depth=12, auxiliary_every=-1.*1 … 12"),
            ({"auxiliary_every": 13}, r"depth=12, auxiliary_every=13.*1 … 12"),
            ({"auxiliary_every": 3, "memory": "layers"}, r"auxiliary_every=3, memory='layers'.*give memory='last'"),
            ({"auxiliary_every": 3, "memory": "layers", "tied": False}, r"only a weight-tied"),
        ],
    )
    def test_explicit_networks(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            Explicit(**fields)


@pytest.mark.parametrize(
    "explicit", [Explicit(depth=2), Explicit(depth=2, tied=False, memory="layers")], ids=["Unrolled", "Stack"]
)
def test_an_explicit_network_has_no_use_for_a_method(explicit):
    config = dataclasses.replace(CONFIG, explicit=explicit)
    with pytest.raises(ValueError, match=r"build\(method=…\): an explicit network solves nothing"):
        config.build(V, method=METHOD)
    with pytest.raises(TypeError, match=r"(Unrolled|Stack) solves nothing, so it has no use for method="):
        built(config)(tokens(), tokens(), method=METHOD)


def test_a_method_given_to_a_call_is_the_one_that_solves():
    """In training and in evaluation, where it goes before the stop of evaluation; the layer stays as it is."""
    model, ids = built(eval_stop=Stop(rtol=0, atol=0, max_evals=3)), tokens()
    four = Method(Picard(), Stop(rtol=0, atol=0, max_evals=5, best=False), Unroll())
    for training in (True, False):
        out = model.train(training)(ids, ids, method=four)
        z = torch.zeros_like(out.layer.z)
        for _ in range(4):
            z = out.layer.f(z)
        assert torch.equal(out.layer.z, z)
    assert model.layer.method == METHOD


def test_every_parameter_gets_a_gradient():
    model = built(dataclasses.replace(CONFIG, dropout=0.1, tied=False))
    memory = None
    for _ in range(2):
        out = model(tokens(), tokens(), memory)
        memory = out.memory
    out.nll.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_memory_carries_the_past():
    model = built(dataclasses.replace(CONFIG, std=1.0)).double().eval()
    with torch.no_grad():
        model.layer.cell.inject.direction.mul_(100)  # a strong input makes a fresh cell a contraction
    tight = Method(Anderson(), Stop(rtol=1e-13, atol=1e-13, max_evals=100), Implicit())
    ids, targets = tokens(8), tokens(8)
    joint = model(ids, targets, method=tight).nll
    first = model(ids[:, :5], targets[:, :5], method=tight)
    second = model(ids[:, 5:], targets[:, 5:], first.memory, method=tight)
    torch.testing.assert_close(torch.cat([first.nll, second.nll], dim=1), joint, rtol=0, atol=1e-10)


def test_evaluation_has_its_own_stop():
    model = built(eval_stop=Stop(rtol=0, atol=0, max_evals=3))
    assert (model.eval()(tokens(), tokens()).solution.steps == 2).all()
    assert (model.train()(tokens(), tokens()).solution.steps > 2).all()


def test_a_stack_is_a_layer_too():
    stack = Stack([CELL.build() for _ in range(2)])
    sizes = {"width": 16, "vocabulary_size": V}
    model = LanguageModel(Embedding(**sizes), stack, SoftmaxHead(**sizes))
    out = model(tokens(), tokens())
    again = model(tokens(), tokens(), out.memory)
    assert out.solution is None
    assert len(again.memory) == 2


def test_learns():
    """A weight-tied network of three layers learns to count in some steps."""
    model = built(
        dataclasses.replace(CONFIG, std=0.1),
        method=Method(Picard(), Stop(rtol=0, atol=0, max_evals=4, best=False), Unroll()),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = (torch.arange(T + 1) + torch.arange(B)[:, None]) % V
    for _ in range(60):
        optimiser.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).nll.mean()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1


class TestParameters:
    """Counts of MODELS: they are those of the weights as f sees them; each normed row has a gain besides."""

    copying = LanguageConfig(cell=TransformerConfig(width=32, heads=4, inner=76, memory=0), tied=False)

    def count(self, config, vocabulary_size):
        model = config.build(vocabulary_size)
        gains = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gain"))
        return sum(parameter.numel() for parameter in model.parameters()), gains

    def test_copying(self):
        assert self.count(self.copying, 10) == (14_006 + 268, 268)
        plain = dataclasses.replace(self.copying, cell=dataclasses.replace(self.copying.cell, weight_norm=False))
        assert self.count(plain, 10) == (14_006, 0)

    def test_the_model_is_an_equilibrium(self):
        model = built()
        assert isinstance(model.layer, Equilibrium)
        assert model.vocabulary_size == V


@pytest.mark.parametrize("make", [Embedding, SoftmaxHead])
def test_refuses_a_rate_that_leaves_nothing(make):
    with pytest.raises(ValueError, match=r"dropout=1\.0"):
        make(width=4, vocabulary_size=3, dropout=1.0)
