from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria.lm.model import (
    AdaptiveConfig,
    AdaptiveHead,
    Embedding,
    SoftmaxHead,
    TiedAdaptiveHead,
    UntiedAdaptiveHead,
)
from equilibria.lm.model.tables import dropped

V, D, B, T = 23, 12, 3, 7
CONFIGS = {
    "published": AdaptiveConfig(cutoffs=(5, 9, 16), division=2),
    "wider": AdaptiveConfig(cutoffs=(5, 9, 16), division=2, width=20),
    "narrower": AdaptiveConfig(cutoffs=(1, 2), division=3, width=9),
    "floored": AdaptiveConfig(cutoffs=(8, 22), division=3, width=11),
    "one table": AdaptiveConfig(cutoffs=(5, 9), division=1),
    "one projection": AdaptiveConfig(cutoffs=(5, 9), division=1, width=7),
}
WIKITEXT = AdaptiveConfig(cutoffs=(20_000, 40_000, 200_000), division=4, width=700)

every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
either = pytest.mark.parametrize("tied", [True, False])


def built(config, tied=True, **choices):
    """Embedding and head in float64 with nothing at zero, so that no term can be forgotten unseen."""
    embedding, head = config.build(V, width=D, tied=tied, **choices)
    for parameter in (*embedding.parameters(), *head.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return embedding.double(), head.double()


def states(*size):
    return torch.randn(*(size or (B, T)), D, dtype=torch.float64)


def tokens():
    return torch.randint(V, (B, T))


def clusters(config, size=V):
    """First and end of each."""
    bounds = (0, *config.cutoffs, size)
    return list(itertools.pairwise(bounds))


def dense(config, embedding, head, h):
    """The tied log-probabilities of one state, word by word, as the equations are written."""
    tables, projections = list(embedding.tables), list(embedding.projections)
    if len(tables) == 1:
        tables = [tables[0][first:end] for first, end in clusters(config)]
        projections = projections * len(tables)
    reads = [head.projection, *projections[1:]] if projections else [torch.eye(D, dtype=h.dtype)] * len(tables)
    logits = [tables[i] @ (reads[i].T @ h) + head.bias[first:end] for i, (first, end) in enumerate(clusters(config))]
    slots = head.slot_weight @ (reads[0].T @ h) + head.slot_bias
    total = torch.cat([logits[0], slots]).logsumexp(0)
    tails = [slots[i] - total + (rare - rare.logsumexp(0)) for i, rare in enumerate(logits[1:])]
    return torch.cat([logits[0] - total, *tails])


class TestHead:
    @every
    @either
    def test_probabilities_sum_to_one(self, config, tied):
        embedding, head = built(config, tied)
        sums = head.logits(states(), embedding).exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)

    @every
    @either
    def test_nats_are_in_the_order_of_the_tokens(self, config, tied):
        embedding, head = built(config, tied)
        h, targets = states(), tokens()
        expected = -head.logits(h, embedding).gather(-1, targets[..., None]).squeeze(-1)
        nats = head.nll(h, targets, embedding)
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-12)
        order = torch.randperm(T)
        torch.testing.assert_close(
            head.nll(h[:, order], targets[:, order], embedding), nats[:, order], rtol=0, atol=1e-12
        )

    @every
    def test_tied_is_the_equation(self, config):
        embedding, head = built(config)
        h = states(1, 2)
        out = head.logits(h, embedding)
        for position in range(2):
            torch.testing.assert_close(out[0, position], dense(config, embedding, head, h[0, position]))

    def test_clusters_of_one_word_are_a_plain_softmax(self):
        embedding, head = built(AdaptiveConfig(cutoffs=(V - 2, V - 1), division=1))
        plain = SoftmaxHead(width=D, vocabulary_size=V, tied=False).double()
        with torch.no_grad():
            plain.weight.copy_(torch.cat([embedding.tables[0][: V - 2], head.slot_weight]))
            plain.bias.copy_(torch.cat([head.bias[: V - 2], head.slot_bias]))
        h, targets = states(), tokens()
        nothing = Embedding(vocabulary_size=V, width=D)
        torch.testing.assert_close(head.nll(h, targets, embedding), plain.nll(h, targets, nothing))

    def test_untied_is_torchs(self):
        embedding, head = built(CONFIGS["published"], tied=False)
        h, targets = states(), tokens()
        flat = h.flatten(0, 1)
        torch.testing.assert_close(
            head.nll(h, targets, embedding).flatten(), -head.softmax(flat, targets.flatten()).output
        )
        torch.testing.assert_close(head.logits(h, embedding).flatten(0, 1), head.softmax.log_prob(flat))

    @pytest.mark.parametrize("name", ["published", "one table", "one projection"])
    def test_gradients_of_nats(self, name):
        embedding, head = built(CONFIGS[name])
        h, targets = states(1, 5).requires_grad_(), torch.tensor([[22, 0, 7, 20, 5]])
        inputs = (h, *embedding.parameters(), *head.parameters())
        assert torch.autograd.gradcheck(lambda *_: head.nll(h, targets, embedding), inputs)

    @pytest.mark.parametrize("config", [CONFIGS["published"], CONFIGS["one projection"]])
    @either
    @pytest.mark.parametrize("word", [0, 6, V - 1])
    def test_a_cluster_without_target_gets_gradient_zero(self, config, tied, word):
        embedding, head = built(config, tied)
        ids = torch.full((B, T), word)
        head.nll(embedding(ids), ids, embedding).mean().backward()
        for name, parameter in (*embedding.named_parameters(), *head.named_parameters()):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        if not tied:
            used = [bool(tail[1].weight.grad.any()) for tail in head.softmax.tail]
            assert used == [first <= word < end for first, end in clusters(config)[1:]]

    @either
    def test_log_softmax_is_in_float32_at_least(self, tied):
        embedding, head = built(CONFIGS["published"], tied)
        h, targets = states(), tokens()
        exact = head.nll(h, targets, embedding)
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            small, low = copy.deepcopy(embedding).to(dtype), copy.deepcopy(head).to(dtype)
            assert low.logits(h.to(dtype), small).dtype == expected
            assert low.nll(h.to(dtype), targets, small).dtype == expected
        sums = head.bfloat16().logits(h.bfloat16(), embedding.bfloat16()).exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)  # 4e-3 would be bfloat16's
        nats = head.nll(h.bfloat16(), targets, embedding)
        torch.testing.assert_close(nats, exact.float(), rtol=0.05, atol=0.2)

    @either
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast(self, tied, dtype):
        embedding, head = built(CONFIGS["published"], tied)
        embedding, head = embedding.float(), head.float()
        ids, targets = tokens(), tokens()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = embedding(ids).to(dtype)
            nats = head.nll(h, targets, embedding)
            sums = head.logits(h, embedding).exp().sum(-1)
        nats.mean().backward()
        assert nats.dtype == torch.float32
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
        assert all(parameter.grad is not None for parameter in (*embedding.parameters(), *head.parameters()))

    @pytest.mark.gpu
    @either
    def test_cuda_gives_the_same(self, tied):
        embedding, head = built(CONFIGS["published"], tied)
        ids = tokens() % 9  # two clusters stay empty
        expected = head.nll(embedding(ids), ids, embedding).detach()
        embedding, head, ids = embedding.cuda(), head.cuda(), ids.cuda()
        nats = head.nll(embedding(ids), ids, embedding)
        torch.testing.assert_close(nats.detach().cpu(), expected)
        embedding, head = embedding.float(), head.float()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            nats = head.nll(embedding(ids), ids, embedding)
        nats.mean().backward()
        torch.testing.assert_close(nats.detach().cpu(), expected.float(), rtol=0.1, atol=0.5)

    def test_words_outside_the_vocabulary_are_refused(self):
        embedding, head = built(CONFIGS["published"])
        for word in (-1, V):
            ids = torch.full((B, T), word)
            with pytest.raises(IndexError):
                embedding(ids)
            with pytest.raises(IndexError):
                head.nll(states(), ids, embedding)


