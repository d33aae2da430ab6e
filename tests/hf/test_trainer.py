"""transformers' Trainer: accumulation, evaluation, a resumed training, two processes."""

from __future__ import annotations

import functools
import itertools
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
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from equilibria.cells import TransformerConfig
from equilibria.hf import EquilibriumConfig, EquilibriumForCausalLM
from equilibria.lm.corpora import PythonDocs, Segments
from equilibria.lm.experiments import Experiment, Stage, Training
from equilibria.lm.experiments.decay import learning_rate
from equilibria.lm.model import LanguageConfig
from equilibria.lm.training import Trainer as OwnTrainer
from small_experiment import corpus

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


class InOrder(Trainer):
    """Rows in their order, as the library reads a text."""

    def _get_train_sampler(self, *args, **choices):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self, model):
        self.model, self.found = model, []

    def on_step_end(self, *args, **choices):
        self.found.append({name: value.clone() for name, value in self.model.state_dict().items()})


STEPS, PEAK, WARMUP = 5, 0.01, 2


def own_training(language, accumulate, *, on_event):
    """The library's own trainer, whose segments are independent rows: the cell has no memory."""
    settings = {"batch_size": 4, "segment_length": 8, "learning_rate": PEAK, "warmup": WARMUP, "optimiser": "adamw"}
    settings |= {"clip": 0.25, "weight_decay": 0.1, "accumulate": accumulate, "log_every": 1, "valid_every": 5}
    settings |= {"baseline": False, "spectral_radius": 0, "measure_memory": False, "device": "cpu", "threads": 1}
    stage = Stage(name="only", steps=STEPS, method=METHOD)
    experiment = Experiment("same", PythonDocs(), language, (stage,), Training().changed(**settings))
    training = OwnTrainer(experiment, None, corpus(), on_event=on_event)
    contractive(training.model)
    return training


@pytest.mark.parametrize("accumulate", [1, 4])
def test_its_steps_are_those_of_the_library(accumulate, tmp_path, monkeypatch):
    """Loss, extra losses, accumulation, clipping, AdamW with decay, and the rate, step by step."""
    torch.set_default_dtype(torch.float64)
    try:
        events, text = [], corpus()
        language = LanguageConfig(TransformerConfig(width=16, heads=2, inner=32, memory=0), losses=EXTRA)
        own = own_training(language, accumulate, on_event=events.append)
        model = EquilibriumForCausalLM(EquilibriumConfig.of(language, len(text.vocabulary), method=METHOD)).double()
        model.model.load_state_dict(own.model.state_dict())
        segments = itertools.islice(Segments(text.train, batch_size=4, length=8), STEPS)
        rows = [row for s in segments for row in torch.cat([s.tokens, s.targets[:, -1:]], dim=1).tolist()]
        found = Weights(own.model)
        after = own._after
        monkeypatch.setattr(own, "_after", lambda step: (found.on_step_end(), after(step)))
        own.fit()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
        rate = functools.partial(learning_rate, peak=PEAK, warmup=WARMUP, total=STEPS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: rate(done + 1))
        choices = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
        usual = {"max_steps": STEPS, "max_grad_norm": 0.25, "logging_steps": 1, "save_strategy": "no"}
        quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
        theirs = InOrder(
            model,
            TrainingArguments(str(tmp_path), **choices, **usual, **quiet),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizers=(optimiser, schedule),
            callbacks=[wanted := Weights(model.model)],
        )
        theirs.train()
    finally:
        torch.set_default_dtype(torch.float32)
    ours = [event for event in events if event["event"] == "step"]
    lines = [line for line in theirs.state.log_history if "loss" in line]
    assert len(ours) == len(lines) == len(found.found) == len(wanted.found) == STEPS
    for mine, line, a, b in zip(ours, lines, found.found, wanted.found, strict=True):
        assert mine["loss"] + mine["extra"] == pytest.approx(line["loss"], rel=1e-6)  # Trainer sums in float32
        assert mine["gradient_norm"] == pytest.approx(line["grad_norm"], rel=1e-6)
        assert mine["learning_rate"] == line["learning_rate"]
        for name, value in a.items():
            assert_close(value, b[name], rtol=0, atol=SOLVED, msg=name)


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
