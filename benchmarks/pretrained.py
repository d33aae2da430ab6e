"""The model `tiny` inside the library: a trained run, reduced to what using it needs.

    equilibria train tiny --out runs/tiny --threads 1
    python benchmarks/pretrained.py runs/tiny

It writes src/equilibria/lm/pretrained/tiny/ and prints the scores of the stored weights beside those of the run, for
the card, pretrained/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import torch

import equilibria
from equilibria.lm.runs import checkpoint
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.shipped import FOLDER, TEXTS
from equilibria.lm.runs.trained import Trained

PROMPT = "The "


def reduced(run: Run, trained: Trained, target: Path, dtype: torch.dtype) -> None:
    """Write the run without optimiser and memory, with its weights in ``dtype``, and with its held-out text."""
    best = run.best()
    target.mkdir(parents=True)
    for name in ("experiment.json", "corpus.json", "metrics.jsonl"):
        shutil.copy(run.path / name, target / name)
    weights = {name: tensor.to(dtype) for name, tensor in trained.model.state_dict().items() if name in best.model}
    stored = dataclasses.replace(best, model=weights, memory={}, optimiser={})
    checkpoint.save(target / "checkpoints", stored)
    (target / TEXTS).mkdir()
    for split in ("valid", "test"):
        text = trained.vocabulary.decode(trained.stream(split).ids)
        (target / TEXTS / f"{split}.txt").write_bytes(text.encode())
    (target / "report").mkdir()
    sample = {"prompt": PROMPT, "text": trained.generate(PROMPT)}
    (target / "report" / "sample.json").write_text(json.dumps(sample, indent=1), encoding="utf-8", newline="\n")


def scores(trained: Trained) -> dict[str, str]:
    """Bits per character of both held-out splits, the text read in one piece."""
    return {split: f"{trained.evaluate(split).bits:.4f}" for split in ("valid", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=FOLDER / "tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    trained = equilibria.load(options.run)
    shutil.rmtree(options.out, ignore_errors=True)
    reduced(Run.open(options.run), trained, options.out, getattr(torch, options.dtype))
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{options.run}, step {trained.step:,}: {scores(trained)}")
    print(f"{options.out}, {options.dtype}, {size / 2**20:.2f} MiB: {scores(equilibria.load(options.out))}")


if __name__ == "__main__":
    main()