class TestEmbedding:
    @every
    def test_is_the_projected_row_of_the_cluster(self, config):
        embedding, _ = built(config)
        ids = torch.randperm(V)[None]
        out = embedding(ids)
        for position, word in enumerate(ids[0].tolist()):
            cluster = max(i for i, (first, _) in enumerate(clusters(config)) if first <= word)
            if len(embedding.tables) == 1:
                row = embedding.tables[0][word]
                row = embedding.projections[0] @ row if len(embedding.projections) else row
            else:
                row = embedding.projections[cluster] @ embedding.tables[cluster][word - clusters(config)[cluster][0]]
            torch.testing.assert_close(out[0, position], row * D**0.5)

    def test_widths_are_floored_and_cluster_zero_is_projected_too(self):
        embedding, _ = built(CONFIGS["floored"])
        assert [tuple(table.shape) for table in embedding.tables] == [(8, 11), (14, 3), (1, 1)]
        assert [tuple(projection.shape) for projection in embedding.projections] == [(D, 11), (D, 3), (D, 1)]
        same, _ = built(CONFIGS["published"])
        assert same.projections[0].shape == (D, D)
        assert [len(built(CONFIGS[name])[0].projections) for name in ("one table", "one projection")] == [0, 1]
        assert same.vocabulary_size == Embedding(vocabulary_size=V, width=D).vocabulary_size == V

    def test_drops_whole_channels(self):
        embedding, _ = built(CONFIGS["published"], dropout=0.5)
        ids = tokens()
        out, full = embedding.train()(ids), embedding.eval()(ids)
        lost = (out == 0).all(dim=1)
        assert torch.equal(lost, (out == 0).any(dim=1))
        assert 0 < lost.sum() < lost.numel()
        torch.testing.assert_close(out, full * 2 * ~lost[:, None])

    def test_gradients(self):
        embedding, _ = built(CONFIGS["published"])
        ids = torch.tensor([[22, 0, 7, 20, 5]])
        assert torch.autograd.gradcheck(lambda *_: embedding(ids), tuple(embedding.parameters()))

    @every
    def test_drops_whole_words(self, config):
        embedding, _ = built(config, word_dropout=0.5)
        ids = torch.randperm(V).repeat(B, 2)
        out, full = embedding.train()(ids), embedding.eval()(ids)
        lost = (out == 0).all(dim=2)
        assert 0 < lost[0].sum() < 2 * V
        assert torch.equal(lost, lost[0, :V].repeat(B, 2))
        torch.testing.assert_close(out, full * 2 * ~lost[..., None])

    @every
    def test_is_not_scaled_where_that_is_said(self, config):
        embedding, _ = built(config)
        plain, _ = built(config, scaled=False)
        plain.load_state_dict(embedding.state_dict())
        ids = tokens()
        torch.testing.assert_close(plain(ids) * D**0.5, embedding(ids))

    @either
    def test_uniform_start(self, tied):
        config = AdaptiveConfig(cutoffs=(500, 900), division=2, projection_std=3.0)
        embedding, head = config.build(2_000, width=32, tied=tied, std=0.1 / 3**0.5, init="uniform")
        for name, parameter in (*embedding.named_parameters(), *head.named_parameters()):
            largest = float(parameter.detach().abs().max())
            if "bias" in name:
                continue
            if "projection" in name or name.endswith(".0.weight"):
                assert largest > 3, name
            else:
                assert 0.08 < largest <= 0.1, name


