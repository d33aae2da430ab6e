"""Hugging Face: equilibrium models where people load, generate, train and evaluate.

Importing this package registers its classes, so that ``AutoModelForCausalLM.from_pretrained`` knows them.
"""

from equilibria.hf.configuration import EquilibriumConfig
from equilibria.hf.edges import EDGE
from equilibria.hf.modeling import EquilibriumForCausalLM, EquilibriumOutput
from equilibria.hf.retrofit import equilibrium_of
from equilibria.hf.runs import Converted, export, from_run
from equilibria.hf.tokenization import EquilibriumTokenizer, tokenizer_of

__all__ = [
    "EDGE",
    "Converted",
    "EquilibriumConfig",
    "EquilibriumForCausalLM",
    "EquilibriumOutput",
    "EquilibriumTokenizer",
    "equilibrium_of",
    "export",
    "from_run",
    "tokenizer_of",
]
