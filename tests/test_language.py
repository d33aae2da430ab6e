from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch.nn import functional

from equilibria import Anderson, Equilibrium, Implicit, Picard, Stack, Stop, Unroll
from equilibria.cells import TransformerShape
from equilibria.language import Embedding, LanguageModel, LanguageShape, SoftmaxHead

CELL = TransformerShape(width=16, heads=2, inner=24, memory=8)
SHAPE = LanguageShape(cell=CELL)
V, B, T = 11, 3, 6


def built(shape=SHAPE, **choices):
    choices = {"solver": Anderson(), "stop": Stop(max_evals=12), "gradient": Implicit()} | choices
    return shape.build(V, **choices)


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


def test_nats_are_the_cross_entropy_of_the_logits():
    model = built()
    ids, targets = tokens(), tokens()
    out = model(ids, targets)
    logits, _ = model.logits(ids)
    assert out.nats.shape == (B, T)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    torch.testing.assert_close(out.nats, expected)
    torch.testing.assert_close(model.read(out.layer.z), logits)
    assert out.solution is out.layer.solution


def test_nats_are_computed_in_float32_at_least():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out = built().to(dtype)(tokens(), tokens())
        assert out.nats.dtype == expected
        assert torch.isfinite(out.nats).all()


def test_a_fresh_model_knows_nothing():
    assert abs(float(built()(tokens(), tokens()).nats.mean().detach()) - math.log(V)) < 0.2


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
        model(unused, torch.zeros_like(unused)).nats.mean().backward()
        assert (model.embedding.weight.grad.abs().amax(dim=1) > 0).all()

    def test_untied(self):
        model = built(dataclasses.replace(SHAPE, tied=False))
        assert model.head.weight.shape == model.embedding.weight.shape
        assert model.head.weight is not model.embedding.weight


def test_output_dropout_is_by_channel():
    head = SoftmaxHead(width=16, vocabulary_size=16, tied=False, dropout=0.5)
    with torch.no_grad():
        head.weight.copy_(torch.eye(16))
    out = head.train()(torch.ones(B, T, 16), Embedding(vocabulary_size=16, width=16))
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_every_parameter_gets_a_gradient():
    model = built(dataclasses.replace(SHAPE, dropout=0.1, tied=False))
    memory = None
    for _ in range(2):
        out = model(tokens(), tokens(), memory)
        memory = out.memory
    out.nats.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_memory_carries_the_past():
    model = built(dataclasses.replace(SHAPE, std=1.0)).double().eval()
    with torch.no_grad():
        model.layer.cell.inject.direction.mul_(100)  # a strong input makes a fresh cell a contraction
    model.layer.stop = Stop(rtol=1e-13, atol=1e-13, max_evals=100)
    ids, targets = tokens(8), tokens(8)
    joint = model(ids, targets).nats
    first = model(ids[:, :5], targets[:, :5])
    second = model(ids[:, 5:], targets[:, 5:], first.memory)
    torch.testing.assert_close(torch.cat([first.nats, second.nats], dim=1), joint, rtol=0, atol=1e-10)


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
        dataclasses.replace(SHAPE, std=0.1),
        solver=Picard(),
        stop=Stop(rtol=0, atol=0, max_evals=4, best=False),
        gradient=Unroll(),
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = (torch.arange(T + 1) + torch.arange(B)[:, None]) % V
    for _ in range(60):
        optimiser.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).nats.mean()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1


class TestParameters:
    """Counts of MODELS: they are those of the weights as f sees them; each normed row has a gain besides."""

    copying = LanguageShape(cell=TransformerShape(width=32, heads=4, inner=76, memory=0), tied=False)

    def count(self, shape, vocabulary_size):
        model = shape.build(vocabulary_size, solver=Anderson(), stop=Stop(), gradient=Implicit())
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
