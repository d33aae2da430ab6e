from __future__ import annotations

import dataclasses

import pytest
import torch

from equilibria import Anderson, Implicit, Layer, LayerOutput, Method, Stop
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.core.maps import as_map
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

# Small models with random weights are solved here, and whether their solves converge is not the subject.
pytestmark = pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")

V, B, T, SKIP = 13, 3, 8, 3
CELL = TrellisConfig(width=6, hidden=7, outputs=6, std=0.3)
DEEP = LanguageConfig(
    cell=CELL, explicit=Explicit(depth=7, auxiliary_every=3), std=0.5, losses=ExtraLosses(auxiliary=0.25)
)


def built(config):
    method = Method(Anderson(), Stop(max_evals=20), Implicit()) if config.solves else None
    return config.build(V, method=method).double()


def tokens(time=T):
    return torch.randint(V, (B, time))


def outputs(model, ids, depth):
    """The last channels of h after each of ``depth`` layers from zero, without dropout."""
    prepared = model.layer.cell.prepare(model.embedding(ids), None)
    z, found = model.layer.cell.start(prepared), []
    for _ in range(depth):
        z = model.layer.cell(z, prepared)
        found.append(z[..., 7:13])
    return found


class TestOf:
    h = torch.randn(B, T, 4, generator=torch.Generator().manual_seed(5))
    kept = h * 2

    def test_activation_is_the_mean_square_after_dropout(self):
        expected = 2 * (self.kept**2).sum() / self.kept.numel()
        torch.testing.assert_close(ExtraLosses(activation=2).of(self.h, self.kept), expected)

    def test_temporal_activation_is_the_mean_square_of_changes_before_dropout(self):
        changes = [(self.h[b, t + 1] - self.h[b, t]) ** 2 for b in range(B) for t in range(T - 1)]
        expected = 3 * torch.stack(changes).mean()
        torch.testing.assert_close(ExtraLosses(temporal_activation=3).of(self.h, self.kept), expected)

    def test_auxiliary_losses_are_means_over_positions_summed_over_layers(self):
        nats = [torch.rand(B, T), torch.rand(B, T)]
        expected = 0.5 * (nats[0].mean() + nats[1].mean())
        torch.testing.assert_close(ExtraLosses(auxiliary=0.5).of(self.h, self.kept, nats), expected)

    def test_terms_are_added(self):
        nats = [torch.rand(B, T)]
        weights = {"activation": 2.0, "temporal_activation": 1.0, "auxiliary": 0.1}
        each = [ExtraLosses(**{name: weight}).of(self.h, self.kept, nats) for name, weight in weights.items()]
        torch.testing.assert_close(ExtraLosses(**weights).of(self.h, self.kept, nats), sum(each))

    def test_nothing_is_none(self):
        def never():
            raise AssertionError("an auxiliary loss without weight was computed")
            yield

        assert ExtraLosses().of(self.h, self.kept, never()) is None
        assert ExtraLosses(auxiliary=1).of(self.h, self.kept) is None
        assert ExtraLosses(temporal_activation=1).of(self.h[:, :1], self.kept[:, :1]) is None

    def test_one_position_has_no_change_and_no_nan(self):
        one = ExtraLosses(activation=1, temporal_activation=1).of(self.h[:, :1], self.kept[:, :1])
        torch.testing.assert_close(one, (self.kept[:, :1] ** 2).mean())

    def test_is_in_float32_at_least(self):
        big = torch.full((1, 2, 4), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
        out = ExtraLosses(activation=1).of(big, big)
        assert out.dtype == torch.float32
        assert float(out) == 90_000

    @pytest.mark.parametrize("name", ["activation", "temporal_activation", "auxiliary"])
    def test_refuses_a_weight_below_zero(self, name):
        with pytest.raises(ValueError, match=rf"ExtraLosses\({name}=-1.0\).*at least 0"):
            ExtraLosses(**{name: -1.0})


class TestModel:
    def test_auxiliary_losses_are_those_of_the_layers_in_between(self):
        """Layers 3 and 6 of 7: the loss of their outputs under the same head and targets, written out."""
        model, ids, targets = built(DEEP), tokens(), tokens()
        out = model(ids, targets)
        expected = 0
        for layer in (3, 6):
            h = outputs(model, ids, 7)[layer - 1]
            logits = h @ model.embedding.weight.T + model.head.bias
            expected += 0.25 * -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
        torch.testing.assert_close(out.extra, expected)

    @pytest.mark.parametrize(
        "head", [{}, {"adaptive": AdaptiveConfig(cutoffs=(4, 9), division=2)}, {"mixture": MixtureConfig(experts=2)}]
    )
    def test_of_every_head(self, head):
        model, ids, targets = built(dataclasses.replace(DEEP, **head)), tokens(), tokens()
        found = outputs(model, ids, 6)
        nats = [model.head.nll(found[layer - 1], targets, model.embedding) for layer in (3, 6)]
        torch.testing.assert_close(model(ids, targets).extra, 0.25 * sum(n.mean() for n in nats))

    @pytest.mark.parametrize("weights", [{"auxiliary": 0.25}, {"activation": 2.0}, {"temporal_activation": 1.0}])
    def test_skipped_positions_are_not_seen(self, weights):
        model = built(dataclasses.replace(DEEP, losses=ExtraLosses(**weights)))
        ids, targets = tokens(), tokens()
        out = model(ids, targets, skip=SKIP)
        found = [h[:, SKIP:] for h in outputs(model, ids, 7)]
        expected = {
            "auxiliary": lambda: (
                0.25 * sum(model.head.nll(found[i], targets[:, SKIP:], model.embedding).mean() for i in (2, 5))
            ),
            "activation": lambda: 2 * found[-1].square().mean(),
            "temporal_activation": lambda: (found[-1][:, 1:] - found[-1][:, :-1]).square().mean(),
        }[next(iter(weights))]()
        torch.testing.assert_close(out.extra, expected)
        assert not torch.allclose(model(ids, targets).extra, expected)

    def test_activation_is_of_the_dropped_output_and_its_change_of_the_whole_one(self):
        """With half of the channels dropped, the mean square doubles on average; the changes do not move."""
        config = LanguageConfig(cell=CELL, std=0.5, dropout=0.5, input_dropout=0.0)
        model = built(config)
        ids, targets = tokens(), tokens()
        h = model.eval()(ids, targets).layer.output
        model.train()
        model.losses = ExtraLosses(temporal_activation=1)
        torch.testing.assert_close(model(ids, targets).extra, h.diff(dim=1).square().mean())
        model.losses = ExtraLosses(activation=1)
        torch.manual_seed(2)
        extra = model(ids, targets).extra
        torch.manual_seed(2)
        kept = model.head.dropped(h)
        torch.testing.assert_close(extra, kept.square().mean())
        assert (kept == 0).any()

    def test_auxiliary_outputs_are_dropped_too_by_masks_of_their_own(self):
        config = dataclasses.replace(DEEP, dropout=0.5, input_dropout=0.0)
        model, ids, targets = built(config), tokens(), tokens()
        torch.manual_seed(2)
        extra = model(ids, targets).extra
        found = outputs(model, ids, 6)
        torch.manual_seed(2)
        model.head.dropped(found[0])  # the mask of the output itself
        nats = [model.head.nll(model.head.dropped(found[i]), targets, model.embedding) for i in (2, 5)]
        torch.testing.assert_close(extra, 0.25 * sum(n.mean() for n in nats))

    def test_training_only(self):
        config = dataclasses.replace(DEEP, losses=ExtraLosses(activation=1, temporal_activation=1, auxiliary=1))
        model = built(config)
        assert model(tokens(), tokens()).extra is not None
        assert model.eval()(tokens(), tokens()).extra is None

    def test_nothing_by_default(self):
        for config in (LanguageConfig(cell=CELL), LanguageConfig(cell=TransformerConfig(width=8, heads=2, inner=8))):
            assert built(config)(tokens(), tokens()).extra is None

    def test_the_nats_are_those_without(self):
        """The same masks are drawn for them, whatever is added."""
        config = dataclasses.replace(DEEP, dropout=0.3, word_dropout=0.2)
        ids, targets, found = tokens(), tokens(), []
        for losses in (ExtraLosses(), ExtraLosses(activation=2, temporal_activation=1, auxiliary=0.1)):
            torch.manual_seed(1)
            model = built(dataclasses.replace(config, losses=losses))
            found.append(model(ids, targets).nll)
        assert torch.equal(*found)

    def test_gradient_reaches_the_layers_in_between(self):
        """The gradient of the sum is the sum of the gradients; the auxiliary part is not nothing."""
        model, ids, targets = built(DEEP), tokens(), tokens()
        out = model(ids, targets)
        weight = model.layer.cell.state.direction
        (whole,) = torch.autograd.grad(out.nll.mean() + out.extra, weight, retain_graph=True)
        (main,) = torch.autograd.grad(out.nll.mean(), weight, retain_graph=True)
        (extra,) = torch.autograd.grad(out.extra, weight)
        torch.testing.assert_close(whole, main + extra)
        assert extra.norm() > 1e-3 * main.norm()

    def test_an_equilibrium_has_activation_losses_with_their_implicit_gradient(self):
        config = LanguageConfig(cell=CELL, std=0.5, losses=ExtraLosses(activation=2, temporal_activation=1))
        model = built(config)
        model(tokens(), tokens()).extra.backward()
        assert model.layer.cell.state.direction.grad.abs().sum() > 0
        assert model.head.bias.grad is None

    def test_a_layer_of_ones_own_gives_what_it_gives(self):
        class Own(Layer):
            def forward(self, x, memory=None, *, method=None):
                return LayerOutput(output=x, z=x, memory=None, f=as_map(lambda z: z), solution=None)

        sizes = {"width": 6, "vocabulary_size": V}
        model = LanguageModel(Embedding(**sizes), Own(), SoftmaxHead(**sizes), ExtraLosses(activation=1, auxiliary=1))
        ids = tokens()
        torch.testing.assert_close(model(ids, ids).extra, model.embedding(ids).square().mean())
