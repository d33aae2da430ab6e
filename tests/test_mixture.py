from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from equilibria.cells import TrellisConfig
from equilibria.layers.dropout import BatchSlice
from equilibria.lm.model import (
    Embedding,
    Explicit,
    ExtraLosses,
    LanguageConfig,
    MixtureConfig,
    MixtureHead,
    SoftmaxHead,
)

V, D, O, K, B, T = 23, 6, 4, 3, 2, 5

either = pytest.mark.parametrize("tied", [True, False])


def built(tied=True, **choices):
    """Embedding and head in float64 with nothing at zero."""
    sizes = {"vocabulary_size": V, "width": O, "latent_width": D, "experts": K}
    embedding, head = Embedding(vocabulary_size=V, width=D), MixtureHead(tied=tied, **(sizes | choices))
    for parameter in (*embedding.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter, std=0.8)
    return embedding.double(), head.double()


def states(*size):
    return torch.randn(*(size or (B, T)), O, dtype=torch.float64)


@either
def test_is_the_equation(tied):
    """State by state and expert by expert, as it is written."""
    embedding, head = built(tied)
    h = states()
    table = embedding.weight if tied else head.weight
    out = head.logits(h, embedding)
    for b in range(B):
        for t in range(T):
            prior = (head.prior.weight @ h[b, t] + head.prior.bias).softmax(0)
            latents = (head.latent.weight @ h[b, t] + head.latent.bias).view(K, D).tanh()
            p = sum(prior[k] * (table @ latents[k] + head.bias).softmax(0) for k in range(K))
            torch.testing.assert_close(out[b, t], p.log())


@either
def test_probabilities_sum_to_one(tied):
    embedding, head = built(tied)
    sums = head.logits(states(), embedding).exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)


def test_nats_are_the_log_probabilities_of_the_targets():
    embedding, head = built()
    h, targets = states(), torch.randint(V, (B, T))
    expected = -head.logits(h, embedding).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(head.nll(h, targets, embedding), expected, rtol=0, atol=1e-12)


def test_equal_experts_are_one_softmax():
    embedding, head = built()
    with torch.no_grad():
        for parameter in (head.latent.weight, head.latent.bias):
            parameter.copy_(parameter[:D].repeat(K, *(1 for _ in parameter.shape[1:])))
    plain = SoftmaxHead(width=D, vocabulary_size=V).double()
    plain.bias.data.copy_(head.bias.detach())
    h, targets = states(), torch.randint(V, (B, T))
    one = torch.nn.functional.linear(h, head.latent.weight[:D], head.latent.bias[:D]).tanh()
    torch.testing.assert_close(head.nll(h, targets, embedding), plain.nll(one, targets, embedding))


def test_is_no_softmax_of_low_rank():
    """What the mixture is for: the logits of a softmax have a rank of at most its width + 1, bias included."""
    embedding, head = built(latent_width=2, experts=4, tied=False)
    with torch.no_grad():
        head.prior.weight.mul_(4)
        head.latent.weight.mul_(4)
    log_p = head.logits(states(1, 200), embedding)[0]
    centred = log_p - log_p.mean(dim=1, keepdim=True)
    assert torch.linalg.matrix_rank(centred, rtol=1e-6) > 10
    plain = SoftmaxHead(width=2, vocabulary_size=V, tied=False).double()
    torch.nn.init.normal_(plain.weight)
    logits = plain.logits(torch.randn(1, 200, 2, dtype=torch.float64), embedding)[0]
    assert torch.linalg.matrix_rank(logits - logits.mean(dim=1, keepdim=True), rtol=1e-6) <= 3


@either
def test_gradients(tied):
    embedding, head = built(tied)
    h, targets = states(1, 3).requires_grad_(), torch.randint(V, (1, 3))
    inputs = (h, *(embedding.parameters() if tied else ()), *head.parameters())
    assert torch.autograd.gradcheck(lambda *_: head.nll(h, targets, embedding), inputs)


class TestPrecision:
    def test_is_float32_at_least(self):
        embedding, head = built()
        h, targets = states(), torch.randint(V, (B, T))
        exact = head.nll(h, targets, embedding)
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            small, low = copy.deepcopy(embedding).to(dtype), copy.deepcopy(head).to(dtype)
            nats, log_p = low.nll(h.to(dtype), targets, small), low.logits(h.to(dtype), small)
            assert nats.dtype == log_p.dtype == expected
            sums = log_p.exp().sum(-1)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
            torch.testing.assert_close(nats.double(), exact, rtol=0.1, atol=0.2)

    def test_autocast(self):
        embedding, head = built()
        embedding, head = embedding.float(), head.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nats = head.nll(states().float(), torch.randint(V, (B, T)), embedding)
        nats.mean().backward()
        assert nats.dtype == torch.float32
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())

    def test_an_impossible_word_costs_what_it_costs(self):
        """log(p + 1e-8) would stop at 18.4 nats, with a gradient of nothing."""
        embedding, head = built()
        with torch.no_grad():
            head.bias[0] = -100
        h, targets = states(), torch.zeros(B, T, dtype=torch.long)
        nats = head.nll(h, targets, embedding)
        assert (nats > 50).all()
        nats.sum().backward()
        assert abs(float(head.bias.grad[0]) + B * T) < 1e-6


