"""Hugging Face: equilibrium models where people load, generate, train and evaluate.

Importing this package registers the model, so that ``AutoModelForCausalLM.from_pretrained`` knows it.
"""

from equilibria.hf.configuration import EquilibriumConfig
from equilibria.hf.modeling import EquilibriumForCausalLM, EquilibriumOutput

__all__ = ["EquilibriumConfig", "EquilibriumForCausalLM", "EquilibriumOutput"]
