"""The claims and tables of "Deep Equilibrium Models" (Bai, Kolter, Koltun, NeurIPS 2019), ours beside theirs.

make paper                                             all of it; or
python benchmarks/paper.py --data FOLDER [--list]      FOLDER holds the three files of the Penn Treebank

Each number comes from a script of its own, which this one calls in turn; a part that has ended is not repeated, so
that one may stop it and call it again. The hours of each part, on two cores of a server CPU, are printed first (--list
prints them alone). Writes the last table of docs/evidence/reproducing.md from the results that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import RESULTS, write_into_docs

HERE = Path(__file__).parent
Claim = tuple[str, str, str, str]
"""A claim of the paper, its number there, ours, and the script that measures it."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One script, or one command before it."""

    name: str
    """The name under which it is noted as ended."""
    hours: float
    """Its time on two cores of a server CPU, measured or estimated from a part of it."""
    command: tuple[str, ...]
    """The arguments of the Python interpreter; DATA stands for the folder."""


PARTS = (
    Part("memory", 0.05, ("memory.py",)),
    Part("copying", 2.2, ("copying.py",)),
    Part("ptb-650-steps", 0.2, ("-m", "equilibria", "train", "ptb", "--data", "DATA", "--out", "runs/paper/ptb",
                                "--stages.0.steps", "400", "--stages.1.steps", "250", "--resume")),
    Part("explicit", 0.3, ("explicit.py", "--data", "DATA", "--run", "runs/paper/ptb")),
    Part("trellis-350-steps", 0.9, ("trellis.py", "train", "--data", "DATA", "--run", "runs/paper/trellis")),
    Part("trellis", 0.6, ("trellis.py", "measure", "--data", "DATA", "--run", "runs/paper/trellis")),
    Part("equal_parameters", 2.0, ("equal_parameters.py", "--data", "DATA")),
    Part("more_compute", 0.7, ("more_compute.py",)),
)  # fmt: skip


