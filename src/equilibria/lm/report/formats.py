"""Numbers as people read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from equilibria.lm.score import in_words, measure


def strict_json(value: dict[str, Any]) -> str:
    """The output of a verb with --json: one object of JSON in ASCII; a number that is not finite is null."""
    return json.dumps(_finite(value), allow_nan=False, indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in the binary unit that fits: 43.1 MiB."""
    unit, scale = size_unit(value)
    scaled = value / scale
    return f"{scaled:.0f} {unit}" if scale == 1 or scaled >= 100 else f"{scaled:.1f} {unit}"


def size_unit(value: float) -> tuple[str, int]:
    """The binary unit that suits so many bytes, and how many bytes it has."""
    power = min(4, int(math.log(max(value, 1), 1024)))
    return ("B", "KiB", "MiB", "GiB", "TiB")[power], 1024**power


def duration(seconds: float) -> str:
    """Seconds as 0.3 s, 42 s, 3 min 07 s or 2 h 05 min."""
    whole = round(seconds)
    if whole == 0:
        return f"{seconds:.1g} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


def clock(seconds: float) -> str:
    """Seconds as 3:07 or 2:05:00, for displays that must not jump."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def percent(share: float) -> str:
    """0.9984 as 99.8 %; 100 % only if it is all."""
    return "100 %" if share >= 1 else f"{min(99.9, 100 * share):.1f} %"


def residual(value: float) -> str:
    """A relative residual: 8.1e-03."""
    return f"{value:.1e}"


def plain(value: float | None) -> float:
    """A number of the log as it was: null stands for one that was not finite, NaN."""
    return math.nan if value is None else float(value)


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are there and finite; NaN if there are none."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def quantity(event: dict[str, Any], unit: str) -> float:
    """The value of an event in the measure of its unit; nats, bits and perplexity are one number in three clothes."""
    key, _ = measure(unit)
    if key in event:
        return plain(event[key])
    name = next(name for name in ("nats", "loss", "bits") if name in event)
    nll = plain(event[name]) * (math.log(2) if name == "bits" else 1.0)
    return math.exp(min(nll, 700.0)) if key == "perplexity" else nll / math.log(2) if key == "bits" else nll


def number(event: dict[str, Any], unit: str) -> str:
    """``quantity`` with the digits that mean something."""
    value = quantity(event, unit)
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2e}"


def score(event: dict[str, Any], unit: str) -> str:
    """``quantity`` with one digit more, and its measure in words."""
    return in_words(quantity(event, unit), unit)


def full_score(event: dict[str, Any], unit: str) -> str:
    """``score``, and the bits per byte if the event has them."""
    return ", ".join(part for part in (score(event, unit), per_byte(event)) if part)


def per_byte(event: dict[str, Any]) -> str:
    """The bits per byte of a validation in words; empty if it has none, as of a synthetic task."""
    value = event.get("bits_per_byte")
    return "" if value is None else f"{float(value):.3f} bits per byte"


def conditions(event: dict[str, Any]) -> str:
    """The conditions of a validation score in words, without those that an older run has not written."""
    setting = event.get("setting") or {}
    known = {name: value for name, value in setting.items() if value is not None}
    parts = []
    if "memory_length" in known:
        parts.append(f"memory {count(known['memory_length'])}" if known["memory_length"] else "no memory")
    if "segment_length" in known:
        parts.append(f"segments of {count(known['segment_length'])}{repeated(known)}")
    if "batch_size" in known:
        parts.append(numbered(known["batch_size"], "stream"))
    if "max_evals" in known:
        parts.append(budget(known))
    if "tokens" in known:
        parts.append(scored(known))
    return ", ".join(parts)


def repeated(setting: dict[str, Any]) -> str:
    """The overlap of segments in brackets; empty where the memory is carried instead."""
    overlap = setting.get("overlap", 0)
    return f" ({count(overlap)} repeat the one before)" if overlap else ""


def budget(setting: dict[str, Any]) -> str:
    """Budget and tolerance of the solves; without a tolerance the budget is always spent."""
    if setting["rtol"] == setting["atol"] == 0:
        return f"{numbered(setting['max_evals'], 'evaluation')} and no tolerance"
    return f"at most {numbered(setting['max_evals'], 'evaluation')}, {tolerance(setting)}"


def tolerance(setting: dict[str, Any]) -> str:
    """The relative tolerance; where there is none, the absolute one, if there is that."""
    if setting["rtol"] > 0:
        return f"tolerance {setting['rtol']:g}"
    return f"absolute tolerance {setting['atol']:.2g}" if setting["atol"] > 0 else "no tolerance"


def scored(setting: dict[str, Any]) -> str:
    """How many tokens of the text were scored."""
    return f"{count(setting['tokens'])} of {count(setting['stream_tokens'])} tokens"


def numbered(number: int, thing: str) -> str:
    """1 stream, 2 streams."""
    return f"{count(number)} {thing}{'' if number == 1 else 's'}"


def network(model: dict[str, Any]) -> str:
    """The kind of a model, by its part of experiment.json."""
    explicit = model.get("explicit")
    if model.get("kind") == "RecurrentConfig":
        channels = numbered(model.get("hidden", 0), "channel")
        return f"a recurrent network ({str(model.get('network', '')).upper()}) of {channels}"
    if model.get("kind") == "ConvolutionalConfig":
        size = f"{numbered(model.get('levels', 0), 'block')} and {numbered(model.get('channels', 0), 'channel')}"
        return f"a convolutional network (TCN) of {size}"
    if explicit:
        weights = "the weights of one cell" if explicit.get("tied", True) else "weights of their own"
        return f"an explicit network of {numbered(explicit.get('depth', 0), 'layer')} with {weights}"
    return "a deep equilibrium model"


def common(labels: Iterable[str]) -> tuple[str, list[str]]:
    """["A order 1", "A order 2"] as "A" and ["order 1", "order 2"]: the first words that all share are said once."""
    words = [label.split() for label in labels]
    if len(words) == 1:
        return " ".join(words[0]), [""]
    shared = 0
    while all(len(label) > shared + 1 for label in words) and len({label[shared] for label in words}) == 1:
        shared += 1
    shared -= shared > 1  # keep the last common word with the numbers: "order 1", not "1"
    return " ".join(words[0][:shared]), [" ".join(label[shared:]) for label in words]
