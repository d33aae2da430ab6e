"""transformers' Trainer: accumulation, evaluation, a resumed training, two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling

from equilibria.cells import TransformerConfig
from equilibria.hf import EquilibriumConfig, EquilibriumForCausalLM
from equilibria.lm.model import LanguageConfig

from .models import CELLS, METHOD, VOCABULARY, contractive
from .training import EXTRA, ROWS, fresh, losses, tokenizer, trainer

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SOLVED = 1e-8
"""The solves end at a relative residual of 1e-12, which a backward solve and four steps multiply by less than this."""
KINDS = [kind if kind == "transformer" else pytest.param(kind, marks=pytest.mark.slow) for kind in CELLS]


def same_weights(a, b, *, atol):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert_close(x, y, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_batches_of_two_are_one_of_four(kind, extra, tmp_path):
    """Rows of any length: what counts is the number of scored tokens of all batches together."""
    changes = {"losses": EXTRA} if extra else {}
    apart, together = fresh(kind, **changes), fresh(kind, **changes)
    two = trainer(apart, tmp_path, optim="sgd")
    one = trainer(together, tmp_path, optim="sgd", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    two.train()
    one.train()
    same_weights(apart, together, atol=SOLVED)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)  # Trainer sums them in float32
    start = fresh(kind, **changes).state_dict()
    assert any(not torch.allclose(start[name], value, atol=1e-4) for name, value in apart.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_optimiser_learns(kind, tmp_path):
    """A fused AdamW, whose steps PyTorch does not count: what was computed from the old weights must be gone."""
    model, ids = fresh(kind), torch.tensor([ROWS[0]["input_ids"]])
    training = trainer(model, tmp_path, rows=ROWS[:4], max_steps=8, learning_rate=0.03)
    assert "fused" in training.args.optim
    assert model.eval().generate(ids, max_new_tokens=2).shape == (1, 11)
    training.train()
    assert losses(training)[-1] < 0.8 * losses(training)[0]
    twin = fresh(kind)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, twin.eval()(ids).logits)
        found, wanted = (one.generate(ids, max_new_tokens=5, do_sample=False) for one in (model, twin))
    assert torch.equal(found, wanted)


def test_evaluation_gives_the_loss_and_metrics_of_the_logits(tmp_path):
    def accuracy(prediction):
        logits, labels = (torch.as_tensor(value) for value in (prediction.predictions, prediction.label_ids))
        scored = labels[:, 1:] != -100
        right = (logits[:, :-1].argmax(dim=-1) == labels[:, 1:])[scored]
        return {"accuracy": float(right.double().mean()), "scored": int(scored.sum())}

    model = fresh()
    found = trainer(model, tmp_path, metrics=accuracy).evaluate()
    batches = [DataCollatorForLanguageModeling(tokenizer(), mlm=False)(rows) for rows in (ROWS[:4], ROWS[4:6])]
    with torch.no_grad():
        outputs = [model.eval()(**batch) for batch in batches]
    wanted = (4 * float(outputs[0].loss) + 2 * float(outputs[1].loss)) / 6  # Trainer weights batches by their rows
    assert found["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert found["eval_scored"] == sum(len(row["input_ids"]) - 1 for row in ROWS[:6])
    guesses = [
        (out.logits[:, :-1].argmax(dim=-1) == batch["labels"][:, 1:])[batch["labels"][:, 1:] != -100]
        for out, batch in zip(outputs, batches, strict=True)
    ]
    assert found["eval_accuracy"] == pytest.approx(float(torch.cat(guesses).double().mean()))


def noisy() -> EquilibriumForCausalLM:
    cell = TransformerConfig(width=16, heads=2, inner=32, memory=8, window=24, dropout=0.1, attention_dropout=0.1)
    config = EquilibriumConfig.of(LanguageConfig(cell, dropout=0.2), VOCABULARY, method=METHOD, edge_reads_as=0)
    torch.manual_seed(3)
    return contractive(EquilibriumForCausalLM(config).double())


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(tmp_path):
    choices = {"max_steps": 6, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}
    whole, rest = noisy(), noisy()
    training = trainer(whole, tmp_path, **choices)
    training.train()
    saved = tmp_path / "checkpoint-3"
    assert torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    own = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    files = {file.name for file in saved.iterdir()} - own  # those of Trainer
    assert files == {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}
    torch.manual_seed(99)
    resumed = trainer(rest, tmp_path / "rest", **choices)
    resumed.train(resume_from_checkpoint=str(saved))
    for (name, a), (_, b) in zip(whole.state_dict().items(), rest.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert losses(training) == losses(resumed)
    twin = EquilibriumForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert twin.dtype == torch.float64
    for (name, a), (_, b) in zip(whole.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hf.training"]
    paths = [str(Path(__file__).parent.parent), *sys.path]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *launcher, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model = fresh(losses=EXTRA)
    one = trainer(model, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    one.train()
    found, numbers = load_file(tmp_path / "weights.safetensors"), json.loads((tmp_path / "numbers.json").read_text())
    for name, value in model.state_dict().items():
        # Adam divides by the size of a gradient: where it is nearly 0, the last digits of the solves decide.
        assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert numbers["losses"] == pytest.approx(losses(one), rel=1e-6)
    assert math.isfinite(numbers["eval"])


def test_a_text_after_padding_is_refused_where_its_first_token_was_counted(tmp_path):
    """Trainer divides by the number of all labels but those of column 0."""
    left = tokenizer()
    left.padding_side = "left"
    training = trainer(fresh(), tmp_path)
    training.data_collator = DataCollatorForLanguageModeling(left, mlm=False)
    with pytest.raises(ValueError, match="padding_side = 'right'"):
        training.train()
    batches = [DataCollatorForLanguageModeling(one, mlm=False)(ROWS[:3]) for one in (left, tokenizer())]
    mean = [fresh()(**batch).loss for batch in batches]
    assert_close(mean[0], mean[1], rtol=SOLVED, atol=0)


def test_label_smoothing_is_refused(tmp_path):
    """Trainer would neither shift the labels of a class that it does not know, nor leave the edge out of the mean."""
    with pytest.raises(ValueError, match="label_smoothing_factor=0"):
        trainer(fresh(), tmp_path, label_smoothing_factor=0.1).train()