class TestSplitCrossEntropy:
    """TrellisNet's loss on WikiText-103, as a special case."""

    config = AdaptiveConfig(cutoffs=(5, 9, 16), division=1, slot_std=0.0)

    def test_is_its_equation(self):
        """p(w) = p(slot of w's cluster)·p(w | cluster), rows of the embedding and one bias a word; nothing else."""
        embedding, head = built(self.config, scaled=False)
        assert [name for name, _ in embedding.named_parameters()] == ["tables.0"]
        assert sorted(name for name, _ in head.named_parameters()) == ["bias", "slot_bias", "slot_weight"]
        h = states(1, 4)
        table, bias = embedding.tables[0], head.bias
        first = torch.cat([h @ table[:5].T + bias[:5], h @ head.slot_weight.T + head.slot_bias], dim=-1).softmax(-1)
        expected = [first[..., :5]]
        for slot, (begin, end) in enumerate([(5, 9), (9, 16), (16, V)]):
            within = (h @ table[begin:end].T + bias[begin:end]).softmax(-1)
            expected.append(first[..., 5 + slot : 6 + slot] * within)
        expected = torch.cat(expected, dim=-1)
        torch.testing.assert_close(head.logits(h, embedding).exp(), expected)
        targets = torch.tensor([[0, 6, 15, V - 1]])
        torch.testing.assert_close(
            head.nll(h, targets, embedding), -expected.gather(-1, targets[..., None])[..., 0].log()
        )

    @pytest.mark.parametrize(("tied", "init"), [(True, "normal"), (True, "uniform"), (False, "uniform")])
    def test_slots_start_from_zero_and_the_rest_as_without(self, tied, init):
        heads = []
        for slot_std in (None, 0.0):
            torch.manual_seed(1)
            config = dataclasses.replace(self.config, slot_std=slot_std)
            embedding, head = config.build(V, width=D, tied=tied, init=init)
            slots, words = (
                (head.slot_weight, embedding.tables[0])
                if tied
                else (head.softmax.head.weight[5:], head.softmax.head.weight[:5])
            )
            heads.append((slots.detach(), words.detach()))
            assert all(p.requires_grad and p.is_leaf for p in head.parameters())
        assert heads[0][0].abs().min() > 0
        assert (heads[1][0] == 0).all()
        assert torch.equal(heads[0][1], heads[1][1])

    def test_slots_have_their_own_deviation(self):
        config = dataclasses.replace(self.config, slot_std=5.0)
        _, head = config.build(V, width=D, init="uniform", std=0.01)
        assert head.slot_weight.detach().std() > 2

    def test_has_the_parameters_of_the_published_model(self):
        config = dataclasses.replace(self.config, cutoffs=(2_800, 20_000, 76_000))
        with torch.device("meta"):
            embedding, head = config.build(267_735, width=512)
        assert sum(p.numel() for p in embedding.parameters()) == 267_735 * 512
        assert sum(p.numel() for p in head.parameters()) == 267_735 + 3 * 513


