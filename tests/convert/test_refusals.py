"""Files that cannot be converted are refused in a sentence, and so is what a converted run cannot do."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import equilibria
from equilibria.__main__ import main
from equilibria.lm.convert import ConversionError, Numbering, convert, numbered, read
from equilibria.lm.corpora import Corpus, PennTreebank, Source, TextFolder, WikiText2, WikiText103
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs import Run
from slow_cases import one_in
from small_run import fails

from .authors import by_count, deq_lm, deq_transformer, deq_trellisnet, trellisnet

TRAIN = "one two two three\nfour two five\nsix one\n" * 4
SOFTMAX = {"words": 7, "cutoffs": (2, 4), "division": 2}

RECIPE = """
import dataclasses

from equilibria.lm.corpora import TextFolder
from equilibria.lm.recipes import RECIPES


def small(name):
    value = RECIPES[name]()
    training = value.training.changed(device="cpu", threads=1, overlap=0, segment_length=4, eval_segment_length=4)
    return dataclasses.replace(value, corpus=TextFolder(unit="word"), training=training)


def v2():
    return small("wikitext103-v2")


def unrolled():
    return small("wikitext103-unrolled")


def deep():
    return small("ptb-trellis-deep")


def trellis():
    return small("ptb-trellis")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text and recipes for it, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text(TRAIN)
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def saved(state, name="weights.pth"):
    torch.save(state, name)
    return name


def words(file, recipe="v2", *more):
    return ["convert", file, "--recipe", f"recipe.py:{recipe}", "--data", "text", "--out", "run", *more]


def experiment(name="wikitext103-v2"):
    return dataclasses.replace(RECIPES[name](), corpus=TextFolder(root=Path("text"), unit="word"))


def refused(state, name="wikitext103-v2", **options):
    """The sentence with which a state dict is refused."""
    with pytest.raises(ConversionError) as caught:
        convert(Path(saved(state)), experiment(name), **options)
    return str(caught.value)


def test_a_whole_module_is_refused_and_its_code_does_not_run(place, capsys):
    torch.save(torch.nn.Linear(2, 2), "model.pt")
    sentence = fails(capsys, *words("model.pt"), code=1)
    assert sentence.startswith("model.pt holds a pickled module or other objects, and unpickling these would run code")
    assert "torch.save(model.state_dict(), 'weights.pth')" in sentence
    assert not (place / "run").exists()


def test_other_files_are_refused(place, capsys):
    (place / "text.pth").write_text("no tensors")
    assert "is not a file that torch.save has written" in fails(capsys, *words("text.pth"), code=1)
    model = torch.nn.Linear(2, 2)
    torch.save(torch.optim.Adam(model.parameters()).state_dict(), "optimizer.pth")
    assert "holds an optimiser's state, and a state dict" in fails(capsys, *words("optimizer.pth"), code=1)
    assert "names of no known format, such as weight, bias" in fails(capsys, *words(saved(model.state_dict())), code=1)
    assert "missing.pth is no file" in fails(capsys, *words("missing.pth"))
    whole = Path(saved(deq_transformer(**SOFTMAX))).read_bytes()
    (place / "script.pt").write_bytes(whole)
    with zipfile.ZipFile("script.pt", "a") as archive:  # by this name PyTorch knows a TorchScript module
        archive.writestr("weights/constants.pkl", b"")
    assert "script.pt holds a TorchScript module, and loading it would run code" in fails(
        capsys, *words("script.pt"), code=1
    )
    save_file(model.state_dict(), "model.safetensors")
    assert "torch.save(safetensors.torch.load_file(…), …) makes one" in fails(
        capsys, *words("model.safetensors"), code=1
    )
    (place / "cut.pth").write_bytes(whole[: len(whole) // 2])
    assert "cut.pth is not a file that torch.save has written, or was cut" in fails(capsys, *words("cut.pth"), code=1)
    assert "around a state dict, which is its entry 'model'" in refused({"model": model.state_dict(), "epoch": 3})
    assert "holds other values, and a state dict holds named tensors" in refused({0: torch.ones(2)})
    assert "needs a file" in fails(capsys, "convert", "--recipe", "recipe.py:v2")
    assert "needs --recipe" in fails(capsys, "convert", "weights.pth")


def test_the_old_format_of_torch_save_is_read(place):
    state = deq_transformer(**SOFTMAX)
    torch.save(state, "old.pkl", _use_new_zipfile_serialization=False)
    assert main(words("old.pkl")) == 0
    assert equilibria.load("run").model.embedding.vocabulary_size == 7


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("crit.out_layers.1.weight", "word_emb.emb_layers.1.weight"),
        ("crit.out_projs.2.weight", "word_emb.emb_projs.2.weight"),
    ],
)
def test_broken_ties_are_refused(place, name, other):
    state = deq_transformer(**SOFTMAX)
    state[name] = state[name] + 1e-6
    sentence = refused(state)
    assert f"{name} and {other} are tied in the authors' code and differ in this file" in sentence
    assert "take a file whose tie is whole" in sentence
    trellis = deq_trellisnet(words=7)
    trellis["decoder.weight"] = trellis["decoder.weight"].clone().mul_(2)
    assert "decoder.weight and encoder.weight are tied" in refused(trellis, "ptb-trellis")


