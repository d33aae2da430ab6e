"""A run as a folder for transformers: by the command and in Python."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer

import equilibria
from convert.authors import deq_transformer
from equilibria.__main__ import main
from equilibria.cells import ChainConfig, TrellisConfig
from equilibria.errors import UsageError
from equilibria.hf import export, from_run, runs
from equilibria.hf.configuration import seen_in_training
from equilibria.lm.convert import convert
from equilibria.lm.corpora import TextFolder
from equilibria.lm.experiments import explicit
from equilibria.lm.model import LanguageConfig
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs.folder import foreign_files
from equilibria.lm.runs.shipped import FOLDER


def test_the_command_writes_a_folder_that_generates(tmp_path, capsys):
    out = tmp_path / "tiny-hf"
    assert main(["export", "tiny", "--format", "hf", "--out", str(out)]) == 0
    assert "265,575 weights of step 2,000" in capsys.readouterr().out
    names = {file.name for file in out.iterdir()}
    assert names == {
        *("README.md", "config.json", "equilibrium.py", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    run = equilibria.load("tiny")
    prompt = tokenizer("The function ", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == run.vocabulary.encode("The function ").tolist()
    with torch.no_grad():
        found = model(**prompt).logits[..., :-1]
        wanted, _ = run.model.logits(prompt["input_ids"])
    assert_close(found, wanted, rtol=0, atol=1e-4)  # one text inside the window
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=5)[0])
    assert text.startswith("The function ")
    first = text.removeprefix("The function ")[0]  # generate gives the tokenizer to the model, too
    stopped = model.generate(**prompt, max_new_tokens=5, stop_strings=[first], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0]) == f"The function {first}"
    model.save_pretrained(tmp_path / "again")  # as after a training
    assert (tmp_path / "again" / "equilibrium.py").read_text() == (out / "equilibrium.py").read_text()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| this model | 2.0" in card
    assert "265,575 parameters and 103 characters" in card
    assert "A position sees 128 positions" in card
    assert "for 2,000 steps on\n`python_docs`." in card  # the name of a text, as it is
    assert main(["export", "tiny", "--format", "hf", "--out", str(out)]) == 2
    assert "is not an empty folder; name a new one." in capsys.readouterr().err


def test_an_export_in_its_usual_place_does_not_keep_the_run_from_being_replaced(tmp_path, capsys):
    """`train --overwrite` took the folder, which `export` writes by default, for a stranger's."""
    run, quick = tmp_path / "run", ["--steps", "2", "--quiet", "--training.baseline", "False", "--valid-segments", "1"]
    shutil.copytree(FOLDER / "tiny", run)
    assert main(["export", str(run), "--format", "hf"]) == 0
    assert foreign_files(run) == []
    assert main(["train", "tiny", "--out", str(run), "--overwrite", *quick, "--training.measure-memory", "False"]) == 0
    assert not (run / "hf").exists()
    (run / "hf").mkdir()
    (run / "hf" / "optimizer.pt").write_text("of a training that went on there")
    assert foreign_files(run) == ["hf/optimizer.pt"]
    capsys.readouterr()
    assert main(["train", "tiny", "--out", str(run), "--overwrite", *quick]) == 1
    assert "holds hf/optimizer.pt beside a run" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--format", "hf"]], ids=["safetensors", "hf"])
def test_an_export_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch, words):
    from safetensors import SafetensorError

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    assert main(["export", "tiny", "--out", str(tmp_path / "out"), *words]) == 1
    assert "there is no space left on the disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folded_weights_in_one_file(tmp_path, capsys):
    from safetensors.torch import load_file

    file = tmp_path / "plain.safetensors"
    assert main(["export", "tiny", "--fold", "--out", str(file)]) == 0
    weights, model = load_file(file), equilibria.load("tiny").model
    assert not [name for name in weights if "direction" in name or "gain" in name]
    assert_close(weights["layer.cell.inner.weight"], model.layer.cell.inner.effective().detach())


def test_the_window_is_that_of_the_training():
    run = equilibria.load("tiny").experiment
    assert seen_in_training(run.model, 64).cell.window == 128
    chain = LanguageConfig(ChainConfig((run.model.cell, dataclasses.replace(run.model.cell, window=9))))
    assert [block.window for block in seen_in_training(chain, 64).cell.cells] == [128, 9]
    trellis = LanguageConfig(TrellisConfig(width=8, hidden=4, outputs=8))
    assert seen_in_training(trellis, 64) == trellis


def test_a_text_longer_than_the_biases_is_read():
    """tiny has biases for 1024 distances, and a window of 128."""
    model = from_run("tiny").model
    ids = torch.randint(100, (1, 1100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, rtol=1e-4, max_evals=60, use_cache=False).logits
        end = model(ids[:, -600:], rtol=1e-4, max_evals=60, use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert_close(logits[:, -20:, :-1], end[:, -20:, :-1], rtol=0, atol=0.05)


def test_an_explicit_network_is_refused_in_a_sentence(tmp_path, monkeypatch):
    run = equilibria.load("tiny")
    network = dataclasses.replace(run, experiment=explicit(run.experiment, depth=2))
    monkeypatch.setattr(runs, "load", lambda path, checkpoint: network)
    with pytest.raises(UsageError, match="is a run of an explicit network, and only an equilibrium has one cache slot"):
        export("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_chain_whose_blocks_read_the_final_state_is_refused_in_a_sentence(tmp_path, monkeypatch):
    """With a cache its values would not be those of the whole text."""
    run = equilibria.load("tiny")
    cell = ChainConfig((run.experiment.model.cell,) * 2, memory="last")
    model = dataclasses.replace(run.experiment.model, cell=cell)
    divided = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, model=model))
    monkeypatch.setattr(runs, "load", lambda path, checkpoint: divided)
    with pytest.raises(ValueError, match="has other values with a cache than without"):
        export("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converted_weights_are_a_model_of_transformers(tmp_path):
    """With the log-probabilities that the run has, of a text in one piece."""
    text = "one two two three\nfour two five\nsix one\n" * 4
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    torch.save(deq_transformer(words=7), tmp_path / "weights.pth")
    experiment = dataclasses.replace(RECIPES["wikitext103-v2"](), corpus=TextFolder(root=tmp_path, unit="word"))
    convert(tmp_path / "weights.pth", experiment).write(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    trained = equilibria.load(tmp_path / "run")
    ids = trained.vocabulary.encode(text)[None, :9]
    with torch.no_grad():
        logits, _ = trained.model.logits(ids)
        found = model(ids).logits[..., :7]
    assert_close(found.log_softmax(-1), logits.log_softmax(-1), rtol=0, atol=1e-5)


def test_the_configuration_is_plain_json(tmp_path):
    from_run("tiny").model.config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["language"]["kind"] == "LanguageConfig"
    assert stored["auto_map"]["AutoModelForCausalLM"] == "equilibrium.EquilibriumForCausalLM"
    assert stored["model_type"] == "equilibrium"