class TestTies:
    def test_names(self):
        embedding, head = built(CONFIGS["published"])
        assert list(embedding.state_dict()) == [f"{kind}.{i}" for kind in ("tables", "projections") for i in range(4)]
        assert sorted(head.state_dict()) == ["bias", "projection", "slot_bias", "slot_weight"]
        assert head.projection is not embedding.projections[0]
        assert built(CONFIGS["one table"])[1].projection is None
        assert built(CONFIGS["one projection"])[1].projection.shape == (D, 7)

    @pytest.mark.parametrize("tie", [*(f"tables.{i}" for i in range(4)), *(f"projections.{i}" for i in range(1, 4))])
    def test_a_step_on_one_parameter_moves_both_sides_once(self, tie):
        embedding, head = built(CONFIGS["published"])
        module = torch.nn.ModuleDict({"embedding": embedding, "head": head})
        assert len({id(p) for p in module.parameters()}) == len(list(module.parameters())) == 12
        for pair in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.float().double()):
            parameter = pair["embedding"].get_parameter(tie)
            h, every_word = states(1, 1), torch.arange(V)[None]
            vectors, out = pair["embedding"](every_word), pair["head"].logits(h, pair["embedding"])
            parameter.grad = torch.randn_like(parameter)
            value = parameter.detach().clone()
            torch.optim.SGD([parameter], lr=0.1).step()
            torch.testing.assert_close(parameter.detach(), value - 0.1 * parameter.grad)
            assert not torch.allclose(pair["embedding"](every_word), vectors)
            assert not torch.allclose(pair["head"].logits(h, pair["embedding"]), out)

    def test_the_first_projection_is_not_tied(self):
        embedding, head = built(CONFIGS["published"])
        h = states()
        out = head.logits(h, embedding)
        with torch.no_grad():
            embedding.projections[0].zero_()
        assert torch.equal(head.logits(h, embedding), out)

    @every
    @either
    def test_state_dict_carries_everything(self, config, tied):
        first, other = (torch.nn.ModuleList(built(config, tied)) for _ in range(2))
        h, targets = states(), tokens()
        expected = first[1].nll(h, targets, first[0])
        assert not torch.allclose(other[1].nll(h, targets, other[0]), expected)
        other.load_state_dict(first.state_dict())
        assert torch.equal(other[1].nll(h, targets, other[0]), expected)

    @either
    def test_initial_values(self, tied):
        embedding, head = dataclasses.replace(CONFIGS["published"], projection_std=3.0).build(V, width=D, tied=tied)
        for name, parameter in (*embedding.named_parameters(), *head.named_parameters()):
            projection = "projection" in name or name.endswith(".0.weight")
            expected = 0.0 if "bias" in name else 3.0 if projection else 0.01
            assert expected / 3 <= parameter.detach().square().mean().sqrt() <= expected * 3, name