def test_a_plain_softmax_that_was_trained_untied(place):
    state = deq_transformer(words=7)
    state["crit.out_layers.0.weight"] = torch.randn(7, 8)
    value = experiment()
    value = dataclasses.replace(value, model=dataclasses.replace(value.model, tied=False))
    found = convert(Path(saved(state)), value)
    assert torch.equal(found.weights["head.weight"], state["crit.out_layers.0.weight"])
    saved(deq_transformer(**SOFTMAX))
    with pytest.raises(ConversionError, match="untied adaptive softmax has other parameters"):
        convert(Path("weights.pth"), value)


def test_tensors_that_nothing_reads_and_missing_ones_are_refused(place):
    state = deq_transformer(**SOFTMAX)
    assert "holds func.gate.weight, which the DEQ-Transformer" in refused({**state, "func.gate.weight": torch.ones(2)})
    del state["func.pos_ff.ff2_net.bias"]
    assert "has no tensor 'func.pos_ff.ff2_net.bias'" in refused(state)
    state = deq_transformer(**SOFTMAX)
    del state["func.pos_ff.ff2_net.weight_g"]
    assert "has no gain func.pos_ff.ff2_net.weight_g beside it" in refused(state)
    state = deq_transformer(**SOFTMAX)
    state["func.dec_attn.o_net.bias"] = torch.ones(9)
    assert "gives layer.cell.attention.out.bias the shape (9,) and the model has (8,)" in refused(state)


FILES = {
    "transformer": (deq_transformer(**SOFTMAX), "wikitext103-v2"),
    "one table": (deq_transformer(words=7, cutoffs=(2, 4), embed=4), "wikitext103-v2"),
    "deq-lm": (deq_lm(**SOFTMAX, blocks=1), "wikitext103-unrolled"),
    "deq-trellisnet": (deq_trellisnet(words=7, experts=2), "ptb-trellis"),
    "trellisnet": (trellisnet(words=7), "ptb-trellis-deep"),
}
"""A state dict of each format, and its recipe."""
DAMAGES = {
    "missing": lambda t: None,
    "flat": torch.Tensor.flatten,
    "one number": lambda t: t.new_zeros(()),
    "one more axis": lambda t: t[None],
    "one row": lambda t: t[:1],
    "one row less": lambda t: t[:-1],
    "no rows": lambda t: t[:0],
    "transposed": lambda t: t.transpose(0, -1).contiguous(),
    "nan": lambda t: torch.full_like(t, torch.nan),
    "overflow": lambda t: t.double() + 1e300,
    "whole numbers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": torch.Tensor.to_sparse,
    "meta": lambda t: t.to("meta"),
    "other values": lambda t: t + 1,
}
"""What may have happened to a tensor of a file."""
SHAPES = ("missing", "flat", "one number", "one more axis", "one row", "no rows", "other values")
"""Those that each format has to notice by itself."""


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *one_in(3, itertools.product(FILES, SHAPES)),
        *(("transformer", damage) for damage in DAMAGES if damage not in SHAPES),
    ],
)
def test_a_file_with_one_damaged_tensor_is_refused_unless_nothing_changes(place, kind, damage):
    """A tensor with other values of its kind is another model, and all else is refused, or makes no difference."""
    state, name = FILES[kind]
    value = experiment(name)
    if kind == "one table":
        adaptive = dataclasses.replace(value.model.adaptive, cutoffs=(2, 4))
        value = dataclasses.replace(value, model=dataclasses.replace(value.model, adaptive=adaptive))
    text = value.corpus.load()
    value = dataclasses.replace(value, corpus=Held(text))
    whole = convert(Path(saved(state)), value).weights
    for tensor in state:
        others = {other: kept for other, kept in state.items() if other != tensor}
        changed = DAMAGES[damage](state[tensor])
        file = Path(saved(others if changed is None else {**others, tensor: changed}))
        found = None
        with contextlib.suppress(ConversionError):
            found = convert(file, value).weights
        same = found is not None and all(torch.equal(found[part], whole[part]) for part in whole)
        if damage == "other values":
            assert not same or tensor.startswith(COPIES), tensor
        elif damage != "transposed":
            assert same or found is None, tensor


