"""A small pretrained Llama with two of its four layers as an equilibrium, before and after fine-tuning.

python benchmarks/retrofit.py [--pretraining 2000] [--steps 300] [--seeds 3]

The text is the source of Python's standard library, byte by byte, of which every tenth file is held out. For each seed
one network is trained; then for each share a of z the same number of further steps follows, with the same batches and
rate. The row "explicit" is the network without a loop, trained as long. Writes results/retrofit.json and the table in
docs/howto/retrofit.md.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from machine import publish
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from equilibria.hf import equilibrium_of

LAYERS = range(1, 3)
SHARES = (None, 0.25, 0.5, 0.75)
LENGTH, BATCH, RATE = 32, 8, 2e-3


def texts() -> tuple[Tensor, Tensor]:
    """Bytes for training, and held-out ones."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held = b"".join(file.read_bytes() for file in files[::10])
    rest = b"".join(file.read_bytes() for file in files if file not in files[::10])
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (rest, held))  # pyright: ignore


def batch(text: Tensor, generator: random.Random, size: int = BATCH) -> Tensor:
    """Random pieces of a text."""
    starts = [generator.randrange(len(text) - LENGTH) for _ in range(size)]
    return torch.stack([text[start : start + LENGTH] for start in starts])


def trained(model: Any, text: Tensor, steps: int, seed: int) -> float:
    """Train the model; returns the seconds per step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draws, begun = random.Random(seed), time.perf_counter()
    model.train()
    for _ in range(steps):
        ids = batch(text, draws)
        optimiser.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return (time.perf_counter() - begun) / max(steps, 1)


@torch.no_grad()
def measured(model: Any, text: Tensor, solves: list[Any]) -> dict[str, float | None]:
    """Bits per byte of held-out text, and the mean evaluations and share of converged rows of its solves."""
    solves.clear()
    model.eval()
    draws = random.Random(99)
    losses = [float(model(ids, labels=ids, use_cache=False).loss) for ids in (batch(text, draws, 64) for _ in range(8))]
    found = [out.solution for out in solves]
    return {
        "bits": statistics.mean(losses) / 0.6931471805599453,
        "evals": statistics.mean(solution.evals for solution in found) if found else None,
        "converged": statistics.mean(float(solution.converged.float().mean()) for solution in found) if found else None,
    }


def rows(seed: int, pretraining: int, steps: int) -> list[dict[str, Any]]:
    """One row per share of z."""
    train, held = texts()
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))
    trained(base, train, pretraining, seed)
    found = []
    for share in SHARES:
        model, solves = copy.deepcopy(base), []
        if share is not None:
            equilibrium_of(model, LAYERS, share, on_failure="ignore", watch=solves.append)
        before = measured(model, held, solves)
        seconds = trained(model, train, steps, seed + 100)
        row = {"seed": seed, "share": share, "seconds": seconds}
        found.append(row | {"before": before, "after": measured(model, held, solves)})
        print(found[-1], flush=True)
    return found


def table(found: list[dict[str, Any]], pretraining: int, steps: int) -> str:
    """The means over the seeds as Markdown."""
    lines = [
        "| | bits per byte before | evaluations | converged | after fine-tuning | evaluations | converged | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        chosen = [row for row in found if row["share"] == share]

        def mean(when: str, name: str, chosen: list[dict[str, Any]] = chosen) -> float | None:
            values = [row[when][name] for row in chosen]
            return None if values[0] is None else statistics.mean(values)

        cells = ["explicit" if share is None else f"a = {share}"]
        for when in ("before", "after"):
            evals, converged = mean(when, "evals"), mean(when, "converged")
            cells.append(f"{mean(when, 'bits'):.3f}")
            cells += ["", ""] if evals is None else [f"{evals:.1f}", f"{100 * (converged or 0):.0f} %"]
        cells.append(f"{1000 * statistics.mean(row['seconds'] for row in chosen):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({row["seed"] for row in found})
    after = [[row["after"]["bits"] for row in found if row["share"] == share] for share in SHARES]
    spread = max(max(values) - min(values) for values in after)
    average = f"Means over {len(seeds)} seeds, up to {spread:.3f} bits apart after fine-tuning"
    average = "One seed" if len(seeds) == 1 else average
    lines += [
        "",
        f"{average}. The network had {pretraining:,} steps before, and all rows had the same {steps} more, solved to a "
        "relative tolerance of 1e-4. The time is per step, of one thread on a machine with other work.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = [row for seed in range(args.seeds) for row in rows(seed, args.pretraining, args.steps)]
    publish("retrofit", found, table(found, args.pretraining, args.steps), page="howto/retrofit")


if __name__ == "__main__":
    main()