class TestDropout:
    def test_of_the_states_is_a_step_before(self):
        embedding, head = built(dropout=0.5)
        h = torch.ones(B, T, O, dtype=torch.float64)
        out = head.train().dropped(h)
        assert torch.equal(out, out[:, :1].expand_as(out))
        assert set(out.unique().tolist()) == {0.0, 2.0}
        assert head.eval().dropped(h) is h
        assert torch.equal(head.train().logits(h, embedding), head.logits(h, embedding))

    def test_of_the_latents_is_the_same_at_all_positions_and_each_experts_own(self):
        embedding, head = built(latent_dropout=0.5)
        h = states(1, 1).expand(64, T, O)
        out = head.train().logits(h, embedding)
        assert torch.equal(out, out[:, :1].expand_as(out))
        assert len(out[:, 0].detach().unique(dim=0)) > 60
        every = head.eval().logits(h, embedding)
        torch.testing.assert_close(every, every[:1, :1].expand_as(every))
        torch.manual_seed(1)
        mixed = head.train().logits(h[:1, :1], embedding)[0, 0]
        torch.manual_seed(1)
        mask = torch.empty(1, 1, K * D, dtype=torch.float64).bernoulli_(0.5).div_(0.5)[0, 0]
        latents = ((head.latent.weight @ h[0, 0] + head.latent.bias) * mask).view(K, D).tanh()
        prior = (head.prior.weight @ h[0, 0] + head.prior.bias).softmax(0)
        expected = (prior[:, None] * (latents @ embedding.weight.T + head.bias).softmax(-1)).sum(0).log()
        torch.testing.assert_close(mixed, expected)


class TestConfig:
    cell = TrellisConfig(width=D, hidden=5, outputs=O)

    def model(self, mixture, **fields):
        return LanguageConfig(cell=self.cell, mixture=mixture, **fields).build(V)

    def test_parameters(self):
        model = self.model(MixtureConfig(experts=K))
        names = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("layer")}
        assert names == {
            "embedding.weight": (V, D),
            "head.prior.weight": (K, O),
            "head.prior.bias": (K,),
            "head.latent.weight": (K * D, O),
            "head.latent.bias": (K * D,),
            "head.bias": (V,),
        }
        untied = self.model(MixtureConfig(experts=K, width=7), tied=False)
        assert untied.head.weight.shape == (V, 7)
        assert untied.head.latent.weight.shape == (K * 7, O)

    def test_learns(self):
        model = self.model(MixtureConfig(experts=2), std=0.3)
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-2)
        ids = (torch.arange(T + 1) + torch.arange(B)[:, None]) % V
        losses = []
        for _ in range(100):
            optimiser.zero_grad()
            loss = model(ids[:, :-1], ids[:, 1:]).nll.mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[0] > 0.8 * math.log(V)
        assert losses[-1] < 0.3

    def test_generates_from_log_probabilities(self):
        model = self.model(MixtureConfig(experts=K))
        logits, _ = model.eval().logits(torch.randint(V, (B, T)))
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(B, T))
        assert model.generate(torch.randint(V, (B, T)), length=3).shape == (B, 3)

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"experts": 0}, r"experts=0.*at least one expert"),
            ({"width": 0}, r"width=0.*at least 1, or None"),
            ({"dropout": 1.0}, r"MixtureConfig\(dropout=1\.0"),
        ],
    )
    def test_refuses(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            MixtureConfig(**fields)

    def test_refuses_a_tied_table_of_another_width(self):
        with pytest.raises(ValueError, match=r"width=7\) tied to an embedding of width 6.*tied=False"):
            self.model(MixtureConfig(width=7))
        assert self.model(MixtureConfig(width=D)).head.weight is None

    def test_refuses_dropout_that_is_none(self, unhooked):
        with pytest.raises(ValueError, match=r"latent_dropout=1\.0"):
            built(latent_dropout=1.0)
        with pytest.raises(ValueError, match=r"MixtureHead\(output_dropout='row'"):
            built(output_dropout="row")

    def test_is_frozen_and_says_what_it_is(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            MixtureConfig().experts = 2
        assert "experts=3, tied=True" in repr(built()[1])


@pytest.mark.parametrize("auxiliary", [0, 1])
def test_parts_of_a_batch_drop_what_the_whole_batch_drops(auxiliary):
    """The latents' masks too, in the loss and in the auxiliary losses."""
    torch.manual_seed(0)
    mixture = MixtureConfig(experts=K, dropout=0.5)
    explicit = Explicit(depth=2, auxiliary_every=auxiliary)
    losses = ExtraLosses(auxiliary=float(auxiliary))
    cell = TrellisConfig(width=D, hidden=2, outputs=O)
    config = LanguageConfig(cell=cell, explicit=explicit, mixture=mixture, losses=losses, dropout=0.2, std=0.5)
    model, ids = config.build(V).double(), torch.randint(V, (4, T))

    def read(first, count, part):
        torch.manual_seed(1)
        mine = ids[first : first + count]
        found = model(mine, mine, part=part)
        return found.nll, found.extra

    whole = read(0, 4, None)
    parts = [read(first, 2, BatchSlice(first=first, total=4)) for first in (0, 2)]
    torch.testing.assert_close(torch.cat([nll for nll, _ in parts]), whole[0])
    if auxiliary:
        torch.testing.assert_close(torch.stack([extra for _, extra in parts]).mean(), whole[1])
