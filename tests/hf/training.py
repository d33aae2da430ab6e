"""transformers' Trainer on a small model; as a program, one of the processes of a torchrun.

python -m torch.distributed.run --nproc-per-node 2 -m hf.training FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from equilibria.hf import EquilibriumForCausalLM, tokenizer_of
from equilibria.lm.corpora import Vocabulary
from equilibria.lm.model import ExtraLosses

from .models import VOCABULARY, configuration, contractive, tokens

EXTRA = ExtraLosses(activation=0.1, temporal_activation=0.2)
LENGTHS = (9, 4, 6, 7, 5, 9, 8, 3)
"""The texts of a batch differ in length, and so do the longest ones of its parts."""
ROWS = [{"input_ids": tokens(LENGTHS[i % 8], seed=i).tolist()} for i in range(24)]


def tokenizer():
    """The letters of the small models; training pads after the text."""
    found = tokenizer_of(Vocabulary.of_tokens([chr(ord("a") + i) for i in range(VOCABULARY)], "character"))
    found.padding_side = "right"
    return found


def fresh(kind: str = "transformer", **changes) -> EquilibriumForCausalLM:
    torch.manual_seed(3)
    return contractive(EquilibriumForCausalLM(configuration(kind, **changes)).double())


def trainer(model, folder: Path, *, rows=None, metrics=None, **choices) -> Trainer:
    """A Trainer of four texts per step, which are two batches of two unless the choices say otherwise."""
    usual = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**usual, **choices}),
        train_dataset=ROWS if rows is None else rows,
        eval_dataset=ROWS[:6],
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        compute_metrics=metrics,
    )


def losses(trained: Trainer) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def main(folder: Path) -> None:
    """Two processes with a batch of two each, the extra losses included."""
    torch.set_num_threads(1)
    training = trainer(fresh(losses=EXTRA), folder, gradient_accumulation_steps=1, ddp_backend="gloo")
    assert training.args.world_size == 2
    training.train()
    metrics = training.evaluate()
    if training.is_world_process_zero():
        save_file(training.accelerator.unwrap_model(training.model).state_dict(), folder / "weights.safetensors")
        (folder / "numbers.json").write_text(json.dumps({"losses": losses(training), "eval": metrics["eval_loss"]}))
    torch.distributed.barrier()  # the process that writes is the last


if __name__ == "__main__":
    main(Path(sys.argv[1]))
