"""A training step and inference of a trained DEQ-Transformer beside explicit networks of the same cell.

equilibria train ptb --data FOLDER --out RUN --stages.0.steps 400 --stages.1.steps 250
python benchmarks/explicit.py --data FOLDER --run RUN
    prints the tables, writes results/explicit.json and its part of docs/evidence/reproducing.md

Tied networks have the weights of the run; those of an untied one (a Transformer-XL) are as drawn, since they do not
decide on its time. Ratios are to 12 tied layers, to 16 and to 18 untied ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from machine import publish
from steps import compare, table

from equilibria import Anderson, Broyden, Equilibrium, Implicit, Method, Phantom, Stop
from equilibria.lm.corpora import Segment, Segments
from equilibria.lm.device import device_of
from equilibria.lm.model import Explicit, LanguageConfig, LanguageModel
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.runs.trained import load
from equilibria.lm.training.compilation import compile_cells

BASES = ("12 layers, tied", "16 layers, untied", "18 layers, untied")
COMPILED = ", compiled"
EXPLICIT = {
    "12 layers, tied": Explicit(12),
    "12 layers, tied, checkpointed": Explicit(12, checkpoint=True),
    "12 layers, tied, compiled": Explicit(12),
    "16 layers, untied": Explicit(16, tied=False, memory="layers"),
    "18 layers, untied": Explicit(18, tied=False, memory="layers"),
    "18 layers, untied, checkpointed": Explicit(18, tied=False, memory="layers", checkpoint=True),
    "60 layers, tied": Explicit(60),
    "60 layers, tied, checkpointed": Explicit(60, checkpoint=True),
}


def equilibria() -> dict[str, Method]:
    """Names, and how the layer solves."""
    found: dict[str, Method] = {}
    for rtol in (1e-2, 1e-3):
        stop = Stop(rtol=rtol, max_evals=60)
        for solver in (Anderson(window=6), Broyden(rank=20)):
            name = f"equilibrium, {type(solver).__name__}, {rtol:g}"
            found[name] = Method(solver, stop, Implicit(solver, stop))
    loose = found["equilibrium, Anderson, 0.01"]
    found["equilibrium, Anderson, 0.01, compiled"] = loose
    short = Anderson(window=4)
    found["equilibrium, Anderson(4), 0.01"] = Method(short, loose.stop, Implicit(short, loose.stop))
    found["equilibrium, Anderson, 0.01, Phantom(1)"] = dataclasses.replace(loose, gradient=Phantom(steps=1))
    return found


def networks(source: LanguageModel, config: LanguageConfig, names: Collection[str] = ()) -> dict[str, LanguageModel]:
    """The models by name, in training mode and on the device of ``source``, whose weights they have if they are tied.

    Args:
        source: gives vocabulary, weights and device.
        config: builds the models.
        names: of the models; empty for all.
    """
    words, weights, device = source.vocabulary_size, source.state_dict(), device_of(source)
    models: dict[str, LanguageModel] = {}
    for name, method in equilibria().items():
        if not names or name in names:
            models[name] = config.build(words, method=method)
            models[name].load_state_dict(weights)
    for name, explicit in EXPLICIT.items():
        if not names or name in names:
            models[name] = dataclasses.replace(config, explicit=explicit).build(words)
            if explicit.tied:
                models[name].load_state_dict(weights)
    for name, model in models.items():
        if name.endswith(COMPILED):
            compile_cells(model)
    return {name: model.to(device).train() for name, model in models.items()}


def starts(model: LanguageModel, segments: list[Segment]) -> list[dict[str, Any]]:
    """Evaluations, without a graph, from other starts than zero: means over segments that follow one another."""
    layer, rows = model.layer, []
    assert isinstance(layer, Equilibrium)
    for mode in ("training", "evaluation"):
        found: dict[str, list[int]] = {}
        with eval_mode(model):
            layer.train(mode == "training")  # dropout inside the layer alone
            past = model(segments[0].tokens, segments[0].targets)
            for segment in segments[1:]:
                x = model.embedding(segment.tokens)
                for name in ("zero", "the last state of the past at all positions", "the states of the segment before"):
                    torch.manual_seed(len(found))
                    start = past.solution.z if name.startswith("the states") else None
                    solution = layer(x, past.memory, start=start, warm=name.startswith("the last")).solution
                    assert solution is not None
                    found.setdefault(name, []).append(solution.evals)
                past = model(segment.tokens, segment.targets, past.memory)
        rows += [{"mode": mode, "start": name, "evals": statistics.mean(evals)} for name, evals in found.items()]
    return rows


def table_of_starts(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = ["| start | evaluations in training | in evaluation |", "|---|---:|---:|"]
    for start in dict.fromkeys(row["start"] for row in rows):
        found = {row["mode"]: row["evals"] for row in rows if row["start"] == start}
        lines.append(f"| {start} | {found['training']:.1f} | {found['evaluation']:.1f} |")
    return "\n".join(lines)


def table_of_compiled(rows: list[dict[str, Any]]) -> str:
    """What compiling the cell changes in time; the memory of compiled code is not measured."""
    of = {row["network"]: row for row in rows}
    lines = ["| compiled / not compiled | training step | inference |", "|---|---:|---:|"]
    for name, row in of.items():
        if name.endswith(COMPILED):
            plain = of[name.removesuffix(COMPILED)]
            ratios = [row[kind] / plain[kind] for kind in ("train_seconds", "inference_seconds")]
            lines.append(f"| {name.removesuffix(COMPILED)} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


def table_of_ratios(rows: list[dict[str, Any]]) -> str:
    """To the untied networks."""
    heads = [f"{kind}, to {base}" for base in BASES[1:] for kind in ("training", "inference", "memory of the layer")]
    lines = [f"| network | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in (row for row in rows if "forward" in row):
        cells = [
            f"{row[f'{kind} to {base}']:{'.1%' if kind == 'layer_mib' else '.2f'}}"
            for base in BASES[1:]
            for kind in ("train_seconds", "inference_seconds", "layer_mib")
        ]
        lines.append(f"| {row['network']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    source = load(given.run, data=given.data)
    training = source.experiment.training
    reader = iter(
        Segments(source.corpus.train, batch_size=training.batches.batch_size, length=training.batches.segment_length)
    )
    several = [next(reader) for _ in range(9)]
    by_name = networks(source.model, source.experiment.model)
    other = starts(by_name["equilibrium, Anderson, 0.01"], several)

    def past(model: LanguageModel) -> Any:
        """The memory of the segment before."""
        with eval_mode(model):
            return model(several[0].tokens, several[0].targets).memory

    found = compare(by_name, several[1], past, base=BASES[0], repeats=given.repeats)
    of = {row["network"]: row for row in found}
    for row in found:
        for base in BASES:
            for kind in ("train_seconds", "inference_seconds", "layer_mib"):
                row[f"{kind} to {base}"] = row[kind] / of[base][kind]
    eager = [row for row in found if not row["network"].endswith(COMPILED)]
    parts = [table(eager), table_of_ratios(eager), table_of_compiled(found), table_of_starts(other)]
    text = "\n\n".join(parts)
    publish("explicit", {"step": source.step, "networks": found, "starts": other}, text)