COPIES = ("network.0.module.net.", "network.1.", "mixsoft.decoder.", "trellisnet.func_copy.", "trellisnet.deq")
"""Beginnings of the names of tensors that another one repeats, or that are not trained."""


@dataclasses.dataclass(frozen=True)
class Held(Source):
    """A corpus that was read before."""

    corpus: Corpus

    def load(self):
        return self.corpus


def test_names_that_are_the_same_without_the_prefix_of_dataparallel_are_refused(place):
    state = deq_transformer(**SOFTMAX)
    twice = {**state, "module.inject_conv.bias": state["inject_conv.bias"] + 1}
    assert "holds both inject_conv.bias and module.inject_conv.bias" in refused(twice)


@pytest.mark.parametrize(
    "before",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod._orig_mod.", "module.module."],
)
def test_names_of_wrapped_models_are_read(place, before):
    """DataParallel and DistributedDataParallel add one of them, torch.compile the other, around the whole model."""
    state, wanted = deq_transformer(**SOFTMAX), convert(Path(saved(deq_transformer(**SOFTMAX))), experiment()).weights
    found = convert(Path(saved({f"{before}{name}": t for name, t in state.items()})), experiment()).weights
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_checkpoint_wrapped_module."])
def test_names_of_models_with_a_wrapped_part_are_read(place, wrapper):
    """torch.compile and checkpoint_wrapper are often given a part, such as the block."""
    state, wanted = deq_transformer(**SOFTMAX), convert(Path(saved(deq_transformer(**SOFTMAX))), experiment()).weights
    parts = {
        name.replace("func.", f"func.{wrapper}").replace("attn.", f"attn.{wrapper}"): t for name, t in state.items()
    }
    assert parts.keys() != state.keys()
    found = convert(Path(saved(parts)), experiment()).weights
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_names_that_are_the_same_without_a_wrapper_are_refused(place):
    state = deq_transformer(**SOFTMAX)
    twice = {**state, "module._orig_mod.inject_conv.bias": state["inject_conv.bias"] + 1}
    assert "holds both inject_conv.bias and module._orig_mod.inject_conv.bias" in refused(twice)


def test_gains_of_columns_are_not_taken_for_gains_of_rows(place):
    """In a square matrix they are as many."""
    state = deq_transformer(**SOFTMAX)
    state["func.dec_attn.r_net.weight_g"] = state["func.dec_attn.r_net.weight_g"].view(1, -1, 1)
    assert "weight normalisation here has one gain per row" in refused(state)


def test_other_frequencies_of_the_positions_are_refused(place):
    state = deq_transformer(**SOFTMAX)
    halved = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert convert(Path(saved(halved)), experiment()).weights
    state["pos_emb.inv_freq"] = state["pos_emb.inv_freq"] * 2
    assert "pos_emb.inv_freq is not what its code computes" in refused(state)


def test_a_recipe_of_another_model_is_refused(place):
    assert "weights of TorchDEQ's deq-lm, and the recipe has the equilibrium of a TransformerConfig" in refused(
        deq_lm(**SOFTMAX)
    )
    assert "such as ptb-trellis-deep" in refused(trellisnet(words=7), "ptb-trellis")
    assert "has an explicit network of a TrellisConfig" in refused(deq_trellisnet(words=7), "ptb-trellis-deep")
    assert "a recurrent network" in refused(deq_trellisnet(words=7), "copying-lstm")
    state = deq_transformer(words=7, cutoffs=(2, 4), division=1)
    sentence = refused(state, "ptb")
    assert "2 clusters over one table, and the recipe has the cutoffs ()" in sentence
    assert "--model.adaptive.cutoffs" in sentence


def test_deq_trellisnet_without_the_slots_of_its_loss(place):
    sentence = refused(deq_trellisnet(words=7), "wikitext103-trellis")
    assert "lacks tail_vectors and tail_bias" in sentence
    assert "--criterion FILE" in sentence
    file = Path(saved(deq_trellisnet(words=7)))
    with pytest.raises(ConversionError, match="both hold decoder"):
        convert(file, experiment("wikitext103-trellis"), criterion=file)


