"""Copy memory after 100 blanks: the equilibrium, an LSTM and a GRU of the same size.

python benchmarks/copying.py

One training after another, one thread; each is scored on the whole test set. Writes results/copying.json and its part
of docs/evidence/reproducing.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from machine import keep, write_into_docs

from equilibria.__main__ import main as command
from equilibria.lm.corpora import memoryless_optimum
from equilibria.lm.evaluation import evaluate
from equilibria.lm.runs.trained import load

RUNS = Path("runs/copying-benchmark")
NAMES = ("copying", "copying-lstm", "copying-gru")


def scored(name: str) -> dict[str, Any]:
    """Train by the command line, then score the best checkpoint on all test sequences."""
    path = RUNS / name
    if not path.exists():
        command(["train", name, "--out", str(path), "--training.threads", "1"])
    loaded = load(path)
    score = evaluate(loaded.model, loaded.corpus.test, batch_size=40, warm=loaded.stage.warm)
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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
    return "\n".join([*lines, f"| the best without memory | | | | {memoryless_optimum(100):.2e} | 12.50% |"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {name: scored(name) for name in NAMES}
    print(json.dumps(found, indent=1))
    print(table(found))
    print(keep("copying", found))
    write_into_docs("copying", table(found))
