"""How solvers and their settings do on trained models: evaluations forward and products backward, and the curves.

equilibria train tiny --out tiny; equilibria train tiny-trellis --out tiny-trellis
equilibria train ptb --data FOLDER --out ptb --stages.0.steps 400 --stages.1.steps 250
python benchmarks/tuning.py tiny tiny-trellis ptb --data FOLDER
    prints the tables, writes results/tuning.json, docs/pictures/tuning.png and its part of docs/evidence/measured.md

Eight segments of the validation text that follow one another, as in training (dropout inside the layer included),
float32, each solved from the cell's own start until every sample is done. Counts are means over the segments; one
that spends the budget of 200 counts as 200 and is marked.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import PICTURES, publish
from matplotlib.figure import Figure

from equilibria import Anderson, Broyden, Equilibrium, Implicit, Method, Picard, Solver, Stop
from equilibria.lm.corpora import Segments
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.runs.trained import load

SOLVERS: dict[str, Solver] = {
    "Picard()": Picard(),
    **{f"Anderson({window})": Anderson(window=window) for window in (2, 3, 4, 6, 8, 12)},
    **{f"Anderson(6, mixing={mixing})": Anderson(mixing=mixing) for mixing in (0.7, 1.3)},
    **{f"Anderson(6, ridge={ridge:g})": Anderson(ridge=ridge) for ridge in (1e-10, 1e-4, 1e-2)},
    **{f"Broyden({rank})": Broyden(rank=rank) for rank in (5, 10, 20, 40)},
    "Anderson(6, bfloat16)": Anderson(history_dtype=torch.bfloat16),
    "Broyden(20, bfloat16)": Broyden(history_dtype=torch.bfloat16),
}
TOLERANCES = (1e-2, 1e-3, 1e-4)
DRAWN = ("Picard()", "Anderson(3)", "Anderson(6)", "Broyden(20)")
BUDGET = 200


def segments_of(loaded: Any, count: int) -> list[tuple[Any, Any]]:
    """Inputs x of the layer and the memories before them."""
    model, training = loaded.model, loaded.experiment.training
    stream = Segments(
        loaded.corpus.valid, batch_size=training.batches.batch_size, length=training.batches.segment_length
    )
    found, memory = [], None
    with eval_mode(model):
        for index in range(count + 1):
            segment = stream.at(index)
            if index > 0:
                found.append((model.embedding(segment.tokens), memory))
            memory = model(segment.tokens, segment.targets, memory).memory
    return found


def solved(layer: Equilibrium, x: Any, memory: Any, *, method: Method, seed: int) -> tuple[Any, Any]:
    """The solutions forward and backward, of a cotangent drawn at random."""
    torch.manual_seed(seed)  # the same masks for all
    out = layer(x, memory, method=method)
    out.output.backward(torch.randn(out.output.shape, generator=torch.Generator().manual_seed(seed)))
    assert out.solution is not None
    return out.solution, out.solution.adjoint[-1]


def measure(runs: list[Path], data: Path | None, segments: int) -> list[dict[str, Any]]:
    """One row per run, solver and tolerance."""
    rows = []
    for run in runs:
        loaded = load(run, data=data if run.name == "ptb" else None)
        layer = loaded.model.layer
        assert isinstance(layer, Equilibrium)
        inputs = segments_of(loaded, segments)
        layer.train()
        for rtol in TOLERANCES:
            for name, solver in SOLVERS.items():
                stop = Stop(rtol=rtol, atol=0, max_evals=BUDGET)
                method = Method(solver, stop, Implicit(solver, stop))
                pairs = [solved(layer, x, past, method=method, seed=seed) for seed, (x, past) in enumerate(inputs)]
                row: dict[str, Any] = {"model": run.name, "rtol": rtol, "solver": name}
                for which, several in zip(("forward", "backward"), zip(*pairs, strict=True), strict=True):
                    row[which] = statistics.mean(solution.evals for solution in several)
                    row[f"{which}_converged"] = all(bool(solution.converged.all()) for solution in several)
                    worst = several[0].trace.amax(dim=1) if rtol == TOLERANCES[-1] else several[0].trace[:0, 0]
                    row[f"{which}_trace"] = [float(f"{residual:.3e}") for residual in worst.tolist()]
                print({key: value for key, value in row.items() if "trace" not in key}, flush=True)
                rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]]) -> Path:
    """The residual of the worst sample against evaluations, for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(models), 6.4), layout="constrained")
    for panel, axes in zip(
        [(model, which) for which in ("forward", "backward") for model in models],
        figure.subplots(2, len(models), sharey=True).flat,
        strict=True,
    ):
        model, which = panel
        for row in rows:
            if row["model"] == model and row["solver"] in DRAWN and row["rtol"] == TOLERANCES[-1]:
                curve = row[f"{which}_trace"]
                axes.semilogy(range(1, len(curve) + 1), curve, label=row["solver"])
        axes.set(title=f"{model}, {which}", xlim=(0, 60), ylim=(TOLERANCES[-1] / 2, 3))
        axes.set(xlabel="evaluations" if which == "forward" else "VJPs")
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="relative residual, worst sample")
    figure.axes[len(models)].set(ylabel="relative residual, worst sample")
    figure.axes[0].legend()
    path = PICTURES / "tuning.png"
    figure.savefig(path, dpi=110)
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation: forward + backward."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["rtol"], row["solver"]): row for row in rows}
    heads = [f"`{model}`, {rtol:g}" for model in models for rtol in TOLERANCES]
    lines = [f"| solver | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name in SOLVERS:
        cells = [_cell(found[model, rtol, name]) for model in models for rtol in TOLERANCES]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return " + ".join(
        f"{row[which]:.0f}" + ("" if row[f"{which}_converged"] else "*") for which in ("forward", "backward")
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--segments", type=int, default=8)
    given = parser.parse_args()
    found = measure(given.runs, given.data, given.segments)
    print(draw(found))
    publish("tuning", found, table(found), page="evidence/measured")
