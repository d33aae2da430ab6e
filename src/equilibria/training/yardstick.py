"""yardstick: what counting alone gets out of a corpus, to be printed beside a model's loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from equilibria.corpora import Corpus, witten_bell
from equilibria.training.metrics import Event


def yardstick(corpus: Corpus, orders: Sequence[int] = (1, 2, 3, 4)) -> list[Event]:
    """Validation bits per token of Witten–Bell models with contexts of 1, 2, … tokens: rows with label and bits."""
    rows: list[Event] = []
    for order in orders:
        nats = witten_bell(corpus.train.ids, corpus.valid.ids, order, len(corpus.vocabulary))
        rows.append({"label": f"Witten–Bell order {order}", "bits": nats / math.log(2)})
    return rows