class TestSizes:
    def test_wikitext_103(self):
        size = 267_735
        with torch.device("meta"):
            embedding, head = WIKITEXT.build(size, width=700)
        sizes, widths = [end - first for first, end in clusters(WIKITEXT, size)], [700, 175, 43, 10]
        tables, projections = sum(a * b for a, b in zip(sizes, widths, strict=True)), 700 * sum(widths)
        assert (tables, projections) == (25_057_350, 649_600)
        assert sum(table.numel() for table in embedding.tables) == tables
        assert sum(projection.numel() for projection in embedding.projections) == projections
        assert head.projection.numel() == 490_000
        assert head.bias.numel() == size
        assert head.slot_weight.numel() + head.slot_bias.numel() == 2_103
        assert sum(p.numel() for p in head.parameters()) == 490_000 + size + 2_103
        with torch.device("meta"):
            assert isinstance(WIKITEXT.build(size, width=700, tied=False)[1], UntiedAdaptiveHead)

    @either
    def test_nats_make_nothing_as_large_as_the_vocabulary(self, tied):
        """With 64 targets, an eighth of them rare, the largest tensor is the head's; [64, V] would be 13 times it."""
        size = 267_735
        embedding, head = dataclasses.replace(WIKITEXT, width=16, division=2).build(size, width=16, tied=tied)
        words = torch.randint(20_000, (64,))
        words[::16], words[4::32], words[5::32] = 30_000, 100_000, 250_000
        targets = words.view(4, 16)
        h = torch.randn(4, 16, 16, requires_grad=True)
        with Largest() as largest:
            head.nll(h, targets, embedding).mean().backward()
        assert largest.seen == 64 * 20_003
        with Largest() as largest:
            embedding(targets)
        assert largest.seen == 64 * 16

    def test_word_dropout_draws_one_number_a_word(self):
        """And copies no table, which would be 16 times as many."""
        size, ids = 100_000, torch.randint(100_000, (4, 16))
        config = AdaptiveConfig(cutoffs=(9, 99), division=2)
        clustered, _ = config.build(size, width=16, tied=True, word_dropout=0.1)
        for embedding in (clustered, Embedding(vocabulary_size=size, width=16, word_dropout=0.1)):
            with Largest() as largest:
                embedding.train()(ids)
            assert largest.seen == size


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation gives back, views and transposes aside."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.seen = max(self.seen, tensor.numel())
        return out