def test_another_text_is_refused(place):
    assert "has 9 words and the text text has 7" in refused(deq_transformer(words=9))


def test_flags_that_contradict_the_file_are_refused(place, capsys):
    file = saved(deq_transformer(**SOFTMAX))
    assert "--heads 5: the weights in the file say 2" in fails(capsys, *words(file, "v2", "--heads", "5"))
    assert not (place / "run").exists()
    assert main([*words(file), "--heads", "2", "--memory", "3", "--model.cell.norm", "pre"]) == 0
    cell = Run.open(place / "run").experiment().model.cell
    assert (cell.heads, cell.memory, cell.norm) == (2, 3, "pre")


def test_a_converted_run_does_all_that_a_trained_one_does(place, capsys):
    """It evaluates, generates, reports without a history, is whole, and exports, for transformers too."""
    state = deq_transformer(**SOFTMAX)
    assert main(words(saved(state), "v2", "--memory", "3")) == 0
    said = capsys.readouterr().out
    assert said.startswith("run: ")
    assert "weights of the DEQ-Transformer" in said
    assert fails(capsys, *words("weights.pth")) == "run already holds a run; choose another folder with --out."
    assert main(["evaluate", "run", "--split", "test", "--protocol", "official", "--batch-size", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * (len(TRAIN.split()) + 12) // 2 - 2
    assert main(["generate", "run", "--prompt", "one two", "--length", "4"]) == 0
    assert capsys.readouterr().out.startswith("one two")
    assert main(["report", "run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["summary"]["validation"] is None
    assert report["state"].startswith("Converted from weights.pth, weights of the DEQ-Transformer")
    assert report["summary"]["parameters"] == sum(p.numel() for p in equilibria.load("run").model.parameters())
    assert main(["doctor", "run"]) == 0
    capsys.readouterr()
    assert main(["export", "run"]) == 0
    exported = load_file("run/model.safetensors")
    assert torch.equal(exported["layer.cell.attention.u"], state["func.dec_attn.r_w_bias"])
    assert main(["train", "recipe.py:v2", *words("", "v2")[4:], "--memory", "3", "--resume", "--quiet"]) == 1
    assert "were converted from a published file, which holds no optimiser" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_each_other_format_evaluates_and_generates(place, capsys):
    states = {"unrolled": deq_lm(**SOFTMAX), "trellis": deq_trellisnet(words=7), "deep": trellisnet(words=7)}
    shallower = ["--model.explicit.depth", "12", "--training.overlap", "0"]
    for recipe, state in states.items():
        out = ["--out", f"run-{recipe}", *(shallower if recipe == "deep" else ())]
        assert main([*words(saved(state), recipe), *out]) == 0
        assert main(["evaluate", f"run-{recipe}", "--max-segments", "2"]) == 0
        assert main(["generate", f"run-{recipe}", "--prompt", "one", "--length", "3"]) == 0


def test_numbers_of_words(place):
    corpus = TextFolder(root=Path("text"), unit="word").load()
    assert numbered(corpus, "train") is corpus
    for kind in ("all", "appearance"):
        again = numbered(corpus, kind)
        assert again.vocabulary.decode(again.valid.ids) == corpus.vocabulary.decode(corpus.valid.ids)
    assert list(numbered(corpus, "all").vocabulary.tokens) == by_count(TRAIN, TRAIN, TRAIN)
    characters = TextFolder(root=Path("text"), unit="character").load()
    assert "".join(numbered(characters, "appearance").vocabulary.tokens) == "".join(dict.fromkeys(TRAIN))
    from equilibria.lm.convert import FORMATS

    transformer, trellis = FORMATS[0], FORMATS[-1]
    assert [transformer.numbering(kind()) for kind in (WikiText103, PennTreebank, WikiText2)] == ["train", "all", "all"]
    assert trellis.numbering(PennTreebank()) == "appearance"


def test_only_words_and_characters_have_an_order(place):
    pytest.importorskip("tokenizers")
    corpus = TextFolder(root=Path("text"), unit="bpe", vocabulary_size=260).load()
    with pytest.raises(ConversionError, match="only words and characters"):
        numbered(corpus, "appearance")


def test_help_says_what_is_read(capsys):
    assert main(["convert", "--help"]) == 0
    assert "usage: equilibria convert CHECKPOINT --recipe RECIPE" in capsys.readouterr().out
    assert main(["convert", "--recipe", "wikitext103-v2", "--help"]) == 0
    assert "--criterion" in capsys.readouterr().out
    assert read.__doc__
    assert Numbering
