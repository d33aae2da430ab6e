"""Seconds of a piece of work on a device, how often the host waits in it, and the gaps between its kernels."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Device = torch.device | str
KERNELS = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""Categories of a profile's events that are work of the device; on a CPU operators, which may contain others."""


def wait(device: Device) -> None:
    """Wait until a GPU has done all that it was given; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: Device = "cpu") -> float:
    """Wall time of ``work``. A GPU is waited for before and after it, not inside."""
    return timed(work, device)[0]


def timed(work: Callable[[], Any], device: Device = "cpu") -> tuple[float, Any]:
    """The same, and the result of ``work``."""
    wait(device)
    began = time.perf_counter()
    result = work()
    wait(device)
    return time.perf_counter() - began, result


def waits(work: Callable[[], Any], device: Device) -> int | None:
    """How often the host waits for the GPU inside ``work``, as far as PyTorch notices; None on a CPU.

    Waiting for an event that was recorded one evaluation before is not counted: the device has more to do then.
    """
    if torch.device(device).type != "cuda":
        work()
        return None
    wait(device)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in heard)


def gaps(work: Callable[[], Any], device: Device) -> dict[str, Any]:
    """Kernels of ``work``, the time from the first to the last, and the share of it in which none ran.

    Recording takes time on the host, so that a device that waits for its host seems to wait a little longer.
    """
    kind = torch.device(device).type
    activity = ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU
    wait(device)
    with profile(activities=[activity]) as recorded:
        work()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return between(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in KERNELS[kind]
    )


def between(events: Iterable[tuple[float, float, str]], *, longest: int = 5) -> dict[str, Any]:
    """What ``gaps`` returns, from the beginning, the end and the name of each event, in microseconds."""
    ordered = sorted(events)
    if not ordered:
        raise ValueError("the profile has no kernel: did the work run on another device?")
    end, last = ordered[0][1], ordered[0][2]
    idle: list[dict[str, Any]] = []
    for began, ended, name in ordered:
        if began > end:
            idle.append({"us": began - end, "after": last[:80], "before": name[:80]})
        if ended > end:
            end, last = ended, name
    span = end - ordered[0][0]
    return {
        "kernels": len(ordered),
        "span_us": span,
        "idle_share": sum(gap["us"] for gap in idle) / span if span else 0.0,
        "longest": sorted(idle, key=lambda gap: -gap["us"])[:longest],
    }