class TestOutputDropout:
    h = torch.arange(1.0, 1 + 4 * 50 * 40).view(4, 50, 40)

    def test_of_channels_and_of_tokens(self):
        for kind, dim in (("channel", 1), ("token", 2)):
            out = dropped(self.h, rate=0.5, training=True, kind=kind)
            lost = (out == 0).all(dim=dim, keepdim=True)
            torch.testing.assert_close(out, self.h * 2 * ~lost)
            assert 0.3 < lost.double().mean() < 0.7
            assert dropped(self.h, rate=0.5, training=False, kind=kind) is self.h

    @pytest.mark.parametrize("kind", ["channel", "token"])
    @pytest.mark.parametrize("head", ["plain", "tied", "untied"])
    def test_in_each_head(self, head, kind):
        drops = {"dropout": 0.5, "output_dropout": kind}
        if head == "plain":
            embedding, head = Embedding(vocabulary_size=V, width=D), SoftmaxHead(width=D, vocabulary_size=V, **drops)
        else:
            embedding, head = CONFIGS["published"].build(V, width=D, tied=head == "tied", std=0.5, **drops)
        h, targets = states().float(), tokens()
        torch.manual_seed(1)
        out = head.dropped(h)
        torch.manual_seed(1)
        assert torch.equal(out, dropped(h, rate=0.5, training=True, kind=kind))
        for call in (lambda h: head.logits(h, embedding), lambda h: head.nll(h, targets, embedding)):
            assert torch.equal(call(out), call(out))  # which is a step of its own, done before
            assert not torch.allclose(call(out), call(h))
        assert head.eval().dropped(h) is h

    def test_channel_is_the_default(self):
        _, head = CONFIGS["published"].build(V, width=D)
        assert head.output_dropout == SoftmaxHead(width=D, vocabulary_size=V).output_dropout == "channel"
        assert "output_dropout='channel'" in repr(head)


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"cutoffs": ()}, r"cutoffs=\(\)\).*at least one.*plain softmax"),
            ({"cutoffs": (0, 5)}, r"cutoffs=\(0, 5\).*at least 1"),
            ({"cutoffs": (5, 5)}, r"cutoffs=\(5, 5\).*larger than the one before"),
            ({"cutoffs": (9, 5)}, r"cutoffs=\(9, 5\).*larger than the one before"),
            ({"division": 0}, r"division=0.*at least 1; try 4"),
            ({"slot_std": -0.1}, r"slot_std=-0\.1.*at least 0"),
            ({"width": 0}, r"width of 0.*at least 1"),
            ({"width": 63}, r"⌊63/4\^3⌋ = 0.*smaller division"),
        ],
    )
    def test_of_the_configuration(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            AdaptiveConfig(**fields)

    def test_of_the_vocabulary(self):
        with pytest.raises(ValueError, match=r"vocabulary of 10000.*below the size.*plain softmax"):
            AdaptiveConfig().build(10_000, width=64)
        with pytest.raises(ValueError, match="vocabulary of 16"):
            CONFIGS["published"].build(16, width=D)
        assert CONFIGS["published"].build(17, width=D)[0].vocabulary_size == 17

    def test_of_the_width(self):
        AdaptiveConfig(width=None)
        with pytest.raises(ValueError, match="width of 7"):
            CONFIGS["published"].build(V, width=7)
        wide = dataclasses.replace(CONFIGS["published"], width=8)
        assert isinstance(wide.build(V, width=7)[1], TiedAdaptiveHead)
        with pytest.raises(ValueError, match="width of 7"):  # an untied head divides the model's width
            wide.build(V, width=7, tied=False)

    def test_of_the_dropout(self, unhooked):
        for tied in (True, False):
            with pytest.raises(ValueError, match=r"dropout=1\.0"):
                CONFIGS["published"].build(V, width=D, tied=tied, dropout=1.0)
            with pytest.raises(ValueError, match=r"word_dropout=1\.0"):
                CONFIGS["published"].build(V, width=D, tied=tied, word_dropout=1.0)
            with pytest.raises(ValueError, match=r"output_dropout='row'.*'channel'.*'token'"):
                CONFIGS["published"].build(V, width=D, tied=tied, output_dropout="row")
        with pytest.raises(ValueError, match="output_dropout='row'"):
            SoftmaxHead(width=D, vocabulary_size=V, output_dropout="row")

    def test_the_head_is_an_interface(self):
        with pytest.raises(TypeError, match="abstract"):
            AdaptiveHead(None)
