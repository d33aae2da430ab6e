"""Recipes: functions that return an experiment. ``equilibria train NAME`` trains it, and its flags change numbers."""

from collections.abc import Callable

from equilibria.lm.experiments import Experiment
from equilibria.lm.recipes.copying import copying, copying_400
from equilibria.lm.recipes.copying_baselines import copying_gru, copying_lstm, copying_tcn
from equilibria.lm.recipes.prefix_sums import prefix_sums
from equilibria.lm.recipes.ptb import ptb
from equilibria.lm.recipes.text import text
from equilibria.lm.recipes.tiny import tiny
from equilibria.lm.recipes.tiny_trellis import tiny_trellis
from equilibria.lm.recipes.trellis import (
    ptb_char_trellis,
    ptb_char_trellis_deep,
    ptb_trellis,
    ptb_trellis_deep,
    ptb_trellis_mos,
    wikitext103_trellis,
    wikitext103_trellis_deep,
)
from equilibria.lm.recipes.wikitext import (
    wikitext103_medium,
    wikitext103_medium_adaptive,
    wikitext103_seq,
    wikitext103_seq_jacobian,
    wikitext103_small,
    wikitext103_unrolled,
    wikitext103_v2,
    wikitext103_v2_jacobian_postln,
    wikitext103_v2_jacobian_preln,
)

RECIPES: dict[str, Callable[[], Experiment]] = {
    "tiny": tiny,
    "text": text,
    "tiny-trellis": tiny_trellis,
    "copying": copying,
    "copying-400": copying_400,
    "copying-lstm": copying_lstm,
    "copying-gru": copying_gru,
    "copying-tcn": copying_tcn,
    "prefix-sums": prefix_sums,
    "ptb": ptb,
    "ptb-trellis": ptb_trellis,
    "ptb-trellis-deep": ptb_trellis_deep,
    "ptb-trellis-mos": ptb_trellis_mos,
    "ptb-char-trellis": ptb_char_trellis,
    "ptb-char-trellis-deep": ptb_char_trellis_deep,
    "wikitext103-small": wikitext103_small,
    "wikitext103-medium": wikitext103_medium,
    "wikitext103-medium-adaptive": wikitext103_medium_adaptive,
    "wikitext103-v2": wikitext103_v2,
    "wikitext103-v2-jacobian-postln": wikitext103_v2_jacobian_postln,
    "wikitext103-v2-jacobian-preln": wikitext103_v2_jacobian_preln,
    "wikitext103-seq": wikitext103_seq,
    "wikitext103-seq-jacobian": wikitext103_seq_jacobian,
    "wikitext103-unrolled": wikitext103_unrolled,
    "wikitext103-trellis": wikitext103_trellis,
    "wikitext103-trellis-deep": wikitext103_trellis_deep,
}
"""All recipes of the library by their names on the command line."""

__all__ = [
    "RECIPES",
    "copying",
    "copying_400",
    "copying_gru",
    "copying_lstm",
    "copying_tcn",
    "prefix_sums",
    "ptb",
    "ptb_char_trellis",
    "ptb_char_trellis_deep",
    "ptb_trellis",
    "ptb_trellis_deep",
    "ptb_trellis_mos",
    "text",
    "tiny",
    "tiny_trellis",
    "wikitext103_medium",
    "wikitext103_medium_adaptive",
    "wikitext103_seq",
    "wikitext103_seq_jacobian",
    "wikitext103_small",
    "wikitext103_trellis",
    "wikitext103_trellis_deep",
    "wikitext103_unrolled",
    "wikitext103_v2",
    "wikitext103_v2_jacobian_postln",
    "wikitext103_v2_jacobian_preln",
]
