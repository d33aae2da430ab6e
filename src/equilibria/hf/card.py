"""The model card: what the model is, its score with the setting of the measurement, and how to use it."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from typing import Any

from equilibria.hf.configuration import blocks_of, seen_in_training
from equilibria.lm.runs.trained import Trained

_CARD = string.Template(
    """---
library_name: transformers
pipeline_tag: text-generation
tags: [deep-equilibrium, equilibria]
---

# $name

A language model whose output is the fixed point z* = f(z*, x) of one weight-tied cell (Bai, Kolter and Koltun,
*Deep Equilibrium Models*, 2019), trained with [equilibria](https://pypi.org/project/equilibria) for $step steps on
`$corpus`. It has $parameters parameters and $vocabulary $unit in its vocabulary.

```python
import equilibria.hf  # pip install "equilibria[hf]"
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # this folder
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200, do_sample=True, temperature=0.8)[0]))
```

Without that import, `from_pretrained(folder, trust_remote_code=True)` finds the classes by `equilibrium.py`. The
cache has one slot per position: $blocks. A position sees $window, as far as the training did.
`model(..., rtol=1e-6, max_evals=100)` solves one call more exactly; its output tells `evals`, `residual` and
`converged`.

## Score

$score
"""
)


def card(trained: Trained, events: Iterable[Mapping[str, Any]]) -> str:
    """The card of a run as Markdown.

    Args:
        trained: the run.
        events: the lines of its log.
    """
    experiment, events = trained.experiment, list(events)
    language: Any = experiment.model
    narrowed = seen_in_training(language, experiment.training.batches.segment_length)
    windows = [block.window for block in blocks_of(narrowed.cell)]
    start = next((event for event in events if event["event"] == "start"), {})
    return _CARD.substitute(
        name=experiment.name,
        step=f"{trained.step:,}",
        corpus=start.get("corpus", {}).get("name", trained.language.name),
        parameters=f"{sum(parameter.numel() for parameter in trained.model.parameters()):,}",
        vocabulary=f"{len(trained.vocabulary):,}",
        unit=_UNITS.get(trained.language.unit, "tokens"),
        blocks="one layer" if len(windows) <= 1 else f"{len(windows)} layers, one per block of the cell",
        window=f"{min(windows):,} positions, itself included" if windows else "all earlier positions",
        score=_score(trained, events),
    )


_UNITS = {"character": "characters", "word": "words", "symbol": "symbols"}


def _score(trained: Trained, events: list[Mapping[str, Any]]) -> str:
    """The validation of these weights, and the baseline of the run, as Markdown."""
    found = [event for event in events if event["event"] == "valid" and event["step"] == trained.step]
    if not found:
        return "These weights have no validation in the log of their run."
    event, setting = found[-1], found[-1].get("setting", {})
    lines = ["| on the validation text | bits per token | perplexity |", "|---|---|---|"]
    lines.append(f"| this model | {event['bits']:.3f} | {event['perplexity']:.2f} |")
    baseline = next((event for event in events if event["event"] == "baseline"), {"rows": []})
    lines += [f"| {row['label']} | {row['bits']:.3f} | {2 ** row['bits']:.2f} |" for row in baseline["rows"]]
    forward = event.get("forward") or {}
    lines += [
        "",
        f"Measured in segments of {setting.get('segment_length')} tokens in {setting.get('batch_size')} streams, with "
        f"a memory of {setting.get('memory_length')} positions, relative tolerance {setting.get('rtol')} and at most "
        f"{setting.get('max_evals')} evaluations per solve: {forward.get('evals', 0):.1f} were needed on average, and "
        f"{100 * forward.get('converged', 0):.1f} % of the solves converged.",
    ]
    return "\n".join(lines)
