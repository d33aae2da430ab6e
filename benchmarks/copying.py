"""Copy memory after 100 and after 400 blanks: the equilibrium, an LSTM, a GRU and a TCN of the same size.

python benchmarks/copying.py [NAME …]

One training after another, one thread; each is scored on the whole test set. Trainings that are there are read, and
stopped ones continue. Writes results/copying.json and its part of docs/evidence/reproducing.md; with names, the other
rows stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, publish

from equilibria.__main__ import main as command
from equilibria.lm.corpora import memoryless_optimum
from equilibria.lm.evaluation import evaluate
from equilibria.lm.runs.trained import load

RUNS = Path("runs/copying-benchmark")
_LONG = ("--corpus.blank", "400", "--segment-length", "420", "--batch-size", "8")
"""The flags that make a baseline one of the full length, with the batches of ``copying-400``."""
TRAININGS: dict[str, tuple[str, ...]] = {
    "copying": ("copying",),
    "copying-lstm": ("copying-lstm",),
    "copying-gru": ("copying-gru",),
    "copying-tcn": ("copying-tcn",),
    "copying-400": ("copying-400",),
    "copying-400, β₂ = 0.999": ("copying-400", "--betas", "0.9", "0.999"),
    "copying-400, batch 32": ("copying-400", "--batch-size", "32", "--steps", "500"),
    "copying-400-lstm": ("copying-lstm", *_LONG),
    "copying-400-gru": ("copying-gru", *_LONG),
    "copying-400-tcn": ("copying-tcn", *_LONG),
}
"""The words after ``equilibria train``."""


def scored(name: str) -> dict[str, Any]:
    """Train by the command line, then score the best checkpoint on all test sequences."""
    path = RUNS / name
    log = path / "metrics.jsonl"
    if not log.exists() or '"event": "done"' not in log.read_text(encoding="utf-8"):
        command(["train", *TRAININGS[name], "--out", str(path), "--training.threads", "1", "--resume"])
    loaded = load(path)
    score = evaluate(loaded.model, loaded.corpus.test, batch_size=40, warm=loaded.stage.warm)
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step" and event["stage"] == "implicit"]
    return {
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "steps": max(event["step"] for event in events),
        "seconds": max(event.get("seconds") or 0 for event in events),
        "nats": score.nll_per_token,
        "accuracy": score.accuracy,
        "symbols": score.tokens,
        "forward": score.forward,
        "backward": steps[-1]["backward"] if steps else None,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """For the docs."""
    lines = ["| recipe | parameters | steps | seconds | test loss, nats per symbol | symbols recalled correctly |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {row['parameters']:,} | {row['steps']:,} | {row['seconds']:.0f} | {row['nats']:.2e} | "
        f"{row['accuracy']:.2%} |"
        for name, row in rows.items()
    ]
    for blank in (100, 400):
        lines.append(f"| the best without memory, {blank} blanks | | | | {memoryless_optimum(blank):.2e} | 12.50% |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or [*TRAININGS]
    result = RESULTS / "copying.json"
    kept = json.loads(result.read_text(encoding="utf-8"))["rows"] if result.exists() else {}
    for name in chosen:
        kept[name] = scored(name)
        found = {name: kept[name] for name in TRAININGS if name in kept}
        publish("copying", found, table(found))