def rows(name: str) -> Any:
    """What a script has kept; None if it has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else None


def table() -> str:
    """Every claim and table of the paper: their number, ours, and where ours comes from, or why there is none."""
    lines = ["| claim | the paper | here | by |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(line)} |" for line in (*_copying(), *_memory(), *_time(), *_quality(), *_not_rerun())]
    return "\n".join(lines)


def _copying() -> list[Claim]:
    found = rows("copying") or {}
    published = {
        "copying-400": ("Table 1, copy memory, T = 400: DEQ-Transformer of 14K", "3.5e-6"),
        "copying-400-tcn": ("Table 1: TCN of 16K", "2.7e-5"),
        "copying-400-lstm": ("Table 1: LSTM of 14K", "0.0501"),
        "copying-400-gru": ("Table 1: GRU of 14K", "0.0491"),
    }
    return [
        (claim, theirs, f"{found[name]['nats']:.2g}, {found[name]['accuracy']:.1%} recalled", "`copying.py`")
        for name, (claim, theirs) in published.items()
        if name in found
    ]


def _networks(name: str) -> dict[str, dict[str, Any]]:
    return {row["network"]: row for row in (rows(name) or {"networks": []})["networks"]}


def _memory() -> Iterator[Claim]:
    if depths := rows("memory"):
        peak = {row["depth"]: row["bytes"] / 2**20 for row in depths if row["network"] == "equilibrium"}
        deep = {row["depth"]: row["bytes"] / 2**20 for row in depths if row["network"] == "unrolled"}
        few, many = min(peak), max(peak)
        yield (
            "Memory of a training step does not grow with depth",
            "constant",
            f"{peak[few]:.1f} MiB at {few} evaluations, {peak[many]:.1f} at {many} "
            f"(unrolled: {deep[min(deep)]:.0f} to {deep[max(deep)]:.0f})",
            "`memory.py`",
        )
    if networks := _networks("trellis"):
        share = networks["equilibrium, scan, Picard"]["layer_share"]
        yield (
            "Table 2, memory of DEQ-TrellisNet to 60 layers, Penn Treebank",
            "1.2 GB to 8.5 GB, −86 %",
            f"−{1 - share:.0%}, at the same size",
            "`trellis.py`",
        )
    if networks := _networks("explicit"):
        share = networks["equilibrium, Broyden, 0.001"]["layer_mib to 18 layers, untied"]
        yield (
            "Table 3, memory of DEQ-Transformer to 16 or 18 layers, WikiText-103",
            "2.7 GB to 8.5 GB, 3.7 GB to 9.0 GB; up to −88 %",
            f"−{1 - share:.0%} to 18 untied layers, model of the Penn Treebank",
            "`explicit.py`",
        )


def _time() -> Iterator[Claim]:
    if networks := _networks("explicit"):
        for name in ("equilibrium, Anderson, 0.01", "equilibrium, Broyden, 0.001"):
            row = networks[name]
            ratios = [row[f"{what} to 18 layers, untied"] for what in ("train_seconds", "inference_seconds")]
            yield (
                f"Table 4, time to 18 layers, training and inference ({name.removeprefix('equilibrium, ')})",
                "2.82, 1.76",
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
                "`explicit.py`",
            )
    if networks := _networks("trellis"):
        row = networks["equilibrium, scan, Picard"]
        yield (
            "Table 4, time of DEQ-TrellisNet to the deep TrellisNet, training and inference",
            "2.40, 1.64",
            f"{row['train_ratio']:.2f}, {row['inference_ratio']:.2f} to 60 layers",
            "`trellis.py`",
        )


def _quality() -> list[Claim]:
    found = rows("equal_parameters")
    if not found:
        return []
    scores = {
        name: sum(run["test"]["bits"] for run in row["runs"]) / len(row["runs"])
        for name, row in found.items()
        if isinstance(row, dict) and row.get("runs")
    }
    words = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    minutes, seeds = found["minutes"], max(len(found[name]["runs"]) for name in scores)
    return [
        (
            "Often improves over the state of the art at similar parameter counts",
            "tables 2 and 3",
            f"a million parameters, characters of the Penn Treebank, {minutes:g} minutes each, {seeds} seeds, "
            f"bits in the test: {words}",
            "`equal_parameters.py`",
        )
    ]


def _not_rerun() -> list[Claim]:
    why = "not rerun: days on a large GPU"
    return [
        ("Table 2, Penn Treebank by words: DEQ-TrellisNet of 24M", "57.1", f"{why}; recipe `ptb-trellis`", "–"),
        ("Table 3, WikiText-103: DEQ-Transformer, medium", "24.2", f"{why}; recipe `wikitext103-medium`", "–"),
        (
            "Table 3: DEQ-Transformer, medium, adaptive",
            "23.2",
            f"{why}; recipe `wikitext103-medium-adaptive`",
            "–",
        ),
        ("Table 3: DEQ-Transformer, small", "32.4", f"{why}; recipe `wikitext103-small`", "–"),
        ("Table 3: DEQ-TrellisNet of 180M", "29.0", f"{why}; recipe `wikitext103-trellis`", "–"),
    ]


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--list", action="store_true", help="print the parts and their hours, and run nothing")
    parser.add_argument("--table", action="store_true", help="write the table from the results that are there")
    options = parser.parse_args()
    ended = Path("runs/paper/ended")
    for part in PARTS:
        print(f"{part.hours:5.2f} h  {'ended' if (ended / part.name).exists() else ''}\t{part.name}")
    print(f"{sum(part.hours for part in PARTS):5.2f} h  in all")
    if not (options.list or options.table):
        if options.data is None:
            parser.error("--data FOLDER: name the folder with train.txt, valid.txt and test.txt of the Penn Treebank.")
        ended.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            if not (ended / part.name).exists():
                words = [str(options.data) if word == "DATA" else word for word in part.command]
                if words[0] != "-m":
                    words[0] = str(HERE / words[0])
                print(f"--- {part.name}", flush=True)
                subprocess.run([sys.executable, *words], check=True)
                (ended / part.name).touch()
    if not options.list:
        write_into_docs("paper", table())
        print(table())


if __name__ == "__main__":
    main()
