"""Language models: embedding, head, model, generation."""

from equilibria.language.adaptive import AdaptiveShape
from equilibria.language.adaptive_heads import AdaptiveHead, TiedAdaptiveHead, UntiedAdaptiveHead
from equilibria.language.clusters import AdaptiveEmbedding
from equilibria.language.embeddings import Embedding
from equilibria.language.generate import generate, stream
from equilibria.language.heads import SoftmaxHead
from equilibria.language.model import Explicit, LanguageModel, LanguageOutput, LanguageShape
from equilibria.language.recurrent import RecurrentShape

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveHead",
    "AdaptiveShape",
    "Embedding",
    "Explicit",
    "LanguageModel",
    "LanguageOutput",
    "LanguageShape",
    "RecurrentShape",
    "SoftmaxHead",
    "TiedAdaptiveHead",
    "UntiedAdaptiveHead",
    "generate",
    "stream",
]
