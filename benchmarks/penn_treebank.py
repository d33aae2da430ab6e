"""A twenty-minute run of the recipe `ptb` on one CPU thread: perplexity against time, and the final scores.

python benchmarks/penn_treebank.py --data FOLDER [--run runs/ptb-20-minutes]

Trains (or reads the run, if it is there), then scores the whole validation and test streams with batch size 1, and
writes results/penn_treebank.json and docs/pictures/penn_treebank.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import PICTURES, keep

from equilibria.__main__ import main as command
from equilibria.lm.evaluation import evaluate
from equilibria.lm.runs.trained import load

FLAGS = {
    "--training.threads": 1,
    "--stages.0.steps": 1150,
    "--stages.1.steps": 720,
    "--training.valid-every": 200,
    "--training.valid-segments": 30,
}


def curve(run: Path) -> list[dict[str, object]]:
    """Validation perplexity (on the first 30 segments of ten streams) against seconds of training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    fields = ("step", "stage", "seconds", "perplexity", "tokens")
    return [{name: line[name] for name in fields} | line["forward"] for line in lines if line["event"] == "valid"]


def scores(run: Path) -> dict[str, object]:
    """The best checkpoint on whole streams, batch size 1."""
    loaded = load(run)
    found = {}
    for split in ("valid", "test"):
        stream = getattr(loaded.corpus, split)
        score = evaluate(loaded.model, stream, segment_length=70, warm=loaded.stage.warm)
        found[split] = {"perplexity": score.perplexity, "tokens": score.tokens, **(score.forward or {})}
    return found


def plot(points: list[dict[str, object]]) -> None:
    """Perplexity against minutes, one line per stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for stage, style in (("shallow", "C1o-"), ("implicit", "C0o-")):
        line = [(point["seconds"] / 60, point["perplexity"]) for point in points if point["stage"] == stage]
        axes.plot(*zip(*line, strict=True), style, label=stage)
    axes.set(xlabel="minutes on one CPU thread", ylabel="validation perplexity", yscale="log")
    found = [point["perplexity"] for point in points]
    ticks = [t for t in (100, 150, 200, 300, 400, 600, 800) if 0.8 * min(found) <= t <= 1.3 * max(found)]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "penn_treebank.png", dpi=160)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/ptb-20-minutes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.run.exists():
        words = [str(word) for pair in FLAGS.items() for word in pair]
        command(["train", "ptb", "--data", str(options.data), "--out", str(options.run), *words])
    points, final = curve(options.run), scores(options.run)
    for point in points:
        place = f"{point['stage']:<9} step {point['step']:>5} {point['seconds']:7.0f} s"
        print(f"{place}   perplexity {point['perplexity']:.1f}   evaluations {point['evals']:.1f}")
    print(json.dumps(final, indent=1))
    print(keep("penn_treebank", {"curve": points, "scores": final}))
    plot(points)
