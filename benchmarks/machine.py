"""What every result says about where it was measured, and where results are kept."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
"""Where the documentation and the README show them from."""


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions, GPU."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def keep(name: str, rows: Any, folder: Path = RESULTS) -> Path:
    """Writes FOLDER/NAME.json with the machine's description; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path


def publish(name: str, rows: Any, text: str, page: str = "evidence/reproducing") -> None:
    """Prints ``text``, keeps the rows, and puts the text into a page of the documentation."""
    print(text)
    print(keep(name, rows))
    write_into_docs(name, text, page)


def side_by_side(corner: str, columns: Mapping[str, Any], lines: Sequence[tuple[str, Callable[[Any], str]]]) -> str:
    """A table in Markdown with one column per entry of ``columns``: each line has its label and words for a column."""
    return "\n".join(
        [
            f"| {corner} | {' | '.join(columns)} |",
            "|---|" + "---:|" * len(columns),
            *(f"| {label} | {' | '.join(map(tell, columns.values()))} |" for label, tell in lines),
        ]
    )


def write_into_docs(name: str, text: str, page: str = "evidence/reproducing") -> None:
    """Puts ``text`` between the marks ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a page of the documentation."""
    path = RESULTS.parents[1] / "docs" / f"{page}.md"
    before, opening, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, closing, after = rest.partition(f"<!-- /{name} -->")
    if not (opening and closing):
        raise ValueError(f"{path} has no place for {name}: add the lines <!-- {name} --> and <!-- /{name} -->.")
    path.write_text(f"{before}{opening}{text}\n{closing}{after}", encoding="utf-8")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
