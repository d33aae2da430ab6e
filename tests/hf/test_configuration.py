"""What a configuration and a saved folder may hold: no name, kind, form or number is ignored without a word."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from equilibria import Stop
from equilibria.hf import EquilibriumConfig, EquilibriumForCausalLM
from equilibria.layers.linear import fold

from .models import VOCABULARY, configuration, small, tokens


@pytest.fixture
def folder(tmp_path):
    small("transformer").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


NAMES = {
    "methd": ({"kind": "Method"}, "methd.*did you mean method"),
    "eval_stops": ({"kind": "Stop", "rtol": 1e-6}, "eval_stops.*did you mean eval_stop"),
    "vocabsize": (64, "vocabsize.*did you mean vocab_size"),
    "rtol": (1e-6, r"rtol is a field of Stop.*eval_stop=Stop\(rtol=…\)"),
    "solver": ({"kind": "Picard"}, r"solver is a field of Method.*method=Method\(solver=…\)"),
    "dropout": (0.1, r"dropout is a field of LanguageConfig.*language=LanguageConfig\(dropout=…\)"),
    "hidden_size": (64, r"hidden_size follows from the cell.*language=LanguageConfig\("),
    "num_hidden_layers": (2, r"num_hidden_layers follows from the cell.*language=LanguageConfig\("),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_would_be_ignored_is_refused(name, folder):
    """transformers keeps any name as an attribute, and drops those that ``AutoConfig.from_pretrained`` is given."""
    value, sentence = NAMES[name]
    config = configuration("transformer")
    with pytest.raises(ValueError, match=sentence):
        EquilibriumConfig(**{name: value})
    with pytest.raises(ValueError, match=sentence):
        setattr(config, name, value)
    for kind in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=sentence):
            kind.from_pretrained(folder, **{name: value})
    rewrite(folder, **{name: value})
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)


def test_names_of_other_libraries_stay(folder):
    rewrite(folder, quantised_by="nobody", sep_token_id=None, decoder_start_token_id=3, languages_spoken=["en"])
    config = AutoConfig.from_pretrained(folder)
    assert (config.quantised_by, config.decoder_start_token_id) == ("nobody", 3)
    assert AutoModelForCausalLM.from_pretrained(folder).config.languages_spoken == ["en"]


def test_missing_fields_have_their_defaults(folder):
    """A folder of an older version has fewer."""
    found = json.loads((folder / "config.json").read_text())
    for name in ("folded", "eval_stop"):
        del found[name]
    del found["language"]["cell"]["affine"]
    (folder / "config.json").write_text(json.dumps(found))
    text = tokens(2, 5)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(model(text).logits, small("transformer")(text).logits)


VALUES = {
    "a text for a number": ({"vocab_size": "31"}, r"vocab_size='31'\): vocab_size is a whole number"),
    "a float": ({"vocab_size": 31.0}, r"vocab_size=31.0\): vocab_size is a whole number"),
    "a text for a flag": ({"folded": "no"}, r"folded='no'\): folded is True or False"),
    "a float for an id": ({"edge_token_id": 30.0}, r"edge_token_id=30.0\): edge_token_id is a whole number"),
    "a token for its id": ({"edge_reads_as": "a"}, r"edge_reads_as='a'\): edge_reads_as is a whole number"),
    "a stop without its kind": ({"eval_stop": {"rtol": 1e-6}}, r'Stop has no "kind".*\{"kind": "Stop"'),
    "a part without its kind": (
        {"method": {"kind": "Method", "stop": {"rtol": 1e-6}}},
        r'Method.stop has no "kind".*\{"kind": "Stop"',
    ),
    "a misspelt kind": ({"method": {"kind": "Metod"}}, r"unknown kind 'Metod'; did you mean Method\?"),
}


@pytest.mark.parametrize("what", VALUES)
def test_a_value_of_another_kind_is_refused(what, folder):
    fields, sentence = VALUES[what]
    rewrite(folder, **fields)
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_saved_model_says_that_its_weights_are_folded(tmp_path):
    """``fold`` knows no configuration, and a folder that says otherwise would be loaded with new weights."""
    model, text = copy.deepcopy(small("transformer")), tokens(2, 5)
    fold(model.model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["folded"] is True
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(found(text).logits, model(text).logits)


@pytest.mark.parametrize("folded", [False, True])
def test_weights_of_the_other_form_are_refused(folded, tmp_path):
    """transformers would draw what is missing, and say so in its log alone."""
    model = copy.deepcopy(small("transformer"))
    if folded:
        fold(model.model)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, folded=not folded)
    for kind in (AutoModelForCausalLM, EquilibriumForCausalLM):
        with pytest.raises(ValueError, match=f'"folded": {str(folded).lower()}'):
            kind.from_pretrained(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    small("decay").save_pretrained(tmp_path)
    configuration("transformer").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"of another model.*lacks model\.layer.* and has model\.layer\S*positions\.bias"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_an_unknown_weight_alone_is_left_out(folder):
    """As transformers does, which reports it; so does a weight that is missing alone, which is drawn."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), "model.more.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    found, told = EquilibriumForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(told["unexpected_keys"]) == {"model.more.weight"}
    assert not set(told["missing_keys"])
    assert torch.equal(found.model.embedding.weight, small("transformer").model.embedding.weight)


@pytest.mark.parametrize("rows", [VOCABULARY + 1.5, "32", True])
def test_a_number_of_ids_is_whole(rows, unhooked):
    model = copy.deepcopy(small("transformer"))
    with pytest.raises(ValueError, match="new_num_tokens is a whole number"):
        model.resize_token_embeddings(rows)
    with pytest.raises(ValueError, match="pad_to_multiple_of is a whole number"):
        model.resize_token_embeddings(VOCABULARY + 4, pad_to_multiple_of=rows)
    for multiple in (0, -8):
        with pytest.raises(ValueError, match=f"pad_to_multiple_of={multiple}"):
            model.resize_token_embeddings(VOCABULARY + 4, pad_to_multiple_of=multiple)
    assert model.config.vocab_size == VOCABULARY + 1


def test_a_stop_may_be_given_as_an_object():
    config = configuration("transformer")
    config.eval_stop = Stop(rtol=1e-2)
    assert config.decoded_eval_stop() == Stop(rtol=1e-2)
