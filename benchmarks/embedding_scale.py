"""How the start of the recipe `tiny` depends on the scale of its embedding, and on the kind of positions.

python benchmarks/embedding_scale.py       600 shallow steps each, then the loss on the first 100 segments of validation
                                           text; writes results/embedding_scale.json
"""

from __future__ import annotations

import dataclasses
import itertools

from machine import keep

from equilibria.lm.evaluation import evaluate
from equilibria.lm.recipes import RECIPES
from equilibria.lm.training import Trainer

VARIANTS = (("decay", 0.01), ("decay", 0.05), ("decay", 0.1), ("decay", 0.2), ("relative", 0.1))


def bits(positions: str, std: float) -> float:
    """Validation bits per character after the shallow steps; the learning rate falls over just these."""
    tiny = RECIPES["tiny"]()
    cell = dataclasses.replace(tiny.model.cell, positions=positions)
    shallow = dataclasses.replace(tiny.stages[0], steps=600)
    model = dataclasses.replace(tiny.model, cell=cell, std=std)
    experiment = dataclasses.replace(tiny, model=model, stages=(shallow,))
    corpus = experiment.corpus.load()
    trainer = Trainer(experiment, None, corpus)
    for segment in itertools.islice(trainer._batches(), experiment.total_steps):
        trainer.step(segment)
    return evaluate(trainer.model, corpus.valid, batch_size=8, segment_length=64, max_segments=100).bits


if __name__ == "__main__":
    table = []
    for positions, std in VARIANTS:
        table.append({"positions": positions, "std": std, "bits": bits(positions, std)})
        print(f"{positions:<9} std {std:<5} {table[-1]['bits']:.3f} bits per character", flush=True)
    print(keep("embedding_scale", table))
