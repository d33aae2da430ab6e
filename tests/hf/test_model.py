"""Loss, gradient, weights and refusals of the model for transformers."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.parallel import scatter_gather
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from equilibria import Stop
from equilibria.hf import EquilibriumConfig, EquilibriumForCausalLM
from equilibria.hf.modeling import CACHE
from equilibria.lm.model import AdaptiveConfig, Explicit, ExtraLosses, LanguageConfig, MixtureConfig

from .models import BLOCK, CELLS, METHOD, VOCABULARY, configuration, contractive, small, tokens


def trainable(kind="transformer", **changes):
    torch.manual_seed(3)
    return contractive(EquilibriumForCausalLM(configuration(kind, **changes)).double())


HEADS = {
    "softmax": {},
    "untied": {"tied": False},
    "mixture": {"mixture": MixtureConfig(experts=3)},
    "adaptive": {"adaptive": AdaptiveConfig(cutoffs=(8, 20), division=2)},
    "extra losses": {"losses": ExtraLosses(activation=0.1, temporal_activation=0.2)},
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_are_those_of_the_library(kind, head):
    if kind != "transformer" and head != "softmax":
        pytest.skip("heads do not depend on the cell")
    model = trainable(kind, **HEADS[head])
    twin, text = copy.deepcopy(model.model), tokens(3, 9)
    found = model(text, labels=text)
    found.loss.backward()
    wanted = twin(text[:, :-1], text[:, 1:])
    wanted.loss.backward()
    assert_close(found.loss, wanted.loss, rtol=1e-10, atol=0)
    for (name, a), (_, b) in zip(model.model.named_parameters(), twin.named_parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["transformer", "chain", "trellis"])
def test_padded_training_has_the_gradient_of_the_rows_alone(kind, side):
    model, lengths = trainable(kind), (9, 4, 6)
    rows = [tokens(1, length, seed=length) for length in lengths]
    mask, labels = torch.zeros(3, 9, dtype=torch.long), torch.full((3, 9), -100)
    ids = torch.full((3, 9), model.config.pad_token_id)
    for row, text in enumerate(rows):
        place = slice(9 - text.shape[1], None) if side == "left" else slice(0, text.shape[1])
        ids[row, place], mask[row, place] = text[0], 1
        labels[row, place] = text[0]
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    count = sum(length - 1 for length in lengths)
    for text in rows:
        model(text, labels=text, num_items_in_batch=count).loss.backward()
    for a, b in zip(together, model.parameters(), strict=True):
        assert_close(a, b.grad, rtol=1e-6, atol=1e-9)


def test_embeddings_may_be_given_instead_of_tokens():
    model, text = small("transformer"), tokens(2, 5)
    with torch.no_grad():
        vectors = model.get_input_embeddings()(text)
        assert torch.equal(model(inputs_embeds=vectors).logits, model(text).logits)


def test_some_logits_and_hidden_states():
    model, text = small("transformer"), tokens(2, 5)
    with torch.no_grad():
        out = model(text, output_hidden_states=True)
        assert_close(model(text, logits_to_keep=2).logits, out.logits[:, -2:])
        assert_close(model(text, logits_to_keep=torch.tensor([0, 3])).logits, out.logits[:, [0, 3]])
    assert [states.shape for states in out.hidden_states] == [(2, 5, 16), (2, 5, 16)]
    assert out.converged.all()
    assert out.residual.shape == (2,)
    assert out.evals > 3
    assert isinstance(model(text, return_dict=False), tuple)


def test_a_tolerance_and_a_budget_per_call():
    model, text = small("transformer"), tokens(2, 5)
    with torch.no_grad():
        loose, tight = model(text, rtol=1e-2), model(text)
        assert loose.evals < tight.evals
        assert (loose.residual > 1e-6).all()
        quick = copy.deepcopy(model)
        quick.model.layer.method = dataclasses.replace(METHOD, on_failure="ignore")
        assert quick(text, max_evals=4).evals == 4
    assert model.model.layer.method == METHOD


def test_the_stop_of_evaluation_is_for_evaluation():
    config = EquilibriumConfig.of(LanguageConfig(BLOCK), VOCABULARY, method=METHOD, eval_stop=Stop(rtol=1e-2))
    torch.manual_seed(0)
    model = contractive(EquilibriumForCausalLM(config).double())
    text = tokens(1, 6)
    assert model.eval()(text).evals < model.train()(text).evals


@pytest.mark.parametrize("kind", CELLS)
def test_round_trip_to_the_same_bits(kind, tmp_path):
    model, text = small(kind), tokens(2, 6)
    model.save_pretrained(tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.suffix not in (".json", ".safetensors")]
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert found.dtype == torch.float64
    for (name, a), (_, b) in zip(model.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.decoded_language() == LanguageConfig(CELLS[kind])
    assert config.decoded_method() == METHOD
    with torch.no_grad():
        assert torch.equal(found.eval()(text).logits, model(text).logits)
    assert found.generation_config.eos_token_id == VOCABULARY


def test_a_missing_weight_is_initialised(tmp_path):
    model = small("transformer")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = "model.layer.cell.inner.direction", "model.layer.cell.attention.u"
    for name in gone:
        del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    spreads = set()
    for _ in range(2):
        found = EquilibriumForCausalLM.from_pretrained(tmp_path).state_dict()
        for name, value in found.items():
            assert value.isfinite().all()
            assert name in gone or torch.equal(value, weights[name])
        spreads.add(round(float(found[gone[0]].std()), 2))
        assert float(found[gone[0]].abs().max()) <= 0.25  # U(±1/√16)
        assert 0 < float(found[gone[1]].std()) < 0.1
    assert spreads <= {0.13, 0.14, 0.15, 0.16}


def test_a_folded_model_is_the_same(tmp_path):
    from equilibria.layers.linear import fold

    model, text = copy.deepcopy(small("chain")), tokens(2, 6)
    with torch.no_grad():
        wanted = model(text).logits
        fold(model.model)
        model.config.folded = True
        model.save_pretrained(tmp_path)
        found = EquilibriumForCausalLM.from_pretrained(tmp_path).eval()
        assert_close(found(text).logits, wanted, rtol=0, atol=1e-10)
    assert all("direction" not in name for name in found.state_dict())


def test_more_tokens(tmp_path):
    model, text = copy.deepcopy(small("transformer")), tokens(2, 6)
    with torch.no_grad():
        wanted = model(text).logits
        model.resize_token_embeddings(VOCABULARY + 4)
        found = model(text).logits
        assert found.shape[-1] == model.config.vocab_size == VOCABULARY + 4
        assert_close(found[..., :VOCABULARY], wanted[..., :VOCABULARY])
        assert (found[..., VOCABULARY].softmax(dim=-1) < 1).all()
        assert (found[..., VOCABULARY] == torch.finfo(found.dtype).min).all()
        assert torch.isfinite(model(torch.full((1, 2), VOCABULARY + 3)).logits).all()
        with pytest.raises(ValueError, match="none can be taken away"):
            model.resize_token_embeddings(VOCABULARY)
        unchanged = model.resize_token_embeddings(pad_to_multiple_of=2)
        assert (unchanged.num_embeddings, model.config.vocab_size) == (VOCABULARY + 4, VOCABULARY + 4)
        model.save_pretrained(tmp_path)  # the rows of the tables are told by the configuration
        again = EquilibriumForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(text).logits, found)
    adaptive = EquilibriumForCausalLM(configuration("transformer", **HEADS["adaptive"]))
    with pytest.raises(ValueError, match="divided into clusters"):
        adaptive.resize_token_embeddings(VOCABULARY + 4)


TEXT = torch.arange(6)[None]
REFUSED = {
    "an unknown argument": ({"mask": TEXT}, TypeError, "no argument mask"),
    "attentions": ({"output_attentions": True}, TypeError, "no argument output_attentions"),
    "a mask of pairs": ({"attention_mask": torch.ones(1, 1, 6, 6)}, ValueError, r"must be \[rows, 6\]"),
    "a mask of more rows": ({"attention_mask": torch.ones(2, 6)}, ValueError, "with 1 rows"),
    "a mask to add": ({"attention_mask": torch.tensor([[-1e9, 0, 0, 0, 0, 0]])}, ValueError, "attention_mask holds -1"),
    "a mask of packed texts": ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])}, ValueError, "holds 2"),
    "an unknown label": ({"labels": TEXT + 1000}, ValueError, "labels holds 1000"),
    "a negative label": ({"labels": TEXT - 7}, ValueError, "labels holds -7"),
    "labels that were shifted": ({"labels": TEXT[:, 1:]}, ValueError, "the model shifts them itself"),
    "an unknown id": ({"input_ids": TEXT + 1000}, ValueError, "input_ids holds 1000"),
    "one axis": ({"input_ids": TEXT[0]}, ValueError, r"must be \[rows, tokens\]"),
    "no tokens": ({"input_ids": TEXT[:, :0]}, ValueError, "at least one of each"),
    "a short mask": ({"attention_mask": torch.ones(1, 5)}, ValueError, r"must be \[rows, 6\]"),
    "holes": (
        {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1]])},
        ValueError,
        "padding between the tokens of 1 texts",
    ),
    "packed texts": ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, ValueError, "give each text a row"),
    "an edge to predict": ({"labels": torch.tensor([[0, 1, 2, 3, 4, VOCABULARY]])}, ValueError, "never predicts"),
    "two inputs": ({"inputs_embeds": torch.zeros(1, 6, 16)}, ValueError, "either input_ids or inputs_embeds"),
    "one axis of positions": ({"position_ids": TEXT[0]}, ValueError, r"position_ids is \(6,\)"),
    "positions of fewer tokens": ({"position_ids": TEXT[:, 1:]}, ValueError, r"must be \[1, 6\]"),
    "vectors in a list": ({"input_ids": None, "inputs_embeds": [[1.0]]}, ValueError, "inputs_embeds is list"),
    "vectors of one text": ({"input_ids": None, "inputs_embeds": torch.zeros(6, 16)}, ValueError, "rows, tokens, 16"),
    "vectors in float32": (
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 6, 16)},
        ValueError,
        "the weights of torch.float64",
    ),
    "a negative number of logits": ({"logits_to_keep": -2}, ValueError, "logits_to_keep=-2"),
    "no number of logits": ({"logits_to_keep": None}, ValueError, "logits_to_keep=None"),
    "a position outside": ({"logits_to_keep": torch.tensor([6])}, ValueError, "positions from -6 to 5"),
    "a tuple as cache": ({"past_key_values": ((1, 2),)}, TypeError, "must be a Cache"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_a_sentence(what, unhooked):
    arguments, error, said = REFUSED[what]
    with torch.no_grad(), pytest.raises(error, match=said):
        small("transformer")(**{"input_ids": TEXT, **arguments})


@pytest.mark.parametrize("padded", [False, True])
def test_positions_that_do_not_continue_the_cache_are_refused(padded, unhooked):
    model, text = small("transformer"), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    given = {"attention_mask": mask} if padded else {}
    ids = (mask.cumsum(dim=1) - 1)[:, 4:]

    def following(new, ids):
        with torch.no_grad():
            past = model(text[:, :4], use_cache=True, **{name: m[:, :4] for name, m in given.items()})[CACHE]
            masks = {name: m[:, : 4 + new] for name, m in given.items()}
            return model(text[:, 4 : 4 + new], position_ids=ids, **masks, **{CACHE: past}).logits

    for new in (1, 2):
        expected = following(new, None)
        for right in (ids[:, :new], torch.arange(4, 4 + new)[None]):
            assert torch.equal(following(new, right), expected)
        for wrong in (ids[:, :new] + 3, torch.zeros(2, new, dtype=torch.long) + torch.arange(new)):
            with pytest.raises(ValueError, match="leave out position_ids"):
                following(new, wrong)


def test_a_cache_with_gradients_is_refused():
    model = small("transformer")
    assert model(TEXT).get(CACHE) is None
    for arguments in ({"use_cache": True}, {CACHE: DynamicCache()}):
        with pytest.raises(ValueError, match="a cache has no gradient"):
            model(TEXT, **arguments)
    with torch.no_grad(), pytest.raises(ValueError, match="two names of one argument"):
        model(TEXT, cache=DynamicCache(), past_key_values=DynamicCache())


def test_extra_losses_of_padded_rows_are_those_of_the_rows():
    """Each row counts by its share of the scored tokens."""
    model, text = trainable(**HEADS["extra losses"]), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = model(text, attention_mask=mask, labels=text).loss
    alone = model(text[:1, 2:], labels=text[:1, 2:]).loss, model(text[1:], labels=text[1:]).loss
    assert_close(found, (3 * alone[0] + 5 * alone[1]) / 8, rtol=1e-9, atol=0)
    assert model.eval()(text, attention_mask=mask, labels=text).loss < found


class Forgetful(DynamicLayer):
    """A layer that keeps the length of what it was given, but not all of it, as quantised and sliding ones do."""

    def get_seq_length(self) -> int:
        return super().get_seq_length() + 3


def test_a_cache_without_all_positions_is_refused():
    model, trellis = small("transformer"), small("trellis")
    cache = DynamicCache(config=model.config)
    cache.layers = [Forgetful()]
    with torch.no_grad():
        cache.layers[0].update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
        with pytest.raises(ValueError, match="a Forgetful holds 4 of 7 positions"):
            model(TEXT, **{CACHE: cache})
        other = model(TEXT)[CACHE]
        with pytest.raises(ValueError, match=r"slots of the shape \(1, 2, 6, 8\)"):
            trellis(TEXT, **{CACHE: other})
        with pytest.raises(ValueError, match=r"reads \[B, 2, S, 8\]"):
            model(TEXT, **{CACHE: trellis(TEXT)[CACHE]})


def test_an_explicit_network_is_refused():
    with pytest.raises(ValueError, match="export it as safetensors"):
        EquilibriumConfig.of(LanguageConfig(BLOCK, explicit=Explicit(depth=3)), VOCABULARY)


def test_configurations_that_are_none_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'Anderson2'"):
        EquilibriumConfig(method={"kind": "Method", "solver": {"kind": "Anderson2"}}).decoded_method()


def test_the_library_itself_needs_no_transformers():
    code = (
        "import sys, torch; known = set(sys.modules); import equilibria; new = set(sys.modules) - known; "
        "print(sorted({'transformers', 'numpy', 'tokenizers'} & new))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_an_output_that_leaves_a_reentrant_checkpoint_refuses_to_lose_its_gradient():
    model, text = trainable(), tokens(2, 5)
    vectors = model.get_input_embeddings()(text).detach().requires_grad_()
    out = checkpoint(lambda x: model(inputs_embeds=x, output_hidden_states=True), vectors, use_reentrant=True)
    for value in (out.logits, out.hidden_states[1]):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            value.sum().backward()
    logits = checkpoint(lambda x: model(inputs_embeds=x).logits, vectors, use_reentrant=True)
    logits.square().sum().backward()
    assert vectors.grad.abs().sum() > 0


NOTHING_SCORED = {
    "all labels −100": ({"labels": torch.full_like(TEXT, -100)}, "labels score no token"),
    "one token": ({"input_ids": TEXT[:, :1], "labels": TEXT[:, :1]}, "labels score no token"),
    "padding alone": ({"labels": TEXT, "attention_mask": torch.zeros_like(TEXT)}, "labels score no token"),
    "a count of 0": ({"labels": TEXT, "num_items_in_batch": torch.tensor(0)}, "num_items_in_batch=0"),
    "a negative count": ({"labels": TEXT, "num_items_in_batch": -3}, "num_items_in_batch=-3"),
}


@pytest.mark.parametrize("what", NOTHING_SCORED)
def test_a_mean_over_no_token_is_refused(what, unhooked):
    """NaN would reach the weights, and Trainer leaves it out of its log."""
    arguments, said = NOTHING_SCORED[what]
    with pytest.raises(ValueError, match=said):
        small("transformer")(**{"input_ids": TEXT, **arguments})


def test_a_part_of_a_batch_may_score_nothing():
    model = trainable()
    loss = model(TEXT, labels=torch.full_like(TEXT, -100), num_items_in_batch=5).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_ids_and_labels_in_32_bits_are_the_same():
    model = small("transformer")
    with torch.no_grad():
        assert torch.equal(model(TEXT.int(), labels=TEXT.int()).loss, model(TEXT, labels=TEXT).loss)


def test_the_choices_of_the_configuration_are_those_of_the_call():
    model = copy.deepcopy(small("transformer"))
    model.config.return_dict = False
    with torch.no_grad():
        assert isinstance(model(TEXT), tuple)
        assert model(TEXT, return_dict=True).logits.shape == (1, 6, VOCABULARY + 1)
    model.config.output_attentions = True
    with torch.no_grad(), pytest.raises(TypeError, match="no argument output_attentions"):
        model(TEXT)


def test_a_static_cache_without_room_is_refused_before_the_solve():
    model = small("transformer")
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(TEXT, **{CACHE: cache})
        with pytest.raises(ValueError, match="room for 8 positions, and 12 are needed"):
            model(TEXT, **{CACHE: cache})
        assert int(cache.get_seq_length()) == 6
        assert_close(
            model(TEXT[:, :2], **{CACHE: cache}).logits, model(torch.cat([TEXT, TEXT[:, :2]], 1)).logits[:, 6:]
        )


def test_offloaded_weights_are_refused(tmp_path):
    """accelerate brings a weight when its own module is called; PyTorch multiplies by another one without an error."""
    pytest.importorskip("accelerate")
    small("transformer").save_pretrained(tmp_path / "model")
    parts = ("model.embedding", "model.layer", "model.head")
    for part in parts:
        places = {name: "disk" if name == part else "cpu" for name in parts}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=str(tmp_path / part)
        )
        with torch.no_grad(), pytest.raises(ValueError, match=rf"the weight {part}\S* is on the meta device"):
            model(TEXT)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu").eval()
    with torch.no_grad():
        assert torch.equal(whole(TEXT).logits, small("transformer")(TEXT).logits)


def test_a_changed_configuration_changes_the_solves(tmp_path):
    model = copy.deepcopy(small("transformer"))
    tight = small("transformer")(TEXT).evals
    for stop in (Stop(rtol=1e-2), {"kind": "Stop", "rtol": 1e-2}):
        model.config.eval_stop = stop
        assert model(TEXT).evals < tight
    model.config.eval_stop["rtol"] = 1e-3
    between = model(TEXT).evals
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).eval()(TEXT).evals == between
    assert AutoModelForCausalLM.from_pretrained(tmp_path, eval_stop=Stop(rtol=1e-12)).eval()(TEXT).evals > between
    model.config.eval_stop = None
    assert model(TEXT).evals == tight


@pytest.mark.parametrize("training", [True, False])
def test_the_outputs_of_replicas_can_be_joined(training, monkeypatch):
    """As ``nn.DataParallel`` of a Trainer does it on two GPUs; on a CPU PyTorch joins no tensors itself."""
    model, ids = small("transformer"), tokens(2, 6)
    joined = {"apply": lambda device, dim, *parts: torch.stack(parts) if parts[0].ndim == 0 else torch.cat(parts, dim)}
    monkeypatch.setattr(scatter_gather, "Gather", type("Gather", (), joined))
    count = torch.tensor([[7.0]]) if training else None
    with torch.set_grad_enabled(training):
        outputs = [model._replicate_for_data_parallel()(ids, labels=ids, num_items_in_batch=count) for _ in range(2)]
        expected = model(ids, labels=ids, num_items_in_batch=None if count is None else count.squeeze())
        found = scatter_gather.gather(outputs, "cpu")
    assert torch.equal(found.loss, expected.loss.expand(2))
    assert torch.equal(found.logits, expected.logits.repeat(2, 1, 1))
    assert found.evals is None
    assert expected.evals > 1


@pytest.mark.parametrize("change", [{"edge_reads_as": 99}, {"edge_reads_as": None}, {"edge_token_id": 300}])
def test_an_edge_outside_the_vocabulary_is_refused(change):
    config = configuration("transformer")
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"EquilibriumConfig\\({next(iter(change))}="):
        EquilibriumForCausalLM(config)


@pytest.mark.parametrize("rows", [None, VOCABULARY + 4])
def test_the_vectors_of_a_padded_text_are_those_that_the_model_reads(rows):
    """The edge is read as another token by the embedding itself, before a resize gives it a row and after it."""
    model = copy.deepcopy(small("transformer"))
    if rows is not None:
        model.resize_token_embeddings(rows)
    text = torch.tensor([[VOCABULARY, VOCABULARY, 3, 4], [VOCABULARY, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for one in (model, copy.deepcopy(model)):
        with torch.no_grad():
            vectors = one.get_input_embeddings()(text)
            found = one(inputs_embeds=vectors, attention_mask=mask).logits
            assert torch.equal(found, one(text, attention_mask=mask).logits)
    model.set_input_embeddings(copy.deepcopy(small("transformer").get_input_embeddings()))
    assert torch.equal(
        model.get_input_embeddings()(text), small("transformer").get_input_embeddings()(text % VOCABULARY)
    )
