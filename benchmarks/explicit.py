"""A training step and inference of a trained DEQ-Transformer beside explicit networks of the same cell.

equilibria train ptb --data FOLDER --out RUN --stages.0.steps 400 --stages.1.steps 250
python benchmarks/explicit.py --data FOLDER --run RUN
    prints the tables, writes results/explicit.json and its part of docs/reproducing.md

Tied networks have the weights of the run; those of an untied one (a Transformer-XL) are as drawn, since they do not
decide on its time. Ratios are to 12 tied layers, to 16 and to 18 untied ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from machine import keep, write_into_docs
from steps import compare, table

from equilibria import Anderson, Broyden, Implicit, Phantom, Stop
from equilibria.commands.loading import trained
from equilibria.corpora import Segments
from equilibria.language import Explicit, LanguageModel
from equilibria.language.modes import evaluating

BASES = ("12 layers, tied", "16 layers, untied", "18 layers, untied")
EXPLICIT = {
    "12 layers, tied": Explicit(12),
    "12 layers, tied, checkpointed": Explicit(12, checkpoint=True),
    "16 layers, untied": Explicit(16, tied=False, memory="layers"),
    "18 layers, untied": Explicit(18, tied=False, memory="layers"),
    "18 layers, untied, checkpointed": Explicit(18, tied=False, memory="layers", checkpoint=True),
    "60 layers, tied": Explicit(60),
    "60 layers, tied, checkpointed": Explicit(60, checkpoint=True),
}


def equilibria() -> dict[str, dict[str, Any]]:
    """Names, and what the layer solves by."""
    found: dict[str, dict[str, Any]] = {}
    for rtol in (1e-2, 1e-3):
        stop = Stop(rtol=rtol, max_evals=60)
        for solver in (Anderson(window=6), Broyden(memory=20)):
            name = f"equilibrium, {type(solver).__name__}, {rtol:g}"
            found[name] = {"solver": solver, "stop": stop, "gradient": Implicit(solver, stop)}
    stop = Stop(rtol=1e-2, max_evals=60)
    found["equilibrium, Anderson, 0.01, Phantom(1)"] = {
        "solver": Anderson(window=6),
        "stop": stop,
        "gradient": Phantom(steps=1),
    }
    return found


def networks(run: Path, data: Path) -> tuple[dict[str, LanguageModel], Any]:
    """The models by name, in training mode, and the run."""
    loaded = trained(run, data=data)
    shape, words, weights = loaded.experiment.model, loaded.model.vocabulary_size, loaded.model.state_dict()
    models: dict[str, LanguageModel] = {}
    for name, parts in equilibria().items():
        models[name] = shape.build(words, **parts)
        models[name].load_state_dict(weights)
    for name, explicit in EXPLICIT.items():
        models[name] = dataclasses.replace(shape, explicit=explicit).build(words, **parts)  # which solve nothing
        if explicit.tied:
            models[name].load_state_dict(weights)
    return {name: model.train() for name, model in models.items()}, loaded


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    by_name, source = networks(given.run, given.data)
    training = source.experiment.training
    batches = iter(Segments(source.corpus.train, batch_size=training.batch_size, length=training.segment_length))
    before, segment = next(batches), next(batches)

    def past(model: LanguageModel) -> Any:
        """The memory of the segment before."""
        with evaluating(model):
            return model(before.tokens, before.targets).memory

    rows = compare(by_name, segment, past, base=BASES[0], repeats=given.repeats)
    of = {row["network"]: row for row in rows}
    for row in rows:
        for base in BASES:
            row[f"train_ratio to {base}"] = row["train_seconds"] / of[base]["train_seconds"]
            row[f"inference_ratio to {base}"] = row["inference_seconds"] / of[base]["inference_seconds"]
            row[f"layer_share of {base}"] = row["layer_mib"] / of[base]["layer_mib"]
    heads = [f"training, to {base} | inference, to {base}" for base in BASES[1:]]
    ratios = [f"| network | {' | '.join(heads)} |", "|---|" + "---:|" * 2 * len(heads)]
    for row in rows:
        if "forward" in row:
            cells = [f"{row[f'{kind}_ratio to {base}']:.2f}" for base in BASES[1:] for kind in ("train", "inference")]
            ratios.append(f"| {row['network']} | {' | '.join(cells)} |")
    text = table(rows) + "\n\n" + "\n".join(ratios)
    print(text)
    print(keep("explicit", {"step": source.step, "networks": rows}))
    write_into_docs("explicit", text)
