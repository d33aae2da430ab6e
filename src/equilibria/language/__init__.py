"""Language models: embedding, head, model, generation."""

from equilibria.language.embeddings import Embedding
from equilibria.language.generate import generate, stream
from equilibria.language.heads import SoftmaxHead
from equilibria.language.model import LanguageModel, LanguageOutput, LanguageShape

__all__ = [
    "Embedding",
    "LanguageModel",
    "LanguageOutput",
    "LanguageShape",
    "SoftmaxHead",
    "generate",
    "stream",
]
